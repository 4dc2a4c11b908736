"""Made from nbs/09_linear_world.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from metabook.engine import losses
from metabook.episodes import Episode, Examples
from metabook.linear_world import (
    LinearTasks,
    descent_error,
    implied_precision,
    learn_prior,
    maml_start,
    posterior,
    second_moment,
    shared_mean,
    walk,
)
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.testing import check_learner


def cell_09cf0030():
    # cell 09cf0030
    def real_maml(start, lr, steps, n):
        "MAML whose network is x . theta; `lr` as in `walk`, for support sets of n examples."
        net = nn.Linear(len(start), 1, bias=False).to(start)
        with torch.no_grad():
            net.weight.copy_(start)
        return MAML(net, lr * n / 2, steps, kind="regression")

    return real_maml


def test_the_world_is_what_it_says():
    # cell 09cf0011
    covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    tasks = LinearTasks(torch.tensor([3.0, -1.0]).double(), covariance, noise=0.5, shot=3, query=4)
    episodes = tasks.sample(50_000, torch.Generator().manual_seed(0))
    theta = episodes.support.info["task"]
    assert episodes.support.x.shape == (50_000, 3, 2) and episodes.query.y.shape == (50_000, 4, 1)
    torch.testing.assert_close(theta.mean(0), tasks.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(theta.T.cov(), covariance, atol=0.04, rtol=0)
    left = episodes.query.y - episodes.query.x @ theta[..., None]
    assert abs(left.std().item() - 0.5) < 0.01


def test_its_tasks_keep_the_contract():
    # cell 09cf0012
    check_learner(
        MAML(MLP([3, 1]), 0.05, kind="regression"), LinearTasks(torch.ones(3), torch.eye(3))
    )
    same = [LinearTasks(torch.ones(3), torch.eye(3)).freeze(4).hash for _ in range(2)]
    other = LinearTasks(torch.zeros(3), torch.eye(3)).freeze(4).hash
    assert same[0] == same[1] != other  # another mean is another name
    for wrong in (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="expected a symmetric matrix"):
            LinearTasks(torch.zeros(2), wrong)
    with pytest.raises(ValueError, match="positive"):
        LinearTasks(torch.zeros(2), torch.eye(2), noise=0.0)


@pytest.mark.proves("eq-linear-posterior")
def test_precisions_add_up():
    # cell 09cf0016
    torch.manual_seed(0)
    mean, root = torch.randn(4).double(), torch.randn(4, 4).double()
    covariance, noise = root @ root.T, 0.7
    x, y = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 1).double()  # five tasks
    theta, left = posterior(x, y, mean, covariance, noise)
    precision = covariance.inverse() + x.mT @ x / noise**2
    pull = (covariance.inverse() @ mean)[:, None] + x.mT @ y / noise**2
    torch.testing.assert_close(left, precision.inverse())
    torch.testing.assert_close(theta[..., None], torch.linalg.solve(precision, pull))

    one = posterior(torch.ones(1, 1), torch.tensor([[5.0]]), torch.tensor([3.0]), torch.eye(1), 2.0)
    torch.testing.assert_close(one[0], torch.tensor([3 + 0.2 * 2]))  # s = 1, sigma = 2
    torch.testing.assert_close(one[1], torch.tensor([[0.8]]))


@pytest.mark.proves("eq-linear-mean")
def test_the_mean_of_the_tasks():
    # cell 09cf0019
    covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    tasks = LinearTasks(torch.tensor([3.0, -1.0]).double(), covariance, noise=0.5, shot=3, query=1)
    side = tasks.sample(6, torch.Generator().manual_seed(0)).support
    mu = shared_mean(side.x, side.y, covariance, 0.5)[0].requires_grad_()
    v = side.x @ covariance @ side.x.mT + 0.25 * torch.eye(3)
    law = torch.distributions.MultivariateNormal((side.x @ mu[:, None])[..., 0], v)
    (g,) = torch.autograd.grad(law.log_prob(side.y[..., 0]).sum(), mu)
    assert g.abs().max() < 1e-9  # nothing is likelier

    many = tasks.sample(24_000, torch.Generator().manual_seed(1)).support
    x, y = (t.unflatten(0, (4000, 6)) for t in many[:2])
    x[:] = side.x  # the same inputs 4000 times, other parameters and noise
    y = x @ many.info["task"].unflatten(0, (4000, 6))[..., None]
    y = y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
    means = torch.stack([shared_mean(*pair, covariance, 0.5)[0] for pair in zip(x, y, strict=True)])
    expected = shared_mean(side.x, side.y, covariance, 0.5)[1]
    torch.testing.assert_close(means.T.cov(), expected, atol=0, rtol=0.15)


@pytest.mark.proves("eq-linear-em")
def test_each_round_makes_the_data_likelier():
    # cell 09cf0026
    def likelihood(prior, side, noise):
        mean, covariance = prior
        v = side.x @ covariance @ side.x.mT + noise**2 * torch.eye(side.x.shape[1])
        law = torch.distributions.MultivariateNormal((side.x @ mean[:, None])[..., 0], v)
        return law.log_prob(side.y[..., 0]).sum()

    covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    tasks = LinearTasks(torch.tensor([3.0, -1.0]).double(), covariance, noise=0.5, shot=3, query=1)
    side = tasks.sample(300, torch.Generator().manual_seed(0)).support
    rounds = [learn_prior(side.x, side.y, 0.5, steps) for steps in range(8)]
    said = torch.stack([likelihood(prior, side, 0.5) for prior in rounds])
    assert (said.diff() > 0).all()
    prior = [t.requires_grad_() for t in learn_prior(side.x, side.y, 0.5, 400)]
    for g in torch.autograd.grad(likelihood(prior, side, 0.5), prior):
        assert g.abs().max() < 1e-6


@pytest.mark.proves("eq-linear-walk", "eq-linear-implied", "eq-linear-axis")
def test_steps_are_a_prior():
    real_maml = cell_09cf0030()
    # cell 09cf0031
    torch.manual_seed(0)
    x, y, start = torch.randn(3, 5).double(), torch.randn(3, 1).double(), torch.randn(5).double()
    for lr, steps in ((0.05, 1), (0.05, 7), (0.2, 2)):
        phi, _ = real_maml(start, lr, steps, 3).adapt(Examples(x, y))
        precision = implied_precision(x, lr, steps)
        p, u = walk(x, lr, steps)
        torch.testing.assert_close(phi["weight"][0], p @ start + u @ x.T @ y[:, 0])
        bayes, _ = posterior(x, y, start, 0.3**2 * precision.inverse(), 0.3)
        torch.testing.assert_close(phi["weight"][0], bayes)
        kappa, axes = torch.linalg.eigh(x.T @ x)
        left = (1 - lr * kappa[2:]) ** steps  # two directions of five are not seen
        along = torch.cat([torch.ones(2) / (lr * steps), kappa[2:] * left / (1 - left)])
        torch.testing.assert_close(axes.T @ precision @ axes, along.diag())

    torch.testing.assert_close(  # by hand
        implied_precision(torch.ones(1, 1), 0.5, 1), torch.ones(1, 1)
    )


def test_small_steps():
    # cell 09cf0032
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    for lr, near in ((1e-2, 0.5), (1e-4, 5e-3), (1e-6, 5e-5)):
        ratio = lr * 4 * implied_precision(x, lr, 4)
        assert (ratio - torch.eye(5)).abs().max() < near
    kappa, u = torch.tensor(2.0).double(), 0.7
    fine = implied_precision(kappa.sqrt()[None, None], u / 100_000, 100_000)[0, 0]
    assert abs(fine - kappa / math.expm1(kappa * u)) < 1e-4


@pytest.mark.proves("eq-linear-objective")
def test_nothing_is_left_to_learn():
    real_maml = cell_09cf0030()
    # cell 09cf0037
    tasks = LinearTasks(torch.ones(5).double(), torch.eye(5).double(), shot=3, query=4)
    episodes = tasks.sample(12, torch.Generator().manual_seed(0))
    learner = real_maml(maml_start(episodes, 0.1, 3), 0.1, 3, 3)
    losses(learner, episodes).mean().backward()  # the meta-gradient of the real MAML
    assert learner.net.weight.grad.abs().max() < 1e-12


@pytest.mark.proves("eq-linear-error")
def test_the_error_has_three_terms():
    # cell 09cf0040
    covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    tasks = LinearTasks(torch.tensor([3.0, -1.0]).double(), covariance, noise=2.0, shot=1, query=1)
    side = tasks.sample(200_000, torch.Generator().manual_seed(0)).support
    start = torch.tensor([2.0, 0.0]).double()
    p, u = walk(side.x, 0.1, 3)
    phi = p @ start + (u @ side.x.mT @ side.y)[..., 0]
    found = (phi - side.info["task"]).square().sum(-1).mean()
    formula = descent_error(side.x, start, tasks.mean, covariance, 2.0, 0.1, 3)
    assert abs(found / formula - 1) < 0.01


@pytest.mark.proves("eq-linear-moment")
def test_moments_find_the_subspace():
    # cell 09cf0053
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(10, 2).double())  # two directions of ten
    mean = basis @ torch.tensor([1.0, 0.0]).double()
    tasks = LinearTasks(mean, basis @ basis.T, noise=0.5, shot=2, query=1)
    side = tasks.sample(100_000, torch.Generator().manual_seed(0)).support
    found = second_moment(side.x, side.y)
    exact = basis @ basis.T + mean[:, None] * mean
    assert (found - exact).abs().max() < 0.1
    leading = torch.linalg.eigh(found).eigenvectors[:, -2:]
    overlap = torch.linalg.svdvals(
        leading.T @ basis
    )  # cosines of the angles between the two planes
    assert overlap.min() > 0.99


def test_another_task_another_prior():
    # cell 09cf0055
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    first, turned = (implied_precision(inputs, 0.1, 5) for inputs in (x, x.flip(1)))
    assert not torch.allclose(first, turned)  # one start, one rate, two priors
    assert first[0, 0] < 0.4 * first[1, 1]  # what is measured better is believed to vary more
    torch.testing.assert_close(first, turned.flip(0, 1))


def test_a_negative_precision_is_no_prior():
    # cell 09cf0057
    x = torch.ones(1, 1).double()  # curvature 1
    assert implied_precision(x, 1.5, 3) < 0 < implied_precision(x, 1.5, 2)
    p, u = walk(x, 2.0, 2)
    assert abs(p.item() - 1) < 1e-12 and abs(u.item()) < 1e-12


def test_point_estimates_collapse():
    # cell 09cf0059
    tasks = LinearTasks(torch.zeros(4).double(), torch.eye(4).double(), shot=2, query=1)
    side = tasks.sample(400, torch.Generator().manual_seed(0)).support
    covariance = torch.eye(4).double()
    for _ in range(60):
        theta, _ = posterior(side.x, side.y, torch.zeros(4).double(), covariance, 1.0)
        covariance = theta.mT @ theta / 400
    assert covariance.trace() < 0.2  # the truth is 4
    assert abs(learn_prior(side.x, side.y, 1.0)[1].trace() - 4) < 0.8


def test_what_no_example_shows():
    # cell 09cf0061
    # Sigma_T projects on what the n examples do not show: D - n directions of variance 1.
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).double()
    _, left = posterior(
        x, torch.zeros(4, 1).double(), torch.zeros(10).double(), torch.eye(10).double(), 1e-5
    )
    assert abs(left.trace() - 6) < 1e-6


def test_least_norm_solutions_have_another_mean():
    # cell 09cf0062
    # X^+ X projects on the n directions that were seen: on average n / D of mu.  Weighted least squares divides by that.
    tasks = LinearTasks(torch.full((6,), 3.0).double(), torch.eye(6).double(), shot=2, query=1)
    side = tasks.sample(20_000, torch.Generator().manual_seed(0)).support
    projected = (torch.linalg.pinv(side.x) @ side.x).mean(0)
    torch.testing.assert_close(projected, torch.eye(6).double() * 2 / 6, atol=0.02, rtol=0)
    noiseless = (torch.linalg.pinv(side.x) @ side.x @ side.info["task"][..., None]).mean((0, 2))
    assert (noiseless - 1).abs().max() < 0.1  # a third of 3
    assert (shared_mean(side.x, side.y, torch.eye(6).double(), 1.0)[0] - 3).abs().max() < 0.1


def test_without_a_split():
    # cell 09cf0063
    # The gradient is then E[P H P (theta - theta*_T)] plus noise of mean zero: other weights, but all have the mean mu,
    # because a task does not depend on its inputs.  With 120 tasks of twenty examples the whole is nearer than the split,
    # as Bai et al. 2021 prove for a relative of MAML.  Where the data are not linear, the split is what one can trust.
    tasks = LinearTasks(torch.ones(20).double(), torch.eye(20).double())
    draws, off = torch.Generator().manual_seed(0), {"split": [], "whole": []}
    for _ in range(20):
        episodes = tasks.sample(120, draws)
        x, y = (torch.cat(p, 1) for p in zip(episodes.support[:2], episodes.query[:2], strict=True))
        whole = Episode(Examples(x, y), Examples(x, y))
        for name, data in (("split", episodes), ("whole", whole)):
            off[name].append((maml_start(data, 0.01, 10) - 1).square().sum())
    off = {name: torch.stack(values).mean().item() for name, values in off.items()}
    assert off["whole"] < off["split"] < 1
    print(off)


def test_noise_that_differs():
    # cell 09cf0066
    # Each V_T holds the noise of its own task.  With one noise for all, the mean stays unbiased, but loud tasks count too
    # much; EM then takes what it cannot explain by noise for spread of the tasks.  Descent should stop earlier where it is
    # loud, as 1 / (alpha t) plays the part of sigma^2: one number of steps cannot suit both.
    quiet, loud = (LinearTasks(torch.zeros(5), torch.eye(5), s, 3, 1) for s in (0.3, 3.0))
    draws, off = torch.Generator().manual_seed(0), {"own": [], "one": []}
    for _ in range(40):
        parts = [(tasks.sample(30, draws).support, tasks.noise) for tasks in (quiet, loud)]
        means, spreads = zip(
            *(shared_mean(s.x, s.y, torch.eye(5), noise) for s, noise in parts), strict=True
        )
        pull = sum(torch.linalg.solve(v, m) for v, m in zip(spreads, means, strict=True))
        off["own"].append(
            torch.linalg.solve(sum(v.inverse() for v in spreads), pull).square().sum()
        )
        x, y = (torch.cat([s[i] for s, _ in parts]) for i in (0, 1))
        off["one"].append(shared_mean(x, y, torch.eye(5), (9.09 / 2) ** 0.5)[0].square().sum())
    assert torch.stack(off["own"]).mean() < 0.8 * torch.stack(off["one"]).mean()
