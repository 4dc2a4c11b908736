"""The command line: python -m fuzz [--seconds N] [--only NAME ...]"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fuzz.targets import TARGETS
from metabook.registry import lookup

PLACE = Path("build") / "fuzz"


def main(
    seconds: Annotated[int, typer.Option(help="For each target.", min=1)] = 60,
    only: Annotated[list[str], typer.Option(help="A target; may be given more than once.")] = [],  # noqa: B006
) -> None:
    """Feed the readers of files damaged ones; say what was found, and exit with 1 if it was anything."""
    found = []
    for name in only or TARGETS:
        lookup(name, TARGETS, "target")
        text = fuzzed(name, seconds)
        runs = re.search(r"number_of_executed_units: (\d+)", text)
        inputs = sorted(PLACE.glob(f"{name}-found-*"))
        typer.echo(f"{name:10} {seconds} s, {runs[1] if runs else '?'} runs, found {len(inputs)}")
        found += [told(path, text) for path in inputs]
    typer.echo("\n".join(found) or "nothing was found")
    sys.exit(bool(found))


def fuzzed(name: str, seconds: int) -> str:
    """Fuzz one target in a process of its own; returns its report."""
    corpus = PLACE / name
    corpus.mkdir(parents=True, exist_ok=True)
    for old in PLACE.glob(f"{name}-found-*"):
        old.unlink()
    for seed in TARGETS[name].seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "timeout": 0,  # `survive` has its own clock
        "rss_limit_mb": 6144,  # when nothing else helps
        "artifact_prefix": PLACE / f"{name}-found-",
        "print_final_stats": 1,
    }
    command = [sys.executable, "-W", "ignore", "-m", "fuzz.worker", name, str(corpus)]
    command += [f"-{option}={value}" for option, value in options.items()]
    where = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}  # no disk: faster
    done = subprocess.run(command, capture_output=True, env=os.environ | where)
    text = done.stderr.decode(errors="replace") + done.stdout.decode(errors="replace")
    (PLACE / f"{name}.log").write_text(text, encoding="utf-8")
    if done.returncode and not list(PLACE.glob(f"{name}-found-*")):
        sys.exit(f"{name} could not be fuzzed:\n{text[-2000:]}")
    return text


def told(path: Path, text: str) -> str:
    """What was found, and the bytes for the table of cases."""
    errors = [
        line for line in text.splitlines() if re.match(r"\w[\w.]*(Error|Failure|TooLong)", line)
    ]
    return f"{path}: {errors[-1] if errors else 'see the log'}\n  {base64.b64encode(path.read_bytes()).decode()}"


if __name__ == "__main__":
    typer.run(main)
