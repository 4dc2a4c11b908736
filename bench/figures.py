"""The reports as figures, for the chapter on speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.peers import PEERS
from bench.soak import MIB
from bench.speed import measured

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # told apart by every eye
LABELS = {
    "steps": "inner steps",
    "size": "image size",
    "shot": "shot",
    "way": "way",
    "tasks": "tasks",
}


def speed_figure(content: dict[str, Any]) -> Figure:
    """Tasks per second of everybody in the first case, with quartiles; the library in orange."""
    first = content["rows"][0]["case"]
    rows = [row for row in measured(content["rows"]) if row["case"] == first][::-1]
    figure = Figure((7, 0.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel="tasks per second", title=first)
    for i, row in enumerate(rows):
        speed = row["tasks_per_second"]
        slow, fast = (row["tasks"] / q for q in reversed(row["quartiles"]))
        colour = BLUE if row["name"] in PEERS else ORANGE
        spread = [[max(0.0, speed - slow)], [max(0.0, fast - speed)]]
        axes.barh(i, speed, color=colour, xerr=spread, ecolor=GREY)
    axes.set_yticks(range(len(rows)), map(label, rows))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def label(row: dict[str, Any]) -> str:
    """Who it is, and whether its gradient is wrong."""
    return f"{row['name']}, {row['precision']}" + ", WRONG" * (row["status"] == "wrong")


def growth_figure(content: dict[str, Any]) -> Figure:
    """Time against each size, both logarithmic, with the fitted line where it was fitted."""
    fits = content["exponents"]
    figure = Figure((2.4 * len(fits), 2.8), layout="constrained")
    for axes, fit in zip(
        figure.subplots(1, len(fits), sharey=True, squeeze=False)[0], fits, strict=True
    ):
        grown(axes, fit, [row for row in content["rows"] if row["axis"] == fit["axis"]])
    figure.axes[0].set_ylabel("seconds a meta-gradient")
    return figure


def grown(axes: Axes, fit: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One panel of the figure of growth."""
    x, y = ([row[key] for row in rows] for key in ("value", "median"))
    low, high = ([row["quartiles"][i] for row in rows] for i in (0, 1))
    spread = [
        [m - a for m, a in zip(y, low, strict=True)],
        [b - m for m, b in zip(y, high, strict=True)],
    ]
    axes.errorbar(x, y, spread, fmt="o", color=BLUE)
    ends = fit["fitted_on"]
    axes.plot(ends, [fit["factor"] * end ** fit["exponent"] for end in ends], color=ORANGE)
    axes.set(xscale="log", yscale="log", xlabel=LABELS[fit["axis"]])
    axes.set_xticks(x, map(str, x))
    axes.minorticks_off()
    axes.set_title(f"exponent {fit['exponent']:.2f}", fontsize="medium")


def soak_figure(content: dict[str, Any]) -> Figure:
    """Memory and open files against time; orange: the slope after the process has settled."""
    rows, found = content["rows"], content["verdict"]
    minutes = np.array([row["seconds"] for row in rows]) / 60
    memory = np.array([row["resident"] for row in rows]) / MIB
    files = [row["files"] for row in rows]
    figure = Figure((7, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot(minutes, memory, ".", color=BLUE)
    if found:
        late = 60 * minutes >= found["settled_after"]
        rise = found["mib_per_hour"] / 60 * (minutes - minutes[late].mean())
        above.plot(minutes[late], (memory[late].mean() + rise)[late], color=ORANGE)
    above.set(ylabel="resident MiB", ylim=(0, 1.1 * memory.max()))
    below.plot(minutes, files, ".", color=GREY)
    below.set(xlabel="minutes", ylabel="open files", ylim=(0, 1.2 * max(files)))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES = {"speed": speed_figure, "growth": growth_figure, "soak": soak_figure}


def draw(content: dict[str, Any], path: Path) -> None:
    """Save the figure of a report beside its JSON file, where the part has one."""
    if content["benchmark"] in FIGURES and content["rows"]:
        FIGURES[content["benchmark"]](content).savefig(path.with_suffix(".svg"))
