"""A chapter's notebook as a page for myst-nb: directives become tags, names become links."""

from __future__ import annotations

import ast
import re

from folds import CHECKS, fold, main_path
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from notebooks import IN_CHECKS, split_directives

TAGS = {
    ("hide", ""): "remove-cell",
    ("include", "false"): "remove-cell",
    ("echo", "false"): "remove-input",
    ("output", "false"): "remove-output",
    ("warning", "false"): "remove-stderr",
    ("code-fold", "true"): "hide-input",
    ("output-fold", "true"): "hide-output",
}
# What holds no prose: fenced blocks, displayed formulas, headings.
APART = re.compile(
    r"(^(?:```|~~~|:::).*?^(?:```|~~~|:::)\s*$|^\$\$.*?^\$\$.*?$|^#.*?$)", re.M | re.S
)
NAME = re.compile(r"(?<![`}\w\[])`([A-Za-z_][\w.]*)(\(\))?`(?!`)")
STRING = r'"(?:[^"\\]|\\.)*"'
MUTATION = re.compile(rf"({STRING})\s*->\s*({STRING})")


class PageError(Exception):
    """What an author has to put right; the message names chapter and cell."""


def where(name: str, cell: NotebookNode) -> str:
    """Name a cell as its author finds it: by id and first line."""
    lines = [line for line in cell.source.splitlines() if line.strip() and line[:2] != "#|"]
    return f"{name}, cell {cell.id} ({lines[0].strip()[:60] if lines else 'empty'})"


def page(
    name: str,  # "08_maml"
    book: NotebookNode,  # the chapter, with outputs
    skipped: dict[str, str],  # why a cell was not executed, by its id
    names: dict[str, str],  # full names in the library by what prose calls them
    seconds: float,  # what the chapter took to execute
) -> NotebookNode:
    """Change a chapter into its page. Raises PageError for a figure without alternative text."""
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    module = default_exp(code)
    linked, shown = linkable(names, module, code), main_path(name, book)
    cells = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cells.append(prose(name, cell, linked))
        elif cell.cell_type == "code" and not set(split_directives(cell.source)[0]) & {
            "default_exp"
        }:
            cells += code_cell(name, cell, skipped.get(cell.id))
    title, found, rest = book.cells[0].source.partition("\n")
    known = facts(module, code, seconds, shown, names)
    book.cells[0].source = f"{title}\n\n{known}\n{found}{rest}"
    book.cells, book.metadata.file_format = cells, "mystnb"
    book.metadata.pop("widgets", None)
    return book


def default_exp(code: list[str]) -> str:
    """The module that a chapter makes, or nothing."""
    found = (split_directives(source)[0].get("default_exp") for source in code)
    return next((values[0] for values in found if values), "")


def linkable(names: dict[str, str], module: str, code: list[str]) -> dict[str, str]:
    """The names that a chapter means: its own, those it imports, and those that are no plain words."""
    imported = set(
        re.findall(r"\w+", " ".join(re.findall(r"import ([\w, ]+|\([^)]*\))", "\n".join(code))))
    )
    return {
        name: full
        for name, full in names.items()
        if name in imported or re.search(r"[A-Z_.]", name) or full.startswith(f"metabook.{module}.")
    }


def prose(name: str, cell: NotebookNode, names: dict[str, str]) -> NotebookNode:
    """A markdown cell: every image described, every name of the library linked."""
    if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=)", cell.source):
        raise PageError(
            f"{where(name, cell)}: an image has no alternative text: ![what it shows](...)"
        )
    cell.source = link_names(cell.source, names)
    if fold(name, cell):
        folded = cell.source.removeprefix(IN_CHECKS).strip()
        cell.source = f"::::::::{{div}} metabook-checks\n{folded}\n::::::::"
    return cell


def link_names(markdown: str, names: dict[str, str]) -> str:
    """Link backticked names, outside of code, formulas and headings."""

    def link(found: re.Match) -> str:
        full = names.get(found[1])
        return f"{{py:obj}}`{found[1]}{found[2] or ''} <{full}>`" if full else found[0]

    parts = APART.split(markdown)
    return "".join(part if n % 2 else NAME.sub(link, part) for n, part in enumerate(parts))


def facts(
    module: str, code: list[str], seconds: float, shown: tuple[int, int], names: dict[str, str]
) -> str:
    """A small line below the title: how long a chapter takes to read and to run, what the library has of it, what is tested."""
    where = f"metabook.{module}"
    directives = [split_directives(source)[0] for source in code]
    tests, proofs = (sum(key in d for d in directives) for key in ("test", "proves"))
    role = "{py:mod}" if where in names else ""  # a module that exports nothing has no page
    said = [f"{reading_minutes(*shown)} minutes to read"]
    said += [f"{max(seconds, 1):.0f} s to run"] if seconds else []
    said += [f"In the library: {role}`{where}`"] if module else []
    said += [counted(n, word) for n, word in ((tests, "test"), (proofs, "proof")) if n]
    return small(" · ".join(said), "metabook-facts")


