"""The library as a contender, in each of its ways to lift and to run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.cases import Job
from metabook.engine import gradients
from metabook.graphs import Replayed
from metabook.kernels import keep_memory, precise

WAYS = ("auto", "loop", "vmap", "graph", "compile")  # words for `lift` and for `run`


def ours(
    job: Job,
    way: str,  # one of `WAYS`
) -> Callable[[], None]:
    """A meta-gradient of all tasks, left in `.grad` of the network's parameters.

    As in `metabook.training.Outer`, a GPU records it and replays it, unless it is told not to.
    """
    keep_memory()  # as `fit` asks for it
    learner, episodes = job.learner.train(), job.episodes
    lift = way if way in ("auto", "loop") else "vmap"

    def step() -> None:
        learner.zero_grad()
        with precise("float32" if job.precision == "float64" else job.precision):
            gradients(learner, episodes, lift=lift, compiled=way == "compile")

    recorded = job.device == "cuda" and way in ("auto", "graph", "compile")
    return Replayed(step, torch.device("cuda")) if recorded else step


OURS: dict[str, Callable[[Job], Callable[[], None]]] = {
    f"ours-{way}": partial(ours, way=way) for way in WAYS
}
