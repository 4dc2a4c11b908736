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
)
from metabook.registry import METHODS
from metabook.testing import check_learner


def cell_0f9e4c2e():
    # cell 0f9e4c2e
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 2.0], [5.0, 2.0]])
    labels = one_hot(torch.tensor([0, 0, 1, 1]), 2)
    return labels, points


def cell_2b81566c(labels, points):
    # cell 2b81566c
    def classify(support, z):
        "The probabilities [n, way] of embedded queries `z`, from an embedded support set."
        c = prototypes(support.x, support.y)  # [way, d]
        squared = (z[:, None] - c).square().sum(-1)  # [n, way]: |z - c_k|^2
        return (-squared).softmax(-1)

    p = classify(Examples(points, labels), torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(p[0, 0].item(), 1 / (1 + math.exp(-3)), atol=1e-6, rtol=0)
    p


def cell_6448f4f5(labels, points):
    # cell 6448f4f5
    c = prototypes(points, labels)
    assert torch.equal(c, torch.tensor([[1.0, 0.0], [4.0, 2.0]]))

    # Three examples of one class, one of the other, and a label that is shared between both.
    uneven = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    by_sums = [sum(w * z for w, z in zip(col, points, strict=True)) / col.sum() for col in uneven.T]
    torch.testing.assert_close(prototypes(points, uneven), torch.stack(by_sums))
    c


def cell_c05b8e87(labels, points):
    # cell c05b8e87
    two = prototypes(points, labels)  # the prototypes (1, 0) and (4, 2)
    z_query = torch.tensor([[2.0, 1.0]])
    return two, z_query


def cell_ea362412(two, z_query):
    # cell ea362412
    by_hand = {
        squared_euclidean: [2.0, 5.0],
        euclidean: [math.sqrt(2), math.sqrt(5)],
        cosine_distance: [1 - 2 / math.sqrt(5), 0.0],
    }
    for function, expected in by_hand.items():
        torch.testing.assert_close(function(z_query, two), torch.tensor([expected]))
        print(f"{function.__name__:18s}", [f"{d:.3f}" for d in function(z_query, two)[0].tolist()])


def cell_bb2c5cab():
    # cell bb2c5cab
    def as_written(z, c):
        "The formula as it stands: a tensor of shape [n, way, d]."
        return (z[:, None] - c).square().sum(-1)

    def uncentred(z, c):
        "The expanded square without the shift."
        return z.square().sum(-1)[:, None] - 2 * z @ c.T + c.square().sum(-1)

    return as_written, uncentred


def cell_df6a9d3a(as_written, uncentred):
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


def cell_d669c138():
    # cell d669c138
    class AsIs(nn.Module):
        "The input itself, flattened: an embedding that has learned nothing."

        config = {"name": "as-is", "args": {}}  # how a trained folder would call it

        def forward(self, x):
            return x.flatten(1)

    return AsIs


def cell_683117f5(AsIs, labels, points, z_query):
    # cell 683117f5
    root5 = math.sqrt(5)
    odds = {"squared": 3, "plain": root5 - math.sqrt(2), "cosine": -10 * (1 - 2 / root5)}
    for distance, log_odds in odds.items():
        p = ProtoNet(AsIs(), distance)(Examples(points, labels), z_query).softmax(-1)
        first = 1 / (1 + math.exp(-log_odds))
        torch.testing.assert_close(p, torch.tensor([[first, 1 - first]]))
        print(f"{distance:8s} {p[0, 0].item():.3f} {p[0, 1].item():.3f}")


def cell_5afc8a13(AsIs):
    # cell 5afc8a13
    with pytest.raises(ValueError, match="did you mean 'squared'"):
        ProtoNet(AsIs(), "square")


def cell_08014747(AsIs, two, z_query):
    # cell 08014747
    assert torch.equal(F.linear(z_query, 2 * two, -two.square().sum(1)), torch.tensor([[3.0, 0.0]]))

    z, y = torch.randn(30, 8, dtype=torch.float64), one_hot(torch.arange(15) % 5, 5).double()
    learner = ProtoNet(AsIs())
    c, _ = state = learner.adapt(Examples(z[:15], y))
    linear = F.linear(z, weight=2 * c, bias=-c.square().sum(1))
    torch.testing.assert_close(learner.predict(state, z), linear - z.square().sum(1, keepdim=True))
    torch.testing.assert_close(learner.predict(state, z).softmax(1), linear.softmax(1))


def cell_b2aeae33(AsIs, two, z_query):
    # cell b2aeae33
    z, c = z_query.double().requires_grad_(), two.double().requires_grad_()
    learner, y = ProtoNet(AsIs()), torch.tensor([[1.0, 0.0]]).double()
    logits = learner.predict((c, {}), z)
    for_z, for_c = torch.autograd.grad(F.cross_entropy(logits, y), (z, c))

    p = logits.softmax(1)
    torch.testing.assert_close(for_z, 2 * (p @ c - y @ c))
    torch.testing.assert_close(for_c, 2 * (p - y).T * (z - c))
    torch.testing.assert_close(for_z, torch.tensor([[0.285, 0.190]]).double(), atol=5e-4, rtol=0)


def cell_68bec3c6(AsIs, two):
    # cell 68bec3c6
    direction = (two[0] - two[1]).double()
    far = two[:1].double() + torch.linspace(-1, 100, 50).double()[:, None] * direction
    state = two.double(), {}
    gap = direction.norm()
    lead = [ProtoNet(AsIs(), d).predict(state, far).diff(dim=1).abs() for d in ("plain", "squared")]
    assert (lead[0] <= gap + 1e-9).all()
    torch.testing.assert_close(lead[0][-1, 0], gap)  # reached behind the prototype
    assert lead[1][-1, 0] > 100 * gap


def cell_72bc3fd2(AsIs):
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


def cell_263a6745(two, z_query):
    # cell 263a6745
    def is_squared(distance):
        return torch.allclose(distance(z_query, two), torch.tensor([[2.0, 5.0]]))

    assert not is_squared(torch.cdist)  # the mistake
    assert is_squared(lambda z, c: torch.cdist(z, c).square())  # the repair
    assert is_squared(squared_euclidean)


def cell_263a6746(two, z_query):
    # cell 263a6746
    z = z_query.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.cdist(z, two).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.square().sum(), z)


