"""Made from nbs/A06_guards.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager

import pytest
import torch

from metabook.engine import Engine
from metabook.episodes import Episode, Examples, Sinusoids, Tasks
from metabook.guards import Verdict, Wrong, update_where
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.training import fit


def cell_7b55a780():
    # cell 7b55a780
    class Mean(Learner):
        "Answers theta times the mean of the support targets."

        kind = "regression"

        def __init__(self, theta=0.0):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor([float(theta)]))

        def adapt(self, support):
            return support.y.mean(0)

        def predict(self, state, x):
            return (self.theta * state).expand(len(x), 1)

    class Numbers(Tasks):
        "Two noisy looks at a hidden number, and two to predict."

        kind = "regression"

        def draw(self, n, generator=None):
            z = torch.randn(n, 5, 1, generator=generator)
            return z[:, :1] + z[:, 1:]

        def gather(self, indices):
            return Episode(*(Examples(torch.zeros_like(y), y) for y in indices.split(2, 1)))

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    return Mean, Numbers, quiet


def cell_2ae61246(Numbers):
    # cell 2ae61246
    class Poisoned(Numbers):
        "From the third batch on, task 1 has a query that is not a number."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            episode = super().gather(indices)
            if self.batches >= 3:
                episode.query.y[1] = math.nan
            return episode

    return Poisoned


def cell_6a057f78(Mean):
    # cell 6a057f78
    class Root(Mean):
        "The square root of a parameter that is zero."

        def loss(self, episode):
            return self.theta.abs().sqrt().sum() + 0 * episode.query.y.sum()

    return Root


@pytest.mark.proves("eq-skipped-step")
def test_a_bad_step_is_skipped(device):
    # cell af2d6cd2
    def steps_of_adam(factors, device):
        "The gradient and one of two losses are multiplied by a factor: one step for each."
        theta = torch.nn.Parameter(torch.ones(2, device=device))
        optimizer, verdict = torch.optim.Adam([theta], lr=0.1), Verdict(torch.device(device))
        for factor in factors:
            theta.grad = torch.tensor([1.0, -2.0], device=device) * factor
            losses = torch.tensor([1.0, factor], device=device)
            verdict.judge(losses, theta.grad.norm())
            update_where(verdict.fine, optimizer)
        return theta.detach(), verdict

    wanted, verdict = steps_of_adam((1.0, 1.0), device)
    assert verdict.wrong() is None
    for bad in (math.nan, math.inf):
        theta, verdict = steps_of_adam((1.0, bad, 1.0), device)
        assert torch.equal(theta, wanted) and verdict.fine
        assert (
            steps_of_adam((bad, 1.0, 1.0), device)[0].isfinite().all()
        )  # nor is anything remembered
        assert repr(verdict.wrong()) == repr(Wrong(step=2, task=1, value=bad))
    verdict = Verdict(torch.device(device))
    verdict.judge(torch.ones(3, device=device), torch.tensor(math.nan, device=device))
    verdict.judge(
        torch.full((3,), math.inf, device=device), torch.tensor(1.0, device=device)
    )  # later
    assert repr(verdict.wrong()) == repr(Wrong(step=1, task=None, value=math.nan))
    verdict.forget()
    verdict.judge(torch.ones(3, device=device), torch.tensor(1.0, device=device))
    assert verdict.wrong() is None and verdict.steps == 2


def test_a_loss_that_is_no_number_stops_the_run():
    Mean, Numbers, quiet = cell_7b55a780()
    Poisoned = cell_2ae61246(Numbers)
    Root = cell_6a057f78(Mean)
    # cell c483bdd9
    learner, how = Mean(), dict(meta_batch=4, progress=False)
    data = r"step 3: the loss of task 1 is nan: the data are to blame, 2 of 2 numbers of query.y .*clean"
    with pytest.raises(FloatingPointError, match=data):
        fit(learner, Poisoned(), steps=10, **how)
    assert learner.theta.isfinite() and learner.theta != 0

    slope = "step 1: every loss is finite, but the norm .* its derivative does not exist there"
    with pytest.raises(FloatingPointError, match=slope):
        fit(Root(), Numbers(), steps=3, **how)

    hasty = MAML(MLP([1, 8, 1]), lr=1e8, steps=5, kind="regression")
    with pytest.raises(
        FloatingPointError, match=r"the inner loop explodes: .* lower the inner rate"
    ):
        fit(hasty, Sinusoids(5, 10), steps=3, **how)
    with pytest.raises(
        FloatingPointError, match="the parameters were not finite before any adapting"
    ):
        fit(Mean(math.nan), Numbers(), steps=3, **how)
    with pytest.raises(FloatingPointError, match="the outer loop has run away"):
        fit(Mean(), Numbers(), steps=3, lr=1e30, **how)


def test_a_bad_task_is_skipped_and_counted():
    Mean, Numbers, quiet = cell_7b55a780()
    Poisoned = cell_2ae61246(Numbers)
    Root = cell_6a057f78(Mean)

    # cell 9c70c01b
    class WithoutIt(Numbers):
        "From the third batch on, task 1 is not there."

        batches = 0

        def gather(self, indices):
            self.batches += 1
            keep = torch.arange(len(indices)) != 1 if self.batches >= 3 else slice(None)
            return super().gather(indices[keep])

    with quiet():
        for lift in ("loop", "vmap"):
            lenient, without = Mean(), Mean()
            how = dict(steps=6, meta_batch=4, log_every=6, progress=False)
            run = fit(lenient, Poisoned(), engine=Engine(lift, nonfinite="skip"), **how)
            fit(without, WithoutIt(), **how)
            torch.testing.assert_close(lenient.theta, without.theta)
            assert run.outer.guard.skipped == 4 and run.log[-1]["skipped"] == 4
        with pytest.raises(FloatingPointError, match="step 1"):
            fit(
                Root(),
                Numbers(),
                steps=3,
                meta_batch=4,
                engine=Engine(nonfinite="skip"),
                progress=False,
            )
    with pytest.raises(ValueError, match="nonfinite='ignore', expected one of stop, skip"):
        Engine(nonfinite="ignore")
