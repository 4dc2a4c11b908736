"""A method of two networks, a network and data of a user's own: named on the command line, trained, scored, loaded."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metabook import recipes
from metabook.classes import Classes
from metabook.cli import main
from metabook.episodes import Examples, FewShot, Sinusoids
from metabook.learners import Learner
from metabook.networks import MLP, Conv4, ResNet12
from metabook.prototypes import prototypes, squared_euclidean
from metabook.recipes import Recipe, make_learner, network_of, recipe_for
from metabook.registry import METHODS, NETWORKS, methods, register
from metabook.saving import load, read_config
from metabook.sources import SOURCES, TaskSource

TINY = "--data glyphs --steps 2 --batch 1 --train-way 5 --every 2 --device cpu"


def two_networks() -> type[Learner]:
    """A method as a reader writes it: distances from class means, added over two embeddings."""

    @register("two-views")
    class TwoViews(Learner):
        """Nearest class means in two spaces at once."""

        head = False

        def __init__(self, embed: nn.Module, other: nn.Module, weight: float = 0.5):
            super().__init__()
            self.embed, self.other, self.weight = embed, other, weight

        @classmethod
        def takes(cls, support: Examples) -> dict[str, tuple[Examples, int | None]]:
            return {"embed": (support, None), "other": (support, None)}

        def adapt(self, support: Examples) -> list[Tensor]:
            return [prototypes(net(support.x), support.y) for net in (self.embed, self.other)]

        def predict(self, state: list[Tensor], x: Tensor) -> Tensor:
            first = squared_euclidean(self.embed(x), state[0])
            return -(1 - self.weight) * first - self.weight * squared_euclidean(
                self.other(x), state[1]
            )

    return TwoViews


def own_network() -> type[nn.Module]:
    """A network that says nothing about tasks."""

    @register("linear-view", NETWORKS)
    class LinearView(nn.Module):
        """One linear layer on the pixels."""

        def __init__(self, inputs: int, outputs: int = 7):
            super().__init__()
            self.layer, self.features = nn.Linear(inputs, outputs), outputs

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1))

    return LinearView


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """What this module registers, nobody else meets."""
    methods()
    known = [(registry, dict(registry)) for registry in (METHODS, NETWORKS, SOURCES)]
    two_networks(), own_network()
    yield
    for registry, before in known:
        registry.clear()
        registry.update(before)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[str], tuple[int, str]]:
    """Type a line after `metabook`; it gives the exit status, and what was printed."""

    def typed(words: str) -> tuple[int, str]:
        words = words.format(at=tmp_path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["metabook", *shlex.split(words)])
            patch.chdir(tmp_path)
            main()
        said = capsys.readouterr()
        return end.value.code or 0, " ".join((said.out + said.err).replace("│", " ").split())

    return typed


def networks_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The networks of the learner in a trained folder, as its note says them."""
    args = read_config(folder)["method"]["args"]
    return {name: note for name, note in args.items() if isinstance(note, dict)}


def test_one_word_is_for_both_networks(say, tmp_path):
    assert say(f"train two-views {TINY} --net width=4 --out {{at}}/run")[0] == 0
    for note in networks_in(tmp_path / "run").values():
        assert note["name"] == "conv4"
        assert (note["args"]["width"], note["args"]["out"], note["args"]["size"]) == (4, None, 28)
    learner = load(tmp_path / "run")
    assert not torch.equal(learner.embed.convs[0].weight, learner.other.convs[0].weight)
    status, said = say("evaluate {at}/run --tasks 5 --json")
    row = json.loads(said)[0]
    assert status == 0 and row["recipe"]["network"] == "conv4" and row["n"] == 5


