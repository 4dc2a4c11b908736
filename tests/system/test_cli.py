"""The command `metabook` as a user types it: results, and errors without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from metabook.cli import main
from metabook.reproduction import REPRODUCTIONS

TINY = ["--net", "width=4", "--steps", "2", "--batch", "1", "--train-way", "5", "--every", "2"]


def typed(monkeypatch, *words) -> int:
    "The exit status of a command line."
    monkeypatch.setattr(sys, "argv", ["metabook", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    "A folder that was trained for two steps."
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert typed(patch, "train", "protonet", "--data", "glyphs", *TINY, "--out", folder) == 0
    return folder


@pytest.mark.parametrize(
    "words", [[], ["train"], ["reproduce"], ["evaluate"], ["classify"], ["data"], ["methods"]]
)
def test_every_command_explains_itself(words, monkeypatch, capsys):
    assert typed(monkeypatch, *words, "--help") == 0
    assert "Usage: metabook" in capsys.readouterr().out


WRONG = {
    "trian": "Did you mean 'train'",
    "train mamel": "unknown method 'mamel': did you mean 'maml'",
    "train maml --data glyfs": "unknown data set or folder 'glyfs': did you mean 'glyphs'",
    "train maml --network conv5": "unknown network 'conv5': did you mean 'conv4'",
    "train maml --set lr": "--set lr: expected NAME=VALUE",
    "train maml --set rate=1": "unknown argument of maml 'rate'",
    "train maml --set lr=-1.0": "lr=-1.0, expected a positive inner rate",
    "train maml --net pool=mean": "'mean'",
    "train maml --way 1": "greater than or equal to 2",
    "train protonet --shot 11": "need 11 on each side of its cut",
    "train protonet --way 5000": "way=5000, but the data has",
    "train protonet --data sinusoids": "protonet is for classification",
    "train maml --net widht=8": "unknown argument of conv4 'widht': did you mean 'width'",
    "train maml --engine speed=9": "--engine speed=...: expected one of lift, run, chunk, recompute",
    "train maml --engine lift=fast": "'fast'",
    "train maml --engine precision=half": "precision='half', expected one of float32, tf32",
    "train protonet --engine recompute=true": "ProtoNet has no inner `step` to compute again",
    "train maml --lr 0": "--lr 0.0: expected a positive outer rate",
    "train maml --device tpu": "--device tpu: expected cpu, cuda or auto",
    "evaluate nowhere": "no trained folder",
    "classify nowhere a.png --support b": "no trained folder",
    "data get omniglott": "unknown data set 'omniglott': did you mean 'omniglot'",
}


@pytest.mark.parametrize("line", WRONG)
def test_errors_say_what_to_do_without_a_traceback(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert typed(monkeypatch, *line.split()) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert WRONG[line] in said and "Traceback" not in said


def test_a_run_is_not_overwritten(trained, monkeypatch, capsys):
    before = (trained / "learner.safetensors").read_bytes()
    assert typed(monkeypatch, "train", "protonet", *TINY, "--out", trained) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (trained / "learner.safetensors").read_bytes() == before


def test_the_engine_can_be_told(monkeypatch, capsys, tmp_path):
    told = ["--engine", "lift=vmap", "--engine", "chunk=1", "--engine", "precision=bfloat16"]
    line = ["train", "maml", *TINY, "--batch", "2", *told, "--engine", "recompute=true"]
    line[line.index("--train-way") : line.index("--train-way") + 2] = []  # maml keeps its way
    assert typed(monkeypatch, *line, "--out", tmp_path / "run") == 0
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (training["chunk"], training["recompute"]) == (1, True)
    assert training["precision"] == "bfloat16"


def test_what_a_trained_folder_says(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["task"] == {"data": "glyphs", "way": 5, "shot": 1}
    assert config["preprocessing"]["invert"] is True and config["preprocessing"]["size"] == 28
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert any("validation" in row for row in rows) and any("loss" in row for row in rows)


def test_evaluating_twice_gives_the_same(trained, monkeypatch, capsys):
    words = ["evaluate", trained, "--tasks", 5, "--way", 3, "--json"]
    found = []
    for _ in range(2):
        assert typed(monkeypatch, *words) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0][0]["n"] == 5


def test_classify_wants_images_that_can_be_read(trained, monkeypatch, capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.new("L", (40, 30), 255).save(tmp_path / "support" / name / "1.png")
    (tmp_path / "text.png").write_text("no image")
    words = ["classify", trained, "--support", tmp_path / "support"]
    assert typed(monkeypatch, *words, tmp_path / "text.png") == 2
    assert "text.png" in capsys.readouterr().err
    assert typed(monkeypatch, *words, tmp_path / "absent.png") == 2
    assert "absent.png: no such file" in capsys.readouterr().err
    assert typed(monkeypatch, *words, tmp_path / "support/a/1.png") == 0


def test_own_images_from_end_to_end(monkeypatch, capsys, tmp_path):
    from metabook.datasets import Glyphs

    for split in ("train", "val", "test"):
        letters = Glyphs(split).select(range(6))
        for i in range(6):
            folder = tmp_path / "mine" / split / letters.names[i]
            folder.mkdir(parents=True)
            for j, image in enumerate(letters.of_class(i)[:4, 0]):
                Image.fromarray(255 - image.numpy()).save(folder / f"{j}.png")
    size = ["--size", 28, "--channels", 1, "--way", 3, "--query", 2]
    words = ["train", "protonet", "--data", tmp_path / "mine", *size, *TINY]
    assert typed(monkeypatch, *words, "--out", tmp_path / "run") == 0
    assert typed(monkeypatch, "evaluate", tmp_path / "run", "--tasks", 4) == 0
    assert "accuracy" in capsys.readouterr().out
    others = ["evaluate", tmp_path / "run", "--tasks", 4, "--query", 5, "--data"]
    assert typed(monkeypatch, *others, "glyfs") == 2
    assert "did you mean 'glyphs'" in capsys.readouterr().err
    assert typed(monkeypatch, *others, "glyphs") == 0
    (tmp_path / "mine" / "val" / Glyphs("train").names[0]).mkdir()
    assert typed(monkeypatch, *words, "--out", tmp_path / "other") == 2
    assert "stands in both train and val" in capsys.readouterr().err


def test_a_learner_reads_other_images_as_it_was_trained(trained, monkeypatch, capsys, tmp_path):
    for split in ("train", "val", "test"):
        for name in "abc":
            (tmp_path / split / (split + name)).mkdir(parents=True)
            for j in range(3):
                Image.new("RGB", (30, 40), (90 * j,) * 3).save(
                    tmp_path / split / (split + name) / f"{j}.png"
                )
    words = ["evaluate", trained, "--data", tmp_path, "--way", 3, "--tasks", 2, "--json"]
    assert typed(monkeypatch, *words) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["n"] == 2 and row["tested_on"] == str(tmp_path) and row["task"]["data"] == "glyphs"


def test_maml_tells_apart_as_many_classes_as_it_was_trained_for(monkeypatch, capsys, tmp_path):
    words = ["train", "maml", "--net", "width=4", "--steps", 2, "--batch", 1]
    assert typed(monkeypatch, *words, "--out", tmp_path / "run") == 0
    assert typed(monkeypatch, "evaluate", tmp_path / "run", "--way", 3) == 2
    assert "trained for 5 classes, but --way has 3" in capsys.readouterr().err


def test_reproduce_without_a_name_lists_the_rows(monkeypatch, capsys):
    assert typed(monkeypatch, "reproduce") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(REPRODUCTIONS)
    beside = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert beside["protonet-miniimagenet-5way-1shot"] == "49.42  Snell et al. 2017, tables 1 and 2"
    assert beside["protonet-glyphs-5way-1shot"] == "-"  # nobody published one
    assert typed(monkeypatch, "reproduce", "--json") == 0
    assert json.loads(capsys.readouterr().out) == sorted(REPRODUCTIONS)


def test_the_version_is_told(monkeypatch, capsys):
    assert typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("metabook 0.")


def test_python_m_metabook_is_the_command():
    done = subprocess.run([sys.executable, "-m", "metabook", "methods"], capture_output=True)
    assert done.returncode == 0 and b"protonet" in done.stdout
