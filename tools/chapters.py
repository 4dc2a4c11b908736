"""Chapters as tests need them: which cells and names a test may hold, and what is refused (see cells_to_tests.py)."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from notebooks import Cell, Notebook, find, read
from scopes import Names, asserts, called, changed, later, names, reads_first

LIBRARY = "metabook"
EXPORTS = ("export", "exporti", "exports")
BUILTINS = set(dir(builtins))
UNREACHABLE = {
    "globals",
    "locals",
    "exec",
    "eval",
}  # in a test they see other names than in a notebook
NAME = re.compile(r"(?!test_)[a-z][a-z0-9_]*")


class Refused(Exception):
    """Notebooks break rules; one argument for each time."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class Import(NamedTuple):
    """One imported name; `module` is None for `import name`."""

    module: str | None
    name: str
    alias: str | None

    @property
    def binds(self) -> str:
        return self.alias or (self.name if self.module else self.name.split(".")[0])

    def __str__(self) -> str:
        return f"{self.name} as {self.alias}" if self.alias else self.name


def imports_of(node: ast.stmt) -> list[Import]:
    """The names that a statement imports; none if it is no import."""
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [Import(module, a.name, a.asname) for a in node.names]
    return (
        [Import(None, a.name, a.asname) for a in node.names] if isinstance(node, ast.Import) else []
    )


def is_device(node: ast.stmt) -> bool:
    """Whether a statement is `device = ...`."""
    return isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [
        "device"
    ]


def lines_of(nodes: Iterable[ast.stmt]) -> set[int]:
    return {n for node in nodes for n in range(node.lineno, node.end_lineno + 1)}


@dataclass(frozen=True, eq=False)
class Piece:
    """A code cell as tests hold it: without imports and `device = ...`."""

    cell: Cell
    code: str

    @property
    def role(self) -> str:
        if self.cell.has("test"):
            return "test"
        if self.cell.has("setup"):
            return "once" if "once" in self.cell.directives["setup"] else "setup"
        return "section"

    @property
    def function(self) -> str:
        """The name of the test, or of the fixture, that it becomes."""
        if self.role == "test":
            return f"test_{self.cell.directives['test'][0]}"
        return "once_" + self.cell.id.replace("-", "_")

    @cached_property
    def names(self) -> Names:
        return names(self.code)

    @cached_property
    def reads_first(self) -> set[str]:
        return reads_first(self.code)

    @cached_property
    def later(self) -> set[str]:
        return later(self.code)

    @cached_property
    def deletes(self) -> bool:
        return any(
            isinstance(node, ast.Delete | ast.Nonlocal) for node in ast.walk(ast.parse(self.code))
        )


class Test(NamedTuple):
    """What one function of a test file is made of: a test, or the fixture of a `#| setup: once` cell."""

    own: Piece
    pieces: list[Piece]  # in the order of the notebook, the own one last
    once: dict[Piece, list[str]]  # the fixtures that give some of its names, and which

    @property
    def binds(self) -> set[str]:
        return {name for piece in self.pieces for name in piece.names.binds}

    @property
    def needs(self) -> set[str]:
        """Every name that it takes from outside of its pieces."""
        return {name for piece in self.pieces for name in piece.names.needs} - self.binds

    @property
    def shared(self) -> set[str]:
        return {name for given in self.once.values() for name in given}


