"""Gradients of every kind of layer, held against plain loops written apart from the library.

Each cell is a network with one layer in its middle, a method and a way of lifting, in float64.
python -m bench.grid --layers LayerNorm,LSTM --methods maml --lift auto,loop,vmap
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from bench.report import report, write
from metabook.engine import answer, gradients
from metabook.episodes import Episode, Examples
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import BatchNorm, Statistics, call, support_statistics
from metabook.pgn import PGN
from metabook.prototypes import ProtoNet

TASKS, WAY, SHOT = 3, 3, 2  # SHOT support examples and one query of each class
RATE = 0.1  # of inner steps
TOLERANCE = 1e-9  # rounding stays far below, a wrong formula far above
SEED = 0
Inputs = Callable[[int, Generator], Tensor]  # how many, from where -> [n, *features]
Ask = Callable[[Tensor], Tensor]  # queries [n, *features] of one task -> logits [n, way]


class Layer(NamedTuple):
    """A layer in a network of its own."""

    build: Callable[
        [], nn.Module
    ]  # [n, *features] -> [n, 3]; the last parameters are a linear head's
    inputs: Inputs  # what it reads
    must: bool = True  # it has to be equal; otherwise it may also be refused
    # The same, with the same parameters, where torch's own derivatives of the layer are not right.
    plain: Callable[[], nn.Module] | None = None


# Networks: something that learns before the layer, so that gradients flow through it, and a head.


def floats(
    *features: int,  # shape of an example
    scale: float = 1.0,  # standard deviation
) -> Inputs:
    """Normal numbers: where a layer has a kink, none of them meets it."""
    return lambda n, g: scale * torch.randn(n, *features, generator=g, dtype=torch.float64)


def tokens(
    kinds: int,  # of tokens; 0 is one of them
    length: int,  # of a sentence
) -> Inputs:
    """Sentences of whole numbers."""
    return lambda n, g: torch.randint(kinds, (n, length), generator=g)


def inside(
    make: Callable[[], nn.Module],  # the layer
    *shape: int,  # of what it reads, for each example
    must: bool = True,  # see `Layer`
    scale: float = 1.0,  # of the inputs
    plain: Callable[[], nn.Module] | None = None,  # see `Layer`
) -> Layer:
    """The layer between two linear ones."""
    other = None if plain is None else partial(sandwich, plain, shape)
    return Layer(partial(sandwich, make, shape), floats(6, scale=scale), must, other)


def sandwich(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Sequential:
    """Numbers of the layer's shape, the layer, and a head."""
    before = nn.Linear(6, prod(shape)), nn.Unflatten(1, shape)
    layer = make().eval()
    with torch.no_grad():
        width = layer(torch.randn(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(*before, layer.train(), *head(width))


def head(width: int) -> tuple[nn.Module, ...]:
    """The end of a network: one output for each class."""
    return nn.Flatten(), nn.Tanh(), nn.Linear(width, WAY)


def reading(
    make: Callable[[], nn.Module],  # what reads tokens
    width: int,  # numbers that it makes of a sentence
    must: bool = True,  # see `Layer`
    plain: Callable[[], nn.Module] | None = None,  # see `Layer`
) -> Layer:
    """An embedding, which comes first, and a head."""

    def network(make: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(make(), *head(width))

    other = None if plain is None else partial(network, plain)
    return Layer(partial(network, make), tokens(7, 4), must, other)


def seeing(*layers: Callable[[], nn.Module], width: int) -> Layer:
    """Convolutions that read images themselves: then PGN looks at images, too."""
    return Layer(lambda: nn.Sequential(*(make() for make in layers), *head(width)), floats(1, 6, 6))


# Modules around layers that take or give more than one tensor.


class Of(nn.Module):
    """A function as a layer."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class First(nn.Module):
    """The first of what a layer gives."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Unrolled(nn.Module):
    """A recurrent cell, told a sequence step by step."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Itself(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(
        self,
        mask: Literal["", "causal", "padding"] = "",  # who may not be looked at
        batch_first: bool = True,  # as the networks here have it; otherwise axes are swapped
        **how: Any,  # what the layer is told when it is called
    ):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.mask, self.how = mask, how

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        masks = {}
        if self.mask == "causal":
            masks["attn_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.mask == "padding":
            masks["key_padding_mask"] = (torch.arange(length) == length - 1).expand(n, length)
        turned = x if self.layer.batch_first else x.transpose(0, 1)
        y = self.layer(turned, turned, turned, **masks, **self.how)[0]
        return y if self.layer.batch_first else y.transpose(0, 1)


class Crossed(nn.Module):
    """A decoder of a sequence, whose memory is the sequence read backwards."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Fused(nn.Module):
    """Attention as a network's own code calls it."""

    def __init__(
        self,
        biased: bool = False,  # every place prefers itself
        **how: Any,  # what the function is told
    ):
        super().__init__()
        self.qkv, self.biased, self.how = nn.Linear(4, 12), biased, how

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(2, (3, 2, 2))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # [n, heads, length, d] each
        mask = torch.eye(x.shape[1], dtype=x.dtype) if self.biased else None
        return F.scaled_dot_product_attention(q, k, v, mask, **self.how)


class Packed(nn.Module):
    """A recurrent layer on sentences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = [3 + i % 2 for i in range(len(x))]
        pack = nn.utils.rnn.pack_padded_sequence
        packed = pack(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        return self.layer(packed)[1][0][-1]


class Halves(nn.Module):
    """A layer of two inputs: the halves of each example."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*x.chunk(2, -1))


class Unpooled(nn.Module):
    """The largest of each square, back where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(*self.down(x))


class Settled(nn.Module):
    """A layer that stays in evaluation mode, as that of a network trained before."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        for average in layer.buffers():
            if average.is_floating_point():
                average.uniform_(0.5, 1.5)

    def train(self, mode: bool = True) -> Settled:
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# Modules as people write them.


class Twice(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(5, 5)
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(5, 5), nn.Linear(5, 5)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.there(x).tanh())


class Keeping(nn.Module):
    """It leaves what it computed in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.layer(x).tanh()
        return self.hidden * x


class Counting(nn.Module):
    """It writes a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def small() -> nn.Module:
    """A layer and its activation."""
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh())


class Saving(nn.Module):
    """It forgets what led to its output, and computes it again on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = small()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Bag(nn.Module):
    """A mean or a sum of embeddings, one by one; the padding is left out of both."""

    def __init__(self, how: Literal["mean", "sum", "padded"]) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(7, 5)), how

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(bag) for bag in x])

    def one(self, bag: Tensor) -> Tensor:
        """Of one bag."""
        seen = bag[bag != 0] if self.how == "padded" else bag
        total = sum((self.weight[i] for i in seen), self.weight.new_zeros(5))
        return total if self.how == "sum" else total / max(1, len(seen))


class Normed(nn.Module):
    """Weight normalisation by its formula: a length and a direction for each row."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 5)
        self.bias, v = layer.bias, layer.weight.detach()
        self.length, self.v = nn.Parameter(v.norm(dim=1, keepdim=True)), nn.Parameter(v)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.length * self.v / self.v.norm(dim=1, keepdim=True), self.bias)


class Symmetric(nn.Module):
    """A weight that is its own transpose."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Cubed(torch.autograd.Function):
    """A derivative written by hand, as `torch.func` wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


class OldCubed(torch.autograd.Function):
    """A derivative written by hand, as it was done before."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


def looking(x: Tensor) -> Tensor:
    """The way depends on a value."""
    return 2 * x if x.mean() > 0 else 3 * x


def chosen(x: Tensor) -> Tensor:
    """The shape depends on values."""
    return x - x[x > 0].mean()


def held_fixed(x: Tensor) -> Tensor:
    """The length is a constant for every derivative."""
    with torch.no_grad():
        length = x.norm()
    return x / length


def downhill(x: Tensor) -> Tensor:
    """It differentiates something itself."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        return x - torch.autograd.grad(at.cos().sum(), at, create_graph=True)[0]


def old_weight_norm() -> nn.Module:
    """The predecessor of the parametrisation: a hook sets the weight before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(8, 5))


def symmetric() -> nn.Module:
    """A linear layer under a parametrisation of one's own."""
    return parametrize.register_parametrization(nn.Linear(5, 5), "weight", Symmetric())


def orthogonal(how: str) -> Callable[[], nn.Module]:  # how the weight is kept so
    """A linear layer that turns and mirrors."""
    return lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map=how)


