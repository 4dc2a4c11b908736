"""The command line: python -m bench speed|sampling|growth|processes|accuracy|all --device cpu|cuda --rounds N --threads N --out results

And python -m bench soak --minutes N, which is no part of all.
"""

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
from bench.soak import EVERY, STEPS, TEST, VALIDATION, soak, soak_cases, verdict
from bench.speed import speed
from bench.table import TABLES


class Part(StrEnum):
    """What is measured."""

    speed = "speed"
    sampling = "sampling"
    growth = "growth"
    processes = "processes"
    accuracy = "accuracy"
    soak = "soak"
    all = "all"


class Device(StrEnum):
    """Where."""

    cpu = "cpu"
    cuda = "cuda"


def contents(
    part: str, device: str, rounds: int, threads: int, only: str
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


def endured(device: str, threads: int, minutes: int) -> Iterator[dict[str, Any]]:
    """What the report of a soak holds, as far as it has got."""
    sizes = {"steps": STEPS, "every": EVERY, "validation": VALIDATION, "test": TEST}
    cases = soak_cases()
    settings = {"minutes": minutes, "only": "", **sizes, "cases": [asdict(case) for case in cases]}
    for rows in soak(device, threads, minutes, cases):
        yield {"settings": settings, "verdict": verdict(rows), "rows": rows}


def run(part: str, out: Path, **how: Any) -> bool:
    """Measure one part; the file is written as it goes on, the table printed at the end.

    `how` is what the command line says.  Says whether there was anything to measure.
    """
    if part == "processes":
        how["threads"] = 1  # there the processes are what is counted
    said = [f"--{name} {value}" for name, value in how.items() if value != ""]
    command = " ".join(["python -m bench", part, *said])
    content = None
    for measured in endured(**how) if part == "soak" else contents(part, **how):
        content = report(part, how["device"], how["threads"], command, **measured)
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
    only: Annotated[
        str,
        typer.Option(help="cases whose name holds this; of speed also contenders: 'max float32'"),
    ] = "",
    minutes: Annotated[int, typer.Option(min=1, help="of the soak, which all leaves out")] = 60,
    out: Annotated[Path, typer.Option(help="folder of the JSON files")] = Path("results"),
) -> None:
    """Measure the library beside its peers."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="--device")
    if part is Part.soak and not Path("/proc/self/fd").exists():
        raise typer.BadParameter("the soak reads /proc, which Linux has", param_hint="soak")
    if part is Part.soak:
        run(part.value, out, device=device.value, threads=threads, minutes=minutes)
        return
    parts = [p for p in Part if p not in (Part.all, Part.soak)] if part is Part.all else [part]
    how = {"device": device.value, "rounds": rounds, "threads": threads, "only": only}
    found = [run(one.value, out, **how) for one in parts]
    if not any(found):
        names = ", ".join(case.name for case in speed_cases(device.value, "omniglot"))
        message = f"{only!r} is part of no case; there are {names}, sampling-..., growth-..., processes-..."
        raise typer.BadParameter(message, param_hint="--only")


if __name__ == "__main__":
    typer.run(main)
