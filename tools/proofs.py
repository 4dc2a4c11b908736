"""Proofs: which equations the book numbers, which tests prove them, and whether a proof can fail.

A test cell with `#| proves: eq-name` names mutations of what its notebook exports, `#| breaks: "old" -> "new"`, or of
another module, `#| breaks: learners: "old" -> "new"`; any other test may name some too. Each is tried out in memory:
the library is imported afresh with that one change, and the test has to notice.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import pytest
import torch
from cells_to_tests import marks, render
from chapters import LIBRARY, Chapter, Piece, Test
from fresh import start_afresh
from notebooks import ROOT

LABEL = re.compile(r"\$\$[ \t]*\((eq-[\w-]+)\)|^\((eq-[\w-]+)\)=|^:label:[ \t]*(eq-[\w-]+)", re.M)
STRING = r'"(?:[^"\\]|\\.)*"'
BREAKS = re.compile(rf"(?:(\w+):\s*)?({STRING})\s*->\s*({STRING})")
# These say that the mutation or the set-up is wrong, not that the test has noticed.
NOT_NOTICED = (SyntaxError, ImportError, NameError, AttributeError, pytest.skip.Exception)


class Mutation(NamedTuple):
    """One change of the exported code: of the chapter's own, or of a module that it names."""

    old: str
    new: str
    module: str | None = None


class Outcome(NamedTuple):
    """How a test went: no error, or which one in which cell (None: before its first cell)."""

    error: BaseException | None = None
    cell: str | None = None

    def __str__(self) -> str:
        if self.error is None:
            return "it passes"
        where = f"in cell {self.cell}" if self.cell else "before its first cell"
        return f"{where}: {type(self.error).__name__}: {self.error}"


class Proof:
    """A test that proves equations (or only names mutations), and the mutations that have to break it."""

    def __init__(self, chapter: Chapter, piece: Piece, package: Path = ROOT / LIBRARY) -> None:
        self.chapter, self.piece, self.package = chapter, piece, package
        self.name = f"{chapter.notebook.name}-{piece.function}"
        self.equations = piece.cell.values("proves")
        self.lines = piece.cell.directives.get("breaks", [])
        self.marks = marks(chapter, chapter.compose(piece))

    @property
    def mutations(self) -> list[Mutation]:
        found = [BREAKS.fullmatch(line) for line in self.lines]
        groups = [f.groups() for f in found if f]
        return [Mutation(*map(ast.literal_eval, pair), module) for module, *pair in groups]

    def modules(self, mutation: Mutation) -> list[str]:
        """Where a mutation may stand: in the module that it names, or else in any that the notebook writes to."""
        return [mutation.module] if mutation.module else self.chapter.modules

    def sources(self, mutation: Mutation) -> dict[str, str]:
        """The sources of these modules."""
        files = [self.package / f"{module}.py" for module in self.modules(mutation)]
        return {file.stem: file.read_text(encoding="utf-8") for file in files if file.exists()}

    def mutated(self, mutation: Mutation) -> dict[str, str]:
        """The sources that a mutation changes."""
        old, new, _ = mutation
        found = {m: s for m, s in self.sources(mutation).items() if old in s}
        return {f"{LIBRARY}.{module}": source.replace(old, new) for module, source in found.items()}

    @cached_property
    def test(self) -> Test:
        """The test without earlier tests of its section, which could notice in its place; with them if it needs them."""
        held = self.chapter.held_by(self.piece)
        alone = [p for p in held if p is self.piece or p.role != "test"]
        test = self.chapter.compose(self.piece, alone)
        return test if run(self, test, {}).error is None else self.chapter.compose(self.piece)

    @cached_property
    def unbroken(self) -> Outcome:
        """How the test goes with the library as it is."""
        return run(self, self.test, {})

    def problem(self, mutation: Mutation) -> str | None:
        """Why a mutation says nothing about the proof; None if the proof notices it, in its own cell."""
        if self.unbroken.error is not None:
            return f"{self.name} fails without any mutation, {self.unbroken}"
        outcome = run(self, self.test, self.mutated(mutation))
        noticed = outcome.error is not None and not isinstance(outcome.error, NOT_NOTICED)
        if noticed and outcome.cell == self.piece.cell.id:
            return None
        return f"{self.name} should fail, in its own cell, by {mutation.old!r} -> {mutation.new!r}; {outcome}"