def encoder(**how: Any) -> nn.Module:
    """A layer of a transformer."""
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **how)


def decoder(**how: Any) -> nn.Module:
    """A layer of a transformer that reads a memory."""
    return Crossed(nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **how))


def stacked() -> nn.Module:
    """A transformer of two layers."""
    return nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False)


def image_norm() -> nn.Module:
    """A convolution that reads images, and what normalises it."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), BatchNorm(2, "support"), nn.ReLU())


# The layers.

NORMALISATIONS = {
    "LayerNorm": inside(lambda: nn.LayerNorm(8), 8),
    "LayerNorm plain": inside(lambda: nn.LayerNorm(8, elementwise_affine=False), 8),
    "LayerNorm no bias": inside(lambda: nn.LayerNorm(8, bias=False), 8),
    "LayerNorm two axes": inside(lambda: nn.LayerNorm([2, 4]), 2, 4),
    "GroupNorm": inside(lambda: nn.GroupNorm(2, 4), 4, 3),
    "GroupNorm plain": inside(lambda: nn.GroupNorm(2, 4, affine=False), 4, 3),
    "RMSNorm": inside(lambda: nn.RMSNorm(8), 8),
    "InstanceNorm1d": inside(lambda: nn.InstanceNorm1d(3), 3, 4),
    "InstanceNorm1d affine": inside(lambda: nn.InstanceNorm1d(3, affine=True), 3, 4),
    "InstanceNorm2d": inside(lambda: nn.InstanceNorm2d(2), 2, 3, 3),
    "InstanceNorm2d affine": inside(lambda: nn.InstanceNorm2d(2, affine=True), 2, 3, 3),
    "BatchNorm1d batch": inside(lambda: nn.BatchNorm1d(3, track_running_stats=False), 3, 4),
    "BatchNorm2d batch": inside(lambda: nn.BatchNorm2d(2, track_running_stats=False), 2, 3, 3),
    "BatchNorm1d running": inside(lambda: nn.BatchNorm1d(3), 3, 4, must=False),
    "BatchNorm1d settled": inside(lambda: Settled(nn.BatchNorm1d(3)), 3, 4),
    "metabook batch": inside(lambda: BatchNorm(3, "batch"), 3, 4),
    "metabook support": inside(lambda: BatchNorm(3, "support"), 3, 4),
    "LocalResponseNorm": inside(lambda: nn.LocalResponseNorm(2), 4, 3, 3),
    # Its backward is Python of its own, which torch differentiates no second time; it is slightly
    # off, too, so what is right here is what torch says.
    "CrossMapLRN2d": inside(lambda: nn.CrossMapLRN2d(2), 4, 3, 3, must=False),
    "functional normalize": inside(lambda: Of(F.normalize), 8),
}

RECURRENT = {
    "RNN tanh": inside(lambda: First(nn.RNN(4, 3, batch_first=True)), 4, 4),
    "RNN relu": inside(lambda: First(nn.RNN(4, 3, nonlinearity="relu", batch_first=True)), 4, 4),
    "LSTM": inside(lambda: First(nn.LSTM(4, 3, batch_first=True)), 4, 4),
    "LSTM two ways": inside(
        lambda: First(nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True)), 3, 4
    ),
    "LSTM projected": inside(lambda: First(nn.LSTM(4, 3, proj_size=2, batch_first=True)), 3, 4),
    "LSTM packed": inside(Packed, 4, 4, must=False),  # torch packs by values
    "GRU": inside(lambda: First(nn.GRU(4, 3, batch_first=True)), 4, 4),
    "RNNCell": inside(lambda: Unrolled(nn.RNNCell(4, 3)), 3, 4),
    "LSTMCell": inside(lambda: Unrolled(nn.LSTMCell(4, 3)), 3, 4),
    "GRUCell": inside(lambda: Unrolled(nn.GRUCell(4, 3)), 3, 4),
}

EMBEDDINGS = {
    "Embedding": reading(lambda: nn.Embedding(7, 3), 12),
    "Embedding padded": reading(lambda: nn.Embedding(7, 3, padding_idx=0), 12),
    "Embedding by frequency": reading(
        lambda: nn.Embedding(7, 3, scale_grad_by_freq=True), 12, False
    ),
    "Embedding max norm": reading(lambda: nn.Embedding(7, 3, max_norm=1.0), 12, False),
    "Embedding sparse": reading(lambda: nn.Embedding(7, 3, sparse=True), 12, False),
    # torch has no second derivative of these four.
    "EmbeddingBag mean": reading(
        lambda: nn.EmbeddingBag(7, 5, mode="mean"), 5, plain=lambda: Bag("mean")
    ),
    "EmbeddingBag sum": reading(
        lambda: nn.EmbeddingBag(7, 5, mode="sum"), 5, plain=lambda: Bag("sum")
    ),
    "EmbeddingBag padded": reading(
        lambda: nn.EmbeddingBag(7, 5, mode="mean", padding_idx=0), 5, plain=lambda: Bag("padded")
    ),
    "EmbeddingBag max": reading(lambda: nn.EmbeddingBag(7, 5, mode="max"), 5, False),
}

ATTENTION = {
    "MultiheadAttention": inside(lambda: Itself(), 3, 4),
    "MultiheadAttention no weights": inside(lambda: Itself(need_weights=False), 3, 4),
    "MultiheadAttention time first": inside(
        lambda: Itself(batch_first=False, need_weights=False), 3, 4
    ),
    "MultiheadAttention padding": inside(lambda: Itself("padding", need_weights=False), 3, 4),
    "MultiheadAttention causal": inside(lambda: Itself("causal", need_weights=False), 3, 4),
    "MultiheadAttention causal weights": inside(lambda: Itself("causal"), 3, 4),
    "TransformerEncoderLayer": inside(lambda: encoder(), 3, 4),
    "TransformerEncoderLayer first": inside(lambda: encoder(norm_first=True), 3, 4),
    "TransformerEncoderLayer gelu": inside(lambda: encoder(activation="gelu"), 3, 4),
    "TransformerEncoder": inside(stacked, 3, 4),
    "TransformerDecoderLayer": inside(lambda: decoder(), 3, 4),
    "sdpa": inside(lambda: Fused(), 3, 4),
    "sdpa causal": inside(lambda: Fused(is_causal=True), 3, 4),
    "sdpa float mask": inside(lambda: Fused(biased=True), 3, 4),
}

POOLING = {
    "MaxPool1d": inside(lambda: nn.MaxPool1d(2), 2, 6),
    "MaxPool2d": inside(lambda: nn.MaxPool2d(2), 2, 4, 4),
    "MaxPool2d padded": inside(lambda: nn.MaxPool2d(3, 2, padding=1), 2, 4, 4),
    "MaxPool3d": inside(lambda: nn.MaxPool3d(2), 1, 2, 4, 4),
    "AvgPool1d": inside(lambda: nn.AvgPool1d(2), 2, 6),
    "AvgPool2d": inside(lambda: nn.AvgPool2d(2), 2, 4, 4),
    "AdaptiveAvgPool1d": inside(lambda: nn.AdaptiveAvgPool1d(2), 2, 5),
    "AdaptiveAvgPool2d": inside(lambda: nn.AdaptiveAvgPool2d(2), 2, 3, 3),
    "AdaptiveMaxPool2d": inside(lambda: nn.AdaptiveMaxPool2d(2), 2, 3, 3),
    "LPPool2d": inside(lambda: nn.LPPool2d(2, 2), 2, 4, 4),
    "MaxUnpool2d": inside(Unpooled, 2, 4, 4, must=False),
    "FractionalMaxPool2d": inside(
        lambda: nn.FractionalMaxPool2d(2, output_size=2), 2, 4, 4, must=False
    ),
}

ELEMENTWISE: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": lambda: nn.PReLU(8),
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "CELU": nn.CELU,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Sigmoid": nn.Sigmoid,
    "Softplus": nn.Softplus,
    "Softsign": nn.Softsign,
    "Softshrink": nn.Softshrink,
    "Hardshrink": nn.Hardshrink,
    "Hardtanh": nn.Hardtanh,
    "Hardswish": nn.Hardswish,
    "Tanhshrink": nn.Tanhshrink,
    "LogSigmoid": nn.LogSigmoid,
    "Threshold": lambda: nn.Threshold(0.1, -1.0),
    "GLU": nn.GLU,
    "Softmax": lambda: nn.Softmax(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
}
ACTIVATIONS = {name: inside(make, 8, scale=2.0) for name, make in ELEMENTWISE.items()}
# torch has no second derivative of it, and its first one is rounded as in float32.
ACTIVATIONS["Hardsigmoid"] = inside(
    nn.Hardsigmoid, 8, scale=2.0, plain=lambda: Of(lambda x: (x + 3).clamp(0, 6) / 6)
)
ACTIVATIONS["RReLU"] = inside(nn.RReLU, 8, must=False)  # its slopes are random

CONVOLUTIONS = {
    "Conv1d": inside(lambda: nn.Conv1d(2, 3, 3), 2, 5),
    "Conv2d": inside(lambda: nn.Conv2d(2, 3, 3, padding=1), 2, 3, 3),
    "Conv2d strided": inside(lambda: nn.Conv2d(2, 3, 3, stride=2), 2, 5, 5),
    "Conv2d dilated": inside(lambda: nn.Conv2d(2, 3, 2, dilation=2), 2, 4, 4),
    "Conv2d grouped": inside(lambda: nn.Conv2d(4, 4, 2, groups=2), 4, 3, 3),
    "Conv2d depthwise": inside(lambda: nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3),
    "Conv2d no bias": inside(lambda: nn.Conv2d(2, 3, 2, bias=False), 2, 3, 3),
    "Conv2d circular": inside(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 2, 3, 3
    ),
    "Conv2d reflect": inside(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2, 3, 3
    ),
    "Conv3d": inside(lambda: nn.Conv3d(1, 2, 2), 1, 3, 3, 3),
    "ConvTranspose1d": inside(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), 2, 4),
    "ConvTranspose2d": inside(lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), 2, 3, 3),
    "Conv2d on images": seeing(lambda: nn.Conv2d(1, 2, 3), nn.ReLU, width=32),
    "Conv2d on images, support": seeing(image_norm, lambda: nn.MaxPool2d(2), width=8),
}

OTHERS = {
    "Bilinear": inside(lambda: Halves(nn.Bilinear(4, 4, 5)), 8),
    "PixelShuffle": inside(lambda: nn.PixelShuffle(2), 4, 2, 2),
    "Upsample bilinear": inside(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 2, 2, 2),
    "Upsample nearest": inside(lambda: nn.Upsample(scale_factor=2), 2, 2, 2),
    "Flatten and Unflatten": inside(
        lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 2))), 2, 4
    ),
    "ReflectionPad2d": inside(lambda: nn.ReflectionPad2d(1), 2, 3, 3),
    "Unfold": inside(lambda: nn.Unfold(2), 2, 3, 3),
    "Fourier": inside(lambda: Of(lambda x: torch.fft.rfft(x).abs()), 8),
    "sorted": inside(lambda: Of(lambda x: x.sort(-1).values), 8),
    "solved": inside(
        lambda: Of(lambda x: torch.linalg.solve(x.mT @ x + torch.eye(3).to(x), x.mT)), 4, 3
    ),
    "detached": inside(lambda: Of(lambda x: x * x.detach()), 8),
    "length without gradient": inside(lambda: Of(held_fixed), 8),
    "derivative of one's own": inside(lambda: Of(Cubed.apply), 8),
    "orthogonal": inside(orthogonal("matrix_exp"), 4),
    "orthogonal cayley": inside(orthogonal("cayley"), 4),
    "orthogonal householder": inside(orthogonal("householder"), 4),
    "symmetric": inside(symmetric, 5),
    "block under two names": inside(Twice, 5),
    "tied weights": inside(Tied, 5),
    "hidden state kept": inside(Keeping, 5),
    "layer that does not learn": inside(lambda: nn.Linear(5, 5).requires_grad_(False), 5),
}

# Random, or beyond what can be lifted: equal or refused, never silently something else.
REFUSABLE = {
    "Dropout": inside(nn.Dropout, 8, must=False),
    "Dropout2d": inside(nn.Dropout2d, 4, 2, 2, must=False),
    "AlphaDropout": inside(nn.AlphaDropout, 8, must=False),
    # torch's own second derivative of it leaves out how the length of v depends on v.
    "weight_norm": inside(lambda: parametrizations.weight_norm(nn.Linear(8, 5)), 8, plain=Normed),
    "weight_norm before": inside(old_weight_norm, 8, plain=Normed),
    "spectral_norm": inside(  # every forward pass moves its buffers
        lambda: parametrizations.spectral_norm(nn.Linear(8, 5)), 8, must=False
    ),
    "noise": inside(lambda: Of(lambda x: x + torch.randn_like(x)), 8, must=False),
    "buffer written": inside(Counting, 5, must=False),
    "value looked at": inside(lambda: Of(looking), 8, must=False),
    "value taken out": inside(lambda: Of(lambda x: x * x.mean().item()), 8, must=False),
    "data taken out": inside(lambda: Of(lambda x: x * x.data), 8, must=False),
    "values chosen": inside(lambda: Of(chosen), 8, must=False),
    "autograd within": inside(lambda: Of(downhill), 8, must=False),
    # What is computed again reads the parameters that stand in the network by then.
    "checkpoint": inside(Saving, 5, must=False, plain=small),
    "derivative as before": inside(lambda: Of(OldCubed.apply), 8, must=False),
}

LAYERS: dict[str, Layer] = {
    **NORMALISATIONS,
    **RECURRENT,
    **EMBEDDINGS,
    **ATTENTION,
    **POOLING,
    **ACTIVATIONS,
    **CONVOLUTIONS,
    **OTHERS,
    **REFUSABLE,
}


# The reference: torch alone, a Python loop over tasks.


@contextmanager
def swapped(network: nn.Module, phi: dict[str, Tensor]) -> Iterator[None]:
    """Within it the network has other parameters, wherever each of its own stands."""
    others = {id(p): phi[name] for name, p in network.named_parameters()}
    own = [(m, name, p) for m in network.modules() for name, p in m._parameters.items()]
    try:
        for module, name, p in own:
            module._parameters[name] = others.get(id(p), p)
        yield
    finally:
        for module, name, p in own:
            module._parameters[name] = p


def shown(
    network: nn.Module,
    phi: dict[str, Tensor],  # its parameters
    statistics: Statistics,  # for the library's own layer, given in the library's own way
    x: Tensor,  # [n, *features]
) -> Tensor:
    """What the network says with these parameters."""
    if statistics:
        return call(network, phi, x, statistics)
    with swapped(network, phi):
        return network(x)


def judged(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(logits, y.argmax(-1))


def stepped(
    network: nn.Module, phi: dict[str, Tensor], support: Examples, first_order: bool
) -> dict[str, Tensor]:
    """A step of gradient descent for all parameters that learn."""
    at = {k: p.detach().requires_grad_(p.requires_grad) for k, p in phi.items()}
    at = at if first_order else phi
    loss = judged(shown(network, at, {}, support.x), support.y)
    names = [k for k, p in at.items() if p.requires_grad]
    found = torch.autograd.grad(
        loss, [at[k] for k in names], create_graph=not first_order, materialize_grads=True
    )
    return phi | {k: phi[k] - RATE * g for k, g in zip(names, found, strict=True)}


def by_steps(learner: Any, support: Examples, steps: int, first_order: bool = False) -> Ask:
    """MAML."""
    network, phi = learner.net, dict(learner.net.named_parameters())
    for _ in range(steps):
        phi = stepped(network, phi, support, first_order)
    return partial(shown, network, phi, support_statistics(network, phi, support.x))


def by_writing(learner: Any, support: Examples) -> Ask:
    """PGN without refinement."""
    network, phi = learner.net, learner.generate(support)
    return partial(shown, network, phi, support_statistics(network, phi, support.x))


def by_means(learner: Any, support: Examples) -> Ask:
    """Prototypical networks: minus the squared distance to the mean of each class."""
    network, labels = learner.embed, support.y.argmax(-1)
    phi = dict(network.named_parameters())
    statistics = support_statistics(network, phi, support.x)
    z = shown(network, phi, {}, support.x)
    means = torch.stack([z[labels == c].mean(0) for c in range(WAY)])
    return lambda x: -(shown(network, phi, statistics, x)[:, None] - means).square().sum(-1)


class Method(NamedTuple):
    """A learner, and the same written apart."""

    learner: Callable[[nn.Module], Learner]
    task: Callable[[Any, Examples], Ask]  # what one task's support set makes of it
    single: bool = False  # compare answers to one query at a time, instead of gradients
    choosy: bool = False  # not for every network: it reads no tokens, and refuses some


METHODS: dict[str, Method] = {
    "maml 1 step": Method(partial(MAML, lr=RATE), partial(by_steps, steps=1)),
    "maml 5 steps": Method(partial(MAML, lr=RATE, steps=5), partial(by_steps, steps=5)),
    "first order": Method(
        partial(MAML, lr=RATE, steps=2, first_order=True),
        partial(by_steps, steps=2, first_order=True),
    ),
    "pgn": Method(partial(PGN, hidden=8), by_writing, choosy=True),
    "protonet": Method(ProtoNet, by_means),
    "one query": Method(partial(MAML, lr=RATE), partial(by_steps, steps=1), single=True),
}


class Found(NamedTuple):
    """What was computed for a batch of tasks."""

    values: Tensor  # all gradients in one row, or all answers
    losses: Tensor  # [tasks], or none


class Reference(NamedTuple):
    """What is right, as far as that is known."""

    found: Found | None = None
    absent: str = ""  # why nothing was found
    applies: bool = True  # otherwise the method is not for such a network


@contextmanager
def seeded() -> Iterator[None]:
    """Within it the random numbers are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


