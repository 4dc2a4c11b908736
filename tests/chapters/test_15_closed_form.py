"""Made from nbs/15_closed_form.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn import functional as F

from metabook.classes import Classes
from metabook.closed_form import RidgeHead, ridge
from metabook.episodes import Examples, FewShot, Sinusoids, one_hot
from metabook.linear_world import posterior
from metabook.networks import MLP, Conv4
from metabook.prototypes import prototypes
from metabook.testing import check_learner


def cell_15cf0014():
    # cell 15cf0014
    support = Examples(torch.randn(6, 2), one_hot(torch.arange(6) % 3, 3))
    query = torch.randn(4, 2)
    learner = RidgeHead(nn.Identity(), penalty=0.2, scale=7.0)
    wide = torch.cat([support.x, torch.ones(6, 1)], 1)
    w = torch.linalg.solve(wide.T @ wide + 6 * 0.2 * torch.eye(3), wide.T @ support.y)
    torch.testing.assert_close(learner(support, query), 7 * (query @ w[:2] + w[2]))

    sure = F.one_hot(torch.tensor([0]), 5).float()
    assert abs(sure.softmax(1).max().item() - math.e / (math.e + 4)) < 1e-6  # 0.40: never sure
    logits = learner(support, query)
    torch.testing.assert_close(
        (logits + 3).softmax(1), logits.softmax(1)
    )  # one number added to all
    return support


def cell_15cf0045():
    # cell 15cf0045
    def price(w, z, signs, penalty):
        "Mean cross-entropy of two classes, signs +1 and -1, and the penalty."
        return F.softplus(-signs * (z @ w)).mean() + penalty * w.square().sum()

    def newton_step(w, z, signs, penalty):
        "To the bottom of the bowl that touches the price at w."
        p = torch.sigmoid(z @ w)
        curvature = z.T @ ((p * (1 - p))[:, None] * z) / len(z) + 2 * penalty * torch.eye(
            len(w)
        ).to(z)
        return w - torch.linalg.solve(curvature, grad(price)(w, z, signs, penalty))

    torch.manual_seed(0)
    embeddings = torch.randn(20, 4).double()
    signs = torch.sign(embeddings[:, 0] + 0.3 * torch.randn(20))
    answer, newton = torch.zeros(4, dtype=torch.float64), 0
    while grad(price)(answer, embeddings, signs, 0.1).norm() > 1e-8:
        answer, newton = newton_step(answer, embeddings, signs, 0.1), newton + 1
        assert newton <= 6  # each step about doubles the number of digits
    return answer, embeddings, newton, newton_step, signs


@pytest.mark.proves("eq-ridge-solution", "eq-ridge-dual")
def test_solves_by_hand_and_leaves_no_gradient():
    # cell 15cf0011
    one = ridge(torch.tensor([[1.0], [2.0]]), torch.ones(2, 1), 0.5)
    torch.testing.assert_close(one, torch.tensor([[0.5]]))

    def penalised(w, z, y, penalty):
        return (z @ w - y).square().sum() / len(z) + penalty * w.square().sum()

    for n, d in ((12, 4), (4, 12)):  # more examples than features, and fewer
        z, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
        w = ridge(z, y, 0.3)
        assert grad(penalised)(w, z, y, 0.3).abs().max() < 1e-12
        other = torch.linalg.solve(z.T @ z + n * 0.3 * torch.eye(d, dtype=z.dtype), z.T @ y)
        torch.testing.assert_close(w, other)
    one


@pytest.mark.proves("eq-ridge-logits")
def test_logits_are_a_scaled_fit():
    support = cell_15cf0014()


def test_agrees_with_the_released_code():
    # cell 5c1e82e4
    def released(z, y, queries, penalty, scale, shift):
        "In the order of the authors' code: features and targets over the root of n, an inverse, a scale and a shift."
        n, d = z.shape
        x, y = torch.cat([z, torch.ones(n, 1).to(z)], 1) / n**0.5, y / n**0.5
        if n > d + 1:
            wb = torch.linalg.inv(x.T @ x + penalty * torch.eye(d + 1).to(z)) @ x.T @ y
        else:
            wb = x.T @ torch.linalg.inv(x @ x.T + penalty * torch.eye(n).to(z)) @ y
        return scale * (queries @ wb[:d] + wb[d]) + shift

    torch.manual_seed(0)
    net = MLP([3, 8, 6]).double()
    for shot in (1, 4):  # three examples, fewer than the seven features, and twelve
        shown, asked = torch.randn(3 * shot, 3).double(), torch.randn(5, 3).double()
        answers = one_hot(torch.arange(3 * shot) % 3, 3).double()
        ours = RidgeHead(net, penalty=50.0, scale=10.0).double()(Examples(shown, answers), asked)
        theirs = released(net(shown), answers, net(asked), 50.0, 10.0, 0.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)  # 50 and 10 are float32
        losses = [F.cross_entropy(logits, torch.arange(5) % 3) for logits in (ours, theirs + 0.7)]
        updates = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
        for a, b in zip(*updates, strict=True):  # the meta-gradient, and the shift is not seen
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_keeps_the_contract(device):
    support = cell_15cf0014()
    # cell 15cf0015
    noise = Classes(torch.rand(96, 1, 16, 16), sizes=torch.full((8,), 12))
    for stats in ("batch", "support", "running"):
        learner = RidgeHead(Conv4(size=16, width=4, stats=stats))
        check_learner(learner.to(device), FewShot(noise, way=3, shot=2, query=3))
    check_learner(RidgeHead(MLP([1, 16, 8]), kind="regression").to(device), Sinusoids(5, 5))
    assert (
        RidgeHead.takes(support)["embed"][1] is None
    )  # an embedding: nothing has the size of the way


def test_what_is_refused():
    # cell 15cf0031
    for wrong in ({"penalty": 0.0}, {"scale": -1.0}, {"penalty": float("nan")}):
        with pytest.raises(ValueError, match="expected a positive number"):
            RidgeHead(nn.Identity(), **wrong)


def test_a_network_of_few_digits_is_solved_with_more():
    # cell f682b263
    rounded = Examples(torch.randn(6, 8).bfloat16(), one_hot(torch.arange(6) % 3, 3))
    learner, few = RidgeHead(nn.Identity()), torch.randn(4, 8).bfloat16()
    found = learner.predict(learner.adapt(rounded), few)
    exact = learner(Examples(rounded.x.float(), rounded.y), few.float())
    torch.testing.assert_close(found, exact)  # the values are rounded, the arithmetic is not


@pytest.mark.proves("eq-ridge-filters", "eq-ridge-infinite")
def test_two_filters():
    # cell 15cf0017
    z, y = torch.randn(5, 8, dtype=torch.float64), one_hot(torch.arange(5), 5).double()
    curvature, axes = torch.linalg.eigh(z.T @ z / 5)
    loud = curvature > 1e-9  # as many as there are examples
    least = axes.T @ torch.linalg.pinv(z) @ y
    alpha, penalty, w = 0.3, 0.2, torch.zeros(8, 5, dtype=torch.float64)
    kept = (axes.T @ ridge(z, y, penalty))[loud] / least[loud]
    torch.testing.assert_close(
        kept, (curvature / (curvature + penalty))[loud, None].expand_as(kept)
    )
    for _ in range(7):
        w = w - alpha * z.T @ (z @ w - y) / 5
    kept = (axes.T @ w)[loud] / least[loud]
    torch.testing.assert_close(kept, (1 - (1 - alpha * curvature) ** 7)[loud, None].expand_as(kept))

    torch.testing.assert_close(1e9 * ridge(z, y, 1e9), prototypes(z, y).T / 5)


@pytest.mark.proves("eq-ridge-left-out")
def test_leaving_one_out():
    # cell 15cf0035
    z, y, total = (
        torch.randn(12, 4, dtype=torch.float64),
        torch.randn(12, 2, dtype=torch.float64),
        3.0,
    )
    fitted = z @ ridge(z, y, total / 12)
    P = z @ ridge(z, torch.eye(12, dtype=z.dtype), total / 12)  # its columns are targets, too
    shortcut = (y - fitted) / (1 - P.diagonal())[:, None]
    for i in range(12):
        rest = torch.arange(12) != i
        alone = z[i] @ ridge(z[rest], y[rest], total / 11)  # the total stays
        torch.testing.assert_close(y[i] - alone, shortcut[i])


def test_a_penalised_bias_is_pulled_to_zero():
    # cell 15cf0037
    z, y = torch.cat([torch.randn(8, 3), torch.ones(8, 1)], 1).double(), torch.ones(8, 1).double()
    z[:, :3] -= z[:, :3].mean(0)
    answers = z @ ridge(z, y, 1.0)
    torch.testing.assert_close(answers, torch.full_like(answers, 0.5))
    repaired = 1 + z[:, :3] @ ridge(z[:, :3], y - y.mean(), 1.0)
    torch.testing.assert_close(repaired, y)
    biases = ridge(z, one_hot(torch.arange(8) % 4, 4).double(), 1.0)[-1]
    torch.testing.assert_close(
        biases, torch.full_like(biases, 1 / 8)
    )  # 1/4, halved, for each class


def test_a_support_set_that_stands_twice_gives_the_same_map():
    # cell 15cf0039
    z, y = torch.randn(6, 9).double(), one_hot(torch.arange(6) % 3, 3).double()
    torch.testing.assert_close(ridge(z.repeat(2, 1), y.repeat(2, 1), 0.4), ridge(z, y, 0.4))

    def by_the_sum(z, y, penalty):
        return z.T @ torch.linalg.solve(z @ z.T + penalty * torch.eye(len(z), dtype=z.dtype), y)

    assert not torch.allclose(
        by_the_sum(z.repeat(2, 1), y.repeat(2, 1), 0.4), by_the_sum(z, y, 0.4)
    )

    x, targets = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    weights, _ = posterior(
        x, targets, torch.zeros(3).double(), 4 * torch.eye(3).double(), noise=0.5
    )
    torch.testing.assert_close(ridge(x, targets, 0.5**2 / 4 / 6)[:, 0], weights)


def test_float32_needs_a_penalty():
    # cell 15cf0041
    torch.manual_seed(0)
    z = torch.randn(6, 20)
    z[1] = z[0] + 1e-4 * torch.randn(20)  # two drawings that are nearly alike
    y = one_hot(torch.arange(6), 6)

    def digits_lost(penalty):
        exact = ridge(z.double(), y.double(), penalty)
        return ((ridge(z, y, penalty) - exact).norm() / exact.norm()).item()

    assert digits_lost(1e-2) < 1e-4 < 1e-3 < digits_lost(1e-12)


def test_the_linear_kernel_gives_the_same_head():
    # cell 15cf0044
    def kernel_ridge(kernel, x, y, queries, penalty):
        "Answers to queries by ridge regression in the feature space of a kernel."
        K = kernel(x, x)
        weights = torch.linalg.solve(K + len(x) * penalty * torch.eye(len(x), dtype=K.dtype), y)
        return kernel(queries, x) @ weights

    z, y, queries = (
        torch.randn(6, 9).double(),
        torch.randn(6, 2).double(),
        torch.randn(4, 9).double(),
    )
    same = kernel_ridge(lambda a, b: a @ b.T, z, y, queries, 0.3)
    torch.testing.assert_close(same, queries @ ridge(z, y, 0.3))


def test_newton_steps_reach_the_logistic_head():
    answer, embeddings, newton, newton_step, signs = cell_15cf0045()


def test_the_last_step_has_the_whole_gradient():
    answer, embeddings, newton, newton_step, signs = cell_15cf0045()
    # cell aeaab839
    # At the bottom the gradient of the price is zero and stays zero when the embeddings move.  One Newton step answers a
    # move of the gradient by minus its inverse curvature: that is the implicit function theorem.  How the bottom was
    # reached does not matter, and nothing of the walk is kept in memory.
    moving = embeddings.clone().requires_grad_()
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(newton + 1):
        w = newton_step(w, moving, signs, 0.1)
    (through_all,) = torch.autograd.grad(w[0], moving)
    (through_one,) = torch.autograd.grad(newton_step(answer, moving, signs, 0.1)[0], moving)
    torch.testing.assert_close(through_one, through_all)
    assert through_one.abs().max() > 0.01
