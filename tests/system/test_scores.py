"""Scores that mean what they say: inputs of users that once gave a wrong number, each with its right one."""

from __future__ import annotations

import copy
import logging
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metabook import classes as library
from metabook.classes import Classes
from metabook.engine import Engine
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, Tasks
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, mixes
from metabook.prototypes import ProtoNet
from metabook.recipes import data_named
from metabook.scores import Score, calibration, evaluate, paired
from metabook.training import fit

SIZES = torch.full((6,), 8)
QUIET: dict[str, Any] = {"meta_batch": 2, "progress": False}


@pytest.fixture(autouse=True)
def as_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types in signatures are checked in tests only: here nobody but the library looks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def noise(seed: int = 0, features: int = 3) -> Tensor:
    return torch.randn(48, features, generator=torch.Generator().manual_seed(seed))


def three_way(x: Tensor, **more: Any) -> FewShot:
    return FewShot(Classes(x, SIZES, **more), 3, 1, 3)


# --- answers that are NaN


def exploding() -> MAML:
    """Its inner loop is fine in training, for there is none, and explodes in testing."""
    return MAML(MLP([3, 32, 3]), lr=50.0, steps=0, test_steps=30)


def test_a_network_of_nan_has_no_accuracy():
    broken = ProtoNet(MLP([3, 8]))
    for p in broken.parameters():
        p.data.fill_(float("nan"))
    for queries in ("joint", "single"):
        score = evaluate(broken, three_way(noise()), 20, queries=queries)
        assert np.isnan(score.mean) and score.lost == 20
        assert "nan" in str(score) and "20 of them without a number" in str(score)
        assert score.row()["mean"] is None and score.row()["ci95"] is None
    with pytest.raises(ValueError, match=r"in 20 of 20 tasks an answer is no number"):
        calibration(broken, three_way(noise()), 20)


def test_one_nan_among_many_tasks_is_not_averaged_away():
    data = three_way(10 * noise())
    score = evaluate(exploding(), data, 50)
    assert 0 < score.lost <= 50 and np.isnan(score.mean)


