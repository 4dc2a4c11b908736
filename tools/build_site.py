"""The book's site from its notebooks: execute every chapter, then let Sphinx make the pages.

    python tools/build_site.py               all chapters; those that did not change are not executed again
    python tools/build_site.py --only 08     execute chapter 08 alone; the others show what they last gave

The site lies in _site/; what is kept between two runs lies in _build/.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import api_pages  # noqa: E402
import chapter_pages  # noqa: E402
import laid_out  # noqa: E402
from notebooks import find, split_directives  # noqa: E402

LIBRARY = ROOT / "metabook"
PACKAGES = ("ipywidgets", "matplotlib", "numpy", "torch")  # what changes the outputs of a chapter
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 600  # a cell that takes longer hangs
MATHJAX = (
    "tex-chtml.js",
    "output/chtml/fonts",
    "input/tex/extensions",
)  # of 24 MB, what pages load


@dataclass
class Chapter:
    """A notebook on its way to a page."""

    path: Path
    book: NotebookNode
    skipped: dict[str, str] = field(default_factory=dict)  # why a cell is not executed, by its id
    key: str = ""  # changes when the outputs may change
    seconds: float = 0.0
    stored: bool = False  # whether the outputs come from an earlier run

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def code(self) -> list[NotebookNode]:
        return [cell for cell in self.book.cells if cell.cell_type == "code"]


def read(path: Path) -> Chapter:
    """Read a chapter and decide which cells can be executed here."""
    chapter = Chapter(path, nbformat.read(path, as_version=4))
    for cell in chapter.code:
        if reason := obstacle(split_directives(cell.source)[0]):
            chapter.skipped[cell.id] = reason
    used = "\n".join(cell.source for cell in chapter.code)
    parts = [sys.version, *map(version, PACKAGES), *map(repr, chapter.skipped.items()), used]
    parts += [path.read_text(encoding="utf-8") for path in sources(used)]
    chapter.key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return chapter


def obstacle(directives: dict[str, list[str]]) -> str:
    """Why a cell is not executed for its page, or nothing."""
    if "false" in directives.get("eval", []):
        return "it is here to be read"
    if "slow" in directives:
        return "it takes too long for a page"
    if "cuda" in directives and not has_cuda():
        return "it needs a CUDA device"
    missing = [name for name in directives.get("data", []) if laid_out.missing(name)]
    return f"it needs the data set {missing[0]}" if missing else ""


@cache
def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def sources(code: str) -> list[Path]:
    """The library's files that a chapter's code stands on."""
    names = set(re.findall(r"\bmetabook\.(\w+)", code))
    if re.search(r"\bmetabook\b(?!\.\w)", code):  # the package as a whole, or the command line
        return sorted(LIBRARY.glob("*.py"))
    todo, known = [*names], set()
    while todo:
        if (path := LIBRARY / f"{todo.pop()}.py").is_file() and path not in known:
            known.add(path)
            todo += re.findall(r"(?:from|import) +(?:metabook)?\.(\w+)", path.read_text("utf-8"))
    return sorted(known)


def recall(chapter: Chapter, build: Path, stale: bool) -> bool:
    """Fill in the outputs of an earlier run, if there is one; a stale one only where that will do."""
    path = build / "executed" / f"{chapter.name}.json"
    if not path.is_file():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["key"] != chapter.key and not stale:
        return False
    outputs = nbformat.from_dict(kept["outputs"])
    for cell in chapter.code:
        cell.outputs = outputs.get(cell.id, [])
    chapter.seconds, chapter.stored = kept["seconds"], True
    return True


def remember(chapter: Chapter, build: Path) -> None:
    """Keep the outputs for the next run."""
    path = build / "executed" / f"{chapter.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs = {cell.id: cell.outputs for cell in chapter.code}
    kept = {"key": chapter.key, "seconds": chapter.seconds, "outputs": outputs}
    path.write_text(json.dumps(kept), encoding="utf-8")


def execute(chapter: Chapter, threads: int) -> Chapter:
    """Run a chapter from top to bottom in a process of its own. Raises PageError where it fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    book, started = chapter.book, time.perf_counter()
    for cell in chapter.code:
        cell.outputs = []
        cell.metadata.tags = ["skip-execution"] * (cell.id in chapter.skipped)
    client = NotebookClient(
        book,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(chapter.path.parent)}},
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
    )
    at = [book.cells[0]]
    client.on_cell_start = lambda cell, cell_index: at.__setitem__(0, cell)
    try:
        client.execute(env=environment(threads))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        said = "".join(f"\nwhich should show: {text}" for text in claimed(at[0]))
        raise chapter_pages.PageError(
            f"{chapter_pages.where(chapter.name, at[0])}:{said}\n{shortened(str(error))}"
        ) from None
    for cell in chapter.code:
        cell.outputs = tidy(cell.outputs)
    chapter.seconds = time.perf_counter() - started
    return chapter


