"""The command line: python -m bench speed|sampling|growth|processes|accuracy|all --device cpu|cuda --rounds N --threads N --out results"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from bench.accuracy import accuracy
from bench.cases import speed_cases
from bench.figures import draw
from bench.growth import growth
from bench.processes import several
from bench.report import report, write
from bench.sampling import sampling
from bench.speed import speed
from bench.table import TABLES


class Part(StrEnum):
    """What is measured."""

    speed = "speed"
    sampling = "sampling"
    growth = "growth"
    processes = "processes"
    accuracy = "accuracy"
    all = "all"


class Device(StrEnum):
    """Where."""

    cpu = "cpu"
    cuda = "cuda"


def contents(
    part: str, device: str, threads: int, rounds: int, only: str
) -> Iterator[dict[str, Any]]:
    """What the report holds, as far as it has been measured."""
    settings = {"rounds": rounds, "only": only}
    if part == "growth":
        base = replace(speed_cases(device, "omniglot")[0], data="random")
        for rows, exponents in growth(base, device, threads, max(1, rounds // 2), only):
            yield {"settings": settings | asdict(base), "exponents": exponents, "rows": rows}
        return
    ways: dict[str, Callable[..., Iterator[list]]] = {
        "speed": speed,
        "sampling": sampling,
        "processes": several,
        "accuracy": accuracy,
    }
    measure = ways[part]
    for rows in measure(device, threads, rounds, only):
        yield {"settings": settings, "rows": rows}


def run(part: str, device: str, threads: int, rounds: int, only: str, out: Path) -> bool:
    """Measure one part; the file is written after each case, the table printed at the end.

    Says whether there was anything to measure.
    """
    threads = 1 if part == "processes" else threads  # there the processes are what is counted
    more = f" --only {only}" if only else ""
    command = (
        f"python -m bench {part} --device {device} --rounds {rounds} --threads {threads}{more}"
    )
    content = None
    for measured in contents(part, device, threads, rounds, only):
        content = report(part, device, threads, command, **measured)
        path = write(content, out)
    if content:
        draw(content, path)
        tqdm.write(f"\n{TABLES[part](content)}\n\n{path}")
    return content is not None


def main(
    part: Annotated[Part, typer.Argument(help="what to measure")] = Part.all,
    device: Annotated[Device, typer.Option(help="where")] = Device.cpu,
    rounds: Annotated[int, typer.Option(min=1, help="of each contender")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="of torch, each process")] = os.cpu_count()
    or 1,
    only: Annotated[str, typer.Option(help="cases whose name holds this")] = "",
    out: Annotated[Path, typer.Option(help="folder of the JSON files")] = Path("results"),
) -> None:
    """Measure the library beside its peers."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="--device")
    parts = [p for p in Part if p is not Part.all] if part is Part.all else [part]
    found = [run(one.value, device.value, threads, rounds, only, out) for one in parts]
    if not any(found):
        names = ", ".join(case.name for case in speed_cases(device.value, "omniglot"))
        message = f"{only!r} is part of no case; there are {names}, sampling-..., growth-..., processes-..."
        raise typer.BadParameter(message, param_hint="--only")


if __name__ == "__main__":
    typer.run(main)
