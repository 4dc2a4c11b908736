"""Clocks and memory of the process that is measured."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from metabook.graphs import Replayed

# Calls after the first, until a step has been recorded and replayed.
RECORDED = Replayed.warm_up + 1


def warm_up(device: str) -> None:
    """Let torch import and start what it puts off until it is used: no contender's first step pays for it."""
    x = torch.ones(2, 3, device=device)
    torch.func.vmap(torch.func.grad(lambda row: row.square().sum()))(x)
    torch.nn.functional.conv2d(x.view(1, 1, 2, 3), x.view(1, 1, 2, 3))


def give_back(device: str) -> None:
    """What nobody uses any more goes back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed(
    step: Callable[[], None],  # what is measured
    device: str,  # "cuda" waits for the GPU before and after
) -> float:  # seconds
    """How long one call takes, with everything that it started."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def round_of(
    step: Callable[[], None],  # what is measured
    device: str,
    seconds: float,  # call again until so much time has passed
    ahead: int = 0,  # calls before the clock starts
) -> float:  # seconds
    """The mean time of the calls of one round; a slow step is called once."""
    for _ in range(ahead):
        step()
    times = [timed(step, device)]
    while sum(times) < seconds:
        times.append(timed(step, device))
    return statistics.mean(times)


def resident(
    what: str = "VmHWM",  # the peak; "VmRSS": now
) -> int:  # bytes
    """Memory of this process.

    Linux tells it in /proc; `ru_maxrss`, which a process inherits from the one that started it, is
    for systems without.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith(what))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Memory:
    """The peak above what was there when it began: the networks and the data are counted before."""

    def __init__(self, device: str):
        gc.collect()
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
        except OSError:
            pass
        self.before = resident()

    def peak(self) -> int:
        """Bytes above the beginning: of the GPU's tensors, or of the process."""
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else resident()
        return now - self.before


def relative_error(
    found: torch.Tensor,  # a meta-gradient
    wanted: torch.Tensor,  # the reference, in float64
) -> float:
    """The length of the difference over the length of the reference; not finite where `found` is not."""
    return ((found.double().cpu() - wanted).norm() / wanted.norm()).item()


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high
