"""Meta-gradients side by side: every contender in its own process, rounds interleaved, gradients checked.

What is timed is the meta-gradient of all tasks of one outer step; an optimiser's step, the same for
all, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from bench.cases import Case, data_here, episodes_of, job_of, speed_cases
from bench.measure import quartiles
from bench.ours import OURS, WAYS
from bench.peers import PEERS, looped
from bench.worker import Failed, Work, Worker

ROUND = 0.2  # seconds that a round lasts at least
# A gradient is right where two relative errors are small.  That of the same program in float64 must be below
# EXACT: so much for the formula.  And that of the timed gradient must be no larger than TOLERANCE, or than
# SLACK times what rounding does to this case: the error of the plain loop in the same precision, or what
# the exact gradient moves by when the parameters move a little.  Beyond one half, it is wrong.
EXACT = 1e-8
TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 1e-1}
SLACK = 3
NUDGE = 3e-6  # such a move, relative to each parameter: ten times what rounding does, to find the kinks nearby
NUDGES = 5  # tries: one alone may leave an activation on its side of a kink


class Contender(NamedTuple):
    """Who computes, and in which precision."""

    name: str  # of `PEERS` or `OURS`
    precision: str


def contenders(case: Case, device: str, main: bool) -> list[Contender]:
    """Who takes part.

    Everybody does, in every precision, in the main case and on a GPU.  On a CPU, where a round takes
    seconds, the other cases are in float32, and only the main one is compiled, for that takes longest;
    and nobody records graphs, which only a GPU can.
    """
    if device == "cuda":
        precisions = ["float32", "tf32", "bfloat16"]
    else:
        precisions = ["float32", "bfloat16"] if main else ["float32"]
    here = {"graph": device == "cuda", "compile": device == "cuda" or main}
    lifts = [f"ours-{way}" for way in WAYS if here.get(way, True)]
    return [Contender(name, p) for p in precisions for name in [*PEERS, *lifts]]


def make(settings: dict[str, Any]) -> Work:
    """What a worker process runs: the step of one contender."""
    job, name = job_of(settings), settings["contender"]
    if name in PEERS:
        step, net = looped(PEERS[name], job), job.plain
    else:
        step, net = OURS[name](job), job.conv4
    if "nudge" in settings:
        nudge(net, settings["nudge"])
    return Work(step, lambda: torch.cat([p.grad.flatten() for p in net.parameters()]))


@torch.no_grad()
def nudge(net: nn.Module, seed: int) -> None:
    """Move each parameter a little."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        direction = torch.randn(p.shape, generator=generator).to(p)
        size = p.abs().where(p != 0, 1)  # a bias that starts at zero moves, too
        p.add_(NUDGE * direction * size)


def settings_of(case: Case, device: str, contender: Contender) -> dict[str, Any]:
    """What `make` needs, as JSON values."""
    who = {"contender": contender.name, "precision": contender.precision}
    return {"case": asdict(case), "device": device} | who


def reference(case: Case, device: str, threads: int, path: Path) -> float:
    """Leave the meta-gradient of the plain loop in float64 in a file; how far nudges move it at most."""
    with Worker(threads, device) as worker:
        plain = settings_of(case, device, Contender("autograd", "float64"))
        worker.ask("make", maker="bench.speed:make", settings=plain)
        worker.ask("first")
        worker.ask("save", path=str(path))
        moves = []
        for seed in range(NUDGES):
            worker.ask("make", maker="bench.speed:make", settings=plain | {"nudge": seed})
            worker.ask("first")
            moves.append(worker.ask("error", path=str(path)))
    return max(moves)