@contextmanager
def plainly() -> Iterator[None]:
    """Within it attention is made of operations that can be differentiated twice."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def built(build: Callable[[], nn.Module], method: Method) -> Learner:
    """The same learner each time; no number is left at the zero or one that a layer starts with."""
    with seeded(), torch.no_grad():
        learner = method.learner(build()).double()
        for p in learner.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return learner.train(not method.single)


def tasks_of(layer: Layer) -> Episode:
    """A batch of tasks of random inputs."""
    generator = Generator().manual_seed(SEED)
    y = torch.eye(WAY, dtype=torch.float64).expand(TASKS, WAY, WAY)

    def examples(k: int) -> Examples:
        x = layer.inputs(TASKS * WAY * k, generator).unflatten(0, (TASKS, WAY * k))
        return Examples(x, y.repeat_interleave(k, 1))

    return Episode(examples(SHOT), examples(1))


def learned(learner: Learner) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in learner.parameters() if p.requires_grad]


@cache
def expected(layer: Layer, method: Method) -> Reference:
    """What is right; nothing where torch cannot say."""
    episodes = tasks_of(layer)
    if method.choosy and (why := mismatch(layer, method, episodes)):
        return Reference(None, why, False)
    learner = built(layer.plain or layer.build, method)
    try:
        with seeded(), plainly():
            return Reference((answered if method.single else graded)(learner, method, episodes))
    except Exception as error:  # torch has many words for a derivative that it lacks
        return Reference(None, said(error))


def mismatch(layer: Layer, method: Method, episodes: Episode) -> str:
    """Why the method is not for this network; nothing where it is."""
    if not episodes.support.x.is_floating_point():
        return "reads no tokens"
    try:
        built(layer.build, method)
    except (TypeError, ValueError) as error:
        return said(error)
    return ""


def graded(learner: Learner, method: Method, episodes: Episode) -> Found:
    """The gradient of the mean loss over tasks."""
    asked = asking(learner, method, episodes)
    losses = torch.stack([judged(ask(query.x), query.y) for ask, query in asked])
    found = torch.autograd.grad(losses.mean(), learned(learner), materialize_grads=True)
    return Found(in_a_row(found), losses.detach())


def answered(learner: Learner, method: Method, episodes: Episode) -> Found:
    """The answers to queries that are asked alone."""
    asked = asking(learner, method, episodes)
    values = [ask(x[None]).detach() for ask, query in asked for x in query.x]
    return Found(in_a_row(values), torch.empty(0))


def asking(learner: Learner, method: Method, episodes: Episode) -> list[tuple[Ask, Examples]]:
    """Whom to ask and what, for each task.

    All support sets come first, as in the library's loop: so random layers draw the same numbers.
    """
    pairs = [[Examples(side.x[i], side.y[i]) for side in episodes] for i in range(TASKS)]
    return [(method.task(learner, support), query) for support, query in pairs]


def in_a_row(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of some tensors."""
    return torch.cat([t.detach().to_dense().flatten() for t in tensors])


