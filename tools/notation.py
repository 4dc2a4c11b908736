"""Whether every letter of a formula stands in docs/notation.md: notation.py

The tables give each letter one meaning for the whole book; the last one lists the letters that a chapter has for itself,
and none of these may be a letter of the tables above.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from notebooks import ROOT, find, in_workshop, read

PAGE = ROOT / "docs" / "notation.md"
OWN = "## Letters of one chapter"
FORMULA = re.compile(r"\$\$(.*?)\$\$|(?<![\\$])\$([^$\n]+)\$", re.S)
WORDS = re.compile(
    r"\\(?:text|operatorname\*?|mathrm|mathtt|label|tag|begin|end)\s*\{[^}]*\}|`[^`]*`|\\.(?![A-Za-z])"
)
STYLED = r"\\math(?:cal|bb|bf)\s*\{?[A-Za-z]\}?"
GREEK = (
    "alpha beta gamma Gamma delta Delta epsilon varepsilon zeta eta theta Theta kappa lambda Lambda mu nu xi Xi Pi"
    " rho sigma Sigma tau phi varphi Phi chi psi Psi omega Omega ell pi vartheta varsigma upsilon"
)
LETTER = re.compile(
    rf"{STYLED}|\\(?:{GREEK.replace(' ', '|')})(?![A-Za-z])|(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])"
)
COUNT = set("ijkloe")  # they count; e is the base of the natural logarithm
KNOWN = {r"\mathbb E", r"\mathbb R", r"\pi", "O"}


def letters(text: str) -> set[str]:
    """The letters in the formulas of a text: Latin and Greek ones, and those in another style."""
    found = set()
    for display, inline in FORMULA.findall(text):
        formula = WORDS.sub(" ", display or inline)
        commands = re.sub(r"\\(?!math)([a-zA-Z]+)", r" \\\1 ", formula)
        found |= {
            re.sub(r"\s*\{?([A-Za-z])\}?$", r" \1", s) if "math" in s else s
            for s in LETTER.findall(commands)
        }
    return found


def shared(page: str) -> set[str]:
    """The letters that mean one thing in the whole book."""
    rows = re.findall(r"^\| (\$.*?) \|", page.partition(OWN)[0], re.M)
    return letters("\n".join(rows)) | COUNT | KNOWN


def own(page: str) -> dict[str, set[str]]:
    """The letters that a chapter has for itself, by its name."""
    rows = re.findall(r"^\| \[[^\]]*\]\((\w+)\.ipynb\) \| (.*?) \|$", page.partition(OWN)[2], re.M)
    return {chapter: letters(text) for chapter, text in rows}


def problems(folder: Path, page: str) -> list[str]:
    """Letters without a meaning, letters with two, and rows of letters that no formula uses."""
    everywhere, owners, bad = shared(page), own(page), []
    for path in (p for p in find(folder) if not in_workshop(p.stem)):
        used = letters("\n".join(c.source for c in read(path).cells if c.kind == "markdown"))
        mine = owners.get(path.stem, set())
        bad += [
            f"{path.stem} uses ${s}$, which docs/notation.md does not give: take a letter that it gives, or add it to "
            "the chapter's own letters"
            for s in sorted(used - everywhere - mine)
        ]
        bad += [
            f"{path.stem} has ${s}$ for itself, which means something everywhere"
            for s in sorted(mine & everywhere)
        ]
        bad += [
            f"{path.stem} lists ${s}$ and does not use it" for s in sorted(mine - used - everywhere)
        ]
    return bad


def main() -> None:
    sys.exit("\n".join(problems(ROOT / "nbs", PAGE.read_text(encoding="utf-8"))) or 0)


if __name__ == "__main__":
    main()
