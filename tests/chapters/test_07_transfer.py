"""Made from nbs/07_transfer.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import grad, hessian
from torch.nn import functional as F

from metabook.classes import Classes
from metabook.episodes import Episode, Examples, FewShot, one_hot
from metabook.networks import Conv4, ResNet12, parameter_count
from metabook.prototypes import ProtoNet, prototypes, squared_euclidean
from metabook.registry import METHODS
from metabook.scores import evaluate, paired
from metabook.testing import check_learner
from metabook.training import fit
from metabook.transfer import (
    HEADS,
    SCALE,
    Batches,
    Descent,
    FineTune,
    Pretrained,
    cosine,
    linear,
    spread,
)


def cell_5582b5cb():
    # cell 5582b5cb
    as_is = nn.Identity()  # gives features as they are

    @torch.no_grad()
    def features_of(embed, classes):
        "The same classes, with features in place of images."
        embed.eval()
        parts = [embed(classes.prepare(x)) for x in classes.x.split(500)]
        return classes.with_features(torch.cat(parts))

    return as_is, features_of


def cell_6c2bb46c():
    # cell 6c2bb46c
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 2.0], [5.0, 2.0]])
    labels = one_hot(torch.tensor([0, 0, 1, 1]), 2)
    return labels, points


def cell_b5249cc2():
    # cell b5249cc2
    def some_features(n=20, d=6, way=4, scale=5.0, shift=3.0):
        "Features of any scale and place, and their classes, equally many of each."
        z = scale * torch.randn(n, d, dtype=torch.float64) + shift
        return z, one_hot(torch.arange(n) % way, way).double()

    def descended(learner, u, y):
        "The head after the learner's steps on these features, from the nearest centroid's."
        state = Descent(*learner.learn(u, y), u, {})
        for _ in range(learner.steps):
            state = learner.step(state, Examples(u, y))
        return state.weight, state.bias

    return descended, some_features


def test_labels_of_batches():
    # cell 2b0ace1f
    numbers = Classes.of({str(k): torch.full((k + 1, 1), float(k)) for k in range(4)})
    batches = Batches(numbers, size=1000)
    support, query = batches.sample(3)
    assert support.x.shape == (3, 0, 1) and support.y.shape == (3, 0, 4)  # nothing to learn from
    assert torch.equal(query.y.argmax(-1).float(), query.x[..., 0])
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(query.y.mean((0, 1)), share, atol=0.05, rtol=0)

    one, other = (batches.sample(2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.query.x, other.query.x)  # the same numbers twice
    assert batches.describe()["examples"]["shape"] == [1] and repr(batches).endswith("size=1000)")


@pytest.mark.proves("eq-transfer-cosine")
def test_two_heads_by_hand():
    # cell e65354cb
    z, w, b = (
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        torch.tensor([0.0, 1.0]),
    )
    torch.testing.assert_close(linear(z, w, b), torch.tensor([[6.0, 5.0]]))
    torch.testing.assert_close(cosine(z, w, b), torch.tensor([[6.0, 9.0]]))
    longer = w * torch.tensor([[100.0], [1.0]])
    torch.testing.assert_close(linear(z, longer, b), torch.tensor([[600.0, 5.0]]))
    torch.testing.assert_close(cosine(7 * z, longer, b), cosine(z, w, b))
    assert cosine(0 * z, w, b).isfinite().all()  # a dead network is no direction


def test_nearest_centroid_is_a_linear_head():
    as_is, features_of = cell_5582b5cb()
    labels, points = cell_6c2bb46c()
    # cell a7861c75
    weight, bias, _ = state = Pretrained(as_is).adapt(Examples(points, labels))
    assert weight.tolist() == [[2.0, 0.0], [8.0, 4.0]] and bias.tolist() == [-1.0, -20.0]
    query = torch.tensor([[2.0, 1.0]])
    assert Pretrained(as_is).predict(state, query).tolist() == [[3.0, 0.0]]

    z, y = torch.randn(40, 6).double(), one_hot(torch.arange(40) % 5, 5).double()
    logits = Pretrained(as_is)(Examples(z, y), z)
    distances = -squared_euclidean(z, prototypes(z, y))
    torch.testing.assert_close(logits.softmax(1), distances.softmax(1))


def test_cosine_centroid():
    as_is, features_of = cell_5582b5cb()
    # cell 2604ab3e
    z, y = torch.randn(10, 6), one_hot(torch.arange(10) % 2, 2)
    learner = Pretrained(as_is, logits="cosine")
    means = torch.stack([F.normalize(z[k::2], dim=1).mean(0) for k in range(2)])
    nearest = F.cosine_similarity(z[:, None], means, dim=-1)
    torch.testing.assert_close(learner(Examples(z, y), z), SCALE * nearest)
    long = z * torch.rand(10, 1)  # other lengths, the same directions
    torch.testing.assert_close(learner(Examples(long, y), z), SCALE * nearest)


def test_on_episodes_it_is_a_prototypical_network():
    # cell 95933c58
    noise = Classes(torch.rand(60, 1, 16, 16), sizes=torch.full((5,), 12))
    episode = FewShot(noise, way=3, shot=2, query=3).sample(1)
    episode = Episode(*(Examples(side.x[0], side.y[0]) for side in episode))
    net = Conv4(size=16, width=4, stats="support")
    losses, gradients = [], []
    for learner in (Pretrained(net), ProtoNet(net)):
        losses.append(learner.loss(episode))
        gradients.append(torch.autograd.grad(losses[-1], list(net.parameters())))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_batches_have_the_loss_of_an_ordinary_classifier():
    # cell fddbc332
    noise = Classes(torch.rand(60, 1, 16, 16), sizes=torch.full((5,), 12))
    learner = Pretrained(Conv4(size=16, width=4, stats="running"), classes=5)
    batch = Batches(noise, 8).sample(1)
    support, query = (Examples(side.x[0], side.y[0]) for side in batch)
    logits = learner.base(learner.embed(query.x))
    expected = F.cross_entropy(logits, query.y.argmax(1))
    torch.testing.assert_close(learner.loss(Episode(support, query)), expected)


def test_keeps_the_contract(device):
    # cell ca2da532
    noise = Classes(torch.rand(60, 1, 16, 16), sizes=torch.full((5,), 12))
    for logits, stats in (("linear", "batch"), ("cosine", "support"), ("linear", "running")):
        learner = Pretrained(Conv4(size=16, width=4, stats=stats), logits=logits)
        check_learner(learner.to(device), FewShot(noise, way=3, shot=2, query=3))
    for logits in HEADS:
        net = Conv4(size=16, width=4, stats="running")
        check_learner(Pretrained(net, 5, logits).to(device), Batches(noise, size=8))
    assert METHODS["pretrained"].__name__ == "Pretrained"  # trained folders are found by this name


def test_chosen_by_few_shot_tasks():
    # cell 576d897e
    noise = Classes(torch.rand(60, 1, 16, 16), sizes=torch.full((5,), 12))
    learner = Pretrained(Conv4(size=16, width=4, stats="running"), classes=5)
    few = FewShot(noise, way=3, shot=2, query=3).freeze(4)
    run = fit(
        learner, Batches(noise, 8), steps=2, meta_batch=1, validate=few, every=1, progress=False
    )
    assert run.best.episodes == few.hash and run.best_step in (1, 2)
    torch.testing.assert_close(evaluate(learner, few).per_task, run.best.per_task)
    taken_over = Pretrained(learner.embed)  # the base classes' layer stays behind
    torch.testing.assert_close(evaluate(taken_over, few).per_task, run.best.per_task)


@pytest.mark.proves("eq-transfer-first-step")
def test_first_step_writes_the_class_means():
    as_is, features_of = cell_5582b5cb()
    labels, points = cell_6c2bb46c()

    # cell 9891c75b
    def first_step(z, y, alpha=1.0):
        "A step of gradient descent from zero."
        zero = z.new_zeros(y.shape[1], z.shape[1]), z.new_zeros(y.shape[1])
        return tuple(-alpha * g for g in grad(FineTune(as_is).support_loss)(zero, z, y))

    w, b = first_step(points, labels)  # by hand
    assert w.tolist() == [[-0.75, -0.5], [0.75, 0.5]] and b.tolist() == [0.0, 0.0]
    z = 5 * torch.randn(20, 6).double() + 3
    y = one_hot(torch.arange(20) % 4, 4).double()
    w, b = first_step(z, y, alpha=0.3)
    torch.testing.assert_close(w, 0.3 / 4 * (prototypes(z, y) - z.mean(0)))
    torch.testing.assert_close(b, torch.zeros(4).double())


@pytest.mark.proves("eq-transfer-gradient")
def test_gradient_of_the_last_layer():
    as_is, features_of = cell_5582b5cb()
    descended, some_features = cell_b5249cc2()
    # cell fbe9af1e
    z, y = some_features()
    w, b = torch.randn(4, 6).double(), torch.randn(4).double()
    for_w, for_b = grad(FineTune(as_is).support_loss)((w, b), z, y)
    excess = linear(z, w, b).softmax(1) - y  # p - y
    torch.testing.assert_close(for_w, (excess[:, :, None] * z[:, None]).mean(0))
    torch.testing.assert_close(for_b, excess.mean(0))


@pytest.mark.proves("eq-transfer-spread")
def test_answers_do_not_depend_on_units():
    as_is, features_of = cell_5582b5cb()
    labels, points = cell_6c2bb46c()
    descended, some_features = cell_b5249cc2()
    # cell 4f459f50
    m, r = spread(points)  # by hand: (7.25 + 1.25 + 1.25 + 7.25) / 4
    assert m.tolist() == [2.5, 1.0] and r.square().item() == pytest.approx(4.25)

    z, y = some_features()
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    learner = FineTune(as_is, steps=30)
    logits = learner(Examples(z, y), z)
    for factor, shift in ((1.0, 0.0), (1e-3, 0.0), (1e3, 0.0), (1.0, 50.0)):
        other = factor * z @ turn + shift
        torch.testing.assert_close(learner(Examples(other, y), other), logits)

    m, r = spread(z)
    u = (z - m) / r
    torch.testing.assert_close(u.square().sum(1).mean(), torch.tensor(1.0).double())
    torch.testing.assert_close(
        linear(u, *descended(learner, u, y)), logits
    )  # the two forms of the head


@pytest.mark.proves("eq-transfer-curvature")
def test_no_direction_is_curved_above_a_half():
    as_is, features_of = cell_5582b5cb()
    descended, some_features = cell_b5249cc2()

    # cell 6c34977a
    def largest_curvature(z, y, size):
        "The largest eigenvalue of the Hessian for features as `FineTune` trains on them."
        m, r = spread(z)
        u, d, way = (z - m) / r, z.shape[1], y.shape[1]
        support_loss = FineTune(as_is).support_loss

        def loss_of(flat):
            return support_loss((flat[: way * d].view(way, d), flat[way * d :]), u, y)

        curvature = hessian(loss_of)(size * torch.randn(way * d + way, dtype=z.dtype))
        assert u.mean(0).abs().max() < 1e-9  # so that the bias has its direction for itself
        rows = torch.cat([u, torch.ones_like(u[:, :1])], 1)
        assert torch.linalg.eigvalsh(rows.T @ rows / len(u))[-1] < 1 + 1e-9  # step 3
        return torch.linalg.eigvalsh(curvature)[-1].item()

    for size in (0.0, 1.0, 10.0):
        for scale, shift, way in ((5.0, 3.0, 4), (1e-2, 100.0, 4), (5.0, 3.0, 2)):
            z, y = some_features(way=way, scale=scale, shift=shift)
            assert largest_curvature(z, y, size) <= 0.5 + 1e-9
    line = torch.tensor([[-1.0, 0, 0], [1, 0, 0]]).double()  # the worst case
    assert largest_curvature(line, one_hot(torch.tensor([0, 1]), 2).double(), 0.0) > 0.49


@pytest.mark.proves("eq-transfer-descent")
def test_the_loss_falls_at_every_step():
    as_is, features_of = cell_5582b5cb()
    descended, some_features = cell_b5249cc2()
    # cell 3895283e
    z, y = some_features(scale=20.0)
    m, r = spread(z)
    u = (z - m) / r
    for alpha in (0.5, 1.0, 2.0, 3.9):
        for steps in range(8):
            before, after = (FineTune(as_is, steps=k, lr=alpha) for k in (steps, steps + 1))
            head = descended(before, u, y)
            g = grad(before.support_loss)(head, u, y)
            fall = alpha * (1 - alpha / 4) * sum(t.square().sum() for t in g)
            gone = before.support_loss(head, u, y) - after.support_loss(
                descended(after, u, y), u, y
            )
            assert gone >= fall - 1e-12 and fall > 0


@pytest.mark.proves("eq-transfer-cosine-gradient")
def test_cosine_rows_only_grow():
    as_is, features_of = cell_5582b5cb()
    descended, some_features = cell_b5249cc2()
    # cell 6dd18c8f
    z, w = torch.randn(1, 6).double(), 3 * torch.randn(1, 6).double()
    derivative = grad(lambda w: cosine(z, w, torch.zeros(1).double()).sum())(w)
    z_hat, w_hat = F.normalize(z), F.normalize(w)
    across = z_hat - (w_hat * z_hat).sum() * w_hat
    torch.testing.assert_close(derivative, SCALE / w.norm() * across)

    z, y = some_features()
    lengths = torch.stack(
        [
            descended(FineTune(as_is, logits="cosine", steps=k), z, y)[0].norm(dim=1)
            for k in range(6)
        ]
    )
    torch.testing.assert_close(lengths[0], torch.full((4,), SCALE).double())
    assert (lengths.diff(dim=0) > 0).all()


def test_without_steps_it_is_the_nearest_centroid():
    as_is, features_of = cell_5582b5cb()
    descended, some_features = cell_b5249cc2()
    # cell 85add596
    z, y = some_features()
    _, r = spread(z)
    still, plain = FineTune(as_is, steps=0), Pretrained(as_is)
    probability = plain(Examples(z / r, y), z / r).softmax(1)
    torch.testing.assert_close(still(Examples(z, y), z).softmax(1), probability)
    assert torch.equal(still(Examples(z, y), z).argmax(1), plain(Examples(z, y), z).argmax(1))
    same = [m(as_is, logits="cosine", **k) for m, k in ((FineTune, {"steps": 0}), (Pretrained, {}))]
    torch.testing.assert_close(*[learner(Examples(z, y), z) for learner in same])

    few, names = z[:8], y[:8]  # 8 points, 6 numbers each, 4 classes
    fitted = FineTune(as_is, steps=1000)(Examples(few, names), few)
    assert (fitted.argmax(1) == names.argmax(1)).all()


def test_fine_tuning_keeps_the_contract(device):
    # cell c2fc5de4
    noise = Classes(torch.rand(60, 1, 16, 16), sizes=torch.full((5,), 12))
    for logits, stats in (("linear", "batch"), ("cosine", "support"), ("linear", "running")):
        learner = FineTune(Conv4(size=16, width=4, stats=stats), logits=logits, steps=2)
        check_learner(learner.to(device), FewShot(noise, way=3, shot=2, query=3))
    net = Conv4(size=16, width=4, stats="running")
    check_learner(FineTune(net, 5, "cosine").to(device), Batches(noise, size=8))
    assert METHODS["finetune"].__name__ == "FineTune"


def test_the_last_layer_lives_where_the_network_does():
    # cell ca56e6da
    net = Conv4(size=16, width=4, stats="running").double()
    assert Pretrained(net, classes=5).base.weight.dtype == torch.float64
    assert Pretrained(net.to("meta"), classes=5).base.weight.device.type == "meta"
    plain = nn.Flatten()
    plain.features = 256  # a network without parameters
    assert Pretrained(plain, classes=5).base.weight.device == torch.empty(0).device


def test_a_class_without_an_example():
    as_is, features_of = cell_5582b5cb()
    # cell 06def926
    z, y = torch.randn(4, 6), one_hot(torch.tensor([0, 0, 1, 1]), 3)
    for learner in (Pretrained(as_is), FineTune(as_is, steps=0)):
        missing = learner(Examples(z, y), z)
        assert missing[:, :2].isfinite().all() and missing[:, 2].isnan().all()
    assert FineTune(as_is, steps=1)(Examples(z, y), z).isnan().all()


def test_what_is_refused():
    as_is, features_of = cell_5582b5cb()
    # cell df8248cf
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        Pretrained(as_is, logits="cosin")
    for wrong in ({"steps": -1}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match="expected"):
            FineTune(as_is, **wrong)
    with pytest.raises(ValueError, match="classes=0"):
        Pretrained(Conv4(stats="running"), classes=0)
    with pytest.raises(ValueError, match="set its attribute features"):
        Pretrained(as_is, classes=5)
    with pytest.raises(ValueError, match="without a head"):
        with_head = Pretrained(Conv4(size=16, width=4, out=7), classes=5)
        with_head(Examples(torch.rand(0, 1, 16, 16), torch.zeros(0, 5)), torch.rand(2, 1, 16, 16))


def test_features_once_give_the_same_scores():
    as_is, features_of = cell_5582b5cb()
    # cell 4d0afd6a
    noise = Classes(torch.randint(0, 256, (60, 1, 16, 16), dtype=torch.uint8), torch.full((5,), 12))
    net = Conv4(size=16, width=4, stats="running")
    for head in (Pretrained, FineTune):
        slow = evaluate(head(net), FewShot(noise, 3, 2, 3), n=5)
        fast = evaluate(head(as_is), FewShot(features_of(net, noise), 3, 2, 3), n=5)
        assert paired(slow, fast).mean == pytest.approx(0, abs=1e-6) and slow.n == 5


@pytest.mark.proves("eq-transfer-floor")
def test_cosine_loss_has_a_floor():
    # cell a8f84c83
    def floor(n, s=SCALE):
        return math.log(1 + (n - 1) * math.exp(-s * n / (n - 1)))

    def loss_where_features_are_weights(w):
        logits = cosine(w, w, torch.zeros(len(w)).double())
        return F.cross_entropy(logits, torch.arange(len(w))).item()

    for n in (2, 5, 9):
        regular = torch.eye(n).double() - 1 / n  # the corners of a regular simplex
        assert loss_where_features_are_weights(7 * regular) == pytest.approx(floor(n))
        for d in (2, 4, 20):
            w = torch.randn(n, d).double()
            assert loss_where_features_are_weights(w) >= floor(n) - 1e-12
            for near in (
                0.0,
                0.5,
                1.0,
            ):  # features anywhere, or around what is best, and any biases
                z, b = torch.randn(n, d).double(), torch.randn(n).double()
                z = near * (F.normalize(w) - F.normalize(w).mean(0)) + (1 - near) * z
                assert F.cross_entropy(cosine(z, w, b), torch.arange(n)) >= floor(n) - 1e-12
    assert [round(floor(n, s), 2) for n, s in ((2, 2), (409, 2), (409, 10))] == [0.02, 4.02, 0.02]


def test_the_larger_network():
    # cell bfd1d31b
    sizes = [parameter_count(net) for net in (ResNet12(1, stats="running"), Conv4(stats="running"))]
    assert sizes[0] > 100 * sizes[1]


def test_somebody_elses_network():
    as_is, features_of = cell_5582b5cb()

    # cell 3c271e7a
    class Backbone(nn.Module):
        "Somebody else's network, frozen: images in, features out."

        def __init__(self, model, features):
            super().__init__()
            self.model, self.features = model.requires_grad_(False), features

        def train(self, mode=True):
            return super().train(False)

        def forward(self, x):
            return self.model(x).flatten(1)

    # cell 97e045c2
    theirs = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    )
    embed = Backbone(theirs.train(), features=16)
    noise = Classes(torch.rand(60, 1, 16, 16), sizes=torch.full((5,), 12))
    tasks = FewShot(noise, 3, 2, 3).freeze(6)
    before = theirs[1].running_mean.clone()
    once = evaluate(FineTune(as_is), FewShot(features_of(embed, noise), 3, 2, 3).freeze(6))
    assert paired(evaluate(FineTune(embed), tasks), once).mean == pytest.approx(0, abs=1e-6)

    learner = FineTune(embed, classes=5)  # a new last layer for the base classes, and nothing else
    fit(learner, Batches(noise, 8), steps=3, meta_batch=1, progress=False)
    assert {k for k, p in learner.named_parameters() if p.requires_grad} == {
        "base.weight",
        "base.bias",
    }
    assert torch.equal(theirs[1].running_mean, before)


def test_no_statistics_from_an_empty_support_set():
    # cell 9f1d1a4d
    with pytest.raises(ValueError, match='stats="running"'):
        Pretrained(Conv4(stats="support"), classes=5)
    assert Pretrained(Conv4(stats="support")).base is None  # without base classes it can be used


def test_a_rate_without_units():
    as_is, features_of = cell_5582b5cb()
    descended, some_features = cell_b5249cc2()

    # cell daf2820e
    def careless_descent(z, y, rate=0.5, steps=100):
        "Gradient descent on features as they come, from zero; the support loss at its end."
        head = (
            torch.zeros(y.shape[1], z.shape[1], dtype=z.dtype),
            torch.zeros(y.shape[1], dtype=z.dtype),
        )
        loss = FineTune(as_is).support_loss
        for _ in range(steps):
            head = tuple(p - rate * g for p, g in zip(head, grad(loss)(head, z, y), strict=True))
        return loss(head, z, y).item()

    z, y = some_features(
        n=60, d=3, scale=1.0, shift=1.0
    )  # the classes overlap: no head fits them all
    assert careless_descent(z, y) < math.log(4) < 3 * math.log(4) < careless_descent(10 * z, y)
    for factor in (1.0, 10.0, 1000.0):
        support = Examples(factor * z, y)
        assert FineTune(as_is).loss(Episode(support, support)) < math.log(4)


def test_a_forgotten_support_set():
    # cell 91952654
    images, empty = torch.rand(2, 1, 16, 16), torch.rand(0, 1, 16, 16)
    net = Conv4(size=16, width=4, stats="running")
    with pytest.raises(ValueError, match="0 of this learner, but the task's way is 3"):
        Pretrained(net)(Examples(empty, torch.zeros(0, 3)), images)
    with pytest.raises(ValueError, match="classes=3 to pre-train"):
        Pretrained(net, classes=5)(Examples(empty, torch.zeros(0, 3)), images)
    assert Pretrained(net, classes=5)(Examples(empty, torch.zeros(0, 5)), images).shape == (2, 5)