def said(error: Exception) -> str:
    """Type and message, cut short."""
    return f"{type(error).__name__}: {str(error)[:200]}"


# The comparison.


class Cell(NamedTuple):
    """How the library fared."""

    error: float | None = None  # length of the difference by length of what is right
    losses: float | None = None  # the same for the losses of the tasks
    refusal: str = ""  # the library's exception, if there was one
    absent: str = ""  # why there is no reference
    applies: bool = True  # otherwise the method is not for such a network
    moved: str = ""  # parameters and buffers that are not what they were

    @property
    def worst(self) -> float | None:
        """The larger error; `None` where nothing was compared."""
        known = [e for e in (self.error, self.losses) if e is not None]
        return next((e for e in known if e != e), max(known)) if known else None

    @property
    def wrong(self) -> bool:
        """Was something computed that is not right, or left behind?"""
        return bool(self.moved) or not (self.worst is None or self.worst <= TOLERANCE)


class Row(NamedTuple):
    """A cell and its place."""

    layer: str
    method: str
    lift: str
    must: bool  # see `Layer`
    cell: Cell

    @property
    def failed(self) -> bool:
        """Is it wrong, or refused where it may not be?"""
        return self.cell.wrong or (self.must and bool(self.cell.refusal))


def compare(
    layer_name: str,  # one of `LAYERS`
    method: str,  # one of `METHODS`
    lift: str,  # how tasks are lifted: "auto", "loop" or "vmap"
    **how: Any,  # what else the engine is told
) -> Cell:
    """One cell of the grid."""
    return held(LAYERS[layer_name], METHODS[method], lift, **how)


