"""Made from nbs/08_maml.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F

from metabook.classes import Classes
from metabook.engine import losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids
from metabook.learners import Learner, task_loss
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, call
from metabook.scores import evaluate
from metabook.testing import check_learner
from metabook.training import fit


def cell_cf1757cc():
    # cell cf1757cc
    class Valley(NamedTuple):
        "A task with loss 1/2 (theta - best)^T H (theta - best)."

        H: torch.Tensor  # [2, 2] curvature
        best: torch.Tensor  # [2] its best parameters

        def episode(self):
            "Four points of a plane y = best . x whose mean squared error is that loss."
            r = torch.linalg.cholesky(self.H).T  # H = R^T R
            x = torch.cat([r, -r])
            side = Examples(x, x @ self.best[:, None])
            return Episode(side, side)

    def valley(steep, shallow, best):
        "The task with these curvatures along the two axes, in double precision."
        return Valley(
            torch.diag(torch.tensor([steep, shallow]).double()), torch.tensor(best).double()
        )

    def left_over(task, alpha, steps):
        "(I - alpha H)^steps: what the steps leave of the distance from the minimum."
        one = torch.eye(2, dtype=task.H.dtype)
        return torch.linalg.matrix_power(one - alpha * task.H, steps)

    def curvature_after(task, alpha, steps):
        "The curvature of the loss after the steps, as a function of the start."
        p = left_over(task, alpha, steps)
        return p @ task.H @ p

    def best_start(tasks, alpha, steps):
        "Where the mean loss after the steps is lowest."
        c = [curvature_after(task, alpha, steps) for task in tasks]
        pull = sum(a @ task.best for a, task in zip(c, tasks, strict=True))
        return torch.linalg.solve(sum(c), pull)

    return Valley, best_start, curvature_after, left_over, valley


def cell_a1f00801():
    # cell a1f00801
    def plain_maml(net, batches, alpha=0.01, steps=1, beta=0.01):
        optimizer = torch.optim.Adam(net.parameters(), lr=beta)
        for tasks in batches:  # the outer loop
            optimizer.zero_grad()
            for support, query in tasks:
                phi = dict(net.named_parameters())  # phi_0 = theta
                for _ in range(steps):  # the inner loop
                    loss = F.mse_loss(functional_call(net, phi, support.x), support.y)
                    g = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
                    phi = {k: p - alpha * d for (k, p), d in zip(phi.items(), g, strict=True)}
                (F.mse_loss(functional_call(net, phi, query.x), query.y) / len(tasks)).backward()
            optimizer.step()  # the gradients of all tasks have added up in theta

    return plain_maml


def cell_7b5041da(valley):
    # cell 7b5041da
    def plane(theta, **options):
        "MAML on the network f(x) = theta . x, started at theta."
        net = MLP([2, 1]).double()
        with torch.no_grad():
            net.layers[0].weight.copy_(torch.as_tensor(theta))
            net.layers[0].bias.zero_()
        return MAML(net, kind="regression", **options)

    SMALL = valley(4.0, 1.0, [1.0, 2.0])  # the task for your head

    def close(a, *numbers):
        "Assert that a tensor holds these numbers."
        expected = torch.tensor(numbers, dtype=a.dtype, device=a.device)
        torch.testing.assert_close(a.detach().flatten(), expected)

    return SMALL, close, plane


def cell_cec0cbea():
    # cell cec0cbea
    def meta_gradient(learner, *tasks):
        "The gradient of the mean query loss with respect to the start, [2]."
        loss = learner.combine(torch.stack([learner.loss(task.episode()) for task in tasks]))
        return torch.autograd.grad(loss, learner.net.layers[0].weight)[0][0]

    return meta_gradient


def cell_6b044aa9():
    # cell 6b044aa9
    torch.manual_seed(0)
    small = MAML(MLP([1, 5, 5, 1]), lr=0.1, steps=3, kind="regression").double()
    sines = Sinusoids(5, 8).sample(1, torch.Generator().manual_seed(2)).to(dtype=torch.float64)
    wave = Episode(*(Examples(side.x[0], side.y[0]) for side in sines))
    start = dict(small.net.named_parameters())

    def flat(phi):
        return torch.cat([p.flatten() for p in phi.values()])

    def named(vector):
        parts = vector.split([p.numel() for p in start.values()])
        return {k: v.view_as(p) for (k, p), v in zip(start.items(), parts, strict=True)}

    def loss_of(vector, side):
        "The loss on the support or query set as a function of the flat parameters."
        return small.support_loss(named(vector), side)

    visited = [flat(start).detach()]  # phi_0, phi_1, phi_2, phi_3
    for _ in range(3):
        visited.append(flat(small.step(named(visited[-1]), wave.support)).detach())
    at_end = grad(loss_of)(visited[-1], wave.query)  # the gradient of L_Q at the end
    return at_end, loss_of, small, start, visited, wave


def cell_be0806b9(SMALL):
    # cell be0806b9
    small_support = SMALL.episode().support

    def small_loss(theta):
        "The loss of the small task; theta is a column."
        return task_loss("regression", small_support.x @ theta, small_support.y)

    def right(theta):
        (g,) = torch.autograd.grad(small_loss(theta), theta, create_graph=True)
        return theta - 0.1 * g

    def forgets_create_graph(theta):
        (g,) = torch.autograd.grad(small_loss(theta), theta)
        return theta - 0.1 * g

    def steps_in_place(theta):
        (g,) = torch.autograd.grad(small_loss(theta), theta)
        theta.data -= 0.1 * g
        return theta

    def steps_under_no_grad(theta):
        (g,) = torch.autograd.grad(small_loss(theta), theta)
        with torch.no_grad():
            phi = theta - 0.1 * g
        return phi.requires_grad_()  # "or else backward raises"

    def outer(step):
        "The gradient that reaches the start, and where the start is afterwards."
        theta = torch.zeros(2, 1).double().requires_grad_()
        (g,) = torch.autograd.grad(small_loss(step(theta)), theta, allow_unused=True)
        return torch.zeros(2, 1).double() if g is None else g, theta

    return (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    )


def test_maml_in_use():
    plain_maml = cell_a1f00801()
    # cell 23f520b2
    torch.manual_seed(0)
    learner = MAML(MLP([1, 40, 40, 1]), lr=0.01, steps=1, test_steps=5, kind="regression")
    episodes = Sinusoids(shot=5, query=10).sample(3)
    task = Episode(*(Examples(side.x[0], side.y[0]) for side in episodes))  # the first of the three
    phi, _ = learner.adapt(task.support)
    assert learner(task.support, task.query.x).shape == (10, 1)
    assert losses(learner, episodes).shape == (3,)
    assert all((phi[k] != p).any() for k, p in learner.net.named_parameters())


def test_twelve_lines_are_the_class():
    plain_maml = cell_a1f00801()
    # cell a1f00803
    torch.manual_seed(0)
    net = MLP([1, 8, 1]).double()
    learner = MAML(copy.deepcopy(net), lr=0.01, steps=2, kind="regression")
    batches = [Sinusoids(5, 10).sample(4).to(dtype=torch.float64) for _ in range(3)]
    plain_maml(
        net,
        [[Episode(*(Examples(s.x[i], s.y[i]) for s in b)) for i in range(4)] for b in batches],
        steps=2,
    )

    optimizer = torch.optim.Adam(learner.param_groups(), lr=0.01)
    for batch in batches:
        optimizer.zero_grad()
        losses(learner, batch).mean().backward()
        optimizer.step()
    torch.testing.assert_close(list(net.parameters()), list(learner.net.parameters()))


@pytest.mark.proves("eq-maml-inner")
def test_inner_update():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    plain_maml = cell_a1f00801()
    SMALL, close, plane = cell_7b5041da(valley)
    # cell 76a7ae4a
    support = SMALL.episode().support
    for steps, expected in [(0, (0.0, 0.0)), (1, (0.4, 0.2)), (2, (0.64, 0.38))]:
        phi, _ = plane((0.0, 0.0), lr=0.1, steps=steps).adapt(support)
        close(phi["layers.0.weight"], *expected)
        close(phi["layers.0.bias"], 0.0)


@pytest.mark.proves("eq-maml-objective")
def test_objective():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    plain_maml = cell_a1f00801()
    SMALL, close, plane = cell_7b5041da(valley)
    # cell f8e51e37
    learner = plane((0.0, 0.0), lr=0.1, steps=1, test_steps=2)
    easy = valley(4.0, 1.0, [0.0, 0.0])
    each = torch.stack([learner.loss(task.episode()) for task in (SMALL, easy)])
    close(each, 2.34, 0.0)
    close(learner.combine(each), 1.17)
    after_two = 0.5 * 4 * 0.36**2 + 0.5 * 1.62**2
    close(learner.eval().loss(SMALL.episode()), after_two)
    close(plane((0.0, 0.0), lr=0.1, steps=2).eval().loss(SMALL.episode()), after_two)


def test_errors_say_what_to_do():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    plain_maml = cell_a1f00801()
    SMALL, close, plane = cell_7b5041da(valley)
    # cell fe845ec6
    for rate in (-0.1, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"lr={rate}, expected a positive inner rate"):
            plane((0.0, 0.0), lr=rate)
    with pytest.raises(ValueError, match=r"^steps=-1, expected at least 0"):
        plane((0.0, 0.0), lr=0.1, steps=-1, test_steps=1)
    with pytest.raises(ValueError, match="test_steps=-1, expected at least 0"):
        plane((0.0, 0.0), lr=0.1, steps=1, test_steps=-1)
    nothing = Examples(torch.zeros(0, 2).double(), torch.zeros(0, 1).double())
    with pytest.raises(ValueError, match="the support set is empty"):
        plane((0.0, 0.0), lr=0.1)(nothing, torch.zeros(1, 2).double())
    three = Examples.of(torch.zeros(3, 2), torch.arange(3), way=3)
    with pytest.raises(ValueError, match=r"gives 5 outputs.*is 3"):
        MAML(MLP([2, 5])).adapt(three)


def test_keeps_the_contract():
    plain_maml = cell_a1f00801()
    # cell 5128596d
    check_learner(MAML(MLP([1, 8, 1]), lr=0.01, steps=2, kind="regression"), Sinusoids(5, 4))
    noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    shapes = Classes(noise, torch.full((8,), 5))
    net = Conv4(1, out=3, size=16, width=4, pool="stride", stats="support")
    check_learner(MAML(net, lr=0.4), FewShot(shapes, way=3, shot=2, query=2))


@pytest.mark.proves("eq-maml-meta-gradient")
def test_meta_gradient_by_hand():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()
    # cell 26f055c3
    g = meta_gradient(plane((0.0, 0.0), lr=0.1), SMALL)
    print("meta-gradient", g.tolist())
    close(g, -1.44, -1.62)


def test_meta_gradient_against_finite_differences(device):
    # cell 11a1e745
    torch.manual_seed(0)
    learner = MAML(MLP([1, 4, 4, 1]), lr=0.05, steps=3, kind="regression").double().to(device)
    episodes = Sinusoids(5, 8).sample(4, torch.Generator().manual_seed(1)).to(device, torch.float64)

    def objective(lift="vmap"):
        return learner.combine(losses(learner, episodes, lift))

    def differences(parameter, h=1e-6):
        "Central differences of the objective, one entry of the parameter at a time."
        found = torch.zeros_like(parameter).flatten()
        entries = parameter.data.view(-1)
        for i, value in enumerate(entries.tolist()):
            entries[i] = value + h
            up = objective().item()
            entries[i] = value - h
            found[i] = (up - objective().item()) / (2 * h)
            entries[i] = value
        return found.view_as(parameter)

    parameters = list(learner.parameters())
    measured = [differences(p) for p in parameters]
    for lift in ("loop", "vmap"):
        exact = torch.autograd.grad(objective(lift), parameters)
        torch.testing.assert_close(list(exact), measured, rtol=1e-5, atol=1e-7)


def test_gradient_of_the_rate():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    # cell afc4ea97
    rates = torch.full((2,), 0.1).double().requires_grad_()
    g_support = SMALL.H @ (torch.zeros(2).double() - SMALL.best)
    away = -rates * g_support - SMALL.best  # phi_1 minus the minimum
    (by_rate,) = torch.autograd.grad(0.5 * away @ SMALL.H @ away, rates)
    close(by_rate, -9.6, -3.6)  # one rate for both: their sum, -13.2


@pytest.mark.proves("eq-maml-product")
def test_product_of_all_steps():
    at_end, loss_of, small, start, visited, wave = cell_6b044aa9()
    # cell 114ee12d
    u = at_end
    for phi in reversed(visited[:-1]):  # the last step is nearest to the gradient
        H = hessian(loss_of)(phi, wave.support)
        u = (torch.eye(len(u)).double() - small.lr * H) @ u
    exact = torch.autograd.grad(small.loss(wave), list(start.values()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in exact]), u)
    print(f"{len(u)} parameters, Hessians of {len(u) ** 2} numbers each")


@pytest.mark.proves("eq-maml-hvp")
def test_hessian_vector_products():
    at_end, loss_of, small, start, visited, wave = cell_6b044aa9()

    # cell 0035a5d9
    def along(phi, u):
        "The scalar: gradient of L_S at phi, times u."
        return grad(loss_of)(phi, wave.support) @ u

    u = at_end
    for phi in reversed(visited[:-1]):
        u = u - small.lr * grad(along)(phi, u)
    exact = torch.autograd.grad(small.loss(wave), list(start.values()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in exact]), u)


@pytest.mark.proves("eq-maml-quadratic")
def test_closed_form():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()

    # cell 528300aa
    def random_valley(generator):
        a, m = torch.randn(2, 2, generator=generator).double(), torch.randn(2, generator=generator)
        return Valley(a @ a.T + 0.1 * torch.eye(2).double(), m.double())

    generator = torch.Generator().manual_seed(0)
    tasks = [random_valley(generator) for _ in range(3)]
    theta, alpha, steps = torch.randn(2, generator=generator).double(), 0.1, 3
    learner = plane(theta, lr=alpha, steps=steps)
    curvatures = [curvature_after(task, alpha, steps) for task in tasks]
    pairs = list(zip(tasks, curvatures, strict=True))
    mean_loss = sum(0.5 * (theta - task.best) @ c @ (theta - task.best) for task, c in pairs) / 3
    mean_gradient = sum(c @ (theta - task.best) for task, c in pairs) / 3
    close(learner.combine(torch.stack([learner.loss(t.episode()) for t in tasks])), mean_loss)
    close(meta_gradient(learner, *tasks), *mean_gradient)
    close(
        meta_gradient(plane(best_start(tasks, alpha, steps), lr=alpha, steps=steps), *tasks),
        0.0,
        0.0,
    )


def test_play_with_valleys():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    # cell a1f00805
    pair = [valley(8.0, 1.0, [-1.0, 1.0]), valley(1.0, 8.0, [1.0, -1.0])]
    for steps in (1, 2, 5):
        close(best_start(pair, 2 / 9, steps), *best_start(pair, 0.1, 0).tolist())
    for task in pair:
        close(left_over(task, 1 / 8, 1) @ (best_start(pair, 1 / 8, 1) - task.best), 0.0, 0.0)
    crossing = [best_start(pair, alpha, 1)[0].item() for alpha in (0.125, 0.222, 0.3)]
    assert crossing[0] > 0 > crossing[1] > crossing[2] > -1  # back to the floors, and closer


def test_equal_curvatures_and_noise():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    # cell 416079a2
    alike = [valley(4.0, 1.0, best) for best in ([1.0, 2.0], [-3.0, 0.0], [0.0, 5.0])]
    for alpha, steps in [(0.1, 0), (0.1, 1), (0.3, 5)]:
        close(best_start(alike, alpha, steps), -2 / 3, 7 / 3)  # the mean of the minima

    share = torch.linspace(0, 1, 101).double()  # alpha times curvature
    left = (1 - share) ** 2 * 4 + share**2 * 1
    assert share[left.argmin()].item() == pytest.approx(0.8)
    close(left[[0, 80, 100]], 4.0, 0.8, 1.0)


@pytest.mark.proves("eq-maml-first-order")
def test_first_order_gradient():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()
    # cell 17cd5a08
    first = plane((0.0, 0.0), lr=0.1, first_order=True)
    close(meta_gradient(first, SMALL), -2.4, -1.8)
    end = plane((0.4, 0.2), lr=0.1, steps=0)  # phi_1 as a start, no steps: the plain query gradient
    torch.testing.assert_close(meta_gradient(first, SMALL), meta_gradient(end, SMALL))
    close(meta_gradient(plane((0.0, 0.0), lr=0.1, steps=2, first_order=True), SMALL), -1.44, -1.62)
    twin = plane((0.0, 0.0), lr=0.1)  # adaptation itself is the same
    torch.testing.assert_close(
        first.adapt(SMALL.episode().support), twin.adapt(SMALL.episode().support)
    )


@pytest.mark.proves("eq-maml-first-order-error")
def test_first_order_error():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()
    # cell 0e9ff8d3
    exact, first = (
        meta_gradient(plane((0.0, 0.0), lr=0.1, first_order=f), SMALL) for f in (False, True)
    )
    close(first - exact, -0.96, -0.18)
    r = (first - exact).norm() / first.norm()
    assert r <= (1 + 0.1 * 4) - 1
    assert F.cosine_similarity(exact, first, 0) >= (1 - r**2).sqrt()
    two_steps = plane((0.0, 0.0), lr=0.1, steps=2, first_order=True)
    close(meta_gradient(two_steps, SMALL), *exact.tolist())  # exact MAML, with one step


def test_first_order_error_of_a_network():
    # cell a1f00807
    torch.manual_seed(0)
    net = MLP([1, 5, 5, 1]).double()
    sines = Sinusoids(5, 8).sample(1, torch.Generator().manual_seed(2)).to(dtype=torch.float64)
    wave = Episode(*(Examples(side.x[0], side.y[0]) for side in sines))

    def both_gradients(alpha, steps):
        found = []
        for order in (False, True):
            learner = MAML(net, alpha, steps, first_order=order, kind="regression")
            found.append(torch.autograd.grad(learner.loss(wave), list(net.parameters())))
        return (torch.cat([g.flatten() for g in gradients]) for gradients in found)

    def largest_curvature(alpha, steps):
        "The largest norm of the support Hessian along the inner steps."
        learner, phi, norms = MAML(net, alpha, kind="regression"), dict(net.named_parameters()), []
        for _ in range(steps):
            blocks = hessian(learner.support_loss)(phi, wave.support)
            rows = [
                [b.reshape(phi[i].numel(), -1) for b in row.values()] for i, row in blocks.items()
            ]
            norms.append(torch.linalg.matrix_norm(torch.cat([torch.cat(r, 1) for r in rows]), 2))
            phi = learner.step(phi, wave.support)
        return max(norms)

    for alpha, steps in [(0.001, 1), (0.01, 1), (0.01, 5), (0.05, 5)]:
        exact, first = both_gradients(alpha, steps)
        error = (first - exact).norm() / first.norm()
        bound = (1 + alpha * largest_curvature(alpha, steps)) ** steps - 1
        print(f"rate {alpha:5}, {steps} steps: error {error:.4f}, bound {bound:.4f}")
        assert 0 < error <= bound
        assert (
            F.cosine_similarity(exact, first, 0) >= (1 - error**2).clamp_min(0).sqrt() or error > 1
        )


def test_where_each_comes_to_rest():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()
    # cell 8434b1bb
    one = torch.eye(2, dtype=torch.float64)
    H, away = SMALL.H, -SMALL.best  # from the start (0, 0)
    g_q = H @ away  # support and query loss are the same here: g_S = g_Q
    small_rate = 1e-4
    exact, first = (
        meta_gradient(plane((0.0, 0.0), lr=small_rate, first_order=f), SMALL) for f in (False, True)
    )
    torch.testing.assert_close((g_q - first) / small_rate, H @ g_q, rtol=1e-3, atol=0)  # one term
    torch.testing.assert_close((g_q - exact) / small_rate, 2 * H @ g_q, rtol=1e-3, atol=0)  # both
    overshoot = meta_gradient(plane((0.0, 0.0), lr=0.4, first_order=True), SMALL)
    assert (
        overshoot[0] > 0 > meta_gradient(plane((0.0, 0.0), lr=0.4), SMALL)[0]
    )  # away from 1, and towards
    penalty = 1 / 0.1 - 1.0  # for the direction of curvature 1
    assert penalty / (1 + penalty) == pytest.approx(1 - 0.1)
    close(left_over(SMALL, 0.1, 1) @ away, -0.6, -1.8)


def test_maml_learns_to_adapt():
    # cell acc14ccb
    class Oracle(Learner):
        "Is told what the task is: amplitude and phase are two more inputs."

        kind = "regression"

        def __init__(self, net):
            super().__init__()
            self.net = net

        def adapt(self, support):
            return support.info["task"]

        def predict(self, task, x):
            return self.net(torch.cat([x, task.expand(len(x), 2)], 1))

    def falling(steps):
        "The outer rate falls from its full value to zero along half a cosine."
        return lambda step: (1 + math.cos(math.pi * step / steps)) / 2

    def new_net(inputs=1):
        torch.manual_seed(0)
        return MLP([inputs, 40, 40, 1])

    # cell def71849
    torch.manual_seed(0)
    apprentice = MAML(MLP([1, 40, 40, 1]), lr=0.01, kind="regression")
    held_out = Sinusoids(5, 50).freeze(200, seed=0)
    untrained = evaluate(apprentice, held_out)
    fit(apprentice, Sinusoids(5, 10), steps=150, meta_batch=32, lr=0.01, progress=False)
    trained = evaluate(apprentice, held_out)
    apprentice.test_steps = 0
    unadapted = evaluate(apprentice, held_out)
    print(
        f"{untrained.mean:.2f} untrained, {trained.mean:.2f} trained, {unadapted.mean:.2f} unadapted"
    )
    assert trained.mean + trained.ci95 < min(untrained.mean, unadapted.mean, 4.25)


@pytest.mark.proves("eq-maml-permutation")
def test_permutation_of_labels():
    # cell 1bb0d5f5
    torch.manual_seed(0)
    learner = MAML(MLP([3, 8, 4]), lr=0.5, steps=3).double()
    x, query = torch.randn(8, 3).double(), torch.randn(6, 3).double()
    support = Examples(x, F.one_hot(torch.arange(8) % 4, 4).double())
    order = torch.tensor([1, 0, 2, 3])
    renamed = support._replace(y=support.y[:, order])
    moved = copy.deepcopy(learner)
    head = moved.net.layers[-1]
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        head.bias.copy_(head.bias[order])

    plain = learner(support, query)
    torch.testing.assert_close(moved(renamed, query), plain[:, order])  # only names change
    assert not torch.allclose(
        learner(renamed, query), plain[:, order]
    )  # renaming alone is no renaming


def test_one_step_of_the_head_is_a_prototype_classifier():
    # cell e2eb2c3f
    torch.manual_seed(0)
    z, labels = torch.randn(12, 6).double(), torch.arange(12) % 3  # 3-way 4-shot
    head = nn.Linear(6, 3).double()
    with torch.no_grad():
        head.weight.copy_(head.weight[:1].expand(3, 6))
        head.bias.zero_()
    one_step = MAML(head, lr=0.7, steps=1)
    state = one_step.adapt(Examples(z, F.one_hot(labels, 3).double()))
    new = torch.randn(5, 6).double()
    logits = one_step.predict(state, new)
    prototypes = torch.stack([z[labels == k].mean(0) for k in range(3)])
    expected = 0.7 / 3 * new @ (prototypes - prototypes.mean(0)).T
    shared = logits - expected
    torch.testing.assert_close(shared, shared[:, :1].expand(5, 3))  # alike for all classes


def test_a_cut_graph_is_found():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)
    # cell d77bfb21
    close(outer(right)[0], -1.44, -1.62)
    for step in (forgets_create_graph, steps_in_place, steps_under_no_grad):
        with pytest.raises(AssertionError):
            close(outer(step)[0], -1.44, -1.62)

    close(outer(forgets_create_graph)[0], -2.4, -1.8)  # first order, and nobody asked for it
    close(
        outer(steps_in_place)[1], 0.4, 0.2
    )  # the start itself has moved: the next task begins there
    close(outer(steps_under_no_grad)[0], 0.0, 0.0)  # nothing reaches the start: it never learns
    close(meta_gradient(plane((0.0, 0.0), lr=0.1), SMALL), -1.44, -1.62)  # ours


def test_what_stays_in_grad():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    meta_gradient = cell_cec0cbea()
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)
    # cell b602af92
    theta = torch.zeros(2, 1).double().requires_grad_()
    small_loss(theta).backward()  # theta.grad is the support gradient now
    with torch.no_grad():
        theta -= 0.1 * theta.grad
    small_loss(theta).backward()  # adds to it
    close(theta.grad, -4 - 2.4, -2 - 1.8)

    point = Valley(torch.eye(2).double() * 5, torch.ones(2).double())  # alpha times curvature: 0.5
    for steps in (1, 3):
        exact, first = (
            meta_gradient(plane((0.0, 0.0), lr=0.1, steps=steps, first_order=f), point)
            for f in (False, True)
        )
        torch.testing.assert_close(first, 2**steps * exact)


def test_gradient_at_the_fast_weights():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell a1f00815
    def adapt_by(steps, of_start):
        theta = phi = torch.zeros(2, 1).double().requires_grad_()
        for _ in range(steps):
            at = theta if of_start else phi
            (g,) = torch.autograd.grad(small_loss(phi), at, create_graph=True)
            phi = phi - 0.1 * g
        return phi

    close(adapt_by(2, of_start=False), 0.64, 0.38)
    assert torch.equal(adapt_by(1, of_start=True), adapt_by(1, of_start=False))  # nobody notices
    with pytest.raises(AssertionError):
        close(adapt_by(2, of_start=True), 0.64, 0.38)
    close(adapt_by(2, of_start=True), 0.544, 0.362)  # the mistake: 0.4 + 0.144, 0.2 + 0.162


def test_the_score_before_any_step():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell a1f00817
    class InOrder(FewShot):
        "The mistake: the classes of a task in their order."

        def draw(self, n, generator=None):
            return self.picks(super().draw(n, generator).classes.sort(1).values, generator)

    def trained_on(tasks):
        torch.manual_seed(0)
        learner = MAML(MLP([8, 32, 5]), lr=0.1, steps=1)
        fit(learner, tasks, steps=80, meta_batch=16, lr=0.01, progress=False)
        return learner

    def after_steps(learner, tasks, steps):
        learner.test_steps = steps
        return evaluate(learner, tasks.freeze(150, seed=1)).mean

    draw = torch.Generator().manual_seed(0)
    around = torch.randn(40, 1, 8, generator=draw) + 0.3 * torch.randn(40, 20, 8, generator=draw)
    known, new = (Classes(a.flatten(0, 1), torch.full((20,), 20)) for a in around.split(20))
    found = {}
    for name, draw_tasks in (("in order", InOrder), ("shuffled", FewShot)):
        learner = trained_on(draw_tasks(known, 5, 1, 5))
        found[name] = [after_steps(learner, draw_tasks(known, 5, 1, 5), n) for n in (0, 1)]
        found[name] += [after_steps(learner, FewShot(new, 5, 1, 5), n) for n in (0, 1)]
        print(
            f"{name}, after 0 and 1 steps:", " ".join(f"{a:.1%}" for a in found[name][:2]), end=""
        )
        print("; new classes:", " ".join(f"{a:.1%}" for a in found[name][2:]))
    assert found["in order"][0] > 0.3  # the leak
    assert abs(found["shuffled"][0] - 0.2) < 0.03
    assert abs(found["in order"][2] - 0.2) < 0.06  # no use for new classes
    gains = {name: each[3] - each[2] for name, each in found.items()}
    assert gains["shuffled"] > gains["in order"] + 0.08  # nor has it learned to adapt


@pytest.mark.proves("eq-maml-loss-scale")
def test_scale_of_the_inner_loss():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)
    # cell 742357d4
    way, shot, authors_rate = 5, 3, 0.4
    torch.manual_seed(0)
    net = MLP([4, 16, way]).double()
    x, labels = torch.randn(way * shot, 4).double(), torch.arange(way * shot) % way
    query = Examples.of(torch.randn(10, 4).double(), torch.arange(10) % way, way)

    def authors_step(phi):
        each = F.cross_entropy(functional_call(net, phi, (x,)), labels, reduction="none") / shot
        gradients = torch.autograd.grad(each.sum(), list(phi.values()), create_graph=True)
        return {k: p - authors_rate * g for (k, p), g in zip(phi.items(), gradients, strict=True)}

    support = Examples(x, F.one_hot(labels, way).double())
    theirs = authors_step(authors_step(dict(net.named_parameters())))
    learner = MAML(net, lr=way * authors_rate, steps=2)
    ours, _ = learner.adapt(support)
    torch.testing.assert_close(ours, theirs)

    their_loss = task_loss("classification", functional_call(net, theirs, (query.x,)), query.y)
    parameters = list(net.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(learner.loss(Episode(support, query)), parameters),
        torch.autograd.grad(their_loss, parameters),
    )
    copied, _ = MAML(net, lr=authors_rate, steps=2).adapt(support)  # the mistake: another step
    assert not torch.allclose(copied["layers.0.weight"], theirs["layers.0.weight"])


def test_adaptation_must_move():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell d24a95c1
    def adapt_by_rate(theta, alpha):
        for _ in range(int(alpha)):  # meant: the number of steps
            (g,) = torch.autograd.grad(small_loss(theta), theta, create_graph=True)
            theta = theta - alpha * g
        return theta

    start = torch.zeros(2, 1).double().requires_grad_()
    assert torch.equal(adapt_by_rate(start, 0.1), start)  # the mistake: nothing has moved
    phi, _ = plane((0.0, 0.0), lr=0.1).adapt(small_support)
    assert (phi["layers.0.weight"] != 0).all()


def test_the_start_must_learn():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell 78a83895
    def outer_step_on_copy(net, episode, alpha, beta):
        fast = copy.deepcopy(net)
        for side, rate in ((episode.support, alpha), (episode.query, beta)):
            loss = task_loss("regression", fast(side.x), side.y)
            fast.zero_grad()
            loss.backward()
            torch.optim.SGD(fast.parameters(), lr=rate).step()
        return fast  # the next network

    learner, episode = plane((0.0, 0.0), lr=0.1), SMALL.episode()
    wrong = outer_step_on_copy(learner.net, episode, alpha=0.1, beta=0.5)
    close(
        wrong.layers[0].weight, 0.4 + 0.5 * 2.4, 0.2 + 0.5 * 1.8
    )  # plain training: phi - beta * gradient

    optimizer = torch.optim.SGD(learner.param_groups(), lr=0.5)
    learner.loss(episode).backward()
    optimizer.step()
    close(learner.net.layers[0].weight, 0.5 * 1.44, 0.5 * 1.62)  # theta - beta * meta-gradient


def test_tasks_must_not_leak():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell c08ec8a2
    def adapt_with(optimizer, theta, episode):
        "Three steps from zero with an optimiser that may have been used before."
        theta.data.zero_()
        for _ in range(3):
            optimizer.zero_grad()
            task_loss("regression", episode.support.x @ theta, episode.support.y).backward()
            optimizer.step()
        return theta.detach().clone()

    other, episode = valley(1.0, 3.0, [-2.0, 1.0]).episode(), SMALL.episode()
    theta = torch.zeros(2, 1).double().requires_grad_()
    shared = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
    alone = adapt_with(shared, theta, episode)
    adapt_with(shared, theta, other)
    assert not torch.allclose(adapt_with(shared, theta, episode), alone)  # the mistake

    learner = plane((0.0, 0.0), lr=0.1, steps=3)  # no optimiser in the inner loop: nothing to leak
    alone = learner.adapt(episode.support)
    learner.adapt(other.support)
    torch.testing.assert_close(learner.adapt(episode.support), alone, rtol=0, atol=0)


def test_what_has_no_gradient():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)
    # cell 06299d39
    theta = torch.zeros(2, 1).double().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0]  # a number, no tensor
    assert optimizer.param_groups[0]["params"][0] is theta  # what was meant

    with torch.no_grad():
        loss = small_loss(theta)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()

    learner = plane((0.0, 0.0), lr=0.1).eval()
    with (
        torch.no_grad()
    ):  # as `evaluate` does: inner gradients work here, and no outer graph is kept
        phi, _ = learner.adapt(small_support)
    assert not phi["layers.0.weight"].requires_grad
    close(phi["layers.0.weight"], 0.4, 0.2)


def test_queries_together_and_alone():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell 0fe2da6c
    def adapted_to_images(stats):
        torch.manual_seed(0)
        learner = MAML(
            Conv4(1, out=3, size=16, width=4, pool="stride", stats=stats), lr=0.4
        ).double()
        images = torch.randn(9, 1, 16, 16).double()
        support = Examples(images[:3], torch.eye(3).double())
        return learner, learner.adapt(support), support.x, images[3:]

    def together_and_alone(stats):
        learner, state, _, queries = adapted_to_images(stats)
        alone = torch.cat([learner.predict(state, image[None]) for image in queries])
        return learner.predict(state, queries), alone

    together, alone = together_and_alone("batch")
    assert not torch.allclose(together, alone)  # transductive
    torch.testing.assert_close(*together_and_alone("support"))  # each query stands alone

    learner, state, seen, _ = adapted_to_images("support")
    phi, _ = state
    torch.testing.assert_close(learner.predict(state, seen), call(learner.net, phi, seen))


def test_buffers_stay():
    Valley, best_start, curvature_after, left_over, valley = cell_cf1757cc()
    SMALL, close, plane = cell_7b5041da(valley)
    (
        forgets_create_graph,
        outer,
        right,
        small_loss,
        small_support,
        steps_in_place,
        steps_under_no_grad,
    ) = cell_be0806b9(SMALL)

    # cell 83486aa4
    def buffers_change(net, adapt):
        before = {k: v.clone() for k, v in net.named_buffers()}
        adapt()
        return any(not torch.equal(v, before[k]) for k, v in net.named_buffers())

    x, y = torch.randn(6, 2), torch.randn(6, 1)
    careless = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )
    fast = {k: p.detach().clone() for k, p in careless.named_parameters()}  # a "clone"
    assert buffers_change(careless, lambda: functional_call(careless, fast, (x,)))  # the mistake

    net = Conv4(1, out=3, size=16, width=4, stats="running")
    letter = Examples.of(torch.randn(3, 1, 16, 16), torch.arange(3), way=3)
    assert not buffers_change(net, lambda: MAML(net).adapt(letter))