class Race:
    """One case: workers for all contenders, and a row for each."""

    def __init__(self, stack: ExitStack, case: Case, device: str, threads: int, who: list):
        self.case, self.episodes = case, episodes_of(case).hash
        self.workers = {c: stack.enter_context(Worker(threads, device)) for c in who}
        self.times: dict[Contender, list[float]] = {c: [] for c in who}
        self.found: dict[Contender, dict[str, Any]] = {c: {} for c in who}
        self.settings = {c: settings_of(case, device, c) for c in who}
        for c, worker in self.workers.items():
            worker.tell("make", maker="bench.speed:make", settings=self.settings[c])
        for c in who:
            self.attempt(c)

    def attempt(self, c: Contender, action: str | None = None, **how: Any) -> Any:
        """Ask one contender (or only hear its answer), unless it has failed: then it says nothing more."""
        if "reason" in self.found[c]:
            return None
        try:
            return self.workers[c].ask(action, **how) if action else self.workers[c].answer()
        except Failed as failed:
            self.found[c] = {"reason": str(failed)}
            return None

    def run(self, rounds: int, bar: tqdm) -> None:
        """First steps, then rounds: A, B, C, A, B, C, ..."""
        for c in self.workers:
            self.note(c, first_step=self.attempt(c, "first"))
        for _ in range(rounds):
            for c in self.workers:
                bar.set_postfix_str(f"{c.name} {c.precision}", refresh=False)
                self.times[c].append(self.attempt(c, "round", seconds=ROUND))
            bar.update()

    def check(self, path: Path) -> None:
        """Peak memory, and how far from the reference the timed gradients are."""
        for c in self.workers:
            memory = self.attempt(c, "peak")
            self.note(c, peak_memory=memory, error=self.attempt(c, "error", path=str(path)))
            if "reason" not in self.found[c]:
                self.note(c, error_float64=self.exact(c, path))

    def exact(self, c: Contender, path: Path) -> float | None:
        """How far from the reference the same program is in float64; nothing if it cannot compute that."""
        worker, settings = self.workers[c], self.settings[c] | {"precision": "float64"}
        try:
            worker.ask("forget")
            worker.ask("make", maker="bench.speed:make", settings=settings)
            worker.ask("first")
            return worker.ask("error", path=str(path))
        except Failed as failed:
            tqdm.write(f"{self.case.name}, {c.name} in float64: {failed}")
            return None
        finally:
            with suppress(Failed):
                worker.ask("forget")

    def note(self, c: Contender, **values: Any) -> None:
        """Keep what a contender answered, unless it has failed."""
        if "reason" not in self.found[c]:
            self.found[c] |= values

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each contender."""
        for c, found in self.found.items():
            row = {"case": self.case.name, **asdict(self.case), "episodes": self.episodes}
            row |= c._asdict()
            yield row | scored(found, self.times[c], self.case.tasks)


def scored(
    found: dict[str, Any],  # what a contender answered, or the `reason` why it did not
    times: list[float],  # seconds of a step, one for each round
    tasks: int,  # of a step
) -> dict[str, Any]:
    """The numbers of a row, or that it failed and why."""
    if "reason" in found:
        return {"status": "failed", "reason": found["reason"]}
    low, median, high = quartiles(times)
    speed = {"median": median, "quartiles": [low, high], "rounds": len(times)}
    return {"status": "measured", **speed, "tasks_per_second": tasks / median, **found}


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have numbers."""
    return [row for row in rows if row["status"] != "failed"]


def judged(
    rows: list[dict[str, Any]],
    moved: float = 0.0,  # by how much nudges move the exact gradient: a lot, next to a kink
) -> list[dict[str, Any]]:
    """The rows of one case with the verdict on their gradients: "right" or "wrong"."""
    plain = {row["precision"]: row["error"] for row in measured(rows) if row["name"] == "autograd"}
    for row in measured(rows):
        rounding = SLACK * max(plain.get(row["precision"], 0.0), moved)
        row["moved"], row["tolerance"] = moved, min(0.5, max(TOLERANCE[row["precision"]], rounding))
        exact = row["error_float64"] is None or row["error_float64"] <= EXACT
        right = exact and row["error"] <= row["tolerance"]
        row["status"] = "right" if right else "wrong"
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with how many times faster each is than the fastest peer that is right in its case."""
    peers = [row for row in rows if row["name"] in PEERS and row["status"] == "right"]
    best: dict[tuple[str, str], float] = {}
    for row in peers:
        key = row["case"], row["precision"]
        best[key] = min(row["median"], best.get(key, row["median"]))
    for row in measured(rows):
        for name, precision in (("vs_peer", row["precision"]), ("vs_float32_peer", "float32")):
            fastest = best.get((row["case"], precision))
            row[name] = fastest and fastest / row["median"]
    return rows


def race(
    case: Case,
    who: list[Contender],
    device: str,
    threads: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Run one case; the rows of its contenders."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "reference.pt"
        moved = reference(case, device, threads, path)
        running = Race(stack, case, device, threads, who)
        with tqdm(total=rounds, desc=case.name, leave=False) as bar:
            running.run(rounds, bar)
        running.check(path)
    return judged(list(running.rows()), moved)


def speed(
    device: str,
    threads: int,
    rounds: int,
    only: str,  # words that stand in a case's name or a contender's name and precision
) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each race; 20 ways or 5 steps get half as many rounds, both a third.

    On a GPU each precision has a race of its own: all contenders share one memory.
    """
    rows: list[dict[str, Any]] = []
    for case, who in tqdm(races(device, only), desc="speed"):
        some = max(1, rounds // (1 + (case.way > 5) + (case.steps > 1)))
        rows += race(case, who, device, threads, some)
        yield compared(rows)


def races(device: str, only: str) -> list[tuple[Case, list[Contender]]]:
    """Which cases are run, and who takes part in each."""
    found = []
    cases = speed_cases(device, data_here())
    for case in cases:
        who = contenders(case, device, main=case == cases[0])
        who = [c for c in who if all(w in " ".join((case.name, *c)) for w in only.split())]
        for together in [[p] for p in TOLERANCE] if device == "cuda" else [list(TOLERANCE)]:
            found.append((case, [c for c in who if c.precision in together]))
    return [(case, who) for case, who in found if who]
