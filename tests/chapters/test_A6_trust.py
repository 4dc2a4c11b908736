"""Made from nbs/A6_trust.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from metabook import trust
from metabook.engine import gradients, losses
from metabook.episodes import Classes, Examples, FewShot, Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, call
from metabook.prototypes import ProtoNet
from metabook.scores import evaluate
from metabook.training import fit


def test_a_plain_lift_is_wrong():
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
        trust.embedding(tokens, rows, max_norm=1.0)
    for function, how, inputs in CALLS:
        twice = function is not F.hardsigmoid
        found, right = (
            derivatives(how(f), *inputs, twice=twice) for f in (trust.LIFTED[function], function)
        )
        torch.testing.assert_close(found, right)

    for how in (
        {},
        {"mode": "sum"},
        {"padding_idx": 0},
        {"mode": "sum", "per_sample_weights": x[:2, 0]},
    ):
        torch.testing.assert_close(
            trust.embedding_bag(tokens, rows, **how), F.embedding_bag(tokens, rows, **how)
        )
    torch.testing.assert_close(
        trust.weight_norm(x[0], w[:, None]), torch._weight_norm(x[0], w[:, None])
    )
    assert torch.autograd.gradgradcheck(
        trust.weight_norm, (x[0].requires_grad_(), w[:, None].requires_grad_())
    )

    q, k, v = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    for how in (
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": seen},
        {"attn_mask": x[0, :3]},
    ):
        ours = trust.attention(q, k, v, **how)  # the second of the three queries above sees nobody
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **how))
    many = torch.randn(4, 3, 4, dtype=torch.float64)
    found, right = (
        f(many, k, v, enable_gqa=True) for f in (trust.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(found, right)


def test_a_composed_lift_is_right():
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
        trust.embedding(tokens, rows, max_norm=1.0)
    for function, how, inputs in CALLS:
        twice = function is not F.hardsigmoid
        found, right = (
            derivatives(how(f), *inputs, twice=twice) for f in (trust.LIFTED[function], function)
        )
        torch.testing.assert_close(found, right)

    for how in (
        {},
        {"mode": "sum"},
        {"padding_idx": 0},
        {"mode": "sum", "per_sample_weights": x[:2, 0]},
    ):
        torch.testing.assert_close(
            trust.embedding_bag(tokens, rows, **how), F.embedding_bag(tokens, rows, **how)
        )
    torch.testing.assert_close(
        trust.weight_norm(x[0], w[:, None]), torch._weight_norm(x[0], w[:, None])
    )
    assert torch.autograd.gradgradcheck(
        trust.weight_norm, (x[0].requires_grad_(), w[:, None].requires_grad_())
    )

    q, k, v = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    for how in (
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": seen},
        {"attn_mask": x[0, :3]},
    ):
        ours = trust.attention(q, k, v, **how)  # the second of the three queries above sees nobody
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **how))
    many = torch.randn(4, 3, 4, dtype=torch.float64)
    found, right = (
        f(many, k, v, enable_gqa=True) for f in (trust.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(found, right)
    # cell 0ef7f273
    w, x = torch.randn(4, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 4).double()
    with trust.composing(trust.LIFTED):
        torch.testing.assert_close(*meta_gradients(w, x))


def test_places_are_filled_and_given_back():
    # cell 93f5100d
    class Twice(nn.Module):
        "One block under two names, one weight in two blocks, and something that it remembers."

        def __init__(self):
            super().__init__()
            block = nn.Linear(4, 4)
            self.layers, self.other = nn.ModuleList([block, block]), nn.Linear(4, 4)
            self.other.weight, self.seen = block.weight, []

        def forward(self, x):
            for layer in (*self.layers, self.other):
                x = layer(x).tanh()
                self.seen.append(x)
            self.last = x
            return x

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(3, 4)
    before = {k: p.clone() for k, p in net.named_parameters()}
    phi = {k: torch.randn_like(p).requires_grad_() for k, p in before.items()}
    copied = Twice()
    copied.load_state_dict(phi, strict=False)
    copied.other.weight = copied.layers[0].weight
    torch.testing.assert_close(call(net, phi, x), copied(x))
    g = grad(lambda p: call(net, p, x).sum())(phi)
    assert all(p.isfinite().all() for p in g.values())
    assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
    assert net.other.weight is net.layers[1].weight and not net.seen and not hasattr(net, "last")
    copy.deepcopy(net), torch.save(net.state_dict(), io.BytesIO())
    with pytest.raises(ValueError, match="is no parameter or buffer of Twice: give names"):
        call(net, {"layers.7.weight": x}, x)


def test_threads_take_turns():
    # cell 200eca57
    torch.manual_seed(0)
    classes = Classes.of({str(i): torch.randn(12, 1, 28, 28) * (i + 1) + i for i in range(8)})
    many = FewShot(classes, 5, 2, 6).sample(24)
    asked = [tuple(part[i] for part in (*many.support[:2], many.query.x)) for i in range(24)]
    METHODS = {
        "protonet": lambda: ProtoNet(Conv4(width=8, stats="support")),
        "maml": lambda: MAML(Conv4(out=5, width=8, stats="support"), steps=2),
    }
    for name, method in METHODS.items():
        learner = method().eval()

        def ask(task, learner=learner):
            return learner(Examples(*task[:2]), task[2])

        alone = [ask(task) for task in asked]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, asked))
        for found in (together, [ask(task) for task in asked]):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), name


def test_training_is_refused_to_others():
    # cell 200eca57
    torch.manual_seed(0)
    classes = Classes.of({str(i): torch.randn(12, 1, 28, 28) * (i + 1) + i for i in range(8)})
    many = FewShot(classes, 5, 2, 6).sample(24)
    asked = [tuple(part[i] for part in (*many.support[:2], many.query.x)) for i in range(24)]
    METHODS = {
        "protonet": lambda: ProtoNet(Conv4(width=8, stats="support")),
        "maml": lambda: MAML(Conv4(out=5, width=8, stats="support"), steps=2),
    }
    for name, method in METHODS.items():
        learner = method().eval()

        def ask(task, learner=learner):
            return learner(Examples(*task[:2]), task[2])

        alone = [ask(task) for task in asked]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, asked))
        for found in (together, [ask(task) for task in asked]):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), name
    # cell 392432c3
    learner = ProtoNet(MLP([3, 4]))
    task = Examples(torch.randn(4, 3), torch.eye(2).repeat(2, 1)), torch.randn(2, 3)
    pairs = FewShot(Classes.of({str(i): torch.randn(4, 3) for i in range(4)}), 2, 1, 1)

    def elsewhere(f):
        "What another thread gets."
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(f).result()

    with trust.claiming(learner):
        learner(*task)
        for f in (
            lambda: learner(*task),
            lambda: learner.adapt(task[0]),
            lambda: learner.train(),
            lambda: fit(learner, pairs, steps=1),
        ):
            with pytest.raises(RuntimeError, match="in another thread: wait for it, or ask a copy"):
                elsewhere(f)
    with trust.asking(learner), pytest.raises(RuntimeError, match="is answering in another thread"):
        elsewhere(lambda: learner.eval())
    elsewhere(lambda: learner.eval()(*task))


def test_a_wrong_lift_is_found():
    # cell 5ebe4a13
    class OddLinear(nn.Linear):
        "Lifted, it computes something else: what a wrong rule does."

        def forward(self, x):
            return super().forward(x) * (1.01 if torch._C._functorch.is_batchedtensor(x) else 1.0)

    torch.manual_seed(0)
    episodes = Sinusoids(5, 5).sample(4)

    def wave(layer):
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), layer)
        return MAML(net, lr=0.01, kind="regression").train()

    odd, state = wave(OddLinear(8, 1)), torch.get_rng_state()
    torch.testing.assert_close(losses(odd, episodes), losses(odd, episodes, "loop"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in odd.parameters())
    with pytest.raises(RuntimeError, match=r"lift=\"vmap\" for MAML.* net.2 \(OddLinear\)"):
        losses(odd, episodes, "vmap")
    unchecked = losses(odd, episodes, "vmap", check=False)
    assert not torch.allclose(unchecked, losses(odd, episodes, "loop"))
    assert trust.proven(wave(nn.Linear(8, 1))) and not trust.proven(odd)


def test_a_trial_is_paid_for_twice_at_most():
    # cell 5ebe4a13
    class OddLinear(nn.Linear):
        "Lifted, it computes something else: what a wrong rule does."

        def forward(self, x):
            return super().forward(x) * (1.01 if torch._C._functorch.is_batchedtensor(x) else 1.0)

    torch.manual_seed(0)
    episodes = Sinusoids(5, 5).sample(4)

    def wave(layer):
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), layer)
        return MAML(net, lr=0.01, kind="regression").train()

    odd, state = wave(OddLinear(8, 1)), torch.get_rng_state()
    torch.testing.assert_close(losses(odd, episodes), losses(odd, episodes, "loop"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in odd.parameters())
    with pytest.raises(RuntimeError, match=r"lift=\"vmap\" for MAML.* net.2 \(OddLinear\)"):
        losses(odd, episodes, "vmap")
    unchecked = losses(odd, episodes, "vmap", check=False)
    assert not torch.allclose(unchecked, losses(odd, episodes, "loop"))
    assert trust.proven(wave(nn.Linear(8, 1))) and not trust.proven(odd)
    # cell 2d6fc6e5
    learner, trials = wave(OddLinear(8, 1)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "why_not", lambda *args: trials.append(args) or "")
        for n in (3, 4, 3, 5, 6, 4):
            losses(learner, Sinusoids(n, n).sample(2))
    assert len(trials) == trust.MOST


def test_what_cannot_be_lifted_is_looped():
    # cell 5ebe4a13
    class OddLinear(nn.Linear):
        "Lifted, it computes something else: what a wrong rule does."

        def forward(self, x):
            return super().forward(x) * (1.01 if torch._C._functorch.is_batchedtensor(x) else 1.0)

    torch.manual_seed(0)
    episodes = Sinusoids(5, 5).sample(4)

    def wave(layer):
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), layer)
        return MAML(net, lr=0.01, kind="regression").train()

    odd, state = wave(OddLinear(8, 1)), torch.get_rng_state()
    torch.testing.assert_close(losses(odd, episodes), losses(odd, episodes, "loop"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in odd.parameters())
    with pytest.raises(RuntimeError, match=r"lift=\"vmap\" for MAML.* net.2 \(OddLinear\)"):
        losses(odd, episodes, "vmap")
    unchecked = losses(odd, episodes, "vmap", check=False)
    assert not torch.allclose(unchecked, losses(odd, episodes, "loop"))
    assert trust.proven(wave(nn.Linear(8, 1))) and not trust.proven(odd)
    # cell 2d6fc6e5
    learner, trials = wave(OddLinear(8, 1)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "why_not", lambda *args: trials.append(args) or "")
        for n in (3, 4, 3, 5, 6, 4):
            losses(learner, Sinusoids(n, n).sample(2))
    assert len(trials) == trust.MOST

    # cell 24ac6b57
    class Last(nn.Module):
        "The last state of a recurrent layer."

        def __init__(self, layer):
            super().__init__()
            self.rnn, self.head = layer, nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    class Asks(nn.Module):
        "Python that looks at a value."

        def forward(self, x):
            return x if x.mean() > 0 else 2 * x

    sequences = Classes.of({str(i): torch.randn(8, 5, 4) for i in range(6)})
    tasks = FewShot(sequences, 3, 1, 2)
    episodes = tasks.sample(2)
    NETS = {  # what each does
        "no rule": lambda: Last(nn.LSTM(4, 8, batch_first=True)),
        "looks at a value": lambda: nn.Sequential(nn.Flatten(), Asks(), nn.Linear(20, 3)),
    }
    for why, net in NETS.items():
        torch.manual_seed(0)
        learner = MAML(net()).train()
        torch.testing.assert_close(losses(learner, episodes), losses(learner, episodes, "loop"))
        with pytest.raises(RuntimeError, match=why):
            losses(learner, episodes, "vmap")
        evaluate(ProtoNet(net()), tasks, 4, queries="single")  # a single query is looped over, too

    writes = MAML(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 3))).train()
    for lift in ("auto", "loop"):
        with pytest.raises(
            RuntimeError, match=r"net.1 \(BatchNorm1d\).*metabook.networks.BatchNorm"
        ):
            losses(writes, episodes, lift)


def test_solution_scaled():
    # cell a0cda91a
    class Scaled(nn.Module):
        "Nothing here looks at a value: `max` is an operation like others.  With `.item()` it is looped."

        def forward(self, x):
            return x / x.abs().max()

    learner = MAML(
        nn.Sequential(nn.Linear(1, 8), Scaled(), nn.Linear(8, 1)), kind="regression"
    ).train()
    waves = Sinusoids(5, 5).sample(3)
    torch.testing.assert_close(losses(learner, waves, "vmap"), losses(learner, waves, "loop"))


def test_solution_without_an_entry():
    # cell a0cda91a
    class Scaled(nn.Module):
        "Nothing here looks at a value: `max` is an operation like others.  With `.item()` it is looped."

        def forward(self, x):
            return x / x.abs().max()

    learner = MAML(
        nn.Sequential(nn.Linear(1, 8), Scaled(), nn.Linear(8, 1)), kind="regression"
    ).train()
    waves = Sinusoids(5, 5).sample(3)
    torch.testing.assert_close(losses(learner, waves, "vmap"), losses(learner, waves, "loop"))

    # cell afc66fa0
    def unlike_the_loop(learner, **how):
        "Does the gradient differ?"
        found = []
        for lift in ("auto", "loop"):
            learner.zero_grad()
            gradients(learner, waves, lift=lift, **how)
            found.append(torch.cat([p.grad.flatten() for p in learner.parameters()]))
        return bool((found[0] - found[1]).norm() > 1e-4 * found[1].norm())

    def with_layer_norm():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(1, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1)
        ).double()
        return MAML(net, lr=0.1, steps=5, kind="regression").train()

    waves = Sinusoids(10, 10).sample(4).to(None, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for name in (F.layer_norm, torch.layer_norm):
            patch.delitem(trust.LIFTED, name)
        assert unlike_the_loop(with_layer_norm())  # verified with the entry, so it is not tried
        patch.setattr(trust, "VERIFIED", {})
        assert not unlike_the_loop(with_layer_norm())  # tried, and looped over
        assert unlike_the_loop(with_layer_norm(), check=False)
    assert not unlike_the_loop(with_layer_norm())
