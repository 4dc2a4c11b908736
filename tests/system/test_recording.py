"""Graphs without a GPU: a tape that notes every operation stands in for CUDA, and replays them in place.

What Python does while a graph is recorded is not repeated by a replay, on the tape as on a GPU.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metabook.classes import Classes
from metabook.engine import Engine
from metabook.episodes import FewShot, Sinusoids
from metabook.graphs import Replayed, capturable
from metabook.learners import phases, set_progress
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet
from metabook.registry import log
from metabook.structures import tree_leaves
from metabook.training import Outer

CUDA = torch.device("cuda")  # only its name is looked at


class Generator(torch.Generator):
    """One whose state can be handed on, as a GPU's can."""

    def graphsafe_get_state(self) -> torch.Tensor:
        return self.get_state()

    def graphsafe_set_state(self, state: torch.Tensor) -> None:
        self.set_state(state)


class Tape:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.generators: list[torch.Generator] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        """Every operation again, each result where the first one is."""
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for place, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and storage(place) != storage(new):
                    place.copy_(new)


def storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Notes every operation on a tape; puts back what they have changed of the world outside."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape, self.made, self.before = tape, set(), {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if function._schema.is_mutable:
            for t in given:
                if storage(t) not in self.made:
                    self.before.setdefault(storage(t), (t, t.clone()))
        results = function(*args, **kwargs)
        known = {storage(t) for t in given}
        fresh = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        self.made |= {storage(t) for t in fresh} - known
        self.tape.calls.append((function, args, kwargs, results))
        return results

    def undo(self) -> None:
        with torch.no_grad():
            for t, before in self.before.values():
                t.copy_(before)


@contextmanager
def recording(tape: Tape, capture_error_mode: str):
    """In place of `torch.cuda.graph`: nothing that is computed within counts."""
    recorder, states = Recorder(tape), [g.get_state() for g in tape.generators]
    try:
        with recorder:
            yield
    finally:
        recorder.undo()
        for generator, state in zip(tape.generators, states, strict=True):
            generator.set_state(state)


@pytest.fixture
def cuda(monkeypatch):
    """What `Replayed` asks of `torch.cuda`, and what it said."""
    stream = SimpleNamespace(device=torch.device("cpu", 0), wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": Tape,
        "graph": recording,
        "device": lambda device: nullcontext(),
        "current_stream": lambda: stream,
        "Stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: None,
        "default_generators": [Generator()],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "Generator", Generator)
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *words: said.append(text % words))
    return said


IMAGES = Classes.of(
    {str(i): torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(6)}
)


class Broken(Sinusoids):
    """Now and then a batch with a curve that is no number."""

    recordable = True

    def gather(self, indices):
        episodes = super().gather(indices)
        bad = indices.task[:, 1] > 2.8
        episodes.query.y.mul_(torch.where(bad, torch.nan, 1.0)[:, None, None])
        return episodes


class Annealed(MAML):
    """A price on the parameters that falls to zero."""

    def loss(self, episode):
        price = sum(p.square().sum() for p in self.net.parameters())
        return super().loss(episode) + (1 - self.progress) * price


class Switching(MAML):
    """First order until half of the training is done: other operations from then on."""

    def phase_at(self, progress):
        return progress >= 0.5

    def gradient(self, phi, support):
        g = super().gradient(phi, support)
        return g if self.phase else {k: d.detach() for k, d in g.items()}


RUNS = {
    "annealed": (lambda: Annealed(MLP([1, 8, 1]), 0.01, kind="regression"), Sinusoids()),
    "switching": (lambda: Switching(MLP([1, 8, 1]), 0.01, kind="regression"), Sinusoids()),
    "maml": (lambda: MAML(Conv4(out=3, width=4), steps=2), FewShot(IMAGES, 3, 1, 2)),
    "averages": (lambda: ProtoNet(Conv4(width=4, stats="running")), FewShot(IMAGES, 3, 1, 2)),
    "waves": (lambda: MAML(MLP([1, 8, 1]), 0.01, kind="regression"), Sinusoids()),
    "broken": (lambda: MAML(MLP([1, 8, 1]), 0.01, kind="regression"), Broken()),
}
OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
}


