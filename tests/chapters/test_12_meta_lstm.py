"""Made from nbs/12_meta_lstm.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import grad, grad_and_value, vmap

from metabook.classes import Classes
from metabook.engine import losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, Tasks
from metabook.maml import MAML
from metabook.meta_lstm import (
    CoordinateLSTM,
    Gates,
    LSTMOptimizer,
    MetaLSTM,
    RateAndDirection,
    State,
    flat,
    log_and_sign,
)
from metabook.networks import MLP, Conv4, call, parameter_count
from metabook.scores import evaluate, paired
from metabook.testing import check_learner
from metabook.training import fit


def cell_c12a0001():
    # cell c12a0001
    def chebyshev(steps, low, high):
        "One over the zeros of the Chebyshev polynomial on [low, high]."
        angles = [(2 * j - 1) * math.pi / (2 * steps) for j in range(1, steps + 1)]
        return [2 / (high + low + (high - low) * math.cos(angle)) for angle in angles]

    return chebyshev


def cell_afa5f807():
    # cell afa5f807
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
    return c, h, ours, theirs


def cell_db934fe7():
    # cell db934fe7
    def close(a, *numbers):
        "Assert that a tensor holds these numbers."
        expected = torch.tensor(numbers, dtype=a.dtype, device=a.device)
        torch.testing.assert_close(a.detach().flatten(), expected)

    def set_to(parameter, values):
        "Write these numbers into a parameter."
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))

    return close, set_to


def cell_2f59f114(set_to):
    # cell 2f59f114
    def by_hand():
        "The update rule of the example, for one coordinate with a memory of length 1."
        # input gate: 1 · 1 - 1 · 2 + 2 · 0.5 + 0 = 0, and sigmoid(0) = 0.5
        # forget gate: 0 · 1 + 1 · 2 - 4 · 0.25 + ln 3 - 1 = ln 3, and sigmoid(ln 3) = 0.75
        # parameter: 0.75 · 2 - 0.5 · 3 = 0
        rule = Gates(hidden=1, lr=0.01).double()
        set_to(rule.W, [[1.0], [0.0]])
        set_to(rule.V, [[-1.0, 2.0], [1.0, -4.0]])
        set_to(rule.b, [[0.0], [math.log(3) - 1]])
        numbers = ([2.0], [3.0], [[1.0]], [[0.5], [0.25]])  # theta, g, h, past
        return rule(*(torch.tensor(n).double() for n in numbers))

    return by_hand


def cell_515344c0(set_to):
    # cell 515344c0
    def constant_gates(net, rate, forget_bias=40.0, **options):
        "A `MetaLSTM` whose gates see nothing: the rate, and the sigmoid of a bias."
        learner = MetaLSTM(net, hidden=3, lr=rate, kind="regression", **options).double()
        set_to(learner.update.W, torch.zeros(2, 3))
        set_to(learner.update.V, torch.zeros(2, 2))
        set_to(learner.update.b, [[math.log(rate / (1 - rate))], [forget_bias]])
        return learner

    def one_wave(seed=0):
        "One sinusoid in double precision: 5 support points, 8 query points."
        episodes = Sinusoids(5, 8).sample(1, torch.Generator().manual_seed(seed))
        sides = episodes.to(dtype=torch.float64)
        return Episode(*(Examples(side.x[0], side.y[0]) for side in sides))

    return constant_gates, one_wave


def cell_14d7e0de(constant_gates, one_wave):
    # cell 14d7e0de
    torch.manual_seed(0)
    net, wave = MLP([1, 6, 6, 1]).double(), one_wave()
    learner = constant_gates(net, rate=0.05, steps=4)
    descent = MAML(net, lr=0.05, steps=4, first_order=True, kind="regression")
    torch.testing.assert_close(learner.adapt(wave.support), descent.adapt(wave.support))
    parameters = list(net.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(learner.loss(wave), parameters),
        torch.autograd.grad(descent.loss(wave), parameters),
    )
    return learner, wave


def cell_b99a6832(constant_gates, one_wave):
    # cell b99a6832
    torch.manual_seed(0)
    steps, rate, wave = 8, 0.05, one_wave()
    learner = constant_gates(MLP([1, 6, 6, 1]).double(), rate, forget_bias=5.0)
    states, gradients = [learner.start(wave.support)], []
    for _ in range(steps):
        gradients.append(learner.look(states[-1].theta, wave.support)[0])
        states.append(learner.step(states[-1], wave.support))
    f = torch.tensor(5.0).double().sigmoid()
    decayed = sum(f ** (steps - j) * g for j, g in enumerate(gradients, 1))
    torch.testing.assert_close(states[-1].theta, f**steps * states[0].theta - rate * decayed)
    return f, learner, rate, states, wave


def cell_b5edc9f5():
    # cell b5edc9f5
    def walk(learner, support, steps):
        "The states that the learner visits and the gradients that it meets there."
        states, gradients = [learner.start(support)], []
        for _ in range(steps):
            gradients.append(learner.look(states[-1].theta, support)[0])
            states.append(learner.step(states[-1], support))
        return states, gradients

    def query_gradient(learner, theta, query):
        "The plain gradient of the query loss at these parameters."
        return flat(grad(learner.support_loss)(learner.named(theta.detach()), query))

    return query_gradient, walk


def cell_500b6b45(chebyshev, set_to):
    # cell 500b6b45
    LOW, HIGH, VALLEY_STEPS = 1.0, 10.0, 4

    class Valleys(Tasks):
        "Quadratics in two dimensions with a random curvature along each axis, and a random minimum."

        kind = "regression"

        def draw(self, n, generator=None):
            share = torch.rand(n, 2, generator=generator)
            return torch.randn(n, 2, generator=generator), LOW * (HIGH / LOW) ** share

        def gather(self, indices):
            minimum, curvature = indices
            r = curvature.sqrt().diag_embed()
            x = torch.cat([r, -r], 1)
            side = Examples(x, x @ minimum[..., None])
            return Episode(side, side)

    class Schedule(MAML):
        "Gradient descent with another rate at each step; the rates can be learned."

        def __init__(self, net, rates, first_order=False):
            super().__init__(net, first_order=first_order, kind="regression")
            self.rates = torch.nn.Parameter(torch.tensor(rates))

        def adapt(self, support):
            phi = dict(self.net.named_parameters())
            for rate in self.rates:
                self.lr = rate
                phi = self.step(phi, support)
            return phi, {}

    def at_origin():
        "A linear network of two weights that starts at zero."
        net = MLP([2, 1])
        for parameter in net.parameters():
            set_to(parameter, torch.zeros_like(parameter))
        return net

    def falling(total):
        "The outer rate falls to zero along half a cosine."
        return lambda step: (1 + math.cos(math.pi * step / total)) / 2

    def train_on_valleys(learner, steps=300, lr=0.05):
        options = {"meta_batch": 32, "lr": lr, "clip": 0.25, "schedule": falling(steps)}
        fit(learner, Valleys(), steps=steps, progress=False, **options)
        return learner

    @functools.cache
    def learned_schedule(first_order=False):
        schedule = Schedule(at_origin(), chebyshev(VALLEY_STEPS, LOW, HIGH), first_order)
        torch.manual_seed(0)
        return train_on_valleys(schedule, steps=150, lr=0.005)

    @functools.cache
    def learned_for_valleys(method, steps=300):
        torch.manual_seed(0)
        learner = method(at_origin(), VALLEY_STEPS, hidden=10, kind="regression", lr=0.2)
        return train_on_valleys(learner, steps)

    def best_constant(tasks, rates=(0.12, 0.14, 0.16, 0.18, 0.2)):
        "Gradient descent with the rate that is best on these tasks."
        candidates = [MAML(at_origin(), rate, VALLEY_STEPS, kind="regression") for rate in rates]
        return min(candidates, key=lambda learner: evaluate(learner, tasks, batch=200).mean)

    return (
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        learned_for_valleys,
        learned_schedule,
    )


def cell_6d4eb0a9(
    HIGH,
    LOW,
    Schedule,
    Valleys,
    at_origin,
    best_constant,
    chebyshev,
    learned_for_valleys,
    learned_schedule,
):
    # cell 6d4eb0a9
    unseen, other = Valleys().freeze(300, seed=0), Valleys().freeze(200, seed=1)
    valley_scores = {
        "constant rate": evaluate(best_constant(other), unseen, batch=300),
        "Chebyshev schedule": evaluate(
            Schedule(at_origin(), chebyshev(4, LOW, HIGH)), unseen, batch=300
        ),
        "learned schedule": evaluate(learned_schedule(first_order=False), unseen, batch=300),
        "Meta-LSTM": evaluate(learned_for_valleys(MetaLSTM), unseen, batch=300),
    }
    rivals = ("constant rate", "Chebyshev schedule", "learned schedule")
    for name, score in valley_scores.items():
        print(f"{name:18} mse {score.mean:.5f} ± {score.ci95:.5f}")
    for rival in rivals[:2]:
        gap = paired(valley_scores["Meta-LSTM"], valley_scores[rival])
        assert gap.mean + gap.ci95 < 0
    return unseen, valley_scores


@pytest.mark.proves("eq-lstm-cell")
def test_cell_equals_pytorch():
    c, h, ours, theirs = cell_afa5f807()


def test_only_ours_lifts():
    c, h, ours, theirs = cell_afa5f807()
    # cell b0240854
    tasks = torch.randn(2, 4, 5).double()
    assert vmap(lambda x: ours(x, h, c)[0])(tasks).shape == (2, 3, 5)
    with pytest.raises(RuntimeError):
        vmap(lambda x: theirs(x.T, (h.T, c.T))[0])(tasks)


@pytest.mark.proves("eq-lstm-gates")
def test_gates_by_hand():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    # cell 67404ccc
    close(by_hand()[1], 0.5, 0.75)


@pytest.mark.proves("eq-lstm-update")
def test_update_by_hand():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    # cell 7b777ea9
    close(by_hand()[0], 0.0)


@pytest.mark.proves("eq-lstm-preprocess")
def test_preprocessing():
    # cell 6b8880d9
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


def test_gradients_need_preprocessing():
    # cell 76b6c583
    torch.manual_seed(0)
    lstm = CoordinateLSTM(2, 8)
    sizes_of_gradient = torch.tensor([1e-3, 1e-6])
    nothing = torch.zeros(8, 2)
    raw, _ = lstm(sizes_of_gradient.expand(2, 2), nothing, nothing)
    prepared, _ = lstm(log_and_sign(sizes_of_gradient), nothing, nothing)
    spread = [(h[:, 0] - h[:, 1]).abs().max().item() for h in (raw, prepared)]
    print(f"largest difference of the hidden states: raw {spread[0]:.5f}, prepared {spread[1]:.3f}")
    assert spread[0] < 1e-3 and spread[1] > 1e-2


@pytest.mark.proves("eq-lstm-direction")
def test_rate_and_direction_by_hand():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    # cell fa52f9b1
    rule = RateAndDirection(hidden=2, lr=0.5).double()
    set_to(rule.W, [[0.1, 0.2], [3.0, -1.0]])
    theta, h = torch.tensor([5.0]).double(), torch.tensor([[1.0], [2.0]]).double()
    nothing = torch.zeros(2, 1).double()
    for gradient in (7.0, -2.0):
        after, (rate, direction) = rule(theta, torch.tensor([gradient]).double(), h, nothing)
        close(torch.cat([rate, direction, after]), 1.0, 1.0, 4.0)


def test_meta_lstm_in_use():
    # cell c5b9fc73
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
    # cell c142c0e7
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


def test_two_steps_by_another_way():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)

    # cell c07d93e4
    def two_numbers(a):
        "The preprocessing by its two cases, [2, d]."
        small = a.abs() < math.exp(-10)
        size = torch.where(small, -torch.ones_like(a), a.abs().log() / 10)
        return torch.stack([size, torch.where(small, math.exp(10) * a, a.sign())])

    def in_pytorch(lstm):
        "PyTorch's cell with the weights of ours."
        blocks = torch.tensor([0, 1, 3, 2])  # input, forget, proposal, output
        W = lstm.W.view(4, lstm.W.shape[0] // 4, -1)[blocks].flatten(0, 1)
        cell = nn.LSTMCell(4, W.shape[1] - 4).to(W.dtype)
        set_to(cell.weight_ih, W[:, :4])
        set_to(cell.weight_hh, W[:, 4:])
        set_to(cell.bias_ih, lstm.b.view(4, -1)[blocks].flatten())
        set_to(cell.bias_hh, torch.zeros(W.shape[0]))
        return cell

    torch.manual_seed(0)
    checked = MetaLSTM(MLP([1, 4, 1]), steps=2, hidden=3, kind="regression").double()
    for parameter in (checked.lstm.b, *checked.update.parameters()):
        set_to(parameter, 0.5 * torch.randn_like(parameter))
    x, y = torch.randn(5, 1).double(), torch.randn(5, 1).double()
    cell, state = in_pytorch(checked.lstm), checked.start(Examples(x, y))
    (W_i, W_f), ((u_i, r_i), (u_f, r_f)), (b_i, b_f) = checked.update.parameters()
    theta, i, f, h, c = state.theta, *torch.zeros(2, 13).double(), *torch.zeros(2, 13, 3).double()
    for _ in range(2):
        at = theta.detach().requires_grad_()
        loss = (call(checked.net, checked.named(at), x) - y).square().mean()
        (g,) = torch.autograd.grad(loss, at)
        read = torch.cat([two_numbers(g), two_numbers(loss.detach().expand(13))])
        h, c = cell(read.T, (h, c))
        i = torch.sigmoid(h @ W_i + u_i * theta + r_i * i + b_i)
        f = torch.sigmoid(h @ W_f + u_f * theta + r_f * f + b_f)
        theta = f * theta - i * g
        state = checked.step(state, Examples(x, y))
        torch.testing.assert_close(tuple(state), (theta, h.T, c.T, torch.stack([i, f])))


def test_the_first_input_gate_is_the_rate():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    # cell e42b90c6
    for lr in (0.01, 0.4):
        blind = MetaLSTM(MLP([1, 1]), hidden=2, kind="regression", lr=lr)
        for parameter in (blind.update.W, blind.update.V):
            set_to(parameter, torch.zeros_like(parameter))
        ones = Examples(torch.ones(3, 1), torch.ones(3, 1))
        after = blind.step(blind.start(ones), ones)
        close(after.past[0], lr, lr)


def test_keeps_the_contract():
    # cell 39f357e1
    noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    shapes = FewShot(Classes(noise, torch.full((8,), 5)), way=3, shot=2, query=2)
    curves = LSTMOptimizer(MLP([1, 8, 1]), steps=2, hidden=4, kind="regression")
    verdicts = check_learner(curves, Sinusoids(5, 4))
    net = Conv4(1, out=3, size=16, width=4, pool="stride", stats="support")
    verdicts |= check_learner(MetaLSTM(net, steps=2, hidden=4, lr=0.4), shapes)
    assert {k: v for k, v in verdicts.items() if v != "passed"}.keys() >= {"gradients_are_true"}


def test_gradient_descent_is_one_setting():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    learner, wave = cell_14d7e0de(constant_gates, one_wave)


@pytest.mark.proves("eq-lstm-decay")
def test_constant_gates_mean_decay():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    f, learner, rate, states, wave = cell_b99a6832(constant_gates, one_wave)


def test_constant_gates_are_a_price():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    learner, wave = cell_14d7e0de(constant_gates, one_wave)
    f, learner, rate, states, wave = cell_b99a6832(constant_gates, one_wave)
    # cell c12a0006
    begin = states[0].theta.detach().requires_grad_()  # and one step down the loss with the price
    price = (1 - f) / (2 * rate) * begin.square().sum()
    (g,) = torch.autograd.grad(
        learner.support_loss(learner.named(begin), wave.support) + price, begin
    )
    torch.testing.assert_close(states[1].theta, begin - rate * g)


def test_how_much_of_the_start_is_left():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    # cell 965a54fa
    torch.manual_seed(0)
    zeros = Examples(torch.zeros(4, 2), torch.zeros(4, 1))  # nothing to learn: the gradient is zero
    for bias in (4.0, 5.0, 6.0):
        print(f"forget bias {bias}: {torch.tensor(bias).sigmoid() ** 8:.3f} is left after 8 steps")
    fresh = MetaLSTM(MLP([2, 1]), steps=8, kind="regression")
    set_to(fresh.net.layers[0].bias, [0.0])
    for parameter in (fresh.update.W, fresh.update.V):
        set_to(parameter, torch.zeros_like(parameter))
    phi, _ = fresh.adapt(zeros)
    left = phi["layers.0.weight"] / fresh.net.layers[0].weight
    torch.testing.assert_close(left, torch.full((1, 2), 0.948), rtol=0, atol=5e-4)


def test_one_valley_by_hand():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    # cell c12a0084
    valley = constant_gates(MLP([1, 1]).double(), 0.1, forget_bias=math.log(0.98 / 0.02))
    for parameter in valley.net.parameters():
        set_to(parameter, torch.zeros_like(parameter))
    valley.look = lambda theta, support: (
        theta.detach() - 2.0,
        torch.zeros(()).double(),
    )  # curvature 1
    unread = Examples(torch.zeros(1, 1).double(), torch.zeros(1, 1).double())
    states = [valley.start(unread)]
    for _ in range(200):
        states.append(valley.step(states[-1], unread))
    close(torch.stack([states[k].theta[0] for k in (1, 2, 200)]), 0.2, 0.376, 2 / 1.2)
    for variance, best in ((1.0, 0.5), (0.2, 1 / 6)):  # of the noise, at one shot and at five
        penalty = torch.linspace(0, 3, 3001).double()
        error = (variance + penalty**2) / (1 + penalty) ** 2
        close(torch.stack([error.min(), penalty[error.argmin()]]), best, variance)


@pytest.mark.proves("eq-lstm-start-gradient")
def test_gradient_of_the_start():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    query_gradient, walk = cell_b5edc9f5()
    # cell 1e323a09
    torch.manual_seed(1)
    wave = one_wave(1)
    learner = MetaLSTM(MLP([1, 6, 1]), 3, hidden=4, kind="regression", lr=0.1).double()
    set_to(learner.update.W, torch.randn(2, 4))  # gates that differ, and read only the memory
    set_to(learner.update.V, torch.zeros(2, 2))
    states, _ = walk(learner, wave.support, 3)
    forget = torch.stack([state.past[1] for state in states[1:]])
    exact = torch.autograd.grad(learner.loss(wave), list(learner.net.parameters()))
    end = query_gradient(learner, states[-1].theta, wave.query)
    torch.testing.assert_close(torch.cat([g.flatten() for g in exact]), forget.prod(0) * end)


@pytest.mark.proves("eq-lstm-gate-gradient")
def test_gradient_of_the_gates():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    query_gradient, walk = cell_b5edc9f5()
    # cell b8ab6d07
    torch.manual_seed(1)
    wave, steps, f = one_wave(1), 3, torch.tensor(2.0).double().sigmoid()
    learner = constant_gates(MLP([1, 6, 1]).double(), 0.1, forget_bias=2.0, steps=steps)
    states, gradients = walk(learner, wave.support, steps)
    end = query_gradient(learner, states[-1].theta, wave.query)
    by_gate = [-g * f ** (steps - j) * end for j, g in enumerate(gradients, 1)]
    slope = 0.1 * (1 - 0.1)  # of the sigmoid where it is 0.1
    (exact,) = torch.autograd.grad(learner.loss(wave), learner.update.b)  # which all share
    torch.testing.assert_close(exact[0, 0], slope * torch.stack(by_gate).sum())


def test_meta_gradient_against_finite_differences():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)

    # cell 8969d665
    def measured_gradient(learner, episode, played_back, h=1e-6):
        "Central differences of the loss; `played_back` keeps inner losses and gradients as they were."
        record, theta = [], learner.start(episode.support)
        for _ in range(learner.steps):
            record.append(learner.look(theta.theta, episode.support))
            theta = learner.step(theta, episode.support)
        taken = itertools.cycle(record)
        if played_back:
            learner.look = lambda theta, support: next(taken)
        found = []
        for entries in [p.data.view(-1) for p in learner.parameters()]:
            for j, value in enumerate(entries.tolist()):
                ends = []
                for entries[j] in (value + h, value - h):
                    ends.append(learner.loss(episode).item())
                entries[j] = value
                found.append((ends[0] - ends[1]) / (2 * h))
        return torch.tensor(found).double()

    # cell 2667cc24
    for method in (MetaLSTM, LSTMOptimizer):
        torch.manual_seed(1)
        learner = method(MLP([1, 3, 1]), 2, hidden=2, kind="regression", lr=0.2).double()
        for parameter in learner.update.parameters():  # large enough that every path counts
            set_to(parameter, 0.5 * torch.randn_like(parameter))
        exact = torch.autograd.grad(learner.loss(one_wave(1)), list(learner.parameters()))
        exact = torch.cat([g.flatten() for g in exact])
        whole = measured_gradient(learner, one_wave(1), played_back=False)
        frozen = measured_gradient(learner, one_wave(1), played_back=True)
        torch.testing.assert_close(exact, frozen, rtol=1e-5, atol=1e-7)
        assert (exact - whole).abs().max() > 1e-3 * exact.abs().max()


def test_forget_bias_must_be_large():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    query_gradient, walk = cell_b5edc9f5()
    # cell d4061661
    torch.manual_seed(0)
    wave = one_wave()
    left = {}
    for bias in (0.0, 5.0):
        learner = constant_gates(MLP([1, 6, 6, 1]).double(), 0.01, forget_bias=bias, steps=8)
        learner.zero_grad()
        learner.loss(wave).backward()
        length = torch.cat([p.grad.flatten() for p in learner.net.parameters()]).norm()
        end = flat(learner.adapt(wave.support)[0])
        plain = query_gradient(learner, end, wave.query).norm()
        left[bias] = (length / plain).item()
        print(f"bias {bias}: the start gets {left[bias]:.4f} of the query gradient")
    assert left[0.0] < 0.004 < 0.94 < left[5.0]


def test_clipping_bounds_the_outer_step():
    # cell 3e14a8e9
    class Shouting(Sinusoids):
        "Sinusoids, ten times as high."

        def gather(self, indices):
            return Episode(*(side._replace(y=10 * side.y) for side in super().gather(indices)))

    def outer_step_length(clip):
        torch.manual_seed(0)
        learner = MetaLSTM(MLP([1, 8, 1]), steps=3, hidden=4, kind="regression")
        before = flat(dict(learner.named_parameters())).detach().clone()
        options = {"optimizer": torch.optim.SGD, "lr": 1.0, "meta_batch": 4, "progress": False}
        fit(learner, Shouting(5, 10), steps=1, clip=clip, **options)
        return (flat(dict(learner.named_parameters())) - before).norm().item()

    print(f"without {outer_step_length(None):.0f}, with {outer_step_length(0.25):.3f}")
    assert outer_step_length(None) > 10
    assert abs(outer_step_length(0.25) - 0.25) < 1e-3


def test_coordinates_do_not_talk():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    # cell c12a0011
    torch.manual_seed(0)
    wave, steps_of = one_wave(), {}
    learner = MetaLSTM(MLP([1, 6, 1]), hidden=4, kind="regression").double()
    for changed in (False, True):
        state = learner.start(wave.support)
        for j in range(3):
            g, loss = learner.look(torch.zeros_like(state.theta) + 0.1 * j, wave.support)
            g = g.clone()
            g[0] = g[0] + 100 * changed  # of the first coordinate alone
            learner.look = lambda theta, support, seen=(g, loss): seen
            state = learner.step(state, wave.support)
            del learner.look
        steps_of[changed] = state.theta
    assert (steps_of[True] != steps_of[False]).tolist() == [True] + 18 * [False]


def test_the_first_form_goes_downhill():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    # cell c12a0012
    torch.manual_seed(0)
    gates, guess = Gates(4, 0.1), RateAndDirection(4, 0.1)
    theta, g, h = torch.randn(1000), torch.randn(1000), torch.randn(4, 1000)
    set_to(gates.b, [[-3.0], [40.0]])  # keep everything
    past = torch.rand(2, 1000)
    moved = gates(theta, g, h, past)[0] - theta
    assert (moved * g <= 0).all()
    assert (
        (guess(theta, g, h, past)[0] - theta) * g > 0
    ).float().mean() > 0.4  # has learned nothing yet


@pytest.mark.proves("eq-lstm-count")
def test_the_rule_does_not_grow():
    # cell af5c7cba
    for q, net in [(20, MLP([1, 40, 40, 1])), (20, MLP([1, 2, 1])), (8, MLP([1, 2, 1]))]:
        for method, each in ((MetaLSTM, q + 3), (LSTMOptimizer, q + 1)):
            learner = method(net, hidden=q, kind="regression")
            rule = parameter_count(learner.lstm) + parameter_count(learner.update)
            print(f"q = {q}: {rule} numbers for the rule, {parameter_count(net)} for the start")
            assert rule == 4 * q * (4 + q + 1) + 2 * each


def test_equal_units_stay_equal():
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    # cell c12a0087
    torch.manual_seed(0)
    twins = MetaLSTM(MLP([1, 2, 1]), steps=3, hidden=4, kind="regression", lr=0.1)
    for parameter in (twins.net.layers[0].weight, twins.net.layers[1].weight):
        set_to(parameter, torch.full_like(parameter, 0.7))
    set_to(twins.net.layers[0].bias, torch.zeros(2))
    phi, _ = twins.adapt(Examples(torch.randn(5, 1), torch.randn(5, 1)))
    for name in ("layers.0.weight", "layers.1.weight", "layers.0.bias"):
        first, second = phi[name].flatten()
        assert first == second and first != 0.7
    sizes = [3 * 3 * 3 * 32 + 32, 3 * (3 * 3 * 32 * 32 + 32), 4 * 2 * 32, 32 * 5 * 5 * 5 + 5]
    assert sum(sizes) == 32_901 and 2 * 1761 * (3 * 1761 + 2) == 18_613_770
    assert 4 * 20 * (4 + 20) == 1920 and 4 * 7 * 20 * sum(sizes) * 12 // 10**6 == 221


def test_memory_beats_every_constant_rate():
    chebyshev = cell_c12a0001()
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    (
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        learned_for_valleys,
        learned_schedule,
    ) = cell_500b6b45(chebyshev, set_to)
    unseen, valley_scores = cell_6d4eb0a9(
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        chebyshev,
        learned_for_valleys,
        learned_schedule,
    )


def test_memory_beats_every_schedule():
    chebyshev = cell_c12a0001()
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    (
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        learned_for_valleys,
        learned_schedule,
    ) = cell_500b6b45(chebyshev, set_to)
    unseen, valley_scores = cell_6d4eb0a9(
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        chebyshev,
        learned_for_valleys,
        learned_schedule,
    )

    # cell c12a0022
    class Exact:
        "Lets the outer loop see how inner losses and gradients react."

        def look(self, theta, support):
            g, loss = grad_and_value(self.support_loss)(self.named(theta), support)
            return flat(g), loss

    class ExactMetaLSTM(Exact, MetaLSTM):
        pass

    class ExactLSTMOptimizer(Exact, LSTMOptimizer):
        pass

    for method in (ExactMetaLSTM, ExactLSTMOptimizer):
        score = evaluate(learned_for_valleys(method, steps=100), unseen, batch=300)
        gap = paired(score, valley_scores["learned schedule"])
        print(f"{method.__name__:18} mse {score.mean:.5f} ± {score.ci95:.5f}")
        assert gap.mean + gap.ci95 < 0
        valley_scores[method.__name__] = score


def test_frozen_gradients_mislead_a_schedule():
    chebyshev = cell_c12a0001()
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    (
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        learned_for_valleys,
        learned_schedule,
    ) = cell_500b6b45(chebyshev, set_to)
    # cell ffcc0220
    unseen = Valleys().freeze(300, seed=0)
    errors = {
        "Chebyshev": evaluate(
            Schedule(at_origin(), chebyshev(4, LOW, HIGH)), unseen, batch=300
        ).mean
    }
    for name, first_order in (("exact", False), ("frozen", True)):
        schedule = learned_schedule(first_order=first_order)
        errors[name] = evaluate(schedule, unseen, batch=300).mean
        print(
            f"{name}: error {errors[name]:.3f}, rates {[round(r, 2) for r in schedule.rates.tolist()]}"
        )
    print(f"where both began: {errors['Chebyshev']:.3f}")
    assert errors["exact"] < errors["Chebyshev"] < errors["frozen"]


def test_no_statistics_from_other_tasks():
    # cell 8c8e80a6
    def answers_change(stats):
        "Do the answers on one task depend on which other tasks came before?"
        torch.manual_seed(0)
        noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        tasks = FewShot(Classes(noise, torch.full((8,), 5)), way=3, shot=1, query=2)
        net = Conv4(1, out=3, size=16, width=4, pool="stride", stats=stats)
        learner = MetaLSTM(net, steps=2, hidden=4, lr=0.4).eval()
        episode = tasks.sample(1, torch.Generator().manual_seed(1))
        support, query = (Examples(side.x[0], side.y[0]) for side in episode)
        before = learner(support, query.x)
        losses(learner.train(), tasks.sample(4, torch.Generator().manual_seed(2)))  # no outer step
        return not torch.equal(learner.eval()(support, query.x), before)

    assert answers_change("running")  # the mistake
    assert not answers_change("support")


def test_two_steps_by_hand():
    chebyshev = cell_c12a0001()
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    (
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        learned_for_valleys,
        learned_schedule,
    ) = cell_500b6b45(chebyshev, set_to)

    # cell c12a008c
    # L_S = (θ - 1)², so g = 2 (θ - 1) and the curvature is 2; L_Q = (θ - 2)² / 2; θ_0 = 0, f = 1, i = 0.25.
    # g_1 = -2, θ_1 = 0.5;  g_2 = -1, θ_2 = 0.75;  the query gradient is -1.25.
    # Frozen: a later step passes f = 1 back.  Exact: f - 2 i = 0.5.
    #   start   1 · 1 · (-1.25) = -1.25               0.5 · 0.5 · (-1.25) = -0.3125
    #   i_1     -g_1 · 1 · (-1.25) = -2.5             -g_1 · 0.5 · (-1.25) = -1.25
    #   i_2     -g_2 · (-1.25) = -1.25                the same
    #   f_1     θ_0 ... = 0                           0
    #   f_2     θ_1 · (-1.25) = -0.625                the same
    # One bias makes both input gates, so b_i gets the slope 0.25 · 0.75 times the sum: -0.703 frozen, -0.469 exact.
    def two_steps(exact):
        "Gradients of θ_0, i_1, i_2, f_1, f_2."
        start, i, f = torch.tensor(0.0), torch.tensor([0.25, 0.25]), torch.tensor([1.0, 1.0])
        for learned in (start, i, f):
            learned.requires_grad_()
        theta = start
        for k in range(2):
            g = 2 * ((theta if exact else theta.detach()) - 1)
            theta = f[k] * theta - i[k] * g
        found = torch.autograd.grad((theta - 2).square() / 2, (start, i, f))
        return torch.cat([part.view(-1) for part in found])

    close(two_steps(exact=False), -1.25, -2.5, -1.25, 0.0, -0.625)
    close(two_steps(exact=True), -0.3125, -1.25, -1.25, 0.0, -0.625)


def test_three_bugs_are_exposed():
    chebyshev = cell_c12a0001()
    close, set_to = cell_db934fe7()
    by_hand = cell_2f59f114(set_to)
    constant_gates, one_wave = cell_515344c0(set_to)
    (
        HIGH,
        LOW,
        Schedule,
        Valleys,
        at_origin,
        best_constant,
        learned_for_valleys,
        learned_schedule,
    ) = cell_500b6b45(chebyshev, set_to)

    # cell c12a008d
    # (a) To save memory, somebody detaches the state before each step.  The start gets no gradient, the rule
    #     only that of the last step.  Exposed by: is any `grad` None after `backward`?
    # (b) Somebody moves by what the LSTM reads: θ = f θ - i · prep(g)[0].  The first number of prep is negative
    #     for every gradient below 1, so parameters grow.  Exposed by: blind gates must be gradient descent.
    # (c) Somebody takes loss and gradient on the queries.  Scores rise, and are worth nothing.  Exposed by:
    #     other labels of the queries must not change the answers.
    class Detached(MetaLSTM):
        def step(self, state, support):
            return super().step(State(*(part.detach() for part in state)), support)

    class MovedByReading(Gates):
        def forward(self, theta, g, h, past):
            return super().forward(theta, log_and_sign(g)[0], h, past)

    torch.manual_seed(0)
    wave = one_wave()
    for method, reached in ((MetaLSTM, True), (Detached, False)):
        learner = method(MLP([1, 6, 1]), steps=2, hidden=3, kind="regression").double()
        learner.loss(wave).backward()
        assert all((p.grad is not None) == reached for p in learner.net.parameters())
        assert learner.lstm.W.grad is not None  # of the last step
    blind = constant_gates(MLP([1, 6, 1]).double(), 0.05, steps=1)
    descent = MAML(blind.net, lr=0.05, steps=1, kind="regression")
    torch.testing.assert_close(blind.adapt(wave.support), descent.adapt(wave.support))
    wrong = MovedByReading(3, 0.05).double()
    wrong.load_state_dict(blind.update.state_dict())
    blind.update = wrong
    with pytest.raises(AssertionError):
        torch.testing.assert_close(blind.adapt(wave.support), descent.adapt(wave.support))
