"""From a cold start to an accuracy: a whole training in a fresh process, validation included."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.worker import Failed

GOAL, SECONDS = 0.987, 60  # what is hoped for on one H200
RECIPE = (
    "--data omniglot --net pool=stride --net stats=batch --set lr=0.4 --set test_steps=3 "
    "--query 15 --batch 32 --steps 5000 --lr 3e-3 --every 2500"
)


def accuracy(device: str, threads: int, rounds: int, only: str) -> Iterator[list[dict[str, Any]]]:
    """MAML on Omniglot, 5-way 1-shot, random split of characters; 1,000 test tasks, joint queries.

    One run: `threads` and `rounds` play no part.  On a CPU it takes hours, so only a GPU is asked.
    """
    if device != "cuda" or only not in "accuracy-maml-omniglot":
        return
    command = f"metabook train maml {RECIPE} --device {device}"
    row = {"command": command, "goal": GOAL, "goal_seconds": SECONDS}
    try:
        yield [row | {"status": "measured", **trained(device)}]
    except Failed as failed:
        yield [row | {"status": "failed", "reason": str(failed)}]


def trained(device: str) -> dict[str, Any]:
    """How long it trained and what it scores."""
    with TemporaryDirectory() as room:
        folder, start = str(Path(room) / "maml"), time.perf_counter()
        metabook("train", "maml", *RECIPE.split(), "--device", device, "--out", folder)
        seconds = time.perf_counter() - start
        scored = metabook("evaluate", folder, "--tasks", "1000", "--device", device, "--json")
    return {"seconds": seconds, "score": json.loads(scored)}


def metabook(*words: str) -> str:
    """What the command prints; what it says besides is seen at once.  Raises `Failed`."""
    command = [sys.executable, "-m", "metabook", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"metabook {words[0]} ended with status {done.returncode}")
    return done.stdout
