"""The library as a contender, in each of its ways of lifting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.cases import Job
from metabook.engine import Replayed, gradients
from metabook.kernels import precise

LIFTS = ("auto", "loop", "vmap", "graph", "compile")


def ours(
    job: Job,
    lift: str,  # one of `LIFTS`
) -> Callable[[], None]:
    """A meta-gradient of all tasks, left in `.grad` of the network's parameters.

    As in `metabook.training.Outer`, a GPU records it and replays it, unless it is told not to.
    """
    learner, episodes = job.learner.train(), job.episodes

    def step() -> None:
        learner.zero_grad()
        with precise("float32" if job.precision == "float64" else job.precision):
            gradients(learner, episodes, lift=lift)

    recorded = job.device == "cuda" and lift in ("auto", "graph", "compile")
    return Replayed(step, torch.device("cuda")) if recorded else step


OURS: dict[str, Callable[[Job], Callable[[], None]]] = {
    f"ours-{lift}": partial(ours, lift=lift) for lift in LIFTS
}