def held(layer: Layer, method: Method, lift: str, **how: Any) -> Cell:
    """The library beside the reference; its network has to be left as it was."""
    right = expected(layer, method)
    if not right.applies:
        return Cell(absent=right.absent, applies=False)
    learner = built(layer.build, method)
    before = snapshot(learner, layer.must)
    try:
        ours = (answers_of if method.single else gradients_of)(learner, layer, lift, **how)
    except Exception as error:  # whatever it is: it is noted
        return Cell(refusal=said(error), absent=right.absent, moved=moved(learner, before))
    left = moved(learner, before)
    if right.found is None:
        return Cell(absent=right.absent, moved=left)
    errors = [relative(a, b) for a, b in zip(ours, right.found, strict=True)]
    return Cell(errors[0], None if method.single else errors[1], moved=left)


def gradients_of(learner: Learner, layer: Layer, lift: Any, **how: Any) -> Found:
    """What the library leaves in `.grad`."""
    parameters = learned(learner)
    with seeded():
        losses = gradients(learner, tasks_of(layer), lift=lift, **how).losses
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return Found(in_a_row(found), losses)


def answers_of(learner: Learner, layer: Layer, lift: Any, **how: Any) -> Found:
    """What the library answers to queries that are asked alone."""
    with seeded(), torch.no_grad():
        values = answer(learner, tasks_of(layer), lift, queries="single", **how)
    return Found(values.flatten(), torch.empty(0))