def claimed(cell: NotebookNode) -> list[str]:
    """The sentences of the page that a cell checks."""
    return split_directives(cell.source)[0].get("claim", []) if cell.cell_type == "code" else []


def shortened(error: str) -> str:
    """A traceback without colours, and without what lies between the cell and the error."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", error).strip().splitlines()
    return "\n".join(lines if len(lines) < 60 else [*lines[:45], "...", *lines[-8:]])


def environment(threads: int) -> dict[str, str]:
    """What a chapter's process sees: this checkout's library, its share of the cores, frames for pages."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    shown = {"METABOOK_FRAMES": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    return {**os.environ, **limits, **shown, "PYTHONPATH": path}


def tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join what was printed in pieces, keep the last state of a progress bar, drop empty widgets."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
            continue
        data = output.get("data", {})
        if WIDGET in data and set(data) <= {WIDGET, "text/plain"}:
            continue
        data.pop(WIDGET, None)
        kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = "\n".join(overwritten(line) for line in output.text.split("\n"))
    return [output for output in kept if output.get("text", " ").strip() or "data" in output]


def overwritten(line: str) -> str:
    """What a terminal shows of a line with carriage returns in it."""
    return next((part for part in reversed(line.split("\r")) if part.strip()), "")


def execute_all(chapters: list[Chapter], build: Path, jobs: int) -> list[str]:
    """Execute chapters side by side, with a line for each; return what failed."""
    failures, threads = [], max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(execute, chapter, threads): chapter for chapter in chapters}
        for number, future in enumerate(as_completed(running), 1):
            chapter = running[future]
            try:
                remember(future.result(), build)
                said = f"{chapter.seconds:6.1f} s"
            except chapter_pages.PageError as error:
                failures.append(str(error))
                said = "  FAILED"
            print(f"  [{number:2}/{len(chapters)}] {chapter.name:24} {said}", flush=True)
    return failures


