"""The library as a contender, in each of its ways of lifting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.cases import Job
from metabook.engine import gradients
from metabook.kernels import precise

LIFTS = ("auto", "loop", "vmap", "graph", "compile")


def ours(
    job: Job,
    lift: str,  # one of `LIFTS`
) -> Callable[[], None]:
    """A meta-gradient of all tasks, left in `.grad` of the network's parameters."""
    learner, episodes = job.learner.train(), job.episodes

    def step() -> None:
        learner.zero_grad()
        with precise("float32" if job.precision == "float64" else job.precision):
            gradients(learner, episodes, lift=lift)

    return step


OURS: dict[str, Callable[[Job], Callable[[], None]]] = {
    f"ours-{lift}": partial(ours, lift=lift) for lift in LIFTS
}
