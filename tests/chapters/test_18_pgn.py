"""Made from nbs/18_pgn.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from metabook.classes import Classes
from metabook.engine import over_tasks
from metabook.episodes import Episode, Examples, FewShot, Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, call, parameter_count
from metabook.pgn import (
    FORMS,
    PGN,
    FullWriter,
    LowRankWriter,
    RowWriter,
    ScaleWriter,
    SetEncoder,
    make_writers,
    unit_scale,
)
from metabook.testing import check_learner


def cell_605c567c():
    # cell 605c567c
    def written_layers(gain, widths, relu):
        "The mean square of the activations after each layer that is written on top of zeros."
        torch.manual_seed(0)
        q, x, squares = 32, torch.randn(300, widths[0]), []
        for fan_in, out in pairwise(widths):
            zero, h = torch.zeros(out, fan_in), unit_scale(F.relu(torch.randn(q)))
            with torch.no_grad():
                x = x @ FullWriter(zero, q, gain)(zero, h).T
            x = F.relu(x) if relu else x
            squares.append(x.square().mean().item())
        return squares

    return written_layers


def cell_900723c5():
    # cell 900723c5
    def small_pgn(**options):
        "A learner for sinusoids that is quick to check."
        torch.manual_seed(0)
        return PGN(MLP([1, 12, 1]), kind="regression", hidden=8, **options)

    def one_wave(shot=5, query=8, seed=0):
        "One sinusoid in double precision."
        waves = Sinusoids(shot, query).sample(1, torch.Generator().manual_seed(seed))
        sides = waves.to(dtype=torch.float64)
        return Episode(*(Examples(s.x[0], s.y[0], {"task": s.info["task"][0]}) for s in sides))

    return one_wave, small_pgn


def cell_65f178c4(one_wave, small_pgn):
    # cell 65f178c4
    def gradient_norms(learner):
        "The size of the gradient of writers, of the reader, and of the common start."
        loss, parts = learner.loss(one_wave()), (learner.writers, learner.read, learner.net)
        norms = []
        for part in parts:
            g = torch.autograd.grad(
                loss, list(part.parameters()), retain_graph=True, allow_unused=True
            )
            norms.append(sum(p.abs().sum().item() for p in g if p is not None))
        return norms

    def moved_by_exchange(learner):
        "How far the answers move when the task gets the description of another."
        a, b = one_wave(seed=0), one_wave(seed=1)
        return (learner(b.support, a.query.x) - learner(a.support, a.query.x)).abs().max().item()

    told = dict(description="task", task_size=2)
    dead, blind, still = (small_pgn(gain=g, **told).double() for g in (0.1, 0.1, 0.0))
    with torch.no_grad():
        dead.read.layers[-1].bias -= 100  # every unit is silent: h = 0
        blind.read.layers[0].weight.zero_()  # h is constant
        blind.read.layers[0].bias.fill_(1.0)
    for name, learner in {"h = 0": dead, "h constant": blind, "G = 0": still}.items():
        row = "  ".join(f"{norm:8.2g}" for norm in gradient_norms(learner))
        print(f"{name:12} gradients: writers, reader, start {row}")
    assert gradient_norms(dead)[:2] == [0, 0] and gradient_norms(dead)[2] > 0
    assert gradient_norms(blind)[0] > 0 and gradient_norms(blind)[1] > 0
    assert gradient_norms(still)[0] > 0 and gradient_norms(still)[1] == 0
    assert moved_by_exchange(dead) == moved_by_exchange(blind) == 0
    assert moved_by_exchange(small_pgn(**told).double()) > 1e-3  # the repair: live units, gain > 0
    return gradient_norms


@pytest.mark.proves("eq-pgn-generate")
def test_written_by_hand():
    # cell 1b69514b
    p = torch.tensor([1.0, -1.0])
    write = FullWriter(p, q=2, gain=1.0)
    assert not write.G.any()  # a bias starts as the network's own
    write.G.data = torch.tensor([[0.5, 0.5], [0.0, 2.0]])
    assert write(p, torch.tensor([1.0, 1.0])).tolist() == [2.0, 1.0]
    assert write(p, torch.tensor([0.0, 1.0])).tolist() == [1.5, 1.0]
    assert unit_scale(torch.tensor([3.0, 4.0])).square().mean().item() == pytest.approx(1.0)
    assert not unit_scale(torch.zeros(2)).any()


def test_the_outer_gradient():
    # cell 3d2dfd70
    p, h = (torch.tensor(v, requires_grad=True) for v in ([1.0, -1.0], [1.0, 1.0]))
    write, curvature = FullWriter(p, q=2, gain=1.0), torch.tensor([1.0, 5.0])
    write.G.data = torch.tensor([[0.5, 0.5], [0.0, 2.0]])
    phi_0 = write(p, h)
    for create, g in ((True, [1.62, 0.25]), (False, [1.8, 0.5])):  # in full, first order
        loss = (curvature * phi_0.square()).sum() / 2
        slope = torch.autograd.grad(loss, phi_0, create_graph=create, retain_graph=True)[0]
        phi_1 = phi_0 - 0.1 * slope
        parts = (p, write.G, h)
        found = torch.autograd.grad(phi_1.square().sum() / 2, parts, retain_graph=True)
        g = torch.tensor(g)
        for have, expected in zip(
            found, (g, torch.outer(g, torch.ones(2)), write.G.T @ g), strict=True
        ):
            torch.testing.assert_close(have, expected.detach())
    came_in = torch.tensor([3.0, 4.0, 1.0], requires_grad=True)
    h = unit_scale(came_in)
    back, rms = torch.tensor([0.3, -1.0, 2.0]), came_in.square().mean().sqrt()
    (found,) = torch.autograd.grad(h, came_in, back)
    torch.testing.assert_close(found, (back - h * (h @ back) / 3) / rms)  # nothing along h is left


@pytest.mark.proves("eq-pgn-kernel")
def test_what_one_task_teaches_another():
    # cell d74d9329
    torch.manual_seed(0)
    p, target, beta = torch.randn(3, 2).double(), torch.randn(3, 2).double(), 0.1
    write = FullWriter(p, q=16, gain=1.0).double()
    h_1, h_2 = unit_scale(F.relu(torch.randn(2, 16).double()))
    p.requires_grad_()
    phi_1, before = write(p, h_1), write(p, h_2).detach()
    g_1 = (phi_1 - target).cos().detach() * 3  # the gradient of the loss 3 sin(phi - target)
    loss = (3 * (phi_1 - target).sin()).sum()
    dp, dG = torch.autograd.grad(loss, [p, write.G])
    with torch.no_grad():
        p -= beta * dp
        write.G -= beta * dG
    moved = write(p, h_2).detach() - before
    print(f"h_1 . h_2 = {h_1 @ h_2:.2f}")
    torch.testing.assert_close(moved, -beta * (1 + h_1 @ h_2) * g_1)
    moved = (write(p, h_1) - phi_1).detach()  # and itself
    torch.testing.assert_close(moved, -beta * (1 + 16) * g_1, rtol=1e-6, atol=0)


@pytest.mark.proves("eq-pgn-variance")
def test_scale_is_kept():
    written_layers = cell_605c567c()
    # cell 82b79456
    linear = written_layers(1.0, [64, 600, 600, 600], relu=False)
    assert linear == pytest.approx([1.0, 1.0, 1.0], rel=0.15)
    with_relu = written_layers(2.0, [64, 600, 600, 600], relu=True)
    assert with_relu == pytest.approx([1.0, 1.0, 1.0], rel=0.2)
    too_little = written_layers(1.0, [64, 600, 600, 600], relu=True)  # a ReLU halves it
    assert too_little == pytest.approx([0.5, 0.25, 0.125], rel=0.2)


@pytest.mark.proves("eq-pgn-he")
def test_the_usual_rule_explodes():
    written_layers = cell_605c567c()
    # cell 68fc91c9
    n = 64
    layers = [n, 1000]
    assert written_layers(2.0 * n, layers, relu=False)[0] == pytest.approx(2 * n, rel=0.1)
    assert written_layers(2.0 * n, layers, relu=True)[0] == pytest.approx(n, rel=0.15)
    four = written_layers(2.0 * n, [n] * 5, relu=False)
    print("mean square after each layer:", *(f"{s:.3g}" for s in four))
    assert four[-1] == pytest.approx((2 * n) ** 4, rel=0.8)  # one draw of few units scatters


@pytest.mark.proves("eq-pgn-both")
def test_start_and_generator_share_the_budget():
    # cell d1f43f5a
    torch.manual_seed(0)
    q, n, out, gain = 32, 64, 2000, 0.5
    own, x = nn.Linear(n, out, bias=False).weight, torch.randn(300, n)
    with torch.no_grad():
        a = x @ FullWriter(own, q, gain)(own, unit_scale(F.relu(torch.randn(q)))).T
    expected = n * own.var().item() + gain
    print(f"own share {n * own.var().item():.3f}, generator {gain}")
    assert a.square().mean().item() == pytest.approx(expected * x.square().mean().item(), rel=0.08)


def test_the_first_step_of_adam():
    # cell c03e61f1
    p, h = (
        torch.zeros(6),
        unit_scale(F.relu(torch.randn(64, generator=torch.Generator().manual_seed(0)))),
    )
    write = FullWriter(p, 64, gain=1.0)
    p.requires_grad_()
    adam = torch.optim.Adam([p, write.G], lr=1e-3)
    before, direction = write(p, h).detach(), torch.tensor([1.0, -1, 1, 1, -1, 2])
    (write(p, h) @ direction).backward()
    adam.step()
    torch.testing.assert_close(
        write(p, h).detach() - before, -1e-3 * direction.sign() * (1 + h.sum())
    )
    assert 8 <= h.sum() <= 64


def test_what_forms_cost_and_pass_back():
    # cell a645a379
    conv = nn.Conv2d(32, 32, 3)
    full, factors = FullWriter(conv.weight, 64, 0.1), ScaleWriter(conv.weight, 64, 0.1)
    shift = FullWriter(conv.bias, 64, 0.1)
    assert parameter_count(conv) == 9248
    assert parameter_count(full) + parameter_count(shift) == 591_872
    assert parameter_count(factors) + parameter_count(shift) == 4096

    torch.manual_seed(0)
    W_0, h = torch.randn(3, 4, requires_grad=True), unit_scale(torch.rand(8))
    g, write = torch.randn(3, 4), ScaleWriter(W_0, 8, 1.0)
    dG, dW = torch.autograd.grad(write(W_0, h), [write.G, W_0], g)
    torch.testing.assert_close(dG, torch.outer((g * W_0).sum(1), h))
    torch.testing.assert_close(dW, (1 + write.G @ h)[:, None] * g)
    write = LowRankWriter(W_0, 8, 1.0)
    U, V = write.A @ h, write.B @ h
    found = torch.autograd.grad(write(W_0, h), [write.A, write.B], g)
    torch.testing.assert_close(found[0], (g @ V)[..., None] * h)
    torch.testing.assert_close(found[1], (g.T @ U)[..., None] * h)
    write = RowWriter(W_0, 8, 1.0)
    found = torch.autograd.grad(write(W_0, h), [write.v, write.G], g)
    torch.testing.assert_close(found[0], h * (g @ write.G))
    torch.testing.assert_close(found[1], g.T @ (write.v * h))


@pytest.mark.proves("eq-pgn-lowrank")
def test_low_rank():
    # cell bc3ab5bb
    torch.manual_seed(0)
    h, kernel = unit_scale(torch.randn(32)), torch.randn(6, 4, 3, 3)
    write = LowRankWriter(kernel, 32, gain=1.0)
    added = (write(kernel, h) - kernel).flatten(1).detach()
    A, B = (torch.einsum("ijl,l->ij", w, h).detach() for w in (write.A, write.B))
    torch.testing.assert_close(added, A @ B.T, atol=1e-5, rtol=1e-4)
    assert torch.linalg.matrix_rank(added, rtol=1e-4) == 2
    assert write.sent == A.numel() + B.numel() == 2 * (6 + 36)


@pytest.mark.proves("eq-pgn-chunks")
def test_chunks():
    # cell 4364eedb
    torch.manual_seed(0)
    h, weight = unit_scale(F.relu(torch.randn(32))), torch.randn(6, 5)
    write = RowWriter(weight, 32, gain=1.0)
    for i, row in enumerate(write(weight, h)):
        torch.testing.assert_close(row, weight[i] + write.G @ (write.v[i] * h))
    as_full = FullWriter(weight, 32, gain=1.0)  # the same, written out
    as_full.G.data = (write.G[None] * write.v[:, None]).flatten(0, 1).detach()
    torch.testing.assert_close(as_full(weight, h), write(weight, h), atol=1e-5, rtol=1e-4)


@pytest.mark.proves("eq-pgn-film")
def test_scale():
    # cell 6496acc6
    torch.manual_seed(0)
    h, kernel = unit_scale(torch.randn(32)), torch.randn(6, 4, 3, 3)
    write = ScaleWriter(kernel, 32, gain=1.0)
    rho = write.G @ h
    torch.testing.assert_close(
        write(kernel, h), torch.stack([(1 + rho[i]) * kernel[i] for i in range(6)])
    )


def test_every_form_keeps_the_gain():
    # cell 35c3ce50
    torch.manual_seed(0)
    for form in (LowRankWriter, RowWriter):
        zero, h, x = (
            torch.zeros(2000, 64),
            unit_scale(F.relu(torch.randn(32))),
            torch.randn(300, 64),
        )
        with torch.no_grad():
            squares = [(x @ form(zero, 32, 1.5)(zero, h).T).square().mean() for _ in range(5)]
        assert torch.stack(squares).mean().item() == pytest.approx(1.5, rel=0.3)
    factor = ScaleWriter(torch.ones(5000, 1), 32, 1.5)(torch.ones(5000, 1), h) - 1
    assert factor.square().mean().item() == pytest.approx(1.5, rel=0.1)


@pytest.mark.proves("eq-pgn-set")
def test_a_set_has_no_order():
    # cell a745b44a
    torch.manual_seed(0)
    encoder = SetEncoder(MLP([2, 8, 3]), hidden=6).double()
    x, y = torch.randn(7, 2).double(), F.one_hot(torch.tensor([0, 1, 2, 0, 0, 1, 2]), 3).double()
    z = encoder(x, y)
    e = F.relu(encoder.pair(torch.cat([x, y], 1)))
    by_hand = [e.mean(0)] + [e[y[:, k] == 1].mean(0) - e.mean(0) for k in range(3)]
    torch.testing.assert_close(z, torch.stack(by_hand))

    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(encoder(x[order], y[order]), z)  # another order
    torch.testing.assert_close(encoder(x.repeat(2, 1), y.repeat(2, 1)), z)  # all of it twice
    assert not torch.allclose(encoder(x, y[order]), z)  # but labels must stay with their inputs

    y = torch.randn(7, 3).double()  # targets of either sign
    e = F.relu(encoder.pair(torch.cat([x, y], 1)))
    by_hand = [(y[:, [k]] * e).sum(0) / y[:, k].abs().sum() - e.mean(0) for k in range(3)]
    torch.testing.assert_close(encoder(x, y)[1:], torch.stack(by_hand))


def test_a_prototype_is_a_written_row():
    # cell 23c3e873
    c, x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.randn(20, 8)
    rows, biases = RowWriter(torch.zeros(5, 8), 8, 1.0), RowWriter(torch.zeros(5), 1, 1.0)
    for writer, G_of in ((rows, 2 * torch.eye(8)), (biases, torch.tensor([[-1.0]]))):
        nn.init.ones_(writer.v)
        writer.G.data = G_of
    w_k, b_k = rows(torch.zeros(5, 8), c), biases(torch.zeros(5), c.square().sum(1, keepdim=True))
    torch.testing.assert_close(
        (x @ w_k.T + b_k).softmax(1), (-torch.cdist(x, c).square()).softmax(1), atol=1e-4, rtol=1e-3
    )


def test_few_tasks_are_memorised():
    # cell 43004197
    M, D, draw = 12, 20, torch.Generator().manual_seed(0)
    d, targets = (
        torch.randn(4000, M, D, generator=draw).double(),
        torch.randn(4000, M, 1, generator=draw),
    )
    G_row = torch.linalg.pinv(d) @ targets.double()  # the shortest of many solutions
    assert (d @ G_row - targets).abs().max() < 1e-6  # training tasks: no error, of pure noise
    new = torch.randn(4000, 1, D, generator=draw).double() @ G_row - torch.randn(
        4000, 1, 1, generator=draw
    )
    print(f"a new task: {new.square().mean():.2f}, one start for all: 1")
    assert new.square().mean().item() == pytest.approx(1 + M / (D - M - 1), rel=0.15)


def test_pgn_in_use():
    # cell 9e7298bc
    torch.manual_seed(0)
    learner = PGN(MLP([1, 40, 40, 1]), form="film", kind="regression")
    episodes = Sinusoids(shot=5, query=10).sample(3)
    support, query = (Examples(side.x[0], side.y[0]) for side in episodes)
    phi = learner.generate(support)
    assert learner(support, query.x).shape == (10, 1)
    assert phi.keys() == dict(learner.net.named_parameters()).keys()
    torch.testing.assert_close(learner(support, query.x), call(learner.net, phi, query.x))
    other = learner.generate(Examples(episodes.support.x[1], episodes.support.y[1]))
    assert all(
        (phi[k] != other[k]).any() for k in phi if "weight" in k
    )  # another task, another network


def test_the_table_counts_what_is_written():
    # cell 2fca0143
    def costs(net, form, q=64):
        "How many numbers the generator has, and how many it writes for a task."
        writers = make_writers(net, form, q, gain=0.1)
        return parameter_count(writers), sum(writer.sent for writer in writers)

    # cell 94f2f068
    net = Conv4(1, out=5, width=8, pool="stride")
    for form in FORMS:
        learner = PGN(net, form=form, hidden=8)
        assert learner.sent == costs(net, form, q=8)[1]
        if form in ("full", "chunks"):
            assert learner.sent == parameter_count(net)
        else:
            assert learner.sent < parameter_count(net) / 2


@pytest.mark.proves("eq-pgn-refine")
def test_refinement():
    one_wave, small_pgn = cell_900723c5()
    # cell 1968ff04
    wave = one_wave()
    learner = small_pgn(steps=2, lr=0.05).double()
    names = [k for k, _ in learner.net.named_parameters()]
    phi = list(learner.generate(wave.support).values())
    for _ in range(2):
        error = (
            call(learner.net, dict(zip(names, phi, strict=True)), wave.support.x) - wave.support.y
        )
        gradients = torch.autograd.grad(error.square().mean(), phi, create_graph=True)
        phi = [p - 0.05 * g for p, g in zip(phi, gradients, strict=True)]
    found, _ = learner.adapt(wave.support)
    torch.testing.assert_close(list(found.values()), phi)


@pytest.mark.proves("eq-pgn-objective")
def test_objectives():
    one_wave, small_pgn = cell_900723c5()
    # cell b8f666b8
    wave = one_wave()
    along = []
    for steps in range(4):  # the query loss after 0, 1, 2, 3 steps
        along.append(small_pgn(steps=steps, lr=0.05).double().loss(wave))
    torch.testing.assert_close(
        small_pgn(steps=3, lr=0.05, loss_steps="last").double().loss(wave), along[3]
    )
    everywhere = small_pgn(steps=3, lr=0.05, loss_steps="all").double()
    torch.testing.assert_close(everywhere.loss(wave), torch.stack(along).mean())
    assert len({round(loss.item(), 6) for loss in along}) == 4


def test_every_point_is_judged_by_the_support_sets_statistics():
    # cell 45541b6c
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 16, 16), F.one_hot(torch.tensor([0, 1, 2, 0] * 2), 3).float()
    episode = Episode(Examples(images[:4], labels[:4]), Examples(images[4:], labels[4:]))
    net = Conv4(1, out=3, size=16, width=4, pool="stride", stats="support")
    learner = PGN(net, hidden=8)
    last = learner.loss(episode)
    learner.loss_steps = "all"  # without steps there is one point only, the last
    torch.testing.assert_close(learner.loss(episode), last)


@pytest.mark.proves("eq-pgn-maml")
def test_blind_it_is_maml():
    one_wave, small_pgn = cell_900723c5()
    # cell 3420604a
    wave, options = one_wave(), dict(lr=0.05, steps=2, kind="regression")

    def same(learner, maml):
        "Equal predictions, equal meta-gradients."
        torch.testing.assert_close(learner(*wave[:1], wave.query.x), maml(*wave[:1], wave.query.x))
        ours = torch.autograd.grad(learner.loss(wave), list(learner.net.parameters()))
        theirs = torch.autograd.grad(maml.loss(wave), list(maml.net.parameters()))
        torch.testing.assert_close(ours, theirs)

    for form in ("full", "chunks", "lowrank"):  # a constant description
        learner = small_pgn(form=form, lr=0.05, steps=2).double()
        with torch.no_grad():
            learner.read.layers[0].weight.zero_()
            start = MLP([1, 12, 1]).double()
            start.load_state_dict(learner.generate(wave.support))
        same(learner, MAML(start, **options))

    for form in FORMS:  # nothing written at all
        learner = small_pgn(form=form, lr=0.05, steps=2).double()
        with torch.no_grad():
            for p in learner.writers.parameters():
                p.zero_()
        same(learner, MAML(copy.deepcopy(learner.net), **options))


def test_without_steps_it_is_a_hypernetwork():
    one_wave, small_pgn = cell_900723c5()
    # cell 91ae3904
    wave, other = one_wave(seed=0), one_wave(seed=1)
    told = small_pgn(description="task", task_size=2).double()
    swapped = other.support._replace(info=wave.support.info)  # other points, the same description
    torch.testing.assert_close(told.generate(wave.support), told.generate(swapped))
    renamed = wave.support._replace(info=other.support.info)  # the same points, another description
    assert not torch.allclose(*(told(s, wave.query.x) for s in (wave.support, renamed)))
    nothing = wave.support._replace(x=wave.support.x[:0], y=wave.support.y[:0])
    torch.testing.assert_close(told(nothing, wave.query.x), told(wave.support, wave.query.x))
    reads = small_pgn(description="both", task_size=2).double()
    assert not torch.allclose(*(reads(s, wave.query.x) for s in (wave.support, swapped)))

    def refuses(learner):
        "Does it say that it needs a support set?"
        with pytest.raises(ValueError, match="support set is empty"):
            learner(nothing, wave.query.x)
        return True

    assert refuses(reads)
    assert refuses(small_pgn(description="task", task_size=2, steps=1).double())
    assert refuses(small_pgn(description="task", task_size=2, test_steps=1).double())
    images = Conv4(1, out=1, size=16, width=4, stats="support")  # its layers read the support set
    assert PGN(images, "task", 2).needs_support


def test_errors_say_what_to_do():
    one_wave, small_pgn = cell_900723c5()
    # cell de49674b
    wave = one_wave()
    with pytest.raises(ValueError, match="unknown form 'ful': did you mean 'full'"):
        small_pgn(form="ful")
    with pytest.raises(ValueError, match="unknown description 'tasks': did you mean 'task'"):
        small_pgn(description="tasks")
    with pytest.raises(ValueError, match="unknown loss_steps 'first'"):
        small_pgn(loss_steps="first")
    with pytest.raises(ValueError, match="task_size=0, expected an integer"):
        small_pgn(description="task")
    for gain in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"gain={gain}, expected a finite number"):
            small_pgn(gain=gain)
    told = small_pgn(description="task", task_size=2).double()
    with pytest.raises(ValueError, match="found no such entry, expected"):
        told(wave.support._replace(info={}), wave.query.x)
    with pytest.raises(ValueError, match=r"found shape \(1,\)"):
        told(wave.support._replace(info={"task": torch.ones(1).double()}), wave.query.x)
    misfits = {
        "a list": [1.0, 2.0],
        r"shape \(2,\), torch.float32 on cpu": torch.ones(2),
        r"shape \(2,\), torch.int64 on cpu": torch.ones(2).long(),
    }
    for found, task in misfits.items():
        with pytest.raises(ValueError, match=f"found {found}, expected a tensor of shape"):
            told(wave.support._replace(info={"task": task}), wave.query.x)
    two = Examples(wave.support.x, wave.support.y.repeat(1, 2))
    with pytest.raises(ValueError, match="gives 1 outputs, but the task's way"):
        small_pgn().double()(two, wave.query.x)


def test_keeps_the_contract():
    one_wave, small_pgn = cell_900723c5()
    # cell f7c3d37f
    every_step = small_pgn(
        description="both", task_size=2, form="lowrank", steps=2, loss_steps="all"
    )
    check_learner(every_step, Sinusoids(5, 4))
    noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    shapes = FewShot(Classes(noise, torch.full((8,), 5)), way=3, shot=2, query=2)
    net = Conv4(1, out=3, size=16, width=4, pool="stride", stats="support")
    check_learner(PGN(net, form="film", hidden=8), shapes)


def test_what_a_description_is_worth():
    # cell cb12ae82
    draw = torch.Generator().manual_seed(0)
    d, eps, other, luck, noise = torch.randn(5, 100_000, generator=draw).double()
    nu, best = 3.0, 3.0 * d + eps  # theta* with mu = 0 and sigma_d^2 = 1

    def cost(phi):
        "The expected loss."
        return (phi - best).square().mean().item() / 2

    assert cost(nu * d) == pytest.approx(0.5, rel=0.03) and cost(0) == pytest.approx(5, rel=0.03)
    y_mean = best + noise  # sigma^2 / n = 1
    for start, variance in ((nu * d, 1.0), (0 * d, 10.0)):
        rates = torch.linspace(0, 1, 51).tolist()
        found = [cost((1 - a) * start + a * y_mean) for a in rates]
        assert rates[found.index(min(found))] == pytest.approx(variance / (variance + 1), abs=0.03)
        assert 2 * min(found) == pytest.approx(variance / (variance + 1), rel=0.03)
        end = start
        for _ in range(20):
            end = end - 0.5 * (end - y_mean)
        assert 2 * cost(end) == pytest.approx(1, rel=0.03)  # the start is forgotten
    assert 2 * cost(nu * d / 11 + y_mean * 10 / 11) == pytest.approx(101 / 121, rel=0.03)

    assert cost(nu * other) == pytest.approx(9.5, rel=0.03)  # a wrong description
    told = torch.where(luck > 1.2815515, other, d)  # a tenth of them
    G_fitted = (told @ best / (told @ told)).item()
    assert G_fitted == pytest.approx(0.9 * nu, abs=0.02)
    assert cost(G_fitted * told) == pytest.approx(1.355, rel=0.03)
    assert cost(nu * told) == pytest.approx(1.4, rel=0.03)
    unsure = d + 0.5 * other  # noise of variance 1/4 on the description
    assert (unsure @ best / (unsure @ unsure)).item() == pytest.approx(nu / 1.25, abs=0.02)
    many = 10 / 11 * (best + noise / 1e4)  # trained for n = 5, used with very many
    assert 2 * cost(many) == pytest.approx(10 / 121, rel=0.03)


def test_far_out_one_network_is_written():
    one_wave, small_pgn = cell_900723c5()
    # cell a5169589
    told = small_pgn(description="task", task_size=2).double()

    def far(distance):
        "What is written for a description so far out."
        task = distance * torch.tensor([0.6, -0.8], dtype=torch.float64)
        return told.generate(one_wave().support._replace(info={"task": task}))["layers.0.weight"]

    assert (far(10.0) - far(1e6)).abs().max() > 0.01
    torch.testing.assert_close(far(1e6), far(1e8), atol=1e-5, rtol=1e-4)


@pytest.mark.proves("eq-pgn-cost")
def test_cost():
    # cell cf38cd51
    def products(learner, tasks=8):
        "Products that adapting to a sinusoid takes, in matrix products and convolutions."
        support = Sinusoids(5, 1).sample(tasks).support
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            over_tasks(lambda s: learner.adapt(s)[0], support)
        return counter.get_total_flops() // (2 * tasks)  # one product, one sum

    # cell 43b0f7f8
    n, N, q, sizes = 5, 1, 64, [1, 40, 40, 1]
    learner, t = PGN(MLP(sizes), kind="regression").eval(), 3
    weights = [i * o for i, o in pairwise(sizes)]
    u, read = (1 + N) * q + q * q, 2 * q * q + q * q
    assert products(learner) == n * (u + N * q) + (1 + N) * read + q * parameter_count(learner.net)
    steps = products(MAML(MLP(sizes), steps=t, kind="regression"))
    assert steps == t * n * (3 * sum(weights) - weights[0])


def test_a_reader_that_knows_the_order():
    # cell f36f8f21
    class InOrder(SetEncoder):
        "The mistake: later examples count more."

        def forward(self, x, y):
            place = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None] / len(x)
            e = F.relu(self.pair(torch.cat([x * place, y], 1)))
            return torch.cat([e.mean(0, keepdim=True), y.T @ e / len(x)])

    def moved_by_order(encoder):
        "How far the answers of a learner move when its support set is turned round."
        torch.manual_seed(0)
        learner, wave = PGN(MLP([1, 12, 1]), hidden=8, kind="regression"), Sinusoids(5, 9).sample(1)
        learner.encoder = encoder(learner.net, hidden=8)
        support, x = Examples(wave.support.x[0], wave.support.y[0]), wave.query.x[0]
        turned = support._replace(x=support.x.flip(0), y=support.y.flip(0))
        return (learner(turned, x) - learner(support, x)).abs().max().item()

    print(f"in order {moved_by_order(InOrder):.2g}, a set {moved_by_order(SetEncoder):.2g}")
    assert moved_by_order(InOrder) > 1e-3
    assert moved_by_order(SetEncoder) < 1e-5


def test_the_generator_that_is_ignored():
    one_wave, small_pgn = cell_900723c5()
    gradient_norms = cell_65f178c4(one_wave, small_pgn)


def test_a_cut_graph_trains_nothing():
    one_wave, small_pgn = cell_900723c5()
    gradient_norms = cell_65f178c4(one_wave, small_pgn)

    # cell 62062902
    class Cut(PGN):
        "The mistake: what is written is detached before the inner loop."

        def start(self, support):
            return {k: p.detach().requires_grad_() for k, p in self.generate(support).items()}

    def one_step(kind):
        torch.manual_seed(0)
        options = dict(description="task", task_size=2, hidden=8, steps=1, kind="regression")
        return kind(MLP([1, 12, 1]), **options).double()

    assert gradient_norms(one_step(Cut)) == [0, 0, 0]
    assert min(gradient_norms(one_step(PGN))) > 0  # the repair: leave the graph whole
    torch.testing.assert_close(one_step(Cut).loss(one_wave()), one_step(PGN).loss(one_wave()))


def test_the_usual_rule_in_a_learner():
    # cell f3b9f00e
    def first_answers(usual):
        "The root mean square of the answers before any training."
        torch.manual_seed(0)
        learner = PGN(MLP([1, 64, 64, 64, 64, 1]), gain=2.0, kind="regression")
        if usual:  # the mistake: He's rule
            for write, p in zip(learner.writers, learner.net.parameters(), strict=True):
                with torch.no_grad():
                    write.G *= math.sqrt(p[0].numel()) if p.ndim > 1 else 1.0
        support = Sinusoids(5, 1).sample(1, torch.Generator().manual_seed(0)).support
        x = torch.linspace(-5, 5, 50)[:, None]
        return learner(Examples(support.x[0], support.y[0]), x).square().mean().sqrt().item()

    print(f"usual rule: {first_answers(True):.3g}, rule for generators: {first_answers(False):.3g}")
    assert first_answers(True) > 1000
    assert first_answers(False) < 20


def test_scale_before_normalisation_is_wasted():
    # cell 254f0624
    torch.manual_seed(0)
    net = Conv4(1, out=3, size=16, width=8, pool="stride", stats="batch").double()
    phi, images = dict(net.named_parameters()), torch.randn(9, 1, 16, 16).double()
    plain = call(net, phi, images)

    factor = torch.linspace(0.5, 2, 8).double()

    def changed_by(name):
        "What a factor for each channel does to the answers; for a bias, a shift by as much."
        p = phi[name]
        other = p + factor if name.endswith("bias") else p * factor.view(-1, *[1] * (p.ndim - 1))
        return (call(net, phi | {name: other}, images) - plain).abs().max().item()

    assert changed_by("convs.1.weight") < 1e-3  # a factor on every filter
    assert changed_by("convs.1.bias") < 1e-3
    assert changed_by("norms.1.weight") > 0.01  # the repair: scale and shift what is normalised
    assert changed_by("norms.1.bias") > 0.01


def test_classes_have_their_own_rows():
    # cell 692156bc
    torch.manual_seed(0)
    learner = PGN(MLP([4, 8, 3]), hidden=16).double()
    with torch.no_grad():
        learner.encoder.pair.layers[0].weight[:, 4:] = 0  # the encoder looks at x only
    support = Examples(torch.randn(6, 4).double(), torch.eye(3).double().repeat(2, 1))
    order = torch.tensor([1, 2, 0])  # no class keeps its place
    start = dict(learner.net.named_parameters())
    written = learner.generate(support)
    renamed = learner.generate(support._replace(y=support.y[:, order]))
    head = written["layers.1.weight"] - start["layers.1.weight"]
    assert (head[0] - head[1]).abs().max() > 0.01  # each class has its own
    torch.testing.assert_close(renamed["layers.1.weight"] - start["layers.1.weight"], head[order])
    torch.testing.assert_close(renamed["layers.0.weight"], written["layers.0.weight"])

    mixed = learner.describe(support)  # the mistake: every row reads the whole
    mixed[:, 16:] = 0
    h = unit_scale(F.relu(learner.read(mixed)))[1:]
    assert torch.allclose(h[0], h[1])  # no class can be told from another
