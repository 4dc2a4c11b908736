"""Made from nbs/A00_structures.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map

from metabook.structures import apart, count, joined, leaves_of


def test_a_structure_is_taken_apart_and_put_together():
    # cell 5a000006
    text = {"tokens": torch.arange(12).view(2, 6), "mask": torch.ones(2, 6, dtype=torch.bool)}
    print(tree_map(lambda t: tuple(t.shape), text))
    print(sorted(leaves_of("x", text)))
    # cell 5a000007
    nested = {"a": torch.ones(2, 1), "b": (torch.zeros(2), "a word", None)}
    tensors, refill = apart(nested)
    assert [t.shape for t in tensors] == [(2, 1), (2,)]
    again = refill([t + 1 for t in tensors])
    assert again["b"][1:] == ("a word", None)
    assert torch.equal(again["a"], torch.full((2, 1), 2.0)) and torch.equal(
        again["b"][0], torch.ones(2)
    )
    batches = [{"a": torch.full((n, 3), float(n))} for n in (1, 2)]
    whole = joined(batches)
    assert count(whole) == 3 and whole["a"][:, 0].tolist() == [1.0, 2.0, 2.0]
    assert list(leaves_of("y", nested)) == ["y['a']", "y['b'][0]", "y['b'][1]", "y['b'][2]"]
