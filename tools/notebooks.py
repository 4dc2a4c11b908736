"""Notebooks as the tools see them: cells with their directives and their section.

A directive is a leading line `#| key`, `#| key value` or `#| key: value` of a code cell; it may be given several times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
FENCE = re.compile(r"\s*(```|~~~)")
SECTION = re.compile(r"##?\s")
MAGIC = re.compile(r"\s*[%!]")
OTHER_LANGUAGE = re.compile(r"\s*%%(?!time|timeit|capture|prun)")

KNOWN = {
    *("default_exp", "export", "exporti", "exports", "eval", "notest"),  # nbdev's
    *("test", "proves", "breaks", "setup", "show", "slow", "cuda", "data"),  # the tests'
    *("hide", "echo", "output", "include", "warning", "code-fold", "code-summary", "output-fold"),
    *("label", "fig-cap", "fig-alt", "tbl-cap", "checks", "claim"),  # the site's
}
IN_CHECKS = "<!-- checks -->"  # leads a markdown cell that belongs to the checks of its section
COLLAPSED = {"jupyter": {"source_hidden": True}}  # metadata of a cell that JupyterLab collapses


@dataclass(frozen=True)
class Cell:
    """One cell; `source` is its text without directives and magics."""

    id: str
    kind: str
    source: str
    section: int  # how many H1 and H2 headings stand at or above the cell
    directives: dict[str, list[str]] = field(default_factory=dict)

    def has(self, *keys: str) -> bool:
        return any(key in self.directives for key in keys)

    def values(self, key: str) -> list[str]:
        """What a directive lists, over all its lines: `#| proves: eq-a, eq-b` gives two values."""
        return re.findall(r"[^\s,]+", " ".join(self.directives.get(key, [])))


@dataclass(frozen=True)
class Notebook:
    name: str  # "08_maml"
    cells: list[Cell]
    problems: list[str]  # directives and code that cannot be read


def split_directives(source: str) -> tuple[dict[str, list[str]], str]:
    """The directives that lead a cell, and the rest of it."""
    directives: dict[str, list[str]] = {}
    lines = source.splitlines()
    while lines and (
        not lines[0].strip() or lines[0].startswith("%%") or DIRECTIVE.match(lines[0])
    ):
        if found := DIRECTIVE.match(lines.pop(0)):
            directives.setdefault(found[1], []).append(found[2])
    return directives, "\n".join(lines).rstrip()


def without_magics(source: str) -> str:
    """The cell as Python; lines are taken for magics only in a cell that is not Python as it stands.

    Raises SyntaxError if it is not Python without them either.
    """
    try:
        compile(source, "cell", "exec", dont_inherit=True)
    except SyntaxError:
        source = "\n".join(line for line in source.splitlines() if not MAGIC.match(line))
        compile(source, "cell", "exec", dont_inherit=True)
    return source


def headings(markdown: str) -> int:
    """How many H1 and H2 headings a markdown cell holds (a comment in a fenced block is none)."""
    count, fenced = 0, False
    for line in markdown.splitlines():
        fenced ^= bool(FENCE.match(line))
        count += not fenced and bool(SECTION.match(line))
    return count


def _read_code(source: str) -> tuple[dict[str, list[str]], str, list[str]]:
    """The directives of a code cell, its Python, and what is wrong with them."""
    directives, source = split_directives("" if OTHER_LANGUAGE.match(source) else source)
    problems = [f"does not know the directive `#| {key}`" for key in directives if key not in KNOWN]
    late = [line for line in source.splitlines() if line.startswith("#|")]
    problems += [f"has the directive `{line}` below its first line of code" for line in late]
    try:
        return directives, without_magics(source), problems
    except SyntaxError as error:
        return directives, "", [*problems, f"is not Python: {error.msg}"]


def read(path: Path) -> Notebook:
    """Read one notebook."""
    cells, problems, section = [], [], 0
    for raw in nbformat.read(path, as_version=4).cells:
        directives, source, wrong = {}, raw.source, []
        if raw.cell_type == "markdown":
            section += headings(source)
        elif raw.cell_type == "code":
            directives, source, wrong = _read_code(source)
        cells.append(Cell(raw.id, raw.cell_type, source, section, directives))
        problems += [f"{path.name}: cell {raw.id} {problem}" for problem in wrong]
    return Notebook(path.stem, cells, problems)


def in_workshop(name: str) -> bool:
    """Whether a notebook is of the workshop, which shows how things are made."""
    return name.startswith("A")


def find(folder: Path) -> list[Path]:
    """The notebooks of a folder, in reading order."""
    return sorted(path for path in folder.glob("*.ipynb") if path.name[0] not in "._")


def unclean(path: Path) -> list[str]:
    """What keeps a notebook from being as committed ones are: nbformat 4.5, unique ids, no outputs."""
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    if (book.nbformat, book.nbformat_minor) != (4, 5):
        return [f"{path.name}: is nbformat {book.nbformat}.{book.nbformat_minor}, not 4.5"]
    ids = [cell.id for cell in book.cells]
    bad = [f"cell id {i} appears twice" for i in sorted({i for i in ids if ids.count(i) > 1})]
    if extra := sorted(set(book.metadata) - {"kernelspec"}):
        bad.append(f"has metadata {extra}")
    for cell in book.cells:
        if cell.get("outputs") or cell.get("execution_count"):
            bad.append(f"cell {cell.id} holds outputs or an execution count")
        if cell.metadata not in ({}, COLLAPSED):
            bad.append(f"cell {cell.id} has metadata {sorted(cell.metadata)}")
    try:
        nbformat.validate(book)
    except nbformat.ValidationError as error:
        bad.append(f"is no valid notebook: {str(error).splitlines()[0]}")
    return [f"{path.name}: {b}" for b in bad]