def test_each_network_has_a_word_of_its_own(say, tmp_path):
    line = f"train two-views {TINY} --network other=mlp --net embed.width=4 --set weight=0.25"
    assert say(f"{line} --net other.sizes=[784,6] --out {{at}}/run")[0] == 0
    notes = networks_in(tmp_path / "run")
    assert notes["embed"]["name"] == "conv4" and notes["embed"]["args"]["width"] == 4
    assert notes["other"] == {"name": "mlp", "args": {"sizes": [784, 6]}}
    learner = load(tmp_path / "run")
    assert type(learner.other) is MLP and learner.weight == 0.25
    assert say("evaluate {at}/run --tasks 5 --way 3")[0] == 0
    recipe = read_config(tmp_path / "run")["recipe"]
    assert recipe["network"] == {"*": "conv4", "other": "mlp"}
    assert recipe["net"] == {"embed.width": 4, "other.sizes": [784, 6]}
    assert make_learner("two-views", Recipe(**recipe), two_way()).embed.convs[0].out_channels == 4


def test_both_words_at_once_and_a_resumed_run(say, tmp_path):
    line = f"train two-views {TINY} --network conv4 --network other=mlp --net embed.width=4"
    assert say(f"{line} --out {{at}}/run")[0] == 0
    before = (tmp_path / "run" / "learner.safetensors").read_bytes()
    assert say(f"{line} --out {{at}}/run --resume")[0] == 0
    assert (tmp_path / "run" / "learner.safetensors").read_bytes() == before
    assert networks_in(tmp_path / "run")["other"]["args"] == {"sizes": [784, 256, 64]}


def test_a_start_takes_the_place_of_the_first_network(say, tmp_path):
    assert say(f"train protonet {TINY} --net width=4 --out {{at}}/first")[0] == 0
    line = f"train two-views {TINY} --start {{at}}/first --network other=mlp"
    assert say(f"{line} --out {{at}}/second")[0] == 0
    notes = networks_in(tmp_path / "second")
    assert notes["embed"] == networks_in(tmp_path / "first")["embed"]
    assert notes["other"]["name"] == "mlp"
    given, trained = network_of(tmp_path / "first"), load(tmp_path / "second").embed
    torch.testing.assert_close(given.convs[0].weight, trained.convs[0].weight, atol=0.01, rtol=0)
    status, said = say(f"{line} --network embed=mlp --out {{at}}/third")
    assert status == 2 and "starts from a trained conv4" in said and "embed=mlp is asked" in said
    assert say(f"{line} --network embed=conv4 --net embed.width=4 --out {{at}}/third")[0] == 0
    assert type(network_of(tmp_path / "third")) is Conv4  # of two, the first


