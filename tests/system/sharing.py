"""What the processes of `test_processes.py` run: torchrun ... sharing.py JOB FOLDER [VICTIM]"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metabook import engine, processes
from metabook.classes import Classes
from metabook.episodes import FewShot, Sinusoids
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.meta_transfer import HardTasks
from metabook.networks import MLP, BatchNorm, parameters_of
from metabook.prototypes import ProtoNet
from metabook.scores import evaluate
from metabook.training import fit

STEPS, META_BATCH = 5, 5  # two processes take two tasks and three


class Tempered(MAML):
    """Cares most for the tasks that went worst, and learns how much."""

    def __init__(self, net: nn.Module, **how: Any):
        super().__init__(net, **how)
        self.heat = nn.Parameter(torch.tensor(0.5))

    def combine(self, losses: Tensor) -> Tensor:
        return (losses / self.heat).logsumexp(0) * self.heat


def points() -> Classes:
    """Six classes of points that lie so near one another that some tasks fail."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 2, generator=generator)
    return Classes.of({str(i): i / 4 + x[i] for i in range(6)})


def waves(kind: type[MAML]) -> Learner:
    return kind(MLP([1, 8, 1]), lr=0.05, kind="regression")


def normalised() -> Learner:
    # Without biases: their gradient is zero here, and Adam would make steps of its rounding errors.
    first, last = nn.Linear(2, 4, bias=False), nn.Linear(4, 3, bias=False)
    layers = first, BatchNorm(4, stats="running"), nn.ReLU(), last
    return ProtoNet(nn.Sequential(*layers))


SINES = Sinusoids(4, 6), Sinusoids(4, 7)


class Stained(Sinusoids):
    """Sinusoids of which the tall ones have a query that is not a number."""

    tasks = SINES[0]  # to validate on

    def gather(self, indices: Any) -> Any:
        episode = super().gather(indices)
        episode.query.y[indices.task[:, 0] > 4] = torch.nan
        return episode


class High(MAML):
    """Weighs tasks by what they say of themselves: their amplitude."""

    def combine(self, losses: Tensor, info: dict[str, Tensor]) -> Tensor:
        return (losses * info["task"][:, 0]).logsumexp(0)


class Towards(MAML):
    """Walks towards the adapted parameters, with a price that falls to zero."""

    approximate = True

    def loss(self, episode: Any) -> Tensor:
        (phi, _), theta = self.adapt(episode.support), parameters_of(self.net)
        price = (1 - self.progress) * sum(p.square().sum() for p in theta.values())
        return price + sum(((p - phi[k]).detach() * p).sum() for k, p in theta.items())

    def combine(self, losses: Tensor) -> Tensor:
        return losses.logsumexp(0)


CASES: dict[str, tuple[Callable[[], Learner], Callable[[], Any], dict[str, Any]]] = {
    "mean": (lambda: waves(MAML), lambda: SINES[0], {}),
    "mean, one by one": (lambda: waves(MAML), lambda: SINES[0], {"chunk": 1}),
    "combined": (lambda: waves(Tempered), lambda: SINES[0], {}),
    "combined, one by one": (lambda: waves(Tempered), lambda: SINES[0], {"chunk": 1, "clip": 0.1}),
    "domains": (lambda: waves(High), lambda: SINES[0], {}),
    "surrogates": (lambda: waves(Towards), lambda: SINES[0], {}),
    "running statistics": (normalised, lambda: FewShot(points(), 3, 1, 2), {}),
    "skipping": (lambda: waves(MAML), lambda: Stained(4, 6), {"nonfinite": "skip"}),
    "hard tasks": (normalised, lambda: HardTasks(FewShot(points(), 3, 1, 2), every=2), {}),
}


