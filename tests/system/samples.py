"""Small notebooks for the tests of the tools, and methods on small networks."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from metabook.learners import Learner
from metabook.networks import MLP
from metabook.registry import methods

TITLE = "# A chapter"


def write(folder: Path, *sources: str, name: str = "05_sample") -> Path:
    """A notebook of cells with the ids c0, c1, ...; a source that begins with a heading is markdown."""
    cells = []
    for n, source in enumerate(sources):
        new = new_markdown_cell if source.startswith(("# ", "## ", "### ")) else new_code_cell
        cells.append(new(source, id=f"c{n}"))
    nbformat.write(new_notebook(cells=cells, nbformat_minor=5), folder / f"{name}.ipynb")
    return folder


def learner_on(name: str, net: Any, features: int, **how: Any) -> Learner:
    """A method on a network; a relation module, where the method takes one, reads pairs of its embeddings."""
    if "relation" in inspect.signature(methods()[name]).parameters:
        how["relation"] = MLP([2 * features, 8, 1])
    return methods()[name](net, **how)
