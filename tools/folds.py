"""What of a chapter a reader meets without opening a fold: folds.py nbs

A cell is folded on the site and collapsed in JupyterLab where it is a solution, imports, a helper of the library, the
code of a figure, checks a claim, says `#| code-fold: true`, or belongs to the checks of its section: `#| checks` leads such a cell of
code, `<!-- checks -->` such a cell of text.  Run as a program, it writes into the notebooks what is collapsed, and prints what is left.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from notebooks import (
    COLLAPSED,
    IN_CHECKS,
    find,
    in_workshop,
    split_directives,
    without_magics,
)

WORDS, LINES = 2500, 300  # that a reader of a chapter meets at most
FORMULA = re.compile(r"^\$\$.*?^\$\$.*?$", re.M | re.S)
CHECKS, IMPORTS, HELPERS, FIGURE = (
    "Checks",
    "Imports",
    "Helpers of the library",
    "The figure's code",
)
CLAIM = "Checked claim"


def fold(name: str, cell: NotebookNode) -> str:
    """What is written on the fold that a cell stands in, or nothing where it is open."""
    if cell.cell_type != "code":
        return CHECKS * cell.source.startswith(IN_CHECKS)
    directives, source = split_directives(cell.source)
    if "checks" in directives:
        return CHECKS
    asked = directives.get("code-fold", [""])[0]
    if asked == "true":
        return directives.get("code-summary", ["Code"])[0].strip("\"'")
    if asked != "false" and "fig-cap" in directives:
        return FIGURE
    if asked != "false" and "claim" in directives and "test" not in directives:
        return CLAIM
    if "exporti" in directives:
        return "" if in_workshop(name) else HELPERS
    return IMPORTS * imports_only(source)


def imports_only(source: str) -> bool:
    """Whether a cell does nothing but import."""
    try:
        body = ast.parse(without_magics(source)).body
    except SyntaxError:
        return False
    inner = [n for node in body for n in (node.body if isinstance(node, ast.Try) else [node])]
    return bool(inner) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in inner)


def open_lines(name: str, cell: NotebookNode) -> int:
    """Lines of code that a reader meets in a cell."""
    directives, source = split_directives(cell.source)
    unseen = directives.keys() & {"hide", "default_exp"} or "false" in directives.get("echo", [])
    return 0 if unseen or fold(name, cell) else len(source.splitlines())


def main_path(name: str, book: NotebookNode) -> tuple[int, int]:
    """Words and lines of code outside folds; displayed formulas are not counted."""
    text = [c.source for c in book.cells if c.cell_type == "markdown" and not fold(name, c)]
    words = sum(len(FORMULA.sub("", source).split()) for source in text)
    return words, sum(open_lines(name, c) for c in book.cells if c.cell_type == "code")


def problems(name: str, book: NotebookNode) -> list[str]:
    """What is wrong with the folds of a chapter: too much outside of them, an equation or heading inside."""
    words, lines = main_path(name, book)
    bad = [
        f"{name} shows {there} {what} outside folds, more than {most}: put what a first reading "
        "does without into the checks of its section (`#| checks`, `<!-- checks -->`)"
        for there, most, what in ((words, WORDS, "words"), (lines, LINES, "lines of code"))
        if there > most and not in_workshop(name)
    ]
    text = [c for c in book.cells if c.cell_type == "markdown" and fold(name, c)]
    return bad + [
        f"{name}: cell {cell.id} is folded and holds a heading or an equation"
        for cell in text
        if re.search(r"^#|^\$\$ \(eq-", cell.source, re.M)
    ]


def collapse(name: str, book: NotebookNode) -> NotebookNode:
    """The notebook, collapsed in JupyterLab where it is folded on the site."""
    for cell in book.cells:
        cell.metadata = NotebookNode(COLLAPSED if fold(name, cell) else {})
    return book


def main(folder: str) -> None:
    for path in find(Path(folder)):
        text = path.read_text(encoding="utf-8")
        book = collapse(path.stem, nbformat.reads(text, as_version=4))
        if (new := nbformat.writes(book) + "\n") != text:
            path.write_text(new, encoding="utf-8")
        if not in_workshop(path.stem):
            words, lines = main_path(path.stem, book)
            print(f"{path.stem:24} {words:5} words {lines:5} lines outside folds")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
