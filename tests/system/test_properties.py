"""What holds for every task and every learner, tried on many that a program chose.

Continuous integration tries the same few each time.  To search longer, and elsewhere at each run:
HYPOTHESIS_PROFILE=long pytest tests/system/test_properties.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from metabook.classes import Classes
from metabook.engine import answer, gradients, losses, over_tasks
from metabook.episodes import (
    Episode,
    Examples,
    FewShot,
    Frozen,
    Sinusoids,
    Tasks,
    VariedWayShot,
)
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.meta_transfer import HardTasks
from metabook.networks import MLP, Conv4
from metabook.prototypes import DISTANCES, ProtoNet
from metabook.structures import count, tree_leaves, tree_map
from metabook.training import Report

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

seeds = st.integers(0, 2**63 - 1)
few = st.integers(1, 4)

# The checker of signatures draws which entries of a list it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def generator(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def equal(a: Any, b: Any) -> bool:
    """Are two structures of tensors the same, bit by bit?"""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# --- data and tasks: every example holds its own row number, so that an episode tells what it is made of


@st.composite
def classes(draw: st.DrawFn, smallest: int = 1) -> Classes:
    """Classes of uneven sizes, as bytes or as floats, with a cut or without.

    Of two examples or more of each class a task can be made: then a cut leaves some on both sides.
    """
    sizes = torch.tensor(draw(st.lists(st.integers(smallest, 9), min_size=1, max_size=6)))
    x = torch.arange(int(sizes.sum()))
    images = draw(st.booleans())
    x = x.byte()[:, None, None, None] if images else x[:, None].float()
    cut = None
    if draw(st.booleans()):
        least = min(smallest - 1, 1)
        cut = torch.tensor([draw(st.integers(least, n - least)) for n in sizes.tolist()])
    names = draw(st.sampled_from([[], [f"class {i}" for i in range(len(sizes))]]))
    return Classes(x, sizes, names, cut)


def rows_of(data: Classes, x: Tensor) -> Tensor:
    """The row numbers that prepared examples hold."""
    return (x.flatten(2)[..., 0] * (255 if data.x.dtype == torch.uint8 else 1)).round().long()


def fits(data: Classes, way: int, shot: int, query: int) -> bool:
    """Can every choice of `way` classes give such a task?  Counted class by class."""
    if min(way, shot, query) < 1 or way > len(data):
        return False
    if data.cut is None:
        return all(size >= shot + query for size in data.sizes.tolist())
    pairs = zip(data.cut.tolist(), data.sizes.tolist(), strict=True)
    return all(min(cut, size - cut) >= max(shot, query) for cut, size in pairs)


@st.composite
def shot_and_query(draw: st.DrawFn, data: Classes) -> tuple[int, int]:
    """Sizes that fit."""
    if data.cut is not None:
        most = int(torch.minimum(data.cut, data.sizes - data.cut).min())
        return draw(st.integers(1, most)), draw(st.integers(1, most))
    shot = draw(st.integers(1, int(data.sizes.min()) - 1))
    return shot, draw(st.integers(1, int(data.sizes.min()) - shot))


@st.composite
def few_shot(draw: st.DrawFn) -> FewShot:
    data = draw(classes(smallest=2))
    return FewShot(data, draw(st.integers(1, len(data))), *draw(shot_and_query(data)))


@st.composite
def varied(draw: st.DrawFn) -> VariedWayShot:
    data = draw(classes(smallest=2))
    most = draw(st.integers(1, len(data)))
    shot, query = draw(shot_and_query(data))
    way = draw(st.integers(1, most)), most
    return VariedWayShot(data, way, (draw(st.integers(1, shot)), shot), query)


def sinusoids() -> st.SearchStrategy[Sinusoids]:
    return st.builds(Sinusoids, few, few)


def every_kind() -> st.SearchStrategy[Tasks]:
    return st.one_of(few_shot(), varied(), sinusoids())


def check_task(data: Classes, episode: Episode) -> None:
    """What holds for any classification episode, whatever its sizes."""
    chosen = episode.support.info["classes"]
    n, way = chosen.shape
    class_of = torch.arange(len(data)).repeat_interleave(data.sizes)
    assert equal(chosen, episode.query.info["classes"])
    assert all(len(set(task.tolist())) == way for task in chosen)
    for x, y, _ in episode:
        assert x.dtype == y.dtype == torch.float32
        assert x.shape == (n, y.shape[1], *data.x.shape[1:]) and y.shape == (n, x.shape[1], way)
        assert ((y == 0) | (y == 1)).all() and (y.sum(-1) == 1).all()
        assert equal(class_of[rows_of(data, x)], chosen.gather(1, y.argmax(-1)))
    both = torch.cat([rows_of(data, side.x) for side in episode], 1)
    assert all(len(set(task.tolist())) == both.shape[1] for task in both)
    if data.cut is not None:
        check_cut(data, episode)


def check_cut(data: Classes, episode: Episode) -> None:
    """Of each class, support and query lie on different sides of its cut."""
    starts, places = data.sizes.cumsum(0) - data.sizes, []
    for x, y, info in episode:
        own = info["classes"].gather(1, y.argmax(-1))
        after = rows_of(data, x) - starts[own] >= data.cut[own]
        places.append([(after[..., None] * y).sum(1), (~after[..., None] * y).sum(1)])
    assert not any((a * b).any() for a, b in zip(*places, strict=True))


# --- samplers


@given(few_shot(), few, seeds)
def test_few_shot_episodes_are_what_was_asked_for(tasks: FewShot, n: int, seed: int) -> None:
    episode = tasks.sample(n, generator(seed))
    check_task(tasks.classes, episode)
    assert episode.support.info["classes"].shape == (n, tasks.way)
    for side, each in ((episode.support, tasks.shot), (episode.query, tasks.query)):
        assert (side.y.sum(1) == each).all()


@given(varied(), few, seeds)
def test_varied_episodes_are_what_was_asked_for(tasks: VariedWayShot, n: int, seed: int) -> None:
    episode = tasks.sample(n, generator(seed))
    check_task(tasks.classes, episode)
    way = episode.support.y.shape[-1]
    shots = episode.support.y.sum(1)  # [tasks, way]
    mean = shots.mean(1)
    assert tasks.ways[0] <= way <= tasks.ways[1]
    assert (shots >= 1).all() and (mean == mean[0]).all()
    assert mean[0] in range(tasks.shots[0], tasks.shots[1] + 1)
    assert (episode.query.y.sum(1) == tasks.query).all()


@given(sinusoids(), few, seeds)
def test_sinusoids_lie_on_their_wave(tasks: Sinusoids, n: int, seed: int) -> None:
    episode = tasks.sample(n, generator(seed))
    for (x, y, info), points in zip(episode, (tasks.shot, tasks.query), strict=True):
        amplitude, phase = info["task"].T[..., None, None]
        assert x.shape == y.shape == (n, points, 1) and (x.abs() <= 5).all()
        assert (amplitude >= 0.1).all() and (amplitude <= 5).all()
        assert (phase >= 0).all() and (phase <= torch.pi).all()
        torch.testing.assert_close(y, amplitude * torch.sin(x - phase))


@given(every_kind(), few, seeds)
def test_a_seed_draws_the_same_and_sampling_is_drawing_and_gathering(
    tasks: Tasks, n: int, seed: int
) -> None:
    drawn = tasks.draw(n, generator(seed))
    assert count(drawn) == n
    assert equal(drawn, tasks.draw(n, generator(seed)))
    assert equal(tasks.gather(drawn), tasks.sample(n, generator(seed)))


@given(every_kind(), few, few, st.lists(seeds, min_size=2, max_size=2), st.booleans())
def test_frozen_episodes_have_one_hash_if_they_are_the_same(
    tasks: Tasks, n: int, other_n: int, two: list[int], same: bool
) -> None:
    one, other = tasks.freeze(n, two[0]), tasks.freeze(other_n, two[0] if same else two[1])
    leaves = [tree_leaves(f.groups) for f in (one, other)]
    alike = len(leaves[0]) == len(leaves[1]) and equal(*leaves)
    assert (one.hash == other.hash) == alike
    assert (len(one), len(other)) == (n, other_n)


@given(few_shot(), few, seeds)
def test_the_hash_names_the_data_too(tasks: FewShot, n: int, seed: int) -> None:
    data = tasks.classes
    renamed = Classes(data.x, data.sizes, [f"other {i}" for i in range(len(data))], data.cut)
    other = FewShot(renamed, tasks.way, tasks.shot, tasks.query)
    assert tasks.freeze(n, seed).hash != other.freeze(n, seed).hash


@given(every_kind(), few, few, seeds)
def test_frozen_episodes_come_in_order_in_any_batch(
    tasks: Tasks, n: int, batch: int, seed: int
) -> None:
    frozen = tasks.freeze(n, seed)
    assert isinstance(frozen, Frozen)
    one_by_one = [e for e in frozen.episodes(1)]
    assert len(one_by_one) == n
    batches = list(frozen.episodes(batch))
    assert all(1 <= count(b) <= batch for b in batches)
    again = [tree_map(lambda t, i=i: t[i : i + 1], b) for b in batches for i in range(count(b))]
    assert equal(again, one_by_one)


# --- what does not fit

any_number = st.integers(-2, 7)


@given(classes() | classes(smallest=2), any_number, any_number, any_number, seeds)
def test_what_does_not_fit_is_refused_and_nothing_else(
    data: Classes, way: int, shot: int, query: int, seed: int
) -> None:
    if fits(data, way, shot, query):
        check_task(data, FewShot(data, way, shot, query).sample(2, generator(seed)))
        return
    with pytest.raises(ValueError, match=r"way|shot|query"):
        FewShot(data, way, shot, query)


pairs = st.tuples(any_number, any_number)


@given(classes() | classes(smallest=2), pairs, pairs, any_number, seeds)
def test_varied_sizes_that_do_not_fit_are_refused_and_nothing_else(
    data: Classes, way: tuple[int, int], shot: tuple[int, int], query: int, seed: int
) -> None:
    ordered = way[0] <= way[1] and shot[0] <= shot[1] and min(way[0], shot[0]) >= 1
    if ordered and fits(data, way[1], shot[1], query):
        check_task(data, VariedWayShot(data, way, shot, query).sample(2, generator(seed)))
        return
    with pytest.raises(ValueError, match=r"way|shot|query"):
        VariedWayShot(data, way, shot, query)


@given(any_number, any_number, any_number)
def test_sinusoids_and_draws_of_less_than_one_are_refused(shot: int, query: int, n: int) -> None:
    if min(shot, query) < 1:
        with pytest.raises(ValueError, match=r"shot|query"):
            Sinusoids(shot, query)
        return
    tasks = Sinusoids(shot, query)
    if n < 1:
        for refused in (tasks.draw, tasks.sample, tasks.freeze):
            with pytest.raises(ValueError, match="n="):
                refused(n)


@given(st.lists(any_number, min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 5))
def test_classes_that_do_not_add_up_are_refused(sizes: list[int], n: int, names: int) -> None:
    words = [str(i) for i in range(names)]
    good = sum(sizes) == n and min(sizes) >= 1 and names in (0, len(sizes))
    if good:
        assert len(Classes(torch.zeros(n, 1), torch.tensor(sizes), words)) == len(sizes)
        return
    with pytest.raises(ValueError, match=r"sizes add up|has no examples|names for"):
        Classes(torch.zeros(n, 1), torch.tensor(sizes), words)


@given(classes(), st.data())
def test_selected_classes_keep_their_examples(data: Classes, choice: st.DataObject) -> None:
    numbers = st.integers(0, len(data) - 1)
    kept = choice.draw(st.lists(numbers, min_size=1, max_size=5, unique=True))
    selected = data.select(kept)
    for new, old in enumerate(kept):
        assert equal(selected.of_class(new), data.of_class(old))
        assert data.cut is None or selected.cut[new] == data.cut[old]
        assert not data.names or selected.name(new) == data.name(old)


@given(st.lists(st.integers(-1, 4), max_size=6), st.integers(0, 6), st.integers(1, 4))
def test_labels_are_rows_of_one_hot_numbers_or_refused(labels: list[int], n: int, way: int) -> None:
    x, numbers = torch.zeros(n, 2), torch.tensor(labels, dtype=torch.int64)
    if len(labels) == n and all(0 <= label < way for label in labels):
        y = Examples.of(x, numbers, way).y
        assert y.shape == (n, way) and (y.sum(-1) == 1).all() and equal(y.argmax(-1), numbers)
        return
    with pytest.raises(ValueError, match="labels"):
        Examples.of(x, numbers, way)


# --- hard tasks


def report(episodes: Episode, right: Tensor) -> Report:
    """What `fit` tells of a step: in each task the classes of `right` [tasks, way] were answered rightly."""
    y = episodes.query.y
    wrong = y.roll(1, -1)
    known = (right[:, None, :] * y).sum(-1, keepdim=True) > 0
    return Report(episodes, torch.zeros(len(y)), torch.where(known, y, wrong))


@given(few_shot(), few, few, st.integers(1, 5), seeds)
def test_hard_tasks_are_made_of_what_failed(
    tasks: FewShot, n: int, every: int, steps: int, seed: int
) -> None:
    assume(tasks.way >= 2)  # of one class no answer is wrong
    hard, failed, random = HardTasks(tasks, every), set(), generator(seed)
    for step in range(steps):
        state = random.get_state()
        episodes = hard.sample(n, random)
        check_task(tasks.classes, episodes)
        chosen = episodes.support.info["classes"]
        if step and step % every == 0:
            wanted = min(len(failed), tasks.way)
            assert all(len(failed & set(task.tolist())) == wanted for task in chosen)
        else:
            random.set_state(state)
            assert equal(episodes, tasks.sample(n, random))
        wrong = torch.randint(tasks.way + 1, (n, 1), generator=random)  # the last: all are right
        hard.feedback(report(episodes, torch.arange(tasks.way) != wrong))
        failed = set() if step % every == 0 else failed
        failed |= {int(c[w]) for c, w in zip(chosen, wrong[:, 0], strict=True) if w < tasks.way}
        assert set(hard.failed.nonzero().flatten().tolist()) == failed


@given(few_shot(), varied(), st.integers(-2, 0))
def test_hard_tasks_refuse_what_they_cannot_be(
    tasks: FewShot, uneven: VariedWayShot, every: int
) -> None:
    for refused in (
        lambda: HardTasks(tasks, every),
        lambda: HardTasks(uneven),
        lambda: HardTasks(tasks).freeze(2),
    ):
        with pytest.raises(ValueError, match=r"every=|fixed way|cannot be frozen"):
            refused()


# --- lifting: whatever is computed for many tasks at once is what a plain loop over them computes


def relative(losses: Tensor) -> Tensor:
    """An objective in which the weight of each task depends on all losses."""
    return losses.logsumexp(0) + losses.square().mean().sqrt()


COMBINE: dict[str, Callable[[Tensor], Tensor] | None] = {"mean": None, "nonlinear": relative}


@st.composite
def learner_and_shape(draw: st.DrawFn) -> tuple[Learner, tuple[int, ...], int]:
    """A learner on an MLP, the shape of its examples, and its way or number of targets."""
    d, hidden, out = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(2, 4))
    net = MLP([d, hidden, out])
    if draw(st.booleans()):
        return ProtoNet(net, draw(st.sampled_from(sorted(DISTANCES)))), (d,), out
    kind = draw(st.sampled_from(["classification", "regression"]))
    lr, steps = draw(st.floats(0.01, 0.5)), draw(st.integers(0, 3))
    return MAML(net, lr, steps, first_order=draw(st.booleans()), kind=kind), (d,), out


@st.composite
def on_images(draw: st.DrawFn) -> tuple[Learner, tuple[int, ...], int]:
    """The same on a small convolutional network."""
    pool = draw(st.sampled_from(["max", "stride"]))
    stats = draw(st.sampled_from(["batch", "support", "running"]))
    metric, way = draw(st.booleans()), draw(st.integers(2, 3))
    net = Conv4(out=None if metric else way, size=16, width=4, pool=pool, stats=stats)
    learner = ProtoNet(net) if metric else MAML(net, steps=draw(st.integers(1, 2)))
    return learner, (1, 16, 16), way


def some_tasks(learner: Learner, shape: tuple[int, ...], way: int, n: int, shot: int) -> Episode:
    """Random tasks; each class has `shot` support and two query examples."""

    def side(each: int) -> Examples:
        x = torch.randn(n, way * each, *shape)
        if learner.kind == "regression":
            return Examples(x, torch.randn(n, way * each, way))
        return Examples.of(x, torch.arange(way).repeat(n, each), way)

    return Episode(side(shot), side(2))


def by_hand(learner: Learner, episodes: Episode) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients without the engine: a loop over tasks, and one call of autograd."""
    tasks = [tree_map(lambda t, i=i: t[i], episodes) for i in range(count(episodes))]
    each = torch.stack([learner.loss(task) for task in tasks])
    parameters = list(learner.parameters())
    found = torch.autograd.grad(learner.combine(each), parameters, allow_unused=True)
    grads = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]
    return each.detach(), grads