def write_source(chapters: list[Chapter], source: Path) -> list[str]:
    """Lay out what Sphinx reads: the frame, the chapters at its root, the reference; return what is wrong."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source)
    for name in ("CHANGELOG.md", "settings.ini"):
        shutil.copy(ROOT / name, source / name.replace("CHANGELOG", "changelog"))
    there = [chapter.name for chapter in chapters]
    for frame in source.glob("*.md"):
        text = only_written(frame.read_text(encoding="utf-8"), there)
        frame.write_text(unlinked(text, there), encoding="utf-8")
    modules = api_pages.load(LIBRARY)
    names, problems = api_pages.names(modules), []
    for chapter in chapters:
        try:
            page = chapter_pages.page(
                chapter.name, chapter.book, chapter.skipped, names, chapter.seconds
            )
            nbformat.write(page, source / chapter.path.name)
        except chapter_pages.PageError as error:
            problems.append(str(error))
    api_pages.write(modules, source / "api", there)
    return problems


def only_written(index: str, chapters: list[str]) -> str:
    """Leave the parts of the book out of the contents whose chapters are still to be written."""

    def kept(found: re.Match) -> str:
        patterns = found[2].split()
        matched = [p for p in patterns if any(fnmatch(chapter, p) for chapter in chapters)]
        return found[1] + "\n".join(matched) + "\n```\n" if matched else ""

    return re.sub(
        r"(```\{toctree\}\n(?::[^\n]*\n)*:glob:\n\n)(.*?)\n```\n", kept, index, flags=re.S
    )


def unlinked(markdown: str, chapters: list[str]) -> str:
    """Take the links to chapters out that are still to be written."""

    def kept(found: re.Match) -> str:
        return found[0] if found[2] in chapters else found[1]

    return re.sub(r"\[([^\]]*)\]\((\w+)\.ipynb\)", kept, markdown)


def run_sphinx(build: Path, strict: bool) -> Path | None:
    """Make the pages; where it is strict, every warning is an error. Return their folder, or nothing."""
    pages = build / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    options = ["-b", "html", "-n", "-E", "-q", "-d", str(build / "doctrees")]
    options += ["-W", "--keep-going"] * strict
    command = [sys.executable, "-m", "sphinx", *options, str(build / "source"), str(pages)]
    return pages if subprocess.run(command).returncode == 0 else None


def lead_on(moved: str, pages: Path) -> None:
    """At each old address leave a page that leads to the new one."""
    for line in moved.splitlines():
        if line and not line.startswith("#"):
            old, new = line.split()
            (pages / f"{old}.html").write_text(
                f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{new}</title>'
                f'<meta http-equiv="refresh" content="0; url={new}.html"><link rel="canonical" href="{new}.html">'
                f'</head><body><p>This page is now <a href="{new}.html">{new}</a>.</p></body></html>\n',
                encoding="utf-8",
            )


def finish(chapters: list[Chapter], pages: Path, site: Path) -> None:
    """Add the part of MathJax that pages load, and the notebooks as written; put the site in its place."""
    mathjax = (
        Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    )
    for part in MATHJAX:
        target = pages / "_static/mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (mathjax / part).is_dir() else shutil.copy)(mathjax / part, target)
    for chapter in chapters:
        shutil.copy(chapter.path, pages / "_sources" / chapter.path.name)
    lead_on((ROOT / "docs" / "moved.txt").read_text(encoding="utf-8"), pages)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(pages, site)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NN", help="execute this chapter alone: 08, A1")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="chapters at a time"
    )
    parser.add_argument("--nbs", type=Path, default=ROOT / "nbs", help="where the chapters are")
    parser.add_argument("--site", type=Path, default=ROOT / "_site", help="where the site goes")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "_build", help="what is kept between runs"
    )
    return parser.parse_args()


def main() -> None:
    asked, started = arguments(), time.perf_counter()
    chapters = [read(path) for path in find(asked.nbs)]
    chosen = [c for c in chapters if not asked.only or c.name.startswith(f"{asked.only}_")]
    if not chosen:
        sys.exit(
            f"no chapter {asked.only!r} in {asked.nbs}: there are {[c.name for c in chapters]}"
        )
    todo = [
        c for c in chapters if not recall(c, asked.build, stale=c not in chosen) and c in chosen
    ]
    print(f"{len(chapters)} chapters, {len(todo)} to execute, {asked.jobs} at a time", flush=True)
    failures = execute_all(todo, asked.build, asked.jobs)
    problems = failures or write_source(chapters, asked.build / "source")
    failures = [p for p in problems if p.startswith(tuple(c.name for c in chosen))]
    if failures:
        sys.exit("\n\n".join(["The site is not built.", *failures]))
    if not (pages := run_sphinx(asked.build, strict=not asked.only)):
        sys.exit("The site is not built: Sphinx gave the warnings above.")
    finish(chapters, pages, asked.site)
    report(chapters, asked.site, time.perf_counter() - started)


def report(chapters: list[Chapter], site: Path, seconds: float) -> None:
    """Say what each chapter took, what the site weighs and where it opens."""
    print("\nchapter                    seconds")
    for chapter in chapters:
        notes = "  over a minute" * (chapter.seconds > 60) + "  (earlier run)" * chapter.stored
        print(f"{chapter.name:24} {chapter.seconds:9.1f}{notes}")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6
    print(f"\nBuilt in {seconds:.0f} s, {size:.0f} MB. Open {os.path.relpath(site / 'index.html')}")


if __name__ == "__main__":
    main()