@dataclass
class Chapter:
    """A notebook, sorted into what its tests may hold. What breaks a rule stands in `problems`."""

    notebook: Notebook
    imports: dict[str, set[Import]] = field(default_factory=dict)  # by the name that they bind
    exports: dict[str, str] = field(default_factory=dict)  # name -> module
    pieces: list[Piece] = field(default_factory=list)
    left_out: dict[str, Cell] = field(default_factory=dict)  # names that no test can have
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.problems += self.notebook.problems
        for cell in self.notebook.cells:
            if cell.kind == "code" and not cell.has("default_exp"):
                self._sort(cell)
        self._check_imports()
        self._check_test_names()
        for piece in self.pieces:
            self._check_flags(piece)
            if piece.role in ("test", "once"):
                self._check_test(self.compose(piece))

    @property
    def module(self) -> str | None:
        """The module that the notebook writes by default."""
        return next((v for c in self.notebook.cells for v in c.values("default_exp")), None)

    @property
    def modules(self) -> list[str]:
        """Every module that the notebook writes to."""
        return sorted(set(self.exports.values()))

    @property
    def tests(self) -> list[Piece]:
        return [p for p in self.pieces if p.role == "test"]

    @property
    def outside(self) -> set[str]:
        """The names that every test may take from the library and the imports."""
        return set(self.imports) | set(self.exports)

    def refuse(self, cell: Cell | None, message: str) -> None:
        """Note that a cell (or the notebook) breaks a rule."""
        where = f": cell {cell.id}" if cell else ""
        test = f" (test_{cell.directives['test'][0]})" if cell and cell.has("test") else ""
        problem = f"{self.notebook.name}.ipynb{where}{test} {message}"
        if problem not in self.problems:
            self.problems.append(problem)

    # --- sorting cells

    def _sort(self, cell: Cell) -> None:
        """Put one cell where it belongs: imports, exports, what tests hold, what they leave out."""
        never_run = cell.directives.get("eval") == ["false"]
        code = cell.source if never_run else self._hoist(cell)
        tree = ast.parse(code)
        exported, left_out = cell.has(*EXPORTS), never_run or self._unseen(cell)
        if exported:
            self._export(cell, code)
        elif left_out:
            self.left_out.update(dict.fromkeys(names(code).binds, cell))
        elif tree.body and not all(called(getattr(n, "value", n)) == "show_doc" for n in tree.body):
            self.pieces.append(Piece(cell, code))
            return
        if cell.has("test", "proves", "breaks"):
            self.refuse(cell, "is flagged as a test, but holds nothing that tests may hold")
        elif cell.has("show") and not cell.has("claim") and asserts(tree):
            self.refuse(
                cell,
                "asserts and is flagged `#| show`, so that no test holds it: give it a name instead",
            )

    @staticmethod
    def _unseen(cell: Cell) -> bool:
        """Whether no test holds a cell: what is only shown, and what the build alone checks."""
        return cell.has("show", "notest") or (cell.has("claim") and not cell.has("test", "setup"))

    def _hoist(self, cell: Cell) -> str:
        """Take the imports of a cell to the top of the file, drop `device = ...`, return the rest."""
        body = ast.parse(cell.source).body
        out = [node for node in body if imports_of(node) or is_device(node)]
        if lines_of(out) & lines_of(node for node in body if node not in out):
            self.refuse(
                cell, "has an import or `device = ...` on a line with other code: give it its own"
            )
        for new in (i for node in out for i in imports_of(node)):
            self.imports.setdefault(new.binds, set()).add(new)
        gone = lines_of(out)
        lines = enumerate(cell.source.splitlines(), 1)
        return "\n".join(line for n, line in lines if n not in gone).strip("\n")

    def _export(self, cell: Cell, code: str) -> None:
        to = next((v for key in EXPORTS for v in cell.values(key)), self.module)
        if to is None:
            self.refuse(cell, "exports, and no `#| default_exp module` says where to")
        else:
            self.exports.update(dict.fromkeys(names(code).binds, to))

    # --- rules for cells

    def _check_imports(self) -> None:
        for name, found in self.imports.items():
            if name == "*":
                self.refuse(None, "imports *: say which names")
            elif len({i if i.module or i.alias else name for i in found}) > 1:
                self.refuse(None, f"imports two things as `{name}`: rename one")
            elif name in self.exports and {i.module for i in found} != {self._home(name)}:
                self.refuse(None, f"imports and exports `{name}`: rename one")

    def _home(self, name: str) -> str:
        return f"{LIBRARY}.{self.exports[name]}"

    def _check_test_names(self) -> None:
        seen: dict[str, Cell] = {}
        for cell in (piece.cell for piece in self.tests):
            given = cell.directives["test"]
            if len(given) > 1 or not NAME.fullmatch(given[0]):
                self.refuse(
                    cell, f"needs one name of a-z, 0-9 and _, without test_ in front, not {given}"
                )
            elif seen.setdefault(given[0], cell) is not cell:
                self.refuse(cell, f"has the name of the test in cell {seen[given[0]].id}")

    def _check_flags(self, piece: Piece) -> None:
        """Flags that are missing, wrong or do not go together, and code that cannot move into a function."""
        cell, tree = piece.cell, ast.parse(piece.code)
        if piece.role != "test" and asserts(tree, inside_functions=piece.role == "section"):
            self.refuse(cell, "asserts and has no name: give it one with `#| test: name`")
        if piece.role != "test" and cell.has("proves", "breaks"):
            self.refuse(cell, "proves something and has no name: give it one with `#| test: name`")
        if piece.role == "test" and cell.has("setup"):
            self.refuse(cell, "is flagged as a test and as a setup")
        if cell.directives.get("setup", [""]) not in ([""], ["once"]):
            self.refuse(
                cell,
                f"says `setup: {cell.directives['setup'][0]}`: known are `setup` and `setup: once`",
            )
        if any(isinstance(n, ast.Global) for n in ast.walk(tree)):
            self.refuse(cell, "says `global`: in a test it would mean other names")
        if bad := piece.names.needs & UNREACHABLE:
            self.refuse(cell, f"uses `{min(bad)}`, which in a test sees other names")
        taken = piece.names.needs & set(self.once_above(piece))
        if piece.role == "setup" and taken:
            self.refuse(cell, f"uses `{min(taken)}` of a `#| setup: once` cell: flag it `once` too")

    # --- tests

    def held_by(self, own: Piece) -> list[Piece]:
        """The pieces of a test: setups above, earlier cells of its section, itself.

        Another test is held where what it binds is needed: what it changes in place, no other test may count on. A setup
        that shares no name with the others is left out: nothing that it does is seen there.
        """
        above = self.pieces[: self.pieces.index(own)]
        near = [p for p in above if own.role == "test" and p.cell.section == own.cell.section]
        setups = {p for p in above if p.role == "setup"}
        tests = {p for p in near if p.role == "test"}
        held = {own, *(p for p in near if p.role == "section")}
        held |= {p for p in setups if not self._made(p)}  # such as one seed for all
        while more := {
            *(p for p in setups - held if any(self._made(p) & self._made(h) for h in held)),
            *(p for p in tests - held if any(self._gives(p, h) for h in held)),
        }:
            held |= more
        return [p for p in self.pieces if p in held]

    def _gives(self, piece: Piece, to: Piece) -> bool:
        """Whether a piece binds what another, further down, needs."""
        below = self.pieces.index(piece) < self.pieces.index(to)
        return below and bool(piece.names.binds & (to.names.needs | to.reads_first))

    def _made(self, piece: Piece) -> set[str]:
        """The names of a piece that stand for what cells have made and may change."""
        names = piece.names.binds | piece.names.needs
        return names - self.outside - BUILTINS - set(self.once_above(piece)) - {"device"}

    def once_above(self, own: Piece) -> dict[str, Piece]:
        """The names that `#| setup: once` cells above a piece bind."""
        above = self.pieces[: self.pieces.index(own)]
        return {name: p for p in above if p.role == "once" for name in p.names.binds}

    def compose(self, own: Piece, pieces: list[Piece] | None = None) -> Test:
        """A test, or the fixture of a `#| setup: once` cell, from its pieces."""
        pieces = pieces or self.held_by(own)
        test, givers = Test(own, pieces, {}), self.once_above(own)
        for name in sorted(test.needs & set(givers) - self.outside):
            test.once.setdefault(givers[name], []).append(name)
        return test

    def _check_test(self, test: Test) -> None:
        """Refuse a test that reaches further than it may, or changes what it shares."""
        cell = test.own.cell
        for name in sorted(test.needs - self.outside - test.shared - BUILTINS - {"device"}):
            self.refuse(cell, self._out_of_reach(test, name))
        for name, piece in self._rebound(test):
            self.refuse(cell, f"binds `{name}` anew (in cell {piece.cell.id}): rename it there")
        for name in sorted(set().union(*(changed(p.code) for p in test.pieces)) & test.shared):
            self.refuse(cell, f"changes `{name}`, which tests share: change a copy")
        classes = {name for piece in test.pieces for name in piece.names.in_classes}
        for name in sorted(classes & test.binds):
            self.refuse(cell, f"has a class that reads and binds `{name}`, as cells do: rename one")

    def _rebound(self, test: Test) -> list[tuple[str, Piece]]:
        """Names that a test takes from outside and binds itself, which one function cannot do."""
        never = self.outside | test.shared | {"device"}
        not_after_reading = BUILTINS | set(self.once_above(test.own))
        found, bound = [], set()
        for piece in test.pieces:
            wrong = never | (not_after_reading & piece.reads_first - bound)
            found += [(name, piece) for name in sorted(piece.names.binds & wrong)]
            bound |= piece.names.binds
        return found

    def _out_of_reach(self, test: Test, name: str) -> str:
        """Why a test cannot have a name, and what to do."""
        user = next(p.cell for p in test.pieces if name in p.names.needs)
        says = f"uses `{name}`" + (f" (in cell {user.id})" if user is not test.own.cell else "")
        binder = next((p for p in self.pieces if name in p.names.binds), None)
        if name in self.left_out:
            return f"{says} of cell {self.left_out[name].id}, which no test holds"
        if binder is None:
            return f"{says}, which no cell binds"
        if binder.role in ("setup", "once"):
            return f"{says} of the setup cell {binder.cell.id}, which stands further down"
        return f"{says} of cell {binder.cell.id}: flag that cell `#| setup`, or move it into this section, above"


def read_book(folder: Path) -> list[Chapter]:
    """Every notebook of a folder, in order; raises Refused with everything that breaks a rule."""
    chapters = [Chapter(read(path)) for path in find(folder)]
    if problems := [p for chapter in chapters for p in chapter.problems]:
        raise Refused(*problems)
    return chapters
