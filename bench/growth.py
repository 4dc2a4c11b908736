"""How the cost of a meta-gradient grows: with tasks, inner steps, way, shot and image size.

One size moves at a time, the others stay at the main case.  The images are Gaussian noise, so that
they may have any size: what a step costs does not depend on what they show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.cases import Case, job_of
from bench.measure import quartiles
from bench.ours import ours
from bench.worker import Work, Worker

ROUND = 0.1  # seconds that a round lasts at least
AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 2, 4, 8, 16, 32),
    "steps": (1, 2, 4, 8, 16),
    "way": (2, 5, 10, 20),
    "shot": (1, 2, 4, 8, 16),
    "size": (16, 28, 40, 56),
}


def make(settings: dict[str, Any]) -> Work:
    """What the worker process runs: a meta-gradient, lifted as the library chooses."""
    return Work(ours(job_of(settings), "auto"))


def axis_rows(
    worker: Worker,  # where all points of the axis are measured
    axis: str,  # one of `AXES`
    base: Case,
    device: str,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each point of an axis; rounds go from point to point, so that noise hits all alike."""
    settings = {"device": device, "precision": "float32"}
    for value in AXES[axis]:
        case = replace(base, **{axis: value})
        settings["case"] = asdict(case)
        worker.ask("make", maker="bench.growth:make", settings=settings, name=f"{axis}={value}")
        worker.ask("first", name=f"{axis}={value}")
    times: dict[int, list[float]] = {value: [] for value in AXES[axis]}
    for _ in tqdm(range(rounds), desc=f"growth with {axis}", leave=False):
        for value, own in times.items():
            own.append(worker.ask("round", name=f"{axis}={value}", seconds=ROUND))
    return [point(axis, value, own) for value, own in times.items()]


def point(axis: str, value: int, times: list[float]) -> dict[str, Any]:
    """One point of the figure."""
    low, median, high = quartiles(times)
    spread = {"median": median, "quartiles": [low, high], "rounds": len(times)}
    return {"axis": axis, "value": value, **spread}


def exponent(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The slope of log time over log size at the three largest points, by least squares.

    Small sizes are left out: there a step costs what it costs to start it.
    """
    fitted = rows[-3:]
    x, y = (np.log([row[key] for row in fitted]) for key in ("value", "median"))
    slope, start = np.polyfit(x, y, 1)
    left = y - (start + slope * x)
    return {
        "axis": rows[0]["axis"],
        "exponent": float(slope),
        "factor": float(np.exp(start)),  # seconds at size 1, by the line
        "r2": float(1 - left.var() / y.var()),
        "fitted_on": [row["value"] for row in (fitted[0], fitted[-1])],
    }


def growth(
    base: Case,  # whose sizes stay while one of them moves
    device: str,
    threads: int,
    rounds: int,
    only: str,
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The points and the exponents so far, after each axis."""
    rows: list[dict[str, Any]] = []
    exponents: list[dict[str, Any]] = []
    for axis in AXES:
        if only in f"growth-{axis}":
            with Worker(threads, device) as worker:
                points = axis_rows(worker, axis, base, device, rounds)
            rows, exponents = rows + points, [*exponents, exponent(points)]
            yield rows, exponents
