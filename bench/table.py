"""The reports as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from bench.soak import MIB, conclusion
from bench.speed import TOLERANCE


def milliseconds(row: dict[str, Any]) -> str:
    """Median and quartiles."""
    low, high = (1e3 * q for q in row["quartiles"])
    return f"{1e3 * row['median']:9.1f}  {f'({low:.1f} to {high:.1f})':20}"


def times(ratio: float | None) -> str:
    """How many times faster than a peer; a dash where there is none."""
    return f"{'-':>7}" if ratio is None else f"{ratio:6.2f}x"


def heading(content: dict[str, Any]) -> Iterator[str]:
    """Where the numbers come from."""
    known = {name: v for name, v in content["versions"].items() if v}
    yield f"{content['benchmark']} on {content['device_name']}, {content['date']}, commit {content['commit']}"
    yield ", ".join(f"{name} {version}" for name, version in known.items())


def speed_table(content: dict[str, Any]) -> str:
    """A block for each case, a line for each contender."""
    lines = list(heading(content))
    for case, rows in groupby(content["rows"], lambda row: row["case"]):
        group = list(rows)
        of = group[0]
        lines += ["", f"{case}: {of['tasks']} tasks, {of['query']} queries a class, {of['data']}"]
        moved = max((row["moved"] for row in group if row["status"] != "failed"), default=0.0)
        if moved > TOLERANCE["float32"]:
            lines += [
                f"  next to a kink: the exact gradient moves by {moved:.0e} with its parameters"
            ]
        lines += [
            f"  {'':12} {'':8} {'ms':>9}  {'(quartiles)':20} {'tasks/s':>8} {'peer':>7} {'float32':>7}"
            f" {'MiB':>7} {'first s':>8} {'error':>8} {'float64':>8}"
        ]
        lines += [speed_line(row) for row in group]
    return "\n".join(lines)


def speed_line(row: dict[str, Any]) -> str:
    """One contender."""
    who = f"  {row['name']:12} {row['precision']:8}"
    if row["status"] == "failed":
        return f"{who} failed: {row['reason']}"
    ratios = f"{times(row['vs_peer'])} {times(row['vs_float32_peer'])}"
    cost = f"{row['peak_memory'] / 2**20:7.0f} {row['first_step']:8.2f}"
    exact = row["error_float64"]
    errors = f"{row['error']:8.1e} {'-' if exact is None else f'{exact:.1e}':>8}"
    line = f"{who} {milliseconds(row)} {row['tasks_per_second']:8.1f} {ratios} {cost} {errors}"
    return line if row["status"] == "right" else f"{line} WRONG"


def sampling_table(content: dict[str, Any]) -> str:
    """A line for each sampler."""
    lines = [*heading(content), ""]
    for row in content["rows"]:
        what = f"{row['way']:2}-way {row['shot']}-shot, {row['batch']:4} at once"
        who = f"  {what}  {row['sampler']:22}"
        if row["status"] == "failed":
            lines.append(f"{who} failed: {row['reason']}")
            continue
        speed = f"{row['episodes_per_second']:9.0f} episodes/s {row['images_per_second']:10.0f} images/s"
        lines.append(f"{who} {speed}")
    return "\n".join(lines)


def growth_table(content: dict[str, Any]) -> str:
    """A line for each axis: its exponent and its points."""
    lines = [*heading(content), ""]
    for fit in content["exponents"]:
        low, high = fit["fitted_on"]
        points = [row for row in content["rows"] if row["axis"] == fit["axis"]]
        seen = ", ".join(f"{row['value']}: {1e3 * row['median']:.0f} ms" for row in points)
        slope = f"exponent {fit['exponent']:.2f} from {low} to {high}, R2 {fit['r2']:.3f}"
        lines.append(f"  {fit['axis']:6} {slope}   {seen}")
    return "\n".join(lines)


def accuracy_table(content: dict[str, Any]) -> str:
    """How long a training took and what it reached."""
    lines = list(heading(content))
    for row in content["rows"]:
        if row["status"] == "failed":
            lines += [row["command"], f"  failed: {row['reason']}"]
            continue
        scores = row["score"] if isinstance(row["score"], list) else [row["score"]]
        lines += [row["command"], f"  {row['seconds']:.0f} s (hoped for: {row['goal_seconds']} s)"]
        lines += [
            f"  {s['queries']}: {100 * s['mean']:.2f} ± {100 * s['ci95']:.2f}% of {s['n']} tasks "
            f"(hoped for: {100 * row['goal']:.1f}%)"
            for s in scores
        ]
    return "\n".join(lines)


def processes_table(content: dict[str, Any]) -> str:
    """A line for each number of processes."""
    lines = [*heading(content), ""]
    for row in content["rows"]:
        who = f"  {row['processes']:2} processes, {row['tasks']} tasks"
        if row["status"] == "failed":
            lines.append(f"{who} failed: {row['reason']}")
            continue
        alone, shared, within, exchange = (
            1e3 * row[k]["median"] for k in ("alone", "shared", "within", "exchange")
        )
        speed = f"alone {alone:.0f} ms, shared {shared:.0f} ms, {row['speedup']:.2f}x"
        cost = f"in exchanges {within:.2f} ms, an exchange alone {exchange:.2f} ms"
        lines.append(f"{who}  {speed}; {cost}, {row['bytes']} bytes")
    return "\n".join(lines)


def soak_table(content: dict[str, Any]) -> str:
    """The last note, and the conclusion."""
    last = content["rows"][-1]
    size = f"{last['resident'] / MIB:.0f} MiB, {last['files']} files, {last['threads']} threads"
    done = f"  {last['seconds'] / 60:.1f} minutes, {last['steps']} outer steps: {size}"
    where = f"{last['disk'] / MIB:.1f} MiB on disk"
    return "\n".join([*heading(content), "", f"{done}, {where}", conclusion(content["verdict"])])


TABLES = {
    "speed": speed_table,
    "sampling": sampling_table,
    "growth": growth_table,
    "processes": processes_table,
    "accuracy": accuracy_table,
    "soak": soak_table,
}
