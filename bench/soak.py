"""Does it run for hours?  Training and scoring in turn in one process: memory, open files, threads, disk.

A leak shows as a slope: what one run of `fit` forgets to give back, a thousand runs add up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

import metabook
from bench.cases import QUERIES, Case, Job, data_here, noise
from bench.measure import resident
from metabook.classes import Classes
from metabook.episodes import FewShot
from metabook.scores import evaluate
from metabook.sources import SOURCES
from metabook.training import fit

MIB = 2**20
STEPS, EVERY = 20, 10  # outer steps of a run of `fit`, and between its validations
VALIDATION, TEST = 20, 40  # tasks
PAUSE, NOTES = 15.0, 40  # seconds between two notes; a short soak has so many of them nevertheless
SETTLE = 300.0  # seconds until caches are full; of a short soak the first tenth


def soak_cases() -> list[Case]:
    """MAML and prototypical networks, in the main case of the benchmark."""
    data = data_here()
    main = Case(query=QUERIES[data], pool="stride", data=data)
    return [main, replace(main, method="prototypes")]


@dataclass(frozen=True)
class Routine:
    """What is done over and over with one method; the images are loaded once."""

    case: Case
    device: str
    folder: Path  # where its trained folder lies
    train: Classes
    test: Classes

    @classmethod
    def of(cls, case: Case, device: str, folder: Path) -> Routine:
        """With the case's data."""
        sides = [images(case, split) for split in ("train", "val")]
        return cls(case, device, folder / case.name, *sides)

    def tasks(self, classes: Classes) -> FewShot:
        case = self.case
        return FewShot(classes, case.way, case.shot, case.query)

    def trained(self) -> int:  # outer steps
        """A run of `fit` in two halves, the second by resuming, in a folder that was deleted before."""
        shutil.rmtree(self.folder, ignore_errors=True)
        how = {"lift": "vmap"} if self.case.method == "maml" else {}
        how |= {"validate": self.tasks(self.test).freeze(VALIDATION), "every": EVERY}
        how |= {"meta_batch": self.case.tasks, "folder": self.folder, "progress": False}
        for steps in (STEPS // 2, STEPS):
            learner, tasks = Job(self.case, self.device).learner, self.tasks(self.train)
            if fit(learner, tasks, steps=steps, resume=True, **how).interrupted:
                raise KeyboardInterrupt
        return STEPS

    def scored(self) -> int:
        """The trained folder is loaded and scored; that takes no outer step."""
        learner = metabook.load(self.folder)
        evaluate(learner, self.tasks(self.test), TEST, device=self.device)
        return 0


def images(case: Case, split: str) -> Classes:
    """The images of a case."""
    return noise(case) if case.data == "random" else SOURCES[case.data].load(split)


def pieces(cases: list[Case], device: str, folder: Path) -> Iterator[int]:
    """Train and score without end, method after method; gives the outer steps of each piece of work."""
    for routine in cycle([Routine.of(case, device, folder) for case in cases]):
        yield routine.trained()
        yield routine.scored()


def note(seconds: float, steps: int, folder: Path) -> dict[str, Any]:
    """What the process holds now."""
    return {
        "seconds": round(seconds, 1),
        "steps": steps,
        "resident": resident("VmRSS"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def soak(
    device: str,
    threads: int,
    minutes: float,
    cases: list[Case] | None = None,  # methods in turn; `None`: `soak_cases`
) -> Iterator[list[dict[str, Any]]]:
    """The notes so far, after each: between two pieces of work, at least a pause after the one before."""
    torch.set_num_threads(threads)
    rows, steps, end = [], 0, 60 * minutes
    pause, began = min(PAUSE, end / NOTES), perf_counter()
    with TemporaryDirectory() as name:
        for done in pieces(cases or soak_cases(), device, Path(name)):
            steps, seconds = steps + done, perf_counter() - began
            if not rows or seconds >= min(rows[-1]["seconds"] + pause, end):
                rows.append(note(seconds, steps, Path(name)))
                yield rows
            if seconds >= end:
                return


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the notes say once the process has settled; `None` while there are too few of them.

    The interval takes the notes for independent.  `growth` does not: the mean of the last tenth of
    the time minus that of the second, and minus that of the sixth, in the second half.
    """
    end = rows[-1]["seconds"]
    settle = min(SETTLE, end / 10)
    late = [row for row in rows if row["seconds"] >= settle]
    tenth = [min(int(10 * row["seconds"] / end), 9) for row in rows]
    tenths = [
        [r["resident"] for r, t in zip(rows, tenth, strict=True) if t == i] for i in (1, 5, 9)
    ]
    if len(late) < 10 or not all(tenths):
        return None
    files = [row["files"] for row in late]
    per_hour, ci95 = slope([row["seconds"] / 3600 for row in late], [r["resident"] for r in late])
    return {
        "settled_after": settle,
        "mib_per_hour": per_hour / MIB,
        "ci95": ci95 / MIB,
        "growth_mib": float(np.mean(tenths[2]) - np.mean(tenths[0])) / MIB,
        "second_half_mib": float(np.mean(tenths[2]) - np.mean(tenths[1])) / MIB,
        "files": [min(files), max(files)],
        "threads": [f(row["threads"] for row in late) for f in (min, max)],
    }


def slope(
    x: list[float],
    y: list[float],
) -> tuple[float, float]:  # and half the width of its 95% interval
    """Of the line of least squares."""
    x, y = np.asarray(x) - np.mean(x), np.asarray(y) - np.mean(y)
    rise = float(x @ y / (x @ x))
    left = y - rise * x
    return rise, float(1.96 * np.sqrt(left @ left / (len(x) - 2) / (x @ x)))


def conclusion(found: dict[str, Any] | None) -> str:
    """In a line."""
    if found is None:
        return "too few notes to judge"
    low, high = found["files"]
    return (
        f"memory: {found['mib_per_hour']:+.1f} ± {found['ci95']:.1f} MiB an hour after the first "
        f"{found['settled_after'] / 60:.1f} minutes, {found['growth_mib']:+.1f} MiB from the second "
        f"tenth of the time to the last, {found['second_half_mib']:+.1f} in the second half; open files: "
        f"{low} to {high}"
    )
