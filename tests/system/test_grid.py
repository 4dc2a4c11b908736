"""Every kind of layer with every kind of method, against loops that share no code with the library."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import torch

from bench.grid import LAYERS, METHODS, Row, grid, remarks, summary
from metabook import trust
from metabook.recipes import RESULTS

COMMITTED = json.loads((RESULTS / "bench-lifting-cpu.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """PyTorch tells where lifting is slow, and the library where it loops."""
    log, level = logging.getLogger("metabook"), logging.getLogger("metabook").level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def trusted() -> list[Row]:
    """As users get it."""
    return grid(("auto", "loop"))


@pytest.fixture(scope="module")
def unchecked() -> list[Row]:
    """Lifted at one's word."""
    return grid(("vmap",), check=False)


def test_every_layer_is_equal_to_the_plain_loop_or_refused_if_it_may_be(trusted):
    assert list(remarks(trusted)) == []
    assert len(LAYERS) >= 40 and len(METHODS) == 6
    assert sum(row.must for row in trusted) > 1200


def test_a_refusal_names_the_layer_or_the_argument(trusted):
    told = {(r.layer, r.cell.refusal) for r in trusted if r.cell.refusal}
    assert told
    for layer, refusal in told:
        assert refusal.startswith(("Impossible: ", "ValueError: Embedding(max_norm=")), (
            layer,
            refusal,
        )


def test_networks_of_verified_layers_are_right_without_a_trial(unchecked):
    proven = {name: trust.proven(layer.build()) for name, layer in LAYERS.items()}
    assert [r for r in unchecked if proven[r.layer] and (r.cell.wrong or r.cell.refusal)] == []
    seen = {
        type(m).__name__
        for n, layer in LAYERS.items()
        if proven[n]
        for m in layer.build().modules()
    }
    version = ".".join(torch.__version__.split(".")[:2])
    assert trust.VERIFIED.get((version, "cpu"), frozenset()) <= seen


def test_the_committed_table_is_what_comes_out(trusted, unchecked):
    if COMMITTED["versions"]["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip("the table was measured with another torch")
    place = ("layer", "method", "must", "way")
    found, told = (
        [tuple(row[k] for k in place) for row in rows]
        for rows in (summary(trusted + unchecked), COMMITTED["rows"])
    )
    assert found == told
