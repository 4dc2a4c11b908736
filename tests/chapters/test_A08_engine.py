"""Made from nbs/A08_engine.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import itertools

import pytest
import torch

from metabook import engine
from metabook.classes import Classes
from metabook.engine import (
    Way,
    choose_lift,
    evenly,
    grade,
    gradients,
    in_flight,
    in_parts,
    losses,
    over_tasks,
)
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, one_hot
from metabook.kernels import precise
from metabook.maml import MAML
from metabook.networks import MLP, BatchNorm, Conv4
from metabook.prototypes import ProtoNet
from metabook.scores import evaluate
from metabook.structures import tree_map


def cell_aab042d7():
    # cell aab042d7
    class Normalised(torch.nn.Sequential):
        "A network whose only layer with statistics sees its inputs as they are."

        def __init__(self):
            super().__init__(BatchNorm(2, stats="running", momentum=0.25))

    points = Classes.of({str(i): i + torch.randn(6, 2) for i in range(4)})
    episodes = FewShot(points, 3, 1, 2).sample(5, torch.Generator().manual_seed(0))
    # A layer that is used twice notes the later use: here the query set.
    mean = episodes.query.x.mean((0, 1))
    var = episodes.query.x.var(1, correction=0).mean(0)
    for lift in ("loop", "vmap"):
        learner = ProtoNet(Normalised()).train()
        losses(learner, episodes, lift)
        layer = learner.embed[0]
        torch.testing.assert_close(layer.mean, 0.75 * torch.zeros(2) + 0.25 * mean)
        torch.testing.assert_close(layer.var, 0.75 * torch.ones(2) + 0.25 * var)
    return Normalised, episodes


def cell_d3840484():
    # cell d3840484
    def peak(f):
        "The most bytes that a call held at once on the CPU, beyond what was there before."
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            f()
        events = profiler.profiler.kineto_results.events()
        sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        return max(itertools.accumulate(size for _, size in sorted(sizes)))

    return peak


def cell_8cef15e5():
    # cell 8cef15e5
    def refusal(f, *batch):
        "What vmap says about a function; nothing where it lifts."
        try:
            over_tasks(f, *batch, lift="vmap")
        except (RuntimeError, ValueError) as error:
            return str(error).splitlines()[0]
        return ""

    x = torch.tensor([[1.0, -2.0, 3.0], [-1.0, -2.0, 1.0]])  # two tasks of three numbers
    return refusal, x


@pytest.mark.proves("eq-lift")
def test_a_lift_gives_what_single_calls_give():
    # cell f5f68d65
    def spread(examples):
        "The span of the targets, and how they move when x does."
        y = examples.y - examples.y.mean(0)
        slope = (examples.x * y).sum() / examples.x.square().sum()
        return {"span": examples.y.amax(0) - examples.y.amin(0), "slope": slope}

    batch = Sinusoids(5, 10).sample(4, torch.Generator().manual_seed(0)).support
    singles = [spread(Examples(batch.x[i], batch.y[i])) for i in range(4)]
    for lift in ("loop", "vmap"):
        found = over_tasks(spread, batch, lift=lift)
        for i, single in enumerate(singles):
            torch.testing.assert_close(found["span"][i], single["span"])
            torch.testing.assert_close(found["slope"][i], single["slope"])
    {name: tuple(t.shape) for name, t in found.items()}


@pytest.mark.proves("eq-lift-gradient")
def test_gradients_go_through_the_lift():
    # cell c92f9a88
    learner = MAML(MLP([1, 8, 1]), lr=0.05, steps=2, kind="regression").double()
    episodes = Sinusoids(5, 10).sample(3, torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    parameters, weights = list(learner.parameters()), torch.tensor([1.0, -2.0, 0.5]).double()

    one_by_one = [torch.zeros_like(p) for p in parameters]
    for i, w in enumerate(weights):
        loss = learner.loss(Episode(*(Examples(side.x[i], side.y[i]) for side in episodes)))
        for total, g in zip(one_by_one, torch.autograd.grad(loss, parameters), strict=True):
            total += w * g
    for lift in ("loop", "vmap"):
        values = over_tasks(learner.loss, episodes, lift=lift)
        lifted = torch.autograd.grad((weights * values).sum(), parameters)
        torch.testing.assert_close(list(lifted), one_by_one, rtol=1e-10, atol=1e-14)


def test_the_engine_chooses_by_size_and_device():
    # cell d492554d
    def batch_of(tasks, query):
        classes = Classes.of({str(i): torch.zeros(query + 1, 1, 28, 28) for i in range(5)})
        return [side.x for side in FewShot(classes, 5, 1, query).sample(tasks)]

    network = Conv4(width=64, pool="stride")
    # 4 tasks of 5 (1 + 15) images: 28 x 28 pixels, 64 filters, every second pixel both ways
    assert in_flight(network, *batch_of(4, 15)) == 4 * 80 * 64 * 14 * 14
    pooled = Conv4(width=64)  # every pixel, then the largest of each four
    assert in_flight(pooled, *batch_of(4, 15)) == in_flight(network, *batch_of(4, 15))
    assert choose_lift(network, "auto", *batch_of(4, 10)) == "vmap"
    assert choose_lift(network, "auto", *batch_of(16, 15)) == "loop"
    assert (
        choose_lift(network, "auto", *batch_of(3, 10)) == "loop"
    )  # few and large: nothing to save
    assert choose_lift(network, "auto", *batch_of(3, 1)) == "vmap"
    assert [evenly(32, most) for most in (40, 32, 25, 15, 1)] == [32, 32, 16, 11, 1]
    assert choose_lift(network, "vmap", *batch_of(16, 15)) == "vmap"
    assert choose_lift(network, "loop") == "loop" and choose_lift(network, "vmap") == "vmap"
    assert (
        choose_lift(network, "auto") == "loop"
    )  # without a batch to look at, it expects a large one
    assert choose_lift(MLP([784, 5]), "auto", *batch_of(16, 15)) == "vmap"
    assert choose_lift(network.to("meta"), "auto", *batch_of(16, 15)) == "vmap"  # not a CPU


@pytest.mark.proves("eq-running-statistics")
def test_running_statistics_are_a_mean_over_tasks():
    Normalised, episodes = cell_aab042d7()


def test_answers_are_overheard():
    Normalised, episodes = cell_aab042d7()
    # cell b0e10e52
    learner = ProtoNet(Normalised()).eval()
    expected = over_tasks(learner, episodes.support, episodes.query.x)
    for lift in ("loop", "vmap"):
        values, heard, *_ = grade(learner, episodes, Way(lift))
        torch.testing.assert_close(heard, expected.detach())
        torch.testing.assert_close(values, losses(learner, episodes, lift))
        assert values.requires_grad and not heard.requires_grad
        whole = engine._as_a_whole(learner, episodes, Way(lift))
        torch.testing.assert_close(whole.answers, heard)
        torch.testing.assert_close(whole.losses, values)
    learner.loss = lambda episode: learner.predict(
        learner.adapt(episode.support), episode.query.x
    ).sum()
    assert not in_parts(learner)
    assert grade(learner, episodes, Way("vmap")).answers is None  # nobody called forward
    heard = grade(learner, episodes, Way("vmap", answers=True)).answers  # but somebody asks
    torch.testing.assert_close(heard, expected.detach())


@pytest.mark.proves("eq-task-weights")
def test_weights_of_tasks():
    # cell 542b7e73
    class Worst(MAML):
        "Cares most for the task that went worst."

        def combine(self, losses):
            return losses.logsumexp(0)

    def gradient(learner, **how):
        learner.zero_grad()
        graded = gradients(learner, episodes, **how)
        assert not graded.losses.requires_grad and graded.answers.shape[:2] == (5, 6)
        return [p.grad.clone() for p in learner.parameters()]

    images = Classes.of({str(i): torch.rand(6, 1, 28, 28) for i in range(4)})
    torch.manual_seed(0)
    episodes = (
        FewShot(images, 3, 1, 2).sample(5, torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    )
    for kind in (MAML, Worst):
        learner = kind(Conv4(out=3, width=4, pool="stride"), steps=2).double()
        learner.zero_grad()
        values = torch.stack(
            [learner.loss(tree_map(lambda t, i=i: t[i], episodes)) for i in range(5)]
        )
        learner.combine(values).backward()
        wanted = [p.grad.clone() for p in learner.parameters()]
        for how in (
            dict(lift="loop"),
            dict(lift="vmap"),
            dict(lift="auto", chunk=2),
            dict(chunk=1),
        ):
            torch.testing.assert_close(gradient(learner, **how), wanted, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="chunk=0"):
        gradients(learner, episodes, chunk=0)


def test_surrogates_are_differentiated():
    # cell b0e10e53
    class Halved(ProtoNet):
        "Differentiates half of its criterion, and no more."

        approximate = True

        def loss(self, episode):
            return super().loss(episode) / 2

    y = one_hot(torch.arange(4) % 2, 2).expand(3, -1, -1)
    episodes = Episode(*(Examples(torch.randn(3, 4, 2), y) for _ in range(2)))
    learner = Halved(MLP([2, 5]))
    whole = ProtoNet(learner.embed)
    for lift in ("loop", "vmap"):
        found, expected = (grade(m, episodes, Way(lift)) for m in (learner, whole))
        torch.testing.assert_close(found.losses, expected.losses.detach())
        torch.testing.assert_close(found.differentiated, expected.losses / 2)
        for m, factor in ((learner, 2), (whole, 1)):
            m.zero_grad()
            m.combine = lambda values: values.square().mean()  # weighs by the criterion
            gradients(m, episodes, lift=lift)
            slopes = [factor * p.grad for p in m.parameters() if p.grad is not None]
            if m is learner:
                mine = slopes
        torch.testing.assert_close(mine, slopes)
    learner.approximate = False
    assert grade(learner, episodes, Way("vmap")).surrogates is None


def test_chunks_change_nothing():
    # cell e8fe771f
    class OwnLoss(ProtoNet):
        "Its loss is not only that of its predictions."

        def loss(self, episode):
            return super().loss(episode) + 0.1 * self.embed(episode.support.x).square().mean()

    class Tempered(ProtoNet):
        "Learns how to combine."

        def __init__(self, embed):
            super().__init__(embed)
            self.heat = torch.nn.Parameter(torch.tensor(0.5))

        def combine(self, losses):
            return (losses / self.heat).logsumexp(0) * self.heat

    class Centred(ProtoNet):
        "Normalises only what it adapts to, so nothing later covers up what was seen there."

        def predict(self, state, x):
            return -torch.cdist(x, state[0])

    points = Classes.of({str(i): i + torch.randn(6, 2) for i in range(4)})
    episodes = FewShot(points, 3, 1, 2).sample(5, torch.Generator().manual_seed(0))
    for kind in (OwnLoss, Tempered, Centred):
        found = []
        for how in (
            dict(lift="vmap"),
            dict(lift="loop"),
            dict(lift="vmap", chunk=2),
            dict(lift="loop", chunk=2),
        ):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(2, 2), BatchNorm(2, stats="running"))
            learner = kind(net).train()
            graded = gradients(learner, episodes, **how)
            found.append([p.grad for p in learner.parameters()] + [net[1].mean, net[1].var])
            assert (
                torch.equal(graded.losses, graded.losses.detach()) and net[1].mean.abs().min() > 0
            )
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


def test_recomputing_saves_memory():
    peak = cell_d3840484()

    # cell f96b8c88
    class LearnedRate(MAML):
        "A rate that is learned: a parameter that a step uses without being given it."

        def __init__(self, net, steps):
            super().__init__(net, steps=steps)
            self.lr = torch.nn.Parameter(torch.tensor(0.1))

    def many_steps(steps, recompute, lift="vmap"):
        torch.manual_seed(0)
        learner = LearnedRate(MLP([49, 40, 40, 3]), steps)
        learner.train().double()
        gradients(learner, episodes, lift=lift, recompute=recompute)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]

    images = Classes.of({str(i): torch.rand(60, 49) for i in range(4)})
    episodes = FewShot(images, 3, 50, 2).sample(4, torch.Generator().manual_seed(0))
    episodes = episodes.to(dtype=torch.float64)
    for lift in ("vmap", "loop"):
        found, wanted = (many_steps(3, recompute, lift) for recompute in (True, False))
        assert found[0].abs().sum() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
    held = {(n, r): peak(lambda n=n, r=r: many_steps(n, r)) for n in (5, 20) for r in (False, True)}
    for (steps, recompute), size in held.items():
        print(f"{steps:2d} steps, recompute={recompute!s:5}: {size / 2**20:6.1f} MiB")
    assert held[20, True] < 2 * held[5, True] and held[20, False] > 3 * held[5, False]
    with pytest.raises(ValueError, match="ProtoNet has no inner `step` to compute again"):
        gradients(ProtoNet(MLP([49, 8])), episodes.to(dtype=torch.float32), recompute=True)


def test_recomputing_keeps_the_precision():
    # cell 103ea513
    def in_bfloat16(recompute, lift, pool):
        torch.manual_seed(0)
        learner = MAML(Conv4(out=3, size=16, width=8, pool=pool), steps=2)
        with precise("bfloat16"):
            gradients(learner, small, lift=lift, recompute=recompute)
        return torch.cat([p.grad.flatten() for p in learner.parameters()])

    drawings = Classes.of({str(i): torch.rand(6, 1, 16, 16) for i in range(4)})
    small = FewShot(drawings, 3, 1, 2).sample(2, torch.Generator().manual_seed(0))
    for way, pool in itertools.product(("vmap", "loop"), ("max", "stride")):
        again, kept = (in_bfloat16(recompute, way, pool) for recompute in (True, False))
        assert (again - kept).norm() < 1e-3 * kept.norm()


def test_no_graph_without_need():
    peak = cell_d3840484()

    # cell f96b8c88
    class LearnedRate(MAML):
        "A rate that is learned: a parameter that a step uses without being given it."

        def __init__(self, net, steps):
            super().__init__(net, steps=steps)
            self.lr = torch.nn.Parameter(torch.tensor(0.1))

    def many_steps(steps, recompute, lift="vmap"):
        torch.manual_seed(0)
        learner = LearnedRate(MLP([49, 40, 40, 3]), steps)
        learner.train().double()
        gradients(learner, episodes, lift=lift, recompute=recompute)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]

    images = Classes.of({str(i): torch.rand(60, 49) for i in range(4)})
    episodes = FewShot(images, 3, 50, 2).sample(4, torch.Generator().manual_seed(0))
    episodes = episodes.to(dtype=torch.float64)
    for lift in ("vmap", "loop"):
        found, wanted = (many_steps(3, recompute, lift) for recompute in (True, False))
        assert found[0].abs().sum() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
    held = {(n, r): peak(lambda n=n, r=r: many_steps(n, r)) for n in (5, 20) for r in (False, True)}
    for (steps, recompute), size in held.items():
        print(f"{steps:2d} steps, recompute={recompute!s:5}: {size / 2**20:6.1f} MiB")
    assert held[20, True] < 2 * held[5, True] and held[20, False] > 3 * held[5, False]
    with pytest.raises(ValueError, match="ProtoNet has no inner `step` to compute again"):
        gradients(ProtoNet(MLP([49, 8])), episodes.to(dtype=torch.float32), recompute=True)

    # cell 7d42c4c4
    def first_order(steps):
        net = MLP([49, 40, 40, 3]).double()
        gradients(MAML(net, steps=steps, first_order=True), episodes, lift="vmap")

    few, many = peak(lambda: first_order(5)), peak(lambda: first_order(20))
    print(f"first order: {few / 2**20:.1f} MiB for 5 steps, {many / 2**20:.1f} for 20")
    assert many < 1.1 * few
    learner = MAML(MLP([49, 40, 40, 3]), steps=2).eval()
    frozen = [FewShot(images, 3, 50, 2).freeze(n) for n in (64, 640)]  # indices, of all tasks
    few, many = (peak(lambda tasks=tasks: evaluate(learner, tasks)) for tasks in frozen)
    print(f"evaluation: {few / 2**20:.1f} MiB for 64 tasks, {many / 2**20:.1f} for 640")
    assert many < 1.1 * few


def test_values_do_not_decide():
    refusal, x = cell_8cef15e5()

    # cell e21e64f5
    def branch(x):
        return x if x.mean() > 0 else -x

    def select(x):
        return torch.where(x.mean() > 0, x, -x)

    assert "data-dependent control flow" in refusal(branch, x)
    assert not refusal(select, x)
    torch.testing.assert_close(over_tasks(select, x), over_tasks(branch, x, lift="loop"))


def test_sizes_come_from_shapes():
    refusal, x = cell_8cef15e5()

    # cell ffcdb7a0
    def positive_mean(x):
        return x[x > 0].mean()

    def weighted_mean(x):
        mask = (x > 0).to(x)
        return (mask * x).sum() / mask.sum()

    print(refusal(positive_mean, x))
    assert refusal(positive_mean, x)
    torch.testing.assert_close(
        over_tasks(weighted_mean, x), over_tasks(positive_mean, x, lift="loop")
    )


def test_nothing_is_drawn_inside():
    refusal, x = cell_8cef15e5()

    # cell f515edb5
    def noisy(x):
        return x + torch.randn(3)

    def noised(x, noise):
        return x + noise

    noise = torch.randn(2, 3)
    assert "randomness" in refusal(noisy, x)
    torch.testing.assert_close(
        over_tasks(noised, x, noise), over_tasks(noised, x, noise, lift="loop"), rtol=0, atol=0
    )


def test_shapes_are_checked_before_the_lift():
    # cell 38d62f90
    episodes = Sinusoids(5, 10).sample(3)
    support = episodes.support._replace(y=episodes.support.y[:, 1:])
    try:
        losses(MAML(MLP([1, 8, 1]), kind="regression"), Episode(support, episodes.query), "vmap")
    except ValueError as error:
        message = str(error)
    assert "support.x has shape (5, 1) and support.y (4, 1)" in message
    message
