"""One process beside several: the same outer step, by process 0 alone and shared by all.

    torchrun --nproc-per-node N -m bench.processes SETTINGS

Both ways run in the same processes, rounds interleaved; while process 0 works alone, the others wait.
On a CPU each process has one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.cases import QUERIES, Case, data_here, job_of
from bench.measure import quartiles, round_of, timed
from bench.worker import LIMIT, ROOT, one_line
from metabook import engine, processes
from metabook.structures import tree_map
from metabook.training import Outer

ROUND = 1.0  # seconds that a round lasts at least
MESSAGES = 20  # exchanges of a round that is only exchanges


class Exchange:
    """In place of `summed_`: how long the exchanges of the steps took, and what they carried."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.calls = 0.0, 0, 0

    def __call__(self, tensors: list[Tensor]) -> None:
        start = perf_counter()
        processes.summed_(tensors)
        self.seconds += perf_counter() - start
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        self.calls += 1


class Ways:
    """The same step, alone and shared."""

    def __init__(self, settings: dict[str, Any]):
        self.device, job = settings["device"], job_of(settings)
        learner = job.learner.train()
        self.outer = Outer(learner, torch.optim.Adam(learner.parameters(), lr=1e-3))
        self.tasks, self.whole = job.case.tasks, job.episodes
        mine = processes.share(self.tasks)
        self.part = tree_map(lambda t: t[mine], self.whole)

    def alone(self) -> None:
        """Process 0 takes all tasks."""
        self.outer.gradient.together = None
        self.outer.turn(self.whole)

    def shared(self) -> None:
        """Every process takes its share."""
        self.outer.gradient.together = self.tasks
        self.outer.turn(self.part)

    def exchange(self) -> None:
        """What travels in a shared step, with nothing to wait for."""
        processes.summed_([p.grad for p in self.outer.learner.parameters()])

    def seconds_of(self, step: Callable[[], None]) -> float:
        """A round in which all take part: as many steps as the first one says."""
        processes.wait()
        calls = torch.tensor([max(1.0, ROUND // timed(step, self.device))])
        processes.alike_([calls])
        return timed(lambda: [step() for _ in range(int(calls))], self.device) / int(calls)


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """What process 0 finds, by rounds."""
    ways, exchange = Ways(settings), Exchange()
    engine.summed_ = exchange
    found: dict[str, list[float]] = {"alone": [], "shared": [], "within": [], "exchange": []}
    for n in range(settings["rounds"] + 1):  # the first one warms up
        processes.wait()
        alone = round_of(ways.alone, ways.device, ROUND) if processes.main() else 0.0
        before = exchange.seconds, exchange.calls
        shared = ways.seconds_of(ways.shared)
        within = (exchange.seconds - before[0]) / (exchange.calls - before[1])
        processes.wait()
        message = timed(lambda: [ways.exchange() for _ in range(MESSAGES)], ways.device) / MESSAGES
        if n:
            for own, new in zip(found.values(), (alone, shared, within, message), strict=True):
                own.append(new)
    return {"seconds": found, "bytes": exchange.bytes // exchange.calls}


def main(settings: dict[str, Any]) -> None:
    """In each of the processes; the first one prints what it found."""
    if settings["device"] == "cpu":
        torch.set_num_threads(1)
    processes.join()
    found = measured(settings)
    if processes.main():
        print(json.dumps(found), flush=True)


def launched(n: int, case: Case, device: str, rounds: int) -> dict[str, Any]:
    """The row of `n` processes."""
    settings = {"case": asdict(case), "device": device, "precision": "float32", "rounds": rounds}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), "-m", "bench.processes", json.dumps(settings)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "cwd": ROOT, "env": env, "timeout": LIMIT}
    done = subprocess.run(command, check=False, **pipes)
    row = {"processes": n, "threads": 1, **asdict(case)}
    if done.returncode:
        return row | {"status": "failed", "reason": one_line(done.stderr)}
    return row | scored(n, case.tasks, **json.loads(done.stdout.splitlines()[-1]))


def scored(
    n: int,  # processes
    tasks: int,  # of a step
    seconds: dict[str, list[float]],  # by rounds
    bytes: int,  # of a message
) -> dict[str, Any]:
    """Medians and quartiles, and what follows from them."""
    spread = {name: quartiles(times) for name, times in seconds.items()}
    alone, shared = (spread[name][1] for name in ("alone", "shared"))
    numbers = {
        name: {"median": middle, "quartiles": [low, high]}
        for name, (low, middle, high) in spread.items()
    }
    speed = {"steps_per_second": 1 / shared, "tasks_per_second": tasks / shared}
    more = {"speedup": alone / shared, "bytes": bytes, "sent": round(2 * (n - 1) / n * bytes)}
    return {"status": "measured", "rounds": len(seconds["alone"]), **numbers, **speed, **more}


def counts(device: str, tasks: int) -> list[int]:
    """Two, four, ... processes, as many as there are cores or GPUs, and no more than tasks."""
    most = min(tasks, torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1)
    return [2**k for k in range(1, most.bit_length()) if 2**k <= most]


def several(device: str, threads: int, rounds: int, only: str) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each number of processes."""
    data, rows = data_here(), []
    case = Case(query=QUERIES[data], pool="stride", data=data)
    for n in tqdm(counts(device, case.tasks), desc="processes", leave=False):
        if only in f"processes-{n}":
            rows.append(launched(n, case, device, rounds))
            yield rows


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
