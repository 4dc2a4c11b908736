"""Made from nbs/A22_lending.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import grad

import metabook
from metabook.classes import Classes
from metabook.episodes import Examples, FewShot
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, call
from metabook.prototypes import ProtoNet
from metabook.training import fit


def test_places_are_filled_and_given_back():
    # cell 93f5100d
    class Twice(nn.Module):
        "One block under two names, one weight in two blocks, and something that it remembers."

        def __init__(self):
            super().__init__()
            block = nn.Linear(4, 4)
            self.layers, self.other = nn.ModuleList([block, block]), nn.Linear(4, 4)
            self.other.weight, self.seen = block.weight, []

        def forward(self, x):
            for layer in (*self.layers, self.other):
                x = layer(x).tanh()
                self.seen.append(x)
            self.last = x
            return x

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(3, 4)
    before = {k: p.clone() for k, p in net.named_parameters()}
    phi = {k: torch.randn_like(p).requires_grad_() for k, p in before.items()}
    copied = Twice()
    copied.load_state_dict(phi, strict=False)
    copied.other.weight = copied.layers[0].weight
    torch.testing.assert_close(call(net, phi, x), copied(x))
    g = grad(lambda p: call(net, p, x).sum())(phi)
    assert all(p.isfinite().all() for p in g.values())
    assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
    assert net.other.weight is net.layers[1].weight and not net.seen and not hasattr(net, "last")
    copy.deepcopy(net), torch.save(net.state_dict(), io.BytesIO())
    with pytest.raises(ValueError, match="is no parameter or buffer of Twice: give names"):
        call(net, {"layers.7.weight": x}, x)


def test_threads_take_turns():
    # cell 200eca57
    torch.manual_seed(0)
    classes = Classes.of({str(i): torch.randn(12, 1, 28, 28) * (i + 1) + i for i in range(8)})
    many = FewShot(classes, 5, 2, 6).sample(24)
    asked = [tuple(part[i] for part in (*many.support[:2], many.query.x)) for i in range(24)]
    METHODS = {
        "protonet": lambda: ProtoNet(Conv4(width=8, stats="support")),
        "maml": lambda: MAML(Conv4(out=5, width=8, stats="support"), steps=2),
    }
    for name, method in METHODS.items():
        learner = method().eval()

        def ask(task, learner=learner):
            return learner(Examples(*task[:2]), task[2])

        alone = [ask(task) for task in asked]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, asked))
        for found in (together, [ask(task) for task in asked]):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), name


def test_training_is_refused_to_others():
    # cell 392432c3
    learner = ProtoNet(MLP([3, 4]))
    task = Examples(torch.randn(4, 3), torch.eye(2).repeat(2, 1)), torch.randn(2, 3)
    pairs = FewShot(Classes.of({str(i): torch.randn(4, 3) for i in range(4)}), 2, 1, 1)

    def elsewhere(f):
        "What another thread gets."
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(f).result()

    with metabook.lending.claiming(learner):  # what the library itself holds to
        learner(*task)
        for f in (
            lambda: learner(*task),
            lambda: learner.adapt(task[0]),
            lambda: learner.train(),
            lambda: fit(learner, pairs, steps=1),
        ):
            with pytest.raises(RuntimeError, match="in another thread: wait for it, or ask a copy"):
                elsewhere(f)
    with (
        metabook.lending.asking(learner),
        pytest.raises(RuntimeError, match="is answering in another thread"),
    ):
        elsewhere(lambda: learner.eval())
    elsewhere(lambda: learner.eval()(*task))
