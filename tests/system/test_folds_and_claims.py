"""What of a chapter is folded, and whether sentences that judge are carried by cells that check them."""

from __future__ import annotations

import build_site
import chapter_pages
import check
import claims
import folds
import nbformat
import notation
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


def book(*sources: str) -> nbformat.NotebookNode:
    """Cells that begin with #, < or * are markdown, if no directive."""
    text = [s[0] in "#<*" and s[:2] != "#|" for s in sources]
    made = [(new_markdown_cell if t else new_code_cell) for t in text]
    return new_notebook(
        cells=[m(s, id=f"c{n}") for n, (m, s) in enumerate(zip(made, sources, strict=True))]
    )


@pytest.mark.parametrize(
    ("name", "source", "label"),
    [
        ("08_maml", "import math", "Imports"),
        ("08_maml", "#| exporti\nx = 1", "Helpers of the library"),
        ("A08_engine", "#| exporti\nx = 1", ""),
        ("08_maml", "#| checks\n#| test: t\nassert 1", "Checks"),
        ("08_maml", "<!-- checks -->\nNumbers of no interest.", "Checks"),
        ("08_maml", '#| show\n#| fig-cap: "Dots"\ndraw()', "The figure's code"),
        ("08_maml", '#| code-fold: false\n#| fig-cap: "Dots"\ndraw()', ""),
        ("08_maml", '#| claim: "One is less than two"\nassert 1 < 2', "Checked claim"),
        ("08_maml", '#| code-fold: true\n#| code-summary: "Solution 2"\nx', "Solution 2"),
        ("08_maml", "#| export\ndef f(): ...", ""),
    ],
)
def test_what_a_cell_is_folded_under(name, source, label):
    assert folds.fold(name, book(source).cells[0]) == label


def test_words_and_lines_outside_folds_are_counted_and_bounded():
    made = book("# A b c", "<!-- checks -->\nd e", "x = 1\ny = 2", "#| checks\nz = 3", "import q")
    made.cells[0].source += "\n\n$$\na + b\n$$ (eq-sum)"
    assert folds.main_path("08_maml", made) == (4, 2)
    assert folds.problems("08_maml", made) == []
    made.cells[2].source = "x = 1\n" * (folds.LINES + 1)
    (problem,) = folds.problems("08_maml", made)
    assert f"{folds.LINES + 1} lines of code" in problem
    assert folds.problems("A08_engine", made) == []
    (problem,) = folds.problems("08_maml", book("<!-- checks -->\n## A heading"))
    assert "heading" in problem


def test_jupyterlab_collapses_what_the_site_folds():
    made = folds.collapse("08_maml", book("# A", "#| checks\nz = 3", "<!-- checks -->\nd", "x = 1"))
    assert [dict(cell.metadata) for cell in made.cells] == [
        {},
        folds.COLLAPSED,
        folds.COLLAPSED,
        {},
    ]


def test_checks_of_a_section_are_marked_for_their_fold():
    made = book(
        "# Small", "## One", "#| checks\n#| test: t\nassert 1", "<!-- checks -->\nSo it is."
    )
    cells = chapter_pages.page("01_small", made, {}, {}, 0.0).cells
    assert cells[2].metadata.tags == ["checks", "test"]
    assert cells[3].source.startswith(":::{div} metabook-note metabook-checks")
    assert cells[4].source == "::::::::{div} metabook-checks\nSo it is.\n::::::::"


# --- claims

RUN = "#| show\nscores = evaluate(learner, tasks)"


def test_a_verdict_without_a_claim_is_found_and_one_with_a_claim_is_not():
    text = (
        "## Run\n\nMAML is *better* than pixels. Is it better? Look at `x`.\n\n- It loses to none."
    )
    bare = book(text, RUN)
    assert claims.problems("08_maml", bare, []) == [
        "08_maml: no claim carries 'MAML is better than pixels.'",
        "08_maml: no claim carries 'It loses to none.'",
    ]
    carried = book(text, RUN, '#| claim: "MAML is better than pixels"\nassert True')
    assert len(claims.problems("08_maml", carried, ["It loses"])) == 0
    assert claims.problems("08_maml", book("## No run\n\nIt is better.", "x = 1"), []) == []