class Overflowing(nn.Module):
    """Its logits are infinite for every class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 3), 1e30))

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() * 1e30 @ self.weight


def test_answers_that_overflow_are_no_answers():
    score = evaluate(MAML(Overflowing(), steps=0), three_way(noise()), 20)
    assert score.lost == 20
    with pytest.raises(ValueError, match="an answer is no number"):
        calibration(MAML(Overflowing(), steps=0), three_way(noise()), 20)


def test_minus_infinity_excludes_a_class_and_is_an_answer():
    class Excluding(ProtoNet):
        def predict(self, state: Any, x: Tensor) -> Tensor:
            logits = super().predict(state, x)
            return torch.where(logits < logits.amax(-1, keepdim=True), -torch.inf, logits)

    masked, plain = (
        evaluate(c(nn.Identity()), three_way(noise()), 20) for c in (Excluding, ProtoNet)
    )
    assert torch.equal(masked.per_task, plain.per_task) and masked.lost == 0


def test_scores_of_a_bfloat16_learner_are_exact():
    learner = ProtoNet(MLP([3, 4])).bfloat16()
    tasks = FewShot(Classes(noise().bfloat16(), SIZES), 3, 1, 5)
    score = evaluate(learner, tasks, 40)
    assert score.per_task.dtype == torch.float32
    assert torch.allclose(15 * score.per_task, (15 * score.per_task).round(), atol=1e-5)


def test_nothing_with_nan_is_better_and_everything_is_better_than_nan():
    good, bad = Score(torch.tensor([0.2, 0.3])), Score(torch.tensor([0.9, float("nan")]))
    assert not bad.beats(None) and not bad.beats(good)
    assert good.beats(bad) and good.beats(None)


def test_an_infinite_error_is_no_score_either():
    endless = Score(torch.tensor([1.0, float("inf")]), "mse")
    assert not endless.beats(None) and endless.lost == 1 and endless.row()["mean"] is None
    assert Score(torch.tensor([9.0, 9.0]), "mse").beats(endless)


def test_validation_never_keeps_parameters_that_answer_nan(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    tasks = three_way(100 * noise())
    how = dict(steps=2, validate=tasks, every=1, folder=tmp_path / "run", **QUIET)
    run = fit(exploding(), tasks, **how)
    assert run.best is None and "no validation score was a number" in str(run)
    assert (
        "step 1: " in caplog.text
        and "validation tasks have an answer that is no number" in caplog.text
    )
    assert [row["validation"] for row in run.log if "validation" in row] == [None, None]
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


# --- the name of episodes


def test_scores_on_other_data_are_not_paired():
    easy = noise() + 10 * torch.arange(6).repeat_interleave(8)[:, None]
    a, b = (evaluate(ProtoNet(MLP([3, 4])), three_way(x), 20) for x in (easy, noise(1)))
    with pytest.raises(ValueError, match="the hash also stands for the data"):
        paired(a, b)


OTHERS: dict[str, Callable[[Tensor], FewShot]] = {
    "one number": lambda x: three_way(x.index_put((torch.tensor(47), torch.tensor(2)), x[0, 0])),
    "another shape": lambda x: three_way(x[..., None]),
    "another precision": lambda x: three_way(x.double()),
    "another order": lambda x: three_way(x.roll(8, 0)),
    "names": lambda x: three_way(x, names=list("abcdef")),
    "a cut": lambda x: three_way(x, cut=torch.full((6,), 4)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_hash_stands_for_all_that_the_data_hold(other: Callable[[Tensor], FewShot]):
    assert other(noise()).freeze(4).hash != three_way(noise()).freeze(4).hash
    assert other(noise()).freeze(4).hash == other(noise()).freeze(4).hash


def test_the_hash_stands_for_how_bytes_are_prepared():
    x = torch.arange(48, dtype=torch.uint8).view(48, 1, 1, 1)
    plain, scaled = (three_way(x, mean=(m,)).freeze(4).hash for m in (0.0, 0.5))
    assert plain != scaled


class Steeper(Sinusoids):
    """Curves twice as high, under a name that tells nothing."""

    def gather(self, indices: Any) -> Episode:
        support, query = super().gather(indices)
        return Episode(*(part._replace(y=2 * part.y) for part in (support, query)))


class Shifted(FewShot):
    """Other images than the data hold."""

    by = 1.0

    def examples(self, *which: Tensor) -> Examples:
        one = super().examples(*which)
        return one._replace(x=one.x + self.by)


def test_a_subclass_with_other_values_has_another_hash():
    assert repr(Steeper()) != repr(Sinusoids())
    alike = type("Sinusoids", (Steeper,), {})()
    alike.__class__.__qualname__ = "Sinusoids"
    assert repr(alike) == repr(Sinusoids())
    assert len({t.freeze(9).hash for t in (Sinusoids(), Steeper(), alike)}) == 3
    one, other = (
        Shifted(Classes(noise(), SIZES), 3, 1, 3),
        Shifted(Classes(noise(), SIZES), 3, 1, 3),
    )
    assert one.freeze(4).hash == other.freeze(4).hash
    assert one.describe() == other.describe()
    other.by = 2.0
    assert one.freeze(4).hash != other.freeze(4).hash and one.describe() != other.describe()


class Louder:
    """As people write what they mix into tasks."""

    sigma = 1.0

    def gather(self, indices: Any) -> Episode:
        support, query = super().gather(indices)
        return Episode(*(part._replace(x=self.sigma * part.x) for part in (support, query)))


class LouderShots(Louder, FewShot):
    pass


class Prepared(Classes):
    """Data that are prepared in a way of their own."""

    by = 1.0

    def prepare(self, x: Tensor) -> Tensor:
        return self.by * super().prepare(x)


def test_whatever_decides_what_an_episode_holds_is_in_its_name():
    mixed = [LouderShots(Classes(noise(), SIZES), 3, 1, 3) for _ in range(2)]
    assert not mixed[0].determined and not mixed[0].recordable
    mixed[1].sigma = 9.0
    replaced = [three_way(noise()) for _ in range(2)]
    replaced[1].gather = mixed[1].gather
    prepared = [FewShot(Prepared(noise(), SIZES), 3, 1, 3) for _ in range(2)]
    vars(prepared[1].classes)["by"] = 9.0
    for one, other in (mixed, replaced, prepared):
        assert one.freeze(4).hash == one.freeze(4).hash != other.freeze(4).hash
        assert one.describe() != other.describe()


class Augmented(FewShot):
    """Random numbers of three libraries in what is gathered."""

    def gather(self, indices: Any) -> Episode:
        support, query = super().gather(indices)
        by = np.random.rand() + random.random()
        return Episode(support, query._replace(x=query.x + by * torch.randn_like(query.x)))


def test_random_augmentation_can_be_named_and_resumed(tmp_path: Path):
    tasks, learner = Augmented(Classes(noise(), SIZES), 3, 1, 3), ProtoNet(MLP([3, 4]))
    torch.manual_seed(0)
    assert tasks.describe() == tasks.describe() and tasks.freeze(4).hash == tasks.freeze(4).hash
    drawn = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn[0])
    for steps in (1, 2):
        fit(learner, tasks, steps=steps, folder=tmp_path, resume=steps > 1, **QUIET)


def test_frozen_episodes_are_the_same_each_time_though_gathering_draws():
    frozen = Augmented(Classes(noise(), SIZES), 3, 1, 3).freeze(40)
    learner, scores = ProtoNet(MLP([3, 4])), []
    for seed, batch in ((1, 32), (2, 32), (3, 7)):
        torch.manual_seed(seed)
        scores.append(evaluate(learner, frozen, batch=batch))
    assert all(torch.equal(s.per_task, scores[0].per_task) for s in scores)


def test_a_copy_of_data_is_a_copy():
    data = Classes(noise(), SIZES)
    twin = copy.deepcopy(data)
    twin.x.add_(1)
    assert torch.equal(data.x, noise())


def test_tasks_that_come_in_pairs_can_be_trained_on(tmp_path: Path):
    class Pairs(Sinusoids):
        def draw(self, n: int, generator: Any = None) -> Any:
            assert n % 2 == 0
            return super().draw(n, generator)

        def gather(self, indices: Any) -> Episode:
            return super().gather(indices)

    for steps in (1, 2):
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression")
        fit(learner, Pairs(), steps=steps, folder=tmp_path, resume=steps > 1, **QUIET)


def test_features_of_another_network_are_other_data_for_a_run(tmp_path: Path):
    images, learner = Classes(noise(), SIZES), ProtoNet(MLP([5, 4]))

    def go(steps: int, z: Tensor) -> None:
        tasks = FewShot(images.with_features(z), 3, 1, 3)
        fit(learner, tasks, steps=steps, folder=tmp_path, resume=steps > 1, **QUIET)

    go(1, noise(1, features=5))
    go(2, noise(1, features=5))
    with pytest.raises(ValueError, match=r"holds another run: tasks\.data was"):
        go(3, noise(2, features=5))


def test_replaced_data_do_not_keep_the_name():
    features = Classes(noise(), SIZES).with_features(noise(1))
    other = replace(features, x=noise(2))
    assert FewShot(other, 3, 1, 3).freeze(4).hash != FewShot(features, 3, 1, 3).freeze(4).hash
    moved = FewShot(features.to("cpu"), 3, 1, 3).freeze(4).hash
    assert moved == FewShot(features, 3, 1, 3).freeze(4).hash


def test_equal_numbers_of_another_kind_are_the_same_data():
    x = torch.arange(48, dtype=torch.uint8).view(48, 1, 1, 1)
    means = [(0.5,), (np.float64(0.5),), [0.5], (np.float32(0.5),)]
    assert len({three_way(x, mean=mean).freeze(4).hash for mean in means}) == 1


def test_of_large_data_the_chosen_examples_have_a_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        library, "LARGE", 100
    )  # bytes: of these data the digest knows one example in six
    x = noise()
    drawn = three_way(x).freeze(2).groups[0]
    rows = set(torch.cat([drawn.support, drawn.query], 1).flatten().tolist())
    seen = next(i for i in sorted(rows) if i % 6)
    unseen = next(i for i in range(48) if i % 6 and i not in rows)
    hashes = []
    for row in (None, seen, unseen):
        changed = x.clone()
        changed[row or 0] += 0 if row is None else 1
        hashes.append(three_way(changed).freeze(2).hash)
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


def test_what_is_written_into_the_data_changes_the_name():
    tasks = three_way(noise())
    frozen = tasks.freeze(4)
    before, describing = frozen.hash, tasks.describe()
    tasks.classes.x[47, 2] += 1
    assert frozen.hash != before and tasks.describe() != describing
    tasks.classes.x[47, 2] -= 1
    assert three_way(noise()).freeze(4).hash == before


def test_features_keep_the_name_of_their_episodes():
    images, z = Classes(noise(), SIZES), noise(1, features=5)
    features = images.with_features(z)
    slow, fast = (
        evaluate(ProtoNet(nn.Identity()), FewShot(d, 3, 1, 3), 20) for d in (images, features)
    )
    assert paired(slow, fast).n == 20
    chosen = [
        FewShot(d.select([5, 1, 2, 3]), 3, 1, 3).freeze(4).hash
        for d in (features, features.select(range(6)))
    ]
    assert chosen[0] != FewShot(features, 3, 1, 3).freeze(4).hash
    with pytest.raises(ValueError, match="z has 47 rows, but the data 48 examples"):
        images.with_features(z[1:])


def test_describing_leaves_no_trace():
    class Counting(Sinusoids):
        drawn = 0

        def draw(self, n: int, generator: Any = None) -> Any:
            self.drawn += 1
            return super().draw(n, generator)

        def gather(self, indices: Any) -> Episode:
            return super().gather(indices)

    tasks, before = Counting(), torch.get_rng_state()
    tasks.describe()
    assert tasks.drawn == 0 and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("validation", [False, True], ids=["training", "validation"])
def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, validation: bool):
    def go(steps: int, x: Tensor, resume: bool = False) -> None:
        other, same = three_way(x), three_way(noise())
        tasks, validate = (same, other) if validation else (other, same)
        learner = ProtoNet(MLP([3, 4]))
        how = dict(validate=validate, every=1, folder=tmp_path / "run", resume=resume, **QUIET)
        fit(learner, tasks, steps=steps, **how)

    go(1, noise())
    go(2, noise(), resume=True)
    what = "validation" if validation else "tasks"
    with pytest.raises(ValueError, match=rf"holds another run: {what}\.data was"):
        go(3, noise(1), resume=True)


# --- what is asked is done, or refused


def test_frozen_tasks_are_not_drawn_again():
    learner, frozen = ProtoNet(MLP([3, 4])), three_way(noise()).freeze(10, seed=3)
    assert evaluate(learner, frozen).n == 10
    for ask, name in ((dict(n=1000), "n=1000"), (dict(seed=1), "seed=1")):
        for score in (evaluate, calibration):
            with pytest.raises(
                ValueError, match=f"{name}, but these are 10 tasks of seed 3, frozen"
            ):
                score(learner, frozen, **ask)


@pytest.mark.parametrize(
    "engine",
    [
        Engine(run="compile"),
        Engine(run="graph"),
        Engine(chunk=2),
        Engine(recompute=True),
        Engine(nonfinite="skip"),
    ],
    ids=str,
)
def test_scoring_refuses_what_only_training_does(engine: Engine):
    learner, tasks = ProtoNet(MLP([3, 4])), three_way(noise())
    with pytest.raises(ValueError, match="scoring does not do that, expected lift, precision"):
        evaluate(learner, tasks, 4, engine=engine)
    with pytest.raises(ValueError, match="scoring does not do that"):
        calibration(learner, tasks, 4, engine=engine)


def test_scoring_hears_what_it_can_do(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: asked.append(on))
    engine = Engine(lift="loop", run="eager", precision="float32", deterministic=True)
    assert evaluate(ProtoNet(MLP([3, 4])), three_way(noise()), 4, engine=engine).n == 4
    assert asked == [True, False]


@pytest.mark.parametrize(
    "engine", [Engine(chunk=1), Engine(nonfinite="skip"), Engine(recompute=True)], ids=str
)
def test_training_validates_whatever_its_engine(engine: Engine):
    tasks = three_way(noise())
    run = fit(MAML(MLP([3, 3])), tasks, steps=1, validate=tasks.freeze(4), engine=engine, **QUIET)
    assert run.best.n == 4


# --- classes


def test_classes_are_selected_by_a_mask():
    data = Classes.of(
        {"few": torch.zeros(3, 2), "dogs": torch.ones(9, 2), "cats": torch.full((9, 2), 2.0)}
    )
    for mask in (data.sizes >= 6, [False, True, True], np.array([False, True, True])):
        assert data.select(mask).names == ["dogs", "cats"]
        assert data.select(mask).x.flatten().unique().tolist() == [1, 2]
    for numbers in ([2, 0], torch.tensor([2, 0]), np.array([2, 0]), range(2, -1, -2)):
        assert data.select(numbers).names == ["cats", "few"]
    for wrong, message in (
        ([1, 1], "expected each class once"),
        ([True, False], r"a mask of shape \(2,\), expected \(3,\)"),
        ([False] * 3, "select at least one"),
        ([0.5], "expected a list of whole numbers"),
        ([[0, 1]], "expected a list of whole numbers"),
        ([], "select at least one"),
        ([3], "by numbers from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            data.select(wrong)


def test_the_message_about_small_classes_says_what_works():
    data = Classes.of(
        {"few": torch.zeros(3, 2), "dogs": torch.ones(9, 2), "cats": torch.ones(9, 2)}
    )
    with pytest.raises(ValueError, match=r"data\.select\(data\.sizes >= 6\)"):
        FewShot(data, 2, 2, 4)
    assert FewShot(data.select(data.sizes >= 6), 2, 2, 4).sample(1)
    halves = replace(data, cut=torch.tensor([1, 4, 4]))
    way_on = "data.select(torch.minimum(data.cut, data.sizes - data.cut) >= 4)"
    with pytest.raises(ValueError, match=re.escape(way_on)):
        FewShot(halves, 2, 2, 4)
    assert halves.select(torch.minimum(halves.cut, halves.sizes - halves.cut) >= 4).names == [
        "dogs",
        "cats",
    ]


COMPOSED, APART = "Caf\u00e9", "Cafe\u0301"  # the same name to every reader


def test_one_class_in_two_spellings_is_one_class():
    with pytest.raises(ValueError, match=r"names has 'Café' 2 times, expected each class once"):
        Classes.of({COMPOSED: torch.zeros(2, 1), APART: torch.zeros(2, 1)})


def test_a_class_in_two_spellings_on_two_sides_is_a_leak(tmp_path: Path):
    for split, name in (("train", COMPOSED), ("val", "b"), ("test", APART)):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / ".ipynb_checkpoints").mkdir()  # on all sides, and no class
    with pytest.raises(
        ValueError, match=r"stands in both train and test \(spelled 'Caf\\xe9' and 'Cafe\\u0301'\)"
    ):
        data_named(str(tmp_path))


# --- labels


def several_at_once() -> Tasks:
    class MultiHot(FewShot):
        def examples(self, *which: Tensor) -> Examples:
            one = super().examples(*which)
            return one._replace(y=(one.y + one.y.roll(1, -1)).clamp(max=1))

    return MultiHot(Classes(noise(), SIZES), 3, 1, 3)


def test_several_classes_at_once_have_no_accuracy():
    learner = ProtoNet(MLP([3, 4]))
    for use in (
        lambda: evaluate(learner, several_at_once(), 4),
        lambda: calibration(learner, several_at_once(), 4),
        lambda: fit(learner, several_at_once(), steps=1, **QUIET),
        lambda: fit(learner, three_way(noise()), steps=1, validate=several_at_once(), **QUIET),
    ):
        with pytest.raises(ValueError, match=r"a row of labels sums to 2, expected one-hot rows"):
            use()


@pytest.mark.parametrize("wrong", ["nan", "some nan", "two right", "all alike"])
def test_labels_without_one_right_answer_are_refused(wrong: str):
    class Odd(FewShot):
        def gather(self, indices: Any) -> Episode:
            support, query = super().gather(indices)
            y = {
                "nan": query.y * torch.nan,
                "some nan": query.y.masked_fill(query.y.cumsum(1) == 1, torch.nan),
                "two right": (query.y + query.y.roll(1, -1)) / 2,
                "all alike": torch.full_like(query.y, 1 / 3),
            }[wrong]
            return Episode(support, query._replace(y=y))

    for score in (evaluate, calibration):
        with pytest.raises(ValueError, match=r"query\.y: a row of labels"):
            score(ProtoNet(MLP([3, 4])), Odd(Classes(noise(), SIZES), 3, 1, 3), 4)


def test_soft_labels_are_welcome():
    class Soft(FewShot):  # of queries; soft labels in the support set would make other prototypes
        def gather(self, indices: Any) -> Episode:
            support, query = super().gather(indices)
            return Episode(support, query._replace(y=0.9 * query.y + 0.1 / 3))

    tasks = Soft(Classes(noise(), SIZES), 3, 1, 3)
    hard, soft = (
        evaluate(ProtoNet(nn.Identity()), t, 20).per_task for t in (three_way(noise()), tasks)
    )
    assert torch.equal(hard, soft)


# --- do queries see one another?


def with_norm(norm: nn.Module, *after: nn.Module) -> ProtoNet:
    return ProtoNet(nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.Flatten(), *after))


class Noisy(nn.Module):
    """Draws random numbers, and no example sees another."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, True)