def equations(book: list[Chapter]) -> list[str]:
    """The labels of all numbered equations, in reading order."""
    cells = [cell for chapter in book for cell in chapter.notebook.cells if cell.kind == "markdown"]
    return [next(filter(None, found)) for cell in cells for found in LABEL.findall(cell.source)]


def proofs(book: list[Chapter], package: Path = ROOT / LIBRARY) -> list[Proof]:
    """Every test that proves an equation or names a mutation, in reading order."""
    return [Proof(c, p, package) for c in book for p in c.tests if p.cell.has("proves", "breaks")]


def problems(book: list[Chapter], package: Path = ROOT / LIBRARY) -> list[str]:
    """What can be said against the proofs of a book without running them."""
    labels, found = equations(book), proofs(book, package)
    proved = {label for proof in found for label in proof.equations}
    bad = [
        f"{label} labels two equations"
        for label in sorted({x for x in labels if labels.count(x) > 1})
    ]
    bad += [f"{label} has no proof" for label in dict.fromkeys(labels) if label not in proved]
    for proof in found:
        bad += [f"{proof.name} {b}" for b in _faults(proof, set(labels))]
    return bad


def _faults(proof: Proof, labels: set[str]) -> Iterator[str]:
    """What is wrong with one proof."""
    yield from (
        f"proves {label}, which no equation carries"
        for label in proof.equations
        if label not in labels
    )
    if not proof.lines:
        yield 'names no mutation that breaks it: add `#| breaks: "old" -> "new"`'
    if proof.chapter.compose(proof.piece).once:
        yield "uses a `#| setup: once` cell, which would run again for each mutation: prove it without"
    yield from (
        f'says `{line}`, not `"old" -> "new"`' for line in proof.lines if not BREAKS.fullmatch(line)
    )
    for mutation in proof.mutations:
        times = sum(source.count(mutation.old) for source in proof.sources(mutation).values())
        if times != 1:
            where = proof.modules(mutation)
            yield f"breaks {mutation.old!r}, which stands {times} times in {where}, not once"
        for source in proof.mutated(mutation).values() if times == 1 else ():
            try:
                ast.parse(source)
            except SyntaxError as error:
                yield f"makes what is no Python by {mutation.old!r} -> {mutation.new!r}: {error.msg}"


# --- running a test against a library with changed sources


class _Changed(SourceFileLoader):
    """Loads a module from a text in place of its file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.source, self.path)


class _Finder:
    """Finds the library in a folder, some of its modules with another source."""

    def __init__(self, package: Path, sources: dict[str, str]) -> None:
        self.package, self.sources = package, sources

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != LIBRARY:
            return None
        file = str(self.package.joinpath(*(name.split(".")[1:] or ["__init__"]))) + ".py"
        source = self.sources.get(name)
        loader = SourceFileLoader(name, file) if source is None else _Changed(name, file, source)
        within = [str(self.package)] if name == LIBRARY else None
        return spec_from_file_location(name, file, loader=loader, submodule_search_locations=within)


@contextmanager
def library(package: Path, sources: dict[str, str]) -> Iterator[None]:
    """A library imported afresh, with some sources changed; afterwards the one of before is back."""
    mine = [name for name in sys.modules if name.partition(".")[0] == LIBRARY]
    before = {name: sys.modules.pop(name) for name in mine}
    finder = _Finder(package, sources)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == LIBRARY]:
            del sys.modules[name]
        sys.modules.update(before)


def run(proof: Proof, test: Test, sources: dict[str, str]) -> Outcome:
    """Run a test, on the CPU unless it needs CUDA."""
    text, name = render(proof.chapter, [test]), f"<{proof.name}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    made = sys.modules[name] = ModuleType(name)
    device = (
        {"device": torch.device("cuda" if "cuda" in proof.marks else "cpu")}
        if "device" in test.needs
        else {}
    )
    start_afresh()
    try:
        with library(proof.package, sources):
            exec(compile(text, name, "exec"), made.__dict__)
            getattr(made, proof.piece.function)(**device)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `pytest.fail` is no Exception
        return Outcome(error, _cell(error, text, name, proof.piece.function))
    finally:
        del sys.modules[name]
    return Outcome()


def _cell(error: BaseException, text: str, file: str, function: str) -> str | None:
    """The cell of a test in which an error arose; None if it did so before."""
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f.lineno for f in frames if (f.filename, f.name) == (file, function)), 0)
    above = [
        line.split("# cell ")[1]
        for line in text.splitlines()[:at]
        if line.startswith("    # cell ")
    ]
    return above[-1] if above else None
