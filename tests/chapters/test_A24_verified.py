"""Made from nbs/A24_verified.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

from torch import nn

from metabook.verified import plain


def test_what_was_built_otherwise_is_not_proven():
    # cell 24000004
    class Odd(nn.Linear):
        "A layer of one's own."

    class Renamed(nn.Module):
        "As is everything that is not in the table."

    assert plain(nn.Linear(2, 2), frozenset({"Linear"})) and not plain(nn.Linear(2, 2), frozenset())
    assert plain(nn.ModuleList(), frozenset()) and not plain(Odd(2, 2), frozenset({"Linear"}))
    assert not plain(Renamed(), frozenset({"Renamed"}))
    listened = nn.Linear(2, 2)
    listened.register_forward_hook(lambda *_: None)  # somebody changed what it does
    assert not plain(listened, frozenset({"Linear"}))