def relative(found: Tensor, right: Tensor) -> float:
    """How far off, by the length of what is right."""
    return float((found - right).norm() / right.norm())


Snapshot = dict[str, tuple[Tensor, Tensor]]  # name -> what stood there, its numbers


def standing(learner: Learner, buffers: bool) -> dict[str, Tensor]:
    """The tensors of a learner under all their names."""
    parameters = dict(learner.named_parameters(remove_duplicate=False))
    return parameters | (dict(learner.named_buffers(remove_duplicate=False)) if buffers else {})


def snapshot(
    learner: Learner,
    buffers: bool,  # those, too: some layers are there to move theirs
) -> Snapshot:
    """What may not change."""
    return {k: (t, t.detach().clone()) for k, t in standing(learner, buffers).items()}


def moved(learner: Learner, before: Snapshot) -> str:
    """The names at which other tensors or other numbers stand now."""
    now = standing(learner, True)
    same = {k for k, (t, old) in before.items() if now.get(k) is t and torch.equal(t, old)}
    return " ".join(sorted(before.keys() - same))


def grid(
    lifts: Sequence[str] = ("auto", "loop"),
    layers: Mapping[str, Layer] = LAYERS,
    methods: Mapping[str, Method] = METHODS,
    **how: Any,  # what else the engine is told
) -> list[Row]:
    """Every layer with every method in every way."""
    return [
        Row(name, called, lift, layer.must, held(layer, method, lift, **how))
        for name, layer in layers.items()
        for called, method in methods.items()
        for lift in lifts
    ]


