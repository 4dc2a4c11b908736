"""Made from nbs/05_training.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from metabook.classes import Classes
from metabook.engine import Engine, losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, Tasks
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.prototypes import ProtoNet
from metabook.runs import Run, consider, finish
from metabook.scores import Score
from metabook.training import TRAINING, VALIDATION_TASKS, Outer, fit


def cell_0e416f25():
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

    return Shrink


def cell_0e416f26():
    # cell 0e416f26
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

    return Sightings


def cell_732608c8(Shrink):
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

    return one_step, two_tasks


def cell_3a5e0001():
    # cell 3a5e0001
    def wave_run(steps=4, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), **how)

    return wave_run


def test_the_gradient_takes_two_ways():
    # cell 5a0e1005
    points = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    support = Examples.of(points[0].clone().requires_grad_(), torch.tensor([0, 1, 2, 0, 1]), way=3)
    query = Examples.of(points[1].clone().requires_grad_(), torch.tensor([0, 0, 1, 2, 2]), way=3)
    torch.manual_seed(0)
    learner = ProtoNet(MLP([3, 8, 4]))
    first = next(learner.parameters())
    learner.loss(Episode(support, query)).backward()
    assert support.x.grad.abs().min() > 0 and query.x.grad.abs().min() > 0
    whole = first.grad.clone()
    learner.zero_grad()
    state = [t.detach() if isinstance(t, torch.Tensor) else t for t in learner.adapt(support)]
    learner.criterion(learner.predict(tuple(state), query.x), query.y).backward()
    assert (first.grad - whole).norm() > 0.1 * whole.norm()  # the other way counts


@pytest.mark.proves("eq-outer-update")
def test_one_outer_step_by_hand():
    Shrink = cell_0e416f25()
    one_step, two_tasks = cell_732608c8(Shrink)
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
    Shrink = cell_0e416f25()
    one_step, two_tasks = cell_732608c8(Shrink)
    # cell 89daeaac
    for clip, theta in [(1.0, 0.1), (5.0, 0.2)]:  # a norm below the bound stays as it is
        learner, outer, _ = one_step(clip=clip)
        assert learner.theta.item() == pytest.approx(theta, rel=1e-4)
    with pytest.raises(ValueError, match="clip=0"):
        one_step(clip=0.0)


def test_fit_is_the_loop_that_you_can_recite():
    # cell 5a0e1002
    def recited(learner, tasks, steps, meta_batch, lr, generator):
        "The outer loop, and nothing else: `fit` below takes the same steps."
        optimizer = torch.optim.Adam(learner.parameters(), lr=lr)
        for _ in range(steps):
            episodes = tasks.sample(meta_batch, generator)  # draw
            loss = losses(learner, episodes).mean()  # adapt to each task, judge it by its queries
            optimizer.zero_grad()
            loss.backward()  # gradient
            optimizer.step()  # step

    # cell 5a0e1003
    points = Classes(
        torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.full((6,), 10)
    )
    tasks, ends = FewShot(points, way=3, shot=2, query=4), []
    for way_to_train in ("recited", "fit"):
        torch.manual_seed(0)
        learner = ProtoNet(MLP([3, 8, 4]))
        if way_to_train == "fit":
            fit(learner, tasks, steps=5, meta_batch=4, lr=0.01, seed=0, progress=False)
        else:  # `fit` adds a large number to its seed: see "The same numbers twice"
            recited(learner, tasks, 5, 4, 0.01, torch.Generator().manual_seed(TRAINING))
        ends.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    torch.testing.assert_close(*ends)


def test_tasks_are_told_how_it_went():
    Shrink = cell_0e416f25()
    Sightings = cell_0e416f26()
    one_step, two_tasks = cell_732608c8(Shrink)

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
    Shrink = cell_0e416f25()
    Sightings = cell_0e416f26()
    one_step, two_tasks = cell_732608c8(Shrink)

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
    Shrink = cell_0e416f25()
    Sightings = cell_0e416f26()
    one_step, two_tasks = cell_732608c8(Shrink)

    # cell 254f7d93
    def kept(metric, scores):
        "The parameter that a run keeps when the validation scores after each step are these."
        learner = Shrink()
        run = Run(learner, Sightings(), Outer(learner, torch.optim.SGD(learner.param_groups())))
        for step, value in enumerate(scores):
            learner.theta.data.fill_(step)
            consider(run, Score(torch.full((2,), value), metric))
        finish(run)
        return learner.theta.item()

    assert kept("accuracy", [0.3, 0.5, 0.4]) == 1
    assert kept("mse", [0.5, 0.3, 0.4]) == 1
    assert kept("mse", [math.nan, 0.5, math.nan]) == 1
    assert kept("mse", [math.nan, math.nan]) == 1  # nothing is known to be better than the latest


def test_each_phase_has_its_mode():
    Shrink = cell_0e416f25()
    Sightings = cell_0e416f26()
    one_step, two_tasks = cell_732608c8(Shrink)
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
    Shrink = cell_0e416f25()
    Sightings = cell_0e416f26()
    one_step, two_tasks = cell_732608c8(Shrink)
    # cell b8bb18a5
    pictures = FewShot(Classes.of({str(i): torch.rand(6, 1, 8, 8) for i in range(5)}), 3, 1, 5)
    for wrong, message in [
        (dict(tasks=pictures), "regression learner cannot be used on classification"),
        (
            dict(validate=pictures),
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


def test_training_never_meets_the_test_tasks():
    wave_run = cell_3a5e0001()
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


def test_equal_runs_are_equal(device):
    Shrink = cell_0e416f25()
    Sightings = cell_0e416f26()
    one_step, two_tasks = cell_732608c8(Shrink)
    wave_run = cell_3a5e0001()

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
