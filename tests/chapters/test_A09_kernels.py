"""Made from nbs/A09_kernels.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metabook import kernels
from metabook.networks import Conv4, call, normalise


def cell_4fc1d47c():
    # cell 4fc1d47c
    def agree(f, g, arguments):
        "Do two functions of tensors have the same value, gradient and second derivative?"

        def derivatives(f):
            def loss(*x):
                return f(*x).sin().sum()

            inner = grad(loss, tuple(range(len(arguments))))
            x = [a.clone().requires_grad_() for a in arguments]
            value = f(*x)
            first = torch.autograd.grad(value.cos().sum(), x)  # an ordinary backward
            second = torch.autograd.grad(sum(d.square().sum() for d in inner(*x)), x)
            return value, first, second

        for found, wanted in zip(derivatives(f), derivatives(g), strict=True):
            size = max(
                w.abs().max().item() for w in wanted
            )  # a gradient may be zero but for rounding
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11 * size)

    def large_maps(n=24, channels=64, size=28):
        torch.manual_seed(0)
        x = kernels.channels_last(3 + torch.randn(n, channels, size, size).double())
        return x, torch.randn(channels).double(), torch.randn(channels).double()

    return agree, large_maps


def cell_db819fb9():
    # cell db819fb9
    def conv_block(x, filters, shift, weight, bias, eps, pool="max"):
        "The definition."
        maps = F.conv2d(x, filters, shift, stride=1 if pool == "max" else 2, padding=1)
        y, mean, var = normalise(maps, weight, bias, eps)
        return F.relu(F.max_pool2d(y, 2) if pool == "max" else y), mean, var

    return conv_block


def test_layout_changes_no_number():
    # cell ae78965f
    torch.manual_seed(0)
    for channels in (1, 3):
        x = torch.rand(4, channels, 6, 6)
        y = kernels.channels_last(x)
        assert torch.equal(x, y) and y.stride()[1] == 1
        maps = F.conv2d(y, torch.rand(8, channels, 3, 3), padding=1)
        assert maps.is_contiguous(memory_format=torch.channels_last)  # and so are all that follow
    assert kernels.channels_last(x.to("meta")).stride() == x.stride()


def test_memory_is_kept():
    # cell d07b62d3
    faults = """
import resource, torch
from metabook.kernels import keep_memory
print(keep_memory())
def step(blocks=6):
    held = [torch.ones(2**20) for _ in range(blocks)]  # 4 MiB each
for _ in range(5): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def page_faults(**environment):
        "Was glibc told, and how many page faults do ten steps take after five?"
        said = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
        command = [sys.executable, "-c", faults]
        out = subprocess.run(
            command, env=said | environment, capture_output=True, text=True, check=True
        )
        told, count = out.stdout.split()
        return told, int(count)

    told, kept = page_faults()
    alone = page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    print(f"told: {told}, {kept} page faults; left alone: {alone[1]}")
    assert told == "False" or kept < 200 < alone[1]
    assert alone[0] == "False"


@pytest.mark.proves("eq-pooled-statistics")
def test_statistics_of_portions_merge():
    # cell e5f029c7
    assert [
        v.item()
        for v in kernels.merge(torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]]), [1, 2])
    ] == [3, 4]
    torch.manual_seed(0)
    x = 1000 + torch.randn(5, 3, 8, 8)
    parts = [x[:2], x[2:]]
    means = torch.stack([p.mean((0, 2, 3)) for p in parts])
    variances = torch.stack([p.var((0, 2, 3), correction=0) for p in parts])
    mean, var = kernels.merge(means, variances, [2, 3])
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(
        var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-4, atol=0
    )


