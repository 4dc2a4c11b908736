"""One run of a target within its bounds."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fuzz.targets import TARGETS

SECONDS = 10

# What no reader may do, and what it may do only in its folder, by the names of Python's audit events.
FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
FORBIDDEN |= {"socket.connect", "pickle.find_class"}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Failure(AssertionError):
    """A reader did what it should not."""


class TooLong(BaseException):
    """Time is over; no `Exception`, so that nobody who catches those takes it for one of his own."""


def survive(name: str, data: bytes) -> None:
    """Give a target some bytes.  Raises `Failure`, `TooLong`, or what the reader should not have raised."""
    target = TARGETS[name]
    with (
        TemporaryDirectory() as made,
        bounded(name, folder := Path(made).resolve(), target.megabytes),
    ):
        try:
            target.read(folder, data)
        except target.raises as error:
            if (target.says or made) not in str(error):
                raise Failure(f"{name}: this error does not say where: {error!r}") from error


@contextmanager
def bounded(name: str, folder: Path, megabytes: int = 256) -> Iterator[None]:
    """Within it the process may take so much time and memory, and write only there."""
    began, before = time.monotonic(), _megabytes("VmRSS", afresh=True)
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watch.folder, _watch.seen = str(folder), []
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _watch.folder = None
    if _watch.seen:
        raise Failure(f"{name}: {_watch.seen[0]}")
    if (seconds := time.monotonic() - began) > SECONDS:
        raise Failure(f"{name}: took {seconds:.0f} s, more than {SECONDS}")
    if (more := _megabytes("VmHWM") - before) > megabytes:
        raise Failure(f"{name}: took {more:.0f} MiB of memory, more than {megabytes}")


def _stop(*_: Any) -> None:
    raise TooLong(f"more than {SECONDS} s")


def _megabytes(field: str, afresh: bool = False) -> float:
    """Memory of this process, now or at its peak since last time; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if afresh:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) / 1024


class _Watch:
    """Notes what a reader does that it should not."""

    folder: str | None = None  # where it may write; `None`: nobody is watched
    seen: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event}{args}")
        elif event in CHANGES or (event == "open" and args[2] & WRITES):
            places = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
            paths = places[:1] if event == "open" else places
            self.seen += [f"{event} {p}" for p in paths if not self.allowed(p)]

    def allowed(self, path: str) -> bool:
        return path == os.devnull or Path(os.path.realpath(path)).is_relative_to(self.folder)


_watch = _Watch()
sys.addaudithook(_watch)
sys.dont_write_bytecode = True  # what is imported late is no writing of the reader's
