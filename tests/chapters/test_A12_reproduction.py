"""Made from nbs/A12_reproduction.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from metabook.classes import Classes
from metabook.episodes import FewShot
from metabook.learners import Learner
from metabook.recipes import make_learner, network_of, unseen_tasks
from metabook.registry import methods
from metabook.reproduction import BUDGETS, PUBLISHED, REPRODUCTIONS, ROWS, Attempt, reproduce, table
from metabook.saving import load
from metabook.training import Outer


def test_every_method_has_its_rows():
    # cell 12e90005
    images = Classes(torch.zeros(60, 1, 28, 28, dtype=torch.uint8), torch.full((3,), 20))
    few = FewShot(images, 3, 1, 5)
    # cell 2cd8561a
    book = {name for name, cls in methods().items() if cls.__module__.startswith("metabook.")}
    assert set(ROWS) == book
    assert {row.method for row in REPRODUCTIONS.values()} == book
    for method, data, way, shot in PUBLISHED:
        assert f"{method}-{data}-{way}way-{shot}shot" in REPRODUCTIONS
    for row in REPRODUCTIONS.values():
        for budget in BUDGETS:
            recipe = row.recipe(budget)
            assert isinstance(make_learner(row.method, recipe, few), Learner)


def test_a_row_is_run_and_written():
    # cell 84ce894c
    work = Path(tempfile.mkdtemp())
    where = {
        "runs": work / "runs",
        "results": work / "results",
        "progress": False,
        "tasks": 4,
    }  # a trial
    for seed in (0, 1):
        report = reproduce("finetune-glyphs-5way-1shot", seeds=[seed], steps=1, **where)
    written = json.loads((work / "results/trials/finetune-glyphs-5way-1shot.json").read_text())
    assert written == report and [row["seed"] for row in written["rows"]] == [0, 1]
    row = written["rows"][0]
    assert row["joint"]["episodes"] == row["single"]["episodes"] and row["single"]["n"] == 4
    assert row["command"].endswith("--budget cpu --seed 0 --steps 1 --tasks 4")
    assert row["training"]["steps_taken"] == 1  # of pre-training
    expected = row["single"]["mean"] - row["before"]["mean"]
    assert row["gain"]["mean"] == pytest.approx(expected, abs=1e-6)
    lines = table(["finetune"], work / "results/trials").splitlines()
    assert len(lines) == 3 and lines[1].split()[:4] == [report["name"], "cpu", "0", "-"]
    assert f"± {100 * row['gain']['ci95']:.2f} " in lines[1] and table([], work).count("\n") == 0
    again = reproduce("finetune-glyphs-5way-1shot", seeds=[0], steps=1, **where)
    assert again["rows"][0]["single"] == row["single"]  # the trained folder was found
    assert row["start"]["recipe"]["tasks"] == "batches" and row["task"]["shot"] == 1
    with pytest.raises(ValueError, match="a run of another recipe"):
        reproduce("pretrained-glyphs-5way-1shot", seeds=[0], steps=2, **where)
    shutil.rmtree(work)


def test_what_a_row_starts_from_is_what_it_is_compared_with():
    # cell a641deed
    work = Path(tempfile.mkdtemp())
    where = {"runs": work / "runs", "results": work, "progress": False, "tasks": 4, "steps": 2}
    (row,) = reproduce("meta-transfer-glyphs-5way-1shot", seeds=[0], **where)["rows"]
    name = "meta-transfer-glyphs-5way-1shot"
    attempt = Attempt(REPRODUCTIONS[name], "cpu", 0, torch.device("cpu"), work / "runs", 2, 4)
    started = network_of(attempt.start()).state_dict()
    frozen = load(attempt.folder).net.state_dict()
    assert all(torch.equal(started[key], frozen[key]) for key in started)
    same = unseen_tasks(row["task"], "test", torch.device("cpu"))
    untrained = attempt.untrained(same).net.state_dict()
    assert all(torch.equal(started[key], t) for key, t in untrained.items())
    log = (attempt.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in log if '"lr": ' in line and '"step"' in line][
        -1
    ] < 1e-9
    config = attempt.start() / "config.json"  # as if its start had been trained again
    config.write_text(json.dumps(json.loads(config.read_text()) | {"weights": "other"}))
    with pytest.raises(ValueError, match="from another start"):
        attempt.train()
    shutil.rmtree(work)


def test_what_was_interrupted_goes_on():
    # cell d94b6784
    work, name = Path(tempfile.mkdtemp()), "pretrained-glyphs-5way-1shot"
    where = {"runs": work / "runs", "results": work, "progress": False, "tasks": 4, "steps": 4}
    stopped = mock.patch.object(Outer, "look", side_effect=[None, None, KeyboardInterrupt])
    with stopped, pytest.raises(ValueError, match="or one that was interrupted"):
        reproduce(name, seeds=[0], **where)
    assert not list(work.glob("**/pretrained*.json"))
    dark = mock.patch.object(Outer, "turn", side_effect=RuntimeError("the lights went out"))
    with dark, pytest.raises(RuntimeError):
        reproduce(name, seeds=[0], **where)
    taken = mock.Mock(side_effect=Outer.turn, autospec=True)
    with mock.patch.object(Outer, "turn", lambda self, episodes: taken(self, episodes)):
        again = reproduce(name, seeds=[0], **where)
    assert 0 < taken.call_count < 4  # the steps before the last checkpoint are not taken again
    undisturbed = reproduce(
        name, seeds=[0], **where | {"runs": work / "other", "results": work / "other"}
    )
    assert again["rows"][0]["joint"] == undisturbed["rows"][0]["joint"]
    shutil.rmtree(work)
