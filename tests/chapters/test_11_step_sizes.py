"""Made from nbs/11_step_sizes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabook.datasets import Glyphs
from metabook.engine import losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids
from metabook.learners import set_progress
from metabook.maml import MAML
from metabook.networks import MLP, BatchNorm, Conv4
from metabook.step_sizes import MAMLpp, MetaSGD, step_weights
from metabook.testing import check_learner


def cell_11a00012():
    # cell 11a00012
    def plane_task(curvature, best, angle=0.0):
        "Points whose mean squared error is 1/2 sum of curvature * (theta - best)^2, in axes turned by `angle`."
        r = torch.diag(torch.as_tensor(curvature).double().sqrt())
        c, s = math.cos(angle), math.sin(angle)
        r = r @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
        x = torch.cat([r, -r])
        side = Examples(x, x @ torch.as_tensor(best).double()[:, None])
        return Episode(side, side)

    def plane_net(theta=(0.0, 0.0)):
        "The network theta . x, whose constant term stays 0."
        net = MLP([2, 1]).double()
        with torch.no_grad():
            net.layers[0].weight.copy_(torch.as_tensor(theta))
            net.layers[0].bias.zero_()
        return net

    return plane_net, plane_task


@pytest.mark.proves("eq-steps-meta-sgd", "eq-steps-rate-gradient")
def test_a_step_by_hand():
    plane_net, plane_task = cell_11a00012()
    # cell 11a00013
    learner = MetaSGD(plane_net(), lr=0.1, kind="regression").double()
    with torch.no_grad():
        learner.rates[0].copy_(torch.tensor([[0.1, 0.5]]))
    task = plane_task([4.0, 1.0], [1.0, 2.0])
    phi, _ = learner.adapt(task.support)
    torch.testing.assert_close(phi["layers.0.weight"], torch.tensor([[0.4, 1.0]]).double())
    (of_rates,) = torch.autograd.grad(learner.loss(task), learner.rates[0])
    torch.testing.assert_close(of_rates, torch.tensor([[-9.6, -2.0]]).double())


def test_equal_rates_are_maml():
    # cell 11a00014
    torch.manual_seed(0)
    net = MLP([1, 8, 1]).double()
    batch = Sinusoids(5, 10).sample(3).to(dtype=torch.float64)
    how = {"lr": 0.02, "steps": 3, "kind": "regression"}
    torch.testing.assert_close(
        losses(MetaSGD(net, **how).double(), batch), losses(MAML(net, **how), batch)
    )


def test_meta_sgd_keeps_the_contract():
    # cell 11a00015
    torch.manual_seed(0)
    check_learner(MetaSGD(MLP([1, 6, 1]), lr=0.02, steps=2, kind="regression"), Sinusoids(5, 6))
    frozen = MLP([1, 6, 1])
    frozen.layers[0].requires_grad_(False)  # what does not adapt needs no rate
    assert sum(r.requires_grad for r in MetaSGD(frozen, kind="regression").rates) == 2
    with pytest.raises(ValueError, match=r"weight has no size yet.*show the network some inputs"):
        MetaSGD(nn.LazyLinear(1))


@pytest.mark.proves("eq-steps-best-rate", "eq-steps-left-over")
def test_the_best_rate_and_what_it_leaves():
    plane_net, plane_task = cell_11a00012()
    # cell 11a00017
    torch.manual_seed(0)
    curvatures, bests = 1 + torch.rand(30, 2).double(), torch.randn(30, 2).double()
    square = bests.square()  # of the distance from the start at 0
    best_rates = (curvatures**2 * square).mean(0) / (curvatures**3 * square).mean(0)
    left = (curvatures * square).mean(0) - (curvatures**2 * square).mean(0) * best_rates

    tasks = [plane_task(k, b) for k, b in zip(curvatures, bests, strict=True)]
    learner = MetaSGD(plane_net(), kind="regression").double()
    with torch.no_grad():
        learner.rates[0].copy_(best_rates[None])
    mean_loss = torch.stack([learner.loss(task) for task in tasks]).mean()
    torch.testing.assert_close(mean_loss, left.sum() / 2)
    (slope,) = torch.autograd.grad(mean_loss, learner.rates[0])
    assert slope.abs().max() < 1e-12

    shared = torch.tensor([1.0, 8.0]).double()
    with torch.no_grad():
        learner.rates[0].copy_(1 / shared[None])
    assert all(learner.loss(plane_task(shared, b)) < 1e-24 for b in bests)  # exact


def test_turned_valleys_gain_nothing():
    plane_net, plane_task = cell_11a00012()

    # cell 4e4589e3
    def share_left(angle, rates):
        "What one step leaves of the loss, and its slope by the rates; one task for each direction."
        tasks = [plane_task([1.0, 8.0], best, angle) for best in ([1.0, 0.0], [0.0, 1.0])]
        learner = MetaSGD(plane_net(), kind="regression").double()
        before = sum((t.support.y**2).mean() for t in tasks)  # at theta = 0
        with torch.no_grad():
            learner.rates[0].copy_(torch.tensor([rates], dtype=torch.float64))
        left = sum(learner.loss(task) for task in tasks) / before
        return left.item(), torch.autograd.grad(left, learner.rates[0])[0]

    one = [65 / 513, 65 / 513]
    turned, slope = share_left(math.pi / 4, one)
    assert slope.abs().max() < 1e-12  # the loss is convex in the rates, so none are better
    assert abs(turned - (1 - 65**2 / (9 * 513))) < 1e-12
    along, _ = share_left(0.0, one)
    assert abs(turned - along) < 1e-12  # what one rate leaves of valleys along the axes
    assert share_left(0.0, [1.0, 1 / 8])[0] < 1e-20  # which two rates end exactly


@pytest.mark.proves("eq-steps-multi", "eq-steps-annealed", "eq-steps-per-layer")
def test_two_steps_by_hand():
    plane_net, plane_task = cell_11a00012()
    # cell 11a00027
    learner = MAMLpp(plane_net(), lr=0.1, steps=2, test_steps=3, multi_step=0.5, kind="regression")
    learner.double()
    with torch.no_grad():
        learner.rates.copy_(torch.tensor([[0.1, 0.1], [0.2, 0.2]]))  # [steps, layers]
    task = plane_task([4.0, 1.0], [1.0, 2.0])
    for progress, expected in ((0.0, 1.7028), (0.25, 1.3842), (0.5, 1.0656), (1.0, 1.0656)):
        set_progress(learner, progress)
        assert abs(learner.loss(task).item() - expected) < 1e-6
    weights = {r: step_weights(torch.tensor(r), 5) for r in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(weights[0.0], torch.full((5,), 0.2))
    torch.testing.assert_close(weights[0.5], torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]))
    torch.testing.assert_close(weights[1.0], torch.tensor([0.006, 0.006, 0.006, 0.006, 0.976]))

    phi, _ = learner.eval().adapt(task.support)  # a third step takes the last one's rates
    torch.testing.assert_close(phi["layers.0.weight"], torch.tensor([[0.976, 0.848]]).double())


def test_the_phases_of_a_training():
    # cell 11a00028
    torch.manual_seed(0)
    net, batch = MLP([1, 6, 1]).double(), Sinusoids(5, 6).sample(2).to(dtype=torch.float64)
    how = {"lr": 0.02, "steps": 3, "kind": "regression"}
    learner = MAMLpp(net, multi_step=0.0, first_order_until=0.5, **how).double()

    def gradients_of(learner):
        return torch.autograd.grad(losses(learner, batch).mean(), list(net.parameters()))

    for progress, first_order in ((0.0, True), (0.49, True), (0.5, False), (1.0, False)):
        set_progress(learner, progress)
        torch.testing.assert_close(
            gradients_of(learner), gradients_of(MAML(net, first_order=first_order, **how))
        )


def test_each_step_has_its_normalisation():
    # cell 11a00029
    torch.manual_seed(0)
    net = Conv4(out=3, size=16, width=4, pool="stride", stats="support")
    learner = MAMLpp(net, lr=0.3, steps=2).double()
    images = torch.randn(6, 1, 16, 16).double()
    support = Examples.of(images, torch.arange(6) % 3, 3)
    support = support._replace(y=support.y.double())
    with torch.no_grad():
        for change in learner.changes:
            change.copy_(torch.randn_like(change))
    own = dict(net.named_parameters())
    states = list(learner.path(support))
    for j, (phi, *_) in enumerate(states[1:]):  # no inner step moves them; each step has its own
        for k, change in zip(learner.norms, learner.changes, strict=True):
            torch.testing.assert_close(phi[k], own[k] + change[j])
    _, one = learner.result(states[1], support)
    _, two = learner.result(states[2], support)
    assert all(not torch.allclose(one[k], two[k]) for k in one)  # statistics of each step
    answers = learner.predict(learner.adapt(support), images)
    alone = torch.cat([learner.predict(learner.adapt(support), x[None]) for x in images])
    torch.testing.assert_close(answers, alone)


def test_as_the_reference_computes_it():
    # cell e8e2ed14
    torch.manual_seed(
        0
    )  # the authors' loop by hand: 3 steps, epoch 5 of a phase of 15, training of 100
    net = nn.Sequential(nn.Linear(3, 4), BatchNorm(4), nn.ReLU(), nn.Linear(4, 3)).double()
    learner = MAMLpp(net, lr=0.1, steps=3, multi_step=0.15).double()
    with torch.no_grad():
        learner.rates.mul_(1 + torch.rand_like(learner.rates))
        for change in learner.changes:
            change.copy_(0.3 * torch.randn_like(change))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    x, q = torch.randn(2, 6, 3).double()
    task = Episode(*(Examples(z, F.one_hot(labels, 3).double()) for z in (x, q)))

    def cross_entropy(z, w, j):
        "The loss of the network of weights w with the normalisation of step j: always by the batch."
        factor, summand = net[1].weight + learner.changes[0][j], net[1].bias + learner.changes[1][j]
        h = F.linear(z, w["0.weight"], w["0.bias"])
        h = F.batch_norm(h, None, None, factor, summand, training=True, eps=net[1].eps)
        return F.cross_entropy(F.linear(h.relu(), w["3.weight"], w["3.bias"]), labels)

    w = {k: p for k, p in net.named_parameters() if not k.startswith("1.")}
    early = max(1 / 3 - 5 * (1 / 3 / 15), 0.03 / 3)
    total = 0.0
    for j, u in enumerate([early, early, 1 - 2 * early]):
        g = torch.autograd.grad(cross_entropy(x, w, j), list(w.values()), create_graph=True)
        w = {k: w[k] - learner.rates[j, i] * g[i] for i, k in enumerate(w)}
        total = total + u * cross_entropy(q, w, j)  # the norm of the step just taken

    set_progress(learner, 5 / 100)
    learned = list(learner.parameters())
    torch.testing.assert_close(learner.loss(task), total, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(z, learned) for z in (learner.loss(task), total))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_repair_can_be_left_out():
    # cell 441db642
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), BatchNorm(4), nn.ReLU(), nn.Linear(4, 3)).double()
    how = {"lr": 0.1, "steps": 2}
    bare = MAMLpp(net, multi_step=0.0, learn_rates=False, step_norms=False, **how).double()
    assert not bare.rates.requires_grad and not bare.norms and bare.rates.shape == (2, 6)
    side = Examples(torch.randn(6, 3).double(), F.one_hot(torch.arange(6) % 3, 3).double())
    torch.testing.assert_close(  # MAML again, which moves factor and summand too
        bare.loss(Episode(side, side)),
        MAML(net, **how).loss(Episode(side, side)),
        rtol=1e-6,
        atol=1e-6,
    )
    whole = MAMLpp(net, **how)
    assert whole.rates.requires_grad and whole.norms == ["1.weight", "1.bias"]


def test_mamlpp_keeps_the_contract():
    # cell 11a00030
    letters = FewShot(Glyphs("val"), 3, 2, 2)
    torch.manual_seed(0)
    net = Conv4(out=3, width=4, pool="stride", stats="support")
    check_learner(MAMLpp(net, lr=0.2, steps=2, first_order_until=0.5), letters)
    with pytest.raises(ValueError, match="steps=0, expected an integer of at least 1"):
        MAMLpp(MLP([1, 1]), steps=0)
    with pytest.raises(ValueError, match=r"multi_step=1\.5, expected a share from 0 to 1"):
        MAMLpp(MLP([1, 1]), multi_step=1.5)


def test_a_clamp_is_a_trap():
    plane_net, plane_task = cell_11a00012()
    # cell 11a00042
    support, query = (plane_task([1.0, 1.0], best) for best in ([1.0, 1.0], [-1.0, 1.0]))
    task = Episode(support.support, query.query)  # in the first coordinate the support set misleads

    class Clamped(MetaSGD):
        "The mistake: rates that must not become negative."

        def step(self, phi, support):
            g = self.gradient(phi, support)
            alpha = dict(zip(phi, (r.clamp(min=0.0) for r in self.rates), strict=True))
            return {k: p - alpha[k] * g[k] for k, p in phi.items()}

    def descended(cls):
        learner = cls(plane_net(), lr=0.1, kind="regression").double()
        for _ in range(200):
            (slope,) = torch.autograd.grad(learner.loss(task), learner.rates[0])
            with torch.no_grad():
                learner.rates[0] -= 0.1 * slope
        return learner.loss(task).item(), learner.rates[0][0, 0].item()

    free, clamped = descended(MetaSGD), descended(Clamped)
    assert free[1] < -0.9 and free[0] < 1e-6  # up the slope, exactly
    assert clamped[1] <= 0.0 and clamped[0] > 0.49  # stuck: nothing is learned about this parameter


def test_buffers_that_nobody_reads():
    # cell 11a00044
    x, means, variances = torch.randn(6, 3, 4, 4), torch.zeros(2, 3), torch.ones(2, 3)

    def normalised(step, training):
        "Batch norm with the running statistics of a step, on copies."
        return F.batch_norm(x, means[step].clone(), variances[step].clone(), training=training)

    before = normalised(1, training=True), normalised(1, training=False)
    means[1] += 5
    assert torch.equal(normalised(1, training=True), before[0])  # the mistake: nobody noticed
    assert not torch.allclose(normalised(1, training=False), before[1])

    torch.manual_seed(0)  # ours: what the queries get depends on the support set's statistics
    net = Conv4(out=3, size=16, width=4, pool="stride", stats="support")
    learner, images = MAMLpp(net, lr=0.1, steps=2).eval(), torch.randn(5, 1, 16, 16)
    phi, statistics = learner.adapt(Examples.of(images[:3], torch.arange(3), 3))
    shifted = {k: v + 1 for k, v in statistics.items()}
    assert not torch.allclose(
        learner.predict((phi, shifted), images), learner.predict((phi, statistics), images)
    )


def test_rates_that_nobody_keeps():
    plane_net, plane_task = cell_11a00012()

    # cell 0af68d82
    class Forgetful(MAML):
        "The mistake: rates in a plain dictionary."

        def __init__(self, net):
            super().__init__(net)
            self.rates = {
                k: nn.Parameter(torch.full_like(p, 0.4)) for k, p in net.named_parameters()
            }

    def kept(learner):
        return sum("rates" in name for name in learner.state_dict())

    assert kept(Forgetful(plane_net())) == 0  # neither saved nor moved to another device
    assert kept(MetaSGD(plane_net())) == 2 and kept(MAMLpp(plane_net())) == 1


def test_an_average_of_answers_is_another_method():
    # cell 11a00046
    torch.manual_seed(0)
    truth = torch.arange(2000) % 5
    one_hot_truth = F.one_hot(truth, 5).float()
    networks = one_hot_truth + torch.randn(
        5, 2000, 5
    )  # five equally good, with errors of their own
    single = (networks.argmax(-1) == truth).float().mean()
    ensemble = (networks.mean(0).argmax(-1) == truth).float().mean()
    assert ensemble > single + 0.2  # no network became better


def test_two_tasks_in_one_dimension():
    # cell 11a00048
    # (1 + 16) / (1 + 64) = 17/65: near 1/4, for the steep task decides.
    kappa = torch.tensor([1.0, 4.0])
    best = (kappa**2).mean() / (kappa**3).mean()
    torch.testing.assert_close(best, torch.tensor(17 / 65))
    left = 0.5 * (kappa * (1 - best * kappa) ** 2).mean()
    torch.testing.assert_close(left, torch.tensor(0.5 * (2.5 - 8.5**2 / 32.5)))


def test_two_rates_for_one_coordinate():
    plane_net, plane_task = cell_11a00012()
    # cell 11a00049
    # The steps leave (1 - a k)(1 - b k) of the distance: the rates 1 and 1/4, in either order, are exact for both tasks.
    # One rate twice leaves (1 - a k)^2, which is zero for one curvature only.  t rates suit t curvatures.
    for kappa in (1.0, 4.0):
        task = plane_task([kappa, kappa], [1.0, 1.0])
        learner = MAMLpp(plane_net(), steps=2, kind="regression").double()
        with torch.no_grad():
            learner.rates.copy_(torch.tensor([[1.0, 1.0], [0.25, 0.25]]))
        assert learner.loss(task) < 1e-20


def test_the_logarithm_of_a_rate():
    # cell 11a00050
    # `a_step_by_hand`: the parameters after the step.  log 0.1 = -2.3, so the step goes up the slope, 23 times too far.
    # A test of the direction of the loss alone would need luck; a step by hand does not.
    theta, g, log_rate = torch.zeros(2), torch.tensor([-4.0, -2.0]), torch.tensor(0.1).log()
    assert torch.allclose(theta - log_rate.exp() * g, torch.tensor([0.4, 0.2]))
    assert (theta - log_rate * g < 0).all()  # the mistake


def test_a_rate_for_each_layer():
    plane_net, plane_task = cell_11a00012()

    # cell 11a00051
    class ByLayer(MAMLpp):
        "One row of rates, for all steps."

        def __init__(self, net, lr=0.1, steps=5, kind="regression"):
            super().__init__(net, lr, steps, multi_step=0.0, kind=kind)
            self.rates = nn.Parameter(self.rates.detach()[:1])  # `later` repeats the last row

    learner = ByLayer(plane_net(), steps=3).double()
    assert learner.rates.shape == (1, 2)
    task = plane_task([4.0, 1.0], [1.0, 2.0])
    plain = MAML(plane_net(), lr=0.1, steps=3, kind="regression")
    torch.testing.assert_close(learner.loss(task), plain.loss(task), rtol=1e-6, atol=1e-6)


def test_ten_training_tasks():
    # cell 11a00052
    # Ten sinusoids, of which new points are drawn. Train MAML and MetaSGD on `Ten(5, 10)`, test both on `Ten(5, 50)` and on
    # `Sinusoids(5, 50)`: what a method gains on the ten and not on new ones is overfit. One seed does not answer it: take
    # five, and the paired difference of the two gaps.
    class Ten(Sinusoids):
        def draw(self, n, generator=None):
            known = super().draw(10, torch.Generator().manual_seed(3)).task
            which = torch.randint(10, (n,), generator=generator)
            return super().draw(n, generator)._replace(task=known[which])

    drawn = Ten(5, 10).sample(200)
    assert len(drawn.support.info["task"].unique(dim=0)) == 10
    assert len(drawn.support.x.unique(dim=0)) == 200
