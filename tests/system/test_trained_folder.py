"""A trained folder outlives the process that made it, and no crash leaves half of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metabook
from metabook import saving
from metabook.classes import Classes
from metabook.episodes import FewShot, Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.saving import load, read_config, save
from metabook.scores import evaluate
from metabook.training import fit

ROOT = Path(__file__).resolve().parent.parent.parent

SHARED = """
import json, sys, torch, metabook
from metabook.classes import Classes
from metabook.episodes import Examples, FewShot

def letters():
    g = torch.Generator().manual_seed(0)
    means = torch.randint(60, 196, (6, 1, 1, 16, 16), generator=g)
    noise = torch.randint(-20, 20, (6, 8, 1, 16, 16), generator=g)
    x = (means + noise).to(torch.uint8)
    return Classes.of({f"letter {i}": x[i] for i in range(6)}, mean=(0.5,), std=(0.25,))

def classify(learner, prepare):
    images = torch.cat([letters().of_class(i)[:2] for i in range(4)])
    x = prepare(images)
    with torch.no_grad():
        return learner(Examples.of(x[::2], torch.arange(4), way=4), x[1::2]).tolist()
"""

TRAIN = (
    SHARED
    + """
from metabook.networks import Conv4
from metabook.prototypes import ProtoNet
from metabook.scores import evaluate
from metabook.training import fit

torch.manual_seed(0)
learner = ProtoNet(Conv4(1, size=16, width=4, stats="support"))
tasks = FewShot(letters(), way=3, shot=1, query=3)
run = fit(learner, tasks, steps=3, meta_batch=2, validate=tasks.freeze(4), every=2, folder=sys.argv[1], progress=False)
print(json.dumps([evaluate(learner, tasks, 10).per_task.tolist(), classify(learner, letters().prepare)]))
"""
)

# The other process knows the folder and nothing else of how the learner was made.
USE = (
    SHARED
    + """
from metabook.saving import read_config
from metabook.scores import evaluate

learner, config = metabook.load(sys.argv[1]), read_config(sys.argv[1])
tasks = FewShot(letters(), way=3, shot=1, query=3)
scores = evaluate(learner, tasks, 10).per_task.tolist()

shown = config["tasks"]["examples"]
assert shown["shape"] == [1, 16, 16]  # channels, height, width to which a picture is brought
mean, std = (torch.tensor(shown[key])[:, None, None] for key in ("mean", "std"))
print(json.dumps([scores, classify(learner, lambda images: (images.float() / 255 - mean) / std)]))
"""
)


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A folder that another process trained, and its scores and answers there."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = python(TRAIN, folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_train_in_one_process_and_classify_in_another(trained: tuple[Path, list]) -> None:
    folder, expected = trained
    used = python(USE, folder)
    assert used.returncode == 0, used.stderr
    assert json.loads(used.stdout) == expected


def test_what_a_folder_says(trained: tuple[Path, list]) -> None:
    """All that a command line needs to prepare somebody's own pictures, and that a result row repeats."""
    folder, _ = trained
    config = read_config(folder)
    assert config["tasks"]["examples"] == {"shape": [1, 16, 16], "mean": [0.5], "std": [0.25]}
    assert config["tasks"]["kind"] == "classification"
    assert config["method"]["name"] == "protonet"
    assert config["method"]["args"]["embed"]["args"]["stats"] == "support"
    assert config["training"]["steps"] == config["training"]["steps_taken"] == 3
    assert config["validation"]["step"] in (2, 3) and len(config["validation"]["episodes"]) == 12
    assert config["metabook"] == metabook.__version__ and config["layout"] == saving.VERSION
    files = [".lock", "checkpoints", "config.json", "learner.safetensors", "log.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == files


# --- crashes

KILLED = """
import os, sys
from metabook import saving
from metabook.maml import MAML
from metabook.networks import MLP

original, renamed = os.replace, []

def replace(source, target):
    if len(renamed) == int(sys.argv[2]):
        os._exit(9)  # no clean-up of any kind, as when the power goes
    renamed.append(target)
    original(source, target)

os.replace = replace
saving.save(sys.argv[1], MAML(MLP([2, 3, 3]), lr=0.2))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that somebody may read."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_killed_before_the_first_rename_the_earlier_folder_stands(tmp_path: Path) -> None:
    save(tmp_path, MAML(MLP([2, 3, 3]), lr=0.1))
    before = contents(tmp_path)
    assert python(KILLED, tmp_path, 0).returncode == 9
    assert contents(tmp_path) == before
    assert load(tmp_path).lr == 0.1


def test_killed_between_the_renames_the_earlier_folder_loads(tmp_path: Path) -> None:
    save(tmp_path, MAML(MLP([2, 3, 3]), lr=0.1))
    assert python(KILLED, tmp_path, 1).returncode == 9
    assert load(tmp_path).lr == 0.1
    save(tmp_path, MAML(MLP([2, 3, 3]), lr=0.3))  # and the next one repairs it
    assert load(tmp_path).lr == 0.3


def test_killed_in_a_new_folder_it_is_no_trained_folder(tmp_path: Path) -> None:
    for renames in (0, 1):
        folder = tmp_path / str(renames)
        assert python(KILLED, folder, renames).returncode == 9
        with pytest.raises(ValueError, match=r"no config\.json"):
            load(folder)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_while_renaming_leaves_no_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    calls, original = [], os.replace

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError("no more")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no more"):
        save(tmp_path, MAML(MLP([2, 3, 3])))
    assert len(list(tmp_path.iterdir())) == fails_at - 1


# --- folders that cannot be written


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    torch.manual_seed(0)
    learner = MAML(MLP([1, 3, 1]), kind="regression")
    before = [p.clone() for p in learner.parameters()]
    with pytest.raises(OSError, match="file"):
        fit(learner, Sinusoids(), steps=2, folder=tmp_path / "file" / "run", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder_is_read_but_not_written(tmp_path: Path) -> None:
    save(tmp_path, MAML(MLP([1, 3, 1]), kind="regression"))
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        assert isinstance(load(tmp_path), MAML)
        if os.geteuid() != 0:  # root may write everywhere
            with pytest.raises(PermissionError, match=str(tmp_path)):
                save(tmp_path, MAML(MLP([1, 3, 1])))
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == before


def test_a_denied_write_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(saving, "open", denied, raising=False)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        save(tmp_path, MAML(MLP([1, 3, 1])))
    assert not list(tmp_path.iterdir())


def test_a_copied_folder_is_the_same_learner(tmp_path: Path) -> None:
    """Where a folder lies, and how its text is laid out, does not matter."""
    torch.manual_seed(0)
    learner = MAML(Conv4(1, out=3, size=16, width=4), test_steps=2)
    save(tmp_path / "a", learner)
    (tmp_path / "a").rename(tmp_path / "é b")
    path = tmp_path / "é b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    data = Classes.of({name: torch.randn(4, 1, 16, 16) for name in "abc"})
    frozen = FewShot(data, way=3, shot=1, query=2).freeze(5)
    assert torch.equal(
        evaluate(learner, frozen).per_task, evaluate(load(tmp_path / "é b"), frozen).per_task
    )
