"""Made from nbs/A21_primitives.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from metabook import primitives


def cell_194da5af():
    # cell 194da5af
    def after_a_step(w, x):
        "The loss of one task after an inner step from w."

        def loss(w):
            return F.layer_norm(x * w, (4,), w).exp().mean()

        return loss(w - grad(loss)(w))

    def meta_gradients(w, x):
        "Lifted, and in a loop."
        lifted = torch.autograd.grad(vmap(after_a_step, (None, 0))(w, x).sum(), w)[0]
        return lifted, torch.autograd.grad(sum(after_a_step(w, one) for one in x), w)[0]

    return meta_gradients


def test_a_plain_lift_is_wrong():
    meta_gradients = cell_194da5af()
    # cell bf012acc
    torch.manual_seed(0)
    w, x = torch.randn(4, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 4).double()
    lifted, looped = meta_gradients(w, x)
    off = ((lifted - looped).norm() / looped.norm()).item()
    print(f"lifted as PyTorch does it: {off:.0%} off the loop")
    assert off > 0.01


def test_entries_are_what_they_replace():
    # cell cd7a53ba
    def derivatives(f, *inputs, twice=True):
        "The value, the derivative of the mean of its exponentials, and that of the squared length of this."
        inputs = [t.clone().requires_grad_() for t in inputs]
        value = f(*inputs)
        first = torch.autograd.grad(value.exp().mean(), inputs, create_graph=True)
        if not twice:
            return [value, *first]
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [value, *first, *second]

    # cell b1b13e7c
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    w, b, tail = (torch.randn(n, dtype=torch.float64) for n in (4, 4, 3))
    tokens, rows = torch.tensor([[0, 2, 1], [1, 0, 0]]), torch.randn(3, 4, dtype=torch.float64)
    seen = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    CALLS = [
        (F.layer_norm, lambda f: lambda x, w, b: f(x, (3,), w, b, 1e-3), (x, tail, tail)),
        (F.layer_norm, lambda f: lambda x: f(x, (4, 3)), (x,)),
        (F.batch_norm, lambda f: lambda x, w, b: f(x, None, None, w, b, True), (x, w, b)),
        (
            F.batch_norm,
            lambda f: lambda x, w, b: f(x, b.detach(), w.detach().exp(), w, b),
            (x, w, b),
        ),
        (F.instance_norm, lambda f: lambda x, w, b: f(x, weight=w, bias=b), (x, w, b)),
        (F.embedding, lambda f: lambda t: f(tokens, t, 0), (rows,)),
        (F.embedding, lambda f: lambda t: f(tokens, t, -1), (rows,)),
        (F.hardsigmoid, lambda f: f, (4 * x,)),
    ]
    with pytest.raises(ValueError, match=r"max_norm=1.0\) writes into its weight"):
        primitives.embedding(tokens, rows, max_norm=1.0)
    for function, how, inputs in CALLS:
        twice = function is not F.hardsigmoid
        found, right = (
            derivatives(how(f), *inputs, twice=twice)
            for f in (primitives.LIFTED[function], function)
        )
        torch.testing.assert_close(found, right)

    for how in (
        {},
        {"mode": "sum"},
        {"padding_idx": 0},
        {"mode": "sum", "per_sample_weights": x[:2, 0]},
    ):
        torch.testing.assert_close(
            primitives.embedding_bag(tokens, rows, **how), F.embedding_bag(tokens, rows, **how)
        )
    torch.testing.assert_close(
        primitives.weight_norm(x[0], w[:, None]), torch._weight_norm(x[0], w[:, None])
    )
    assert torch.autograd.gradgradcheck(
        primitives.weight_norm, (x[0].requires_grad_(), w[:, None].requires_grad_())
    )

    q, k, v = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    for how in (
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": seen},
        {"attn_mask": x[0, :3]},
    ):
        ours = primitives.attention(
            q, k, v, **how
        )  # the second of the three queries above sees nobody
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **how))
    many = torch.randn(4, 3, 4, dtype=torch.float64)
    found, right = (
        f(many, k, v, enable_gqa=True)
        for f in (primitives.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(found, right)


def test_a_composed_lift_is_right():
    meta_gradients = cell_194da5af()
    # cell 0ef7f273
    w, x = torch.randn(4, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 4).double()
    with primitives.composing(primitives.LIFTED):
        torch.testing.assert_close(*meta_gradients(w, x))