def test_the_kernel_is_its_definition():
    agree, large_maps = cell_4fc1d47c()

    # cell 197c357c
    class Unheard(torch.autograd.Function):
        "The identity, and nothing comes back."

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    x, weight, bias = large_maps()
    assert kernels.worthwhile(x) and not kernels.worthwhile(x[:1])
    agree(
        lambda *a: kernels.batch_norm(normalise, *a, 1e-5)[0],
        lambda *a: normalise(*a, 1e-5)[0],
        [x, weight, bias],
    )
    for found, wanted in zip(
        kernels.batch_norm(normalise, x, weight, bias, 0.1),
        normalise(x, weight, bias, 0.1),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    x = x.requires_grad_()
    Unheard.apply(kernels.batch_norm(normalise, x, weight, bias, 1e-5)[0]).sum().backward()
    assert x.grad is None


def test_the_kernel_lifts():
    agree, large_maps = cell_4fc1d47c()
    # cell 2ef86a99
    x, weight, bias = large_maps(n=3 * 24)
    tasks = x.unflatten(0, (3, 24))

    def inner_gradient(norm):
        "Of one task: how its squared output changes with the scale, and how that depends on the maps."

        def f(x, weight):
            return grad(lambda w: norm(x, w, bias, 1e-5)[0].pow(3).sum())(weight)

        return f

    kernel, plain = (inner_gradient(n) for n in (partial(kernels.batch_norm, normalise), normalise))
    lifted = vmap(kernel, (0, None))(tasks, weight)
    torch.testing.assert_close(lifted, torch.stack([plain(x, weight) for x in tasks]))


def test_helpers_save_detours():
    agree, large_maps = cell_4fc1d47c()

    # cell cf8cbbe5
    class Asked(TorchFunctionMode):
        "Counts what it is asked about."

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    x, weight, bias = large_maps()
    with kernels.lifting():
        assert not kernels.worthwhile(x)
    assert kernels.worthwhile(x)
    with Asked() as mode:
        mode.names = []
        y, *_ = kernels.batch_norm(normalise, x, weight, bias, 1e-5)
    assert mode.names == ["batch_norm"]
    assert torch.equal(y, kernels.batch_norm(normalise, x, weight, bias, 1e-5)[0])


def test_the_kernel_in_bfloat16():
    agree, large_maps = cell_4fc1d47c()
    # cell 646ab370
    x, weight, bias = (t.float() for t in large_maps())
    x = 2 * x  # a variance of 4

    def through(kernel, x):
        "Output, variance and gradients."
        x, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y, _, var = kernel(x, w, bias, 1e-5)
        return [y, var, *torch.autograd.grad((y.float() * direction).sum(), [x, w])]

    direction = torch.randn_like(x)
    low = through(partial(kernels.batch_norm, normalise), x.bfloat16())
    for found, wanted in zip(low, through(normalise, x), strict=True):
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.proves("eq-folded-block")
def test_the_first_block_is_the_block():
    agree, large_maps = cell_4fc1d47c()
    conv_block = cell_db819fb9()
    # cell 84d9a7a0
    torch.manual_seed(0)
    for channels, pool in itertools.product((1, 3), ("max", "stride")):
        images = torch.randn(6, channels, 9, 12).double()
        filters = torch.randn(8, channels, 3, 3).double()
        shift, weight, bias = torch.randn(3, 8).double()
        arguments = [images, filters, shift, weight, bias]
        both = [partial(f, pool=pool) for f in (kernels.first_block, conv_block)]
        for found, wanted in zip(*(f(*arguments, 0.1) for f in both), strict=True):
            torch.testing.assert_close(found, wanted)
        agree(*(lambda *a, f=f: f(*a, 1e-5)[0] for f in both), arguments)


def test_the_first_block_keeps_its_digits():
    # cell 6aa068a2
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(40, 1, 4, 4), size=(28, 28), mode="bicubic")
    edge = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).view(1, 1, 3, 3)
    arguments = smooth, edge, torch.full((1,), 1e4), torch.ones(1), torch.zeros(1)
    exact = kernels.first_block(*(a.double() for a in arguments), 1e-12)[0]
    error = ((kernels.first_block(*arguments, 1e-12)[0] - exact).norm() / exact.norm()).item()
    in_single = partial(lambda f, p: [m.double() for m in f(p.float())], kernels.moments)
    with mock.patch.object(kernels, "moments", in_single):
        single = ((kernels.first_block(*arguments, 1e-12)[0] - exact).norm() / exact.norm()).item()
    print(f"relative error {error:.1e}, in single precision {single:.1e}")
    assert error < 1e-4 < single


