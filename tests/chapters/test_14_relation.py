"""Made from nbs/14_relation.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.func import grad

from metabook.classes import Classes
from metabook.episodes import Examples, FewShot, one_hot
from metabook.networks import MLP, BatchNorm, Conv4
from metabook.prototypes import ProtoNet
from metabook.relation import RelationNet, all_pairs, pooled
from metabook.testing import CHECKS, check_learner


def cell_14re0008():
    # cell 14re0008
    def log_ratio(z, other, share):
        "log Lambda: both have variance 1, of which `share` is between classes."
        nearness = (z - other).square() / (1 - share)
        farness = (z + other).square() / (1 + share)
        return -0.5 * math.log(1 - share**2) + share / 4 * (farness - nearness)

    return log_ratio


def cell_14re0024():
    # cell 14re0024
    class Mahalanobis(nn.Module):
        "The relation module that is a distance: minus |V (c - z)|^2.  At the start V = I."

        def __init__(self, d):
            super().__init__()
            self.V = nn.Parameter(torch.eye(d))

        def forward(self, pairs):
            c, z = pairs.chunk(2, 1)
            return -((c - z) @ self.V.T).square().sum(1, keepdim=True)

    return Mahalanobis


@pytest.mark.proves("eq-relation-minimiser")
def test_the_best_score_is_a_share():
    # cell 14re0017
    learner = RelationNet(nn.Identity(), nn.Linear(4, 1))
    y = one_hot(torch.tensor([0] * 6 + [1] * 3 + [2]), 3).double()
    share_of = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)

    def cost(logits):
        return learner.criterion(logits.expand(10, 3), y)

    assert grad(cost)(share_of.logit()).abs().max() < 1e-12
    assert grad(cost)(share_of.logit() + 0.3).abs().max() > 1e-3


def test_the_base_rate_of_the_task():
    # cell 14re0060
    plain = RelationNet(nn.Identity(), module := nn.Linear(4, 1), base_rate=False)
    started = RelationNet(nn.Identity(), module)
    for way in (2, 3, 20):
        support = Examples(torch.randn(way, 2), torch.eye(way))
        x = torch.randn(6, 2)
        difference = plain(support, x) - started(support, x)
        torch.testing.assert_close(difference, torch.full((6, way), math.log(way - 1)))
    loose = RelationNet(
        nn.Identity(), module, "cross-entropy"
    )  # it does not see what all classes of a query share
    logits, y, shift = torch.randn(6, 3), one_hot(torch.arange(6) % 3, 3), torch.full((6, 1), 3.0)
    torch.testing.assert_close(loose.criterion(logits + shift, y), loose.criterion(logits, y))
    assert (plain.criterion(logits + shift, y) - plain.criterion(logits, y)).abs() > 1e-3


@pytest.mark.proves("eq-relation-odds", "eq-relation-posterior")
def test_odds_and_posterior():
    log_ratio = cell_14re0008()
    # cell 14re0011
    share, way = 0.8, 5

    class Exact(nn.Module):
        "The best relation module of the picture's world: it says log Lambda."

        def forward(self, pairs):
            return log_ratio(pairs[:, :1], pairs[:, 1:], share)

    z, shown = torch.tensor(0.7).double(), torch.randn(way).double()  # a query; one example a class
    both = torch.tensor([[1.0, share], [share, 1.0]]).double()
    one_class = MultivariateNormal(torch.zeros(2).double(), both)
    alone = Normal(torch.zeros(()).double(), 1.0)
    same = one_class.log_prob(torch.stack([z.expand(way), shown], 1)).exp()
    apart = (alone.log_prob(z) + alone.log_prob(shown)).exp()  # independent
    r = same / way / (same / way + (way - 1) / way * apart)  # Bayes' rule for a pair
    learner = RelationNet(nn.Identity(), Exact())
    logits = learner(Examples(shown[:, None], torch.eye(way).double()), z[None, None])[0]
    torch.testing.assert_close(r.logit(), logits)

    spread = math.sqrt(1 - share**2)  # of a query around `share` times what was shown
    posterior = Normal(share * shown, spread).log_prob(z).softmax(0)
    torch.testing.assert_close(logits.softmax(0), posterior)
    assert abs(torch.tensor(4 / 19).log().sigmoid().item() - 0.17) < 0.005


@pytest.mark.proves("eq-relation-score", "eq-relation-loss")
def test_one_step_of_the_paper():
    # cell 14re0019
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    compare = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1)).double()
    support = Examples(torch.rand(6, 1, 8, 8).double(), one_hot(torch.arange(6) // 2, 3).double())
    query, y = torch.rand(4, 1, 8, 8).double(), one_hot(torch.tensor([2, 0, 1, 1]), 3).double()

    learner = RelationNet(embed, compare, pool="sum", base_rate=False)
    ours = learner.criterion(learner(support, query), y)

    added = embed(support.x).view(3, 2, 3, 3, 3).sum(1)  # [class, channel, height, width]
    features, loss = embed(query), 0.0
    for i in range(4):
        for k in range(3):
            r = torch.sigmoid(compare(torch.cat([added[k], features[i]], 0)[None]))[0, 0]
            loss = loss + (r - y[i, k]) ** 2 / (4 * 3)
    torch.testing.assert_close(ours, loss)
    parameters = list(learner.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(loss, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_keeps_the_contract(device):
    # cell 14re0020
    class Normalised(nn.Module):
        "A relation module with a normalisation of its own."

        def __init__(self, stats):
            super().__init__()
            self.norm, self.last = BatchNorm(8, stats), nn.Linear(8, 1)

        def forward(self, pairs):
            return self.last(self.norm(pairs[:, :, None, None])[:, :, 0, 0])

    noise = Classes(torch.rand(96, 1, 16, 16), sizes=torch.full((8,), 12))
    tiny = FewShot(noise, way=3, shot=2, query=3)
    unnamed = [c for c in CHECKS if c.__name__ != "survives_saving"]  # for a class of this page
    for stats, module, error, pool, checks in (
        ("batch", MLP([8, 6, 1]), "squared", "mean", CHECKS),
        ("running", MLP([8, 6, 1]), "cross-entropy", "sum", CHECKS),
        ("support", Normalised("support"), "squared", "mean", unnamed),
    ):
        learner = RelationNet(Conv4(size=16, width=4, stats=stats), module, error, pool).to(device)
        check_learner(learner, tiny, checks=checks)
        assert learner.transductive == (stats == "batch")
    assert not RelationNet.head  # nothing in the networks has the size of the way


def test_what_is_refused():
    # cell 14re0021
    with pytest.raises(ValueError, match="did you mean 'squared'"):
        RelationNet(nn.Identity(), nn.Linear(4, 1), error="square")
    with pytest.raises(ValueError, match="unknown pool"):
        RelationNet(nn.Identity(), nn.Linear(4, 1), pool="product")
    two = Examples(torch.randn(4, 2), one_hot(torch.arange(4) % 2, 2))
    with pytest.raises(ValueError, match="expected one number for each pair"):
        RelationNet(nn.Identity(), nn.Linear(4, 3))(two, two.x)
    with pytest.raises(ValueError, match=r"relation.sizes=\[4,8,1\]"):
        RelationNet(nn.Identity(), MLP([128, 8, 1]))(two, two.x)
    with pytest.raises(
        ValueError, match=r"shape \(4,\) for 4 examples, expected a row of numbers or a map"
    ):
        RelationNet(nn.Flatten(0), nn.Linear(4, 1))(Examples(two.x[:, :1], two.y), two.x[:, :1])


@pytest.mark.proves("eq-relation-mahalanobis", "eq-relation-gauss")
def test_prototypes_are_a_relation():
    log_ratio = cell_14re0008()
    Mahalanobis = cell_14re0024()
    # cell 14re0025
    support = Examples(torch.randn(6, 4), one_hot(torch.arange(6) % 3, 3))
    query, module = torch.randn(5, 4), Mahalanobis(4)
    like = RelationNet(nn.Identity(), module, base_rate=False)
    torch.testing.assert_close(like(support, query), ProtoNet(nn.Identity())(support, query))
    module.V = nn.Parameter(torch.randn(4, 4))
    after = nn.Linear(4, 4, bias=False)
    after.weight = module.V
    learned = like(support, query)
    torch.testing.assert_close(learned, ProtoNet(after)(support, query), atol=1e-4, rtol=1e-4)
    c, z = query[0], query[1]
    M = module.V.T @ module.V
    torch.testing.assert_close(module(torch.cat([c, z])[None])[0, 0], -(c - z) @ M @ (c - z))

    both = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    alone = Normal(0.0, 1.0)
    pair = torch.tensor([0.4, -1.3])
    truth = both.log_prob(pair) - alone.log_prob(pair).sum()
    torch.testing.assert_close(log_ratio(*pair, 0.6), truth)


def test_a_sum_knows_the_number_of_shots():
    # cell 14re0038
    z, y = torch.randn(4, 3), one_hot(torch.arange(4) % 2, 2)
    twice = z.repeat(2, 1), y.repeat(2, 1)
    torch.testing.assert_close(pooled(*twice), pooled(z, y))
    torch.testing.assert_close(pooled(*twice, "sum"), 2 * pooled(z, y, "sum"))


def test_scores_that_are_stuck():
    # cell 14re0043
    learner, other = (
        RelationNet(nn.Identity(), nn.Linear(4, 1), e) for e in ("squared", "cross-entropy")
    )
    for way in (2, 5, 20):
        at_rate = learner.criterion(torch.full((way, way), -math.log(way - 1)), torch.eye(way))
        at_zero = learner.criterion(torch.full((way, way), -40.0), torch.eye(way))
        torch.testing.assert_close(at_rate, torch.tensor((way - 1) / way**2))
        torch.testing.assert_close(at_zero, torch.tensor(1 / way))

    wrong, y = torch.full((1, 5), -12.0), one_hot(torch.tensor([2]), 5)  # scores of 6e-6
    assert grad(lambda logits: learner.criterion(logits, y))(wrong).abs().max() < 1e-4
    assert grad(lambda logits: other.criterion(logits, y))(wrong).abs().max() > 0.5


def test_it_says_that_queries_see_one_another():
    # cell 14re0048
    def learner_with(stats):
        return RelationNet(Conv4(size=16, width=4, stats=stats), MLP([8, 6, 1]))

    assert learner_with("batch").transductive and not learner_with("running").transductive


def test_roles_matter():
    Mahalanobis = cell_14re0024()
    # cell 14re0050
    torch.manual_seed(0)
    compare, a, b = MLP([8, 16, 1]), torch.randn(1, 4), torch.randn(1, 4)
    forth, back = compare(all_pairs(a, b)), compare(all_pairs(b, a))
    assert (forth - back).abs().item() > 1e-3
    distance = Mahalanobis(4)
    torch.testing.assert_close(distance(all_pairs(a, b)), distance(all_pairs(b, a)))


def test_a_sigmoid_too_many():
    # cell 14re0062
    # The module's numbers lie between 0 and 1, the logits between -log 4 and 1 - log 4, the scores between 1/5 and
    # e / (e + 4) = 0.40.  Most pairs should score 0, so everything is pushed to 1/5, and nothing is learned.
    twice = RelationNet(nn.Identity(), nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()))
    extreme = 1e4 * torch.randn(50, 2)
    scores_of = twice(Examples(torch.randn(5, 2), torch.eye(5)), extreme).sigmoid()
    assert abs(scores_of.min() - 0.2) < 1e-4 and abs(scores_of.max() - math.e / (math.e + 4)) < 1e-4


def test_a_symmetric_module():
    # cell 14re0053
    # It can still be highest elsewhere than at c = z, and weigh evidence by where it lies; it cannot tell the roles apart.
    class Symmetric(nn.Module):
        "The mean of what a module says of a pair in both orders."

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pairs):
            c, z = pairs.chunk(2, 1)
            return (self.inner(pairs) + self.inner(torch.cat([z, c], 1))) / 2

    fair = Symmetric(MLP([8, 16, 1]))
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    forth, back = fair(all_pairs(a, b)).view(5, 3), fair(all_pairs(b, a)).view(3, 5)
    torch.testing.assert_close(forth, back.T)


def test_pairs_that_do_not_belong():
    # cell 14re0054
    # Row i * way + k has class k and query (i * way + k) mod n: another query.  With one query it is right.
    def wrong(c, z):
        return torch.cat([c.repeat(len(z), 1), z.repeat(len(c), 1)], 1)

    c, z = torch.randn(3, 2), torch.randn(4, 2)
    assert not torch.equal(wrong(c, z), all_pairs(c, z))
    assert torch.equal(wrong(c, z[:1]), all_pairs(c, z[:1]))
    repaired = torch.cat([c.repeat(4, 1), z.repeat_interleave(3, 0)], 1)
    assert torch.equal(repaired, all_pairs(c, z))


def test_evidence_of_many_shots():
    log_ratio = cell_14re0008()

    # cell 14re0055
    # The mean of K has variance share + (1 - share) / K and covariance `share` with the query; K stands in the formula, so
    # c and z do not suffice.  A module that is given K as well, or the sum beside the mean, can compute it.
    def evidence(c, z, share, shots):
        variance = share + (1 - share) / shots
        both = torch.tensor([[variance, share], [share, 1.0]])
        apart = Normal(0.0, variance**0.5).log_prob(c) + Normal(0.0, 1.0).log_prob(z)
        return MultivariateNormal(torch.zeros(2), both).log_prob(torch.stack([c, z])) - apart

    c, z = torch.tensor(1.0), torch.tensor(1.2)
    torch.testing.assert_close(evidence(c, z, 0.8, 1), log_ratio(c, z, 0.8))
    assert evidence(c, z, 0.8, 5) > evidence(c, z, 0.8, 1) + 0.1