def test_a_claim_that_no_sentence_says_and_a_line_of_no_use_are_refused():
    lost = book("## Run\n\nNothing.", RUN, '#| claim: "It is better"\nassert True')
    assert "which no sentence of the page says" in claims.problems("08_maml", lost, [])[0]
    assert "is not there" in claims.problems("08_maml", book("## Run", RUN), ["Gone"])[0]


def test_a_claim_that_fails_stops_the_build_and_names_its_sentence(tmp_path):
    nbformat.write(
        book("# Small", '#| claim: "One is two"\nassert 1 == 2'), tmp_path / "01_small.ipynb"
    )
    chapter = build_site.read(tmp_path / "01_small.ipynb")
    with pytest.raises(chapter_pages.PageError, match=r"which should show: .*One is two"):
        build_site.execute(chapter, 1)


def test_other_seeds_reach_what_is_shown_and_nothing_else():
    made = claims.with_seeds(book("#| show\nf(seed=3)\ntorch.manual_seed(0)", "g(seed=3)"), 1000)
    assert [c.source for c in made.cells] == [
        "#| show\nf(seed=1003)\ntorch.manual_seed(1000)",
        "g(seed=3)",
    ]


def test_claims_that_fail_with_other_seeds_are_named(tmp_path):
    made = book(
        "# Small\n\nIt is small.",
        "#| show\nx = dict(seed=3)",
        '#| claim: "It is small"\nassert x["seed"] < 9',
    )
    assert claims.failing(made, tmp_path) == []
    assert claims.failing(claims.with_seeds(made, 1000), tmp_path) == ["It is small"]


# --- notation

PAGE = """# Notation

| symbol | meaning | in code |
|---|---|---|
| $x$ | an input | |
| $\\theta, W$ | weights | |

## Letters of one chapter

| chapter | letters |
|---|---|
| [chapter 8](08_maml.ipynb) | $u$ a thing, $\\mathcal A$ another |
"""


def test_letters_of_formulas_are_found():
    text = r"Of $\theta_t^\top W x$ and `$y$`, $$\operatorname{dist}(z, \mathcal{A}) = \frac{a}{2} \text{ if } b$$"
    assert notation.letters(text) == set("txtWzab") | {r"\theta", r"\mathcal A"} | {"y"}


def test_a_letter_without_a_meaning_or_with_two_is_named(tmp_path):
    nbformat.write(
        book(r"# A\n\nOf $\theta x$, $u$, $v$ and $\mathcal A$."), tmp_path / "08_maml.ipynb"
    )
    (problem,) = notation.problems(tmp_path, PAGE)
    assert "08_maml uses $v$" in problem
    both = PAGE.replace("$u$ a thing", "$u$ a thing, $v$, $x$, $y$")
    first, second = notation.problems(tmp_path, both)
    assert "$x$ for itself, which means something everywhere" in first
    assert "lists $y$" in second


@pytest.mark.parametrize("rule", [check.unfolded, check.unclaimed, check.unnoted])
def test_the_book_keeps_the_rules(rule):
    assert rule() == []


def test_a_word_that_the_glossary_lacks_is_named(tmp_path, monkeypatch):
    said = "# A {term}`way`, {term}`Ways <way>` of {term}`a warlock`, {term}`spells <spell of one>`"
    nbformat.write(book(said), tmp_path / "08_maml.ipynb")
    monkeypatch.setattr(check, "NBS", tmp_path)
    unknown = [problem.split("`")[1] for problem in check.unknown_terms()]
    assert unknown == ["a warlock", "spell of one"]
