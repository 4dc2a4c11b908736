"""Runs that were killed, stopped or short of disk go on: with real processes and real signals."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from notebooks import ROOT
from PIL import Image
from test_processes import TORCHRUN, WORKER, ended, launch
from torch import Tensor

import metabook
from metabook.checkpoints import newest_checkpoint, occupied, pack
from metabook.datasets import DataError, from_folder
from metabook.episodes import FewShot, Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.prototypes import ProtoNet
from metabook.runs import Run, checkpoint
from metabook.training import fit

CLOCKS = ("seconds", "tasks_per_second")


def log_of(folder: Path) -> list[dict]:
    """The rows of a run's log, without what a clock says and where the run was."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in (*CLOCKS, "notes")} for row in rows]


def left(folder: Path) -> dict[str, Tensor]:
    """All tensors that a run left: the learner's, and those of the last checkpoint."""
    tensors: dict[str, Tensor] = {}
    pack({k: v for k, v in newest_checkpoint(folder).items() if k != "seconds"}, tensors)
    return metabook.load(folder).state_dict() | tensors


def same(found: Path, wanted: Path) -> None:
    """Two runs left the same, to the last bit."""
    assert log_of(found) == log_of(wanted)
    a, b = left(found), left(wanted)
    assert a.keys() == b.keys() and len(a) > 10
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def waves(folder: Path, steps: int = 12, **how: object) -> Run:
    """A run of MAML on sinusoids with a checkpoint after every third step."""
    torch.manual_seed(0)
    learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression")
    how = {"meta_batch": 4, "every": 3, "log_every": 2, "progress": False} | how
    frozen = Sinusoids(5, 15).freeze(10)
    return fit(learner, Sinusoids(5, 10), steps=steps, validate=frozen, folder=folder, **how)


def at(step: int, what: object) -> object:
    """A schedule under which something happens when so many steps are taken."""

    def rate(taken: int) -> float:
        if taken == step:
            what()
        return 1.0

    return rate


# --- killed


def test_two_processes_go_on_after_either_was_killed(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended(launch(WORKER, "survive", whole))[0] == 0
    for victim, step in ((0, 6), (1, 11)):
        status, _, errors = ended(launch(WORKER, "survive", run, victim, step))
        assert status != 0 and not (run / "checkpoints" / "step-00000014.json").exists(), errors
    status, _, errors = ended(launch(WORKER, "survive", run))
    assert status == 0 and "going on after step 8" in errors, errors[-2000:]
    same(run, whole)


def test_one_process_takes_over_from_two_and_says_that_bits_may_differ(tmp_path, caplog):
    assert ended(launch(WORKER, "survive", tmp_path, 1, 6))[0] != 0
    status, _, errors = ended(launch(WORKER, "survive", tmp_path, prefix=[sys.executable]))
    assert status == 0, errors[-2000:]
    assert "goes on, but not as it would have: processes was 2 and is 1" in errors
    assert metabook.load(tmp_path)


TRAIN = ["-m", "metabook", "train", "protonet", "--data", "glyphs", "--device", "cpu"]
TRAIN += ["--net", "width=4", "--steps", "120", "--batch", "2", "--train-way", "5", "--every", "8"]


def test_a_command_killed_at_any_moment_goes_on(tmp_path):
    """At moments that nobody chose; the seed only makes a failure easier to find again."""
    whole, run, chance = tmp_path / "whole", tmp_path / "run", random.Random(0)
    python = [sys.executable]
    assert ended(launch(*TRAIN, "--out", whole, prefix=python))[0] == 0
    killed = 0
    for _ in range(3):
        process = launch(*TRAIN, "--out", run, "--resume", prefix=python)
        seen = len(list((run / "checkpoints").glob("*.json"))) if run.exists() else 0
        while process.poll() is None and not (seen or list(run.glob("checkpoints/*.json"))):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5) if not seen else chance.uniform(2.5, 3.5))
        process.kill()
        killed += ended(process)[0] == -signal.SIGKILL
    assert killed > 0
    status, out, errors = ended(launch(*TRAIN, "--out", run, "--resume", prefix=python))
    assert status == 0 and "best validation accuracy" in out, errors[-2000:]
    same(run, whole)


def test_a_polite_end_is_a_checkpoint_of_that_very_step(tmp_path):
    waves(tmp_path / "whole")
    stop = at(7, lambda: signal.raise_signal(signal.SIGINT))
    run = waves(tmp_path / "run", schedule=stop)
    assert run.interrupted and newest_checkpoint(run.folder)["outer"]["taken"] == 7
    waves(run.folder, resume=True)
    same(run.folder, tmp_path / "whole")


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, caplog):
    waves(tmp_path / "whole")
    run = waves(tmp_path / "run", schedule=at(9, lambda: signal.raise_signal(signal.SIGINT)))
    newest = run.folder / "checkpoints" / "step-00000009.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    waves(run.folder, resume=True)
    assert "step-00000009.json cannot be used" in caplog.text
    assert "going on after step 6" in caplog.text
    same(run.folder, tmp_path / "whole")


