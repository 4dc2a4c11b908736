"""Small notebooks for the tests of the tools."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TITLE = "# A chapter"


def write(folder: Path, *sources: str, name: str = "05_sample") -> Path:
    """A notebook of cells with the ids c0, c1, ...; a source that begins with a heading is markdown."""
    cells = []
    for n, source in enumerate(sources):
        new = new_markdown_cell if source.startswith(("# ", "## ", "### ")) else new_code_cell
        cells.append(new(source, id=f"c{n}"))
    nbformat.write(new_notebook(cells=cells, nbformat_minor=5), folder / f"{name}.ipynb")
    return folder
