"""Made from nbs/06_training.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import metabook
from metabook.engine import Engine
from metabook.episodes import Classes, Episode, Examples, FewShot, Sinusoids, Tasks
from metabook.learners import Learner, task_loss
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet
from metabook.training import (
    VALIDATION_TASKS,
    Calibration,
    Outer,
    Run,
    Score,
    answers,
    binned,
    calibration,
    evaluate,
    fit,
    paired,
    place,
)


@pytest.mark.proves("eq-standard-error")
def test_the_worked_example():
    # cell 27d2e460
    print(Score(torch.tensor([0.2, 0.4, 0.4, 0.6])))
    # cell 85d7b36a
    by_hand = Score(torch.tensor([0.2, 0.4, 0.4, 0.6]))
    assert by_hand.n == 4 and abs(by_hand.mean - 0.4) < 1e-6
    assert abs(by_hand.standard_error - (0.08 / 3) ** 0.5 / 2) < 1e-6
    assert abs(by_hand.ci95 - 0.160) < 1e-3
    assert str(by_hand) == "accuracy 40.00 ± 16.00% (4 tasks, joint queries)"
    assert Score(torch.tensor([0.2])).ci95 == math.inf  # one task says nothing about the others
    assert Score(torch.tensor([2.0]), "mse").beats(Score(torch.tensor([3.0]), "mse"))
    assert not Score(torch.tensor([math.nan]), "mse").beats(None)


@pytest.mark.proves("eq-interval")
def test_the_interval_covers_95_of_100():
    # cell 2a12a91c
    def accuracies(n, skill=0.5, queries=75, spread=0.08, repeats=1, seed=0):
        "Accuracies [repeats, n] of a simulated learner: every task has its own difficulty."
        rng = np.random.default_rng(seed)
        a = skill * (1 - skill) / spread**2 - 1  # of a Beta distribution with this mean and spread
        of_task = rng.beta(skill * a, (1 - skill) * a, (repeats, n))
        return torch.tensor(rng.binomial(queries, of_task) / queries)

    # cell 27d2e460
    print(Score(torch.tensor([0.2, 0.4, 0.4, 0.6])))

    # cell 53f5d5e5
    def coverage(half_width, n=600, repeats=2000):
        "How often mean ± half_width(accuracies) covers the true 50%."
        a = accuracies(n, repeats=repeats, seed=1)
        return (
            ((a.mean(1) - 0.5).abs() <= torch.tensor([half_width(row) for row in a]))
            .double()
            .mean()
            .item()
        )

    # cell 56d0bf14
    assert abs(coverage(lambda a: Score(a.float()).ci95) - 0.95) < 0.015


@pytest.mark.proves("eq-task-variance")
def test_tasks_and_queries_share_the_spread():
    # cell 2a12a91c
    def accuracies(n, skill=0.5, queries=75, spread=0.08, repeats=1, seed=0):
        "Accuracies [repeats, n] of a simulated learner: every task has its own difficulty."
        rng = np.random.default_rng(seed)
        a = skill * (1 - skill) / spread**2 - 1  # of a Beta distribution with this mean and spread
        of_task = rng.beta(skill * a, (1 - skill) * a, (repeats, n))
        return torch.tensor(rng.binomial(queries, of_task) / queries)

    # cell 27d2e460
    print(Score(torch.tensor([0.2, 0.4, 0.4, 0.6])))

    # cell 53f5d5e5
    def coverage(half_width, n=600, repeats=2000):
        "How often mean ± half_width(accuracies) covers the true 50%."
        a = accuracies(n, repeats=repeats, seed=1)
        return (
            ((a.mean(1) - 0.5).abs() <= torch.tensor([half_width(row) for row in a]))
            .double()
            .mean()
            .item()
        )

    # cell 56d0bf14
    assert abs(coverage(lambda a: Score(a.float()).ci95) - 0.95) < 0.015
    # cell c2b809e7
    for m in (5, 75, 1000):
        variance = 0.08**2 + (0.25 - 0.08**2) / m
        measured = Score(accuracies(100_000, queries=m)[0].float()).standard_error ** 2 * 100_000
        assert abs(measured / variance - 1) < 0.03


def test_only_one_of_three_intervals_is_right():
    # cell 2a12a91c
    def accuracies(n, skill=0.5, queries=75, spread=0.08, repeats=1, seed=0):
        "Accuracies [repeats, n] of a simulated learner: every task has its own difficulty."
        rng = np.random.default_rng(seed)
        a = skill * (1 - skill) / spread**2 - 1  # of a Beta distribution with this mean and spread
        of_task = rng.beta(skill * a, (1 - skill) * a, (repeats, n))
        return torch.tensor(rng.binomial(queries, of_task) / queries)

    # cell 27d2e460
    print(Score(torch.tensor([0.2, 0.4, 0.4, 0.6])))

    # cell 53f5d5e5
    def coverage(half_width, n=600, repeats=2000):
        "How often mean ± half_width(accuracies) covers the true 50%."
        a = accuracies(n, repeats=repeats, seed=1)
        return (
            ((a.mean(1) - 0.5).abs() <= torch.tensor([half_width(row) for row in a]))
            .double()
            .mean()
            .item()
        )

    # cell 56d0bf14
    assert abs(coverage(lambda a: Score(a.float()).ci95) - 0.95) < 0.015
    # cell c2b809e7
    for m in (5, 75, 1000):
        variance = 0.08**2 + (0.25 - 0.08**2) / m
        measured = Score(accuracies(100_000, queries=m)[0].float()).standard_error ** 2 * 100_000
        assert abs(measured / variance - 1) < 0.03
    # cell 7e89ac29
    over_tasks_ = coverage(lambda a: 1.96 * a.std() / 600**0.5)
    standard_deviation = coverage(lambda a: a.std())
    over_queries = coverage(lambda a: 1.96 * (a.mean() * (1 - a.mean()) / (600 * 75)) ** 0.5)
    print(
        f"covers the truth: {over_tasks_:.1%} (tasks), {standard_deviation:.1%} (deviation), {over_queries:.1%} (queries)"
    )
    assert abs(over_tasks_ - 0.95) < 0.015 and standard_deviation == 1 and over_queries < 0.8

    few, many = (accuracies(n, repeats=200, seed=5).std(1) / n**0.5 for n in (32, 600))
    assert few.mean() > 4 * many.mean()


@pytest.mark.proves("eq-paired-variance")
def test_a_paired_difference_subtracts_the_covariance():
    # cell 2a12a91c
    def accuracies(n, skill=0.5, queries=75, spread=0.08, repeats=1, seed=0):
        "Accuracies [repeats, n] of a simulated learner: every task has its own difficulty."
        rng = np.random.default_rng(seed)
        a = skill * (1 - skill) / spread**2 - 1  # of a Beta distribution with this mean and spread
        of_task = rng.beta(skill * a, (1 - skill) * a, (repeats, n))
        return torch.tensor(rng.binomial(queries, of_task) / queries)

    # cell 53f5d5e5
    def coverage(half_width, n=600, repeats=2000):
        "How often mean ± half_width(accuracies) covers the true 50%."
        a = accuracies(n, repeats=repeats, seed=1)
        return (
            ((a.mean(1) - 0.5).abs() <= torch.tensor([half_width(row) for row in a]))
            .double()
            .mean()
            .item()
        )

    # cell 8ad74ca9
    torch.manual_seed(0)
    hard = accuracies(600)[0].float()  # shared by both methods
    noise = 0.03 * torch.randn(2, 600)
    b, a = Score(hard + 0.01 + noise[0]), Score(hard + noise[1])
    difference = paired(b, a)
    covariance = torch.cov(torch.stack([a.per_task, b.per_task]))
    expected = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert abs(difference.per_task.var() - expected) < 1e-6
    assert difference.mean == pytest.approx(b.mean - a.mean, abs=1e-6)
    assert difference.ci95 < 0.6 * math.hypot(a.ci95, b.ci95)
    assert str(difference).startswith("accuracy difference +1.") and difference.queries == "joint"
    assert paired(a, Score(hard, queries="single")).queries == "mixed"
    for other, message in [
        (Score(hard, episodes="others"), "same episodes"),
        (Score(hard, "mse"), "cannot be compared"),
    ]:
        with pytest.raises(ValueError, match=message):
            paired(a, other)


@pytest.mark.proves("eq-single-query")
def test_joint_and_single_queries():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell c886e8de
    tasks = FewShot(images(), way=3, shot=1, query=5)
    for stats, alone in [("batch", False), ("support", True), ("running", True)]:
        learner = small_net(stats).eval()
        episodes = next(tasks.freeze(1).episodes())
        S, Q = (Examples(side.x[0], side.y[0]) for side in episodes)
        phi = learner.adapt(S)
        by_hand = torch.cat([learner.predict(phi, Q.x[j : j + 1]) for j in range(15)])
        [(single, _)] = answers(learner, tasks.freeze(1), "single")
        [(joint, _)] = answers(learner, tasks.freeze(1), "joint")
        assert torch.allclose(single[0], by_hand, atol=1e-4)
        assert by_hand.requires_grad and not single.requires_grad
        assert torch.allclose(single, joint, atol=1e-4) == alone
        assert learner.transductive != alone


def test_evaluation_changes_nothing(device):
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell c886e8de
    tasks = FewShot(images(), way=3, shot=1, query=5)
    for stats, alone in [("batch", False), ("support", True), ("running", True)]:
        learner = small_net(stats).eval()
        episodes = next(tasks.freeze(1).episodes())
        S, Q = (Examples(side.x[0], side.y[0]) for side in episodes)
        phi = learner.adapt(S)
        by_hand = torch.cat([learner.predict(phi, Q.x[j : j + 1]) for j in range(15)])
        [(single, _)] = answers(learner, tasks.freeze(1), "single")
        [(joint, _)] = answers(learner, tasks.freeze(1), "joint")
        assert torch.allclose(single[0], by_hand, atol=1e-4)
        assert by_hand.requires_grad and not single.requires_grad
        assert torch.allclose(single, joint, atol=1e-4) == alone
        assert learner.transductive != alone
    # cell ad4a388a
    learner = small_net("running").to(device)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    tasks = FewShot(images(), way=3, shot=1, query=5)
    expected = evaluate(learner.eval(), tasks, 20)
    first = evaluate(learner.train(), tasks, 20)  # in evaluation mode, and then back
    torch.manual_seed(123)  # whatever else drew random numbers in the meantime
    second = evaluate(learner, tasks, 20, engine=Engine(lift="loop"), batch=7)
    assert torch.equal(first.per_task, expected.per_task)
    assert first.episodes == second.episodes
    assert torch.allclose(first.per_task, second.per_task)
    assert learner.training and all(p.grad is None for p in learner.parameters())
    for name, value in learner.state_dict().items():
        assert torch.equal(before[name], value)


def test_answers_come_in_the_precision_asked_for(device):
    # cell cbb3ed73
    torch.manual_seed(0)
    wave = MAML(MLP([1, 40, 1]), kind="regression").to(device)
    some = Sinusoids().freeze(4)
    exact, rough = (
        evaluate(wave, some, engine=Engine(precision=p)).per_task for p in ("float32", "bfloat16")
    )
    assert 1e-4 < ((rough - exact).abs() / exact).max() < 0.5


def test_what_does_not_fit_is_refused(device):
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell c886e8de
    tasks = FewShot(images(), way=3, shot=1, query=5)
    for stats, alone in [("batch", False), ("support", True), ("running", True)]:
        learner = small_net(stats).eval()
        episodes = next(tasks.freeze(1).episodes())
        S, Q = (Examples(side.x[0], side.y[0]) for side in episodes)
        phi = learner.adapt(S)
        by_hand = torch.cat([learner.predict(phi, Q.x[j : j + 1]) for j in range(15)])
        [(single, _)] = answers(learner, tasks.freeze(1), "single")
        [(joint, _)] = answers(learner, tasks.freeze(1), "joint")
        assert torch.allclose(single[0], by_hand, atol=1e-4)
        assert by_hand.requires_grad and not single.requires_grad
        assert torch.allclose(single, joint, atol=1e-4) == alone
        assert learner.transductive != alone
    # cell ad4a388a
    learner = small_net("running").to(device)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    tasks = FewShot(images(), way=3, shot=1, query=5)
    expected = evaluate(learner.eval(), tasks, 20)
    first = evaluate(learner.train(), tasks, 20)  # in evaluation mode, and then back
    torch.manual_seed(123)  # whatever else drew random numbers in the meantime
    second = evaluate(learner, tasks, 20, engine=Engine(lift="loop"), batch=7)
    assert torch.equal(first.per_task, expected.per_task)
    assert first.episodes == second.episodes
    assert torch.allclose(first.per_task, second.per_task)
    assert learner.training and all(p.grad is None for p in learner.parameters())
    for name, value in learner.state_dict().items():
        assert torch.equal(before[name], value)
    # cell 790969cf
    tasks = FewShot(images(), way=3, shot=1, query=5)
    with pytest.raises(
        ValueError, match="classification learner cannot be used on regression tasks"
    ):
        evaluate(small_net("batch"), Sinusoids())
    with pytest.raises((ValueError, TypeError), match="'one'"):
        answers(small_net("batch"), tasks.freeze(2), "one")
    with pytest.raises(ValueError, match="3"):
        evaluate(MAML(Conv4(1, out=5, size=16, width=4)), tasks, 2)
    assert place(small_net("batch"), "meta").type == "meta"  # moved, and says where it is


@pytest.mark.proves("eq-outer-update")
def test_one_outer_step_by_hand():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 3733d06d
    for lift in ("loop", "vmap"):
        learner, outer, values = one_step(lift=lift)
        assert values.tolist() == [1.0, 0.0] and outer.norm == pytest.approx(2)
        assert not values.requires_grad
        assert learner.theta.item() == pytest.approx(0.2)
        outer.step(two_tasks())  # derivatives -2.4 and 0.4 at 0.2, their mean -1
        assert learner.theta.item() == pytest.approx(0.3)


@pytest.mark.proves("eq-clip")
def test_one_clipped_step_by_hand():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 3733d06d
    for lift in ("loop", "vmap"):
        learner, outer, values = one_step(lift=lift)
        assert values.tolist() == [1.0, 0.0] and outer.norm == pytest.approx(2)
        assert not values.requires_grad
        assert learner.theta.item() == pytest.approx(0.2)
        outer.step(two_tasks())  # derivatives -2.4 and 0.4 at 0.2, their mean -1
        assert learner.theta.item() == pytest.approx(0.3)
    # cell 89daeaac
    for clip, theta in [(1.0, 0.1), (5.0, 0.2)]:  # a norm below the bound stays as it is
        learner, outer, _ = one_step(clip=clip)
        assert learner.theta.item() == pytest.approx(theta, rel=1e-4)
    with pytest.raises(ValueError, match="clip=0"):
        one_step(clip=0.0)


def test_tasks_are_told_how_it_went():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 7073776a
    class Listening(Sightings):
        "Keeps what it is told."

        def feedback(self, report):
            reports.append(report)

    reports, learner = [], Shrink()
    run = fit(learner, Listening(query=3), steps=2, meta_batch=4, log_every=1, progress=False)
    assert [report.losses.mean().item() for report in reports] == run.curve("loss")[1]
    first = reports[0]  # theta was zero, and so were the answers
    assert torch.equal(first.answers, torch.zeros(4, 3, 1))
    torch.testing.assert_close(first.losses, first.episodes.query.y.square().mean((1, 2)))


@pytest.mark.proves("eq-shrinkage")
def test_fit_finds_what_the_pencil_found():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 7073776a
    class Listening(Sightings):
        "Keeps what it is told."

        def feedback(self, report):
            reports.append(report)

    reports, learner = [], Shrink()
    run = fit(learner, Listening(query=3), steps=2, meta_batch=4, log_every=1, progress=False)
    assert [report.losses.mean().item() for report in reports] == run.curve("loss")[1]
    first = reports[0]  # theta was zero, and so were the answers
    assert torch.equal(first.answers, torch.zeros(4, 3, 1))
    torch.testing.assert_close(first.losses, first.episodes.query.y.square().mean((1, 2)))

    # cell f5827b51
    def trained(shot):
        "What the smallest learner learns from tasks with so many sightings."
        learner = Shrink()
        decay = lambda step: 1 / (1 + step / 20)  # noqa: E731
        fit(
            learner,
            Sightings(shot),
            steps=200,
            meta_batch=128,
            lr=0.2,
            schedule=decay,
            progress=False,
        )
        return learner.theta.item()

    for shot in (1, 2, 5):
        theta = trained(shot)
        print(f"{shot} sightings: learned {theta:.3f}, exact {shot / (shot + 1):.3f}")
        assert abs(theta - shot / (shot + 1)) < 0.05


@pytest.mark.proves("eq-selection")
def test_the_best_parameters_are_kept():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 7073776a
    class Listening(Sightings):
        "Keeps what it is told."

        def feedback(self, report):
            reports.append(report)

    reports, learner = [], Shrink()
    run = fit(learner, Listening(query=3), steps=2, meta_batch=4, log_every=1, progress=False)
    assert [report.losses.mean().item() for report in reports] == run.curve("loss")[1]
    first = reports[0]  # theta was zero, and so were the answers
    assert torch.equal(first.answers, torch.zeros(4, 3, 1))
    torch.testing.assert_close(first.losses, first.episodes.query.y.square().mean((1, 2)))

    # cell f5827b51
    def trained(shot):
        "What the smallest learner learns from tasks with so many sightings."
        learner = Shrink()
        decay = lambda step: 1 / (1 + step / 20)  # noqa: E731
        fit(
            learner,
            Sightings(shot),
            steps=200,
            meta_batch=128,
            lr=0.2,
            schedule=decay,
            progress=False,
        )
        return learner.theta.item()

    for shot in (1, 2, 5):
        theta = trained(shot)
        print(f"{shot} sightings: learned {theta:.3f}, exact {shot / (shot + 1):.3f}")
        assert abs(theta - shot / (shot + 1)) < 0.05

    # cell 254f7d93
    def kept(metric, scores):
        "The parameter that a run keeps when the validation scores after each step are these."
        learner = Shrink()
        run = Run(learner, Sightings(), Outer(learner, torch.optim.SGD(learner.param_groups())))
        for step, value in enumerate(scores):
            learner.theta.data.fill_(step)
            run.consider(Score(torch.full((2,), value), metric))
        run.finish()
        return learner.theta.item()

    assert kept("accuracy", [0.3, 0.5, 0.4]) == 1
    assert kept("mse", [0.5, 0.3, 0.4]) == 1
    assert kept("mse", [math.nan, 0.5, math.nan]) == 1
    assert kept("mse", [math.nan, math.nan]) == 1  # nothing is known to be better than the latest


def test_each_phase_has_its_mode():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 7073776a
    class Listening(Sightings):
        "Keeps what it is told."

        def feedback(self, report):
            reports.append(report)

    reports, learner = [], Shrink()
    run = fit(learner, Listening(query=3), steps=2, meta_batch=4, log_every=1, progress=False)
    assert [report.losses.mean().item() for report in reports] == run.curve("loss")[1]
    first = reports[0]  # theta was zero, and so were the answers
    assert torch.equal(first.answers, torch.zeros(4, 3, 1))
    torch.testing.assert_close(first.losses, first.episodes.query.y.square().mean((1, 2)))

    # cell f5827b51
    def trained(shot):
        "What the smallest learner learns from tasks with so many sightings."
        learner = Shrink()
        decay = lambda step: 1 / (1 + step / 20)  # noqa: E731
        fit(
            learner,
            Sightings(shot),
            steps=200,
            meta_batch=128,
            lr=0.2,
            schedule=decay,
            progress=False,
        )
        return learner.theta.item()

    for shot in (1, 2, 5):
        theta = trained(shot)
        print(f"{shot} sightings: learned {theta:.3f}, exact {shot / (shot + 1):.3f}")
        assert abs(theta - shot / (shot + 1)) < 0.05

    # cell 254f7d93
    def kept(metric, scores):
        "The parameter that a run keeps when the validation scores after each step are these."
        learner = Shrink()
        run = Run(learner, Sightings(), Outer(learner, torch.optim.SGD(learner.param_groups())))
        for step, value in enumerate(scores):
            learner.theta.data.fill_(step)
            run.consider(Score(torch.full((2,), value), metric))
        run.finish()
        return learner.theta.item()

    assert kept("accuracy", [0.3, 0.5, 0.4]) == 1
    assert kept("mse", [0.5, 0.3, 0.4]) == 1
    assert kept("mse", [math.nan, 0.5, math.nan]) == 1
    assert kept("mse", [math.nan, math.nan]) == 1  # nothing is known to be better than the latest
    # cell 0f941697
    modes = {"loss": set(), "predict": set()}

    class Watched(Shrink):
        "Keeps a record of its mode."

        def loss(self, episode):
            modes["loss"].add(self.training)
            return super().loss(episode)

        def predict(self, state, x):
            modes["predict"].add(self.training)
            return super().predict(state, x)

    run = fit(
        Watched().eval(),
        Sightings(),
        steps=2,
        meta_batch=4,
        validate=Sightings(),
        every=1,
        progress=False,
    )
    assert modes == {"loss": {True}, "predict": {True, False}} and not run.learner.training


def test_a_bad_run_is_refused_before_it_begins():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 7073776a
    class Listening(Sightings):
        "Keeps what it is told."

        def feedback(self, report):
            reports.append(report)

    reports, learner = [], Shrink()
    run = fit(learner, Listening(query=3), steps=2, meta_batch=4, log_every=1, progress=False)
    assert [report.losses.mean().item() for report in reports] == run.curve("loss")[1]
    first = reports[0]  # theta was zero, and so were the answers
    assert torch.equal(first.answers, torch.zeros(4, 3, 1))
    torch.testing.assert_close(first.losses, first.episodes.query.y.square().mean((1, 2)))

    # cell f5827b51
    def trained(shot):
        "What the smallest learner learns from tasks with so many sightings."
        learner = Shrink()
        decay = lambda step: 1 / (1 + step / 20)  # noqa: E731
        fit(
            learner,
            Sightings(shot),
            steps=200,
            meta_batch=128,
            lr=0.2,
            schedule=decay,
            progress=False,
        )
        return learner.theta.item()

    for shot in (1, 2, 5):
        theta = trained(shot)
        print(f"{shot} sightings: learned {theta:.3f}, exact {shot / (shot + 1):.3f}")
        assert abs(theta - shot / (shot + 1)) < 0.05

    # cell 254f7d93
    def kept(metric, scores):
        "The parameter that a run keeps when the validation scores after each step are these."
        learner = Shrink()
        run = Run(learner, Sightings(), Outer(learner, torch.optim.SGD(learner.param_groups())))
        for step, value in enumerate(scores):
            learner.theta.data.fill_(step)
            run.consider(Score(torch.full((2,), value), metric))
        run.finish()
        return learner.theta.item()

    assert kept("accuracy", [0.3, 0.5, 0.4]) == 1
    assert kept("mse", [0.5, 0.3, 0.4]) == 1
    assert kept("mse", [math.nan, 0.5, math.nan]) == 1
    assert kept("mse", [math.nan, math.nan]) == 1  # nothing is known to be better than the latest
    # cell 0f941697
    modes = {"loss": set(), "predict": set()}

    class Watched(Shrink):
        "Keeps a record of its mode."

        def loss(self, episode):
            modes["loss"].add(self.training)
            return super().loss(episode)

        def predict(self, state, x):
            modes["predict"].add(self.training)
            return super().predict(state, x)

    run = fit(
        Watched().eval(),
        Sightings(),
        steps=2,
        meta_batch=4,
        validate=Sightings(),
        every=1,
        progress=False,
    )
    assert modes == {"loss": {True}, "predict": {True, False}} and not run.learner.training
    # cell b8bb18a5
    for wrong, message in [
        (
            dict(tasks=FewShot(images(), 3, 1, 5)),
            "regression learner cannot be used on classification",
        ),
        (
            dict(validate=FewShot(images(), 3, 1, 5)),
            "regression learner cannot be used on classification",
        ),
        (dict(steps=0), "steps=0"),
        (dict(every=-1), "every=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(Shrink(), **({"tasks": Sightings(), "steps": 2, "progress": False} | wrong))
    room = tempfile.TemporaryDirectory()
    with pytest.raises(TypeError, match="cannot be saved by name"):  # nobody registered this class
        fit(Shrink(), Sightings(), steps=2, folder=Path(room.name) / "run", progress=False)
    assert not (Path(room.name) / "run").exists()


def test_the_log_and_the_folder():
    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 5b6b343b
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    run = wave_run(steps=5, folder=folder, notes={"author": "you"})
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and rows[0]["settings"]["meta_batch"] == 4
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert run.curve("validation")[0] == [2, 4, 5] and run.best.mean == min(
        run.curve("validation")[1]
    )
    assert {"lr", "gradient_norm", "tasks_per_second", "seconds"} <= set(rows[1])
    assert "loss" in run.status() and "best" in run.status()

    config = json.loads((folder / "config.json").read_text())
    assert "query=10" in config["tasks"]["tasks"] and "query=15" in config["validation"]["tasks"]
    assert config["method"]["args"]["steps"] == 1 and config["method"]["args"]["test_steps"] == 2
    assert (
        config["author"] == "you"
        and config["training"]["steps_taken"] == 5
        and config["training"]["optimizer"] == "Adam"
    )

    again = metabook.load(folder)
    frozen = Sinusoids(5, 10).freeze(20, seed=9)
    assert torch.equal(evaluate(run.learner, frozen).per_task, evaluate(again, frozen).per_task)
    with pytest.raises(FileExistsError, match="already holds a run"):
        wave_run(folder=folder)


def test_a_run_goes_on_where_it_was_left():
    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 5b6b343b
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    run = wave_run(steps=5, folder=folder, notes={"author": "you"})
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and rows[0]["settings"]["meta_batch"] == 4
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert run.curve("validation")[0] == [2, 4, 5] and run.best.mean == min(
        run.curve("validation")[1]
    )
    assert {"lr", "gradient_norm", "tasks_per_second", "seconds"} <= set(rows[1])
    assert "loss" in run.status() and "best" in run.status()

    config = json.loads((folder / "config.json").read_text())
    assert "query=10" in config["tasks"]["tasks"] and "query=15" in config["validation"]["tasks"]
    assert config["method"]["args"]["steps"] == 1 and config["method"]["args"]["test_steps"] == 2
    assert (
        config["author"] == "you"
        and config["training"]["steps_taken"] == 5
        and config["training"]["optimizer"] == "Adam"
    )

    again = metabook.load(folder)
    frozen = Sinusoids(5, 10).freeze(20, seed=9)
    assert torch.equal(evaluate(run.learner, frozen).per_task, evaluate(again, frozen).per_task)
    with pytest.raises(FileExistsError, match="already holds a run"):
        wave_run(folder=folder)

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log


def test_another_run_does_not_go_on():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 5b6b343b
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    run = wave_run(steps=5, folder=folder, notes={"author": "you"})
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and rows[0]["settings"]["meta_batch"] == 4
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert run.curve("validation")[0] == [2, 4, 5] and run.best.mean == min(
        run.curve("validation")[1]
    )
    assert {"lr", "gradient_norm", "tasks_per_second", "seconds"} <= set(rows[1])
    assert "loss" in run.status() and "best" in run.status()

    config = json.loads((folder / "config.json").read_text())
    assert "query=10" in config["tasks"]["tasks"] and "query=15" in config["validation"]["tasks"]
    assert config["method"]["args"]["steps"] == 1 and config["method"]["args"]["test_steps"] == 2
    assert (
        config["author"] == "you"
        and config["training"]["steps_taken"] == 5
        and config["training"]["optimizer"] == "Adam"
    )

    again = metabook.load(folder)
    frozen = Sinusoids(5, 10).freeze(20, seed=9)
    assert torch.equal(evaluate(run.learner, frozen).per_task, evaluate(again, frozen).per_task)
    with pytest.raises(FileExistsError, match="already holds a run"):
        wave_run(folder=folder)

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log
    # cell f612cd90
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    wave_run(steps=4, folder=folder)
    for how, message in [
        (dict(lr=0.5), "settings.lr was 0.001 and is 0.5"),
        (dict(seed=1), "settings.seed was 0 and is 1"),
        (dict(schedule=falling), "rates.1 was 1.0 and is 0.5"),
        (dict(optimizer=torch.optim.SGD), "settings.optimizer was 'Adam' and is 'SGD'"),
        (dict(steps=3), "steps=3, but the run in .* has taken 4 already: ask for more"),
        (dict(folder=None), "resume=True, but there is no folder"),
        (dict(meta_batch=8), "settings.meta_batch was 4 and is 8"),
        (dict(keep=-1), "keep=-1: expected how many"),
        (dict(notes={"recipe": "another"}), "notes.recipe was None and is 'another'"),
    ]:
        with pytest.raises(ValueError, match=message):
            wave_run(**({"steps": 4, "folder": folder, "resume": True} | how))
    with pytest.raises(ValueError, match=r"learner.args.lr was 0.01 and is 0.02"):
        other = MAML(MLP([1, 8, 1]), lr=0.02, kind="regression", test_steps=2)
        how = dict(meta_batch=4, every=2, log_every=2, validate=Sinusoids(5, 15), progress=False)
        fit(other, Sinusoids(5, 10), steps=4, folder=folder, resume=True, **how)

    _, said = heard_from(
        lambda: wave_run(
            steps=6, folder=folder, resume=True, clip=9.0, engine=Engine(nonfinite="skip")
        )
    )
    told = (
        "the run goes on, but not as it would have: clip was None and is 9.0; nonfinite was 'stop'"
    )
    assert said[0].startswith(told)
    shutil.rmtree(folder / "checkpoints")  # to make room
    with pytest.raises(FileExistsError, match="a trained learner, and no checkpoint to go on from"):
        wave_run(steps=8, folder=folder, resume=True)

    class Brooding(Sightings):
        "Learns from feedback, and cannot say what."

        def feedback(self, report):
            pass

    waves = MAML(MLP([1, 8, 1]), kind="regression")
    with pytest.raises(TypeError, match="give them state_dict and load_state_dict"):
        fit(waves, Brooding(), steps=2, folder=Path(room.name) / "other", progress=False)


def test_an_interrupted_run_keeps_what_it_learned():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 5b6b343b
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    run = wave_run(steps=5, folder=folder, notes={"author": "you"})
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and rows[0]["settings"]["meta_batch"] == 4
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert run.curve("validation")[0] == [2, 4, 5] and run.best.mean == min(
        run.curve("validation")[1]
    )
    assert {"lr", "gradient_norm", "tasks_per_second", "seconds"} <= set(rows[1])
    assert "loss" in run.status() and "best" in run.status()

    config = json.loads((folder / "config.json").read_text())
    assert "query=10" in config["tasks"]["tasks"] and "query=15" in config["validation"]["tasks"]
    assert config["method"]["args"]["steps"] == 1 and config["method"]["args"]["test_steps"] == 2
    assert (
        config["author"] == "you"
        and config["training"]["steps_taken"] == 5
        and config["training"]["optimizer"] == "Adam"
    )

    again = metabook.load(folder)
    frozen = Sinusoids(5, 10).freeze(20, seed=9)
    assert torch.equal(evaluate(run.learner, frozen).per_task, evaluate(again, frozen).per_task)
    with pytest.raises(FileExistsError, match="already holds a run"):
        wave_run(folder=folder)

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log
    # cell f612cd90
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    wave_run(steps=4, folder=folder)
    for how, message in [
        (dict(lr=0.5), "settings.lr was 0.001 and is 0.5"),
        (dict(seed=1), "settings.seed was 0 and is 1"),
        (dict(schedule=falling), "rates.1 was 1.0 and is 0.5"),
        (dict(optimizer=torch.optim.SGD), "settings.optimizer was 'Adam' and is 'SGD'"),
        (dict(steps=3), "steps=3, but the run in .* has taken 4 already: ask for more"),
        (dict(folder=None), "resume=True, but there is no folder"),
        (dict(meta_batch=8), "settings.meta_batch was 4 and is 8"),
        (dict(keep=-1), "keep=-1: expected how many"),
        (dict(notes={"recipe": "another"}), "notes.recipe was None and is 'another'"),
    ]:
        with pytest.raises(ValueError, match=message):
            wave_run(**({"steps": 4, "folder": folder, "resume": True} | how))
    with pytest.raises(ValueError, match=r"learner.args.lr was 0.01 and is 0.02"):
        other = MAML(MLP([1, 8, 1]), lr=0.02, kind="regression", test_steps=2)
        how = dict(meta_batch=4, every=2, log_every=2, validate=Sinusoids(5, 15), progress=False)
        fit(other, Sinusoids(5, 10), steps=4, folder=folder, resume=True, **how)

    _, said = heard_from(
        lambda: wave_run(
            steps=6, folder=folder, resume=True, clip=9.0, engine=Engine(nonfinite="skip")
        )
    )
    told = (
        "the run goes on, but not as it would have: clip was None and is 9.0; nonfinite was 'stop'"
    )
    assert said[0].startswith(told)
    shutil.rmtree(folder / "checkpoints")  # to make room
    with pytest.raises(FileExistsError, match="a trained learner, and no checkpoint to go on from"):
        wave_run(steps=8, folder=folder, resume=True)

    class Brooding(Sightings):
        "Learns from feedback, and cannot say what."

        def feedback(self, report):
            pass

    waves = MAML(MLP([1, 8, 1]), kind="regression")
    with pytest.raises(TypeError, match="give them state_dict and load_state_dict"):
        fit(waves, Brooding(), steps=2, folder=Path(room.name) / "other", progress=False)

    # cell f44ee589
    def interrupt_at(step):
        "A schedule under which somebody presses Ctrl-C."

        def rate(taken):
            if taken == step:
                raise KeyboardInterrupt
            return 1.0

        return rate

    def asked_at(step):
        "A schedule under which somebody asks the process to stop."

        def rate(taken):
            if taken == step:
                signal.raise_signal(signal.SIGTERM)
            return 1.0

        return rate

    room = tempfile.TemporaryDirectory()
    polite, abrupt = Path(room.name) / "polite", Path(room.name) / "abrupt"
    run, (asked, first) = heard_from(lambda: wave_run(1000, folder=polite, schedule=asked_at(5)))
    _, (second,) = heard_from(lambda: wave_run(1000, folder=abrupt, schedule=interrupt_at(5)))
    assert run.interrupted and run.outer.taken == 5
    assert asked == "asked to stop: after this step (ask again to stop at once)"
    assert first.startswith("interrupted: 5 steps in")
    assert "to go on from the checkpoint of step 5" in first and "step 4" in second
    assert run.best_step in (2, 4) and not run.learner.training
    assert all(torch.equal(v, run.best_state[k]) for k, v in run.learner.state_dict().items())
    assert metabook.load(polite).lr == metabook.load(abrupt).lr == 0.01
    print(first)


def test_a_full_disk_costs_only_what_came_after():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 5b6b343b
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    run = wave_run(steps=5, folder=folder, notes={"author": "you"})
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and rows[0]["settings"]["meta_batch"] == 4
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert run.curve("validation")[0] == [2, 4, 5] and run.best.mean == min(
        run.curve("validation")[1]
    )
    assert {"lr", "gradient_norm", "tasks_per_second", "seconds"} <= set(rows[1])
    assert "loss" in run.status() and "best" in run.status()

    config = json.loads((folder / "config.json").read_text())
    assert "query=10" in config["tasks"]["tasks"] and "query=15" in config["validation"]["tasks"]
    assert config["method"]["args"]["steps"] == 1 and config["method"]["args"]["test_steps"] == 2
    assert (
        config["author"] == "you"
        and config["training"]["steps_taken"] == 5
        and config["training"]["optimizer"] == "Adam"
    )

    again = metabook.load(folder)
    frozen = Sinusoids(5, 10).freeze(20, seed=9)
    assert torch.equal(evaluate(run.learner, frozen).per_task, evaluate(again, frozen).per_task)
    with pytest.raises(FileExistsError, match="already holds a run"):
        wave_run(folder=folder)

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log
    # cell f612cd90
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    wave_run(steps=4, folder=folder)
    for how, message in [
        (dict(lr=0.5), "settings.lr was 0.001 and is 0.5"),
        (dict(seed=1), "settings.seed was 0 and is 1"),
        (dict(schedule=falling), "rates.1 was 1.0 and is 0.5"),
        (dict(optimizer=torch.optim.SGD), "settings.optimizer was 'Adam' and is 'SGD'"),
        (dict(steps=3), "steps=3, but the run in .* has taken 4 already: ask for more"),
        (dict(folder=None), "resume=True, but there is no folder"),
        (dict(meta_batch=8), "settings.meta_batch was 4 and is 8"),
        (dict(keep=-1), "keep=-1: expected how many"),
        (dict(notes={"recipe": "another"}), "notes.recipe was None and is 'another'"),
    ]:
        with pytest.raises(ValueError, match=message):
            wave_run(**({"steps": 4, "folder": folder, "resume": True} | how))
    with pytest.raises(ValueError, match=r"learner.args.lr was 0.01 and is 0.02"):
        other = MAML(MLP([1, 8, 1]), lr=0.02, kind="regression", test_steps=2)
        how = dict(meta_batch=4, every=2, log_every=2, validate=Sinusoids(5, 15), progress=False)
        fit(other, Sinusoids(5, 10), steps=4, folder=folder, resume=True, **how)

    _, said = heard_from(
        lambda: wave_run(
            steps=6, folder=folder, resume=True, clip=9.0, engine=Engine(nonfinite="skip")
        )
    )
    told = (
        "the run goes on, but not as it would have: clip was None and is 9.0; nonfinite was 'stop'"
    )
    assert said[0].startswith(told)
    shutil.rmtree(folder / "checkpoints")  # to make room
    with pytest.raises(FileExistsError, match="a trained learner, and no checkpoint to go on from"):
        wave_run(steps=8, folder=folder, resume=True)

    class Brooding(Sightings):
        "Learns from feedback, and cannot say what."

        def feedback(self, report):
            pass

    waves = MAML(MLP([1, 8, 1]), kind="regression")
    with pytest.raises(TypeError, match="give them state_dict and load_state_dict"):
        fit(waves, Brooding(), steps=2, folder=Path(room.name) / "other", progress=False)

    # cell f44ee589
    def interrupt_at(step):
        "A schedule under which somebody presses Ctrl-C."

        def rate(taken):
            if taken == step:
                raise KeyboardInterrupt
            return 1.0

        return rate

    def asked_at(step):
        "A schedule under which somebody asks the process to stop."

        def rate(taken):
            if taken == step:
                signal.raise_signal(signal.SIGTERM)
            return 1.0

        return rate

    room = tempfile.TemporaryDirectory()
    polite, abrupt = Path(room.name) / "polite", Path(room.name) / "abrupt"
    run, (asked, first) = heard_from(lambda: wave_run(1000, folder=polite, schedule=asked_at(5)))
    _, (second,) = heard_from(lambda: wave_run(1000, folder=abrupt, schedule=interrupt_at(5)))
    assert run.interrupted and run.outer.taken == 5
    assert asked == "asked to stop: after this step (ask again to stop at once)"
    assert first.startswith("interrupted: 5 steps in")
    assert "to go on from the checkpoint of step 5" in first and "step 4" in second
    assert run.best_step in (2, 4) and not run.learner.training
    assert all(torch.equal(v, run.best_state[k]) for k, v in run.learner.state_dict().items())
    assert metabook.load(polite).lr == metabook.load(abrupt).lr == 0.01
    print(first)
    # cell 7b52ca61
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    disk, full = os.fsync, []

    def fsync(file):
        "A disk that is full when the run has taken four steps."
        if (folder / "checkpoints" / "step-00000004.json").exists():
            full.append(file)
            raise OSError(errno.ENOSPC, "No space left on device")
        disk(file)

    os.fsync = fsync
    try:
        with pytest.raises(
            OSError, match=r"after step 6; make room .* the checkpoint of step 4"
        ) as told:
            wave_run(steps=8, folder=folder)
    finally:
        os.fsync = disk
    print(told.value)
    assert (
        full and told.value.errno == errno.ENOSPC and "could not be written into" in str(told.value)
    )
    assert not list(folder.rglob("*.part")) and metabook.load(folder).lr == 0.01
    with quiet():
        run = wave_run(steps=8, folder=folder, resume=True)
    assert without_clocks(run) == without_clocks(
        wave_run(steps=8, folder=Path(room.name) / "whole")
    )


@pytest.mark.proves("eq-ece")
def test_the_calibration_error_by_hand():
    # cell fe2b3ecc
    def an_answer(confidence, right):
        "Logits of three classes for one answer, whose target is class 0."
        p = torch.full((3,), (1 - confidence) / 2)
        p[0 if right else 1] = confidence
        return p.log()

    said = [(0.4, True), (0.4, False), (0.9, True), (0.8, True), (0.7, False)]
    logits = torch.stack([an_answer(*one) for one in said])[None]
    by_hand = Calibration(*binned(logits, torch.eye(3)[[0] * 5][None], bins=2))
    assert by_hand.ece == pytest.approx(0.12)
    confidence, accuracy, share = by_hand.curve()
    assert torch.allclose(confidence, torch.tensor([0.4, 0.8])) and share.tolist() == pytest.approx(
        [0.4, 0.6]
    )
    assert torch.allclose(accuracy, torch.tensor([1 / 2, 2 / 3]))


@pytest.mark.proves("eq-jackknife")
def test_the_jackknife_agrees_with_what_it_replaces():
    # cell 8e40e006
    def overconfident(tasks, seed):
        "Answers with confidence 0.7 or 0.9; the tasks differ, and most answers are less often right."
        g = torch.Generator().manual_seed(seed)
        sure = torch.rand(tasks, 20, generator=g) < 0.5
        confidence = torch.where(sure, 0.9, 0.7)
        skill = confidence - 0.3 * torch.rand(tasks, 1, generator=g)
        hits = (torch.rand(tasks, 20, generator=g) < skill).float()
        columns = [
            torch.stack([(v * m).sum(1) for m in (~sure, sure)], 1)
            for v in (torch.ones_like(hits), confidence, hits)
        ]
        return Calibration(*columns)

    one = overconfident(300, seed=0)
    gaps = (one.confidence - one.hits).sum(1) / 20
    assert one.ece == pytest.approx(gaps.mean().item(), abs=1e-6)
    assert one.ci95 == pytest.approx(Score(gaps).ci95, rel=1e-4)

    many = torch.tensor([overconfident(100, seed=s).ece for s in range(400)])
    assert overconfident(100, seed=1).ci95 == pytest.approx(1.96 * many.std().item(), rel=0.2)


@pytest.mark.proves("eq-temperature")
def test_temperature_changes_confidence_only():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fe2b3ecc
    def an_answer(confidence, right):
        "Logits of three classes for one answer, whose target is class 0."
        p = torch.full((3,), (1 - confidence) / 2)
        p[0 if right else 1] = confidence
        return p.log()

    said = [(0.4, True), (0.4, False), (0.9, True), (0.8, True), (0.7, False)]
    logits = torch.stack([an_answer(*one) for one in said])[None]
    by_hand = Calibration(*binned(logits, torch.eye(3)[[0] * 5][None], bins=2))
    assert by_hand.ece == pytest.approx(0.12)
    confidence, accuracy, share = by_hand.curve()
    assert torch.allclose(confidence, torch.tensor([0.4, 0.8])) and share.tolist() == pytest.approx(
        [0.4, 0.6]
    )
    assert torch.allclose(accuracy, torch.tensor([1 / 2, 2 / 3]))

    # cell 0d9c31e0
    class Sure(Learner):
        "Always gives logits ln 9 to the first class and 0 to the second."

        def adapt(self, support):
            return support.y

        def predict(self, state, x):
            return torch.tensor([math.log(9.0), 0.0]).expand(len(x), 2)

    tasks = FewShot(images(), way=2, shot=1, query=5)
    for temperature, confidence in [(1.0, 0.9), (2.0, 0.75)]:
        measured, accuracy, _ = calibration(Sure(), tasks, 10, temperature=temperature).curve()
        assert measured.item() == pytest.approx(confidence) and accuracy.item() == 0.5
    for wrong in (0.0, math.nan):
        with pytest.raises(ValueError, match="positive temperature"):
            calibration(Sure(), tasks, 10, temperature=wrong)
    with pytest.raises(ValueError, match="regression"):
        calibration(Shrink(), Sightings(), 10)


def test_the_best_of_twenty_is_lucky():
    # cell 2a12a91c
    def accuracies(n, skill=0.5, queries=75, spread=0.08, repeats=1, seed=0):
        "Accuracies [repeats, n] of a simulated learner: every task has its own difficulty."
        rng = np.random.default_rng(seed)
        a = skill * (1 - skill) / spread**2 - 1  # of a Beta distribution with this mean and spread
        of_task = rng.beta(skill * a, (1 - skill) * a, (repeats, n))
        return torch.tensor(rng.binomial(queries, of_task) / queries)

    # cell 53f5d5e5
    def coverage(half_width, n=600, repeats=2000):
        "How often mean ± half_width(accuracies) covers the true 50%."
        a = accuracies(n, repeats=repeats, seed=1)
        return (
            ((a.mean(1) - 0.5).abs() <= torch.tensor([half_width(row) for row in a]))
            .double()
            .mean()
            .item()
        )

    # cell 685bdaab
    validation, test = (
        accuracies(100, repeats=20 * 200, seed=s).mean(1).reshape(200, 20) for s in (6, 7)
    )
    error = accuracies(10_000, seed=8).std().item() / 100**0.5
    chosen_on_test = test.max(1).values.mean().item() - 0.5
    chosen_on_validation = test.gather(1, validation.argmax(1, keepdim=True)).mean().item() - 0.5
    print(
        f"reported too much: {chosen_on_test:.2%} (chosen on test), {chosen_on_validation:.2%} (on validation)"
    )
    assert abs(chosen_on_test / error - 1.87) < 0.2
    assert abs(chosen_on_validation) < 0.2 * error


def test_sealed_test_tasks_catch_a_peek():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))


def test_training_never_meets_the_test_tasks():
    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))
    # cell f7852066
    naive = Sinusoids().sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(
        naive.support.x, next(Sinusoids().freeze(600, seed=0).episodes(25)).support.x
    )  # !

    seen = []

    class Recorded(Sinusoids):
        "Sinusoids that keep a record of what was drawn."

        def gather(self, indices):
            seen.extend(indices.task[:, 0].tolist())
            return super().gather(indices)

    run = wave_run(steps=6)
    fit(
        run.learner,
        Recorded(),
        steps=30,
        meta_batch=25,
        validate=Recorded(),
        every=15,
        progress=False,
    )
    tested = Sinusoids().freeze(600, seed=0).groups[0].task[:, 0].tolist()
    assert len(seen) > 30 * 25 + 2 * VALIDATION_TASKS and not set(seen) & set(tested)


def test_company_changes_a_transductive_score():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends


def test_no_answer_is_no_wrong_answer():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))
    # cell f7852066
    naive = Sinusoids().sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(
        naive.support.x, next(Sinusoids().freeze(600, seed=0).episodes(25)).support.x
    )  # !

    seen = []

    class Recorded(Sinusoids):
        "Sinusoids that keep a record of what was drawn."

        def gather(self, indices):
            seen.extend(indices.task[:, 0].tolist())
            return super().gather(indices)

    run = wave_run(steps=6)
    fit(
        run.learner,
        Recorded(),
        steps=30,
        meta_batch=25,
        validate=Recorded(),
        every=15,
        progress=False,
    )
    tested = Sinusoids().freeze(600, seed=0).groups[0].task[:, 0].tolist()
    assert len(seen) > 30 * 25 + 2 * VALIDATION_TASKS and not set(seen) & set(tested)
    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends
    # cell 8e2f60a3
    broken = small_net("support")
    for p in broken.parameters():
        p.data.fill_(math.nan)
    logits, y = answers(broken, FewShot(images(), way=3, shot=1, query=5).freeze(20))[0]
    naive = (logits.argmax(-1) == y.argmax(-1)).float().mean(1)
    assert torch.allclose(naive, torch.tensor(1 / 3))  # in each task: nothing looks wrong
    score = evaluate(broken, FewShot(images(), way=3, shot=1, query=5), n=20)
    print(score)
    assert math.isnan(score.mean) and score.lost == 20
    assert not score.beats(None) and Score(torch.zeros(20)).beats(score)


def test_adaptation_lowers_the_loss_that_it_descends():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))
    # cell f7852066
    naive = Sinusoids().sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(
        naive.support.x, next(Sinusoids().freeze(600, seed=0).episodes(25)).support.x
    )  # !

    seen = []

    class Recorded(Sinusoids):
        "Sinusoids that keep a record of what was drawn."

        def gather(self, indices):
            seen.extend(indices.task[:, 0].tolist())
            return super().gather(indices)

    run = wave_run(steps=6)
    fit(
        run.learner,
        Recorded(),
        steps=30,
        meta_batch=25,
        validate=Recorded(),
        every=15,
        progress=False,
    )
    tested = Sinusoids().freeze(600, seed=0).groups[0].task[:, 0].tolist()
    assert len(seen) > 30 * 25 + 2 * VALIDATION_TASKS and not set(seen) & set(tested)
    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends
    # cell 8e2f60a3
    broken = small_net("support")
    for p in broken.parameters():
        p.data.fill_(math.nan)
    logits, y = answers(broken, FewShot(images(), way=3, shot=1, query=5).freeze(20))[0]
    naive = (logits.argmax(-1) == y.argmax(-1)).float().mean(1)
    assert torch.allclose(naive, torch.tensor(1 / 3))  # in each task: nothing looks wrong
    score = evaluate(broken, FewShot(images(), way=3, shot=1, query=5), n=20)
    print(score)
    assert math.isnan(score.mean) and score.lost == 20
    assert not score.beats(None) and Score(torch.zeros(20)).beats(score)
    # cell 9afa356c
    learner = wave_run().learner
    episodes = next(Sinusoids(5, 10).freeze(50).episodes(50))
    S = [Examples(episodes.support.x[i], episodes.support.y[i]) for i in range(50)]
    stale = [task_loss("regression", learner.net(s.x), s.y) for s in S]
    fresh = [task_loss("regression", learner(s, s.x), s.y) for s in S]
    assert all(new < old for new, old in zip(fresh, stale, strict=True))


def test_a_loss_that_is_no_number_stops_the_run():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))
    # cell f7852066
    naive = Sinusoids().sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(
        naive.support.x, next(Sinusoids().freeze(600, seed=0).episodes(25)).support.x
    )  # !

    seen = []

    class Recorded(Sinusoids):
        "Sinusoids that keep a record of what was drawn."

        def gather(self, indices):
            seen.extend(indices.task[:, 0].tolist())
            return super().gather(indices)

    run = wave_run(steps=6)
    fit(
        run.learner,
        Recorded(),
        steps=30,
        meta_batch=25,
        validate=Recorded(),
        every=15,
        progress=False,
    )
    tested = Sinusoids().freeze(600, seed=0).groups[0].task[:, 0].tolist()
    assert len(seen) > 30 * 25 + 2 * VALIDATION_TASKS and not set(seen) & set(tested)
    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends
    # cell 8e2f60a3
    broken = small_net("support")
    for p in broken.parameters():
        p.data.fill_(math.nan)
    logits, y = answers(broken, FewShot(images(), way=3, shot=1, query=5).freeze(20))[0]
    naive = (logits.argmax(-1) == y.argmax(-1)).float().mean(1)
    assert torch.allclose(naive, torch.tensor(1 / 3))  # in each task: nothing looks wrong
    score = evaluate(broken, FewShot(images(), way=3, shot=1, query=5), n=20)
    print(score)
    assert math.isnan(score.mean) and score.lost == 20
    assert not score.beats(None) and Score(torch.zeros(20)).beats(score)
    # cell 9afa356c
    learner = wave_run().learner
    episodes = next(Sinusoids(5, 10).freeze(50).episodes(50))
    S = [Examples(episodes.support.x[i], episodes.support.y[i]) for i in range(50)]
    stale = [task_loss("regression", learner.net(s.x), s.y) for s in S]
    fresh = [task_loss("regression", learner(s, s.x), s.y) for s in S]
    assert all(new < old for new, old in zip(fresh, stale, strict=True))

    # cell c483bdd9
    class Poisoned(Sightings):
        "From the third batch on, task 1 has a query that is not a number."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            episode = super().gather(indices)
            if self.batches >= 3:
                episode.query.y[1] = math.nan
            return episode

    learner, how = Shrink(), dict(meta_batch=4, progress=False)
    data = r"step 3: the loss of task 1 is nan: the data are to blame, 2 of 2 numbers of query.y .*clean"
    with pytest.raises(FloatingPointError, match=data):
        fit(learner, Poisoned(), steps=10, **how)
    assert learner.theta.isfinite() and learner.theta != 0

    class Root(Shrink):
        "The square root of a parameter that is zero."

        def loss(self, episode):
            return self.theta.abs().sqrt().sum() + 0 * episode.query.y.sum()

    slope = "step 1: every loss is finite, but the norm .* its derivative does not exist there"
    with pytest.raises(FloatingPointError, match=slope):
        fit(Root(), Sightings(), steps=3, **how)

    hasty = MAML(MLP([1, 8, 1]), lr=1e8, steps=5, kind="regression")
    with pytest.raises(
        FloatingPointError, match=r"the inner loop explodes: .* lower the inner rate"
    ):
        fit(hasty, Sinusoids(5, 10), steps=3, **how)
    with pytest.raises(
        FloatingPointError, match="the parameters were not finite before any adapting"
    ):
        fit(Shrink(math.nan), Sightings(), steps=3, **how)
    with pytest.raises(FloatingPointError, match="the outer loop has run away"):
        fit(Shrink(), Sightings(), steps=3, lr=1e30, **how)


def test_a_bad_task_is_skipped_and_counted():
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))
    # cell f7852066
    naive = Sinusoids().sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(
        naive.support.x, next(Sinusoids().freeze(600, seed=0).episodes(25)).support.x
    )  # !

    seen = []

    class Recorded(Sinusoids):
        "Sinusoids that keep a record of what was drawn."

        def gather(self, indices):
            seen.extend(indices.task[:, 0].tolist())
            return super().gather(indices)

    run = wave_run(steps=6)
    fit(
        run.learner,
        Recorded(),
        steps=30,
        meta_batch=25,
        validate=Recorded(),
        every=15,
        progress=False,
    )
    tested = Sinusoids().freeze(600, seed=0).groups[0].task[:, 0].tolist()
    assert len(seen) > 30 * 25 + 2 * VALIDATION_TASKS and not set(seen) & set(tested)
    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends
    # cell 8e2f60a3
    broken = small_net("support")
    for p in broken.parameters():
        p.data.fill_(math.nan)
    logits, y = answers(broken, FewShot(images(), way=3, shot=1, query=5).freeze(20))[0]
    naive = (logits.argmax(-1) == y.argmax(-1)).float().mean(1)
    assert torch.allclose(naive, torch.tensor(1 / 3))  # in each task: nothing looks wrong
    score = evaluate(broken, FewShot(images(), way=3, shot=1, query=5), n=20)
    print(score)
    assert math.isnan(score.mean) and score.lost == 20
    assert not score.beats(None) and Score(torch.zeros(20)).beats(score)
    # cell 9afa356c
    learner = wave_run().learner
    episodes = next(Sinusoids(5, 10).freeze(50).episodes(50))
    S = [Examples(episodes.support.x[i], episodes.support.y[i]) for i in range(50)]
    stale = [task_loss("regression", learner.net(s.x), s.y) for s in S]
    fresh = [task_loss("regression", learner(s, s.x), s.y) for s in S]
    assert all(new < old for new, old in zip(fresh, stale, strict=True))

    # cell c483bdd9
    class Poisoned(Sightings):
        "From the third batch on, task 1 has a query that is not a number."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            episode = super().gather(indices)
            if self.batches >= 3:
                episode.query.y[1] = math.nan
            return episode

    learner, how = Shrink(), dict(meta_batch=4, progress=False)
    data = r"step 3: the loss of task 1 is nan: the data are to blame, 2 of 2 numbers of query.y .*clean"
    with pytest.raises(FloatingPointError, match=data):
        fit(learner, Poisoned(), steps=10, **how)
    assert learner.theta.isfinite() and learner.theta != 0

    class Root(Shrink):
        "The square root of a parameter that is zero."

        def loss(self, episode):
            return self.theta.abs().sqrt().sum() + 0 * episode.query.y.sum()

    slope = "step 1: every loss is finite, but the norm .* its derivative does not exist there"
    with pytest.raises(FloatingPointError, match=slope):
        fit(Root(), Sightings(), steps=3, **how)

    hasty = MAML(MLP([1, 8, 1]), lr=1e8, steps=5, kind="regression")
    with pytest.raises(
        FloatingPointError, match=r"the inner loop explodes: .* lower the inner rate"
    ):
        fit(hasty, Sinusoids(5, 10), steps=3, **how)
    with pytest.raises(
        FloatingPointError, match="the parameters were not finite before any adapting"
    ):
        fit(Shrink(math.nan), Sightings(), steps=3, **how)
    with pytest.raises(FloatingPointError, match="the outer loop has run away"):
        fit(Shrink(), Sightings(), steps=3, lr=1e30, **how)

    # cell 9c70c01b
    class WithoutIt(Sightings):
        "From the third batch on, task 1 is not there."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            keep = torch.arange(len(indices)) != 1 if self.batches >= 3 else slice(None)
            return super().gather(indices[keep])

    with quiet():
        for lift in ("loop", "vmap"):
            skipping, without = Shrink(), Shrink()
            how = dict(steps=6, meta_batch=4, log_every=6, progress=False)
            run = fit(skipping, Poisoned(), engine=Engine(lift, nonfinite="skip"), **how)
            fit(without, WithoutIt(), **how)
            torch.testing.assert_close(skipping.theta, without.theta)
            assert run.outer.skipped == 4 and run.log[-1]["skipped"] == 4
        with pytest.raises(FloatingPointError, match="step 1"):
            fit(
                Root(),
                Sightings(),
                steps=3,
                meta_batch=4,
                engine=Engine(nonfinite="skip"),
                progress=False,
            )
    with pytest.raises(ValueError, match="nonfinite='ignore', expected one of stop, skip"):
        Engine(nonfinite="ignore")


def test_equal_runs_are_equal(device):
    # cell e6c7453f
    def images(n_classes=8, each=12, size=16, seed=0):
        "Classes of noisy images around a random mean."
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(n_classes, 1, 1, size, size, generator=g)
        x = means + 1.5 * torch.randn(n_classes, each, 1, size, size, generator=g)
        return Classes.of({f"class {i}": x[i] for i in range(n_classes)})

    def small_net(stats):
        "A prototypical network on a small convolutional one."
        torch.manual_seed(0)
        return ProtoNet(Conv4(1, size=16, width=8, stats=stats))

    # cell 0e416f25
    class Shrink(Learner):
        "Answers theta times the mean of the support targets: the smallest learner of the book."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Sightings(Tasks):
        "A hidden number, seen with noise: `shot` times in the support set, `query` times to predict."

        kind = "regression"

        def __init__(self, shot=2, query=2):
            self.shot, self.query = shot, query

        def __repr__(self):
            return f"Sightings(shot={self.shot}, query={self.query})"

        def draw(self, n, generator=None):
            device = generator.device if generator else None
            z = torch.randn(n, 1 + self.shot + self.query, 1, generator=generator, device=device)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            y = indices.cpu().split([self.shot, self.query], 1)
            return Episode(*(Examples(torch.zeros_like(side), side) for side in y))

    # cell 732608c8
    def two_tasks():
        "The two tasks of the worked example."
        support = torch.tensor([[[1.0], [3.0]], [[-1.0], [-1.0]]])
        query = torch.tensor([[[1.0]], [[0.0]]])
        return Episode(*(Examples(torch.zeros_like(y), y) for y in (support, query)))

    def one_step(**how):
        "Where one step of plain gradient descent with rate 0.1 leads from zero."
        learner = Shrink()
        outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.1), **how)
        return learner, outer, outer.step(two_tasks())

    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    # cell 13b11eb6
    class Sealed(Tasks):
        "Tasks that may not be looked at before they are opened."

        def __init__(self, tasks):
            self.tasks, self.kind, self.opened = tasks, tasks.kind, False

        def draw(self, n, generator=None):
            return self.tasks.draw(n, generator)

        def gather(self, indices):
            if not self.opened:
                raise PermissionError(
                    "these test tasks are sealed: choose on validation tasks first"
                )
            return self.tasks.gather(indices)

    final = Sealed(Sightings())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(Shrink(), Sightings(), validate=final, **how)
    run = fit(Shrink(), Sightings(), validate=Sightings(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))
    # cell f7852066
    naive = Sinusoids().sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(
        naive.support.x, next(Sinusoids().freeze(600, seed=0).episodes(25)).support.x
    )  # !

    seen = []

    class Recorded(Sinusoids):
        "Sinusoids that keep a record of what was drawn."

        def gather(self, indices):
            seen.extend(indices.task[:, 0].tolist())
            return super().gather(indices)

    run = wave_run(steps=6)
    fit(
        run.learner,
        Recorded(),
        steps=30,
        meta_batch=25,
        validate=Recorded(),
        every=15,
        progress=False,
    )
    tested = Sinusoids().freeze(600, seed=0).groups[0].task[:, 0].tolist()
    assert len(seen) > 30 * 25 + 2 * VALIDATION_TASKS and not set(seen) & set(tested)
    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends
    # cell 8e2f60a3
    broken = small_net("support")
    for p in broken.parameters():
        p.data.fill_(math.nan)
    logits, y = answers(broken, FewShot(images(), way=3, shot=1, query=5).freeze(20))[0]
    naive = (logits.argmax(-1) == y.argmax(-1)).float().mean(1)
    assert torch.allclose(naive, torch.tensor(1 / 3))  # in each task: nothing looks wrong
    score = evaluate(broken, FewShot(images(), way=3, shot=1, query=5), n=20)
    print(score)
    assert math.isnan(score.mean) and score.lost == 20
    assert not score.beats(None) and Score(torch.zeros(20)).beats(score)
    # cell 9afa356c
    learner = wave_run().learner
    episodes = next(Sinusoids(5, 10).freeze(50).episodes(50))
    S = [Examples(episodes.support.x[i], episodes.support.y[i]) for i in range(50)]
    stale = [task_loss("regression", learner.net(s.x), s.y) for s in S]
    fresh = [task_loss("regression", learner(s, s.x), s.y) for s in S]
    assert all(new < old for new, old in zip(fresh, stale, strict=True))

    # cell c483bdd9
    class Poisoned(Sightings):
        "From the third batch on, task 1 has a query that is not a number."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            episode = super().gather(indices)
            if self.batches >= 3:
                episode.query.y[1] = math.nan
            return episode

    learner, how = Shrink(), dict(meta_batch=4, progress=False)
    data = r"step 3: the loss of task 1 is nan: the data are to blame, 2 of 2 numbers of query.y .*clean"
    with pytest.raises(FloatingPointError, match=data):
        fit(learner, Poisoned(), steps=10, **how)
    assert learner.theta.isfinite() and learner.theta != 0

    class Root(Shrink):
        "The square root of a parameter that is zero."

        def loss(self, episode):
            return self.theta.abs().sqrt().sum() + 0 * episode.query.y.sum()

    slope = "step 1: every loss is finite, but the norm .* its derivative does not exist there"
    with pytest.raises(FloatingPointError, match=slope):
        fit(Root(), Sightings(), steps=3, **how)

    hasty = MAML(MLP([1, 8, 1]), lr=1e8, steps=5, kind="regression")
    with pytest.raises(
        FloatingPointError, match=r"the inner loop explodes: .* lower the inner rate"
    ):
        fit(hasty, Sinusoids(5, 10), steps=3, **how)
    with pytest.raises(
        FloatingPointError, match="the parameters were not finite before any adapting"
    ):
        fit(Shrink(math.nan), Sightings(), steps=3, **how)
    with pytest.raises(FloatingPointError, match="the outer loop has run away"):
        fit(Shrink(), Sightings(), steps=3, lr=1e30, **how)

    # cell 9c70c01b
    class WithoutIt(Sightings):
        "From the third batch on, task 1 is not there."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            keep = torch.arange(len(indices)) != 1 if self.batches >= 3 else slice(None)
            return super().gather(indices[keep])

    with quiet():
        for lift in ("loop", "vmap"):
            skipping, without = Shrink(), Shrink()
            how = dict(steps=6, meta_batch=4, log_every=6, progress=False)
            run = fit(skipping, Poisoned(), engine=Engine(lift, nonfinite="skip"), **how)
            fit(without, WithoutIt(), **how)
            torch.testing.assert_close(skipping.theta, without.theta)
            assert run.outer.skipped == 4 and run.log[-1]["skipped"] == 4
        with pytest.raises(FloatingPointError, match="step 1"):
            fit(
                Root(),
                Sightings(),
                steps=3,
                meta_batch=4,
                engine=Engine(nonfinite="skip"),
                progress=False,
            )
    with pytest.raises(ValueError, match="nonfinite='ignore', expected one of stop, skip"):
        Engine(nonfinite="ignore")

    # cell 83b5715b
    def state_after(**how):
        "The parameters after a short run on the test's device."
        run = wave_run(steps=4, device=device, **how)
        return run.log[-1]["validation"], list(run.learner.state_dict().values())

    class Asked(Shrink):
        "Notes whether torch is told to be deterministic."

        def loss(self, episode):
            modes.add(torch.are_deterministic_algorithms_enabled())
            return super().loss(episode)

    (score, state), (score_again, state_again) = (state_after(deterministic=True) for _ in range(2))
    assert score == score_again
    assert all(torch.equal(a, b) for a, b in zip(state, state_again, strict=True))
    modes = set()
    fit(
        Asked(),
        Sightings(),
        steps=1,
        meta_batch=2,
        engine=Engine(deterministic=True),
        progress=False,
    )
    assert modes == {True} and not torch.are_deterministic_algorithms_enabled()