def test_a_run_without_a_checkpoint_begins_again(tmp_path):
    waves(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1}\n{"st')
    waves(tmp_path / "run", resume=True)
    same(tmp_path / "run", tmp_path / "whole")


def test_circumstances_that_differ_are_named(tmp_path, caplog, monkeypatch):
    run = waves(tmp_path / "run", steps=6)
    version = metabook.__version__
    monkeypatch.setattr(metabook, "__version__", "9.9")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        waves(run.folder, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert f"metabook was {version!r} and is '9.9'" in caplog.text
    assert f"threads was {threads} and is {threads + 1}" in caplog.text


def test_another_method_and_another_network_are_named(tmp_path):
    run = waves(tmp_path / "run", steps=3)
    other, wider = ProtoNet(MLP([1, 8, 1])), MAML(MLP([1, 9, 1]), lr=0.01, kind="regression")
    other.kind = "regression"
    for learner, message in (
        (other, "learner was 'maml' and is 'protonet'"),
        (wider, r"sizes was \[1, 8, 1\] and is \[1, 9, 1\]"),
    ):
        how = {"meta_batch": 4, "every": 3, "log_every": 2, "progress": False, "resume": True}
        with pytest.raises(ValueError, match=f"holds another run: .*{message}"):
            fit(learner, Sinusoids(5, 10), steps=12, folder=run.folder, **how)


def test_the_memory_that_was_short_stays_short(tmp_path):
    """The chunk that a run found is part of its checkpoint."""
    run = waves(tmp_path / "run", steps=3)
    run.outer.gradient.chunk, run.records.saved = 2, None
    run.learner.train()
    checkpoint(run)
    assert waves(run.folder, resume=True).outer.gradient.chunk == 2


def test_a_folder_belongs_to_one_process(tmp_path):
    run = waves(tmp_path / "run", steps=3)
    with occupied(run.folder), pytest.raises(FileExistsError, match="another process is training"):
        waves(run.folder, resume=True)
    waves(run.folder, resume=True)


# --- a disk that does not take it


def test_a_quota_that_is_used_up(tmp_path):
    """The system refuses a file of this size, in the middle of the run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"

    def use_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    try:
        with pytest.raises(OSError, match=r"the checkpoint of step 6.*resume=True") as told:
            waves(folder, schedule=at(7, use_up))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG and str(folder) in str(told.value)
    assert newest_checkpoint(folder)["outer"]["taken"] == 6
    assert metabook.load(folder) and not list(folder.rglob("*.part"))
    waves(tmp_path / "whole")
    waves(folder, resume=True)
    same(folder, tmp_path / "whole")


def test_a_disk_that_turns_read_only(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    turn = at(7, lambda: monkeypatch.setattr(os, "replace", refuse))
    with pytest.raises(OSError, match=r"Read-only file system.*make it writable") as told:
        waves(tmp_path / "run", schedule=turn)
    monkeypatch.undo()
    assert told.value.errno == errno.EROFS
    assert newest_checkpoint(tmp_path / "run")["outer"]["taken"] == 6
    assert metabook.load(tmp_path / "run")


def test_a_folder_that_vanishes(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="could not be written into") as told:
        waves(folder, schedule=at(7, lambda: shutil.rmtree(folder)))
    assert str(folder) in str(told.value)


def test_data_that_vanish_do_not_disturb_a_run_but_its_return(tmp_path):
    data = tmp_path / "data"
    for i, name in enumerate(("a", "b", "c", "d")):
        (data / name).mkdir(parents=True)
        for k in range(4):
            Image.new("L", (16, 16), 40 * i + k).save(data / name / f"{k}.png")
    tasks = FewShot(from_folder(data, size=16, channels=1), 2, 1, 1)
    torch.manual_seed(0)
    how = {"steps": 6, "meta_batch": 2, "every": 2, "progress": False, "folder": tmp_path / "run"}
    run = fit(ProtoNet(MLP([256, 4])), tasks, schedule=at(3, lambda: shutil.rmtree(data)), **how)
    assert run.outer.taken == 6 and metabook.load(tmp_path / "run")
    with pytest.raises((DataError, ValueError, OSError), match="data"):
        from_folder(data, size=16, channels=1)


def test_the_command_says_it_in_a_line(tmp_path):
    """A folder in which nothing can be written: here a file stands in its way."""
    (tmp_path / "run").write_text("in the way")
    words = [sys.executable, *TRAIN, "--out", str(tmp_path / "run" / "deeper"), "--resume"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "deeper" in done.stderr.splitlines()[-1]


def test_torchrun_is_what_the_documents_say() -> None:
    """The command that restarts by itself is spelled as PyTorch spells it."""
    words = [*TORCHRUN[:3], "--help"]
    helped = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "--max-restarts" in helped