def trained(name: str, seed: int = 0) -> dict[str, Any]:
    """Parameters, losses and validation scores of a few steps in double precision."""
    learner, tasks, how = CASES[name]
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    made, of = learner(), tasks()
    validate = getattr(of, "tasks", of)
    settings = {"lr": 0.01, "log_every": 1, "every": 2, "progress": False, "seed": 3} | how
    run = fit(made, of, steps=STEPS, meta_batch=META_BATCH, validate=validate, **settings)
    torch.set_default_dtype(torch.float32)
    curves = [run.curve(key)[1] for key in ("loss", "gradient_norm", "validation")]
    return {"state": made.state_dict(), "curves": curves, "best": run.best.per_task}


def short_of_memory() -> dict[str, Any]:
    """Process 1 runs out of memory after it has heard all losses, and starts its share again."""
    plain, failures = engine._descend, [1] if processes.rank() == 1 else []

    def descend(learner: Learner, *rest: Any) -> Any:
        graded = plain(learner, *rest)
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("as if")
        return graded

    engine._descend = descend
    try:
        return trained("combined")
    finally:
        engine._descend = plain


def scores() -> list[Tensor]:
    """Scores of three learners in batches of 3 (four of them), and all at once (one)."""
    torch.manual_seed(0)
    tasks = FewShot(points(), 3, 1, 2).freeze(11, seed=5)
    learner = normalised()
    found = [evaluate(learner, tasks, batch=n, queries="single").per_task for n in (3, 11)]
    return [*found, evaluate(waves(MAML), SINES[1], 7, batch=2).per_task]


def added_twice() -> list[Tensor]:
    """What is in `.grad` already stays in it."""
    torch.manual_seed(0)
    learner, episodes = waves(MAML), SINES[0].sample(4)
    for _ in range(2):
        if processes.world() == 1:
            engine.gradients(learner, episodes)
            continue
        shared = processes.Shared(4)
        mine = engine.tree_map(lambda t, s=shared.mine: t[s], episodes)
        engine.gradients(learner, mine, shared=shared)
    return [p.grad for p in learner.parameters()]


def refused() -> list[str]:
    """What is said where processes are not told the same, and where there are too few tasks."""
    said = []
    for how in ({"seed": processes.rank()}, {"meta_batch": 1}):
        try:
            fit(waves(MAML), SINES[0], steps=1, progress=False, **({"meta_batch": 4} | how))
        except ValueError as error:
            said.append(str(error))
    return said


def agree(folder: Path) -> None:
    """Everything that must be as in a single process, from each process."""
    processes.join()
    found: dict[str, Any] = {name: trained(name, processes.rank()) for name in CASES}
    found["short of memory"] = short_of_memory()
    found |= {"scores": scores(), "added": added_twice(), "refused": refused()}
    torch.save(found, folder / f"{processes.rank()}.pt")


def endless(folder: Path, victim: int = -1, number: int = signal.SIGKILL) -> None:
    """A run that would take hours; one process gets a signal at step 7."""

    def rate(taken: int) -> float:
        if taken == 7 and processes.rank() == victim:
            os.kill(os.getpid(), number)
        return 1.0

    how = {"every": 2, "log_every": 1, "meta_batch": 4, "progress": False}
    torch.manual_seed(0)
    run = fit(
        waves(MAML), SINES[0], steps=10**6, validate=SINES[1], folder=folder, schedule=rate, **how
    )
    assert run.interrupted


def survive(folder: Path, victim: int = -1, step: int = 0) -> None:
    """A short run that goes on where it was left; one process is killed when so many steps are taken."""

    def rate(taken: int) -> float:
        if taken == step and processes.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 / (1 + taken)

    how = {"every": 4, "log_every": 3, "meta_batch": META_BATCH, "progress": False}
    tasks = HardTasks(FewShot(points(), 3, 1, 2), every=2)
    torch.manual_seed(0)
    learner = MAML(MLP([2, 8, 3]), lr=0.05)
    how |= {"validate": tasks.tasks, "folder": folder, "resume": True, "schedule": rate}
    fit(learner, tasks, steps=14, **how)


if __name__ == "__main__":
    job, place, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    {"agree": agree, "endless": endless, "survive": survive}[job](Path(place), *map(int, rest))