def close(found: Tensor, expected: Tensor) -> None:
    """The same up to rounding in double precision, measured against the largest number."""
    scale = 1 + expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)


def check_lifting(
    learner: Learner, episodes: Episode, combine: str, whole: bool, how: dict[str, Any]
) -> None:
    """Losses, gradients and answers of the engine against those by hand."""
    if COMBINE[combine]:
        learner.combine = COMBINE[combine]
    if whole:  # a loss of its own is lifted as one function
        learner.loss = lambda episode: Learner.loss(learner, episode)
    expected, grads = by_hand(learner, episodes)
    close(losses(learner, episodes, how["lift"]).detach(), expected)
    close(gradients(learner, episodes, **how).losses, expected)
    for parameter, grad in zip(learner.parameters(), grads, strict=True):
        close(torch.zeros_like(grad) if parameter.grad is None else parameter.grad, grad)


@pytest.fixture
def double() -> None:
    torch.set_default_dtype(torch.float64)


ways_of_lifting = st.fixed_dictionaries(
    {
        "lift": st.sampled_from(["loop", "vmap"]),
        "chunk": st.none() | st.integers(1, 6),
        "recompute": st.booleans(),
    }
)
objectives = st.sampled_from(sorted(COMBINE))
# The precision is the same for every example, so it may be set once for a test.
once = settings(suppress_health_check=[*SLOW, HealthCheck.function_scoped_fixture])


