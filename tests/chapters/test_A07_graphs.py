"""Made from nbs/A07_graphs.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metabook.classes import Classes
from metabook.engine import Engine
from metabook.episodes import FewShot, Sinusoids
from metabook.graphs import Replayed
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet
from metabook.registry import log
from metabook.training import Outer, fit


def test_a_step_asks_the_host_nothing():
    # cell 5e1aa8ff
    class HostIsAsked(TorchDispatchMode):
        "Raises where a value leaves the device, or a Python number enters it as a tensor."

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in (
                "_local_scalar_dense",
                "nonzero",
                "masked_select",
                "lift_fresh",
                "is_nonzero",
            ):
                raise AssertionError(f"{name}: the host is asked")
            return function(*args, **(kwargs or {}))

    images = Classes.of({str(i): torch.rand(6, 1, 28, 28) for i in range(4)})
    for learner, tasks in (
        (MAML(Conv4(out=3, width=4), steps=2), FewShot(images, 3, 1, 2)),
        (ProtoNet(Conv4(width=4, stats="running")), FewShot(images, 3, 1, 2)),
        (MAML(MLP([1, 8, 1]), 0.01, kind="regression"), Sinusoids()),
    ):
        learner, generator = learner.train(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(learner.param_groups(), lr=0.1, momentum=0.9)
        outer = Outer(learner, optimizer, clip=1.0, engine=Engine(run="graph"))
        outer.turn(tasks.sample(2, generator))  # makes what the optimiser remembers
        before = [p.detach().clone() for p in learner.parameters()]
        with HostIsAsked():
            outer.turn(tasks.sample(2, generator))
        assert any((p != b).any() for p, b in zip(learner.parameters(), before, strict=True))
        assert outer.guard.verdict.wrong() is None


def test_without_a_graph_it_goes_on():
    # cell 2780aa03
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    try:
        twice = Replayed(lambda x: 2 * x, torch.device("cpu"))
        assert [twice(torch.tensor(v)).item() for v in (1, 2, 3, 4, 5)] == [2, 4, 6, 8, 10]
    finally:
        log.removeHandler(handler)
    assert said == [
        'run="graph" goes on without a graph: graphs are recorded on CUDA devices, and this is cpu'
    ]


@pytest.mark.cuda
def test_a_replay_is_the_step():
    # cell 3660e2dd
    if torch.cuda.is_available():  # "Run All" knows no marks

        def some_steps(engine, steps=8):
            torch.manual_seed(0)
            learner = MAML(Conv4(out=3, width=8)).to("cuda").train()
            tasks = FewShot(
                Classes.of({str(i): torch.rand(6, 1, 28, 28) for i in range(9)}).to("cuda"), 3, 1, 2
            )
            run = fit(
                learner,
                tasks,
                steps=steps,
                meta_batch=4,
                engine=engine,
                log_every=1,
                progress=False,
            )
            theta = {k: p.detach() for k, p in learner.named_parameters()}
            return run.curve("loss")[1], [
                theta[k] for k in theta if "convs" not in k or "weight" in k
            ]

        # Biases of convolutions are left out: what is normalised next forgets them, so that their gradient
        # is rounding noise, which Adam makes steps of.
        graph, eager = (some_steps(Engine(lift="vmap", run=run)) for run in ("graph", "eager"))
        (losses_graph, graph), (losses_vmap, vmap) = graph, eager
        assert len(set(losses_graph)) == len(losses_graph)  # random numbers differ at each replay
        torch.testing.assert_close(losses_graph, losses_vmap, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(graph, vmap, rtol=1e-2, atol=1e-3)


@pytest.mark.cuda
def test_replays_are_recorded_by_shape():
    # cell 8ae2022d
    if torch.cuda.is_available():  # "Run All" knows no marks
        generator = torch.Generator("cuda").manual_seed(0)
        noisy = Replayed(
            lambda x: x + torch.rand(len(x), device="cuda", generator=generator),
            torch.device("cuda"),
            generator,
        )
        draws = [noisy(torch.zeros(3, device="cuda")).clone() for _ in range(8)]
        assert len({tuple(d.tolist()) for d in draws}) == 8 and len(noisy.graphs) == 1
        for n in range(4, 4 + Replayed.most):
            for _ in range(Replayed.warm_up + 2):
                assert len(noisy(torch.zeros(n, device="cuda"))) == n
        assert len(noisy.graphs) == Replayed.most and "sets of shapes" in noisy.why_not
        kept = [noisy(torch.zeros(3, device="cuda")).clone() for _ in range(3)]
        assert (
            len({tuple(d.tolist()) for d in draws + kept}) == 11
        )  # the graphs that are there stay
        asking = Replayed(lambda x: x * x.sum().item(), torch.device("cuda"))
        assert [asking(torch.full((2,), 2.0, device="cuda")).tolist() for _ in range(6)] == [
            [8.0, 8.0]
        ] * 6
        assert asking.why_not
