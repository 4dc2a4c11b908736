"""A contender's own process, and the handle by which it is asked: one JSON line there, one back.

    python -m bench.worker THREADS DEVICE

Each process imports, allocates and compiles for itself, so that threads, caches and peak memory are its own.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds that an answer may take


class Failed(RuntimeError):
    """A contender could not do it; the message is its one-line reason."""


class Work(NamedTuple):
    """What a process measures."""

    step: Callable[[], None]
    gradient: Callable[[], Any] | None = None  # of the last step, all parameters in one vector


def one_line(text: str) -> str:
    """The first line that says something, without the paths of a machine."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return re.sub(r"(?<![\w.])(/[\w.+@-]+){2,}/?", "...", line)[:300]


class Worker:
    """A process that measures; leaving the context ends it."""

    def __init__(
        self,
        threads: int,  # of torch in the process
        device: str = "cpu",
    ):
        self.folder = TemporaryDirectory()  # what it compiles is not found by the next
        self.errors = open(Path(self.folder.name) / "errors", "w+")  # noqa: SIM115 - closed at exit
        cache = str(Path(self.folder.name) / "compiled")
        more = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": cache}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(threads), device],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors},
            **{"text": True, "cwd": ROOT, "env": os.environ | more},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.process.stdin.close()  # it ends after the last line, with what it has started
            self.process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        self.folder.cleanup()

    def tell(self, action: str, **how: Any) -> None:
        """Ask without waiting; `answer` waits."""
        try:
            self.process.stdin.write(json.dumps({"action": action, **how}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: `answer` says why

    def answer(self) -> Any:
        """What it answers; raises `Failed` where it could not, ended, or took too long."""
        timer = Timer(LIMIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            raise Failed(self.last_words())
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["value"]

    def last_words(self) -> str:
        """Why a process ended, as far as one can tell."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return one_line(f"its process ended with status {code}: {lines[-1] if lines else ''}")

    def ask(self, action: str, **how: Any) -> Any:
        """`tell`, then `answer`."""
        self.tell(action, **how)
        return self.answer()


class Served:
    """The other end: what the process can be asked for."""

    def __init__(self, device: str):
        self.device = device
        self.works: dict[str, Work] = {}

    def make(self, maker: str, settings: dict[str, Any], name: str = "") -> None:
        """Import, load and build: `maker` is "module:function" and gives a `Work`."""
        from bench.measure import Memory, warm_up

        warm_up(self.device)
        module, _, function = maker.partition(":")
        work = getattr(importlib.import_module(module), function)(settings)
        self.works[name] = work
        self.memory = Memory(self.device)

    def first(self, name: str = "") -> float:
        """Seconds of the first step, with all that it imports or compiles.

        A GPU takes some more steps, for which no clock runs: then a step that is to be recorded has been.
        """
        from bench.measure import RECORDED, timed

        seconds = timed(self.works[name].step, self.device)
        for _ in range(RECORDED if self.device == "cuda" else 0):
            self.works[name].step()
        return seconds

    def round(self, name: str = "", **how: Any) -> float:
        """Seconds of one step: the mean of a round."""
        from bench.measure import round_of

        return round_of(self.works[name].step, self.device, **how)

    def forget(self) -> None:
        """Give the memory back: others measure on the same device."""
        from bench.measure import give_back

        self.works.clear()
        give_back(self.device)

    def peak(self) -> int:
        """Bytes at the peak, above those after `make`."""
        return self.memory.peak()

    def save(self, path: str, name: str = "") -> None:
        """Keep the gradient of the last step in a file, as a reference."""
        import torch

        torch.save(self.works[name].gradient().double().cpu(), path)

    def error(self, path: str, name: str = "") -> float:
        """How far the gradient of the last step is from a reference."""
        import torch

        from bench.measure import relative_error

        error = relative_error(self.works[name].gradient(), torch.load(path, weights_only=True))
        if not math.isfinite(error):
            raise ValueError("the gradient is not finite")
        return error


def serve(threads: int, device: str) -> None:
    """Answer line after line; what libraries print goes to the standard error instead."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.init()
    served = Served(device)
    for line in sys.stdin:
        how = json.loads(line)
        try:
            answer = {"value": getattr(served, how.pop("action"))(**how)}
        except Exception as error:
            answer = {"failed": one_line(f"{type(error).__name__}: {error}")}
        print(json.dumps(answer), file=out, flush=True)
    served.works.clear()  # ends the processes of a DataLoader
    os._exit(0)  # torch would take a second to say goodbye


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
