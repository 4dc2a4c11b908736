"""Made from nbs/A04_networks.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F

from metabook.classes import Classes
from metabook.engine import losses
from metabook.episodes import Examples, FewShot
from metabook.maml import MAML
from metabook.networks import (
    MLP,
    BatchNorm,
    Conv4,
    ResNet12,
    _check_images,
    batch_norms,
    call,
    parameter_count,
    recording,
    store_running,
    support_statistics,
)
from metabook.prototypes import ProtoNet
from metabook.scores import evaluate


def cell_b93e5d27():
    # cell b93e5d27
    y = torch.zeros(5, 2)
    points, photos = (Examples(torch.zeros(5, *shape), y) for shape in ([1], [3, 32, 32]))
    assert MLP.for_tasks(points, 1) == {"sizes": [1, 40, 40, 1]}  # the network of the sinusoids
    assert MLP.for_tasks(photos, None) == {"sizes": [3 * 32 * 32, 256, 64]}
    assert Conv4.for_tasks(photos, 2) == {"channels": 3, "out": 2, "size": 32}
    assert ResNet12.for_tasks(photos, None) == {"channels": 3, "out": None}
    for network in (MLP, Conv4, ResNet12):
        for out in (2, None):
            net = network(**network.for_tasks(photos, out))
            assert net(photos.x).shape == (5, out or net.features)
    return points, y


def cell_7a5b4814():
    # cell 7a5b4814
    def inner_gradient(layer):
        "The gradient of a linear loss with respect to gamma, as a function of one task."
        return lambda x, g: grad(lambda gamma: (layer(x, gamma) * g).sum())(
            torch.ones_like(x[0])
        ).sum()

    layer = BatchNorm(3).double()

    def ours(x, gamma):
        return call(layer, {"weight": gamma}, x)

    def built_in(x, gamma):
        return F.batch_norm(x, None, None, gamma, None, training=True)

    def in_a_loop_and_lifted(layer, tasks, g):
        "Its derivative with respect to the inputs, computed both ways."
        f = inner_gradient(layer)
        loop = [torch.autograd.grad(f(x, g), x)[0] for x in tasks]
        lifted = torch.autograd.grad(vmap(f, (0, None))(tasks, g).sum(), tasks)[0]
        return torch.stack(loop), lifted

    return in_a_loop_and_lifted, ours


@pytest.mark.proves("eq-batch-mean", "eq-batch-variance", "eq-batch-norm")
def test_batch_norm_by_hand():
    # cell 40818f7d
    x = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9])[:, None]
    y = BatchNorm(1, eps=0.0)(x)
    assert y.flatten().tolist() == [-1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 1.0, 2.0]

    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(10, 4, 5, 5, dtype=torch.float64)
    layer = BatchNorm(4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4))
        layer.bias.copy_(torch.rand(4))
    wanted = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=1e-5)
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=0)
    print(y.flatten().tolist())


@pytest.mark.proves("eq-batch-norm-jacobian")
def test_one_value_moves_another():
    # cell b388c28e
    x = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9], dtype=torch.float64)
    layer = BatchNorm(1).double()
    jacobian = jacrev(lambda x: layer(x[:, None])[:, 0])(x)

    n, s = len(x), (x.var(correction=0) + layer.eps).sqrt()
    hat = (x - x.mean()) / s
    formula = (torch.eye(n) - 1 / n - torch.outer(hat, hat) / n) / s
    torch.testing.assert_close(jacobian, formula)
    print(jacobian[0].detach().numpy().round(3))  # what each input does to the first output


@pytest.mark.proves("eq-batch-norm-gradient")
def test_batch_norm_gradient():
    # cell dbe27bab
    x = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9], requires_grad=True)
    g = torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0])
    layer = BatchNorm(1, eps=0.0)
    (by_hand,) = torch.autograd.grad(layer(x[:, None])[:, 0] @ g, x)
    assert by_hand.tolist() == [2.375, -0.875, -0.875, -0.875, -0.5, -0.5, 0.25, 1.0]

    torch.manual_seed(0)
    x, g = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    layer = BatchNorm(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3))
    gamma = layer.weight.view(1, 3, 1, 1)

    def mean(t):
        return t.mean((0, 2, 3), keepdim=True)

    s = (mean((x - mean(x)) ** 2) + layer.eps).sqrt()
    hat = (x - mean(x)) / s
    formula = gamma / s * (g - mean(g) - hat * mean(g * hat))
    torch.testing.assert_close(grad(lambda x: (layer(x) * g).sum())(x), formula)


@pytest.mark.proves("eq-batch-norm-scale", "eq-weight-scale")
def test_weights_have_no_length():
    # cell 4e13cdf3
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    a, c = 4.0, -2.0
    stretched = BatchNorm(3, eps=0.1).double()(a * x + c)
    torch.testing.assert_close(stretched, BatchNorm(3, eps=0.1 / a**2).double()(x))

    w, target = torch.randn(3, 3, 3, 3, dtype=torch.float64), torch.randn(8, 3, 5, 5)
    layer = BatchNorm(3, eps=0.0).double()

    def loss(w):
        return ((layer(F.conv2d(x, w, padding=1)) - target) ** 2).mean()

    torch.testing.assert_close(grad(loss)(a * w), grad(loss)(w) / a)
    assert abs((w * grad(loss)(w)).sum()) < 1e-12


@pytest.mark.proves("eq-three-modes")
def test_three_modes():
    # cell 1d6881cc
    torch.manual_seed(0)
    support, query = torch.randn(5, 3, 4, 4), 2 + 3 * torch.randn(7, 3, 4, 4)

    def by_statistics_of(x, eps=1e-5):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (query - mean) / (var + eps).sqrt()

    torch.testing.assert_close(BatchNorm(3, "batch")(query), by_statistics_of(query))

    layer = BatchNorm(3, "support")
    statistics = support_statistics(layer, {}, support)
    torch.testing.assert_close(call(layer, {}, query, statistics), by_statistics_of(support))

    layer = BatchNorm(3, "running")
    torch.testing.assert_close(layer(query), by_statistics_of(query))  # in training
    layer.eval()
    torch.testing.assert_close(layer(query), query / (1 + 1e-5) ** 0.5)  # averages still 0 and 1
    layer.mean += 1
    torch.testing.assert_close(layer(query), (query - 1) / (1 + 1e-5) ** 0.5)


@pytest.mark.proves("eq-running")
def test_running_averages():
    # cell c95eeec3
    layer = BatchNorm(1, "running")

    def seen_by_one_task(x):
        with recording(layer, "running") as seen:
            layer(x)
        return seen

    tasks = torch.tensor([[0.0, 2.0], [4.0, 8.0]])[..., None]
    seen = vmap(seen_by_one_task)(tasks)
    assert layer.mean.item() == 0 and layer.var.item() == 1  # nothing was written inside the lift
    store_running(layer, {k: s.mean(0) for k, s in seen.items()})
    torch.testing.assert_close(torch.stack([layer.mean, layer.var]), torch.tensor([[0.35], [1.15]]))
    fast = BatchNorm(1, "running", momentum=1.0)  # forgets at once
    store_running(fast, {k: s.mean(0).requires_grad_() for k, s in seen.items()})
    assert not fast.mean.requires_grad and not fast.var.requires_grad
    torch.testing.assert_close(torch.stack([fast.mean, fast.var]), torch.tensor([[3.5], [2.5]]))


def test_statistics_are_plain():
    # cell f1afc797
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 3), BatchNorm(3, "support"), nn.ReLU(), BatchNorm(3, "support")
    )
    support, query = torch.randn(4, 2), torch.randn(6, 2)
    with recording(net) as outer, recording(net[1]) as inner:
        net(support)
    assert list(outer) == ["1.mean", "1.var", "3.mean", "3.var"] and list(inner) == ["mean", "var"]
    assert outer["1.mean"] is inner["mean"]

    twin = copy.deepcopy(net)
    torch.testing.assert_close(call(twin, {}, query, outer), call(net, {}, query, outer))
    torch.testing.assert_close(net(query), twin(query))  # nothing has stayed behind
    assert not any(list(layer.notes()) for layer in batch_norms(net))

    def through(support):
        return call(net, {}, query, support_statistics(net, {}, support)).square().sum()

    assert grad(through)(support).abs().min() > 0
    lifted = vmap(grad(through))(torch.stack([support, 2 * support]))
    torch.testing.assert_close(lifted[0], grad(through)(support))


def test_batch_norm_errors():
    # cell 9a0dbec9
    with pytest.raises(ValueError, match=r"expected \[n, 3, ...\]"):
        BatchNorm(3)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="is empty, so it has no statistics"):
        BatchNorm(3)(torch.zeros(0, 3, 5, 5))
    with pytest.raises(ValueError, match="channels=0"):
        BatchNorm(0)

    layer, support = BatchNorm(3, "support"), torch.randn(5, 3)
    statistics = support_statistics(layer, {}, support)
    assert call(layer, {}, torch.zeros(0, 3), statistics).shape == (
        0,
        3,
    )  # given statistics need no batch
    with recording(layer) as seen:
        call(layer, {}, support, statistics)
    assert not seen  # the batch was not measured


def test_mlp():
    # cell 524f0138
    torch.manual_seed(0)
    net = MLP([1, 40, 40, 1])
    assert parameter_count(net) == (1 + 1) * 40 + (40 + 1) * 40 + (40 + 1) * 1 == 1761
    assert MLP([784, 5])(torch.zeros(3, 1, 28, 28)).shape == (3, 5)  # images are flattened
    x = torch.randn(4, 1)
    first, second, last = net.layers
    torch.testing.assert_close(net(x), last(F.relu(second(F.relu(first(x))))))

    with pytest.raises(ValueError, match=r"sizes=\[3\], expected at least"):
        MLP([3])
    with pytest.raises(ValueError, match=r"sizes\[1\]=0"):
        MLP([3, 0, 1])
    with pytest.raises(ValueError, match=r"shape \(2, 1, 28, 28\) for an MLP of 10 inputs"):
        MLP([10, 5])(torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match=r"shape \(7,\) for an MLP of 1 inputs"):
        net(torch.zeros(7))


@pytest.mark.proves("eq-conv4-parameters")
def test_conv4_parameters():
    # cell 1dbbedec
    for channels, width in ((1, 64), (3, 64), (3, 32)):
        blocks = 27 * width**2 + 9 * channels * width + 12 * width
        for pool in ("max", "stride"):
            assert parameter_count(Conv4(channels, width=width, pool=pool)) == blocks
    assert parameter_count(Conv4()) == 111_936
    assert parameter_count(Conv4(3, size=84)) == 113_088
    assert parameter_count(Conv4(3, 5, 84, 32)) == 28_896 + (32 * 25 + 1) * 5 == 32_901


def test_conv4_shapes(device):
    # cell ba90b674
    for size, pool, sides, features in (
        (28, "max", [28, 14, 7, 3], 64),
        (28, "stride", [14, 7, 4, 2], 64),
        (84, "max", [84, 42, 21, 10], 1600),
    ):
        net, seen = Conv4(1, size=size, pool=pool).to(device), []
        for norm in net.norms:
            norm.register_forward_hook(lambda layer, x, y, seen=seen: seen.append(y.shape[-1]))
        z = net(torch.rand(2, 1, size, size, device=device))
        assert (seen, net.features, z.shape[1]) == (sides, features, features)
        print(f"{size} pixels, {pool:6s}: blocks of {seen}, embedding of {features}")


def test_conv4_is_its_blocks(device):
    # cell cf7eee5b
    torch.manual_seed(0)
    images = torch.rand(4, 1, 28, 28, device=device).double()
    for pool, stride in (("max", 1), ("stride", 2)):
        net = Conv4(out=5, width=6, pool=pool).to(device).double()
        x = images
        for conv in net.convs:
            x = F.conv2d(x, conv.weight, conv.bias, stride, padding=1)
            x = F.batch_norm(x, None, None, training=True).relu()
            x = F.max_pool2d(x, 2) if pool == "max" else x
        z = x.flatten(1) if pool == "max" else F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]
        torch.testing.assert_close(net(images), net.head(z))


def test_image_errors():
    # cell d09b23d0
    with pytest.raises(
        ValueError, match=r"\(2, 3, 28, 28\), but this network was built for \[n, 1"
    ):
        Conv4(1)(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"built for \[n, 1, 84, 84\]"):
        Conv4(1, size=84)(torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match="at least 16 pixels"):
        Conv4(size=14)
    with pytest.raises(ValueError, match="width=0"):
        Conv4(width=0)
    with pytest.raises(ValueError, match="expected floats"):
        _check_images(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), 1, 28)


@pytest.mark.proves("eq-resnet12-parameters")
def test_resnet12_parameters():
    # cell b62c3d34
    sizes = [3, 64, 160, 320, 640]
    blocks = [10 * a * b + 18 * b**2 + 8 * b for a, b in pairwise(sizes)]
    assert blocks == [76_160, 564_480, 2_357_760, 9_425_920]
    net = ResNet12()
    assert parameter_count(net) == sum(blocks) == 12_424_320
    assert ResNet12(1, 7, (2, 3, 4, 5))(torch.rand(2, 1, 20, 16)).shape == (2, 7)
    with pytest.raises(ValueError, match="16 or more"):
        net(torch.zeros(2, 3, 12, 12))
    with pytest.raises(ValueError, match="expected four numbers"):
        ResNet12(widths=(64, 128))
    with pytest.raises(ValueError, match=r"widths\[2\]=0"):
        ResNet12(widths=(4, 4, 0, 4))


def test_resnet12_equals_the_reference():
    # cell 5029da8d
    torch.manual_seed(0)
    net = ResNet12(3, widths=(4, 5, 6, 7)).double()
    leaky, images = nn.LeakyReLU(0.1), torch.rand(4, 3, 33, 33, dtype=torch.float64)

    def normalised(x):
        return F.batch_norm(x, None, None, training=True)

    def reference(x, block):
        w1, w2, w3 = (conv.weight for conv in block.convs)
        out = leaky(normalised(F.conv2d(x, w1, padding=1)))
        out = leaky(normalised(F.conv2d(out, w2, padding=1)))
        out = normalised(F.conv2d(out, w3, padding=1))
        return F.max_pool2d(leaky(out + normalised(F.conv2d(x, block.shortcut.weight))), 2)

    x = images
    for block in net.blocks:
        x = reference(x, block)
    torch.testing.assert_close(net(images), F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])


def test_networks_fit_the_tasks():
    points, y = cell_b93e5d27()


def test_networks_say_what_they_cannot_read():
    points, y = cell_b93e5d27()
    # cell 1f7a80ce
    with pytest.raises(
        ValueError, match=r"Conv4 reads images .* have shape \(5, 1\): take a network"
    ):
        Conv4.for_tasks(points, 2)
    with pytest.raises(ValueError, match="ResNet12 reads images of 16 or more pixels"):
        ResNet12.for_tasks(Examples(torch.zeros(5, 3, 8, 8), y), 2)
    with pytest.raises(ValueError, match="square images, but these are 20 x 30"):
        Conv4.for_tasks(Examples(torch.zeros(5, 3, 20, 30), y), 2)
    with pytest.raises(ValueError, match=r"MLP reads one tensor \[n, \*features\]"):
        MLP.for_tasks(Examples({"tokens": torch.zeros(5, 3)}, y), 2)
    with pytest.raises(ValueError, match="expected floats"):
        MLP.for_tasks(Examples(torch.zeros(5, 3, dtype=torch.long), y), 2)


@pytest.mark.proves("eq-gamma-gradient")
def test_gamma_gradient():
    in_a_loop_and_lifted, ours = cell_7a5b4814()
    # cell 0f9e3369
    torch.manual_seed(0)
    tasks, g = (
        torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 3).double(),
    )
    loop, lifted = in_a_loop_and_lifted(ours, tasks, g)

    def mean(t):
        return t.mean(-2, keepdim=True)

    s = (mean((tasks - mean(tasks)) ** 2) + 1e-5).sqrt()
    hat = (tasks - mean(tasks)) / s
    formula = ((g - mean(g) - hat * mean(g * hat)) / s).detach()
    torch.testing.assert_close(loop, formula)
    torch.testing.assert_close(lifted, formula)


def test_meta_gradients_are_accurate():
    in_a_loop_and_lifted, ours = cell_7a5b4814()

    # cell e5fe712d
    def meta_gradients(net, episodes, lift):
        "The meta-gradient of each task for one inner step: [tasks, parameters]."
        theta = dict(net.named_parameters())

        def one(xs, ys, xq, yq):
            g = grad(lambda p: F.cross_entropy(call(net, p, xs), ys))(theta)
            phi = {k: theta[k] - 0.4 * g[k] for k in theta}
            return F.cross_entropy(call(net, phi, xq), yq)

        losses = (
            vmap(one)(*episodes)
            if lift == "vmap"
            else [one(*e) for e in zip(*episodes, strict=True)]
        )
        each = [torch.autograd.grad(loss, theta.values(), retain_graph=True) for loss in losses]
        return torch.stack([torch.cat([g.flatten() for g in gs]) for gs in each])

    def five_tasks():
        torch.manual_seed(0)
        y = torch.eye(5)
        images = torch.rand(5, 5, 1, 28, 28), torch.rand(5, 25, 1, 28, 28)
        return images[0], y.expand(5, 5, 5), images[1], y.repeat(5, 1).expand(5, 25, 5)

    def errors(net, exact, lift):
        "Relative errors in float32 and in float64: median and largest over tasks."
        found = []
        for dtype in (torch.float32, torch.float64):
            episodes = [t.to(dtype) for t in five_tasks()]
            g = meta_gradients(copy.deepcopy(net).to(dtype), episodes, lift).double()
            error = (g - exact).norm(dim=1) / exact.norm(dim=1)
            found += [error.median().item(), error.max().item()]
        return found

    # cell 36471ef5
    for pool in ("stride", "max"):
        torch.manual_seed(1)
        net = Conv4(out=5, width=16, pool=pool)
        exact = meta_gradients(
            copy.deepcopy(net).double(), [t.double() for t in five_tasks()], "loop"
        )
        for lift in ("loop", "vmap"):
            median32, _, _, largest64 = errors(net, exact, lift)
            assert median32 < 1e-5 and largest64 < 1e-10


def test_joint_and_single_predictions(device):
    # cell baf9d343
    def joint_and_single(learner, support, query):
        state = learner.eval().adapt(support)
        together = learner.predict(state, query)
        alone = torch.cat([learner.predict(state, x[None]) for x in query])
        return together, alone

    torch.manual_seed(0)
    support = Examples.of(torch.rand(4, 1, 28, 28), torch.tensor([0, 0, 1, 1]), way=2)
    support = Examples(support.x.to(device).double(), support.y.to(device).double())
    query = torch.rand(6, 1, 28, 28, device=device).double()
    for stats in ("batch", "support", "running"):
        for learner in (
            ProtoNet(Conv4(width=8, stats=stats)),
            ProtoNet(ResNet12(1, widths=(4, 4, 4, 4), stats=stats)),
            MAML(Conv4(out=2, width=8, pool="stride", stats=stats), steps=2),
        ):
            learner = learner.to(device).double()
            together, alone = joint_and_single(learner, support, query)
            difference = ((together - alone).abs().max() / together.std()).item()
            assert difference > 1e-3 if stats == "batch" else difference < 1e-10
            assert learner.transductive == (stats == "batch")


def test_a_broken_query_stays_alone():
    # cell d6d12e3b
    torch.manual_seed(0)
    support = Examples.of(torch.rand(4, 1, 28, 28), torch.tensor([0, 0, 1, 1]), way=2)
    query = torch.rand(5, 1, 28, 28)
    query[2, 0, 14, 14] = float("nan")
    lost = {}
    for stats in ("batch", "support", "running"):
        learner = ProtoNet(Conv4(width=8, stats=stats)).eval()
        lost[stats] = learner(support, query).isnan().any(1).tolist()
    print(lost)
    only_the_broken_one = [False, False, True, False, False]
    assert all(lost["batch"]) and lost["support"] == lost["running"] == only_the_broken_one


def test_a_lonely_value_says_nothing():
    # cell 1064816d
    torch.manual_seed(0)
    layer, lonely = BatchNorm(3), torch.randn(1, 3)
    assert torch.equal(layer(lonely), torch.zeros(1, 3))
    assert torch.equal(grad(lambda x: layer(x).sum())(lonely), torch.zeros(1, 3))
    statistics = support_statistics(BatchNorm(3, "support"), {}, torch.randn(5, 3))
    assert call(BatchNorm(3, "support"), {}, lonely, statistics).abs().min() > 0


def test_scoring_changes_no_buffer():
    # cell 0f142b65
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3)
    with torch.no_grad():
        theirs(torch.rand(4, 3, 5, 5))
    assert theirs.running_mean.abs().min() > 0  # it has learned from a forward pass

    pictures = Classes.of({str(i): torch.rand(6, 1, 28, 28) for i in range(4)})
    tasks = FewShot(pictures, way=2, shot=1, query=2)
    learner = ProtoNet(Conv4(width=8, stats="running"))
    before = copy.deepcopy(learner.state_dict())
    for mode in (True, False):
        evaluate(learner.train(mode), tasks, n=4)
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())


def test_running_averages_are_means_over_tasks():
    # cell 6e49e793
    torch.manual_seed(0)
    pictures = Classes.of({str(i): torch.rand(6, 1, 28, 28) for i in range(4)})
    episode = FewShot(pictures, way=2, shot=1, query=2).sample(3)
    for lift in ("loop", "vmap"):
        learner = ProtoNet(Conv4(width=8, stats="running"))
        first = learner.embed.convs[0]
        losses(learner, episode, lift)
        mean = torch.stack([first(x).mean((0, 2, 3)) for x in episode.query.x]).mean(0)
        average = learner.embed.norms[0].mean
        torch.testing.assert_close(average, 0.1 * mean.detach(), atol=1e-6, rtol=1e-4)
        assert not average.requires_grad
        learner.eval()
        before = copy.deepcopy(learner.state_dict())
        losses(learner, episode, lift)  # validation losses leave them alone
        assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())


def test_the_built_in_layer_refuses():
    # cell 30053efb
    with pytest.raises(RuntimeError, match=r"in-place|running_mean"):
        vmap(nn.BatchNorm2d(3))(torch.rand(2, 4, 3, 5, 5))
    lifted = vmap(BatchNorm(3, "running"))(torch.rand(2, 4, 3, 5, 5))
    assert lifted.shape == (2, 4, 3, 5, 5)  # ours writes nothing, so there is nothing to refuse


def test_backbones_differ():
    # cell 139f8a8c
    sizes = {
        "Conv4, 32 filters, 5-way head on 84 pixels": Conv4(3, 5, 84, 32),
        "Conv4, 64 filters, embedding of 84 pixels": Conv4(3, size=84),
        "ResNet12, embedding": ResNet12(),
    }
    for name, net in sizes.items():
        print(f"{parameter_count(net):>12,}  {name}")
    counts = [parameter_count(net) for net in sizes.values()]
    assert counts == [32_901, 113_088, 12_424_320]
