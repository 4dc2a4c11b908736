"""Where a measurement comes from, and the file that keeps it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch

from metabook.saving import commit, software, write_atomically

PEERS = ("higher", "torchopt", "learn2learn")


def versions() -> dict[str, str | None]:
    """Of the library and its peers; `None` for what is not installed."""
    found: dict[str, str | None] = dict(software())
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version()}


def device_in_words(device: str, threads: int) -> str:
    """The model of the GPU, or of the processor and how many threads compute."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {threads} threads"


def report(
    part: str,  # "speed", "sampling", "growth", "processes" or "soak"
    device: str,
    threads: int,
    command: str,  # that measures it again
    **content: Any,  # settings and rows
) -> dict[str, Any]:
    """Everything that a reader needs to measure it again."""
    return {
        "benchmark": part,
        "command": command,
        "date": date.today().isoformat(),
        "commit": commit("bench"),
        "device": device,
        "device_name": device_in_words(device, threads),
        "threads": threads,
        "versions": versions(),
        **content,
    }


def write(content: dict[str, Any], folder: Path) -> Path:
    """`bench-PART-DEVICE.json` in a folder; what `--only` chose gets a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    only = "".join(f"-{word}" for word in re.findall(r"\w+", content["settings"]["only"]))
    path = folder / f"bench-{content['benchmark']}-{content['device']}{only}.json"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path
