"""What stands in results/ and what the book says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from notebooks import ROOT
from rename_episodes import older_hash, renamed

from metabook.recipes import unseen_tasks
from metabook.reproduction import REPRODUCTIONS, RESULTS, reports

FILES = sorted(f for f in RESULTS.glob("*.json") if not f.stem.startswith("bench-"))
REPRODUCED = [file for file in FILES if file.stem in REPRODUCTIONS]


def rows_of(file: Path) -> list[dict]:
    """The rows of a file that `metabook reproduce`, or `metabook evaluate --json`, wrote."""
    content = json.loads(file.read_text())
    return content["rows"] if isinstance(content, dict) else content


def scores_of(row: dict) -> list[dict]:
    """All scores of a row."""
    return [row[key] for key in ("joint", "single", "before", "gain") if key in row] or [row]


def test_results_are_where_the_library_looks_for_them():
    assert RESULTS == ROOT / "results" and FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_row_says_where_it_comes_from(file):
    assert not re.search(r"/(home|root|tmp|work)/", file.read_text())
    for row in rows_of(file):
        assert {"seed", "device", "threads", "torch", "metabook", "recipe", "training"} <= set(row)
        assert row["training"]["steps_taken"] == row["training"]["steps"]
        for score in scores_of(row):
            assert score["n"] >= 600 and score["ci95"] > 0
            assert re.fullmatch(r"[0-9a-f]{12}", score["episodes"])


@pytest.mark.parametrize("file", REPRODUCED, ids=lambda file: file.stem)
def test_a_row_is_of_the_recipe_that_its_command_runs(file):
    row = REPRODUCTIONS[file.stem]
    for found in rows_of(file):
        wanted = f"metabook reproduce {row.name} --budget {found['budget']} --seed {found['seed']}"
        assert found["command"] == wanted
        recipe = row.recipe(found["budget"])
        assert found["recipe"] == json.loads(json.dumps(vars(recipe)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rows_of_0_1_0_say_what_their_episodes_were_called(file):
    for row in rows_of(file):
        if row["metabook"] == "0.1.0":
            for score in [*scores_of(row), row["validation"]]:
                assert re.fullmatch(r"[0-9a-f]{12}", score["migrated_from"])
                assert score["migrated_from"] != score["episodes"]


def names_today(data: str, n: int, shot: int) -> tuple[str, str]:
    """The hash of test episodes, drawn now; and as 0.1.0 would have made it."""
    task = {"data": data, "way": 5, "shot": shot}
    frozen = unseen_tasks(task, "test", torch.device("cpu")).freeze(n)
    return frozen.hash, older_hash(frozen)


def test_a_row_has_the_name_of_the_episodes_that_are_drawn_today():
    score = rows_of(RESULTS / "maml-sinusoids.json")[0]
    assert (score["episodes"], score["migrated_from"]) == names_today("sinusoids", 600, 5)


@pytest.mark.parametrize(
    "data, shot",
    [
        pytest.param("omniglot", 1, marks=pytest.mark.data("omniglot")),
        *(
            pytest.param(data, shot, marks=pytest.mark.data(data))
            for data in ("cifarfs", "fc100")
            for shot in (1, 5)
        ),
    ],
)
def test_rows_on_real_data_too(data, shot):
    score = rows_of(RESULTS / f"protonet-{data}-5way-{shot}shot.json")[0]["single"]
    assert (score["episodes"], score["migrated_from"]) == names_today(data, 600, shot)


def test_renaming_keeps_all_but_the_names_and_does_it_once():
    old, new = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
    text = f'[{{\n  "n": 600,\n  "episodes": "{old}",\n  "queries": "joint"\n}},\n {{"episodes": "{"c" * 12}"}}]'
    once, unknown = renamed(text, {old: new})
    assert json.loads(once)[0] == {
        "n": 600,
        "episodes": new,
        "migrated_from": old,
        "queries": "joint",
    }
    assert unknown == ["c" * 12] and renamed(once, {new: old}) == (once, unknown)


def test_methods_are_compared_on_the_same_episodes():
    episodes: dict[tuple[str, int, int], set[str]] = {}
    for report in reports():
        row = REPRODUCTIONS[report["name"]]
        found = {score["episodes"] for r in report["rows"] for score in scores_of(r)}
        episodes.setdefault((row.data, row.way, row.shot), set()).update(found)
    assert {key: len(hashes) for key, hashes in episodes.items()} == dict.fromkeys(episodes, 1)


def test_on_glyphs_each_method_beats_itself_before_training_with_every_seed():
    told = [report for report in reports() if REPRODUCTIONS[report["name"]].data == "glyphs"]
    assert told
    for report in told:
        assert [row["seed"] for row in report["rows"]] == [0, 1, 2], report["name"]
        for row in report["rows"]:
            assert row["gain"]["mean"] > row["gain"]["ci95"], report["name"]


def quoted() -> Iterator[tuple[str, str, list[str]]]:
    """Paragraphs of the book that name a file of results: where, the numbers in bold, the files."""
    texts = {file.name: nbformat.read(file, 4) for file in sorted((ROOT / "nbs").glob("*.ipynb"))}
    pages = {
        name: [c.source for c in nb.cells if c.cell_type == "markdown"]
        for name, nb in texts.items()
    }
    pages["README.md"] = [(ROOT / "README.md").read_text()]
    for name, cells in pages.items():
        for paragraph in "\n\n".join(cells).split("\n\n"):
            if files := re.findall(r"results/([\w-]+)\.json", paragraph):
                for number in re.findall(r"\*\*([\d.]+ ± [\d.]+)\*\*", paragraph):
                    yield name, number, files


@pytest.mark.parametrize("page, number, files", list(quoted()))
def test_what_the_book_quotes_stands_in_the_file_it_names(page, number, files):
    known = set()
    for name in files:
        for score in (s for row in rows_of(RESULTS / f"{name}.json") for s in scores_of(row)):
            known.add(f"{100 * score['mean']:.2f} ± {100 * score['ci95']:.2f}")
            known.add(f"{score['mean']:.3f} ± {score['ci95']:.3f}")
    assert number in known, f"{page}: {number} is not in {files}"
