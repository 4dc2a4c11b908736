"""Made from nbs/A26_classes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from metabook.classes import Classes, summary


def test_classes_of_different_size():
    # cell 5820fcde
    data = Classes.of({"cat": torch.zeros(3, 1, 2, 2), "dog": torch.ones(5, 1, 2, 2)})
    assert len(data) == 2 and data.sizes.tolist() == [3, 5] and data.starts.tolist() == [0, 3]
    assert torch.equal(data.of_class(1), torch.ones(5, 1, 2, 2))
    assert data.select([1]).names == ["dog"] and len(data.select([1]).x) == 5
    swapped = replace(data, cut=torch.tensor([1, 2])).to("cpu").select([1, 0])
    assert swapped.sizes.tolist() == [5, 3] and swapped.cut.tolist() == [2, 1]
    assert torch.equal(swapped.of_class(0), torch.ones(5, 1, 2, 2)) and swapped.name(0) == "dog"
    assert repr(data) == "Classes(2 classes, 8 examples of 1x2x2, torch.float32)"


def test_some_of_the_classes():
    # cell 2600000b
    pets = Classes.of({"cat": torch.zeros(3, 2), "dog": torch.ones(5, 2), "eel": torch.ones(9, 2)})
    assert pets.select(pets.sizes >= 4).names == ["dog", "eel"]
    assert pets.select([2, 0]).sizes.tolist() == [9, 3]
    with pytest.raises(ValueError, match="each class once"):
        pets.select([1, 1])


def test_bytes_become_what_the_network_sees():
    # cell f2539e7c
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    seen = Classes(pixels, torch.tensor([2]), mean=(0.5,), std=(0.25,)).prepare(pixels)
    assert seen.flatten().tolist() == [-2.0, 2.0]  # (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25


def test_broken_data_is_refused():
    # cell b1d97c34
    with pytest.raises(ValueError, match="'dog' has no examples"):
        Classes.of({"cat": torch.zeros(3, 2), "dog": torch.zeros(0, 2)})
    with pytest.raises(ValueError, match="at least one class"):
        Classes.of({})
    with pytest.raises(ValueError, match="add up to 4"):
        Classes(torch.zeros(3, 2), torch.tensor([4]))
    with pytest.raises(ValueError, match="1 names for 2 classes"):
        Classes(torch.zeros(3, 2), torch.tensor([1, 2]), names=["cat"])
    with pytest.raises(ValueError, match=r"x\[2, 1\] is inf"):
        Classes(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, math.inf]]), torch.tensor([3]))
    with pytest.raises(ValueError, match="images are"):
        Classes(torch.zeros(3, 2, dtype=torch.uint8), torch.tensor([3]))
    with pytest.raises(ValueError, match="for images of 3 channels"):
        Classes(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([1]), std=(1.0, 1.0))


def test_a_digest_changes_with_the_data():
    # cell 2600000d
    pets = Classes.of({"cat": torch.zeros(3, 2), "dog": torch.ones(5, 2)})
    before, renamed = pets.digest, replace(pets, names=["lynx", "wolf"])
    assert renamed.digest == before and summary(renamed) != summary(
        pets
    )  # numbers here, names there
    assert pets.with_features(torch.randn(8, 4)).origin == before
    pets.x[7, 1] = 2
    assert len(before) == 12 and pets.digest != before