# The table.


def text(cell: Cell) -> str:
    """A cell in a few letters."""
    if cell.moved:
        return "moved"
    if not cell.applies:
        return "-"
    if cell.refusal:
        return "refused"
    return "no ref" if cell.worst is None else f"{cell.worst:.0e}" if cell.worst else "0"


def table(rows: Sequence[Row]) -> str:
    """A line for each layer, a column for each method with its ways of lifting."""
    methods, lifts = (list(dict.fromkeys(r[i] for r in rows)) for i in (1, 2))
    cells = {(r.layer, r.method, r.lift): text(r.cell) for r in rows}
    width = 8 * len(lifts)
    lines = [f"{' '.join(lifts):34}" + "".join(f"{m:{width}} " for m in methods)]
    for name, must in dict.fromkeys((r.layer, r.must) for r in rows):
        each = ("".join(f"{cells[name, m, lift]:8}" for lift in lifts) for m in methods)
        lines.append(f"{name + ('' if must else ' *'):34}" + " ".join(each))
    return "\n".join(line.rstrip() for line in lines)


def remarks(rows: Iterable[Row]) -> Iterator[str]:
    """What is wrong, or refused where it may not be: a line for each layer and fault, and where."""
    faults: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.failed:
            places = faults.setdefault((row.layer, fault(row.cell)), [])
            error = "" if row.cell.worst is None else f" {row.cell.worst:.0e}"
            places.append(f"{row.method} ({row.lift}){error}")
    for (layer, what), places in faults.items():
        yield f"{layer}: {what}: {', '.join(places)}"


