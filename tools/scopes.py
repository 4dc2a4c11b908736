"""Which names a piece of code binds and reads, by Python's own symbol tables."""

from __future__ import annotations

import ast
import re
import symtable
from collections.abc import Iterator
from typing import NamedTuple

ASSERTS = re.compile(r"(test|assert)_\w+|raises")


class Names(NamedTuple):
    """The names of a piece of code that runs inside a function."""

    binds: set[str]
    needs: set[str]  # taken from outside of it
    in_classes: set[str]  # read in a class body that binds them too


def in_function(code: str, head: str = "def _():") -> str:
    """The code as the body of a function; the inside of a string of several lines stays as it is."""
    strings = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant | ast.JoinedStr)]
    inside = {n for s in strings for n in range(s.lineno + 1, s.end_lineno + 1)}
    lines = enumerate(code.splitlines(), 1)
    return "\n".join([head, *(s if n in inside or not s else f"    {s}" for n, s in lines)])


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


class _Generators(ast.NodeTransformer):
    """Turns comprehensions into generators, whose variables are their own on every version of Python."""

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.GeneratorExp:
        return ast.GeneratorExp(self.visit(node.elt), [self.visit(g) for g in node.generators])

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.GeneratorExp:
        pair = ast.Tuple([node.key, node.value], ast.Load())
        return ast.GeneratorExp(self.visit(pair), [self.visit(g) for g in node.generators])


def names(code: str) -> Names:
    """What code binds and needs when it is the body of a function."""
    tree = _Generators().visit(ast.parse(code))
    if not tree.body:
        return Names(set(), set(), set())
    text = in_function(ast.unparse(ast.fix_missing_locations(tree)))
    function = symtable.symtable(text, "cell", "exec").get_children()[0]
    binds = {s.get_name() for s in function.get_symbols() if s.is_local()}
    symbols = [(t.get_type(), s) for t in _tables(function) for s in t.get_symbols()]
    needs = {s.get_name() for _, s in symbols if s.is_global()}
    # Such a name is looked up in the class, then among the globals: never in a function around it.
    classes = [s for kind, s in symbols if kind == "class"]
    in_classes = {s.get_name() for s in classes if s.is_assigned() and s.is_referenced()}
    return Names(binds, needs, in_classes)


def later(code: str) -> set[str]:
    """The names that functions and classes of a piece of code look up when they run, which may be later."""
    tree = ast.parse(code)
    if not tree.body:
        return set()
    cell = symtable.symtable(in_function(code), "cell", "exec").get_children()[0]
    own = [
        t
        for child in cell.get_children()
        for t in ([child] if not _at_once(child) else child.get_children())
    ]
    outside = {
        s.get_name() for t in own for u in _tables(t) for s in u.get_symbols() if s.is_global()
    }
    return outside | {s.get_name() for t in own for s in t.get_symbols() if s.is_free()}


def _at_once(table: symtable.SymbolTable) -> bool:
    """Whether it is a comprehension, which has run when the statement is over."""
    return table.get_name() in ("listcomp", "setcomp", "dictcomp")


def reads_first(code: str) -> set[str]:
    """The names of which top-level statements read the value that they had before."""
    first, bound = set(), set()
    for statement in ast.parse(code).body:
        own = names(ast.unparse(statement))
        needs = own.needs
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and statement.value:
            needs = needs | names(ast.unparse(statement.value)).needs
        if isinstance(statement, ast.AugAssign):
            needs = needs | own.binds
        first |= needs - bound
        bound |= own.binds
    return first


def changed(code: str) -> set[str]:
    """The names of which code sets or deletes a part: `name.x = ...`, `del name[i]`."""
    roots = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            roots.add(getattr(node, "id", None))
    return roots


def called(node: ast.AST) -> str:
    """The last name of what a call calls; empty for anything else."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def asserts(tree: ast.AST, inside_functions: bool = True) -> bool:
    """Whether code checks something, with `assert` or a call such as `torch.testing.assert_close`."""
    if isinstance(tree, ast.Assert) or ASSERTS.fullmatch(called(tree)):
        return True
    if not inside_functions and isinstance(tree, ast.FunctionDef | ast.ClassDef | ast.Lambda):
        return False
    return any(asserts(child, inside_functions) for child in ast.iter_child_nodes(tree))
