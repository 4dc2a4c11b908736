"""Chapter tests from the notebooks: cells_to_tests.py NBS_DIR OUT_DIR

A cell flagged `#| test: name` becomes `test_name`. The test holds whole cells in the order of the notebook, never parts
of them: the `#| setup` cells above, the earlier cells of the same H1 or H2 section, and the cell itself; but no setup
that shares no name with the rest and so cannot matter, and another test only where it binds what the rest needs: what a
test changes in place no other may count on. Beyond these a test may use what the notebook
exports or imports, what a `#| setup: once` cell above binds (a fixture that runs once per file and device), and
`device`. Left out are imports (they go to the top of the file), `device = ...` (a fixture), magics, `show_doc(...)`,
and cells flagged `#| show`, `#| notest` or `#| eval: false`.

A cell that several tests hold stands once in the file: it becomes a function that takes the names it needs and returns
those that later cells need, and each test calls its cells in order, so that each has a namespace of its own. Where that
would mean another thing (a function of the cell sees a name that a later cell binds anew), the test holds the cell itself.

A test carries the marks (`#| slow`, `#| cuda`, `#| data: omniglot`) of every cell that it holds.

What breaks a rule is refused, everything at once, and then nothing is written.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from chapters import BUILTINS, LIBRARY, Chapter, Import, Piece, Refused, Test, read_book
from notebooks import ROOT, Cell
from scopes import in_function

MADE_FROM = (
    '"""Made from nbs/{}.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""'
)
FUTURE = Import("__future__", "annotations", None)


def import_lines(imports: Iterable[Import]) -> list[str]:
    """The statements that import some names, one for each module."""
    modules: dict[str | None, set[str]] = {}
    for new in imports:
        modules.setdefault(new.module, set()).add(str(new))
    plain = [f"import {name}" for name in sorted(modules.pop(None, ()))]
    lines = plain + [f"from {m} import {', '.join(sorted(modules[m]))}" for m in sorted(modules)]
    return sorted(lines, key=lambda line: "__future__" not in line)


def header(chapter: Chapter, functions: list[Test]) -> str:
    """The first lines of a test file: where it comes from, and the imports that it uses."""
    used = set().union(*(f.needs for f in functions))
    imports = {i for name in used & set(chapter.imports) for i in chapter.imports[name]}
    library = used & set(chapter.exports) - set(chapter.imports)
    imports |= {Import(f"{LIBRARY}.{chapter.exports[name]}", name, None) for name in library}
    imports |= chapter.imports.get("annotations", set()) & {FUTURE}
    if any(f.own.role == "once" for f in functions):
        imports.add(Import("types", "SimpleNamespace", None))
    if any(f.own.role == "once" or marks(chapter, f) for f in functions):
        imports.add(Import(None, "pytest", None))
    return "\n".join([MADE_FROM.format(chapter.notebook.name), *import_lines(imports)])


def cells_of(chapter: Chapter, test: Test) -> list[Cell]:
    """Every cell that a test runs, those of its fixtures among them."""
    below = [cell for piece in test.once for cell in cells_of(chapter, chapter.compose(piece))]
    return [p.cell for p in test.pieces] + below


def marks(chapter: Chapter, test: Test) -> dict[str, list[str]]:
    """The marks of a test, each with its arguments."""
    cells = cells_of(chapter, test)
    found = {key: [] for key in ("slow", "cuda") if any(cell.has(key) for cell in cells)}
    found["data"] = sorted({name for cell in cells for name in cell.values("data")})
    found["proves"] = test.own.cell.values("proves")
    return {key: values for key, values in found.items() if values or key in ("slow", "cuda")}


def decorators(chapter: Chapter, test: Test) -> list[str]:
    """The lines that mark a test."""
    lines = []
    for key, values in marks(chapter, test).items():
        arguments = ", ".join(f'"{value}"' for value in values)
        lines.append(f"@pytest.mark.{key}" + (f"({arguments})" if values else ""))
    return lines


