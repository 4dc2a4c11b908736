"""Made from nbs/04_prototypes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn import functional as F

from metabook.checks import check_every_class
from metabook.classes import Classes
from metabook.episodes import Examples, FewShot, one_hot
from metabook.networks import Conv4
from metabook.prototypes import (
    DISTANCES,
    ProtoNet,
    cosine_distance,
    euclidean,
    prototypes,
    squared_euclidean,
    unit,
)
from metabook.registry import METHODS
from metabook.testing import check_learner


def cell_0f9e4c2e():
    # cell 0f9e4c2e
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 2.0], [5.0, 2.0]])
    labels = one_hot(torch.tensor([0, 0, 1, 1]), 2)
    return labels, points


def cell_c05b8e87(labels, points):
    # cell c05b8e87
    two = prototypes(points, labels)  # the prototypes (1, 0) and (4, 2)
    z_query = torch.tensor([[2.0, 1.0]])
    return two, z_query


def cell_d669c138():
    # cell d669c138
    class AsIs(nn.Module):
        "The input itself, flattened: an embedding that has learned nothing."

        config = {"name": "as-is", "args": {}}  # how a trained folder would call it

        def forward(self, x):
            return x.flatten(1)

    return AsIs


def cell_12ea83d4():
    # cell 12ea83d4
    def bregman(f, z, c):
        "How far f lies above its tangent at c: `z` is [n, d], `c` is [d]."
        return f(z) - f(c) - (z - c) @ grad(f)(c)

    CONVEX = {
        "squared Euclidean": lambda z: z.square().sum(-1),
        "Kullback-Leibler": lambda z: (z * z.log()).sum(-1),
        "Itakura-Saito": lambda z: -z.log().sum(-1),
    }
    return CONVEX, bregman


def test_classifier_by_hand():
    labels, points = cell_0f9e4c2e()

    # cell 2b81566c
    def classify(support, z):
        "The probabilities [n, way] of embedded queries `z`, from an embedded support set."
        c = prototypes(support.x, support.y)  # [way, d]
        squared = (z[:, None] - c).square().sum(-1)  # [n, way]: |z - c_k|^2
        return (-squared).softmax(-1)

    p = classify(Examples(points, labels), torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(p[0, 0].item(), 1 / (1 + math.exp(-3)), atol=1e-6, rtol=0)
    p


@pytest.mark.proves("eq-proto-mean")
def test_means_by_hand():
    labels, points = cell_0f9e4c2e()
    # cell 6448f4f5
    c = prototypes(points, labels)
    assert torch.equal(c, torch.tensor([[1.0, 0.0], [4.0, 2.0]]))

    # Three examples of one class, one of the other, and a label that is shared between both.
    uneven = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    by_sums = [sum(w * z for w, z in zip(col, points, strict=True)) / col.sum() for col in uneven.T]
    torch.testing.assert_close(prototypes(points, uneven), torch.stack(by_sums))
    c


def test_empty_support():
    labels, points = cell_0f9e4c2e()
    # cell a9933ffa
    with pytest.raises(ValueError, match="every class at least one example"):
        prototypes(points[:0], labels[:0])


def test_means_that_are_kept_up_to_date():
    # cell 2e72dbac
    z = torch.randn(6, 3).double()
    c = prototypes(z[:5], torch.ones(5, 1))[0]
    torch.testing.assert_close(c + (z[5] - c) / 6, z.mean(0))
    torch.testing.assert_close(z.mean(0) - (z[5] - z.mean(0)) / 5, c)
    colour = Conv4(size=84, channels=3, width=64)
    assert sum(p.numel() for p in colour.parameters()) == 113_088
    assert colour(torch.zeros(2, 3, 84, 84)).shape == (2, 1600)


@pytest.mark.proves("eq-proto-squared", "eq-proto-plain", "eq-proto-cosine")
def test_three_distances_by_hand():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    # cell ea362412
    by_hand = {
        squared_euclidean: [2.0, 5.0],
        euclidean: [math.sqrt(2), math.sqrt(5)],
        cosine_distance: [1 - 2 / math.sqrt(5), 0.0],
    }
    for function, expected in by_hand.items():
        torch.testing.assert_close(function(z_query, two), torch.tensor([expected]))
        print(f"{function.__name__:18s}", [f"{d:.3f}" for d in function(z_query, two)[0].tolist()])


def test_far_from_the_origin():
    # cell bb2c5cab
    def as_written(z, c):
        "The formula as it stands: a tensor of shape [n, way, d]."
        return (z[:, None] - c).square().sum(-1)

    def uncentred(z, c):
        "The expanded square without the shift."
        return z.square().sum(-1)[:, None] - 2 * z @ c.T + c.square().sum(-1)

    # cell df6a9d3a
    z, c = 10 + torch.randn(300, 1600), 10 + torch.randn(20, 1600)
    exact = as_written(z.double(), c.double())
    error = {
        f.__name__: (f(z, c).double() - exact).abs().max().item()
        for f in (as_written, uncentred, squared_euclidean)
    }
    assert error["squared_euclidean"] < 3 * error["as_written"]
    assert error["uncentred"] > 30 * error["squared_euclidean"]
    print({name: f"{e:.0e}" for name, e in error.items()})


def test_twice_differentiable():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    # cell 12ebbcb2
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for f in (squared_euclidean, euclidean, cosine_distance):
        assert torch.autograd.gradgradcheck(f, (z, c))
        for edge in (two, torch.zeros(2, 2)):  # on the prototypes, and at the origin
            edge = edge.clone().requires_grad_()
            (g,) = torch.autograd.grad(f(edge, two).sum(), edge, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), edge)
            assert g.isfinite().all() and h.isfinite().all()

    short = 1e-4 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(euclidean(short, 0 * short), torch.full_like(short, 1e-4))
    torch.testing.assert_close(
        cosine_distance(short, two.double()), cosine_distance(1e4 * short, two.double())
    )


def test_the_mean_that_belongs_to_the_cosine():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    # cell 4533fedd
    pair = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    raw, right = pair.mean(0), unit(pair).mean(0)
    angle = [math.degrees(math.atan2(*r.flip(0).tolist())) for r in (raw, right)]
    assert [round(a) for a in angle] == [6, 45]
    price = [cosine_distance(pair, r[None]).sum() for r in (raw, right)]
    assert price[1] < price[0] - 0.3

    z, c = torch.randn(4, 3).double().requires_grad_(), torch.randn(1, 3).double()
    (g,) = torch.autograd.grad(cosine_distance(z, c).sum(), z)
    torch.testing.assert_close((g * z).sum(1), torch.zeros(4).double(), atol=1e-9, rtol=0)
    (g,) = torch.autograd.grad(euclidean(z, c).sum(), z)
    torch.testing.assert_close(g.norm(dim=1), torch.ones(4).double())
    p = (-squared_euclidean(z_query, two) / 2).softmax(1)
    assert round(p[0, 0].item(), 3) == 0.818  # the mean over two coordinates


@pytest.mark.proves("eq-proto-softmax")
def test_probabilities_by_hand():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    # cell 683117f5
    root5 = math.sqrt(5)
    odds = {"squared": 3, "plain": root5 - math.sqrt(2), "cosine": -10 * (1 - 2 / root5)}
    for distance, log_odds in odds.items():
        p = ProtoNet(AsIs(), distance)(Examples(points, labels), z_query).softmax(-1)
        first = 1 / (1 + math.exp(-log_odds))
        torch.testing.assert_close(p, torch.tensor([[first, 1 - first]]))
        print(f"{distance:8s} {p[0, 0].item():.3f} {p[0, 1].item():.3f}")


def test_unknown_distance():
    AsIs = cell_d669c138()
    # cell 5afc8a13
    with pytest.raises(ValueError, match="did you mean 'squared'"):
        ProtoNet(AsIs(), "square")


def test_keeps_the_contract(device):
    # cell 1e0b9eb5
    noise = Classes(torch.rand(96, 1, 16, 16), sizes=torch.full((8,), 12))
    for distance, stats in zip(DISTANCES, ("batch", "support", "running"), strict=True):
        net = Conv4(size=16, width=4, stats=stats)
        check_learner(ProtoNet(net, distance).to(device), FewShot(noise, way=3, shot=2, query=3))
    assert METHODS["protonet"].__name__ == "ProtoNet"  # trained folders are found by this name
    assert not ProtoNet.head  # nothing in the network has the size of the way


def test_long_embeddings_are_sure_by_chance():
    # cell b6b47708
    z, c = torch.randn(400, 1600), torch.randn(20, 1600)
    d = squared_euclidean(z, c)
    assert abs(d.mean() - 3200) < 60 and 90 < (d - d.mean(0)).std() < 140
    wrong = torch.arange(400) % 20
    assert F.cross_entropy(-d, wrong) > 50 > 4 > F.cross_entropy(-d / 1600, wrong)


@pytest.mark.proves("eq-proto-bregman")
def test_the_mean_is_the_best_representative():
    CONVEX, bregman = cell_12ea83d4()
    # cell 23bd5a6a
    z = 0.1 + 3 * torch.rand(7, 4, dtype=torch.float64)
    y = one_hot(torch.tensor([0, 0, 0, 0, 1, 1, 1]), 2).double()
    best = prototypes(z, y)[0]
    for f in CONVEX.values():
        price = bregman(f, z[:4], best).sum()
        for r in 0.1 + 3 * torch.rand(20, 4, dtype=torch.float64):
            more = 4 * bregman(f, best[None], r)[0]
            torch.testing.assert_close(bregman(f, z[:4], r).sum(), price + more)
            assert more > 0


def test_priors_and_strangers():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    CONVEX, bregman = cell_12ea83d4()
    # cell 31c77adf
    stranger = torch.tensor([[-20.0, -10.0]])
    assert squared_euclidean(stranger, two).tolist() == [[541.0, 720.0]]

    prior = torch.tensor([0.9, 0.1])
    density = (-squared_euclidean(z_query, two)).exp()
    by_rule = prior * density / (prior * density).sum()
    torch.testing.assert_close((prior.log() - squared_euclidean(z_query, two)).softmax(1), by_rule)

    more = torch.tensor([[0.0, 1.0], [5.0, 3.0]])  # two unlabelled points, one near each class
    soft = (-squared_euclidean(more, two)).softmax(1)
    refined = prototypes(torch.cat([points, more]), torch.cat([labels, soft]))
    torch.testing.assert_close(
        refined, torch.tensor([[2 / 3, 1 / 3], [13 / 3, 7 / 3]]), atol=1e-4, rtol=0
    )


@pytest.mark.proves("eq-proto-linear")
def test_same_as_a_linear_classifier():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    # cell 08014747
    assert torch.equal(F.linear(z_query, 2 * two, -two.square().sum(1)), torch.tensor([[3.0, 0.0]]))

    z, y = torch.randn(30, 8, dtype=torch.float64), one_hot(torch.arange(15) % 5, 5).double()
    learner = ProtoNet(AsIs())
    c, _ = state = learner.adapt(Examples(z[:15], y))
    linear = F.linear(z, weight=2 * c, bias=-c.square().sum(1))
    torch.testing.assert_close(learner.predict(state, z), linear - z.square().sum(1, keepdim=True))
    torch.testing.assert_close(learner.predict(state, z).softmax(1), linear.softmax(1))


@pytest.mark.proves("eq-proto-gradient")
def test_gradient_of_the_loss():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    # cell b2aeae33
    z, c = z_query.double().requires_grad_(), two.double().requires_grad_()
    learner, y = ProtoNet(AsIs()), torch.tensor([[1.0, 0.0]]).double()
    logits = learner.predict((c, {}), z)
    for_z, for_c = torch.autograd.grad(F.cross_entropy(logits, y), (z, c))

    p = logits.softmax(1)
    torch.testing.assert_close(for_z, 2 * (p @ c - y @ c))
    torch.testing.assert_close(for_c, 2 * (p - y).T * (z - c))
    torch.testing.assert_close(for_z, torch.tensor([[0.285, 0.190]]).double(), atol=5e-4, rtol=0)


def test_the_path_through_the_support_set():
    # cell c47f2c5e
    def slopes(cut):
        "Derivatives by theta and by a bias that is added last."
        theta, bias = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        c = theta * torch.tensor([[0.0], [1.0]]) + bias
        z = theta * torch.tensor([[0.25]]) + bias
        logits = -squared_euclidean(z, c.detach() if cut else c)
        loss = F.cross_entropy(logits, torch.tensor([0]))
        return [g.item() for g in torch.autograd.grad(loss, (theta, bias))]

    assert slopes(cut=False) == pytest.approx([-0.3775, 0.0], abs=1e-4)
    assert slopes(cut=True) == pytest.approx([0.1888, 0.7551], abs=1e-4)


def test_begin_at_the_prototypes():
    AsIs = cell_d669c138()

    # cell 14d8f3ba
    def last_layer(z, y):
        "Weights [way, d] and biases [way] that answer like the prototypes."
        c = prototypes(z, y)
        return 2 * c, -c.square().sum(1)

    def trained_on(layer, z, y, steps, lr=0.1):
        "The layer after gradient steps on the support set."

        def loss(layer):
            return F.cross_entropy(F.linear(z, *layer), y)

        for _ in range(steps):
            layer = tuple(p - lr * g for p, g in zip(layer, grad(loss)(layer), strict=True))
        return layer

    z, y = torch.randn(15, 8), one_hot(torch.arange(15) % 5, 5)
    layer = last_layer(z, y)
    torch.testing.assert_close(
        F.linear(z, *layer).softmax(1), ProtoNet(AsIs())(Examples(z, y), z).softmax(1)
    )
    loss = [F.cross_entropy(F.linear(z, *trained_on(layer, z, y, n, 0.01)), y) for n in range(4)]
    assert loss == sorted(loss, reverse=True) and loss[3] < loss[0]  # each step is downhill


@pytest.mark.proves("eq-proto-bounded")
def test_plain_confidence_is_bounded():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    # cell 68bec3c6
    direction = (two[0] - two[1]).double()
    far = two[:1].double() + torch.linspace(-1, 100, 50).double()[:, None] * direction
    state = two.double(), {}
    gap = direction.norm()
    lead = [ProtoNet(AsIs(), d).predict(state, far).diff(dim=1).abs() for d in ("plain", "squared")]
    assert (lead[0] <= gap + 1e-9).all()
    torch.testing.assert_close(lead[0][-1, 0], gap)  # reached behind the prototype
    assert lead[1][-1, 0] > 100 * gap


@pytest.mark.proves("eq-proto-floor")
def test_cosine_loss_has_a_floor():
    AsIs = cell_d669c138()

    # cell 72bc3fd2
    def lowest(scale, way):
        return math.log(1 + (way - 1) * math.exp(-2 * scale))

    z = torch.tensor([[3.0, 4.0]])
    c = torch.cat([z, -z.expand(4, 2)])  # one class where the query points, four opposite
    y = one_hot(torch.tensor([0]), 5)
    for scale in (1.0, 2.0):
        learner = ProtoNet(AsIs(), "cosine")
        learner.scale.data.fill_(scale)
        loss = F.cross_entropy(learner.predict((c, {}), z), y)
        torch.testing.assert_close(loss.item(), lowest(scale, 5), atol=1e-5, rtol=1e-5)
        others = F.cross_entropy(learner.predict((torch.randn(5, 2), {}), z), y)
        assert others >= lowest(scale, 5)
    assert list(dict(learner.named_parameters())) == ["scale"]  # it is learned
    round(lowest(1, 20), 2), round(math.exp(-lowest(1, 20)), 2)


@pytest.mark.proves("eq-proto-floor-of-all")
def test_cosine_loss_of_all_classes_has_a_higher_floor():
    # cell d6f45700
    def mean_floor(scale, way):
        return math.log(1 + (way - 1) * math.exp(-scale * way / (way - 1)))

    def mean_loss(z, c):
        return F.cross_entropy(-cosine_distance(z, c), torch.arange(len(c))).item()

    for n in (2, 5, 20):
        simplex = torch.eye(n).double() - 1 / n
        assert mean_loss(7 * simplex, simplex) == pytest.approx(mean_floor(1, n))  # reached
        for noise in (0.01, 0.3, 3.0):
            z, c = (simplex + noise * torch.randn(n, n).double() for _ in range(2))
            assert mean_loss(z, c) > mean_floor(1, n)
    round(mean_floor(1, 20), 2), round(math.exp(-mean_floor(1, 20)), 2)


def test_extreme_temperatures():
    # cell a0d5e4bb
    d, y = torch.tensor([[2.0, 1.5, 4.0]]).double(), torch.tensor([0])
    hot, cold = (F.cross_entropy(-d / tau, y).item() for tau in (1e3, 1e-2))
    assert hot == pytest.approx(math.log(3) + (2 - 2.5) / 1e3, abs=1e-5)
    assert 1e-2 * cold == pytest.approx(2 - 1.5)
    scale = torch.ones((), requires_grad=True).double()
    (g,) = torch.autograd.grad(F.cross_entropy(-scale * d, y), scale)
    torch.testing.assert_close(g, 2 - ((-d).softmax(1) * d).sum())
    assert round(1 / (1 + 4 * math.exp(-2)), 3) == 0.649


@pytest.mark.proves("eq-proto-shots")
def test_fewer_examples_look_farther():
    # cell 8b2a885a
    four, z = torch.randn(4, 3).double(), torch.randn(1, 3).double()  # a class, and a query
    mu, trace = four.mean(0), four.var(0, unbiased=False).sum()  # the trace of its covariance
    for shot in (1, 2, 3):
        sets = torch.cartesian_prod(*[torch.arange(4)] * shot).reshape(
            -1, shot
        )  # 4, 16, 64 of them
        means = torch.stack([prototypes(four[rows], torch.ones(shot, 1))[0] for rows in sets])
        torch.testing.assert_close(
            squared_euclidean(z, means).mean(), (z - mu).square().sum() + trace / shot
        )


def test_neighbours_of_the_method():
    AsIs = cell_d669c138()

    # cell edc20dba
    def attention(z, y, new):
        "Logits of a matching network with squared distances."
        weight = (-squared_euclidean(new, z)).softmax(1)
        return (weight @ y).log()

    z, new = torch.randn(10, 4).double(), torch.randn(7, 4).double()
    one, five = (one_hot(torch.arange(shown) % 5, 5).double() for shown in (5, 10))
    ours = ProtoNet(AsIs())
    torch.testing.assert_close(
        attention(z[:5], one, new).softmax(1), ours(Examples(z[:5], one), new).softmax(1)
    )
    c, scatter = prototypes(z, five), (z - five @ prototypes(z, five)).square().sum(1)
    mean_distance = squared_euclidean(new, z) @ five / 2
    torch.testing.assert_close(mean_distance, squared_euclidean(new, c) + scatter @ five / 2)
    same = torch.cat([c, c])
    torch.testing.assert_close(
        attention(same, five, new).softmax(1), ours(Examples(same, five), new).softmax(1)
    )


def test_root_instead_of_square():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)

    # cell 263a6745
    def is_squared(distance):
        return torch.allclose(distance(z_query, two), torch.tensor([[2.0, 5.0]]))

    assert not is_squared(torch.cdist)  # the mistake
    assert is_squared(lambda z, c: torch.cdist(z, c).square())  # the repair
    assert is_squared(squared_euclidean)


def test_cdist_is_differentiable_once():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    # cell 263a6746
    z = z_query.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.cdist(z, two).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.square().sum(), z)


def test_what_the_loss_expects():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    # cell 6f227c05
    d = squared_euclidean(z_query, two)  # 2 and 5
    assert (-d).softmax(1)[0, 0] > 0.95
    assert d.softmax(1)[0, 1] > 0.95  # mistake: the farther class, as sure

    y = one_hot(torch.tensor([0]), 5)
    logits = torch.tensor([[50.0, 0, 0, 0, 0]])  # as sure and as right as one can be
    p, label = logits.softmax(1), torch.tensor([0])
    assert F.cross_entropy(logits, y) < 1e-6
    assert F.cross_entropy(p, y) > 0.9  # mistake: probabilities as logits, floor log(1 + 4 / e)
    assert F.nll_loss(p, label) < 0  # mistake: probabilities as log-probabilities
    assert F.nll_loss(logits.log_softmax(1), label) < 1e-6

    def are_log_probabilities(a):
        return torch.allclose(a.exp().sum(1), torch.ones(len(a)))

    assert not are_log_probabilities(logits) and not are_log_probabilities(p)
    assert are_log_probabilities(logits.log_softmax(1))


def test_collapse_is_stationary():
    # cell 78b22ee7
    z, c = torch.ones(6, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    loss = F.cross_entropy(-squared_euclidean(z, c), torch.arange(6) % 5)
    assert loss.item() == pytest.approx(math.log(5))
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (z, c)))
    distinct = math.prod(1 - i / 100 for i in range(20))
    assert round(1 - distinct, 2) == 0.87


def test_queries_in_the_support_set():
    AsIs = cell_d669c138()

    # cell 95ed0a77
    def on_noise(shot, shared):
        "Accuracy on classes of pure noise, over 60 tasks of 5 ways."
        hits = []
        for _ in range(60):
            x, y = torch.randn(5 * shot, 64), one_hot(torch.arange(5 * shot) % 5, 5)
            new = x if shared else torch.randn_like(x)
            hits.append((ProtoNet(AsIs())(Examples(x, y), new).argmax(1) == y.argmax(1)).float())
        return torch.cat(hits).mean().item()

    assert on_noise(1, shared=True) == 1 and on_noise(5, shared=True) > 0.8
    assert abs(on_noise(1, shared=False) - 0.2) < 0.1

    z = torch.randn(5, 3).double()
    torch.testing.assert_close(z[0] - z.mean(0), 0.8 * (z[0] - z[1:].mean(0)))


def test_labels_are_only_names():
    AsIs = cell_d669c138()
    # cell 2b3e068d
    x, y = torch.randn(15, 6), one_hot(torch.arange(15) % 5, 5)
    learner = ProtoNet(AsIs())
    logits, order = learner(Examples(x, y), x), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(learner(Examples(x, y[:, order]), x), logits[:, order])

    near = x[:5].repeat(3, 1) + 0.1 * torch.randn(15, 6)  # three clear drawings of each class
    right = learner(Examples(near, y), near).argmax(1) == y.argmax(1)
    misled = learner(Examples(near, y.roll(1, dims=1)), near).argmax(1) == y.argmax(1)
    assert right.all() and not misled.any()


def test_two_clusters():
    AsIs = cell_d669c138()
    # cell c1a55002
    z = torch.tensor([[-3.0, 0], [3.0, 0], [0.4, 0], [0.6, 0]])  # class 0 left and right of class 1
    y = one_hot(torch.tensor([0, 0, 1, 1]), 2)
    new = torch.tensor([[2.8, 0.1], [-2.8, 0.1], [0.5, 0.1]])  # of classes 0, 0, 1
    assert ProtoNet(AsIs())(Examples(z, y), new).argmax(1).tolist() == [
        1,
        0,
        1,
    ]  # the first is wrong
    nearest = squared_euclidean(new, z).argmin(1)
    assert y[nearest].argmax(1).tolist() == [0, 0, 1]  # the nearest example is not


def test_two_pairs_with_one_mean():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    # cell 667989f9
    z = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1]])
    pairs_of, new = Examples(z, labels), torch.randn(9, 2)
    torch.testing.assert_close(ProtoNet(AsIs())(pairs_of, new).softmax(1), torch.full((9, 2), 0.5))
    bent = Examples(z.square(), labels)
    assert (ProtoNet(AsIs())(bent, z.square()).argmax(1) == labels.argmax(1)).all()


def test_shapes_that_broadcast():
    # cell d9a066aa
    def distances(z, c):  # mistake
        return (z - c).square().sum(-1)

    c = torch.randn(5, 8)
    same, seven = torch.randn(5, 8), torch.randn(7, 8)
    torch.testing.assert_close(
        distances(same, c), squared_euclidean(same, c).diagonal()
    )  # no error
    with pytest.raises(RuntimeError, match="must match the size"):
        distances(seven, c)  # only other sizes tell
    assert squared_euclidean(seven, c).shape == (7, 5)

    truth = torch.arange(20) % 5
    answers = truth  # perfect
    assert (answers == truth[:, None]).float().mean() == 1 / 5  # mistake: [20, 20] pairs
    assert (answers == truth).float().mean() == 1


def test_prototypes_ask_for_no_order():
    # cell 6aaa95f3
    z, y = torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])  # three classes, two shots
    by_view = z.view(3, 2, -1).mean(1)  # mistake: takes rows 0 and 1 for class 0
    assert not torch.allclose(by_view, prototypes(z, one_hot(y, 3)))
    order = y.argsort(stable=True)
    torch.testing.assert_close(z[order].view(3, 2, -1).mean(1), prototypes(z, one_hot(y, 3)))
    torch.testing.assert_close(z[:3].view(3, 1, -1).mean(1), prototypes(z[:3], one_hot(y[:3], 3)))


def test_queries_stand_alone():
    # cell 4ce30c5f
    def moves(stats):
        "How much the first query's logits depend on who is asked with it."
        learner = ProtoNet(Conv4(size=16, width=4, stats=stats)).eval()
        x = torch.rand(12, 1, 16, 16)
        state = learner.adapt(Examples(x[:4], one_hot(torch.arange(4), 4)))
        together, alone = learner.predict(state, x[4:])[0], learner.predict(state, x[4:5])[0]
        return (together - alone).abs().max().item()

    assert moves("batch") > 1e-2
    assert moves("support") < 1e-4 and moves("running") < 1e-4


def test_forgotten_class():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    # cell 688f2662
    y = one_hot(torch.tensor([0, 0, 1, 1]), 3)  # three classes, two of them shown
    support = Examples(points, y)
    logits = ProtoNet(AsIs())(support, points)
    assert logits.isnan().all()
    assert len(logits.argmax(1).unique()) == 1  # an answer all the same

    c = y.T @ points / y.sum(0).clamp_min(1)[:, None]  # no repair: (0, 0) is shown as class 0,
    assert squared_euclidean(points[:1], c).argmin() == 2  # and goes to the class never shown

    check_every_class(Examples(points, labels))
    with pytest.raises(ValueError, match="no support example of class 2"):
        check_every_class(support)


def test_geometric_median():
    # cell 8c6c5965
    # The gradient of sum_i |z_i - r| is sum_i (r - z_i) / |r - z_i|: zero where r is the mean of the z_i with
    # weights 1 / |r - z_i|.  A far point weighs little.  Begin at the mean and repeat (Weiszfeld).
    def geometric_median(z, steps=100):
        r = z.mean(0)
        for _ in range(steps):
            weight = 1 / euclidean(z, r[None])  # [n, 1]
            r = (weight * z).sum(0) / weight.sum()
        return r

    def total(z, r):
        return (z - r).norm(dim=1).sum()

    z = torch.randn(5, 3).double()
    best = geometric_median(z)
    assert all(total(z, best) <= total(z, best + 0.1 * torch.randn(3).double()) for _ in range(50))
    wrong = torch.cat([z[:4], torch.full((1, 3), 100.0).double()])  # one label of five is wrong
    moved = {
        "mean": (wrong.mean(0) - z.mean(0)).norm(),
        "median": (geometric_median(wrong) - best).norm(),
    }
    assert moved["mean"] > 20 and moved["median"] < 3
    print({name: round(far.item(), 1) for name, far in moved.items()})


def test_what_a_dimension_costs():
    # cell cecc9933
    # Log odds of the right class: |z - c2|^2 - |z - c1|^2 = 2 v.u, with v = z - (c1 + c2)/2 and u = c1 - c2, which are
    # independent.  Let g be the distance of the means.  v has a mean of length g/2 and variance 1 + 1/(2K) in each
    # coordinate, u a mean of length g and variance 2/K.  So the log odds have mean g^2 (equal shots: no bias) and
    # variance 4 (g^2 (1 + 1/K) + (2D/K)(1 + 1/(2K))).  The last term is the price of the dimension: coordinates that
    # tell nothing cost as much as those that do, until K is of the order of D.  Accuracy: about Phi(mean / deviation);
    # with all the shots in the world Phi(g / 2) is left, the scatter of the query.
    def expected(dim, shot, g=4.0):
        variance = 4 * (g**2 * (1 + 1 / shot) + 2 * dim / shot * (1 + 1 / (2 * shot)))
        return 0.5 * (1 + math.erf(g**2 / math.sqrt(2 * variance)))

    def simulated(dim, shot, g=4.0, n=10_000):
        mu = torch.zeros(2, dim)
        mu[1, 0] = g
        c = mu + torch.randn(n, 2, dim) / math.sqrt(shot)
        d = (torch.randn(n, 1, dim) - c).square().sum(-1)  # queries of the first class
        return (d[:, 0] < d[:, 1]).float().mean().item()

    for dim, shot in ((64, 1), (64, 5), (4, 1), (4, 5)):
        assert abs(expected(dim, shot) - simulated(dim, shot)) < 0.03
        print(
            f"D = {dim:2d}, K = {shot}: {expected(dim, shot):.3f}, drawn {simulated(dim, shot):.3f}"
        )
