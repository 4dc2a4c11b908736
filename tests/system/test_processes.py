"""Several processes do what one does, and end when one of them ends: with real processes, on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import sharing
import torch
from notebooks import ROOT

import metabook
from metabook.checkpoints import newest_checkpoint
from metabook.structures import tree_leaves

LIMIT = 90  # seconds for a launch; it takes less than ten
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WORKER = str(ROOT / "tests" / "system" / "sharing.py")


def launch(*words: object, prefix: list[str] = TORCHRUN) -> subprocess.Popen:
    """Two processes that do something, with one thread each."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*prefix, *map(str, words)], env=env, **pipes)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its status and what it printed; one that hangs is ended with all that it started, and fails."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # `torchrun` ends its processes, if need be after half a minute
        pytest.fail(f"still running after {LIMIT} s: {process.communicate()[1][-2000:]}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("shared")
    status, _, errors = ended(launch(WORKER, "agree", folder))
    assert status == 0, errors[-2000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def same(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sharing.CASES)
def test_two_processes_take_the_steps_of_one(name, found):
    wanted = sharing.trained(name)
    for theirs in found:
        same(theirs[name], wanted)
    first, second = (tree_leaves(theirs[name]) for theirs in found)
    assert all(
        a.equal(b) if torch.is_tensor(a) else a == b for a, b in zip(first, second, strict=True)
    )


def test_a_process_that_is_short_of_memory_keeps_in_step(found):
    for theirs in found:
        same(theirs["short of memory"], sharing.trained("combined"))


def test_scores_are_those_of_one_process_bit_for_bit(found):
    for theirs in found:
        assert all(map(torch.equal, theirs["scores"], sharing.scores()))


def test_gradients_add_to_what_is_there(found):
    for theirs in found:
        torch.testing.assert_close(theirs["added"], sharing.added_twice())


def test_all_processes_refuse_what_would_not_be_one_run(found):
    for theirs in found:
        seeds, tasks = theirs["refused"]
        assert seeds.startswith("process 0 was started with seed=0, process 1 with seed=1")
        assert tasks.startswith("1 tasks for 2 processes") and "raise meta_batch" in tasks


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_its_folder_loads(victim, tmp_path):
    began = time.perf_counter()
    status, _, errors = ended(launch(WORKER, "endless", tmp_path / "run", victim))
    assert status != 0 and time.perf_counter() - began < 60
    assert "another process of this run has ended" in errors
    assert f"{tmp_path / 'run'}" in errors
    assert metabook.load(tmp_path / "run").lr == 0.05
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if "loss" in json.loads(row)][-1] in (6, 7)


def test_a_run_that_is_asked_to_end_keeps_what_it_learned(tmp_path):
    alone = launch(
        WORKER, "endless", tmp_path / "run", 0, int(signal.SIGTERM), prefix=[sys.executable]
    )
    status, _, errors = ended(alone)
    assert status == 0 and "interrupted: 7 steps" in errors
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert training["steps_taken"] == 7 and metabook.load(tmp_path / "run")


def test_one_process_that_is_asked_to_end_takes_the_other_with_it(tmp_path):
    job = "endless", tmp_path / "run", 0, int(signal.SIGTERM)
    _, _, errors = ended(launch(WORKER, *job))
    assert errors.count("interrupted: 7 steps in") == 1 and "another process of this run" in errors
    assert metabook.load(tmp_path / "run").lr == 0.05
    assert newest_checkpoint(tmp_path / "run")["outer"]["taken"] == 7


def test_the_command_line_shares_and_prints_once(tmp_path):
    folder = tmp_path / "run"
    tiny = ["--net", "width=4", "--steps", 2, "--batch", 3, "--train-way", 5, "--every", 2]
    words = ["-m", "metabook", "train", "protonet", "--data", "glyphs", "--device", "cpu"]
    status, out, errors = ended(launch(*words, *tiny, "--out", folder))
    assert status == 0, errors[-2000:]
    assert out.count("best validation accuracy") == 1 and metabook.load(folder)
    again = ["-m", "metabook", "evaluate", folder, "--tasks", 40, "--json", "--device", "cpu"]
    status, out, errors = ended(launch(*again))
    assert status == 0, errors[-2000:]
    alone = ended(launch(*again, prefix=[sys.executable]))[1]
    assert json.loads(out) == json.loads(alone)