class Shared:
    """The cells that several functions of a test file hold: each stands once, and is called."""

    def __init__(self, chapter: Chapter, functions: list[Test]) -> None:
        self.chapter = chapter
        held = [(f, p) for f in functions for p in f.pieces if p.role != "once"]
        users = {p: [f for f, q in held if q is p and self.callable(f, p)] for _, p in held}
        self.users = {p: fs for p, fs in users.items() if len(fs) > 1}

    def takes(self, piece: Piece) -> list[str]:
        """The names that a cell needs from the cells above it."""
        above = self.chapter.pieces[: self.chapter.pieces.index(piece)]
        again = piece.reads_first & piece.names.binds & {n for p in above for n in p.names.binds}
        return sorted((piece.names.needs | again) - self.chapter.outside - BUILTINS)

    def callable(self, test: Test, piece: Piece) -> bool:
        """Whether the cell means the same when a test calls it: nothing that it will look up later is bound later.

        What it defines can look up nothing later where no cell below takes anything of it.
        """
        at = test.pieces.index(piece)
        below = {n for p in test.pieces[at + 1 :] for n in p.names.binds}
        above = {n for p in test.pieces[:at] for n in p.names.binds} | test.shared | {"device"}
        looks_up = piece.later & below if self.taken(piece, [test]) else set()
        return not (looks_up or set(self.takes(piece)) - above or piece.deletes)

    @staticmethod
    def taken(piece: Piece, tests: list[Test]) -> list[str]:
        """The names that a cell binds and cells below it need, in some tests."""
        below = [p for test in tests for p in test.pieces[test.pieces.index(piece) + 1 :]]
        return sorted(piece.names.binds & {n for p in below for n in p.names.needs | p.reads_first})

    def gives(self, piece: Piece) -> list[str]:
        """The names that it returns."""
        return self.taken(piece, self.users[piece])

    def call(self, piece: Piece) -> str:
        """The line that runs a cell in a test."""
        left = ", ".join(self.gives(piece))
        return f"{left} = " * bool(left) + f"{name_of(piece)}({', '.join(self.takes(piece))})"

    def text(self, piece: Piece) -> str:
        """The function that a cell becomes."""
        gives = ", ".join(self.gives(piece))
        body = f"# cell {piece.cell.id}\n{piece.code}" + f"\nreturn {gives}" * bool(gives)
        return in_function(body, f"def {name_of(piece)}({', '.join(self.takes(piece))}):")


def name_of(piece: Piece) -> str:
    return "cell_" + piece.cell.id.replace("-", "_")


def function(test: Test, above: list[str], shared: Shared, last: str = "") -> str:
    """The text of a test or a fixture."""
    takes = ["device"] * ("device" in test.needs) + sorted(p.function for p in test.once)
    given = [f"{name} = {p.function}.{name}" for p, some in test.once.items() for name in some]
    cells = [
        shared.call(p) if test in shared.users.get(p, []) else f"# cell {p.cell.id}\n{p.code}"
        for p in test.pieces
    ]
    head = f"def {test.own.function}({', '.join(takes)}):"
    return "\n".join([*above, in_function("\n".join([*given, *cells, last]).rstrip(), head)])


def fixtures_of(chapter: Chapter, tests: list[Test]) -> list[Test]:
    """The fixtures that tests take, and those that these take, in the order of the notebook."""
    used = list(tests)
    for piece in reversed([p for p in chapter.pieces if p.role == "once"]):
        if any(piece in test.once for test in used):
            used.insert(0, chapter.compose(piece))
    return used[: len(used) - len(tests)]


def fixture(test: Test, users: list[Test], shared: Shared) -> str:
    """The text of a fixture, which gives what its users take from it."""
    gives = sorted({name for user in users for name in user.once.get(test.own, [])})
    namespace = ", ".join(f"{name}={name}" for name in gives)
    decorator = '@pytest.fixture(scope="module")'
    return function(test, [decorator], shared, f"return SimpleNamespace({namespace})")


def render(chapter: Chapter, tests: list[Test]) -> str:
    """The text of a test file that holds some tests of a chapter, not yet formatted."""
    once = fixtures_of(chapter, tests)
    shared = Shared(chapter, once + tests)
    functions = [shared.text(p) for p in chapter.pieces if p in shared.users]
    functions += [fixture(f, once + tests, shared) for f in once]
    functions += [function(test, decorators(chapter, test), shared) for test in tests]
    return "\n\n\n".join([header(chapter, once + tests), *functions]) + "\n"


def formatted(text: str) -> str:
    """The text with its imports sorted and formatted by ruff, the same wherever it is going to lie."""
    for verb in (["check", "--select", "I", "--fix-only"], ["format"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *verb,
            "--quiet",
            "--stdin-filename",
            "test.py",
            "-",
        ]
        done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ruff does not format this text: {done.stderr}\n{text}")
        text = done.stdout
    return text


def files_of(folder: Path) -> dict[str, str]:
    """The text of every test file, by its name; raises Refused if a notebook breaks a rule."""
    book = [chapter for chapter in read_book(folder) if chapter.tests]
    texts = {f"test_{c.notebook.name}.py": render(c, [c.compose(p) for p in c.tests]) for c in book}
    return {name: formatted(text) for name, text in texts.items()}


def main(notebooks: str, out: str) -> None:
    """Write the test files, and remove those whose notebook is gone."""
    try:
        files = files_of(Path(notebooks))
    except Refused as refused:
        sys.exit(f"{refused}\nno test was written")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("test_*.py"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{len(files)} test files in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
