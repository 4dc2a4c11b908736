"""What is trained can be loaded, anywhere; and errors that name what is wrong.  Each input was found by a user."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from notebooks import ROOT
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import metabook
from metabook import checkpoints, cli, datasets, recipes, registry, saving
from metabook.checkpoints import write_checkpoint
from metabook.classes import Classes
from metabook.datasets import from_folder
from metabook.engine import Engine
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, Tasks, VariedWayShot
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.meta_lstm import MetaLSTM
from metabook.networks import MLP, Conv4, ResNet12
from metabook.pgn import PGN
from metabook.prototypes import ProtoNet
from metabook.recipes import Recipe, make_learner, network_of
from metabook.registry import NETWORKS, register
from metabook.saving import load, read_config, rehearse, save
from metabook.scores import evaluate
from metabook.training import fit
from metabook.transfer import Batches, Pretrained

QUIET: dict[str, Any] = {"meta_batch": 2, "progress": False}


@pytest.fixture(autouse=True)
def as_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types in signatures are checked in tests only: here nobody but the library looks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def classes(*features: int, dtype: torch.dtype = torch.float32) -> Classes:
    g = torch.Generator().manual_seed(0)
    return Classes.of({str(i): torch.randn(8, *features, generator=g).to(dtype) for i in range(6)})


def vectors() -> FewShot:
    return FewShot(classes(3), 2, 1, 3)


def same_answers(one: Learner, other: Learner, tasks: Tasks) -> bool:
    return torch.equal(*(evaluate(m, tasks, 8).per_task for m in (one, other)))


# --- constructors


def depth_by_value() -> type[nn.Module]:
    @register("stochastic-depth", NETWORKS)
    class Net(nn.Module):
        def __init__(self, depth: int = 3, rate: float = 0.1):
            super().__init__()
            self.rates = [r.item() for r in torch.linspace(0, rate, depth)]
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in self.rates)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    return Net


def by_numpy() -> type[nn.Module]:
    @register("orthogonal-start", NETWORKS)
    class Net(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.layer = nn.Linear(3, width)
            self.layer.weight.data = torch.from_numpy(self.layer.weight.detach().numpy() + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    return Net


def lazy_later() -> type[nn.Module]:
    @register("lazy-later", NETWORKS)
    class Net(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.LazyLinear(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    return Net


def lazy() -> type[nn.Module]:
    @register("lazy", NETWORKS)
    class Net(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.layers = nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    return Net


@pytest.mark.parametrize(
    "network, method",
    [
        (depth_by_value, ProtoNet),
        (by_numpy, ProtoNet),
        (lazy, ProtoNet),
        (lazy, MAML),
        (lazy_later, ProtoNet),
    ],
)
def test_what_cannot_be_built_without_numbers_is_built_with_them(
    network: Callable[[], type[nn.Module]], method: type[Learner], tmp_path: Path
):
    net = network()
    learner = method(net())
    how = dict(validate=vectors(), every=1, folder=tmp_path / "run", **QUIET)
    fit(learner, vectors(), steps=2, **how)
    assert same_answers(learner, load(tmp_path / "run"), vectors())
    fit(method(net()), vectors(), steps=3, resume=True, **how)


def test_what_could_not_be_loaded_is_not_trained(tmp_path: Path):
    learner = Pretrained(Conv4(1, out=5, size=16, width=4, pool="stride"))
    learner.embed.head = nn.Identity()  # as people take a head off
    images = FewShot(classes(1, 16, 16), 2, 1, 3)
    with pytest.raises(ValueError, match=r"saved, but never loaded as it is: embed\.head"):
        fit(learner, images, steps=1, folder=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
    fit(learner, images, steps=1, **QUIET)  # without a folder nothing is promised


def test_a_constructor_that_fails_the_second_time_is_found_before_the_training():
    built = []

    @register("only-once", NETWORKS)
    class Once(nn.Module):
        def __init__(self, width: int = 2):
            super().__init__()
            if built:
                raise KeyError("the file is gone")
            built.append(self)
            self.layer = nn.Linear(3, width)

    with pytest.raises((ValueError, KeyError), match="the file is gone"):
        rehearse(ProtoNet(Once()))


def test_one_name_is_a_method_or_a_network():
    with pytest.raises(ValueError, match="'mlp' already names MLP"):
        register("mlp")(type("Other", (Learner,), {}))
    with pytest.raises(ValueError, match="'maml' already names MAML"):
        register("maml", NETWORKS)(type("Other", (nn.Module,), {"__init__": lambda self: None}))


CHANGES: dict[str, tuple[Callable[[], Learner], str]] = {
    "a distance": (lambda: changed(ProtoNet(MLP([3, 4])), distance="cosine"), "scale was "),
    "a layer": (lambda: with_tanh(), "act was ReLU and is Tanh"),
}


def changed(learner: Learner, **attributes: Any) -> Learner:
    for name, value in attributes.items():
        setattr(learner, name, value)
    return learner


def with_tanh() -> Learner:
    @register("activated", NETWORKS)
    class Net(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.layer, self.act = nn.Linear(3, width), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.layer(x))

    net = Net()
    net.act = nn.Tanh()
    return ProtoNet(net)


@pytest.mark.parametrize("make, message", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_after_it_was_made_is_not_saved_as_another(
    make: Callable[[], Learner], message: str, tmp_path: Path
):
    for use in (
        lambda: save(tmp_path / "saved", make()),
        lambda: fit(make(), vectors(), steps=1, folder=tmp_path / "run", **QUIET),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert not (tmp_path / "run").exists() and not (tmp_path / "saved").exists()


def test_what_was_set_after_it_was_made_is_saved(tmp_path: Path):
    learner = changed(MAML(MLP([3, 8, 2]), lr=0.5), lr=0.1, test_steps=20)
    again = load(save(tmp_path, learner))
    assert (again.lr, again.steps, again.test_steps) == (0.1, 1, 20)
    assert same_answers(learner, again, vectors())
    fit(changed(learner, lr=0.2), vectors(), steps=1, folder=tmp_path / "run", **QUIET)
    assert load(tmp_path / "run").lr == 0.2


def test_what_changes_in_the_training_costs_nothing(tmp_path: Path):
    """A folder is written all the same, with the arguments as they are at the end."""

    class Annealed(FewShot):
        def feedback(self, report: Any) -> None:
            learner.lr /= 2

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    learner = MAML(MLP([3, 2]), lr=0.8)
    fit(learner, Annealed(classes(3), 2, 1, 3), steps=2, folder=tmp_path, **QUIET)
    assert load(tmp_path).lr == learner.lr == 0.2


def test_numbers_that_are_not_saved_are_found_before_the_training(tmp_path: Path):
    @register("projected", NETWORKS)
    class Net(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.table = torch.randn(3, width)  # neither a parameter nor a buffer
            self.layer = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x @ self.table)

    torch.manual_seed(1)
    with pytest.raises(
        ValueError, match=r"would be another one after it was saved and loaded.*buffers"
    ):
        fit(ProtoNet(Net()), vectors(), steps=1, folder=tmp_path / "run", **QUIET)


def test_frozen_and_tied_parameters_and_tuples_come_back(tmp_path: Path):
    @register("of-two", NETWORKS)
    class Net(nn.Module):
        def __init__(self, slopes: tuple[float, float] = (0.0, 2.0)):
            super().__init__()
            self.slopes = slopes if isinstance(slopes, tuple) else (slopes[0], slopes[0])
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.register_buffer("pos", torch.ones(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + self.slopes[1] * self.pos.to(x)
            return self.b(x)[:, :2]

    net = Net()
    net.b.weight = net.a.weight
    net.a.bias.requires_grad_(False)
    net.pos = net.pos.bfloat16()
    learner = MAML(net, lr=0.1)
    fit(learner, vectors(), steps=2, folder=tmp_path, **QUIET)
    again = load(tmp_path)
    assert again.net.b.weight is again.net.a.weight and again.net.slopes == (0.0, 2.0)
    assert not again.net.a.bias.requires_grad and again.net.b.bias.requires_grad
    assert again.net.pos.dtype == torch.bfloat16
    assert same_answers(learner, again, vectors())


def test_an_argument_without_a_number_in_json_is_refused_before_the_training(tmp_path: Path):
    @register("clamped", NETWORKS)
    class Net(nn.Module):
        def __init__(self, top: float = float("inf")):
            super().__init__()
            self.top, self.layer = top, nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).clamp(max=self.top)

    with pytest.raises(TypeError, match="top=inf cannot be written as JSON"):
        fit(ProtoNet(Net()), vectors(), steps=1, folder=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


class Foreign:
    """A configuration of another library."""


def sound() -> dict[str, Callable[[], nn.Module]]:
    """Networks of users that are right as they are."""

    class Part(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.layer = nn.Linear(3, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    @register("with-config", NETWORKS)
    class WithConfig(Part):
        def __init__(self, width: int = 4):
            super().__init__(width)
            self.layer.config = Foreign()

    @register("late-table", NETWORKS)
    class LateTable(Part):
        def __init__(self, width: int = 4):
            super().__init__(width)
            self.register_buffer("table", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4.0)
            return self.layer(x) + self.table

    @register("of-sizes", NETWORKS)
    class OfSizes(Part):
        def __init__(self, sizes: list, usual: tuple = (1, 2), seed: int | None = None):
            super().__init__(sizes[0])
            self.sizes, self.usual, self.seed = sizes, usual, seed or 1000

    @register("warm", NETWORKS)
    class Warm(Part):
        def __init__(self, temperature: float = 1.0, scales: tuple = (1.0, 2.0)):
            super().__init__()
            self.log_t = nn.Parameter(torch.tensor(temperature).log())
            self.scales = [torch.full((4,), s) for s in scales]

        @property
        def temperature(self) -> float:
            return self.log_t.exp().item()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scales[1]

    @register("twice", NETWORKS)
    class Twice(nn.Module):
        def __init__(self, a: nn.Module, b: nn.Module):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    @register("turning", NETWORKS)
    class Turning(Part):
        def __init__(self, width: int = 4):
            super().__init__(width)
            self.register_buffer(
                "f", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.f.imag

    @register("own-dice", NETWORKS)
    class OwnDice(Part):
        def __init__(self, width: int = 4):
            super().__init__(width)
            self.dice = np.random.default_rng(0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.dice.random()

    one = MLP([3, 4])
    with_loss = WithConfig()
    with_loss.criterion = nn.CrossEntropyLoss()
    return {
        "with a config of its own": WithConfig,
        "with a loss beside it": lambda: with_loss,
        "with a table made late": LateTable,
        "with tuples": lambda: OfSizes((4,)),
        "with lists": lambda: OfSizes([4], [3, 5]),
        "with a property like its argument": Warm,
        "with one part twice": lambda: Twice(one, one),
        "with a complex table": Turning,
        "with dice of its own": OwnDice,
    }


@pytest.mark.parametrize("name", sound())
def test_sound_networks_are_trained_saved_and_loaded(name: str, tmp_path: Path):
    learner = ProtoNet(sound()[name]())
    save(tmp_path / "saved", learner)
    fit(learner, vectors(), steps=2, validate=vectors(), every=1, folder=tmp_path / "run", **QUIET)
    again = load(tmp_path / "run")
    if name != "with dice of its own":
        assert same_answers(learner, again, vectors())
        assert same_answers(learner, load(save(tmp_path / "saved", learner)), vectors())


def test_loading_and_saving_draw_no_random_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @register("drawn", NETWORKS)
    class Drawn(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.layer = nn.Linear(3, width)
            self.layer.weight.data += np.random.rand()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    learner = ProtoNet(Drawn())
    before = np.random.get_state()[2], torch.get_rng_state()
    fit(learner, vectors(), steps=1, validate=vectors(), folder=tmp_path, **QUIET)
    load(tmp_path)
    assert np.random.get_state()[2] == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert not seeded


def test_a_name_stays_with_its_class():
    with_tanh()
    with pytest.raises(ValueError, match="'activated' already names Net"):

        @register("activated", NETWORKS)
        class Net(nn.Module):
            pass


# --- precision


def in_bfloat16() -> type[nn.Module]:
    @register("frozen-in-bfloat16", NETWORKS)
    class Net(nn.Module):
        def __init__(self, stem: bool = True):
            super().__init__()
            self.stem = nn.Linear(3, 3) if stem else nn.Identity()
            self.backbone = nn.Linear(3, 8).bfloat16().requires_grad_(False)
            self.register_buffer("table", torch.tensor([1 / 3], dtype=torch.float64))
            self.register_buffer("steps", torch.tensor(2**40 + 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(self.stem(x).bfloat16()).float() + self.table.float()

    return Net


@pytest.mark.parametrize("stem", [True, False])
def test_each_part_keeps_its_precision(stem: bool, tmp_path: Path):
    learner = ProtoNet(in_bfloat16()(stem))
    support, query = Examples(torch.randn(4, 3), torch.eye(2).repeat(2, 1)), torch.randn(2, 3)
    again = load(save(tmp_path, learner))
    kinds = {k: v.dtype for k, v in learner.state_dict().items()}
    assert {k: v.dtype for k, v in again.state_dict().items()} == kinds
    assert set(kinds.values()) >= {torch.bfloat16, torch.float64, torch.int64}
    assert torch.equal(learner(support, query), again(support, query))
    assert evaluate(again, vectors(), 8).n == 8


def test_float64_all_the_way():
    wide = FewShot(classes(3, dtype=torch.float64), 2, 1, 3)
    for learner in (ProtoNet(MLP([3, 4])), MAML(MLP([3, 2])), PGN(MLP([3, 2]))):
        fit(learner.double(), wide, steps=1, **QUIET)
        assert evaluate(learner, wide, 4).per_task.dtype == torch.float64


@pytest.mark.parametrize("engine", [Engine(lift="loop"), Engine(lift="vmap"), Engine()], ids=str)
def test_data_in_another_precision_is_told(engine: Engine):
    wide = FewShot(classes(3, dtype=torch.float64), 2, 1, 3)
    message = r"support.x: the examples are torch.float64 on cpu, the learner torch.float32 on cpu: move one"
    for learner in (ProtoNet(MLP([3, 4])), MAML(MLP([3, 2]))):
        with pytest.raises(ValueError, match=message):
            fit(learner, wide, steps=1, engine=engine, **QUIET)
        with pytest.raises(ValueError, match=message):
            evaluate(learner, wide, 4, engine=engine)


# --- paths


def test_home_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    learner = ProtoNet(MLP([3, 4]))
    save("~/saved", learner)
    assert same_answers(learner, load("~/saved"), vectors())
    how = dict(steps=1, validate=vectors(), folder="~/run", **QUIET)
    fit(learner, vectors(), **how)
    fit(learner, vectors(), **(how | {"steps": 2}), resume=True)
    write_checkpoint("~/other", 1, {"a": 1})
    assert checkpoints.newest_checkpoint("~/other") == {"a": 1}
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / name / "0.png")
    assert len(from_folder("~/images", 16)) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"saved", "run", "other", "images"}


# --- numbers of numpy


def test_numbers_of_numpy_are_numbers(tmp_path: Path):
    labels = np.array([0, 1, 2, 2])
    assert Examples.of(torch.randn(4, 3), torch.as_tensor(labels), labels.max() + 1).y.shape == (
        4,
        3,
    )
    data, one, three = classes(3), np.int64(1), np.int32(3)
    tasks = [FewShot(data, np.int64(2), shot, 1) for shot in np.arange(1, 6)]
    assert tasks[0].freeze(4).hash == FewShot(data, 2, 1, 1).freeze(4).hash
    assert repr(tasks[0]) == repr(FewShot(data, 2, 1, 1)) and json.dumps(tasks[0].describe())
    assert repr(Sinusoids(one, three)) == repr(Sinusoids(1, 3)) and Batches(data, three).sample(1)
    assert repr(VariedWayShot(data, (np.int64(2), three), (one, one), one)) == repr(
        VariedWayShot(data, (2, 3), (1, 1), 1)
    )
    learner = MAML(MLP([three, np.int64(2)]), lr=np.float32(0.1), steps=one)
    how = dict(
        lr=np.float32(1e-3),
        keep=np.int64(2),
        engine=Engine(chunk=np.int64(1)),
        meta_batch=np.int64(2),
        every=one,
        seed=np.int64(7),
        clip=np.float64(1.0),
    )
    run = fit(
        learner,
        FewShot(data, 2, 1, 3),
        steps=np.int64(2),
        folder=tmp_path,
        progress=False,
        notes={"n": one},
        **how,
    )
    again, config = load(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert again.lr == pytest.approx(0.1) and again.steps == 1 and config["n"] == 1
    assert config["training"]["lr"] == pytest.approx(1e-3) and run.settings["steps"] == 2
    for score in (evaluate(learner, vectors(), np.int64(4), seed=np.int64(1), batch=three),):
        assert score.n == 4
    fit(
        learner,
        FewShot(data, 2, 1, 3),
        steps=3,
        folder=tmp_path,
        progress=False,
        resume=True,
        notes={"n": 1},
        **how,
    )


def test_what_is_no_number_is_still_refused():
    for wrong in (np.array([1, 2]), torch.tensor(1), object()):
        with pytest.raises(TypeError, match="cannot be written as JSON"):
            registry.plain("note", wrong)
    for right, plain in ((np.float64(0.5), 0.5), (np.bool_(True), True), (np.array(3), 3)):
        found = registry.plain("note", right)
        assert found == plain and type(found) is type(plain)


# --- export


class Served(nn.Module):
    """An adapted learner, as people serve one."""

    def __init__(self, learner: Learner, support: Examples):
        super().__init__()
        self.learner, self.state = learner.eval(), learner.adapt(support)

    def forward(self, x: Tensor) -> Tensor:
        return self.learner.predict(self.state, x)


SERVED: dict[str, Callable[[], Learner]] = {
    "ProtoNet": lambda: ProtoNet(Conv4(width=4)),
    "ProtoNet, support statistics": lambda: ProtoNet(
        Conv4(width=4, pool="stride", stats="support")
    ),
    "ProtoNet, built-in layers": lambda: ProtoNet(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    ),
    "MAML": lambda: MAML(Conv4(out=2, width=4, stats="support")),
    "MetaLSTM": lambda: MetaLSTM(Conv4(out=2, width=4, pool="stride", stats="support"), steps=1),
    "PGN": lambda: PGN(Conv4(out=2, width=4, pool="stride", stats="support")),
    "Pretrained": lambda: Pretrained(ResNet12(1, widths=(2, 2, 2, 2), stats="running")),
}


@pytest.mark.slow
@pytest.mark.parametrize("learner", SERVED.values(), ids=SERVED)
@torch.no_grad()
def test_an_adapted_learner_is_exported_for_any_number_of_queries(learner: Callable[[], Learner]):
    support = Examples(torch.randn(4, 1, 28, 28), torch.eye(2).repeat(2, 1))
    served = Served(learner(), support)
    n = torch.export.Dim("n", min=1, max=4096)
    program = torch.export.export(
        served, (torch.randn(4, 1, 28, 28),), dynamic_shapes={"x": {0: n}}
    )
    for number in (1, 5, 70):
        x = torch.randn(number, 1, 28, 28)
        torch.testing.assert_close(program.module()(x), served(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_way_out():
    x = torch.randn(4, 1, 28, 28)
    served = Served(ProtoNet(Conv4(width=4)), Examples(x, torch.eye(2).repeat(2, 1)))
    mlp = Served(ProtoNet(MLP([3, 2])), Examples(x[:, 0, 0, :3], torch.eye(2).repeat(2, 1)))
    for refused in (
        lambda: torch.jit.script(MLP([3, 2])),
        lambda: torch.jit.script(Conv4()),
        lambda: torch.jit.script(served),
        lambda: torch.jit.trace(Conv4(width=4), x),
        lambda: torch.jit.trace(ResNet12(1, widths=(2, 2, 2, 2)), x),
        lambda: torch.jit.trace(served, x),
        lambda: torch.jit.trace(mlp, x[:, 0, 0, :3]),
    ):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit, expected torch\.export.*dynamic_shapes"
        ):
            refused()


# --- the install


def test_the_library_is_found_from_the_folder_above_a_clone(tmp_path: Path):
    """A clone is called as the package is; what is installed must win against an empty namespace."""
    (tmp_path / "metabook").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path / "metabook")
    code = "import metabook; print(metabook.__version__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == metabook.__version__, done.stderr


# --- folders of images


def test_files_that_are_passed_over_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20)).save(tmp_path / name / f"{i}.jpg")
        for i in range(9):
            shutil.copy(tmp_path / name / "0.jpg", tmp_path / name / f"{i}")
            (tmp_path / name / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert from_folder(tmp_path, 16).sizes.tolist() == [2, 2]
    assert "36 files were passed over" in caplog.text
    assert "18 without an ending, 18 .heic" in caplog.text


LEFT = (".ipynb_checkpoints", ".git", "__MACOSX", "__macosx", "@eaDir")


def test_images_that_stand_elsewhere_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for place in ("cat", "dog", "cat/more", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / place / "0.jpg")
    assert from_folder(tmp_path, 16).sizes.tolist() == [1, 1]
    assert (
        "2 files were passed over" in caplog.text and "1 in folders inside classes" in caplog.text
    )


def test_what_systems_leave_is_no_class_and_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for split, letters in (("train", "abc"), ("val", "de"), ("test", "fg")):
        for name in (*letters, *LEFT):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / "0.png")
            for left in (*LEFT, ".DS_Store", "Thumbs.db"):
                (tmp_path / split / name / left).mkdir()
            (tmp_path / split / name / "._0.png").write_bytes(b"not an image")
    found = recipes.data_named(str(tmp_path))
    assert [
        recipes.classes_of({"data": found, "size": 16, "channels": 3}, s).names
        for s in ("train", "val")
    ] == [
        ["a", "b", "c"],
        ["d", "e"],
    ]
    assert not caplog.records


def test_a_list_with_a_byte_order_mark_is_read(tmp_path: Path):
    rows = [f"{c}{i}.jpg,{c:02}" for c in range(20) for i in range(2)]
    (tmp_path / "test.csv").write_text("\n".join(["filename,label", *rows]), encoding="utf-8-sig")
    assert len(datasets._mini_rows(tmp_path, "test")) == 40


# --- messages


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class SampleAlone(Tasks):
    kind = "regression"

    def sample(self, n: int, generator: Any = None) -> Episode:
        return Sinusoids().sample(n, generator)


class Flat(Sinusoids):
    def gather(self, indices: Any) -> Episode:
        return Episode(*(s._replace(y=s.y[..., 0]) for s in super().gather(indices)))


class Nameless(Sinusoids):
    kind = None


def curve() -> MAML:
    return MAML(MLP([1, 8, 1]), kind="regression", lr=0.01)


def train(learner: Learner, tasks: Any, **how: Any) -> Any:
    return fit(learner, tasks, steps=1, **(QUIET | how))


def images() -> FewShot:
    return FewShot(classes(1, 8, 8), 3, 1, 2)


MESSAGES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "forgot Flatten": (
        lambda: train(ProtoNet(nn.Conv2d(1, 4, 3)), images()),
        ValueError,
        (
            "Conv2d",
            "shape (3, 4, 6, 6)",
            "expected a row of numbers for each example",
            "nn.Flatten()",
        ),
    ),
    "forgot Flatten, with a head": (
        lambda: train(MAML(nn.Conv2d(1, 3, 3)), images()),
        ValueError,
        ("predictions", "shape (3, 3, 6, 6)", "one row of numbers for each query", "nn.Flatten()"),
    ),
    "forgot Flatten, pre-trained": (
        lambda: train(Pretrained(nn.Conv2d(1, 4, 3)), images()),
        ValueError,
        ("Conv2d", "(3, 4, 6, 6)", "expected a row of numbers", "nn.Flatten()"),
    ),
    "the network gives a pair": (
        lambda: train(ProtoNet(Pair(3, 4)), vectors()),
        TypeError,
        ("Pair", "a tuple", "expected one tensor", "let its forward return"),
    ),
    "targets without their axis": (
        lambda: train(curve(), Flat()),
        ValueError,
        ("support.y", "shape (1, 5)", "expected floats of shape [1, n, out]", "y[..., None]"),
    ),
    "tasks with sample alone": (
        lambda: evaluate(curve(), SampleAlone(), 4),
        NotImplementedError,
        ("SampleAlone", "draw(n, generator)", "expected draw", "which makes an Episode"),
    ),
    "tasks of no kind": (
        lambda: train(curve(), Nameless()),
        TypeError,
        ("tasks", "Nameless", "expected classification, regression", "set kind"),
    ),
    "Classes as tasks": (
        lambda: train(ProtoNet(MLP([3, 4])), classes(3)),
        TypeError,
        ("tasks=", "Classes(6", "expected tasks", "FewShot(classes, way=5, shot=1)"),
    ),
    "Classes to validate": (
        lambda: train(ProtoNet(MLP([3, 4])), vectors(), validate=classes(3)),
        TypeError,
        ("validate=", "Classes(6", "expected tasks", "FewShot(classes, way=5, shot=1)"),
    ),
    "Classes to be scored": (
        lambda: evaluate(ProtoNet(MLP([3, 4])), classes(3)),
        TypeError,
        ("tasks=", "Classes(6", "expected tasks", "FewShot(classes, way=5, shot=1)"),
    ),
    "a network as learner": (
        lambda: train(MLP([3, 4]), vectors()),
        TypeError,
        ("learner", "MLP", "expected an instance of a Learner", "ProtoNet(network)"),
    ),
    "a network to be scored": (
        lambda: evaluate(MLP([3, 4]), vectors()),
        TypeError,
        ("learner", "MLP", "expected an instance of a Learner", "ProtoNet(network)"),
    ),
    "a class as learner": (
        lambda: evaluate(ProtoNet, vectors()),
        TypeError,
        ("learner", "the class ProtoNet", "expected an instance", "ProtoNet(network)"),
    ),
    "a class as tasks": (
        lambda: evaluate(ProtoNet(MLP([3, 4])), FewShot),
        TypeError,
        ("tasks=", "FewShot", "expected tasks", "FewShot(classes, way=5, shot=1)"),
    ),
    "frozen tasks to train on": (
        lambda: train(ProtoNet(MLP([3, 4])), vectors().freeze(10)),
        TypeError,
        ("tasks", "10 frozen ones", "expected a distribution to draw from", "frozen.tasks"),
    ),
    "a rate that is text": (
        lambda: train(curve(), Sinusoids(), lr="1e-3"),
        ValueError,
        ("lr=", "'1e-3'", "expected a positive outer rate", "for example 1e-3"),
    ),
    "an endless rate": (
        lambda: train(curve(), Sinusoids(), lr=float("inf")),
        ValueError,
        ("lr=", "inf", "expected a positive outer rate", "for example 1e-3"),
    ),
    "an optimiser by name": (
        lambda: train(curve(), Sinusoids(), optimizer="adam"),
        TypeError,
        ("optimizer=", "'adam'", "expected a class", "optimizer=torch.optim.Adam"),
    ),
    "classes by name": (
        lambda: classes(3).select(["0", "1"]),
        ValueError,
        ("classes=", "['0', '1']", "expected numbers or a mask", "enumerate(data.names)"),
    ),
    "a mask of numbers": (
        lambda: classes(3).select(torch.tensor([0, 1, 1, 0, 0, 1])),
        ValueError,
        ("classes=", "[0, 1, 1, 0, 0, 1]", "expected each class once", "mask.bool()"),
    ),
    "notes without a number": (
        lambda: train(
            curve(), Sinusoids(), notes={"baseline": float("nan")}, folder=tempfile.mkdtemp()
        ),
        ValueError,
        ("notes=", "nan", "expected finite numbers", "or None"),
    ),
    "a class that nobody imported": (
        lambda: registry.build({"name": "of-my-own", "args": {}}),
        ValueError,
        ("unknown method", "'of-my-own'", "known are", "import its module first"),
    ),
    "an optimiser, not its class": (
        lambda: train(curve(), Sinusoids(), optimizer=torch.optim.Adam(curve().parameters())),
        TypeError,
        ("optimizer", "Adam", "expected a class", "functools.partial"),
    ),
    "a number as optimiser": (
        lambda: train(curve(), Sinusoids(), optimizer=0.1),
        TypeError,
        ("optimizer", "float", "expected a class", "optimizer=torch.optim.Adam"),
    ),
    "a device that is not there": (
        lambda: evaluate(curve(), Sinusoids(), 4, device="mps"),
        ValueError,
        ('device="mps"', "mps", "expected one that torch has", 'device="cpu"'),
    ),
    "a device that nobody knows": (
        lambda: train(curve(), Sinusoids(), device="gpu"),
        ValueError,
        ('device="gpu"', "gpu", "expected one that torch has", 'device="cpu"'),
    ),
    "data on it": (
        lambda: classes(3).to("mps"),
        ValueError,
        ('device="mps"', "mps", "expected one that torch has", 'device="cpu"'),
    ),
    "tasks on it": (
        lambda: Sinusoids(device="mps"),
        ValueError,
        ('device="mps"', "mps", "expected one that torch has", 'device="cpu"'),
    ),
}


@pytest.mark.parametrize("do, error, words", MESSAGES.values(), ids=MESSAGES)
def test_the_message_names_argument_value_expectation_and_remedy(
    do: Callable[[], Any], error: type[Exception], words: tuple[str, ...]
):
    with pytest.raises(error) as raised:
        do()
    for word in words:
        assert word in str(raised.value)


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch):
    """As on a Mac: the device is there, and refuses float64."""
    zeros = torch.zeros

    def without_float64(*size: int, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
        if str(device) == "mps" and dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
            )
        return zeros(*size, dtype=dtype, **more)

    monkeypatch.setattr(torch, "zeros", without_float64)
    with pytest.raises(
        ValueError, match=r'device="mps" \(Cannot convert .* float64.*use device="cpu"'
    ):
        train(curve(), Sinusoids(), device="mps")


def test_tasks_with_sample_alone_can_be_trained_on(tmp_path: Path):
    learner = curve()
    fit(learner, SampleAlone(), steps=1, folder=tmp_path, **QUIET)
    fit(learner, SampleAlone(), steps=2, folder=tmp_path, resume=True, **QUIET)


def test_a_network_without_biases_is_written():
    for net in (
        nn.Linear(3, 2, bias=False),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)),
    ):
        learner = PGN(net)
        fit(learner, vectors(), steps=1, **QUIET)
        assert evaluate(learner, vectors(), 4).n == 4


# --- learners that hold learners


def wrapper() -> type[Learner]:
    @register("tempered")
    class Tempered(Learner):
        """Another learner's answers, divided by a learned temperature."""

        def __init__(self, learner: Learner, start: float = 1.0):
            super().__init__()
            self.learner = learner
            self.head, self.label_equivariant = learner.head, learner.label_equivariant
            self.log_temperature = nn.Parameter(torch.tensor(start).log())

        def adapt(self, support: Examples) -> Any:
            return self.learner.adapt(support)

        def predict(self, state: Any, x: Tensor) -> Tensor:
            return self.learner.predict(state, x) / self.log_temperature.exp()

    return Tempered


