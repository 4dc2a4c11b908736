"""What the README prints runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_has_a_ten_line_example():
    lines = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert len(lines) <= 10


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_of_the_readme_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(
        compile(PYTHON[number], f"README.md, example {number + 1}", "exec"), {"__name__": "readme"}
    )
    if number == 0:
        assert "accuracy" in capsys.readouterr().out


def test_commands_of_the_readme_exist():
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    assert {*re.findall(r"`?make ([a-z]+)", README)} <= {*targets}


def test_links_of_the_readme_lead_somewhere():
    links = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]
