"""Made from nbs/A05_runs.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import metabook
from metabook.engine import Engine
from metabook.episodes import Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.runs import Patience, status
from metabook.scores import evaluate
from metabook.training import fit


def cell_fea88dcf():
    # cell fea88dcf
    def heard_from(f):
        "What `f` gives, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    @contextmanager
    def quiet():
        "Within it nothing is said about what goes as expected."
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def wave_run(steps=4, folder=None, **how):
        "A very short run of MAML on sinusoids."
        torch.manual_seed(0)
        learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression", test_steps=2)
        how = {"meta_batch": 4, "every": 2, "log_every": 2, "progress": False} | how
        return fit(
            learner, Sinusoids(5, 10), steps=steps, validate=Sinusoids(5, 15), folder=folder, **how
        )

    return heard_from, quiet, wave_run


def test_the_log_and_the_folder():
    heard_from, quiet, wave_run = cell_fea88dcf()
    # cell 5b6b343b
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    run = wave_run(steps=5, folder=folder, notes={"author": "you"})
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and rows[0]["settings"]["meta_batch"] == 4
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert run.curve("validation")[0] == [2, 4, 5] and run.best.mean == min(
        run.curve("validation")[1]
    )
    assert {"lr", "gradient_norm", "tasks_per_second", "seconds"} <= set(rows[1])
    assert "loss" in status(run) and "best" in status(run)

    config = json.loads((folder / "config.json").read_text())
    assert "query=10" in config["tasks"]["tasks"] and "query=15" in config["validation"]["tasks"]
    assert config["method"]["args"]["steps"] == 1 and config["method"]["args"]["test_steps"] == 2
    assert (
        config["author"] == "you"
        and config["training"]["steps_taken"] == 5
        and config["training"]["optimizer"] == "Adam"
    )

    again = metabook.load(folder)
    frozen = Sinusoids(5, 10).freeze(20, seed=9)
    assert torch.equal(evaluate(run.learner, frozen).per_task, evaluate(again, frozen).per_task)
    with pytest.raises(FileExistsError, match="already holds a run"):
        wave_run(folder=folder)


def test_a_run_goes_on_where_it_was_left():
    heard_from, quiet, wave_run = cell_fea88dcf()

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log


def test_another_run_does_not_go_on():
    heard_from, quiet, wave_run = cell_fea88dcf()

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log
    # cell f612cd90
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    wave_run(steps=4, folder=folder)
    for how, message in [
        (dict(lr=0.5), "settings.lr was 0.001 and is 0.5"),
        (dict(seed=1), "settings.seed was 0 and is 1"),
        (dict(schedule=falling), "rates.1 was 1.0 and is 0.5"),
        (dict(optimizer=torch.optim.SGD), "settings.optimizer was 'Adam' and is 'SGD'"),
        (dict(steps=3), "steps=3, but the run in .* has taken 4 already: ask for more"),
        (dict(folder=None), "resume=True, but there is no folder"),
        (dict(meta_batch=8), "settings.meta_batch was 4 and is 8"),
        (dict(keep=-1), "keep=-1: expected how many"),
        (dict(notes={"recipe": "another"}), "notes.recipe was None and is 'another'"),
    ]:
        with pytest.raises(ValueError, match=message):
            wave_run(**({"steps": 4, "folder": folder, "resume": True} | how))
    with pytest.raises(ValueError, match=r"learner.args.lr was 0.01 and is 0.02"):
        other = MAML(MLP([1, 8, 1]), lr=0.02, kind="regression", test_steps=2)
        how = dict(meta_batch=4, every=2, log_every=2, validate=Sinusoids(5, 15), progress=False)
        fit(other, Sinusoids(5, 10), steps=4, folder=folder, resume=True, **how)

    _, said = heard_from(
        lambda: wave_run(
            steps=6, folder=folder, resume=True, clip=9.0, engine=Engine(nonfinite="skip")
        )
    )
    told = (
        "the run goes on, but not as it would have: clip was None and is 9.0; nonfinite was 'stop'"
    )
    assert said[0].startswith(told)
    shutil.rmtree(folder / "checkpoints")  # to make room
    with pytest.raises(FileExistsError, match="a trained learner, and no checkpoint to go on from"):
        wave_run(steps=8, folder=folder, resume=True)

    class Brooding(Sinusoids):
        "Learns from feedback, and cannot say what."

        def feedback(self, report):
            pass

    waves = MAML(MLP([1, 8, 1]), kind="regression")
    with pytest.raises(TypeError, match="give them state_dict and load_state_dict"):
        fit(waves, Brooding(), steps=2, folder=Path(room.name) / "other", progress=False)


def test_an_interrupted_run_keeps_what_it_learned():
    heard_from, quiet, wave_run = cell_fea88dcf()

    # cell f44ee589
    def interrupt_at(step):
        "A schedule under which somebody presses Ctrl-C."

        def rate(taken):
            if taken == step:
                raise KeyboardInterrupt
            return 1.0

        return rate

    def asked_at(step):
        "A schedule under which somebody asks the process to stop."

        def rate(taken):
            if taken == step:
                signal.raise_signal(signal.SIGTERM)
            return 1.0

        return rate

    room = tempfile.TemporaryDirectory()
    polite, abrupt = Path(room.name) / "polite", Path(room.name) / "abrupt"
    run, (asked, first) = heard_from(lambda: wave_run(1000, folder=polite, schedule=asked_at(5)))
    _, (second,) = heard_from(lambda: wave_run(1000, folder=abrupt, schedule=interrupt_at(5)))
    assert run.interrupted and run.outer.taken == 5
    assert asked == "asked to stop: after this step (ask again to stop at once)"
    assert first.startswith("interrupted: 5 steps in")
    assert "to go on from the checkpoint of step 5" in first and "step 4" in second
    assert run.best_step in (2, 4) and not run.learner.training
    assert all(torch.equal(v, run.best_state[k]) for k, v in run.learner.state_dict().items())
    assert metabook.load(polite).lr == metabook.load(abrupt).lr == 0.01
    print(first)


def test_a_full_disk_costs_only_what_came_after():
    heard_from, quiet, wave_run = cell_fea88dcf()

    # cell 25d3fb29
    def without_clocks(run):
        "The log of a run but for what a clock says."
        clocks = ("seconds", "tasks_per_second", "settings")
        return [{k: v for k, v in row.items() if k not in clocks} for row in run.log]

    def falling(taken):
        "A schedule."
        return 1 / (1 + taken)

    room = tempfile.TemporaryDirectory()
    whole = wave_run(steps=9, folder=Path(room.name) / "whole", schedule=falling, every=3)
    folder = Path(room.name) / "run"
    wave_run(steps=6, folder=folder, schedule=falling, every=3)
    (folder / "log.jsonl").open("a").write('{"step": 7, "lo')  # the process died while it wrote
    run, said = heard_from(
        lambda: wave_run(steps=9, folder=folder, schedule=falling, every=3, resume=True)
    )
    assert said == [f"{folder}: going on after step 6"]  # it does not start again
    with quiet():
        again = wave_run(
            steps=9, folder=folder, schedule=falling, every=3, resume=True
        )  # nothing to do
    for other in (run, again):
        assert without_clocks(other) == without_clocks(whole)
        assert (other.best_step, other.best.mean) == (whole.best_step, whole.best.mean)
        states = zip(
            other.learner.state_dict().values(), whole.learner.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.log
    # cell 7b52ca61
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    disk, full = os.fsync, []

    def fsync(file):
        "A disk that is full when the run has taken four steps."
        if (folder / "checkpoints" / "step-00000004.json").exists():
            full.append(file)
            raise OSError(errno.ENOSPC, "No space left on device")
        disk(file)

    os.fsync = fsync
    try:
        with pytest.raises(
            OSError, match=r"after step 6; make room .* the checkpoint of step 4"
        ) as told:
            wave_run(steps=8, folder=folder)
    finally:
        os.fsync = disk
    print(told.value)
    assert (
        full and told.value.errno == errno.ENOSPC and "could not be written into" in str(told.value)
    )
    assert not list(folder.rglob("*.part")) and metabook.load(folder).lr == 0.01
    with quiet():
        run = wave_run(steps=8, folder=folder, resume=True)
    assert without_clocks(run) == without_clocks(
        wave_run(steps=8, folder=Path(room.name) / "whole")
    )


def test_a_listener_hears_every_step_and_goes_on():
    heard_from, quiet, wave_run = cell_fea88dcf()

    # cell 6bbe4632
    class Smooth:
        "A running mean of the loss."

        def __init__(self):
            self.heard = []

        def __call__(self, run):
            loss = run.outer.latest.losses.mean().item()
            self.heard.append(0.9 * self.heard[-1] + 0.1 * loss if self.heard else loss)

        def state_dict(self):
            return {"heard": list(self.heard)}

        def load_state_dict(self, state):
            self.heard = state["heard"]

    room = tempfile.TemporaryDirectory()
    whole, first, later = Smooth(), Smooth(), Smooth()
    wave_run(steps=6, listeners=[whole])
    folder = Path(room.name) / "run"
    wave_run(steps=4, folder=folder, listeners=[first])
    with quiet():
        wave_run(steps=6, folder=folder, listeners=[later], resume=True)
    assert len(first.heard) == 4 and later.heard == whole.heard
    with pytest.raises(ValueError, match=r"remember something .*: \[\], and in .*: \['Smooth'\]"):
        wave_run(steps=8, folder=folder, resume=True)


def test_patience_ends_a_run():
    heard_from, quiet, wave_run = cell_fea88dcf()

    # cell 5aa59422
    class Worse(MAML):
        "Gets worse with every validation."

        def score(self, predictions, y):
            return super().score(predictions, y) + 100 * float(self._progress == 1) * next(clock)

    clock = iter(range(10**6))
    learner = Worse(MLP([1, 8, 1]), lr=0.01, kind="regression")
    how = dict(steps=100, meta_batch=4, every=2, validate=Sinusoids(5, 15), progress=False)
    run = fit(learner, Sinusoids(5, 10), listeners=[Patience(6)], **how)
    print(run)
    assert run.outer.taken == 8 and run.best_step == 2 and not run.interrupted
    assert "no validation was better for 6 steps" in str(run)
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name) / "run"
    for wrong, error in ((Patience(6), ValueError), ("patience", TypeError)):
        with pytest.raises(
            error, match=r"pass validate to fit|can be called with the run|Type-check error"
        ):
            how_wrong = how | {"validate": None, "folder": folder}
            fit(learner, Sinusoids(5, 10), listeners=[wrong], **how_wrong)
    assert not folder.exists()  # so the mended call finds it free

    def stops_at_7(run):
        if run.outer.taken == 7:
            run.stop("seven are enough")

    run = wave_run(steps=20, folder=folder, every=5, log_every=5, listeners=[stops_at_7])
    assert run.curve("loss")[0] == run.curve("validation")[0] == [5, 7]  # as at any last step
    assert run.records.saved == 7 and "7 steps (seven are enough)" in str(run)
    patient = folder.with_name("patient")
    still = dict(lr=1e-12, folder=patient, listeners=[Patience(4)])  # no score is ever better
    first = wave_run(steps=40, **still)
    with quiet():
        again = wave_run(steps=40, **still, resume=True)
    assert again.outer.taken == first.outer.taken == 6 and again.stopped  # it takes no further step
