"""Made from nbs/12_meta_lstm.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import vmap

from metabook.engine import losses
from metabook.episodes import Classes, Episode, Examples, FewShot, Sinusoids
from metabook.meta_lstm import (
    CoordinateLSTM,
    Gates,
    LSTMOptimizer,
    MetaLSTM,
    RateAndDirection,
    flat,
    log_and_sign,
)
from metabook.networks import MLP, Conv4
from metabook.testing import check_learner


@pytest.mark.proves("eq-lstm-cell")
def test_cell_equals_pytorch():
    # cell 99ef0ae4
    torch.manual_seed(0)
    ours, theirs = CoordinateLSTM(4, 3).double(), nn.LSTMCell(4, 3).double()
    with torch.no_grad():
        rows = torch.tensor([0, 1, 3, 2])  # input, forget, output, proposal
        weight = torch.cat([theirs.weight_ih, theirs.weight_hh], 1)
        ours.W.copy_(weight.view(4, 3, 7)[rows].flatten(0, 1))
        ours.b.copy_((theirs.bias_ih + theirs.bias_hh).view(4, 3)[rows].flatten()[:, None])
    x, h, c = torch.randn(4, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    for mine, other in zip(ours(x, h, c), theirs(x.T, (h.T, c.T)), strict=True):
        torch.testing.assert_close(mine, other.T)


def test_only_ours_lifts():
    # cell 99ef0ae4
    torch.manual_seed(0)
    ours, theirs = CoordinateLSTM(4, 3).double(), nn.LSTMCell(4, 3).double()
    with torch.no_grad():
        rows = torch.tensor([0, 1, 3, 2])  # input, forget, output, proposal
        weight = torch.cat([theirs.weight_ih, theirs.weight_hh], 1)
        ours.W.copy_(weight.view(4, 3, 7)[rows].flatten(0, 1))
        ours.b.copy_((theirs.bias_ih + theirs.bias_hh).view(4, 3)[rows].flatten()[:, None])
    x, h, c = torch.randn(4, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    for mine, other in zip(ours(x, h, c), theirs(x.T, (h.T, c.T)), strict=True):
        torch.testing.assert_close(mine, other.T)
    # cell 9a253aaa
    tasks = torch.randn(2, 4, 5).double()
    assert vmap(lambda x: ours(x, h, c)[0])(tasks).shape == (2, 3, 5)
    with pytest.raises(RuntimeError):
        vmap(lambda x: theirs(x.T, (h.T, c.T))[0])(tasks)


@pytest.mark.proves("eq-lstm-gates")
def test_gates_by_hand():
    # cell b3af2980
    def close(a, *numbers):
        "Assert that a tensor holds these numbers."
        expected = torch.tensor(numbers, dtype=a.dtype, device=a.device)
        torch.testing.assert_close(a.detach().flatten(), expected)

    def set_to(parameter, values):
        "Write these numbers into a parameter."
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))

    # cell 91eb3732
    def by_hand():
        "The update rule of the example, for one coordinate with a memory of length 1."
        rule = Gates(hidden=1, lr=0.01).double()
        set_to(rule.W, [[1.0], [0.0]])
        set_to(rule.V, [[-1.0, 2.0], [1.0, -4.0]])
        set_to(rule.b, [[0.0], [math.log(3) - 1]])
        numbers = ([2.0], [3.0], [[1.0]], [[0.5], [0.25]])  # theta, g, h, past
        return rule(*(torch.tensor(n).double() for n in numbers))

    # cell 5690057c
    close(by_hand()[1], 0.5, 0.75)


@pytest.mark.proves("eq-lstm-update")
def test_update_by_hand():
    # cell b3af2980
    def close(a, *numbers):
        "Assert that a tensor holds these numbers."
        expected = torch.tensor(numbers, dtype=a.dtype, device=a.device)
        torch.testing.assert_close(a.detach().flatten(), expected)

    def set_to(parameter, values):
        "Write these numbers into a parameter."
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))

    # cell 91eb3732
    def by_hand():
        "The update rule of the example, for one coordinate with a memory of length 1."
        rule = Gates(hidden=1, lr=0.01).double()
        set_to(rule.W, [[1.0], [0.0]])
        set_to(rule.V, [[-1.0, 2.0], [1.0, -4.0]])
        set_to(rule.b, [[0.0], [math.log(3) - 1]])
        numbers = ([2.0], [3.0], [[1.0]], [[0.5], [0.25]])  # theta, g, h, past
        return rule(*(torch.tensor(n).double() for n in numbers))

    # cell 5690057c
    close(by_hand()[1], 0.5, 0.75)
    # cell 81636ac7
    close(by_hand()[0], 0.0)


@pytest.mark.proves("eq-lstm-preprocess")
def test_preprocessing():
    # cell 8fc60acc
    def as_written(a, p=10):
        "The formula, case by case."
        if abs(a) >= math.exp(-p):
            return math.log(abs(a)) / p, math.copysign(1.0, a)
        return -1.0, math.exp(p) * a

    border = math.exp(-10)
    values = [0.3, -0.0003, 20.0, border, -border, 0.4 * border, -1e-9, 0.0]
    found = log_and_sign(torch.tensor(values).double())
    torch.testing.assert_close(found.T, torch.tensor([as_written(a) for a in values]).double())
    print(found[:, :2].T.tolist())  # of 0.3 and of -0.0003


@pytest.mark.proves("eq-lstm-direction")
def test_rate_and_direction_by_hand():
    # cell b3af2980
    def close(a, *numbers):
        "Assert that a tensor holds these numbers."
        expected = torch.tensor(numbers, dtype=a.dtype, device=a.device)
        torch.testing.assert_close(a.detach().flatten(), expected)

    def set_to(parameter, values):
        "Write these numbers into a parameter."
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))

    # cell 91eb3732
    def by_hand():
        "The update rule of the example, for one coordinate with a memory of length 1."
        rule = Gates(hidden=1, lr=0.01).double()
        set_to(rule.W, [[1.0], [0.0]])
        set_to(rule.V, [[-1.0, 2.0], [1.0, -4.0]])
        set_to(rule.b, [[0.0], [math.log(3) - 1]])
        numbers = ([2.0], [3.0], [[1.0]], [[0.5], [0.25]])  # theta, g, h, past
        return rule(*(torch.tensor(n).double() for n in numbers))

    # cell 589e8bb6
    rule = RateAndDirection(hidden=2, lr=0.5).double()
    set_to(rule.W, [[0.1, 0.2], [3.0, -1.0]])
    theta, h = torch.tensor([5.0]).double(), torch.tensor([[1.0], [2.0]]).double()
    nothing = torch.zeros(2, 1).double()
    for gradient in (7.0, -2.0):
        after, (rate, direction) = rule(theta, torch.tensor([gradient]).double(), h, nothing)
        close(torch.cat([rate, direction, after]), 1.0, 1.0, 4.0)


def test_meta_lstm_in_use():
    # cell c572da49
    torch.manual_seed(0)
    learner = MetaLSTM(MLP([1, 40, 40, 1]), steps=3, test_steps=5, hidden=8, kind="regression")
    episodes = Sinusoids(shot=5, query=10).sample(3)
    task = Episode(*(Examples(side.x[0], side.y[0]) for side in episodes))  # the first of the three
    phi, _ = learner.adapt(task.support)
    assert learner(task.support, task.query.x).shape == (10, 1)
    assert losses(learner, episodes).shape == (3,)
    assert all((phi[k] != p).any() for k, p in learner.net.named_parameters())
    torch.testing.assert_close(learner.named(flat(phi)), phi)
    torch.manual_seed(0)
    other = LSTMOptimizer(MLP([1, 40, 40, 1]), steps=3, hidden=8, kind="regression")
    assert other(task.support, task.query.x).shape == (10, 1)


def test_errors_say_what_to_do():
    # cell c11068a1
    with pytest.raises(ValueError, match="expected a rate between 0 and 1: it is an input gate"):
        MetaLSTM(MLP([1, 1]), lr=1.5)
    with pytest.raises(ValueError, match="expected a positive inner rate"):
        LSTMOptimizer(MLP([1, 1]), lr=0.0)
    with pytest.raises(ValueError, match="hidden=0"):
        MetaLSTM(MLP([1, 1]), hidden=0)
    with pytest.raises(ValueError, match="steps=-1"):
        MetaLSTM(MLP([1, 1]), steps=-1)
    with pytest.raises(ValueError, match="the support set is empty"):
        MetaLSTM(MLP([2, 5]))(Examples(torch.zeros(0, 2), torch.zeros(0, 5)), torch.zeros(1, 2))


def test_keeps_the_contract():
    # cell b0c0358a
    noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    shapes = FewShot(Classes(noise, torch.full((8,), 5)), way=3, shot=2, query=2)
    for method in (MetaLSTM, LSTMOptimizer):
        curves = method(MLP([1, 8, 1]), steps=2, hidden=4, kind="regression")
        verdicts = check_learner(curves, Sinusoids(5, 4))
        net = Conv4(1, out=3, size=16, width=4, pool="stride", stats="support")
        check_learner(method(net, steps=2, hidden=4, lr=0.4), shapes)
        assert {k: v for k, v in verdicts.items() if v != "passed"}.keys() >= {"gradients_are_true"}
