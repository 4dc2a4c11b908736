"""Made from nbs/06_scores.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from metabook.classes import Classes
from metabook.engine import Engine
from metabook.episodes import Examples, FewShot, Sinusoids, Tasks
from metabook.learners import Learner, place, task_loss
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet
from metabook.scores import Calibration, Score, answers, binned, calibration, evaluate, holm, paired
from metabook.training import fit


def cell_2a12a91c():
    # cell 2a12a91c
    def accuracies(n, skill=0.5, queries=75, spread=0.08, repeats=1, seed=0):
        "Accuracies [repeats, n] of a simulated learner: every task has its own difficulty."
        rng = np.random.default_rng(seed)
        a = skill * (1 - skill) / spread**2 - 1  # of a Beta distribution with this mean and spread
        of_task = rng.beta(skill * a, (1 - skill) * a, (repeats, n))
        return torch.tensor(rng.binomial(queries, of_task) / queries)

    return accuracies


def cell_27d2e460():
    # cell 27d2e460
    print(Score(torch.tensor([0.2, 0.4, 0.4, 0.6])))


def cell_53f5d5e5(accuracies):
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

    return coverage


def cell_e6c7453f():
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

    return images, small_net


@pytest.mark.proves("eq-standard-error")
def test_the_worked_example():
    cell_27d2e460()
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
    accuracies = cell_2a12a91c()
    cell_27d2e460()
    coverage = cell_53f5d5e5(accuracies)
    # cell 56d0bf14
    assert abs(coverage(lambda a: Score(a.float()).ci95) - 0.95) < 0.015


@pytest.mark.proves("eq-task-variance")
def test_tasks_and_queries_share_the_spread():
    accuracies = cell_2a12a91c()
    cell_27d2e460()
    coverage = cell_53f5d5e5(accuracies)
    # cell c2b809e7
    for m in (5, 75, 1000):
        variance = 0.08**2 + (0.25 - 0.08**2) / m
        measured = Score(accuracies(100_000, queries=m)[0].float()).standard_error ** 2 * 100_000
        assert abs(measured / variance - 1) < 0.03


def test_only_one_of_three_intervals_is_right():
    accuracies = cell_2a12a91c()
    cell_27d2e460()
    coverage = cell_53f5d5e5(accuracies)
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


def test_the_interval_counts_tasks_not_classes():
    cell_27d2e460()
    # cell 7e89ac2a
    rng = np.random.default_rng(9)
    skill = rng.normal(0.5, 0.1, (200, 20))  # how well each class of each world is recognised
    five = rng.random((200, 600, 20)).argpartition(5, -1)[..., :5]  # the classes of each task
    of_task = skill[np.arange(200)[:, None, None], five].mean(-1) + rng.normal(0, 0.05, (200, 600))
    worlds = [Score(torch.tensor(row)) for row in of_task]
    own = np.mean([abs(w.mean - m) <= w.ci95 for w, m in zip(worlds, skill.mean(1), strict=True)])
    every = np.mean([abs(w.mean - 0.5) <= w.ci95 for w in worlds])
    print(f"covers the mean of its own 20 classes: {own:.0%}, of all classes: {every:.0%}")
    assert own > 0.9 and every < 0.35


@pytest.mark.proves("eq-seed-variance")
def test_seeds_and_tasks_share_the_variance():
    cell_27d2e460()
    # cell 5eed0002
    rng = np.random.default_rng(10)
    for seeds, n in [(1, 50), (3, 50), (3, 200)]:
        of_seed = rng.normal(50, 1, (2000, seeds, 1))  # true accuracies of the trained learners
        hard = rng.normal(0, 8, (2000, 1, n))  # how hard a task is for all of them
        scored = of_seed + hard + rng.normal(0, 6, (2000, seeds, n))
        papers = [
            Score(torch.tensor(row)) for row in scored.mean(1)
        ]  # means over seeds, task by task
        formula = 1 / seeds + np.mean([paper.standard_error**2 for paper in papers])
        assert abs(np.var([paper.mean for paper in papers]) / formula - 1) < 0.1


@pytest.mark.proves("eq-paired-variance")
def test_a_paired_difference_subtracts_the_covariance():
    accuracies = cell_2a12a91c()
    coverage = cell_53f5d5e5(accuracies)
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


@pytest.mark.proves("eq-holm")
def test_holm_by_hand_and_in_many_tables():
    # cell 401a0003
    def far_out(z):
        "A difference that lies z standard errors from zero."
        return Score(torch.tensor([z - 1, z + 1], dtype=torch.float64))

    def as_lucky_as(p):
        return far_out(NormalDist().inv_cdf(1 - p / 2))

    assert holm(*map(as_lucky_as, (0.01, 0.04, 0.03))) == pytest.approx([0.03, 0.06, 0.06])
    tables = np.random.default_rng(13).standard_normal(
        (2000, 10)
    )  # ten comparisons where nothing differs
    alarm = np.mean(np.abs(tables).max(1) > 1.96)
    corrected = np.mean([min(holm(*map(far_out, row))) < 0.05 for row in tables])
    print(
        f"tables with a false claim: {alarm:.0%} by intervals, {corrected:.1%} after the correction"
    )
    assert abs(alarm - 0.40) < 0.04 and corrected < 0.065


def test_holm_takes_what_there_is():
    # cell 401a0004
    assert holm() == []
    nothing, certain = Score(torch.zeros(5)), Score(torch.full((5,), 0.1))
    lost, single = Score(torch.tensor([0.1, math.nan])), Score(torch.tensor([0.3]))
    assert holm(nothing, certain, lost, single) == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.proves("eq-single-query")
def test_joint_and_single_queries():
    images, small_net = cell_e6c7453f()
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
    images, small_net = cell_e6c7453f()
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


def test_what_does_not_fit_is_refused():
    images, small_net = cell_e6c7453f()
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
    # cell 8e40e005
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

    # cell 8e40e006
    one = overconfident(300, seed=0)
    gaps = (one.confidence - one.hits).sum(1) / 20
    assert one.ece == pytest.approx(gaps.mean().item(), abs=1e-6)
    assert one.ci95 == pytest.approx(Score(gaps).ci95, rel=1e-4)

    many = torch.tensor([overconfident(100, seed=s).ece for s in range(400)])
    assert overconfident(100, seed=1).ci95 == pytest.approx(1.96 * many.std().item(), rel=0.2)


@pytest.mark.proves("eq-temperature")
def test_temperature_changes_confidence_only():
    images, small_net = cell_e6c7453f()

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


def test_calibration_that_means_nothing_is_refused():
    images, small_net = cell_e6c7453f()
    # cell 0d9c31e1
    tasks = FewShot(images(), way=2, shot=1, query=5)
    for wrong in (0.0, math.nan):
        with pytest.raises(ValueError, match="positive temperature"):
            calibration(ProtoNet(nn.Flatten()), tasks, 10, temperature=wrong)
    with pytest.raises(ValueError, match="regression"):
        calibration(MAML(MLP([1, 8, 1]), kind="regression"), Sinusoids(), 10)


def test_the_best_of_twenty_is_lucky():
    accuracies = cell_2a12a91c()
    coverage = cell_53f5d5e5(accuracies)
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

    def waves():
        "A learner of sinusoids that has learned nothing yet."
        return MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)

    final = Sealed(Sinusoids())
    how = dict(steps=2, meta_batch=4, every=1, progress=False)
    with pytest.raises(PermissionError, match="sealed"):
        fit(waves(), Sinusoids(), validate=final, **how)
    run = fit(waves(), Sinusoids(), validate=Sinusoids(), **how)
    final.opened = True
    print(evaluate(run.learner, final, 10))


def test_company_changes_a_transductive_score():
    images, small_net = cell_e6c7453f()
    # cell 24d67be0
    task = next(FewShot(images(), way=3, shot=1, query=5).freeze(1).episodes())
    S, Q = (Examples(side.x[0], side.y[0]) for side in task)
    for stats, depends in [("batch", True), ("support", False)]:
        learner = small_net(stats).eval()
        among_15, among_3 = learner(S, Q.x)[:3], learner(S, Q.x[:3])
        assert torch.allclose(among_15, among_3, atol=1e-4) != depends


def test_no_answer_is_no_wrong_answer():
    images, small_net = cell_e6c7453f()
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
    # cell 9afa356c
    learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
    fit(learner, Sinusoids(5, 10), steps=4, meta_batch=4, progress=False)
    episodes = next(Sinusoids(5, 10).freeze(50).episodes(50))
    S = [Examples(episodes.support.x[i], episodes.support.y[i]) for i in range(50)]
    stale = [task_loss("regression", learner.net(s.x), s.y) for s in S]
    fresh = [task_loss("regression", learner(s, s.x), s.y) for s in S]
    assert all(new < old for new, old in zip(fresh, stale, strict=True))