WRONG = {
    "--network othr=mlp": "unknown network of two-views 'othr': did you mean 'other'? known are embed, other",
    "--net othr.width=4": "unknown network of two-views 'othr': did you mean 'other'? known are embed, other",
    "--network other=mpl": "unknown network 'mpl': did you mean 'mlp'",
    "--network mlp --network conv4": "expected one for all networks of the method; for one of them say its name",
    "--network =mlp": "--network =mlp: expected NAME=VALUE",
    "--net other.widht=4": "the network 'other' of two-views: unknown argument of conv4 'widht': did you mean 'width'",
    "--network other=mlp --net width=4": "the network 'other' of two-views: unknown argument of mlp 'width': known are sizes",
    "--network other=linear-view": "linear-view has no for_tasks, which would say its 'inputs' for these tasks",
    "--start {at} --net width=4": "--start brings its own network: leave out --network and --net",
    "--data sinusoids": "two-views is for classification",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_names_are_told_with_what_is_known(words, say):
    status, said = say(f"train two-views {TINY} {words} --out {{at}}/run")
    assert status == 2 and WRONG[words] in said and "Traceback" not in said


def test_a_network_without_for_tasks_gets_what_the_user_says(say, tmp_path):
    line = f"train two-views {TINY} --net embed.width=4 --network other=linear-view"
    assert say(f"{line} --net other.inputs=784 --out {{at}}/run")[0] == 0
    assert networks_in(tmp_path / "run")["other"]["args"] == {"inputs": 784, "outputs": 7}
    status, said = say(f"train protonet {TINY} --network linear-view --out {{at}}/other")
    assert status == 2 and "expected that you do: --net inputs=..." in said
    line = f"train protonet {TINY} --network linear-view --net inputs=784"
    assert say(f"{line} --out {{at}}/other")[0] == 0


def test_networks_that_cannot_read_the_tasks_say_so(say):
    status, said = say("train maml --data sinusoids --network conv4 --out {at}/run")
    assert status == 2 and "Conv4 reads images [n, channels, height, width]" in said
    assert "shape (5, 1): take a network that reads them, such as MLP" in said


def test_data_of_ones_own_need_one_entry(say, tmp_path):
    """No other line of the library knows its name."""

    class Parabolas(Sinusoids):
        def gather(self, indices: Any) -> Any:
            sides = [Examples(x, x.square(), {}) for x in (indices.support, indices.query)]
            return super().gather(indices)._replace(support=sides[0], query=sides[1])

    SOURCES["parabolas"] = TaskSource(
        title="Parabolas",
        licence="mine",
        make=Parabolas,
        family="parabolas",
        network="mlp",
        shot=3,
        query=9,
    )
    recipes.RECIPES["maml", "parabolas"] = Recipe("mlp", net={"sizes": [1, 8, 1]}, steps=2, batch=2)
    try:
        assert say("train maml --data parabolas --out {at}/run")[0] == 0
        status, said = say("evaluate {at}/run --tasks 5 --json")
        assert "here parabolas Parabolas (mine)" in say("data list")[1]
    finally:
        del recipes.RECIPES["maml", "parabolas"]
    row = json.loads(said)[0]
    assert status == 0 and row["tasks"] == "Parabolas(shot=3, query=9)" and row["metric"] == "mse"
    assert networks_in(tmp_path / "run")["net"]["args"]["sizes"] == [1, 8, 1]
    assert recipe_for("protonet", "parabolas") == Recipe("mlp")


def two_way() -> FewShot:
    """Tasks to fit networks to."""
    return FewShot(Classes.of({name: torch.rand(4, 1, 28, 28) for name in "abc"}), 2, 1, 2)


@pytest.mark.parametrize(
    "network, args",
    [
        (MLP, {"sizes": [784, 256, 64]}),
        (Conv4, {"channels": 1, "out": None, "size": 28}),
        (ResNet12, {"channels": 1, "out": None}),
    ],
)
def test_arguments_are_those_of_0_1_0(network, args):
    name = next(name for name, cls in NETWORKS.items() if cls is network)
    note = recipes.learner_note("protonet", Recipe(name), two_way(), None, None)
    assert note == {"name": "protonet", "args": {"embed": {"name": name, "args": args}}}


def test_a_learner_with_a_head_gets_an_output_for_each_class():
    for tasks, sizes in ((two_way(), [784, 256, 64, 2]), (Sinusoids(), [1, 40, 40, 1])):
        assert recipes.learner_note("maml", Recipe("mlp"), tasks, None, None)["args"]["net"] == {
            "name": "mlp",
            "args": {"sizes": sizes},
        }


def test_a_wrapper_hands_its_networks_on():
    @register("kept-views")
    class Kept(Learner):
        """It holds a learner."""

        def __init__(self, learner: Learner):
            super().__init__()
            self.learner = learner

    recipe = Recipe({"*": "conv4", "other": "mlp"}, {"*.width": 4}, {"learner": "two-views"})
    held = make_learner("kept-views", recipe, two_way()).learner
    assert type(held.embed) is Conv4 and type(held.other) is MLP
    with pytest.raises(ValueError, match="unknown network of two-views 'othr'"):
        make_learner(
            "kept-views", Recipe({"*": "conv4", "othr": "mlp"}, {}, recipe.method), two_way()
        )
