"""Sentences that judge a result, and the cells that check them.

    claims.py nbs                      sentences that need a claim, or a line in docs/verdicts.txt, and have none
    claims.py nbs/08_maml.ipynb 3      run a chapter with three other seeds, and say which claims fail

`#| claim: "a sentence, or a part of it, as it stands on the page"` leads a cell that asserts what the sentence says,
run whenever the book is built.  Every sentence with a verdict in a section that runs something is carried by a claim, or
stands in docs/verdicts.txt with the reason why nothing on the page could check it.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode
from notebooks import ROOT, find, headings, in_workshop, split_directives

ALLOWED = ROOT / "docs" / "verdicts.txt"
VERDICT = re.compile(
    r"\b(?:better|worse|best|worst|beats?|beaten|wins?|loses?|outperform\w*|no difference|exclud\w+|faster|slower"
    r"|as (?:good|well|fast) as|contains? (?:0|zero)|superior|inferior)\b",
    re.I,
)
RUN = re.compile(r"\b(?:evaluate|fit|paired|train|answers|score_of\w*|compare\w*)\(")
APART = re.compile(r"^(```|~~~).*?^\1\s*$|^\$\$.*?^\$\$.*?$|^#.*?$|^\|.*?$", re.M | re.S)
SENTENCE = re.compile(r"(?<=[.!?:])[\s*_)]+(?=[A-Z*_`(\[$])")
SEED = re.compile(r"((?:seed=|manual_seed\())(\d+)")


class Claim(NamedTuple):
    cell: NotebookNode
    sentence: str


def plain(text: str) -> str:
    """Text without emphasis, links and line breaks, as sentences are compared."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", text).split())


def claims(book: NotebookNode) -> list[Claim]:
    """Every claim of a chapter with its cell."""
    cells = (cell for cell in book.cells if cell.cell_type == "code")
    given = ((cell, split_directives(cell.source)[0].get("claim", [])) for cell in cells)
    return [Claim(cell, plain(text.strip("\"'"))) for cell, texts in given for text in texts]


def sections(book: NotebookNode) -> Iterator[list[NotebookNode]]:
    """The cells of a chapter by H2 section."""
    section: list[NotebookNode] = []
    for cell in book.cells:
        if cell.cell_type == "markdown" and headings(cell.source) and section:
            yield section
            section = []
        section.append(cell)
    yield section


def sentences(markdown: str) -> list[str]:
    """The sentences of a text that state something: no headings, tables, formulas, code, questions."""
    items = re.split(
        r"\n\s*\n(?:\s*(?:[-*]|\d+\.) )?|\n\s*(?:[-*]|\d+\.) ", APART.sub("\n\n", markdown)
    )
    found = (plain(sentence) for item in items for sentence in SENTENCE.split(item))
    return [sentence for sentence in found if sentence and sentence[-1] != "?"]


def verdicts(book: NotebookNode) -> Iterator[str]:
    """The sentences with a verdict in those sections that run something."""
    for section in sections(book):
        code = (split_directives(c.source) for c in section if c.cell_type == "code")
        if any(
            RUN.search(text) for given, text in code if not given.keys() & {"export", "exporti"}
        ):
            for cell in section:
                if cell.cell_type == "markdown":
                    yield from (s for s in sentences(cell.source) if VERDICT.search(s))


def allowed(text: str) -> dict[str, list[str]]:
    """The sentences by chapter that need no claim; each line is `chapter | first words | why`."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            chapter, words, _why = (part.strip() for part in line.split(" | "))
            found.setdefault(chapter, []).append(plain(words))
    return found


def problems(name: str, book: NotebookNode, words: list[str]) -> list[str]:
    """Verdicts that nothing carries, claims whose sentence is not on the page, lines of the list that are of no use."""
    made, found = claims(book), list(verdicts(book))
    page = plain("\n".join(c.source for c in book.cells if c.cell_type == "markdown"))
    bad = [
        f"{name}: cell {claim.cell.id} claims {claim.sentence!r}, which no sentence of the page says"
        for claim in made
        if claim.sentence not in page
    ]
    for sentence in found:
        carried = any(c.sentence in sentence or sentence in c.sentence for c in made)
        if not carried and not any(sentence.startswith(start) for start in words):
            bad.append(f"{name}: no claim carries {sentence!r}")
    unused = [start for start in words if not any(s.startswith(start) for s in found)]
    return bad + [
        f"{name}: docs/verdicts.txt allows {start!r}, which is not there" for start in unused
    ]


def of_book(folder: Path) -> list[str]:
    """What is wrong with the claims of the chapters in a folder."""
    lists = allowed(ALLOWED.read_text(encoding="utf-8"))
    books = {
        p.stem: nbformat.read(p, as_version=4) for p in find(folder) if not in_workshop(p.stem)
    }
    return [p for name, book in books.items() for p in problems(name, book, lists.get(name, []))]


def with_seeds(book: NotebookNode, shift: int) -> NotebookNode:
    """The chapter with other seeds wherever one is written out in a cell that shows or sets up something."""
    book = copy.deepcopy(book)
    for cell in book.cells:
        if cell.cell_type == "code" and split_directives(cell.source)[0].keys() & {"show", "setup"}:
            cell.source = SEED.sub(lambda m: f"{m[1]}{int(m[2]) + shift}", cell.source)
    return book


def failing(book: NotebookNode, where: Path) -> list[str]:
    """Run a chapter and give the claims whose cells fail."""
    from nbclient import NotebookClient

    resources = {"metadata": {"path": str(where)}}
    NotebookClient(book, timeout=1800, allow_errors=True, resources=resources).execute()
    return [
        claim.sentence
        for claim in claims(book)
        if any(output.output_type == "error" for output in claim.cell.outputs)
    ]


def main(path: Path, seeds: int = 0) -> None:
    if path.is_dir():
        sys.exit("\n".join(of_book(path)) or 0)
    book = nbformat.read(path, as_version=4)
    failed = 0
    for n in range(1, seeds + 1):
        found = failing(with_seeds(book, 1000 * n), path.parent)
        print(f"seeds + {1000 * n}: {len(found)} claims fail", *found, sep="\n  ", flush=True)
        failed += len(found)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:])) if len(sys.argv) > 1 else sys.exit(__doc__)