def cell_6f227c05(two, z_query):
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


def cell_c1a55002(AsIs):
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


def cell_d9a066aa():
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


def cell_2b3e068d(AsIs):
    # cell 2b3e068d
    x, y = torch.randn(15, 6), one_hot(torch.arange(15) % 5, 5)
    learner = ProtoNet(AsIs())
    logits, order = learner(Examples(x, y), x), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(learner(Examples(x, y[:, order]), x), logits[:, order])

    near = x[:5].repeat(3, 1) + 0.1 * torch.randn(15, 6)  # three clear drawings of each class
    right = learner(Examples(near, y), near).argmax(1) == y.argmax(1)
    misled = learner(Examples(near, y.roll(1, dims=1)), near).argmax(1) == y.argmax(1)
    assert right.all() and not misled.any()


def cell_688f2662(AsIs, labels, points):
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


def test_classifier_by_hand():
    labels, points = cell_0f9e4c2e()
    cell_2b81566c(labels, points)


@pytest.mark.proves("eq-proto-mean")
def test_means_by_hand():
    labels, points = cell_0f9e4c2e()
    cell_2b81566c(labels, points)
    cell_6448f4f5(labels, points)


def test_empty_support():
    labels, points = cell_0f9e4c2e()
    cell_2b81566c(labels, points)
    cell_6448f4f5(labels, points)
    # cell a9933ffa
    with pytest.raises(ValueError, match="every class at least one example"):
        prototypes(points[:0], labels[:0])


@pytest.mark.proves("eq-proto-squared", "eq-proto-plain", "eq-proto-cosine")
def test_three_distances_by_hand():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    cell_ea362412(two, z_query)


def test_far_from_the_origin():
    as_written, uncentred = cell_bb2c5cab()
    cell_df6a9d3a(as_written, uncentred)


def test_twice_differentiable():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    cell_ea362412(two, z_query)
    as_written, uncentred = cell_bb2c5cab()
    cell_df6a9d3a(as_written, uncentred)
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


