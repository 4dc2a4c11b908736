"""Made from nbs/A23_trust.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabook import primitives, trust, verified
from metabook.classes import Classes
from metabook.engine import gradients, losses
from metabook.episodes import FewShot, Sinusoids
from metabook.maml import MAML
from metabook.prototypes import ProtoNet
from metabook.scores import evaluate


def cell_5ebe4a13():
    # cell 5ebe4a13
    class OddLinear(nn.Linear):
        "Lifted, it computes something else: what a wrong rule does."

        def forward(self, x):
            return super().forward(x) * (1.01 if torch._C._functorch.is_batchedtensor(x) else 1.0)

    torch.manual_seed(0)
    episodes = Sinusoids(5, 5).sample(4)

    def wave(layer):
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), layer)
        return MAML(net, lr=0.01, kind="regression").train()

    odd, state = wave(OddLinear(8, 1)), torch.get_rng_state()
    torch.testing.assert_close(losses(odd, episodes), losses(odd, episodes, "loop"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in odd.parameters())
    with pytest.raises(RuntimeError, match=r"lift=\"vmap\" for MAML.* net.2 \(OddLinear\)"):
        losses(odd, episodes, "vmap")
    unchecked = losses(odd, episodes, "vmap", check=False)
    assert not torch.allclose(unchecked, losses(odd, episodes, "loop"))
    assert verified.proven(wave(nn.Linear(8, 1))) and not verified.proven(odd)
    return OddLinear, wave


def cell_a0cda91a():
    # cell a0cda91a
    class Scaled(nn.Module):
        "Nothing here looks at a value: `max` is an operation like others.  With `.item()` it is looped."

        def forward(self, x):
            return x / x.abs().max()

    learner = MAML(
        nn.Sequential(nn.Linear(1, 8), Scaled(), nn.Linear(8, 1)), kind="regression"
    ).train()
    waves = Sinusoids(5, 5).sample(3)
    torch.testing.assert_close(losses(learner, waves, "vmap"), losses(learner, waves, "loop"))
    return waves


def test_a_wrong_lift_is_found():
    OddLinear, wave = cell_5ebe4a13()


def test_a_trial_is_paid_for_twice_at_most():
    OddLinear, wave = cell_5ebe4a13()
    # cell 2d6fc6e5
    learner, trials = wave(OddLinear(8, 1)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "why_not", lambda *args: trials.append(args) or "")
        for n in (3, 4, 3, 5, 6, 4):
            losses(learner, Sinusoids(n, n).sample(2))
    assert len(trials) == trust.MOST


def test_what_cannot_be_lifted_is_looped():
    # cell 24ac6b57
    class Last(nn.Module):
        "The last state of a recurrent layer."

        def __init__(self, layer):
            super().__init__()
            self.rnn, self.head = layer, nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    class Asks(nn.Module):
        "Python that looks at a value."

        def forward(self, x):
            return x if x.mean() > 0 else 2 * x

    sequences = Classes.of({str(i): torch.randn(8, 5, 4) for i in range(6)})
    tasks = FewShot(sequences, 3, 1, 2)
    episodes = tasks.sample(2)
    NETS = {  # what each does
        "no rule": lambda: Last(nn.LSTM(4, 8, batch_first=True)),
        "looks at a value": lambda: nn.Sequential(nn.Flatten(), Asks(), nn.Linear(20, 3)),
    }
    for why, net in NETS.items():
        torch.manual_seed(0)
        learner = MAML(net()).train()
        torch.testing.assert_close(losses(learner, episodes), losses(learner, episodes, "loop"))
        with pytest.raises(RuntimeError, match=why):
            losses(learner, episodes, "vmap")
        evaluate(ProtoNet(net()), tasks, 4, queries="single")  # a single query is looped over, too

    writes = MAML(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 3))).train()
    for lift in ("auto", "loop"):
        with pytest.raises(
            RuntimeError, match=r"net.1 \(BatchNorm1d\).*metabook.networks.BatchNorm"
        ):
            losses(writes, episodes, lift)


def test_solution_scaled():
    waves = cell_a0cda91a()


def test_solution_without_an_entry():
    waves = cell_a0cda91a()

    # cell afc66fa0
    def unlike_the_loop(learner, **how):
        "Does the gradient differ?"
        found = []
        for lift in ("auto", "loop"):
            learner.zero_grad()
            gradients(learner, waves, lift=lift, **how)
            found.append(torch.cat([p.grad.flatten() for p in learner.parameters()]))
        return bool((found[0] - found[1]).norm() > 1e-4 * found[1].norm())

    def with_layer_norm():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(1, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1)
        ).double()
        return MAML(net, lr=0.1, steps=5, kind="regression").train()

    waves = Sinusoids(10, 10).sample(4).to(None, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for name in (F.layer_norm, torch.layer_norm):
            patch.delitem(primitives.LIFTED, name)
        assert unlike_the_loop(with_layer_norm())  # verified with the entry, so it is not tried
        patch.setattr(verified, "VERIFIED", {})
        assert not unlike_the_loop(with_layer_norm())  # tried, and looped over
        assert unlike_the_loop(with_layer_norm(), check=False)
    assert not unlike_the_loop(with_layer_norm())
