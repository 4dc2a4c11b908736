"""The readers of files survive what a fuzzer found, and a few random changes of what is valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from notebooks import ROOT

sys.path.insert(0, str(ROOT))

from fuzz.mutations import BLIND
from fuzz.survive import Failure, TooLong, bounded, survive
from fuzz.targets import TARGETS

# What was found, and by whom it was not survived: target and bytes.
CASES: dict[str, tuple[str, bytes]] = {}


@pytest.mark.parametrize(("name", "data"), CASES.values(), ids=CASES)
def test_what_was_found_is_survived(name: str, data: bytes) -> None:
    survive(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_seeds_are_survived(name: str) -> None:
    target, rng = TARGETS[name], Random(0)
    mutations = BLIND + ([target.mutate] if target.mutate else [])
    for seed in target.seeds():
        for mutation in mutations:
            survive(name, mutation(seed, rng))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_to_their_end(name: str, tmp_path: Path) -> None:
    """Or a target would say nothing of what stands behind the first error."""
    for i, seed in enumerate(TARGETS[name].seeds()):
        (folder := tmp_path / str(i)).mkdir()
        TARGETS[name].read(folder, seed)


# --- a target can fail


def test_time_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.survive.SECONDS", 0.1)
    with pytest.raises(TooLong), bounded("x", tmp_path):
        while True:
            pass


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="told by Linux only")
def test_memory_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.survive.MEGABYTES", 50)
    with pytest.raises(Failure, match="MiB of memory"), bounded("x", tmp_path):
        assert b"x" * (100 << 20)


def test_writing_elsewhere_is_seen(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with bounded("x", inside):
        (inside / "file").write_text("as it should be")
    for escape in (
        lambda: (inside / ".." / "file").write_text("outside"),
        lambda: (inside / "file").rename(tmp_path / "moved"),
        lambda: subprocess.run([sys.executable, "-V"], capture_output=True),
    ):
        with pytest.raises(Failure, match="x: "), bounded("x", inside):
            escape()


def test_other_errors_and_errors_that_name_no_file_are_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(folder: Path, data: bytes) -> None:
        raise KeyError("a") if data else ValueError("something is wrong")

    monkeypatch.setitem(TARGETS, "x", type(TARGETS["config"])(read, list))
    with pytest.raises(KeyError):
        survive("x", b"a")
    with pytest.raises(Failure, match="does not say where"):
        survive("x", b"")
