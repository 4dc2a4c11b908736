"""Every kind of layer with every kind of method, against loops written apart from the library.

The grid runs in a process of its own, where nobody checks shapes at each call: it takes long enough.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from notebooks import ROOT

from bench.grid import LAYERS, METHODS
from metabook import verified
from metabook.reproduction import RESULTS

COMMITTED = json.loads((RESULTS / "bench-lifting-cpu.json").read_text())
PROVEN = {name for name, layer in LAYERS.items() if verified.proven(layer.build())}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What comes out here and now.  Its exit status says that no cell is wrong."""
    out = tmp_path_factory.mktemp("grid")
    command = [sys.executable, "-m", "bench.grid", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.partition("* may be refused")[2] + done.stderr[-2000:]
    return json.loads((out / "bench-lifting-cpu.json").read_text())["rows"]


@pytest.mark.xdist_group("grid")
def test_every_layer_is_equal_to_the_plain_loop_or_refused_if_it_may_be(found):
    assert len({row["layer"] for row in found}) == len(LAYERS) >= 40 and len(METHODS) == 6
    compared = [row["error"] for row in found if "error" in row]
    assert len(compared) > 700 and max(compared) < 1e-9
    assert {row["way"] for row in found if row["must"]} <= {"lifted", "looped", "does not apply"}


@pytest.mark.xdist_group("grid")
def test_a_refusal_names_the_layer_or_the_argument(found):
    told = {(row["layer"], row["said"]) for row in found if "said" in row}
    assert told
    for layer, said in told:
        assert said.startswith(("Impossible: ", "ValueError: Embedding(")), (layer, said)


@pytest.mark.xdist_group("grid")
def test_networks_of_verified_layers_are_right_without_a_trial(found):
    ways = {row["way"] for row in found if row["layer"] in PROVEN}
    assert ways <= {"lifted", "does not apply"}
    seen = {type(m).__name__ for name in PROVEN for m in LAYERS[name].build().modules()}
    version = ".".join(torch.__version__.split(".")[:2])
    assert verified.VERIFIED.get((version, "cpu"), frozenset()) <= seen


@pytest.mark.xdist_group("grid")
def test_the_committed_table_is_what_comes_out(found):
    if COMMITTED["versions"]["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip("the table was measured with another torch")
    place = ("layer", "method", "must", "way")
    here, told = ([tuple(row[k] for k in place) for row in r] for r in (found, COMMITTED["rows"]))
    assert here == told
