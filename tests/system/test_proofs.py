"""Every numbered equation of the book is proved, and every proof can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from chapters import read_book
from notebooks import ROOT
from proofs import Mutation, Proof, equations, problems, proofs
from samples import TITLE, write

BOOK = read_book(ROOT / "nbs")
MUTATIONS = [
    pytest.param(
        proof,
        mutation,
        id=f"{proof.name}-{n}",
        marks=[getattr(pytest.mark, k)(*v) for k, v in marks.items()],
    )
    for proof in proofs(BOOK)
    for marks in [{k: v for k, v in proof.marks.items() if k != "proves"}]
    for n, mutation in enumerate(proof.mutations)
]


def test_every_equation_has_a_proof_and_every_proof_an_equation_and_a_mutation():
    assert problems(BOOK) == []


@pytest.mark.parametrize("proof, mutation", MUTATIONS)
def test_every_mutation_breaks_its_proof(proof: Proof, mutation: Mutation):
    assert proof.problem(mutation) is None


# --- the same on a small book whose proofs are good and bad

EQUATION = "### Half\n$$\nh(x) = x / 2\n$$ (eq-half)"
LIBRARY = {
    "__init__": "",
    "other": "UNIT = 1.0\n",
    "sample": "from .other import UNIT\n\n\ndef half(x):\n    return x / 2 * UNIT\n",
}
CODE = ["#| default_exp sample", "#| export\ndef half(x):\n    return x / 2 * UNIT"]


def proof_cell(breaks: str, code: str = "assert half(3.0) == 1.5", proves: str = "eq-half") -> str:
    return f"#| test: halves\n#| proves: {proves}\n#| breaks: {breaks}\n{code}"


def small_book(folder: Path, *cells: str) -> list[Proof]:
    """The proofs of a book of one chapter, and a library to go with it."""
    package = folder / "metabook"
    package.mkdir(exist_ok=True)
    for name, source in LIBRARY.items():
        (package / f"{name}.py").write_text(source)
    return proofs(read_book(write(folder, TITLE, EQUATION, *CODE, *cells)), package)


def test_a_good_proof_notices_and_leaves_the_library_as_it_was(tmp_path):
    import metabook

    [proof] = small_book(tmp_path, proof_cell('"x / 2" -> "x / 3"'))
    assert proof.problem(proof.mutations[0]) is None
    assert sys.modules["metabook"] is metabook and "metabook.sample" not in sys.modules
    assert (tmp_path / "metabook" / "sample.py").read_text() == LIBRARY["sample"]


def test_a_proof_may_break_another_module(tmp_path):
    [proof] = small_book(tmp_path, proof_cell('other: "UNIT = 1.0" -> "UNIT = 2.0"'))
    assert proof.mutations == [Mutation("UNIT = 1.0", "UNIT = 2.0", "other")]
    assert proof.problem(proof.mutations[0]) is None


WEAK = {
    "nothing changes": ('"x / 2" -> "x * 0.5"', "assert half(3.0) == 1.5", "it passes"),
    "the test does not look": ('"x / 2" -> "x / 3"', "assert half(0.0) == 0", "it passes"),
    "a misspelt name": ('"x / 2" -> "y / 2"', "assert half(3.0) == 1.5", "NameError"),
    "a module that does not load": (
        '"* UNIT" -> "* UNIT\\n\\n1 / 0\\n"',
        "assert half(3.0) == 1.5",
        "before its first cell",
    ),
    "a test that fails anyway": (
        '"x / 2" -> "x / 3"',
        "assert half(3.0) == 7",
        "fails without any mutation",
    ),
    "a test that skips": (
        '"x / 2" -> "x / 3"',
        "if half(3.0) != 1.5:\n    pytest.skip()",
        "Skipped",
    ),
}


@pytest.mark.parametrize("breaks, code, why", WEAK.values(), ids=WEAK.keys())
def test_a_mutation_that_the_proof_does_not_notice_is_told(breaks, code, why, tmp_path):
    [proof] = small_book(tmp_path, "import pytest", proof_cell(breaks, code))
    assert why in proof.problem(proof.mutations[0])


def test_the_failure_has_to_arise_in_the_cell_of_the_proof(tmp_path):
    [proof] = small_book(tmp_path, "k = 1 / (half(3.0) == 1.5)", proof_cell('"x / 2" -> "x / 3"'))
    assert "in cell c4: ZeroDivisionError" in proof.problem(proof.mutations[0])


@pytest.mark.parametrize(
    "later", ["half(3.0)", "half(known)"], ids=["independent", "needing the other"]
)
def test_another_test_of_the_section_does_not_notice_in_its_place(later, tmp_path):
    first = "#| test: first\nknown = 3.0\nassert half(3.0) == 1.5"
    [proof] = small_book(tmp_path, first, proof_cell('"x / 2" -> "x / 3"', f"{later}\nassert True"))
    assert ("it passes" if "3.0" in later else "in cell c4") in proof.problem(proof.mutations[0])


def test_an_expected_error_that_no_longer_comes_is_noticed(tmp_path):
    code = "with pytest.raises(TypeError):\n    half('3')"
    [proof] = small_book(tmp_path, "import pytest", proof_cell('"x / 2" -> "x * 2 and 1"', code))
    assert proof.problem(proof.mutations[0]) is None


def test_labels_are_found_in_each_of_their_forms(tmp_path):
    forms = [
        "### a\n$$\nx\n$$ (eq-one)\n\n$$ y $$ (eq-two)\n\n$$ z $$ (def-z)",
        "### b\n(eq-three)=\n$$ x $$\nSee {eq}`eq-one` and (eq-four).",
        "### c\n```{math}\n:label: eq-five\nx\n```",
    ]
    assert equations(read_book(write(tmp_path, TITLE, *forms))) == [
        "eq-one",
        "eq-two",
        "eq-three",
        "eq-five",
    ]


FAULTS = {
    "no proof": ([], "eq-half has no proof"),
    "two of one name": ([EQUATION, proof_cell('"x / 2" -> "x"')], "eq-half labels two equations"),
    "unknown equation": (
        [proof_cell('"x / 2" -> "x"', proves="eq-hafl")],
        "proves eq-hafl, which no equation carries",
    ),
    "no mutation": (["#| test: it\n#| proves: eq-half\nassert half"], "names no mutation"),
    "no arrow": ([proof_cell('"x / 2" to "x"')], 'not `"old" -> "new"`'),
    "text that is not there": ([proof_cell('"x / 7" -> "x"')], "stands 0 times"),
    "text that is there twice": ([proof_cell('"x" -> "y"')], "stands 2 times"),
    "text that stands in another module": (
        [proof_cell('other: "x / 2" -> "x"')],
        "0 times in ['other']",
    ),
    "no Python": ([proof_cell('"x / 2" -> "x /"')], "makes what is no Python"),
    "expensive": (
        ["#| setup: once\nrun = 3.0", proof_cell('"x / 2" -> "x"', "assert half(run) == 1.5")],
        "uses a `#| setup: once` cell",
    ),
}


@pytest.mark.parametrize("cells, fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_of_the_book_is_told(cells, fault, tmp_path):
    small_book(tmp_path, *cells)
    assert any(fault in p for p in problems(read_book(tmp_path), tmp_path / "metabook"))


def test_a_good_book_has_no_faults(tmp_path):
    small_book(tmp_path, proof_cell('"x / 2" -> "x"'))
    assert problems(read_book(tmp_path), tmp_path / "metabook") == []
