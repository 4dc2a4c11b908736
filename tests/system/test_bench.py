"""The benchmark: its contenders compute the same, one that does not is told, and its files hold what they should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from notebooks import ROOT
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from bench.accuracy import accuracy
from bench.cases import Case, Job, noise
from bench.figures import draw
from bench.growth import exponent, growth
from bench.measure import relative_error
from bench.peers import PEERS
from bench.processes import counts, launched
from bench.report import report, write
from bench.sampling import Episodes
from bench.soak import MIB, conclusion, slope, soak, verdict
from bench.speed import (
    NUDGE,
    Contender,
    Race,
    compared,
    judged,
    make,
    nudge,
    race,
    races,
    settings_of,
)
from bench.table import TABLES
from bench.worker import Failed, Worker, one_line
from metabook.episodes import FewShot

TINY = Case(way=3, query=2, tasks=2, size=16, width=4, data="random")
SECOND, FIRST, PROTOTYPES = [
    replace(TINY, method=m, steps=2) for m in ("maml", "first-order", "prototypes")
]
FIELDS = {
    "case",
    "name",
    "precision",
    "status",
    "median",
    "quartiles",
    "rounds",
    "tasks_per_second",
}
FIELDS |= {"peak_memory", "first_step", "error", "error_float64", "moved", "tolerance"}
FIELDS |= {"vs_peer", "vs_float32_peer"}


def gradient(case: Case, name: str, precision: str = "float64") -> torch.Tensor:
    """The meta-gradient that a contender computes."""
    work = make(settings_of(case, "cpu", Contender(name, precision)))
    work.step()
    work.step()  # the gradient of one step, not of the steps so far
    return work.gradient()


def row(
    name: str, error: float, precision: str = "float32", median: float = 1.0, exact: float = 0.0
) -> dict:
    found = {"status": "measured", "median": median, "error": error, "error_float64": exact}
    return {"case": "any", "name": name, "precision": precision, **found}


@pytest.mark.parametrize("pool", ["max", "stride"])
def test_the_two_networks_are_one(pool):
    job = Job(replace(TINY, pool=pool), precision="float64")
    x = torch.randn(6, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(job.plain(x), job.conv4(x))
    assert [k for k, _ in job.plain.named_parameters()] == [
        k for k, _ in job.conv4.named_parameters()
    ]


@pytest.mark.parametrize("name", ["higher", "torchopt", "ours-loop", "ours-vmap"])
@pytest.mark.parametrize(
    "case", [SECOND, FIRST, replace(SECOND, pool="stride")], ids=lambda case: case.name
)
def test_every_contender_computes_what_the_plain_loop_computes(case, name):
    if name in PEERS:
        pytest.importorskip(name)
    assert relative_error(gradient(case, name), gradient(case, "autograd")) < 1e-9


@pytest.mark.parametrize("name", ["ours-loop", "ours-vmap"])
def test_prototypical_networks_are_those_of_the_plain_loop(name):
    wanted = gradient(PROTOTYPES, "autograd")
    assert relative_error(gradient(PROTOTYPES, name), wanted) < 1e-9


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_who_has_no_inner_loop_says_so(name):
    pytest.importorskip(name)
    with pytest.raises(NotImplementedError, match="plain loop"):
        gradient(PROTOTYPES, name)


def test_a_wrong_gradient_is_told():
    wanted = gradient(SECOND, "autograd")
    rows = [
        row("autograd", relative_error(gradient(SECOND, "autograd", "float32"), wanted)),
        row("ours-loop", relative_error(gradient(FIRST, "ours-loop", "float32"), wanted)),
        row("ours-vmap", relative_error(wanted * torch.nan, wanted)),
    ]
    assert [r["status"] for r in judged(rows)] == ["right", "wrong", "wrong"]


@pytest.mark.parametrize("moved, verdict", [(0.01, "wrong"), (0.02, "right"), (10.0, "right")])
def test_next_to_a_kink_the_exact_gradient_sets_the_bound(moved, verdict):
    rows = judged([row("autograd", 0.0), row("ours-loop", 0.05), row("higher", 0.6)], moved)
    assert [r["status"] for r in rows] == ["right", verdict, "wrong"]


def test_a_kink_excuses_no_error_in_float64():
    rows = judged([row("autograd", 0.0), row("ours-loop", 0.05, exact=1e-6)], moved=0.1)
    assert [r["status"] for r in rows] == ["right", "wrong"]


def test_who_cannot_compute_in_float64_keeps_what_was_measured(tmp_path):
    who, path = Contender("ours-loop", "float32"), tmp_path / "reference.pt"
    torch.save(gradient(TINY, "autograd"), path)
    with ExitStack() as stack:
        running = Race(stack, TINY, "cpu", 1, [who])
        running.run(1, tqdm(disable=True))
        running.settings[who] |= {"contender": "nobody"}
        running.check(path)
        [found] = judged(list(running.rows()))
    assert found["status"] == "right" and found["error"] > 0 and found["error_float64"] is None
    content = report("speed", "cpu", 1, "", settings={}, rows=compared([found]))
    assert TABLES["speed"](content).endswith(" -")


def test_a_nudge_moves_every_parameter_a_little():
    start, moved, again = (Job(TINY, precision="float64").plain for _ in range(3))
    nudge(moved, seed=1)
    nudge(again, seed=1)
    for p, q, r in zip(*(net.parameters() for net in (start, moved, again)), strict=True):
        assert torch.equal(q, r) and (q != p).all()
        assert ((q - p).abs() <= 6 * NUDGE * p.abs().where(p != 0, 1)).all()


def test_ratios_are_to_the_fastest_peer_that_is_right():
    rows = [
        row("autograd", 0.0, median=4.0),
        row("higher", 1.0, median=1.0),  # fast and wrong
        row("autograd", 0.0, "bfloat16", median=3.0),
        row("ours-auto", 0.0, "bfloat16", median=2.0),
        {
            "case": "any",
            "name": "torchopt",
            "precision": "float32",
            "status": "failed",
            "reason": "why",
        },
    ]
    other = row("autograd", 0.0, median=0.5) | {"case": "another"}
    ours = compared([*judged(rows), *judged([other])])[3]
    assert (ours["vs_peer"], ours["vs_float32_peer"]) == (1.5, 2.0)


def test_a_case_runs_through_processes_into_a_file(tmp_path):
    who = [Contender(name, "float32") for name in ("autograd", "nobody", "ours-auto")]
    rows = compared(race(TINY, who, "cpu", 1, rounds=1))
    plain, nobody, ours = rows
    assert nobody["status"] == "failed" and "nobody" in nobody["reason"]
    assert plain["status"] == ours["status"] == "right"
    assert set(plain) >= FIELDS and set(ours) >= FIELDS
    assert ours["median"] > 0 and ours["peak_memory"] > 0 and ours["error"] > 0
    assert 0 < ours["error_float64"] < 1e-9 < ours["error"]
    content = report("speed", "cpu", 1, "python -m bench speed", settings={"only": ""}, rows=rows)
    path = write(content, tmp_path)
    draw(content, path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "bench-speed-cpu.json",
        "bench-speed-cpu.svg",
    }
    assert json.loads(path.read_text()) == content
    assert {"command", "versions", "device_name", "threads", "commit", "date"} <= set(content)
    assert not re.search(r"/(home|root|tmp|work|usr)/", path.read_text())
    assert "failed: " in TABLES["speed"](content)


def test_words_choose_cases_and_contenders():
    [(case, who)] = races("cpu", "maml-1step-5way-1shot-max autograd")
    assert case.name == "maml-1step-5way-1shot-max"
    assert who == [Contender("autograd", p) for p in ("float32", "bfloat16")]
    [(_, who)] = races("cpu", "maml-5step-20way-5shot-stride ours")
    assert {c.name for c in who} == {"ours-auto", "ours-loop", "ours-vmap"}
    found = races("cuda", "maml-1step-5way-1shot-max")  # there a precision has a race of its own
    assert [{c.precision for c in who} for _, who in found] == [{"float32"}, {"tf32"}, {"bfloat16"}]
    assert races("cpu", "nobody") == []


@pytest.mark.parametrize("status", [0, 1])
def test_a_training_that_fails_is_a_row_that_says_so(monkeypatch, status):
    score = {"queries": "joint", "mean": 0.987, "ci95": 0.001, "n": 1000}
    command = [sys.executable, "-c", f"print({json.dumps(score)!r}); raise SystemExit({status})"]
    run = subprocess.run
    monkeypatch.setattr("subprocess.run", lambda _, **how: run(command, **how))
    [[found]] = accuracy("cuda", 1, 1, "")
    content = report("accuracy", "cpu", 1, "", settings={}, rows=[found])
    said = TABLES["accuracy"](content)
    assert ("failed: metabook train ended with status 1" if status else "98.70 ± 0.10%") in said


def test_a_process_that_dies_is_a_failure_with_a_reason():
    with Worker(1) as worker, pytest.raises(Failed, match="ended with status 3"):
        worker.ask("make", maker="os:_exit", settings=3)


def test_a_reason_is_one_line_without_paths():
    text = "\nOSError: no /home/someone/cache/x.so here, 3/4 of it\nmore"
    assert one_line(text) == "OSError: no ... here, 3/4 of it"


def test_both_samplers_give_the_same_kind_of_episode():
    classes = noise(TINY)
    sizes = (3, 1, 2)
    ours = FewShot(classes, *sizes).sample(1)
    support, support_y, query, query_y = Episodes(classes, *sizes)[0]
    pairs = [(support, ours.support.x), (query, ours.query.x)]
    pairs += [(support_y, ours.support.y), (query_y, ours.query.y)]
    assert all(a.shape == b[0].shape and a.dtype == b.dtype for a, b in pairs)
    assert torch.equal(query_y, ours.query.y[0])
    found = torch.cat([support, query]).flatten(1)
    assert len(found.unique(dim=0)) == len(found) == 9  # no example twice


def test_growth_is_measured_point_by_point(monkeypatch):
    monkeypatch.setattr("bench.growth.AXES", {"tasks": (1, 2, 4), "way": (2, 3)})
    [(rows, exponents)] = growth(TINY, "cpu", 1, rounds=1, only="growth-tasks")
    assert [(row["axis"], row["value"]) for row in rows] == [("tasks", n) for n in (1, 2, 4)]
    assert exponents == [exponent(rows)]


def test_the_exponent_is_the_slope_at_the_largest_sizes():
    sizes = [1, 2, 4, 8, 16]
    times = np.maximum(3.0 * np.square(sizes), 40.0)  # flat at first
    rows = [{"axis": "way", "value": n, "median": t} for n, t in zip(sizes, times, strict=True)]
    fit = exponent(rows)
    assert fit["exponent"] == pytest.approx(2.0) and fit["factor"] == pytest.approx(3.0)
    assert fit["fitted_on"] == [4, 16] and fit["r2"] == pytest.approx(1.0)


def test_several_processes_are_measured_beside_one(monkeypatch):
    row = launched(2, TINY, "cpu", rounds=1)
    assert row["status"] == "measured", row["reason"]
    times = [row[k]["median"] for k in ("alone", "shared", "within", "exchange")]
    assert min(times) > 0 and row["within"]["median"] < row["shared"]["median"]
    assert row["speedup"] == pytest.approx(times[0] / times[1])
    parameters = sum(p.numel() for p in Job(TINY).conv4.parameters())
    assert row["bytes"] == row["sent"] == 4 * (parameters + TINY.tasks)
    content = report("processes", "cpu", 1, "python -m bench processes", settings={}, rows=[row])
    assert "2 processes" in TABLES["processes"](content)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert counts("cpu", 8) == [2, 4] and counts("cpu", 3) == [2] and counts("cpu", 1) == []


def hour(leak: float) -> list[dict]:
    """Notes of an hour: memory jumps up and down by 10 MiB, fills caches at first, and leaks so many MiB."""
    rows = []
    for n in range(240):
        warm = 400 * min(1.0, n / 20)
        size = 500 + warm + 10 * (-1) ** n + leak * n / 240
        rows.append({"seconds": 15.0 * n, "resident": int(MIB * size), "files": 9, "threads": 2})
    rows[3]["files"], rows[99]["files"] = 100, 11
    return rows


@pytest.mark.parametrize("leak", [0.0, 60.0])
def test_a_leak_is_told_from_warming_up(leak):
    found = verdict(hour(leak))
    assert found["mib_per_hour"] == pytest.approx(leak, abs=found["ci95"])
    assert found["growth_mib"] == pytest.approx(0.8 * leak, abs=1)
    assert found["second_half_mib"] == pytest.approx(0.4 * leak, abs=1)
    assert 0 < found["ci95"] < 10 and found["settled_after"] == 300
    assert (found["files"], found["threads"]) == ([9, 11], [2, 2])
    said = conclusion(found)
    assert f"{found['mib_per_hour']:+.1f} ± " in said and "the first 5.0 minutes" in said
    assert "files: 9 to 11" in said


def test_the_slope_is_that_of_least_squares_with_its_interval():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 5.0, 6.0, 9.0])
    (rise, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert slope(list(x), list(y)) == pytest.approx((rise, 1.96 * np.sqrt(covariance[0, 0])))


def test_a_soak_of_seconds_trains_scores_and_takes_notes(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.soak.perf_counter", map(float, range(99)).__next__)
    *_, rows = soak("cpu", torch.get_num_threads(), minutes=0.2, cases=[SECOND, PROTOTYPES])
    assert [row["seconds"] for row in rows] == list(range(1, 13))  # one for each piece of work
    assert [row["steps"] // 20 for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert all(row["resident"] > 50 * MIB and row["files"] > 3 for row in rows)
    assert all(0 < row["disk"] < MIB for row in rows)  # a run takes the place of the one before
    assert verdict(rows[:9]) is None and "too few" in conclusion(None)
    settings = {"only": "", "minutes": 0.2}
    content = report("soak", "cpu", 1, "", settings=settings, verdict=verdict(rows), rows=rows)
    path = write(content, tmp_path)
    draw(content, path)
    assert path.name == "bench-soak-cpu.json" and path.with_suffix(".svg").exists()
    assert "memory: " in TABLES["soak"](content)
