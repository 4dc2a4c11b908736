"""Made from nbs/A13_command_line.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from metabook.cli import app, arguments, engine_words, meanings, networks_said, settings
from metabook.engine import Engine
from metabook.registry import methods
from metabook.sources import SOURCES


def cell_f2c41e78():
    # cell f2c41e78
    run = CliRunner()

    def typed(*words):
        "Run a command as if it were typed, and return what it prints."
        result = run.invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return typed


def test_settings_read_json_or_text():
    # cell e862ee20
    assert settings(["lr=0.4", "first_order=True", "pool=stride", "widths=[8, 16]"], "--set") == {
        "lr": 0.4,
        "first_order": True,
        "pool": "stride",
        "widths": [8, 16],
    }
    with pytest.raises(ValueError, match="--set lr: expected NAME=VALUE"):
        settings(["lr"], "--set")
    assert networks_said(["other=mlp", "conv4"]) == {"*": "conv4", "other": "mlp"}
    with pytest.raises(ValueError, match="expected one for all networks of the method"):
        networks_said(["mlp", "conv4"])


def test_methods_and_data_are_listed():
    typed = cell_f2c41e78()
    # cell 00719a23
    assert "protonet" in typed("methods") and "conv4" in typed("methods")
    assert "digest" in typed("data", "check", "sinusoids")
    assert json.loads(typed("methods", "--json"))["methods"]["maml"]
    assert json.loads(typed("data", "list", "--json"))["glyphs"]["present"]


def test_what_the_engine_takes_is_told_from_its_fields():
    # cell 5b0e93d7
    told_so = engine_words()
    for word in ("lift=auto|loop|vmap (auto)", "precision=float32|tf32|bfloat16 (tf32)"):
        assert word in told_so
    for word in ("chunk=NUMBER (null)", "recompute=true|false (false)", "check=true|false (true)"):
        assert word in told_so
    assert [part.partition("=")[0] for part in told_so.split(", ")] == [
        f.name for f in fields(Engine)
    ]


def test_help_tells_the_arguments_of_a_method():
    typed = cell_f2c41e78()
    # cell 20db0405
    maml = " ".join(typed("train", "maml", "--help").split())
    assert "lr=0.4 inner rate alpha" in maml and "Source: Finn et al. 2017" in maml
    assert "net=" not in maml  # a network is no value: it has --network and --net
    assert "--set for" not in typed("train", "--help")
    for name, method in methods().items():
        if method.__module__.startswith("metabook."):
            assert all(meanings(method).get(key) for key in inspect.signature(method).parameters), (
                name
            )
            assert re.search("Sources?: .*[12][0-9]{3}", arguments(name)), name
            assert arguments(name) in typed("train", name, "--help")


def test_train_evaluate_classify():
    typed = cell_f2c41e78()
    # cell fa411053
    work = Path(tempfile.mkdtemp())
    small = ["--net", "width=8", "--steps", 4, "--batch", 2, "--train-way", 5]
    typed("train", "protonet", "--data", "glyphs", *small, "--out", work / "run")
    rows = json.loads(typed("evaluate", work / "run", "--tasks", 20, "--json"))
    assert [row["queries"] for row in rows] == ["joint", "single"] and rows[0]["n"] == 20
    assert rows[0]["episodes"] == rows[1]["episodes"]
    assert rows[0]["training"]["steps"] == 4 and rows[0]["recipe"]["net"]["width"] == 8

    for i, name in enumerate(["alpha", "beta", "gamma"]):  # own images: a folder for each class
        (work / "support" / name).mkdir(parents=True)
        for j in range(2):
            glyph = 255 - SOURCES["glyphs"].load("test").of_class(i)[j, 0].numpy()
            Image.fromarray(glyph).save(work / "support" / name / f"{j}.png")
    answer = json.loads(
        typed(
            "classify",
            work / "run",
            "--support",
            work / "support",
            work / "support/beta/0.png",
            "--json",
        )
    )
    (chances,) = answer.values()
    assert (
        set(chances["all"]) == {"alpha", "beta", "gamma"}
        and abs(sum(chances["all"].values()) - 1) < 1e-5
    )
    shutil.rmtree(work)


def test_a_training_goes_on():
    typed = cell_f2c41e78()
    # cell 0a234393
    work = Path(tempfile.mkdtemp())
    words = [
        "train",
        "maml",
        "--data",
        "sinusoids",
        "--steps",
        20,
        "--every",
        5,
        "--out",
        work / "run",
    ]
    typed(*words)
    newest = work / "run" / "checkpoints" / "step-00000020.json"
    newest.unlink()  # as if the process had been killed after step 15
    before = (work / "run" / "learner.safetensors").read_bytes()
    typed(*words, "--resume")
    assert newest.exists() and (work / "run" / "learner.safetensors").read_bytes() == before
    with pytest.raises(FileExistsError, match="--resume"):
        typed(*words)
    shutil.rmtree(work)


def test_sinusoids_from_the_command_line():
    typed = cell_f2c41e78()
    # cell a1c1dc36
    work = Path(tempfile.mkdtemp())
    typed("train", "maml", "--data", "sinusoids", "--steps", 20, "--out", work / "run")
    (row,) = json.loads(typed("evaluate", work / "run", "--tasks", 50, "--json"))
    assert row["metric"] == "mse" and row["mean"] < 6
    shutil.rmtree(work)
