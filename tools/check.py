"""What `make check` looks at in a few seconds: check.py

Library and chapter tests are what the notebooks say, notebooks are clean, every equation has a proof that can be tried,
every exported learner is in the registry, no module of the library imports one that stands below it in docs/order.txt, and chapters
that are named are linked.  Chapters show no more than they may outside folds, claim what they judge, and use the letters of the notation page.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import claims
import folds
import nbformat
import notation
from cells_to_tests import files_of
from chapters import LIBRARY, Refused, read_book
from notebooks import ROOT, find, read, unclean

NBS, PACKAGE, TESTS = ROOT / "nbs", ROOT / LIBRARY, ROOT / "tests" / "chapters"


def exported() -> dict[str, str]:
    """The library as nbdev writes it from the notebooks, by file name."""
    with TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copytree(NBS, copy / "nbs", ignore=shutil.ignore_patterns(".*"))
        shutil.copy(ROOT / "settings.ini", copy)
        (copy / LIBRARY).mkdir()
        for by_hand in PACKAGE.glob("__*__.py"):
            shutil.copy(by_hand, copy / LIBRARY)
        command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export as e; e()"]
        subprocess.run(command, cwd=copy, check=True)
        return {
            file.name: file.read_text(encoding="utf-8") for file in (copy / LIBRARY).glob("*.py")
        }


def differences(made: dict[str, str], folder: Path) -> list[str]:
    """Where the files of a folder are not what was made again from the notebooks."""
    there = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.py")}
    where, both = folder.relative_to(ROOT), made.keys() & there.keys()
    bad = [f"{where}/{name} is missing" for name in made.keys() - there.keys()]
    bad += [f"{where}/{name} comes from no notebook" for name in there.keys() - made.keys()]
    bad += [
        f"{where}/{name} is not what the notebook says"
        for name in both
        if made[name] != there[name]
    ]
    return [f"{b}: run `make export`" for b in sorted(bad)]


def unclaimed() -> list[str]:
    return claims.of_book(NBS)


def unnoted() -> list[str]:
    return notation.problems(NBS, notation.PAGE.read_text(encoding="utf-8"))


def unreadable_references() -> list[str]:
    """What is wrong with the bibliography, which Sphinx would say after the whole book has run."""
    from pybtex.database import PybtexError, parse_string

    file = ROOT / "docs" / "references.bib"
    try:
        parse_string(file.read_text(encoding="utf-8"), "bibtex")
    except PybtexError as error:
        return [f"docs/references.bib: {error}"]
    return []


def unknown_terms() -> list[str]:
    """Words of the glossary that chapters name and it lacks, which Sphinx would say after the whole book has run."""
    words = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").lower().splitlines()
    return [
        f"{path.name}: {{term}}`{word}` is not in docs/glossary.md: add it, or link a chapter"
        for path in find(NBS)
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
        for word in re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", cell.source)
        if word.lower() not in words
    ]


def stale_library() -> list[str]:
    return differences(exported(), PACKAGE)


def stale_tests() -> list[str]:
    return differences(files_of(NBS), TESTS)


def unclean_notebooks() -> list[str]:
    return [problem for path in find(NBS) for problem in unclean(path)]


def unfolded() -> list[str]:
    """Chapters that show too much outside folds, and cells that are collapsed where they should not be."""
    bad = []
    for path in find(NBS):
        book = nbformat.read(path, as_version=4)
        bad += folds.problems(path.stem, book)
        before = [dict(cell.metadata) for cell in book.cells]
        if before != [dict(cell.metadata) for cell in folds.collapse(path.stem, book).cells]:
            bad.append(f"{path.name} is not collapsed where it is folded: run `make export`")
    return bad


def unproved() -> list[str]:
    from proofs import problems  # imports torch

    return problems(read_book(NBS))


def unregistered() -> list[str]:
    from metabook.testing import unregistered_learners  # imports torch

    return [
        f"{name} is exported, but not registered: decorate it with @register"
        for name in unregistered_learners()
    ]


# --- references between chapters

REFERENCE = re.compile(
    r"\b(?:chapter|appendix) (A?\d+)\b(?:\]\((?:nbs/|\.\./)?(A?)0*(\d+)_\w+\.ipynb)?", re.I
)


def reference_problems(name: str, text: str) -> list[str]:
    """Chapters that are named by a number alone, or by another than that of the page that the link leads to."""
    bad = []
    for found in REFERENCE.finditer(text):
        said, letter, number = found.groups()
        if number is None:
            bad.append(f"{name} says {found[0]!r}: write [{found[0]}](NN_name.ipynb)")
        elif letter.upper() + number != said[: len(letter)].upper() + said[len(letter) :].lstrip(
            "0"
        ):
            bad.append(f"{name} calls {letter}{number} {found[0].partition(']')[0]!r}")
    return bad


def typed_numbers() -> list[str]:
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    texts["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in find(NBS):
        for cell in read(path).cells:
            texts[f"{path.name}, cell {cell.id}"] = cell.source
    return [problem for name, text in texts.items() for problem in reference_problems(name, text)]


# --- the order of modules


def imports_within(source: str) -> set[str]:
    """What a module imports of the library, at any depth: modules, and names of the package other than dunders."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [LIBRARY * bool(node.level), node.module]))
            found |= {f"{base}.{a.name}" for a in node.names} if base == LIBRARY else {base}
    within = {name.split(".")[1] for name in found if name.startswith(f"{LIBRARY}.")}
    return {name for name in within if not name.startswith("__")}


def order(text: str) -> list[str]:
    """The names in the text of docs/order.txt, without comments."""
    return [name for line in text.splitlines() for name in line.partition("#")[0].split()]


def import_problems(sources: dict[str, str], names: list[str]) -> list[str]:
    """Modules that import what stands below them, or that stand nowhere."""
    bad = [
        f"{LIBRARY}.{module} does not stand in docs/order.txt"
        for module in sources
        if module not in names
    ]
    for module in (m for m in names if m in sources):
        wrong = imports_within(sources[module]) - set(names[: names.index(module)])
        bad += [
            f"{LIBRARY}.{module} imports {m}, which does not stand above it" for m in sorted(wrong)
        ]
    return bad


def misordered() -> list[str]:
    files = [file for file in PACKAGE.glob("*.py") if not file.name.startswith("_")]
    sources = {file.stem: file.read_text(encoding="utf-8") for file in sorted(files)}
    return import_problems(
        sources, order((ROOT / "docs" / "order.txt").read_text(encoding="utf-8"))
    )


CHECKS: list[Callable[[], list[str]]] = [
    unclean_notebooks,
    unfolded,
    unclaimed,
    unnoted,
    unreadable_references,
    unknown_terms,
    stale_library,
    stale_tests,
    unproved,
    unregistered,
    misordered,
    typed_numbers,
]


def main() -> None:
    problems = []
    for check in CHECKS:
        try:
            problems += check()
        except Refused as refused:
            problems += refused.args
    if problems:
        sys.exit("\n".join(dict.fromkeys(problems)))
    print("notebooks, library, chapter tests, proofs, registry and imports are in order")


if __name__ == "__main__":
    main()
