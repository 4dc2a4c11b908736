"""Made from nbs/A11_recipes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from metabook.classes import Classes
from metabook.episodes import FewShot, Sinusoids
from metabook.learners import Learner
from metabook.recipes import (
    STRIDED,
    Recipe,
    data_named,
    make_learner,
    network_of,
    recipe_for,
    run_recipe,
)
from metabook.registry import methods, register
from metabook.saving import save


def cell_d405ef6a():
    # cell d405ef6a
    images = Classes(torch.zeros(60, 1, 28, 28, dtype=torch.uint8), torch.full((3,), 20))
    few = FewShot(images, 3, 1, 5)
    return few


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
    few = cell_d405ef6a()
    # cell 68f7d866
    for name, cls in methods().items():
        learner = make_learner(name, recipe_for(name, "omniglot"), few)
        assert isinstance(learner, cls) and learner.config["name"] == name
    with pytest.raises(ValueError, match="unknown method 'mamel': did you mean 'maml'"):
        make_learner("mamel", Recipe(), Sinusoids())
    with pytest.raises(ValueError, match="unknown argument of maml 'rate'"):
        make_learner("maml", Recipe("mlp", method={"rate": 1}), Sinusoids())


def test_a_learner_starts_from_a_trained_network():
    few = cell_d405ef6a()
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
    few = cell_d405ef6a()
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
