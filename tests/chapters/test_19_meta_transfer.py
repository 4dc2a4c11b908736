"""Made from nbs/19_meta_transfer.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math
from functools import partial
from itertools import permutations

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F

from metabook.classes import Classes
from metabook.episodes import Episode, Examples, FewShot, VariedWayShot, one_hot
from metabook.learners import Learner
from metabook.meta_transfer import (
    HardTasks,
    MetaTransfer,
    class_accuracy,
    first_head,
    scale_and_shift,
)
from metabook.networks import MLP, BatchNorm, Conv4, ResNet12, call, parameter_count
from metabook.testing import check_learner
from metabook.training import Report, fit
from metabook.transfer import Descent, linear


def cell_00fa8660():
    # cell 00fa8660
    def by_hand(**options):
        "MetaTransfer on the network z = 2 x, a support set and a query set of one example of class 0."
        net = MLP([1, 1]).double()
        with torch.no_grad():
            net.layers[0].weight.fill_(2.0)
            net.layers[0].bias.zero_()
        y = torch.tensor([[1.0, 0.0]]).double()
        support, query = (Examples(torch.tensor([[x]]).double(), y) for x in (1.0, 3.0))
        return MetaTransfer(net, lr=0.1, **options).double(), Episode(support, query)

    def close(a, *numbers):
        "Assert that a tensor holds these numbers."
        expected = torch.tensor(numbers, dtype=a.dtype, device=a.device)
        torch.testing.assert_close(a.detach().flatten(), expected, rtol=1e-4, atol=1e-4)

    return by_hand, close


def cell_08f6664e():
    # cell 08f6664e
    def many_classes(count=20):
        "Classes of random vectors."
        g = torch.Generator().manual_seed(0)
        return Classes.of({str(i): torch.randn(8, 3, generator=g) for i in range(count)})

    def rigged(tasks, n, generator, bad=7):
        "A report of a step on `n` tasks: all answers are right, but for the queries of one class."
        episodes = tasks.sample(n, generator)
        where = (episodes.support.info["classes"] == bad).to(episodes.query.y.dtype)  # [tasks, way]
        missed = (episodes.query.y * where[:, None]).sum(-1, keepdim=True)  # [tasks, m, 1]
        answers = episodes.query.y + 2 * missed * episodes.query.y.roll(1, -1)
        return Report(episodes, torch.zeros(n), answers)

    return many_classes, rigged


@pytest.mark.proves("eq-mtl-scale-shift")
def test_a_layer_by_hand():
    # cell 10212ff0
    layer = torch.nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -1.0]).view(1, 2, 1, 1))
        layer.bias.fill_(1.0)
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    rho, delta = torch.tensor([0.5, 2.0]).view(1, 2, 1, 1), torch.tensor([-1.0])
    assert layer(x).item() == 3.0
    assert call(layer, scale_and_shift(layer, [rho], [delta]), x).item() == -5.0

    bare = torch.nn.Conv2d(2, 1, 1, bias=False)
    new = scale_and_shift(bare, [torch.ones(1, 2, 1, 1)], [delta])
    torch.testing.assert_close(call(bare, new, x), bare(x) - 1)


def test_in_use(device):
    # cell 85ca25df
    net = Conv4(size=16, width=4, pool="stride", stats="running").eval()
    learner = MetaTransfer(net, steps=5).to(device)
    x = torch.randn(10, 1, 16, 16)
    support = Examples.of(x.to(device), torch.arange(10, device=device) % 5, way=5)
    assert learner(support, torch.randn(7, 1, 16, 16, device=device)).shape == (7, 5)
    wanted = {name.split(".")[0] for name, p in learner.named_parameters() if p.requires_grad}
    assert wanted == {"scale", "shift"}
    assert all(p.requires_grad for p in net.parameters())  # it was copied

    for other in (net, ResNet12(1, widths=[2, 3, 4, 5], stats="running").eval(), MLP([256, 9, 6])):
        fresh = MetaTransfer(other)
        torch.testing.assert_close(call(fresh.net, fresh.weights(), x), other(x), rtol=0, atol=0)

    double = MetaTransfer(MLP([6, 5]).double(), way=3)  # what is learned goes where the network is
    assert double(
        Examples(torch.randn(6, 6).double(), torch.eye(3).double().repeat(2, 1)),
        torch.randn(2, 6).double(),
    ).shape == (2, 3)
    assert all(p.is_meta for p in MetaTransfer(MLP([6, 5]).to("meta"), way=3).parameters())


@pytest.mark.proves("eq-mtl-count")
def test_counts():
    # cell f6a8116b
    def learned(learner):
        "How many numbers the outer loop changes."
        return sum(p.numel() for p in learner.parameters() if p.requires_grad)

    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    assert (parameter_count(layer), learned(MetaTransfer(layer))) == (36_928, 4_160)
    point = torch.nn.Conv2d(64, 64, 1)
    assert parameter_count(point) == learned(MetaTransfer(point)) == 4_160


@pytest.mark.proves("eq-mtl-inner")
def test_head_by_hand():
    by_hand, close = cell_00fa8660()
    # cell ebfc3054
    learner, task = by_hand(steps=1)
    weight, bias, _ = learner.adapt(task.support)
    close(weight, 0.1, -0.1)
    close(bias, 0.05, -0.05)
    close(learner(task.support, task.query.x), 0.65, -0.65)
    close(learner.loss(task), math.log(1 + math.exp(-1.3)))  # J of this one task
    two = by_hand(steps=2)[0].adapt(task.support)
    p = 1 / (
        1 + math.exp(0.5)
    )  # of the wrong class at the second step: the logits are +-0.25 there
    close(two.weight, 0.1 + 0.2 * p, -0.1 - 0.2 * p)
    tested = by_hand(steps=0, test_steps=2)[0].eval().adapt(task.support)
    torch.testing.assert_close(tested.weight, two.weight)


@pytest.mark.proves("eq-mtl-first-step")
def test_first_step_is_prototypes():
    # cell 94da6e7f
    z, labels = torch.randn(12, 6).double(), torch.arange(12) % 4
    y = F.one_hot(labels, 4).double()
    learner = MetaTransfer(MLP([6, 6]), steps=1, lr=0.3)
    state = Descent(*first_head(learner, z, y), z, {})
    weight, bias, *_ = learner.step(state, Examples(z, y))
    means = torch.stack([z[labels == k].mean(0) for k in range(4)])
    torch.testing.assert_close(weight, 0.3 / 4 * (means - z.mean(0)))
    torch.testing.assert_close(bias, torch.zeros(4).double())


def test_long_features_are_a_large_rate():
    # cell ff9879f2
    torch.manual_seed(0)
    z, y = torch.randn(8, 6).double(), F.one_hot(torch.arange(8) % 4, 4).double()
    learner = MetaTransfer(MLP([6, 6]), lr=0.1)
    state = Descent(*first_head(learner, z, y), 2 * z, {})  # features twice as long
    w, v = first_head(learner, z, y)
    for _ in range(5):
        state = learner.step(state, Examples(z, y))
        g_w, g_v = grad(learner.support_loss)((w, v), z, y)
        w, v = w - 4 * 0.1 * g_w, v - 0.1 * g_v  # four times the rate, on the features as they were
    torch.testing.assert_close(2 * state.weight, w)
    torch.testing.assert_close(state.bias, v)

    learner = MetaTransfer(MLP([1, 1]), lr=0.1)
    state = Descent(torch.zeros(2, 1), torch.zeros(2), torch.tensor([[3.0], [1.0]]), {})
    borders = [0.0]
    for _ in range(50):
        state = learner.step(state, Examples(state.z, torch.eye(2)))
        borders.append(
            ((state.bias[1] - state.bias[0]) / (state.weight[0] - state.weight[1])).item()
        )
    assert (
        abs(borders[1]) < 1e-6 and round(borders[20], 2) == 0.88 and round(borders[50], 2) == 1.38
    )

    shapes = [(1, 14), (32, 7), (32, 4), (32, 2)]  # channels in, side of the map that comes out
    assert sum(9 * c * 32 * side**2 for c, side in shapes) == 692_352


@pytest.mark.proves("eq-mtl-shared-row")
def test_a_shared_row_does_nothing():
    # cell b3b4a3c1
    torch.manual_seed(0)
    net = MLP([6, 5]).double()
    x, y = torch.randn(8, 6).double(), F.one_hot(torch.arange(8) % 3, 3).double()
    shared = MetaTransfer(net, way=3, steps=7).double()
    u = torch.randn(5).double()
    with torch.no_grad():
        shared.rows.weight.copy_(u.expand(3, 5))
        shared.rows.bias.fill_(0.7)
    zero = MetaTransfer(net, steps=7).double()
    queries = torch.randn(9, 6).double()
    given, expected = (learner.adapt(Examples(x, y)) for learner in (shared, zero))
    torch.testing.assert_close(given.weight, expected.weight + u)
    torch.testing.assert_close(
        shared.predict(given, queries).softmax(-1), zero.predict(expected, queries).softmax(-1)
    )


def test_zero_is_stationary():
    # cell 96673904
    torch.manual_seed(0)
    learner = MetaTransfer(MLP([6, 5]).double(), way=3, steps=4).double()
    for p in learner.rows.parameters():
        torch.nn.init.zeros_(p)
    x, y = torch.randn(2, 6, 6).double(), F.one_hot(torch.arange(6) % 3, 3).double()
    each = []
    for order in permutations(range(3)):  # all ways to deal the labels
        named = y[:, list(order)]
        value = learner.loss(Episode(Examples(x[0], named), Examples(x[1], named)))
        each.append(torch.autograd.grad(value, learner.rows.weight)[0])
    assert each[0].abs().max() > 1e-3  # of one task: not zero
    assert torch.stack(each).mean(0).abs().max() < 1e-12


def test_contract():
    # cell 40ad2edc
    tasks = FewShot(
        Classes.of(
            {str(i): torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8) for i in range(5)}
        ),
        way=3,
        shot=2,
        query=2,
    )
    net = Conv4(size=16, width=4, pool="stride", stats="running")
    for learner in (
        MetaTransfer(net, steps=2),
        MetaTransfer(Conv4(size=16, width=4, stats="support"), steps=2),
        MetaTransfer(net, way=3, steps=2, test_steps=4),
        MetaTransfer(net, steps=2, first_order=True),
        MetaTransfer(ResNet12(1, widths=[2, 2, 3, 4], stats="running"), steps=2),
    ):
        assert "passed" in check_learner(learner, tasks).values()


def test_errors_say_what_to_do():
    by_hand, close = cell_00fa8660()
    # cell 3001df4a
    with pytest.raises(ValueError, match=r"lr=0\.0, expected a positive inner rate"):
        MetaTransfer(MLP([2, 2]), lr=0.0)
    with pytest.raises(ValueError, match="steps=-1, expected at least 0"):
        MetaTransfer(MLP([2, 2]), steps=-1)
    with pytest.raises(ValueError, match="Identity has no convolution and no linear layer"):
        MetaTransfer(torch.nn.Identity())
    with pytest.raises(ValueError, match="way=0, expected an integer of at least 1"):
        MetaTransfer(MLP([2, 2]), way=0)
    with pytest.raises(ValueError, match="Linear does not say how long its embeddings are"):
        MetaTransfer(torch.nn.Linear(2, 2), way=3)
    whole = MetaTransfer(Conv4(size=16, width=4, out=5, pool="stride"))
    with pytest.raises(ValueError, match="5 numbers where its attribute features says 4"):
        whole.adapt(Examples(torch.randn(3, 1, 16, 16), torch.eye(3)))
    _, task = by_hand()
    with pytest.raises(ValueError, match="built for way=5, but this task's way is 2"):
        MetaTransfer(MLP([1, 1]), way=5).double()(task.support, task.query.x)


@pytest.mark.proves("eq-mtl-two-ways")
def test_two_ways():
    by_hand, close = cell_00fa8660()

    # cell 07d0a145
    def meta_gradient(**options):
        learner, task = by_hand(steps=1, **options)
        gradients = torch.autograd.grad(learner.loss(task), [*learner.scale, *learner.shift])
        return torch.cat([g.flatten() for g in gradients])

    slope = -1 / (1 + math.exp(1.3))
    close(meta_gradient(), 2.4 * slope, 0.8 * slope)
    close(meta_gradient(first_order=True), 1.2 * slope, 0.2 * slope)


def test_pulled_to_its_queries():
    # cell 43527804
    torch.manual_seed(0)
    z_s, z_q = torch.randn(6, 5).double().requires_grad_(), torch.randn(4, 5).double()
    y_s, y_q = (F.one_hot(torch.arange(n) % 3, 3).double() for n in (6, 4))
    learner = MetaTransfer(MLP([5, 5]), lr=0.2)
    head = learner.step(Descent(*first_head(learner, z_s, y_s), z_s, {}), Examples(z_s, y_s))
    logits = linear(z_q, head.weight, head.bias)
    (found,) = torch.autograd.grad(learner.criterion(logits, y_q), z_s)
    gap = (
        logits.softmax(-1) - y_q
    ) @ y_s.T  # [query, support]: p of its class, less 1 if it is theirs
    torch.testing.assert_close(found, 0.2 / (6 * 4) * gap.T @ z_q)

    for t, exact, cut in ((1, 1.0, 0.5), (10, 0.0195, 0.999)):
        for detach, expected in ((False, exact), (True, cut)):
            rho, w = torch.ones((), dtype=torch.float64, requires_grad=True), 0.0
            for _ in range(t):
                g = rho * (w * rho - 1)
                w = w - 0.5 * (g.detach() if detach else g)
            assert abs(torch.autograd.grad(w * rho, rho)[0].item() - expected) < 1e-4


@pytest.mark.proves("eq-mtl-one-scale")
def test_one_scale():
    # cell 1a2b9c04
    torch.manual_seed(0)
    net = Conv4(size=16, width=4, pool="stride", stats="running").double().eval()
    learner = MetaTransfer(net, steps=3).double()
    x, y = torch.randn(8, 1, 16, 16).double(), F.one_hot(torch.arange(8) % 2, 2).double()
    task = Episode(Examples(x[:4], y[:4]), Examples(x[4:], y[4:]))
    found = torch.autograd.grad(learner.loss(task), list(learner.scale))
    learner.net.requires_grad_(True)  # now the weights themselves are asked
    for layer, by_scale in zip(learner.net.convs, found, strict=True):
        (g,) = torch.autograd.grad(learner.loss(task), [layer.weight])  # g, for rho = 1
        torch.testing.assert_close(by_scale, (layer.weight * g).sum((2, 3), keepdim=True))
        assert (by_scale != 0).any()


@pytest.mark.proves("eq-mtl-invisible")
def test_hidden_by_the_batch():
    # cell 14e2a9ba
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BatchNorm(4, eps=1e-2)).double()
    x = torch.randn(5, 3, 8, 8).double()
    learner = MetaTransfer(net).double()
    with torch.no_grad():
        learner.scale[0].fill_(0.2)
        learner.shift[0].copy_(torch.randn(4))
    net[1].eps /= 0.2**2
    torch.testing.assert_close(call(learner.net, learner.weights(), x), net(x))

    x = torch.randn(6, 1, 16, 16)
    y = F.one_hot(torch.arange(6) % 3, 3).float()
    for stats, hidden in (("batch", True), ("running", False)):
        learner = MetaTransfer(Conv4(size=16, width=4, pool="stride", stats=stats)).double()
        task = Episode(Examples(x, y), Examples(x.flip(-1), y)).to(dtype=torch.float64)
        gradients = torch.autograd.grad(learner.loss(task), list(learner.shift))
        assert all((g.abs().max() < 1e-12) == hidden for g in gradients)


@pytest.mark.proves("eq-mtl-affine")
def test_as_good_as_the_affine():
    # cell 42ac4e36
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BatchNorm(4, "running")).double().eval()
    conv, norm = net
    norm.mean.copy_(torch.randn(4))
    norm.var.copy_(torch.rand(4) + 0.5)
    a, d = torch.rand(4).double() + 0.5, torch.randn(4).double()
    learner = MetaTransfer(net).double()
    with torch.no_grad():
        s = (norm.var + norm.eps).sqrt()
        learner.scale[0].copy_(a.view(4, 1, 1, 1).expand(4, 3, 1, 1))
        learner.shift[0].copy_((a - 1) * (conv.bias - norm.mean) + s * d / norm.weight)
        norm.weight.mul_(a)
        norm.bias.add_(d)
    x = torch.randn(5, 3, 8, 8).double()
    torch.testing.assert_close(call(learner.net, learner.weights(), x), net(x))


def test_two_settings_one_network():
    # cell 6f0612c2
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 3)
    ).double()
    learner, x = MetaTransfer(net).double(), torch.randn(4, 1, 8, 8).double()
    with torch.no_grad():
        learner.scale[0].fill_(5.0)
        learner.shift[0].copy_(4 * net[0].bias)
        learner.scale[1].fill_(1 / 5)
    torch.testing.assert_close(call(learner.net, learner.weights(), x), net(x))


def test_accuracy_of_each_class():
    by_hand, close = cell_00fa8660()
    # cell 8b0e049c
    y = one_hot(torch.tensor([0, 0, 0, 1, 2]), 3)
    answers = one_hot(torch.tensor([0, 2, 0, 0, 2]), 3)
    close(class_accuracy(answers, y), 2 / 3, 0.0, 1.0)
    close(class_accuracy(torch.stack([answers, y]), torch.stack([y, y])), 2 / 3, 0, 1, 1, 1, 1)


def test_shares_add_up():
    # cell df159f0b
    on, off = 0.9 * 5 / 64 + 0.1 * 5 / 10, 0.9 * 5 / 64
    assert round(on, 3) == 0.12 and round(off, 3) == 0.07 and round(on / (5 / 64), 2) == 1.54
    assert math.isclose(10 * on + 54 * off, 5)
    lowest = torch.randn(100_000, 5, generator=torch.Generator().manual_seed(0)).amin(-1).mean()
    assert abs(lowest + 1.163) < 0.02


@pytest.mark.proves("eq-mtl-frequency")
def test_hard_classes_come_more_often():
    many_classes, rigged = cell_08f6664e()

    # cell 876329b6
    def share(every, steps=400, n=16):
        "How many of the tasks that were drawn contain the class that always fails."
        tasks, g = (
            HardTasks(FewShot(many_classes(), 5, 1, 2), every),
            torch.Generator().manual_seed(0),
        )
        found = []
        for _ in range(steps):
            report = rigged(tasks, n, g)
            tasks.feedback(report)
            found.append((report.episodes.support.info["classes"] == 7).any(-1).float())
        return torch.cat(found).mean().item()

    for every in (2, 4):
        expected = (every - 1) / every * 5 / 20 + 1 / every
        found = share(every)
        print(f"every {every}: {found:.3f}, expected {expected:.3f}, without hard tasks 0.250")
        assert abs(found - expected) < 4 * math.sqrt(0.25 * 0.75 / 6400)


def test_one_wrong_answer_fails():
    many_classes, rigged = cell_08f6664e()
    # cell 619cc1fd
    tasks = HardTasks(FewShot(many_classes(), way=5, shot=1, query=2), every=2)
    episodes = tasks.sample(1, torch.Generator().manual_seed(0))
    answers = episodes.query.y.clone()
    answers[0, 0] = answers[0, 0].roll(1)  # one of the two queries of its class
    tasks.feedback(Report(episodes, torch.zeros(1), answers))
    label = episodes.query.y[0, 0].argmax()
    assert class_accuracy(answers, episodes.query.y)[0, label] == 0.5
    assert tasks.failed.nonzero().tolist() == [[episodes.support.info["classes"][0, label]]]


def test_hard_tasks_keep_their_promises(device):
    many_classes, rigged = cell_08f6664e()
    # cell 6e96542f
    few = FewShot(many_classes().to(device), way=5, shot=1, query=2)
    tasks = HardTasks(few, every=2)
    g = torch.Generator(device).manual_seed(0)
    for bad in (3, 7):
        tasks.feedback(rigged(tasks, 40, g, bad))
    assert tasks.hard and tasks.failed.nonzero().flatten().tolist() == [3, 7]
    one, two = (tasks.draw(200, torch.Generator(device).manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for bad in (3, 7):
        assert (one.classes == bad).any(-1).all()
        places = (one.classes == bad).float().mean(0)  # which label the class has
        assert (places > 0.08).all()
    assert all(len(set(row)) == 5 for row in one.classes.tolist())
    assert not (one.support[:, :, None] == one.query[:, None]).any()

    for bad in (0, 1, 2, 3, 4, 5):
        tasks.failed[bad] = True
    assert (tasks.draw(50, g).classes < 8).all()  # 0 to 5 and 7: enough to fill each task
    tasks.feedback(rigged(tasks, 40, g, bad=0))
    assert not tasks.hard and tasks.failed.nonzero().tolist() == [[0]]  # a new list
    tasks.feedback(rigged(tasks, 40, g, bad=99))  # all right: nothing has failed
    assert tasks.failed.sum() == 1


def test_hard_tasks_refuse():
    many_classes, rigged = cell_08f6664e()
    # cell fbf61fa3
    few = FewShot(many_classes(), way=5, shot=1, query=2)
    tasks = HardTasks(few, every=2)
    assert repr(tasks) == f"HardTasks({few}, every=2)" and tasks.device == few.device
    assert tasks.describe() == few.describe() | {"tasks": repr(tasks)}
    with pytest.raises(ValueError, match="hard tasks are for training: freeze FewShot"):
        tasks.freeze(10)
    with pytest.raises(ValueError, match="loss does not call forward"):
        tasks.feedback(Report(few.sample(2), torch.zeros(2), None))
    with pytest.raises(ValueError, match="needs a FewShot with a fixed way and shot"):
        HardTasks(VariedWayShot(many_classes(), way=(3, 5), shot=(1, 2), query=2))
    with pytest.raises(ValueError, match="every=0, expected an integer of at least 1"):
        HardTasks(few, every=0)


def test_frozen_weights_stay():
    # cell 2a44114a
    class Careless(MetaTransfer):
        "Switches the frozen network to training mode with the rest."

        train = Learner.train

    def moved(kind):
        "The tensors of the frozen network that training changed."
        torch.manual_seed(0)
        learner = kind(Conv4(size=16, width=4, pool="stride", stats="running"), steps=2)
        learner.train()  # as many a loop begins
        before = {k: v.clone() for k, v in learner.net.state_dict().items()}
        images = Classes.of({str(i): torch.randn(6, 1, 16, 16) for i in range(5)})
        hard = HardTasks(FewShot(images, way=3, shot=2, query=2), every=2)
        decay = partial(torch.optim.AdamW, weight_decay=0.1)
        fit(learner, hard, steps=4, meta_batch=2, optimizer=decay, lr=0.01, progress=False)
        assert hard.heard == 4 and all((s != 1).any() for s in learner.scale)  # the rest did learn
        return [k for k, v in learner.net.state_dict().items() if not torch.equal(v, before[k])]

    assert moved(MetaTransfer) == []
    assert moved(Careless) == [f"norms.{i}.{name}" for i in range(4) for name in ("mean", "var")]