@once
@given(st.data(), st.integers(1, 5), few, objectives, st.booleans(), ways_of_lifting, seeds)
def test_lifting_changes_neither_losses_nor_gradients(
    double: None,
    choice: st.DataObject,
    n: int,
    shot: int,
    combine: str,
    whole: bool,
    how: dict[str, Any],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    learner, shape, way = choice.draw(learner_and_shape())
    how = how | {"recompute": how["recompute"] and hasattr(learner, "step")}
    check_lifting(learner, some_tasks(learner, shape, way, n, shot), combine, whole, how)


@settings(once, max_examples=settings().max_examples // 4)
@given(st.data(), st.integers(1, 3), objectives, st.booleans(), ways_of_lifting, seeds)
def test_lifting_convolutions_changes_neither_losses_nor_gradients(
    double: None,
    choice: st.DataObject,
    n: int,
    combine: str,
    whole: bool,
    how: dict[str, Any],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    learner, shape, way = choice.draw(on_images())
    how = how | {"recompute": how["recompute"] and hasattr(learner, "step")}
    check_lifting(learner, some_tasks(learner, shape, way, n, 2), combine, whole, how)


@once
@given(st.data(), few, few, st.sampled_from(["loop", "vmap", "auto"]), seeds)
def test_lifting_changes_no_answer(
    double: None, choice: st.DataObject, n: int, shot: int, lift: str, seed: int
) -> None:
    torch.manual_seed(seed)
    learner, shape, way = choice.draw(learner_and_shape())
    support, query = some_tasks(learner, shape, way, n, shot)
    tasks = [tree_map(lambda t, i=i: t[i], (support, query.x)) for i in range(n)]
    expected = torch.stack([learner(*task) for task in tasks]).detach()
    for queries in ("joint", "single"):
        close(answer(learner, Episode(support, query), lift, queries).detach(), expected)


@once
@given(few, few, seeds)
def test_any_structure_of_tensors_is_lifted(double: None, n: int, d: int, seed: int) -> None:
    a, b = torch.randn(2, n, d, generator=generator(seed))

    def f(pair: dict[str, Tensor], t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return pair["a"] @ t, {"sum": pair["a"] + t, "scaled": pair["a"] * t.sum()}

    loop, vmap = (over_tasks(f, {"a": a}, b, lift=lift) for lift in ("loop", "vmap"))
    assert loop[0].shape == (n,) and loop[1]["sum"].shape == (n, d)
    for x, y in zip(tree_leaves(loop), tree_leaves(vmap), strict=True):
        close(x, y)