@pytest.mark.parametrize(
    "inner", [lambda: ProtoNet(MLP([3, 4])), lambda: MAML(MLP([3, 2]), lr=0.1)]
)
def test_a_learner_that_holds_a_learner_is_saved_loaded_and_goes_on(
    inner: Callable[[], Learner], tmp_path: Path
):
    cls = wrapper()
    how = dict(validate=vectors(), every=1, folder=tmp_path / "run", **QUIET)
    learner = cls(cls(inner(), 2.0))  # and one more around it
    fit(learner, vectors(), steps=1, **how)
    again = load(tmp_path / "run")
    assert (
        type(again.learner.learner) is type(inner())
        and again.learner.config["args"]["start"] == 2.0
    )
    assert same_answers(learner, again, vectors())
    fit(learner, vectors(), steps=2, resume=True, **how)


def test_a_learner_that_holds_a_learner_is_trained_from_the_command_line(tmp_path: Path):
    wrapper()
    out, command = tmp_path / "run", CliRunner()
    words = [
        "train",
        "tempered",
        "--steps",
        "2",
        "--net",
        "width=4",
        "--query",
        "2",
        "--way",
        "2",
        "--out",
        str(out),
    ]
    size = ["--net", 'pool="stride"', "--set", "start=2"]
    done = command.invoke(cli.app, [*words, *size, "--set", "learner=protonet"])
    assert done.exit_code == 0, done.output
    learner = load(out)
    assert isinstance(learner.learner, ProtoNet) and learner.config["args"]["start"] == 2
    assert isinstance(network_of(out), Conv4)
    note = 'learner={"name": "maml", "args": {"lr": 0.3}}'
    done = command.invoke(cli.app, [*words[:-1], str(tmp_path / "other"), *size, "--set", note])
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "other").learner.lr == 0.3
    done = command.invoke(cli.app, [*words[:-1], str(tmp_path / "none"), *size])
    assert isinstance(done.exception, ValueError) and "learner=protonet" in str(done.exception)


