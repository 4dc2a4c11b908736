"""Made from nbs/A20_sources.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from metabook.datasets import CIFARFS, FC100, SPLITS, DataError, Glyphs, MiniImageNet, Omniglot
from metabook.sources import SOURCES, check, present, source_of


def test_sources_can_be_asked_for():
    # cell edb00619
    assert present("glyphs") and set(check("glyphs")) == set(SPLITS)
    assert check("glyphs")["val"] == {"classes": 195, "images": 3900, "names": "0d2fb1c683d42e34"}
    with pytest.raises(ValueError, match="did you mean 'omniglot'"):
        present("omniglott")
    for loader in (Glyphs, Omniglot, CIFARFS, FC100, MiniImageNet):
        with pytest.raises(ValueError, match="did you mean 'test'"):
            loader("tests")
    with pytest.raises(ValueError, match="did you mean 'alphabet'"):
        Omniglot("test", "alphabets")


def test_sources_describe_themselves():
    # cell 20f5c6ab
    where, task = torch.device("cpu"), {"way": 5, "shot": 1}
    letters, curves = SOURCES["glyphs"], SOURCES["sinusoids"]
    train, test = letters.training(task, 5, where, way=20), letters.unseen(task, "test", where)
    assert (train.way, train.query) == (20, 5) and (test.way, test.query) == (5, 10)
    assert test.classes.names == Glyphs("test").names  # ten queries: all on one side of the cut
    assert letters.preprocessing(test) == {
        "size": 28,
        "channels": 1,
        "invert": True,
        "mean": [0.0],
        "std": [1.0],
    }
    assert repr(curves.training(task, 10, where, way=20)) == "Sinusoids(shot=1, query=10)"
    assert repr(curves.unseen(task, "test", where)) == "Sinusoids(shot=1, query=100)"
    assert repr(curves.unseen(task | {"query": 7}, "val", where)) == "Sinusoids(shot=1, query=7)"
    assert curves.preprocessing(curves.unseen(task, "val", where)) == {}
    assert check("sinusoids")["val"]["tasks"] == "without end" and present("sinusoids")
    with pytest.raises(
        ValueError, match="has no classes, expected data that is organised by class"
    ):
        curves.classes("train")


def test_a_folder_is_a_source():
    # cell 94b8d3e1
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS:
            for name in ("a", "b"):
                (place := Path(folder, split, split + name)).mkdir(parents=True)
                for i in range(3):
                    Image.new("L", (20, 20), 80 * i).save(place / f"{i}.png")
        mine = source_of({"data": folder, "size": 16, "channels": 1})
        few = mine.unseen({"way": 2, "shot": 1}, "val", torch.device("cpu"))
        assert list(few.classes.names) == ["vala", "valb"] and few.query == 2
        assert mine.preprocessing(few)["size"] == 16 and not mine.preprocessing(few)["invert"]
        assert (
            mine.reading == {"size": 16, "channels": 1} and mine.family == SOURCES["glyphs"].family
        )
    assert source_of({"data": "omniglot"}) is SOURCES["omniglot"]


def test_sources_are_fetched_over_https_from_their_authors():
    # cell 5d9af786
    remotes = {remote for source in SOURCES.values() for remote in source.remotes}
    assert all(remote.url.startswith("https://") for remote in remotes)
    assert all(re.fullmatch("[0-9a-f]{32}", remote.md5) for remote in remotes)
    with tempfile.TemporaryDirectory() as folder:
        assert not present("miniimagenet", folder)
        with pytest.raises(
            DataError, match=r"Put images, train\.csv, val\.csv, test\.csv into .*mini-imagenet"
        ):
            MiniImageNet("train", root=folder)
