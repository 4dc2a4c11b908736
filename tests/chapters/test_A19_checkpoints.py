"""Made from nbs/A19_checkpoints.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

import metabook
from metabook.checkpoints import (
    newest_checkpoint,
    occupied,
    pack,
    random_state,
    restore_random,
    unpack,
    write_checkpoint,
)
from metabook.saving import differences


def cell_7f37a553():
    # cell 7f37a553
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    return fresh


def test_what_is_packed_comes_out_again():
    # cell e6e99f56
    state = {"a": {0: torch.ones(2), 1: [1.5, None]}, "a.0": torch.zeros(3), "items": True, 3: {}}
    tensors = {}
    packed = json.loads(json.dumps(pack(state, tensors)))
    again = unpack(packed, tensors)
    assert list(again) == ["a", "a.0", "items", 3] and again["a"][1] == [1.5, None]
    assert torch.equal(again["a"][0], torch.ones(2)) and torch.equal(again["a.0"], torch.zeros(3))
    with pytest.raises(TypeError, match=r"run.a=<object .* cannot be written as JSON"):
        pack({"a": object()}, {})


def test_the_last_checkpoints_are_kept():
    fresh = cell_7f37a553()
    # cell 6d0d32a8
    folder = fresh()
    assert newest_checkpoint(folder) is None
    for step in (5, 99_999_999, 100_000_000):
        write_checkpoint(folder, step, {"x": torch.full((2,), float(step))}, keep=2)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert [n for n in names if n.endswith("json")] == ["step-100000000.json", "step-99999999.json"]
    assert len(names) == 4
    assert newest_checkpoint(folder)["x"].tolist() == [1e8, 1e8]
    (folder / "checkpoints" / "step-00000006.json.mine").write_text("a copy by somebody")
    write_checkpoint(
        folder, 7, {}, keep=2
    )  # a run that went back: what came later is another story
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006.json.mine", "step-00000007.json", "step-00000007.safetensors"]


def test_damage_is_told_and_the_one_before_is_used():
    fresh = cell_7f37a553()

    # cell 43ac94ca
    def heard(f):
        "What `f` does, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    # cell 458d04f8
    def cut(path):
        path.write_bytes(path.read_bytes()[:-3])

    def alter(path):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    def other_number(path):
        path.write_text(path.read_text().replace("0.25", "0.75"))

    for which, damage, reason in [
        (".json", cut, "Unterminated|Expecting"),
        (".json", other_number, "altered since"),
        (".json", lambda p: p.write_text("[" * 100_000), "Recursion"),
        (".json", lambda p: p.write_text("[]"), "list indices"),
        (".safetensors", cut, "checksum"),
        (".safetensors", alter, "checksum"),
        (".safetensors", lambda p: p.unlink(), "No such file"),
    ]:
        folder = fresh()
        write_checkpoint(folder, 1, {"x": torch.ones(9)})
        newest = write_checkpoint(folder, 2, {"x": torch.zeros(9), "rate": 0.25})
        damage(newest.with_suffix(which))
        state, said = heard(lambda f=folder: newest_checkpoint(f))
        assert state["x"].sum() == 9 and len(said) == 1, (which, said)
        assert "step-00000002" in said[0] and re.search(reason, said[0]), said
        cut(folder / "checkpoints" / "step-00000001.json")
        with pytest.raises(ValueError, match="has 2 checkpoints, and none of them can be read"):
            heard(lambda f=folder: newest_checkpoint(f))


def test_one_process_at_a_time():
    fresh = cell_7f37a553()
    # cell 3e81edb8
    folder = fresh()
    refused = pytest.raises(FileExistsError, match="another process is training into")
    with occupied(folder), refused, occupied(folder):
        pass
    with occupied(folder), occupied(None):
        pass


def test_the_dice_fall_as_they_would_have():
    # cell 7614b6d9
    before = random_state()
    first = torch.rand(3)
    restore_random(before)
    assert torch.equal(first, torch.rand(3))


def test_what_differs_is_named():
    # cell ddcb3616
    maml = {"name": "maml", "args": {"lr": 0.4, "net": {"name": "mlp", "args": {"sizes": [1, 8]}}}}
    wide = {"name": "maml", "args": {"lr": 0.4, "net": {"name": "mlp", "args": {"sizes": [1, 9]}}}}
    assert differences(maml, maml) == []
    assert differences({"learner": maml}, {"learner": wide}) == [
        "learner.args.net.args.sizes was [1, 8] and is [1, 9]"
    ]
    other = {"name": "protonet", "args": {}}
    assert differences({"learner": maml}, {"learner": other}) == [
        "learner was 'maml' and is 'protonet'"
    ]
    assert differences({"seed": 0}, {}) == ["seed was 0 and is None"]


def test_a_killed_run_goes_on_to_the_bit():
    fresh = cell_7f37a553()
    # cell 520d4a14
    JOB = """
    import os, signal, sys, torch, metabook.checkpoints
    from metabook.episodes import Sinusoids
    from metabook.maml import MAML
    from metabook.networks import MLP
    from metabook.training import fit

    folder, what, when = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def rate(taken):  # a schedule under which the process dies at a step
        if what == "at step" and taken == when:
            die()
        return 1 / (1 + taken / 10)

    rename = os.replace

    def replace(source, target):  # and a disk under which it dies while a checkpoint gets its names
        its = target.name.startswith(f"step-{when:08d}")
        if its and what == "before" and target.suffix == ".safetensors":
            die()
        if its and what == "between" and target.suffix == ".json":
            die()
        rename(source, target)

    class Noisy(Sinusoids):  # draws from the global random numbers, too
        def gather(self, indices):
            episode = super().gather(indices)
            return episode._replace(query=episode.query._replace(
                y=episode.query.y + 0.1 * torch.randn(episode.query.y.shape)))

    os.replace = replace
    torch.manual_seed(0)
    learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression")
    fit(
        learner, Noisy(5, 10), steps=30, meta_batch=4, schedule=rate, every=5, log_every=2,
        validate=Sinusoids(5, 15).freeze(20), folder=folder, resume=True, progress=False,
    )
"""

    def job(folder, what="never", when=0):
        "Train in a process of its own: is it still alive at the end, and what did it say?"
        command = [sys.executable, "-c", textwrap.dedent(JOB), str(folder), what, str(when)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode == 0, done.stderr

    def left(folder):
        "What a run left behind: parameters, the newest checkpoint, and the log without its clock."
        clocks = ("seconds", "tasks_per_second")
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        rows = [{k: v for k, v in row.items() if k not in clocks} for row in rows]
        state = newest_checkpoint(folder)
        tensors = {}
        pack({k: v for k, v in state.items() if k != "seconds"}, tensors)
        return metabook.load(folder).state_dict() | tensors, rows

    # cell f06b3eac
    wanted = fresh() / "run"
    assert job(wanted)[0]
    tensors, rows = left(wanted)
    assert len(rows) == 1 + 15 + 6  # settings, losses, validations

    for what, times, before in (
        ("at step", (3, 17), 15),
        ("before", (5, 20), 15),  # nothing of this checkpoint has its name
        ("between", (20, 25), 20),  # its tensors have, its JSON file has not
    ):
        folder = fresh() / "run"
        for when in times:  # killed, started again, killed again, ...
            assert not job(folder, what, when)[0]
        alive, said = job(folder)
        assert alive and f"going on after step {before}" in said, said
        again, rows_again = left(folder)
        assert rows_again == rows, what
        assert again.keys() == tensors.keys() and len(tensors) > 20
        assert all(torch.equal(value, again[name]) for name, value in tensors.items()), what
