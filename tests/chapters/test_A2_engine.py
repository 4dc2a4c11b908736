"""Made from nbs/A2_engine.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import pytest
import torch

from metabook.engine import choose_lift, graded, in_flight, losses, over_tasks
from metabook.episodes import Classes, Episode, Examples, FewShot, Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP, BatchNorm, Conv4
from metabook.prototypes import ProtoNet


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
        return FewShot(classes, 5, 1, query).sample(tasks)

    network = Conv4(width=64, pool="stride")
    # 4 tasks of 5 (1 + 15) images: 28 x 28 pixels, 64 filters, every second pixel both ways
    assert in_flight(network, batch_of(4, 15)) == 4 * 80 * 64 * 14 * 14
    assert choose_lift(network, "auto", batch_of(4, 15)) == "vmap"
    assert choose_lift(network, "auto", batch_of(16, 15)) == "loop"
    assert choose_lift(network, "vmap", batch_of(16, 15)) == "vmap"
    assert choose_lift(network) == "loop"  # without a batch to look at, it expects a large one
    assert choose_lift(MLP([784, 5]), "auto", batch_of(16, 15)) == "vmap"
    assert choose_lift(network.to("meta"), "auto", batch_of(16, 15)) == "vmap"  # not a CPU


@pytest.mark.proves("eq-running-statistics")
def test_running_statistics_are_a_mean_over_tasks():
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


def test_answers_are_overheard():
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
    # cell b0e10e52
    learner = ProtoNet(Normalised()).eval()
    expected = over_tasks(learner, episodes.support, episodes.query.x)
    for lift in ("loop", "vmap"):
        values, heard = graded(learner, episodes, lift)
        torch.testing.assert_close(heard, expected.detach())
        torch.testing.assert_close(values, losses(learner, episodes, lift))
        assert values.requires_grad and not heard.requires_grad
    learner.loss = lambda episode: learner.predict(
        learner.adapt(episode.support), episode.query.x
    ).sum()
    assert graded(learner, episodes, "vmap")[1] is None  # nobody called forward


def test_values_do_not_decide():
    # cell 8cef15e5
    def refusal(f, *batch):
        "What vmap says about a function; nothing where it lifts."
        try:
            over_tasks(f, *batch, lift="vmap")
        except (RuntimeError, ValueError) as error:
            return str(error).splitlines()[0]
        return ""

    x = torch.tensor([[1.0, -2.0, 3.0], [-1.0, -2.0, 1.0]])  # two tasks of three numbers

    # cell e21e64f5
    def branch(x):
        return x if x.mean() > 0 else -x

    def select(x):
        return torch.where(x.mean() > 0, x, -x)

    assert "data-dependent control flow" in refusal(branch, x)
    assert not refusal(select, x)
    torch.testing.assert_close(over_tasks(select, x), over_tasks(branch, x, lift="loop"))


def test_sizes_come_from_shapes():
    # cell 8cef15e5
    def refusal(f, *batch):
        "What vmap says about a function; nothing where it lifts."
        try:
            over_tasks(f, *batch, lift="vmap")
        except (RuntimeError, ValueError) as error:
            return str(error).splitlines()[0]
        return ""

    x = torch.tensor([[1.0, -2.0, 3.0], [-1.0, -2.0, 1.0]])  # two tasks of three numbers

    # cell e21e64f5
    def branch(x):
        return x if x.mean() > 0 else -x

    def select(x):
        return torch.where(x.mean() > 0, x, -x)

    assert "data-dependent control flow" in refusal(branch, x)
    assert not refusal(select, x)
    torch.testing.assert_close(over_tasks(select, x), over_tasks(branch, x, lift="loop"))

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
    # cell 8cef15e5
    def refusal(f, *batch):
        "What vmap says about a function; nothing where it lifts."
        try:
            over_tasks(f, *batch, lift="vmap")
        except (RuntimeError, ValueError) as error:
            return str(error).splitlines()[0]
        return ""

    x = torch.tensor([[1.0, -2.0, 3.0], [-1.0, -2.0, 1.0]])  # two tasks of three numbers

    # cell e21e64f5
    def branch(x):
        return x if x.mean() > 0 else -x

    def select(x):
        return torch.where(x.mean() > 0, x, -x)

    assert "data-dependent control flow" in refusal(branch, x)
    assert not refusal(select, x)
    torch.testing.assert_close(over_tasks(select, x), over_tasks(branch, x, lift="loop"))

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
    assert "support.x has shape (3, 5, 1) and support.y (3, 4, 1)" in message
    message