def test_a_learner_of_curves_that_holds_one():
    @register("kept")
    class Kept(Learner):
        def __init__(self, learner: Learner, kind: str = "classification"):
            super().__init__()
            self.learner, self.kind = learner, kind

    made = make_learner("kept", Recipe("mlp", method={"learner": "maml"}), Sinusoids())
    assert made.kind == made.learner.kind == "regression"


# --- checkpoints of 0.1.0


def test_a_checkpoint_of_0_1_0_is_refused_with_the_reason_and_the_folder_still_loads(
    tmp_path: Path,
):
    learner = ProtoNet(MLP([3, 4]))
    how = dict(validate=vectors(), every=1, folder=tmp_path, **QUIET)
    fit(learner, vectors(), steps=1, **how)
    for path in (tmp_path / "checkpoints").glob("*.json"):
        whole = json.loads(path.read_text())
        body = json.dumps(json.loads(whole["checkpoint"]) | {"layout": 1, "metabook": "0.1.0"})
        path.write_text(
            json.dumps({"checksum": saving.checksum(body.encode()), "checkpoint": body})
        )
    with pytest.raises(
        ValueError,
        match=r"written by metabook 0\.1\.0, whose checkpoints do not say on which data.*still loads",
    ):
        fit(learner, vectors(), steps=2, resume=True, **how)
    config = json.loads((tmp_path / "config.json").read_text())
    older = {k: v for k, v in config.items() if k not in ("frozen", "tied", "tables")}
    (tmp_path / "config.json").write_text(json.dumps(older | {"layout": 1}))  # as 0.1.0 wrote it
    assert same_answers(learner, load(tmp_path), vectors())