def trained(
    name: str, optimizer: str, replayed: bool, steps: int = 12
) -> tuple[list[torch.Tensor], dict, Outer]:
    """Losses and the state after some steps, whose rate falls, drawn within the recording."""
    torch.manual_seed(0)
    make, tasks = RUNS[name]
    learner, generator = make().double().train(), Generator()
    generator.manual_seed(0)
    chosen = OPTIMIZERS[optimizer](learner.param_groups())
    capturable(chosen, torch.device("cpu"))
    outer = Outer(learner, chosen, lambda step: 0.8**step, clip=1.0, engine=Engine(run="graph"))
    outer.look = lambda: None  # as on a GPU: the host does not ask

    def turn():
        return outer.turn(tasks.sample(3, generator).to(dtype=torch.float64))

    phase = partial(phases, learner)
    advance = Replayed(turn, CUDA, generator, phase=phase) if replayed else turn
    losses = []
    for step in range(steps):
        set_progress(learner, step / steps)
        outer.took(advance())
        losses.append(outer.latest.losses.clone())
    if replayed:
        assert len(advance.graphs) == 1 + (name == "switching") and not advance.why_not
    return losses, learner.state_dict(), outer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RUNS)
def test_a_replay_is_the_step(cuda, monkeypatch, name, optimizer):
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **how: ["cpu"])
    losses, state, outer = trained(name, optimizer, replayed=True)
    wanted, kept, other = trained(name, optimizer, replayed=False)
    assert len({tuple(some.tolist()) for some in losses}) == len(losses)  # other tasks each time
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(state, kept, rtol=1e-9, atol=1e-12)
    norms = outer.latest.norm, other.latest.norm
    torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert outer.guard.verdict.steps == other.guard.verdict.steps == 12 and not cuda
    assert repr(outer.guard.verdict.wrong()) == repr(other.guard.verdict.wrong())
    bad = [step for step, some in enumerate(losses, 1) if not some.isfinite().all()]
    assert (bad[0] if bad else None) == (
        outer.guard.verdict.wrong() or SimpleNamespace(step=None)
    ).step
    assert bool(bad) == (name == "broken") and len(bad) < 12


def test_graphs_are_kept_by_shape_and_stay_when_there_are_too_many(cuda):
    calls = []

    def double(x):
        calls.append(len(x))
        return 2 * x

    twice = Replayed(double, CUDA)
    for n in range(1, Replayed.most + 3):
        for value in range(Replayed.warm_up + 3):
            assert twice(torch.full((n,), float(value))).tolist() == [2.0 * value] * n
    assert len(twice.graphs) == Replayed.most
    recorded = Replayed.warm_up + 1  # calls of the function: the warm-up and the recording
    assert [calls.count(n) for n in (1, Replayed.most)] == [recorded, recorded]
    assert calls.count(Replayed.most + 2) == Replayed.warm_up + 3  # without a graph
    assert cuda == [
        f'run="graph" goes on without more graphs: there are more than {Replayed.most} sets of shapes'
    ]
    assert twice(torch.ones(1)).item() == 2.0 and calls.count(1) == recorded


@pytest.mark.parametrize("error", [None, KeyError("capturable"), ValueError()])
def test_what_cannot_be_recorded_goes_on_without(cuda, error):
    generator, other = Generator(), Generator()
    generator.manual_seed(0), other.manual_seed(0)

    def asking(x, generator=generator):
        noise = torch.rand(3, generator=generator)
        if error is not None and len(calls) == Replayed.warm_up:
            calls.append("recorded")
            raise error
        calls.append("called")
        return x * noise.sum().item()

    calls: list[str] = []
    asks = Replayed(asking, CUDA, generator)
    found = [asks(torch.ones(1)).item() for _ in range(8)]
    assert found == [torch.rand(3, generator=other).sum().item() for _ in range(8)]
    why = {
        "NoneType": "operation not permitted when stream is capturing",
        "KeyError": "'capturable'",
        "ValueError": "ValueError",
    }[type(error).__name__]
    assert cuda == [f'run="graph" goes on without a graph: {why}'] and not asks.graphs


def test_an_optimiser_for_a_gpu_keeps_everything_there():
    far = torch.device("meta")
    theta = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([theta], lr=0.1)
    theta.grad = torch.ones(2)
    adam.step()
    capturable(adam, far)
    group, state = adam.param_groups[0], adam.state[theta]
    assert group["capturable"] and group["lr"].device == state["step"].device == far
    fresh = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    capturable(fresh, far)
    assert not fresh.state  # nothing was made up
