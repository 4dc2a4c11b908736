"""Library and chapter tests are what the notebooks say, and the notebooks are clean."""

from __future__ import annotations

import check
import pytest


@pytest.mark.parametrize("rule", [check.stale_library, check.stale_tests, check.unclean_notebooks])
def test_nothing_is_left_to_export(rule):
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