WRITTEN = Path(__file__).parent / "written_by_0_1_0"


@pytest.mark.parametrize("folder", sorted(WRITTEN.iterdir()), ids=lambda f: f.name)
def test_a_folder_that_0_1_0_wrote_answers_as_it_did(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    assert config["metabook"] == "0.1.0"
    generator = torch.Generator().manual_seed(1)
    x, queries = (torch.randn(n, 4, generator=generator) for n in (6, 2))
    found = load(folder)(Examples.of(x, torch.arange(6) % 3, 3), queries)
    torch.testing.assert_close(found, torch.tensor(config["answers"]), rtol=0, atol=2e-6)


def test_renamed_parts_are_found_in_learners_inside():
    config, state = (read_config(WRITTEN / "meta-transfer"), {"held.start.weight": torch.ones(1)})
    outer = {"name": "a-wrapper", "args": {"held": config["method"]}}
    config |= {"method": outer, "frozen": ["held.start.weight"], "tied": [["held.start.bias", "x"]]}
    now, renamed = saving.upgraded(config, state)
    assert list(renamed) == now["frozen"] == ["held.rows.weight"]
    assert now["tied"] == [["held.rows.bias", "x"]]


def test_the_script_of_a_user_runs_as_written(tmp_path: Path):
    """Without the hook that holds every call of the tests against its signature."""
    script = """
        import numpy as np, torch
        from metabook.classes import Classes
        from metabook.episodes import FewShot
        from metabook.networks import MLP
        from metabook.prototypes import ProtoNet
        from metabook.scores import evaluate
        from metabook.training import fit
        data = Classes.of({str(i): torch.randn(8, 3) for i in range(6)})
        learner = ProtoNet(MLP([3, 4]))
        for shot in np.arange(1, 3):
            fit(learner, FewShot(data, 2, shot, 1), steps=np.int64(1), lr=np.float32(1e-3), progress=False)
            print(evaluate(learner, FewShot(data, 2, shot, 1), n=np.int64(4)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("(4 tasks, joint queries)") == 2, done.stderr


def test_messages_go_to_the_log_of_the_library():
    assert registry.log is logging.getLogger("metabook")


@pytest.mark.parametrize(
    "home, name, now",
    [
        ("checkpoints", "register", "registry"),
        ("checkpoints", "load", "saving"),
        ("checkpoints", "save", "saving"),
        ("training", "paired", "scores"),
        ("training", "calibration", "scores"),
        ("datasets", "fetch", "sources"),
        ("datasets", "SOURCES", "sources"),
        ("recipes", "reproduce", "reproduction"),
        ("recipes", "PUBLISHED", "reproduction"),
        ("engine", "Replayed", "graphs"),
    ],
)
def test_names_that_moved_are_found_where_0_1_0_had_them(home, name, now):
    old = importlib.import_module(f"metabook.{home}")
    with pytest.warns(DeprecationWarning, match=rf"metabook\.{now}\.{name} now"):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(f"metabook.{now}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = old.nothing
