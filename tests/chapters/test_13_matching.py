"""Made from nbs/13_matching.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabook.classes import Classes
from metabook.episodes import Examples, FewShot, one_hot
from metabook.matching import FullContext, MatchingNet, match
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet, prototypes, unit
from metabook.testing import CHECKS, check_learner


def cell_13ma0006():
    # cell 13ma0006
    class AsIs(nn.Module):
        "The input itself, flattened: an embedding that has learned nothing."

        def __init__(self, features=2):
            super().__init__()
            self.features = features

        def forward(self, x):
            return x.flatten(1)

    return AsIs


@pytest.mark.proves("eq-match-attention", "eq-match-logits")
def test_attention_by_hand():
    AsIs = cell_13ma0006()
    # cell 13ma0015
    three = Examples(
        torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), one_hot(torch.tensor([0, 1, 1]), 2)
    )
    p = MatchingNet(AsIs(), scale=1.0)(three, torch.tensor([[1.0, 0.0]])).softmax(1)
    torch.testing.assert_close(p[0, 0].item(), math.e / (math.e + 2))

    z, z_query, y = torch.randn(6, 4), torch.randn(5, 4), one_hot(torch.arange(6) % 3, 3)
    p = MatchingNet(AsIs(4), scale=7.0)(Examples(z, y), z_query).softmax(1)
    head = F.scaled_dot_product_attention(
        unit(z_query), unit(z), y, scale=7.0
    )  # one head, no weights
    torch.testing.assert_close(p, head)
    assert match(torch.zeros(1, 2), torch.eye(2).double()).dtype == torch.float32  # the network's


@pytest.mark.proves("eq-match-limits", "eq-match-variance")
def test_hot_and_cold():
    AsIs = cell_13ma0006()
    # cell 13ma0019
    z, query = torch.randn(9, 3).double(), torch.randn(4, 3).double()
    y = one_hot(torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2]), 3).double()
    c = prototypes(z, y)
    V = (y * torch.cdist(z, c).square()).sum(0) / y.sum(0)
    apart = torch.cdist(query, z).square()

    def logits(scale):
        return MatchingNet(AsIs(3), "squared", scale=scale, balanced=True).double()(
            Examples(z, y), query
        )

    hot = -torch.cdist(query, c).square() - V
    torch.testing.assert_close(1e6 * logits(1e-6), hot, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(apart @ y / y.sum(0), -hot)
    nearest = torch.stack([apart[:, y[:, k] == 1].amin(1) for k in range(3)], 1)
    torch.testing.assert_close(1e-4 * logits(1e4), -nearest, atol=1e-3, rtol=1e-3)

    line = Examples(
        torch.tensor([[1.9], [2.1], [-3.0], [1.0]]), one_hot(torch.tensor([0, 0, 1, 1]), 2)
    )
    answers = [
        learner(line, torch.zeros(1, 1)).argmax().item()
        for learner in (
            ProtoNet(AsIs()),
            MatchingNet(AsIs(), "squared", scale=1e-3),
            MatchingNet(AsIs(), "squared", scale=1e3),
        )
    ]
    assert answers == [1, 0, 1]


@pytest.mark.proves("eq-match-mean-gap", "eq-match-simplex")
def test_a_simplex_is_the_best():
    AsIs = cell_13ma0006()

    # cell 13ma0024
    def floor(way, tau):
        return math.log(1 + (way - 1) * math.exp(-way / ((way - 1) * tau)))

    def loss(u, z, tau):
        y = torch.eye(len(u)).double()
        return F.cross_entropy(
            MatchingNet(AsIs(), scale=1 / tau).double()(Examples(u, y), z), y
        ).item()

    corners = torch.eye(5).double() - 1 / 5
    for tau in (1.0, 0.5):
        assert abs(loss(corners, 3 * corners, tau) - floor(5, tau)) < 1e-6
        for _ in range(20):
            u, z = torch.randn(2, 5, 5).double()
            assert loss(u, z, tau) > floor(5, tau)

    u, z = (unit(t) for t in torch.randn(2, 5, 8).double())
    x = u @ z.T - (u * z).sum(1)  # row j, column k; zero where they are equal
    gap = -((u - u.mean(0)) * (z - z.mean(0))).sum() / 4
    torch.testing.assert_close(x.sum() / 20, gap)

    for own, others in ((1, 4), (1, 5), (5, 1)):  # one query, the best that cosines allow
        ends = one_hot(torch.tensor([0] * own + [1] * others), 2)
        z = torch.tensor([1.0] * own + [-1.0] * others)[:, None]
        p = (
            MatchingNet(AsIs(1), scale=1.0)(Examples(z, ends), torch.ones(1, 1))
            .softmax(1)[0, 0]
            .item()
        )
        assert abs(p - own * math.e**2 / (own * math.e**2 + others)) < 1e-6
    round(floor(5, 1.0), 3), round(math.exp(-floor(5, 1.0)), 3), floor(5, 0.1)


@pytest.mark.proves("eq-match-support", "eq-match-query")
def test_context_as_published():
    # cell 13ma0029
    def theirs(cell, inputs):
        "The numbers of a cell as `nn.LSTM` wants them: its gates come in another order."
        i, f, o, new = cell.W.detach().chunk(4)
        W = torch.cat([i, f, new, o])
        zero = W.new_zeros(len(W))
        return W[:, :inputs], W[:, inputs:], zero, zero  # our biases are zero at the start

    d, both = 3, FullContext(3, reads=4).double()
    z, query = torch.randn(5, d).double(), torch.randn(2, d).double()
    lstm = nn.LSTM(d, d, bidirectional=True).double()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for cell, ending in ((both.ahead, "_l0"), (both.back, "_l0_reverse")):
        for name, numbers in zip(names, theirs(cell, d), strict=True):
            getattr(lstm, name + ending).data.copy_(numbers)
    shown, _ = lstm(z)
    u = both.support(z)
    torch.testing.assert_close(u, z + shown[:, :d] + shown[:, d:])

    step = nn.LSTMCell(2 * d, d).double()
    for name, numbers in zip(names, theirs(both.reader, 2 * d), strict=True):
        getattr(step, name).data.copy_(numbers)
    for q, found in zip(query, both.query(query, u), strict=True):
        h, c = q, torch.zeros(d).double()
        for _ in range(4):
            weights = torch.stack([h @ one for one in u]).softmax(0)
            r = sum(w * one for w, one in zip(weights, u, strict=True))
            shown, c = step(torch.cat([q, r]), (h, c))
            h = shown + q
        torch.testing.assert_close(found, h)


def test_the_answer_of_the_reference():
    AsIs = cell_13ma0006()
    # cell cc329ac0
    # The answer of the code of Chen et al. 2019, step by step, in our words and with as many reads as examples.  Its
    # rectified cosines are cosines here: all of them are positive.
    learner = MatchingNet(AsIs(3), context=True, reads=6, scale=10.0).double()
    z, asked = 2 + torch.rand(6, 3).double(), 2 + torch.rand(4, 3).double()
    y = one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).double()

    def lstm_of(cell, inputs):
        made = nn.LSTMCell(inputs, 3).double()
        i, f, o, new = cell.W.detach().chunk(4)
        made.weight_ih.data, made.weight_hh.data = torch.cat([i, f, new, o]).split([inputs, 3], 1)
        made.bias_ih.data.zero_(), made.bias_hh.data.zero_()
        return made

    def read(cell, rows):
        state, shown = None, []
        for row in rows:
            state = cell(row[None], state)
            shown.append(state[0])
        return torch.cat(shown)

    context = learner.context
    backwards = read(lstm_of(context.back, 3), z.flip(0)).flip(0)
    G = z + read(lstm_of(context.ahead, 3), z) + backwards
    cell, h, c = lstm_of(context.reader, 6), asked, torch.zeros(4, 3).double()
    for _ in range(len(G)):
        h, c = cell(torch.cat([asked, (h @ G.T).softmax(1) @ G], 1), (h, c))
        h = h + asked
    cosines = (h / h.norm(dim=1, keepdim=True)) @ (G / G.norm(dim=1, keepdim=True)).T
    assert cosines.min() > 0
    p = (10 * cosines.relu()).softmax(1) @ y
    torch.testing.assert_close(learner(Examples(z, y), asked).softmax(1), p, atol=1e-6, rtol=1e-6)


def test_what_is_refused():
    AsIs = cell_13ma0006()
    # cell 13ma0017
    for wrong in ({"scale": 0.0}, {"reads": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
            MatchingNet(AsIs(), **wrong)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        MatchingNet(AsIs(), "cosin")
    with pytest.raises(ValueError, match="Flatten does not say how long its embeddings are"):
        MatchingNet(nn.Flatten(), context=True)


def test_keeps_the_contract(device):
    # cell 13ma0016
    noise = Classes(torch.rand(96, 1, 16, 16), sizes=torch.full((8,), 12))
    tasks = FewShot(noise, way=3, shot=2, query=3)
    for stats, words in {
        "batch": {},
        "support": {"distance": "squared", "balanced": True},
        "running": {"context": True, "reads": 2},
    }.items():
        learner = MatchingNet(Conv4(size=16, width=4, stats=stats), **words)
        check_learner(learner.to(device), tasks)
    assert not MatchingNet.head  # nothing in the network has the size of the way


@pytest.mark.proves("eq-match-prior")
def test_the_larger_class_wins():
    AsIs = cell_13ma0006()
    # cell 13ma0037
    support = Examples(torch.eye(6), one_hot(torch.tensor([0, 0, 0, 0, 0, 1]), 2))
    alike = torch.ones(1, 6)
    for scale in (1.0, 20.0):
        odds = -MatchingNet(AsIs(6), scale=scale)(support, alike).diff(dim=1).item()
        assert abs(odds - math.log(5)) < 1e-5
        assert (
            MatchingNet(AsIs(6), scale=scale, balanced=True)(support, alike).diff(dim=1).abs()
            < 1e-5
        )


def test_an_order_that_should_not_matter():
    AsIs = cell_13ma0006()
    # cell 13ma0043
    z, query = torch.randn(6, 8), torch.randn(4, 8)
    y, order = one_hot(torch.arange(6) % 3, 3), torch.tensor([5, 3, 1, 0, 2, 4])
    for context in (False, True):
        learner = MatchingNet(AsIs(8), context=context)
        gap = learner(Examples(z, y), query) - learner(Examples(z[order], y[order]), query)
        assert (gap.abs().max() < 1e-5) == learner.order_invariant == (not context)


def test_logits_are_not_rounded():
    # cell 13ma0048
    y, truth = torch.eye(2), torch.tensor([0])

    def loss_and_slope(log_p):
        similarity = torch.tensor([[-100.0, 100.0]], requires_grad=True)  # sure, and wrong
        loss = F.nll_loss(log_p(similarity), truth)
        return loss.item(), torch.autograd.grad(loss, similarity)[0].abs().max().item()

    value, slope = loss_and_slope(lambda s: (s.softmax(1) @ y + 1e-6).log())  # the popular repair
    assert value < 14 and slope < 1e-6
    value, slope = loss_and_slope(lambda s: match(s, y).log_softmax(1))
    assert abs(value - 200) < 1e-3 and abs(slope - 1) < 1e-6


def test_a_softmax_over_the_queries():
    AsIs = cell_13ma0006()
    # cell 13ma0051
    # The softmax runs over the queries, not over the examples.  Ask one query alone: every weight is 1, whatever it is.
    u, z, y = torch.randn(5, 4), torch.randn(10, 4), torch.eye(5)
    wrong = [(unit(q) @ unit(u).T * 10).softmax(0) @ y for q in (z, z[:1])]
    assert not torch.allclose(wrong[0][:1], wrong[1]) and torch.equal(wrong[1], torch.ones(1, 5))
    learner = MatchingNet(AsIs(4))
    torch.testing.assert_close(learner(Examples(u, y), z)[:1], learner(Examples(u, y), z[:1]))


def test_a_context_without_order():
    # cell 13ma0052
    class MeanContext(nn.Module):
        "Each embedding moves by what two layers make of it and of the mean of the support set."

        def __init__(self, features):
            super().__init__()
            self.mix = MLP([2 * features, features, features])

        def support(self, z):
            return z + self.mix(torch.cat([z, z.mean(0).expand_as(z)], 1))

        def query(self, z, u):
            return z + self.mix(torch.cat([z, u.mean(0).expand_as(z)], 1))

    class Sociable(MatchingNet):
        "A matching network whose context is a mean."

        def __init__(self, embed: nn.Module):
            super().__init__(embed)
            self.context = MeanContext(embed.features)

    vectors = Classes(torch.randn(96, 3), sizes=torch.full((8,), 12))
    promises = [check for check in CHECKS if check.__name__ != "survives_saving"]  # it has no name
    found = check_learner(
        Sociable(MLP([3, 8, 4])), FewShot(vectors, way=3, shot=2, query=3), checks=promises
    )
    assert found["support_is_a_set"] == "passed"


def test_a_sum_of_cosines_is_a_class_mean():
    AsIs = cell_13ma0006()
    # cell 8d2fa346
    z, query = torch.randn(10, 4), torch.randn(3, 4)
    y = one_hot(torch.arange(10) % 2, 2)
    logits = (unit(query) @ unit(z).T) @ y
    torch.testing.assert_close(logits, 5 * unit(query) @ prototypes(unit(z), y).T)
    p = MatchingNet(AsIs(4), scale=1.0)(Examples(z[:2], y[:2]), query).softmax(1)
    torch.testing.assert_close(p, (unit(query) @ unit(z[:2]).T).softmax(1))  # one shot