def fault(cell: Cell) -> str:
    """What is to be said against a cell."""
    changed = f"changed {cell.moved}" if cell.moved else ""
    return "; ".join(filter(None, (cell.refusal.partition("\n")[0], changed))) or "wrong"


def picked(table: Mapping[str, Any], parts: str) -> dict[str, Any]:
    """The entries whose name holds one of some words, parted by commas."""
    words = parts.split(",")
    return {name: v for name, v in table.items() if any(word in name for word in words)}


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each layer and method how "auto" computed it, and how far off it was: as JSON has it.

    A lift that is right by itself, without a trial, is one that "auto" takes.
    """
    found = {(r.layer, r.method, r.lift): r.cell for r in rows}
    return [
        {"layer": r.layer, "method": r.method, "must": r.must, "way": way_of(r, found)}
        | ({} if r.cell.worst is None else {"error": r.cell.worst})
        | ({"said": r.cell.refusal} if r.cell.refusal else {})
        for r in rows
        if r.lift == "auto"
    ]


def way_of(row: Row, found: Mapping[tuple[str, str, str], Cell]) -> str:
    """How "auto" came to its result."""
    if not row.cell.applies:
        return "does not apply"
    if row.cell.refusal:
        return "refused"
    lifted = found[row.layer, row.method, "vmap"]
    return "looped" if lifted.wrong or lifted.refusal else "lifted"


def main(argv: Sequence[str] | None = None) -> int:  # 1 where a cell failed
    """Print the table, and what failed."""
    parser = argparse.ArgumentParser("python -m bench.grid", description=main.__doc__)
    parser.add_argument("--layers", default="", help="parts of names, parted by commas")
    parser.add_argument("--methods", default="", help="parts of names, parted by commas")
    parser.add_argument("--lift", default="auto,loop", help="auto, loop, vmap, parted by commas")
    parser.add_argument("--no-check", action="store_true", help="tell the engine check=False")
    parser.add_argument("--out", type=Path, help="a folder: write bench-lifting-cpu.json there")
    told = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("metabook").setLevel(logging.ERROR)  # loops are expected
    how = {"check": False} if told.no_check else {}
    which = picked(LAYERS, told.layers), picked(METHODS, told.methods)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells where lifting is slow
        rows = grid(told.lift.split(","), *which, **how)
        untried = grid(("vmap",), *which, check=False) if told.out else []
    if not rows:
        parser.error("no layer or no method has such a name")
    print(table(rows), "* may be refused", *remarks(rows), sep="\n")
    if told.out:
        command, only = "python -m bench.grid --out results", told.layers or told.methods
        content = {"settings": {"only": only}, "rows": summary([*rows, *untried])}
        write(report("lifting", "cpu", 1, command, **content), told.out)
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