@pytest.mark.proves("eq-proto-softmax")
def test_probabilities_by_hand():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_683117f5(AsIs, labels, points, z_query)


def test_unknown_distance():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_683117f5(AsIs, labels, points, z_query)
    cell_5afc8a13(AsIs)


def test_keeps_the_contract(device):
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_683117f5(AsIs, labels, points, z_query)
    cell_5afc8a13(AsIs)
    # cell 1e0b9eb5
    noise = Classes(torch.rand(96, 1, 16, 16), sizes=torch.full((8,), 12))
    for distance, stats in zip(DISTANCES, ("batch", "support", "running"), strict=True):
        net = Conv4(size=16, width=4, stats=stats)
        check_learner(ProtoNet(net, distance).to(device), FewShot(noise, way=3, shot=2, query=3))
    assert METHODS["protonet"].__name__ == "ProtoNet"  # trained folders are found by this name
    assert not ProtoNet.head  # nothing in the network has the size of the way


@pytest.mark.proves("eq-proto-bregman")
def test_the_mean_is_the_best_representative():
    # cell 12ea83d4
    def bregman(f, z, c):
        "How far f lies above its tangent at c: `z` is [n, d], `c` is [d]."
        return f(z) - f(c) - (z - c) @ grad(f)(c)

    CONVEX = {
        "squared Euclidean": lambda z: z.square().sum(-1),
        "Kullback-Leibler": lambda z: (z * z.log()).sum(-1),
        "Itakura-Saito": lambda z: -z.log().sum(-1),
    }
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


@pytest.mark.proves("eq-proto-linear")
def test_same_as_a_linear_classifier():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_08014747(AsIs, two, z_query)


@pytest.mark.proves("eq-proto-gradient")
def test_gradient_of_the_loss():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_08014747(AsIs, two, z_query)
    cell_b2aeae33(AsIs, two, z_query)


def test_begin_at_the_prototypes():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_08014747(AsIs, two, z_query)
    cell_b2aeae33(AsIs, two, z_query)

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
    cell_68bec3c6(AsIs, two)


@pytest.mark.proves("eq-proto-floor")
def test_cosine_loss_has_a_floor():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_68bec3c6(AsIs, two)
    cell_72bc3fd2(AsIs)


@pytest.mark.proves("eq-proto-floor-of-all")
def test_cosine_loss_of_all_classes_has_a_higher_floor():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_68bec3c6(AsIs, two)
    cell_72bc3fd2(AsIs)

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


def test_root_instead_of_square():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    cell_263a6745(two, z_query)


def test_cdist_is_differentiable_once():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    cell_263a6745(two, z_query)
    cell_263a6746(two, z_query)


def test_what_the_loss_expects():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    cell_263a6745(two, z_query)
    cell_263a6746(two, z_query)
    cell_6f227c05(two, z_query)


def test_two_clusters():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_263a6745(two, z_query)
    cell_263a6746(two, z_query)
    cell_6f227c05(two, z_query)
    cell_c1a55002(AsIs)


def test_shapes_that_broadcast():
    cell_d9a066aa()


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


def test_labels_are_only_names():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_263a6745(two, z_query)
    cell_263a6746(two, z_query)
    cell_6f227c05(two, z_query)
    cell_c1a55002(AsIs)
    cell_2b3e068d(AsIs)


def test_forgotten_class():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_263a6745(two, z_query)
    cell_263a6746(two, z_query)
    cell_6f227c05(two, z_query)
    cell_c1a55002(AsIs)
    cell_d9a066aa()
    cell_2b3e068d(AsIs)
    cell_688f2662(AsIs, labels, points)


def test_geometric_median():
    labels, points = cell_0f9e4c2e()
    two, z_query = cell_c05b8e87(labels, points)
    AsIs = cell_d669c138()
    cell_263a6745(two, z_query)
    cell_263a6746(two, z_query)
    cell_6f227c05(two, z_query)
    cell_c1a55002(AsIs)
    cell_d9a066aa()
    cell_2b3e068d(AsIs)
    cell_688f2662(AsIs, labels, points)

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
