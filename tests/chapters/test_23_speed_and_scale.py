"""Made from nbs/23_speed_and_scale.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

import time
from itertools import accumulate

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from metabook.classes import Classes
from metabook.datasets import Glyphs, Omniglot
from metabook.engine import gradients, over_tasks
from metabook.episodes import FewShot, Sinusoids
from metabook.kernels import channels_last
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.sources import present


def cell_b91572b9():
    # cell b91572b9
    def layer_products(net):
        "Multiplications of each layer of a Conv4 for one image."
        side, found = net.size, []
        for conv in net.convs:
            side = (side - 1) // conv.stride[0] + 1  # F_l = |W| r^2
            found.append(conv.weight.numel() * side**2)
            side = side // 2 if net.pool == "max" else side
        return [*found, net.head.weight.numel()]

    def products(learner, way, shot, query):
        "Multiplications of one task's meta-gradient, Pi."
        first, forward = layer_products(learner.net)[0], sum(layer_products(learner.net))
        step = 3 * forward - first if learner.first_order else 9 * forward - 4 * first
        return learner.steps * way * shot * step + way * query * (3 * forward - first)

    def noise(way, each, size=28):
        "Random images: what a step costs does not depend on what they show."
        images = torch.rand(way, each, 1, size, size, generator=torch.Generator().manual_seed(0))
        return Classes.of({str(i): images[i] for i in range(way)})

    return layer_products, noise, products


def cell_7dd62e8e():
    # cell 7dd62e8e
    class BuiltIn(Conv4):
        "The same network of PyTorch's own layers, as people write it."

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                y = F.batch_norm(conv(x), None, None, norm.weight, norm.bias, training=True)
                x = F.max_pool2d(F.relu(y), 2)
            return self.head(x.flatten(1))

    class ChannelsLast(BuiltIn):
        "The same, with the channels of a pixel side by side in memory, which is faster on a CPU."

        def forward(self, x):
            return super().forward(channels_last(x))

    return BuiltIn, ChannelsLast


def cell_30320108():
    # cell 30320108
    class Loss(nn.Module):
        "A learner's loss as `forward`, so that `functional_call` finds it."

        def __init__(self, learner):
            super().__init__()
            self.learner = learner

        def forward(self, episode):
            return self.learner.loss(episode)

    def task_gradients(learner, episodes, lift="loop"):
        "The gradient of each task's loss, [tasks, parameters]."
        whole, n = Loss(learner), len(episodes.support.x)
        theta = {
            k: p.detach().expand(n, *p.shape).clone().requires_grad_()
            for k, p in whole.named_parameters()
        }
        values = over_tasks(
            lambda p, e: functional_call(whole, p, (e,)), theta, episodes, lift=lift
        )
        grads = torch.autograd.grad(values.sum(), list(theta.values()))
        return torch.cat([g.flatten(1) for g in grads], 1)

    def portioned(f, episodes, size=6):
        "The rows of all tasks, a few tasks at a time."
        parts = [
            type(episodes)(*(type(s)(s.x[i : i + size], s.y[i : i + size]) for s in episodes))
            for i in range(0, len(episodes.support.x), size)
        ]
        return torch.cat([f(part) for part in parts])

    def distances(found, wanted):
        "The relative error of each row."
        return (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)

    return distances, portioned, task_gradients


def cell_2a028942(BuiltIn, ChannelsLast):
    # cell 2a028942
    def real_tasks(n=12):
        "Tasks of Omniglot where it is here, else of the book's own drawings."
        data = Omniglot("train") if present("omniglot") else Glyphs("train")
        return FewShot(data, 5, 1, 3).sample(n, torch.Generator().manual_seed(0))

    def networks():
        "Conv4 as in this library, twice of built-in layers, and in float64: equal weights."
        torch.manual_seed(0)
        ours = Conv4(out=5)
        others = [BuiltIn(out=5), ChannelsLast(out=5), Conv4(out=5).double()]
        for net in others:
            net.load_state_dict(ours.state_dict())
        return ours, *others

    return networks, real_tasks


def test_multiplications_are_counted():
    layer_products, noise, products = cell_b91572b9()
    # cell d104917f
    for steps, first_order, way, shot, pool, size in (
        (1, False, 5, 1, "max", 28),
        (3, False, 2, 2, "max", 20),
        (2, True, 3, 1, "max", 28),
        (2, True, 5, 1, "stride", 28),
    ):
        net = Conv4(out=way, width=16, pool=pool, size=size)
        net.convs[0].register_forward_hook(
            lambda *_: None
        )  # so the first block is computed plainly
        learner = MAML(net, steps=steps, first_order=first_order)
        episodes = FewShot(noise(way, shot + 2, size), way, shot, 2).sample(2)
        with FlopCounterMode(display=False) as counter:
            gradients(learner, episodes, lift="loop")
        assert counter.get_total_flops() == 2 * 2 * products(learner, way, shot, 2)

    main = MAML(Conv4(out=5), lr=0.4)
    second = products(main, 5, 1, 15)
    first = products(MAML(Conv4(out=5), first_order=True), 5, 1, 15)
    print(f"one task: {second / 1e9:.2f} billion multiplications, {first / 1e9:.2f} in first order")
    print(f"32 tasks: {2 * 32 * second / 1e12:.3f} trillion operations")


def test_memory_falls_with_the_chunk():
    # cell 08ec552a
    def milliseconds(f, repeat=3):
        "The fastest of a few calls."
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            f()
            times.append(1e3 * (time.perf_counter() - start))
        return min(times)

    def meta_step(learner, episodes, **how):
        "A meta-gradient, ready to be timed."
        learner.zero_grad()
        gradients(learner, episodes, **how)

    # cell a80e92f5
    def peak(f):
        "The most MiB that a call held at once on the CPU, beyond what was there before."
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            f()
        events = profiler.profiler.kineto_results.events()
        sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        return max(accumulate(size for _, size in sorted(sizes))) / 2**20

    # cell 48b93cc8
    learner = MAML(MLP([1, 40, 40, 1]), lr=0.01, steps=2, kind="regression")
    eight = Sinusoids(100, 10).sample(8)
    learner.zero_grad()
    gradients(learner, eight, lift="vmap")
    wanted = [p.grad.clone() for p in learner.parameters()]
    held = {}
    for chunk in (1, 2, 4, 8):
        held[chunk] = peak(lambda chunk=chunk: meta_step(learner, eight, lift="vmap", chunk=chunk))
        torch.testing.assert_close(
            [p.grad for p in learner.parameters()], wanted, rtol=1e-3, atol=1e-5
        )
        print(f"chunk={chunk}: {held[chunk]:5.1f} MiB")
    assert held[1] < held[2] < held[4] < held[8] and held[8] > 4 * held[1]


def test_meta_gradients_in_float32():
    BuiltIn, ChannelsLast = cell_7dd62e8e()
    distances, portioned, task_gradients = cell_30320108()
    networks, real_tasks = cell_2a028942(BuiltIn, ChannelsLast)
    # cell 45fb7caf
    real = real_tasks()
    ours, built_in, last, exact = networks()
    wanted = portioned(lambda e: task_gradients(MAML(exact), e), real.to(dtype=torch.float64))
    contest = {
        "loop": (ours, "loop"),
        "lifted": (ours, "vmap"),
        "built-in": (built_in, "loop"),
        "built-in, last": (last, "loop"),
    }
    found = {
        name: distances(portioned(lambda e, n=n, w=w: task_gradients(MAML(n), e, w), real), wanted)
        for name, (n, w) in contest.items()
    }
    for name, errors in found.items():
        below = (errors < 1e-4).sum()
        print(f"float32 {name:15s} median {errors.median():.1e}, worst {errors.max():.1e}", end="")
        print(f", {below} of {len(errors)} below 1e-4")
    for name in ("loop", "lifted"):
        assert found[name].median() < 1e-5
        assert (found[name] < 1e-4).float().mean() >= 0.75


def test_a_rounding_error_moves_a_winner():
    # cell 6c16974a
    window = torch.tensor([[[[0.3, 0.3 + 1e-8], [0.1, 0.2]]]], dtype=torch.float64)

    def winner(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0].flatten().tolist()

    print("float64", winner(window), "\nfloat32", winner(window.float()))
    assert winner(window) == [0, 1, 0, 0] and winner(window.float()) == [1, 0, 0, 0]


def test_first_order_is_not_second():
    BuiltIn, ChannelsLast = cell_7dd62e8e()
    distances, portioned, task_gradients = cell_30320108()
    networks, real_tasks = cell_2a028942(BuiltIn, ChannelsLast)
    # cell 0495db9a
    real = real_tasks(4)
    exact = networks()[3]
    wanted = portioned(lambda e: task_gradients(MAML(exact), e), real.to(dtype=torch.float64))
    cheap = MAML(networks()[0], first_order=True)
    far = distances(task_gradients(cheap, real), wanted)
    print("first order, from second:", ", ".join(f"{e:.2f}" for e in far))
    assert far.min() > 0.05


def test_a_stride_saves_multiplications():
    layer_products, noise, products = cell_b91572b9()
    # cell e3d51556
    strided, pooled = (products(MAML(Conv4(out=5, pool=p)), 5, 1, 15) for p in ("stride", "max"))
    print(
        f"{strided / 1e6:.0f} against {pooled / 1e6:.0f} million: {pooled / strided:.1f} times fewer"
    )
    # Each convolution makes a quarter of the places (7 x 7 in place of 14 x 14, ...), rounded up at the
    # end (4 x 4 and 2 x 2 in place of 7 x 7 and 3 x 3), so a little less than four times.
    assert 3 < pooled / strided < 4


def test_when_support_costs_as_much_as_queries():
    layer_products, noise, products = cell_b91572b9()
    # cell 1aec7541
    # t * 5 * (9F - 4 F_1) = 75 * (3F - F_1), and with 3F - F_1 on the left: t = 15 in first order.
    m, *rest = layer_products(Conv4(out=5))
    f = m + sum(rest)
    steps = 15 * (3 * f - m) / (9 * f - 4 * m)
    print(f"{steps:.2f} steps in second order")
    assert 5 < steps < 5.1
    six, none = MAML(Conv4(out=5), steps=6), MAML(Conv4(out=5), steps=0)
    assert products(six, 5, 1, 15) > 2 * products(none, 5, 1, 15)


def test_when_two_processes_are_faster():
    # cell f85d20d6
    # time(1) = B u and time(2) = B u / 2 + M / V: faster if B u / 2 > M / V.  48 MB over 1 GB/s: 2 * 48 ms,
    # so from ten tasks on.
    def model(n, tasks, t, message, bandwidth):
        return tasks / n * t + 2 * (n - 1) / n * message / bandwidth

    for tasks in (8, 10, 32):
        faster = model(2, tasks, 0.01, 48e6, 1e9) < model(1, tasks, 0.01, 48e6, 1e9)
        assert faster == (tasks * 0.01 > 2 * 48e6 / 1e9) == (tasks >= 10)
