"""Made from nbs/A4_recipes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from metabook.episodes import Classes, FewShot, Sinusoids
from metabook.learners import Learner
from metabook.recipes import (
    BUDGETS,
    PUBLISHED,
    REPRODUCTIONS,
    ROWS,
    STRIDED,
    Attempt,
    Recipe,
    data_named,
    make_learner,
    network_of,
    recipe_for,
    reproduce,
    run_recipe,
    table,
    unseen_tasks,
)
from metabook.registry import load, methods, register, save
from metabook.training import Outer


def test_a_recipe_names_networks():
    # cell 8c17e0d2
    recipe = Recipe(net={"pool": "stride", "width": 16})
    assert recipe.with_networks({"*": "conv4"}) == recipe  # nothing new
    assert recipe.with_networks({"*": "resnet12"}) == Recipe(
        "resnet12"
    )  # which has other arguments
    two = recipe.with_networks({"other": "mlp"})
    assert two.network == {"*": "conv4", "other": "mlp"}
    assert two.arguments_called("embed") == recipe.net and two.arguments_called("other") == {}
    wide = two.with_arguments({"width": 32, "other.sizes": [784, 5]})
    assert wide.arguments_called("embed") == {"pool": "stride", "width": 32}
    assert wide.arguments_called("other") == {"width": 32, "sizes": [784, 5]}
    assert (wide.network_called("embed"), wide.network_called("other")) == ("conv4", "mlp")
    with pytest.raises(ValueError, match="says nothing of 'embed', expected a network for each"):
        Recipe({"other": "mlp"}).network_called("embed")


def test_unknown_data_gets_the_nearest_name():
    # cell 84549dc0
    with pytest.raises(
        ValueError, match="unknown data set or folder 'omniglott': did you mean 'omniglot'"
    ):
        data_named("omniglott")
    with pytest.raises(ValueError, match="holds train, val and test"):
        data_named("/nowhere/at/all")
    work = Path(tempfile.mkdtemp())
    for folder in ("train/a", "val/b", "test/a"):
        (work / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="class 'a' stands in both train and test"):
        data_named(str(work))
    shutil.rmtree(work)


def test_every_method_can_be_made_from_words():
    # cell d405ef6a
    images = Classes(torch.zeros(60, 1, 28, 28, dtype=torch.uint8), torch.full((3,), 20))
    few = FewShot(images, 3, 1, 5)
    # cell 68f7d866
    for name, cls in methods().items():
        learner = make_learner(name, recipe_for(name, "omniglot"), few)
        assert isinstance(learner, cls) and learner.config["name"] == name
    with pytest.raises(ValueError, match="unknown method 'mamel': did you mean 'maml'"):
        make_learner("mamel", Recipe(), Sinusoids())
    with pytest.raises(ValueError, match="unknown argument of maml 'rate'"):
        make_learner("maml", Recipe("mlp", method={"rate": 1}), Sinusoids())


def test_a_learner_starts_from_a_trained_network():
    # cell d405ef6a
    images = Classes(torch.zeros(60, 1, 28, 28, dtype=torch.uint8), torch.full((3,), 20))
    few = FewShot(images, 3, 1, 5)
    # cell 68f7d866
    for name, cls in methods().items():
        learner = make_learner(name, recipe_for(name, "omniglot"), few)
        assert isinstance(learner, cls) and learner.config["name"] == name
    with pytest.raises(ValueError, match="unknown method 'mamel': did you mean 'maml'"):
        make_learner("mamel", Recipe(), Sinusoids())
    with pytest.raises(ValueError, match="unknown argument of maml 'rate'"):
        make_learner("maml", Recipe("mlp", method={"rate": 1}), Sinusoids())
    # cell c5477fae
    work = Path(tempfile.mkdtemp())
    first = make_learner("pretrained", recipe_for("pretrained", "omniglot"), few, base=3)
    save(work / "first", first)
    second = make_learner(
        "finetune", recipe_for("finetune", "omniglot"), few, network_of(work / "first")
    )
    for old, new in zip(first.embed.parameters(), second.embed.parameters(), strict=True):
        assert torch.equal(old, new)
    save(work / "headed", make_learner("maml", recipe_for("maml", "omniglot"), few))
    with pytest.raises(ValueError, match="maml needs a network with an output for each class"):
        make_learner("maml", recipe_for("maml", "omniglot"), few, first.embed)
    with pytest.raises(ValueError, match="ends in a head"):
        network_of(work / "headed")
    shutil.rmtree(work)


def test_a_method_of_two_networks_is_made_from_words():
    # cell d405ef6a
    images = Classes(torch.zeros(60, 1, 28, 28, dtype=torch.uint8), torch.full((3,), 20))
    few = FewShot(images, 3, 1, 5)
    # cell 68f7d866
    for name, cls in methods().items():
        learner = make_learner(name, recipe_for(name, "omniglot"), few)
        assert isinstance(learner, cls) and learner.config["name"] == name
    with pytest.raises(ValueError, match="unknown method 'mamel': did you mean 'maml'"):
        make_learner("mamel", Recipe(), Sinusoids())
    with pytest.raises(ValueError, match="unknown argument of maml 'rate'"):
        make_learner("maml", Recipe("mlp", method={"rate": 1}), Sinusoids())
    # cell c5477fae
    work = Path(tempfile.mkdtemp())
    first = make_learner("pretrained", recipe_for("pretrained", "omniglot"), few, base=3)
    save(work / "first", first)
    second = make_learner(
        "finetune", recipe_for("finetune", "omniglot"), few, network_of(work / "first")
    )
    for old, new in zip(first.embed.parameters(), second.embed.parameters(), strict=True):
        assert torch.equal(old, new)
    save(work / "headed", make_learner("maml", recipe_for("maml", "omniglot"), few))
    with pytest.raises(ValueError, match="maml needs a network with an output for each class"):
        make_learner("maml", recipe_for("maml", "omniglot"), few, first.embed)
    with pytest.raises(ValueError, match="ends in a head"):
        network_of(work / "headed")
    shutil.rmtree(work)
    # cell e06b9f5c
    with mock.patch.dict(methods()):  # afterwards nobody knows it

        @register("two-views")
        class TwoViews(Learner):
            "Looks at a task with two networks."

            head = False

            def __init__(self, embed: nn.Module, other: nn.Module):
                super().__init__()
                self.embed, self.other = embed, other

            @classmethod
            def takes(cls, support):
                return {"embed": (support, None), "other": (support, support.y.shape[-1])}

        words = Recipe({"*": "conv4", "other": "mlp"}, net={"*.width": 8})
        learner = make_learner("two-views", words, few)
        assert learner.embed.features == 8  # from 28 pixels one is left of each filter
        assert [layer.out_features for layer in learner.other.layers] == [256, 64, 3]
        with pytest.raises(
            ValueError, match="unknown network of two-views 'othr': did you mean 'other'"
        ):
            make_learner("two-views", Recipe({"*": "conv4", "othr": "mlp"}), few)
        with pytest.raises(
            ValueError, match="the network 'other' of two-views: unknown argument of mlp"
        ):
            make_learner("two-views", replace(words, net={"width": 8}), few)


def test_what_a_recipe_starts_from_is_trained_first():
    # cell 48240c09
    work, where = Path(tempfile.mkdtemp()), torch.device("cpu")
    small = replace(
        recipe_for("pretrained", "glyphs"), net={"width": 8, **STRIDED}, steps=3, batch=16
    )
    task = {"data": "glyphs", "way": 5, "shot": 1}
    first = run_recipe("pretrained", small, task, where, 0, work / "first")
    assert first["training"]["meta_batch"] == 1 and first["validation"]["n"] == 200
    tune = replace(recipe_for("finetune", "glyphs"), net=small.net)
    second = run_recipe("finetune", tune, task, where, 0, work / "second", start=work / "first")
    assert second["training"] == first["training"] and second["recipe"]["steps"] == 0
    for old, new in zip(
        *(network_of(work / f).parameters() for f in ("first", "second")), strict=True
    ):
        assert torch.equal(old, new)
    shutil.rmtree(work)


def test_every_method_has_its_rows():
    # cell d405ef6a
    images = Classes(torch.zeros(60, 1, 28, 28, dtype=torch.uint8), torch.full((3,), 20))
    few = FewShot(images, 3, 1, 5)
    # cell 2cd8561a
    book = {name for name, cls in methods().items() if cls.__module__.startswith("metabook.")}
    assert set(ROWS) == book
    assert {row.method for row in REPRODUCTIONS.values()} == book
    for method, data, shot in PUBLISHED:
        assert f"{method}-{data}-5way-{shot}shot" in REPRODUCTIONS
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
        "tasks": 20,
    }  # a trial
    for seed in (0, 1):
        report = reproduce("finetune-glyphs-5way-1shot", seeds=[seed], steps=1, **where)
    written = json.loads((work / "results/trials/finetune-glyphs-5way-1shot.json").read_text())
    assert written == report and [row["seed"] for row in written["rows"]] == [0, 1]
    row = written["rows"][0]
    assert row["joint"]["episodes"] == row["single"]["episodes"] and row["single"]["n"] == 20
    assert row["command"].endswith("--budget cpu --seed 0 --steps 1 --tasks 20")
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
    where = {"runs": work / "runs", "results": work, "progress": False, "tasks": 20, "steps": 2}
    (row,) = reproduce("meta-transfer-glyphs-5way-1shot", seeds=[0], **where)["rows"]
    name = "meta-transfer-glyphs-5way-1shot"
    attempt = Attempt(REPRODUCTIONS[name], "cpu", 0, torch.device("cpu"), work / "runs", 2, 20)
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
    where = {"runs": work / "runs", "results": work, "progress": False, "tasks": 20, "steps": 4}
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
