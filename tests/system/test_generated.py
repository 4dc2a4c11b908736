"""Library and chapter tests are what the notebooks say, and notebooks, modules and proofs keep their rules."""

from __future__ import annotations

import check
import pytest


@pytest.mark.parametrize("rule", check.CHECKS, ids=lambda rule: rule.__name__)
def test_the_book_keeps_the_rule(rule):
    assert rule() == []


def test_every_kind_of_difference_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    for name in ("same", "other", "old"):
        (tmp_path / f"{name}.py").write_text(name)
    made = {"same.py": "same", "other.py": "", "new.py": ""}
    told = [
        "new.py is missing",
        "old.py comes from no notebook",
        "other.py is not what the notebook says",
    ]
    assert [
        d.removeprefix("./").partition(":")[0] for d in check.differences(made, tmp_path)
    ] == told