def test_the_first_block_lifts():
    conv_block = cell_db819fb9()
    # cell cbc7d0b8
    tasks = torch.randn(2, 24, 1, 28, 28).double()
    each = (torch.randn(2, 8, 1, 3, 3).double(), *torch.randn(3, 2, 8).double())
    for pool in ("max", "stride"):
        some = mock.patch.object(kernels, "PORTION", 5 * 8 * 28 * 28 * 8)  # five images at a time
        with some, kernels.lifting():
            lifted = vmap(lambda *a, p=pool: kernels.first_block(*a, 1e-5, p))(tasks, *each)
        assert lifted[0].is_contiguous()
        for i in range(2):
            arguments = *(t[i] for t in (tasks, *each)), 1e-5, pool
            with some:
                in_portions = kernels.first_block(*arguments)
            assert in_portions[0].is_contiguous(memory_format=torch.channels_last)
            for a, b, c in zip(lifted, in_portions, conv_block(*arguments), strict=True):
                torch.testing.assert_close(a[i], c)
                torch.testing.assert_close(b, c)


def test_only_a_plain_block_is_replaced():
    # cell d61fa19a
    def replaced(change=lambda net: None, channels=1):
        "Whether the first block of a network is, after a change."
        net = Conv4()
        change(net)
        return kernels.first_and_plain(torch.rand(2, channels, 28, 28), net.convs[0], net.norms[0])

    def put(conv):
        return lambda net: net.convs.__setitem__(0, conv)

    assert replaced() and not replaced(channels=4)
    for change in (
        lambda net: net.convs[0].register_forward_hook(print),
        lambda net: net.norms[0].register_full_backward_hook(print),
        lambda net: setattr(net.convs[0], "forward", print),
        put(nn.Conv2d(1, 64, 3, padding=2, dilation=2)),
        put(nn.Conv2d(1, 64, 3, 2, padding=1)),
        put(nn.Conv2d(1, 64, 3, padding=1, padding_mode="reflect")),
        put(nn.Conv2d(1, 64, 3, padding=1, bias=False)),
    ):
        assert not replaced(change)
    with nn.modules.module.register_module_forward_hook(
        lambda *call: None
    ):  # gone after it, whatever fails
        assert not replaced()
    assert replaced()


def test_the_first_block_in_bfloat16():
    conv_block = cell_db819fb9()
    # cell 4a9f0147
    torch.manual_seed(0)
    images, filters = 5 + torch.rand(20, 1, 28, 28), torch.randn(8, 1, 3, 3)
    arguments = images, filters, *torch.randn(3, 8)
    in_full = conv_block(*arguments, 1e-5)
    with kernels.precise("bfloat16"):
        low = kernels.first_block(*arguments, 1e-5)
    assert [t.dtype for t in low] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b, bound in zip(low, in_full, (0.004, 1e-5, 1e-3), strict=True):
        assert (a.float() - b).norm() < bound * b.norm()


def test_second_derivatives_in_bfloat16():
    # cell 002583fd
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))
    theta, x = dict(net.named_parameters()), torch.randn(4, 5, 1, 6, 6)

    def meta_gradient(lift):
        def one(x):
            inner = grad(lambda p: call(net, p, x).square().mean())(theta)
            return call(net, {k: p - 0.5 * inner[k] for k, p in theta.items()}, x).square().mean()

        losses = vmap(one)(x) if lift else torch.stack([one(t) for t in x])
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(losses.sum(), list(theta.values()))]
        )

    exact = meta_gradient(False)
    with kernels.precise("bfloat16"):
        loop, lifted = meta_gradient(False), meta_gradient(True)

    def apart(a, b):
        return ((a - b).norm() / b.norm()).item()

    print(f"from float32: {apart(loop, exact):.1e}, lifted from loop: {apart(lifted, loop):.1e}")
    assert 1e-4 < apart(loop, exact) < 0.03 and apart(lifted, loop) < 0.01
    assert apart(meta_gradient(True), exact) < 1e-5  # outside of `precise` nothing has changed
    with kernels.precise("bfloat16"), kernels.precise("float32"):  # the innermost counts
        assert apart(meta_gradient(False), exact) < 1e-5
    flat, image, layer, kernel = x[0].flatten(1), x[0], net[2].weight[:, :36], net[0].weight
    with kernels.precise("bfloat16"):
        assert torch.equal(F.linear(flat, layer), F.linear(input=flat, weight=layer))
        assert F.linear(flat, weight=layer, bias=torch.zeros(3)).dtype == torch.float32
        assert torch.equal(F.conv2d(image, kernel), F.conv2d(input=image, weight=kernel))
        assert F.conv2d(image[0], kernel).dtype == torch.bfloat16  # an image without a batch
    with pytest.raises(
        ValueError, match="precision='half', expected one of float32, tf32, bfloat16"
    ):
        kernels.precise("half").__enter__()