def reading_minutes(words: int, lines: int) -> int:
    """200 words or 20 lines of code a minute, in steps of five."""
    return max(5, 5 * round((words / 200 + lines / 20) / 5))


def counted(n: int, word: str) -> str:
    """A number of things: 1 test, 2 tests."""
    return f"{n} {word}{'s'[: n != 1]}"


def small(markdown: str, css: str) -> str:
    """A discreet line."""
    return f":::{{div}} {css}\n{markdown}\n:::" if markdown else ""


def code_cell(name: str, cell: NotebookNode, skipped: str | None) -> list[NotebookNode]:
    """A code cell without its directives, and a small line below on what it tests."""
    directives, source = split_directives(cell.source)
    if not source.strip():
        return []
    check_outputs(name, cell, directives)
    tags = {TAGS[key, v] for key, vs in directives.items() for v in vs if (key, v) in TAGS}
    folded = fold(name, cell)
    if folded.startswith("Solution"):
        tags = {"hide-cell"}  # what it gives would give it away
    elif folded == CHECKS:
        tags, folded = tags | {"checks"}, ""  # they are folded together
    elif folded:
        tags |= {"hide-input"}
    if "exporti" in directives:
        tags |= {"export"}
    tags |= {key for key in ("export", "test") if key in directives}
    cell.metadata = NotebookNode(tags=sorted(tags), mystnb=NotebookNode(settings(cell, directives)))
    if folded:
        cell.metadata.mystnb |= {"code_prompt_show": folded, "code_prompt_hide": folded}
    note = "" if "remove-cell" in tags else caption(directives, skipped)
    cell.source = source
    css = "metabook-note" + " metabook-checks" * ("checks" in tags)
    return [cell, new_markdown_cell(small(note, css))] if note else [cell]


def one(directives: dict[str, list[str]], key: str) -> str:
    """The value of a directive that is given once, without its quotes."""
    return directives.get(key, [""])[0].strip("\"'")


def settings(cell: NotebookNode, directives: dict[str, list[str]]) -> dict:
    """How myst-nb shows the images of a cell: alternative text, width, caption and name."""
    image = {"alt": one(directives, "fig-alt")} if "fig-alt" in directives else {}
    sizes = [output.get("metadata", {}).get("image/png", {}) for output in cell.outputs]
    if widths := [size["width"] for size in sizes if "width" in size]:
        image["width"] = f"{max(widths)}px"
    figure = {"caption": one(directives, "fig-cap"), "name": one(directives, "label")}
    figure = {key: value for key, value in figure.items() if value}
    return {key: value for key, value in (("image", image), ("figure", figure)) if value}


def check_outputs(name: str, cell: NotebookNode, directives: dict[str, list[str]]) -> None:
    """Refuse figures that only some readers can see, and labels that nothing carries."""
    for output in cell.outputs:
        data = output.get("data", {})
        drawn = any(kind.startswith("image/") for kind in data)
        if drawn and not one(directives, "fig-alt"):
            raise PageError(
                f'{where(name, cell)}: the figure has no alternative text: add #| fig-alt: "..."'
            )
        if re.search(r"<img(?![^>]*\balt=\"[^\"])", data.get("text/html", "")):
            raise PageError(f"{where(name, cell)}: an image in the output has no alternative text")
    if "label" in directives and "fig-cap" not in directives:
        raise PageError(
            f'{where(name, cell)}: a figure with a label needs a caption: add #| fig-cap: "..."'
        )


def caption(directives: dict[str, list[str]], skipped: str | None) -> str:
    """What a cell tests, proves and needs, in a few words."""
    if skipped:
        return f"Not run on this page: {skipped}."
    if claims := directives.get("claim"):
        return "Checks what the text says: " + ", ".join(text.strip("\"'") for text in claims)
    if "test" not in directives:
        return ""
    proved = re.findall(r"[\w-]+", " ".join(directives.get("proves", [])))
    said = "Proves " + ", ".join(f"{{eq}}`{label}`" for label in proved) if proved else "Test"
    said += f" (`{one(directives, 'test')}`)"
    mutations = MUTATION.findall("\n".join(directives.get("breaks", [])))
    changes = [map(literal, map(ast.literal_eval, mutation)) for mutation in mutations]
    return said + "".join(f"; fails if {old} becomes {new}" for old, new in changes) + "."


def literal(text: str) -> str:
    """Text as code, in markdown."""
    return f"`` {text} ``" if text else "nothing"