class Holding(ProtoNet):
    """A learner around a list of networks, or a learner."""

    def __init__(self, part: nn.Module):
        super().__init__(nn.Identity())
        self.part = part


class OwnNorm(nn.Module):
    """A normalisation that is none by its type."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    "learner, together",
    [
        (with_norm(nn.BatchNorm2d(8, track_running_stats=False)), True),
        (with_norm(nn.BatchNorm2d(8)), False),
        (with_norm(nn.InstanceNorm2d(8)), False),
        (with_norm(OwnNorm()), True),
        (with_norm(nn.Identity(), nn.Linear(8 * 26 * 26, 3)), False),
        (
            ProtoNet(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))),
            True,
        ),
        (MAML(MLP([7, 3])), False),
        (ProtoNet(Conv4(3, size=20, width=4, stats="batch")), True),
        (ProtoNet(Conv4(3, size=20, width=4, stats="support")), False),
        (ProtoNet(Conv4(3, size=20, width=4, stats="running")), False),
        (ProtoNet(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), OwnNorm())), True),
        (ProtoNet(nn.Sequential(nn.Embedding(9, 4), nn.Flatten())), False),
        (ProtoNet(nn.Identity()), False),
        (with_norm(Noisy()), False),
        (Holding(nn.ModuleList([with_norm(OwnNorm()).embed])), True),
        (Holding(with_norm(OwnNorm())), True),
        (Holding(with_norm(nn.BatchNorm2d(8))), False),
    ],
    ids=lambda value: str(value)[:60].split("(")[0] if isinstance(value, nn.Module) else str(value),
)
def test_who_is_transductive_is_asked(learner: ProtoNet, together: bool):
    state = {k: v.clone() for k, v in learner.state_dict().items()}
    assert learner.training and learner.transductive == together and learner.training
    assert all(torch.equal(v, state[k]) for k, v in learner.state_dict().items())


def test_asking_compares_an_example_alone_with_itself_among_others():
    x = noise()
    assert mixes(OwnNorm(), x) and not mixes(nn.Linear(3, 3), x)
    assert mixes(nn.BatchNorm1d(3, track_running_stats=False), x)  # which refuses an example alone


# --- tasks of several kinds


def test_looking_at_tasks_before_training_leaves_no_trace():
    class Counting(FewShot):
        drawn = 0

        def draw(self, n: int, generator: Any = None) -> Any:
            self.drawn += 1
            return super().draw(n, generator)

    tasks, learner = Counting(Classes(noise(), SIZES), 3, 1, 3), ProtoNet(MLP([3, 4]))
    before = torch.get_rng_state()
    fit(learner, tasks, steps=2, **QUIET)
    assert tasks.drawn == 2 and torch.equal(before, torch.get_rng_state())


def test_nothing_is_told_where_nothing_is_wrong(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        tasks = three_way(noise())
        fit(ProtoNet(MLP([3, 4])), tasks, steps=2, validate=tasks, every=1, **QUIET)
    assert not caplog.records
