"""The generator of chapter tests: what it makes of notebooks, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from cells_to_tests import files_of, main, render
from chapters import Refused, read_book
from notebooks import ROOT, read, unclean
from samples import TITLE, write
from scopes import names

MODULE = "#| default_exp sample"


def text_of(folder: Path, *sources: str) -> str:
    """The test file of a chapter with these cells below its title."""
    return files_of(write(folder, TITLE, *sources))["test_05_sample.py"]


def call_it(text: str, **arguments: object) -> None:
    """Run `test_it` of a test file."""
    made = sys.modules["made"] = ModuleType("made")
    exec(compile(text, "made", "exec"), made.__dict__)
    made.test_it(**arguments)


def refused(folder: Path, *sources: str) -> list[str]:
    with pytest.raises(Refused) as caught:
        files_of(write(folder, TITLE, *sources))
    return list(caught.value.args)


# --- cells whose meaning hangs on all that ran before them

SURVIVE = {
    "training in a loop": [
        "import torch",
        "w = torch.zeros(2, requires_grad=True)\nsgd = torch.optim.SGD([w], lr=0.2)",
        "for _ in range(4):\n    ((w - 1) ** 2).sum().backward()\n    sgd.step()\n    sgd.zero_grad()",
        "#| test: it\nassert (w > 0.8).all()",
    ],
    "appending": [
        "seen = []",
        "for i in range(3):\n    seen.append(i)",
        "#| test: it\nassert seen == [0, 1, 2]",
    ],
    "augmented assignment": ["n = 1", "n += 1", "n *= 5", "#| test: it\nassert n == 10"],
    "rebinding under a closure": [
        "v = [1, 1]",
        "def total():\n    return sum(v)",
        "v = [2, 3]",
        "#| test: it\nassert total() == 5",
    ],
    "helper bound later": [
        "def outer():\n    return inner()",
        "def inner():\n    return 7",
        "#| test: it\nassert outer() == 7",
    ],
    "random state": [
        "import torch",
        "torch.manual_seed(3)",
        "first = torch.rand(1)",
        "torch.manual_seed(3)\nassert_later = torch.rand(1)",
        "#| test: it\nassert torch.equal(first, assert_later)",
    ],
    "plot that gives a value": [
        "import matplotlib.pyplot as plt",
        "figure, axes = plt.subplots()\nheight = len(axes.plot([1, 2]))",
        "#| test: it\nassert height == 1",
    ],
    "alias": ["p = [1]\nq = p", "q.append(2)", "#| test: it\nassert p == [1, 2]"],
    "effect of a call": [
        "book = {}\n\n\ndef note(key):\n    book[key] = True",
        "note('a')",
        "#| test: it\nassert book == {'a': True}",
    ],
    "test that recomputes": ["k = 10", "#| test: it\nk = k * 2\nassert k == 20"],
    "after another test": [
        "k = 10",
        "#| test: first\nk = k * 2\nassert k == 20",
        "#| test: it\nk += 1\nassert k == 21",
    ],
    "class bound twice": [
        "class Net:\n    size = 3",
        "net = Net()",
        "class Net:\n    pass",
        "#| test: it\nassert net.size == 3 and not hasattr(Net, 'size')",
    ],
    "change in place": [
        "import torch",
        "z = torch.zeros(2)\nz[0] = 5\nz.add_(1)",
        "#| test: it\nassert z.tolist() == [6, 1]",
    ],
    "magics": ["%matplotlib inline\nm = 3", "%%time\nm += 1", "#| test: it\n!ls\nassert m == 4"],
    "operators that look like magics": ["m = (\n    7\n    % 4\n)", "#| test: it\nassert m == 3"],
    "cell of another language": ["%%html\n<b>not Python</b>", "#| test: it\nassert True"],
    "comprehension": [
        "n = 3",
        "squares = [n * i for i in range(n) if n]",
        "#| test: it\nassert squares == [0, 3, 6] and {i: n for i in squares}[6] == 3",
    ],
    "lambda and default": [
        "scale = 2",
        "double = lambda x, by=scale: x * by  # noqa: E731",
        "scale = 5",
        "#| test: it\nassert double(3) == 6 and (lambda: scale)() == 5",
    ],
    "class that reads names": [
        "size = 4",
        "class Net:\n    width = size\n\n    def double(self):\n        return 2 * size",
        "#| test: it\nassert Net.width == 4 and Net().double() == 8",
    ],
    "method that reads its class": [
        "class Node:\n    def copy(self):\n        return Node()",
        "#| test: it\nassert isinstance(Node().copy(), Node)",
    ],
    "string of several lines": [
        'text = """one\n  two\n"""',
        "#| test: it\nassert text == 'one\\n  two\\n'",
    ],
    "dataclass with annotations": [
        "from __future__ import annotations\n\nimport math\nfrom dataclasses import dataclass",
        "@dataclass\nclass Point:\n    x: int\n    y: int = 0",
        "#| test: it\nassert Point(1) == Point(1, math.floor(0.5))",
    ],
    "walrus, with, try, for, star": [
        "from contextlib import nullcontext",
        "with nullcontext(5) as five:\n    (six := five + 1)\nhead, *tail = [1, 2, 3]",
        "try:\n    raise KeyError('no')\nexcept KeyError as error:\n    found = str(error)",
        "#| test: it\nassert (six, tail, found) == (6, [2, 3], \"'no'\")",
    ],
    "nested import": [
        "def root(x):\n    import math\n\n    return math.sqrt(x)",
        "#| test: it\nassert root(4) == 2",
    ],
    "heading of level three": ["k = 2", "### Still the same section", "#| test: it\nassert k == 2"],
    "comment in a fenced block": [
        "k = 2",
        "### Look:\n```python\n# no heading\n```",
        "#| test: it\nassert k == 2",
    ],
    "nonlocal": [
        "def counter():\n    n = 0\n\n    def up():\n        nonlocal n\n        n += 1\n        return n\n\n    return up",
        "#| test: it\nup = counter()\nup()\nassert up() == 2",
    ],
    "setup of another section": [
        "## One",
        "#| setup\nk = [1]",
        "## Two",
        "k.append(2)",
        "#| test: it\nassert k == [1, 2]",
    ],
    "setup changed by a later setup": [
        "## One",
        "#| setup\nk = {}",
        "#| setup\nk['a'] = 1",
        "## Two",
        "#| test: it\nassert k == {'a': 1}",
    ],
    "setup that calls a helper of another": [
        "#| setup\nstate = {}\n\n\ndef note(key):\n    state[key] = 1",
        "#| setup\nnote('a')",
        "## Two",
        "#| test: it\nassert state == {'a': 1}",
    ],
    "setup that binds nothing": [
        "import random",
        "#| setup\nrandom.seed(7)",
        "## Two",
        "#| test: it\nassert f'{random.random():.3f}' == '0.324'",
    ],
    "setup between two cells": [
        "k = 1",
        "#| setup\nk = 2",
        "#| test: it\nassert k == 2",
    ],
    "own name like that of a built-in": ["input = 3", "#| test: it\nassert input == 3"],
    "wanted error": [
        "import pytest",
        "#| test: it\nwith pytest.raises(ValueError, match='no'):\n    raise ValueError('no')",
    ],
    "documentation calls": [
        "from nbdev.showdoc import show_doc",
        "show_doc(main)",
        "#| test: it\nassert True",
    ],
}


@pytest.mark.parametrize("cells", SURVIVE.values(), ids=SURVIVE.keys())
def test_meaning_is_kept(cells, tmp_path):
    [chapter] = read_book(write(tmp_path, TITLE, *cells))
    call_it(render(chapter, [chapter.compose(p) for p in chapter.tests]))


def test_a_test_does_not_see_what_another_one_changes_in_place(tmp_path):
    first = "#| test: first\np.append(1)\nassert p == [1]"
    [chapter] = read_book(
        write(tmp_path, TITLE, "p = []", first, "#| test: it\np.append(2)\nassert p == [2]")
    )
    call_it(render(chapter, [chapter.compose(p) for p in chapter.tests]))


# --- refusals: (cells, what the message says)

REFUSE = {
    "assert without a name": (["assert True"], "c1 asserts and has no name"),
    "assert_close without a name": (
        ["import torch", "torch.testing.assert_close(1, 1)"],
        "c2 asserts",
    ),
    "numpy.testing without a name": (
        ["import numpy as np", "np.testing.assert_allclose(1, 1)"],
        "c2 asserts",
    ),
    "pytest.raises without a name": (
        ["import pytest", "with pytest.raises(KeyError):\n    {}[1]"],
        "c2 asserts",
    ),
    "call of a test function without a name": (["def test_x(): ...", "test_x()"], "c2 asserts"),
    "assert in a loop": (["for i in range(2):\n    assert i < 2"], "c1 asserts"),
    "assert in a setup": (["#| setup\nassert True"], "c1 asserts"),
    "assert that is shown": (["#| show\nassert True"], "c1 asserts and is flagged `#| show`"),
    "duplicate name": (
        ["#| test: twice\nassert True", "## Two", "#| test: twice\nassert True"],
        "c3 (test_twice) has the name of the test in cell c1",
    ),
    "bad name": (["#| test: Not a name\nassert True"], "needs one name"),
    "name that begins with test_": (["#| test: test_x\nassert True"], "needs one name"),
    "empty name": (["#| test\nassert True"], "needs one name"),
    "test without code": (["#| test: empty\nimport torch"], "flagged as a test"),
    "test that is never run": (["#| test: it\n#| notest\nassert True"], "flagged as a test"),
    "exported test": ([MODULE, "#| export\n#| test: it\nassert True"], "flagged as a test"),
    "test and setup": (["#| setup\n#| test: it\nassert True"], "as a test and as a setup"),
    "unknown setup": (["#| setup: twice\nk = 1"], "known are `setup` and `setup: once`"),
    "proof without a name": (
        ["#| proves: eq-a\nassert True"],
        "c1 proves something and has no name",
    ),
    "unknown directive": (["#| tset: it\nassert True"], "does not know the directive `#| tset`"),
    "late directive": (["k = 1\n#| test: it\nassert True"], "below its first line of code"),
    "other section": (
        ["## One", "far = 1", "## Two", "#| test: it\nassert far"],
        "c4 (test_it) uses `far` of cell c2: flag that cell `#| setup`",
    ),
    "other section, inside a function": (
        [
            "## One",
            "far = 1",
            "## Two",
            "def f():\n    return [far for _ in range(2)]",
            "#| test: it\nassert f()",
        ],
        "uses `far` (in cell c4) of cell c2",
    ),
    "name that nothing binds": (
        ["#| test: it\nassert nowhere"],
        "uses `nowhere`, which no cell binds",
    ),
    "name bound further down": (["#| test: it\nassert k", "k = 1"], "uses `k` of cell c2"),
    "setup further down": (
        ["#| test: it\nassert k", "#| setup\nk = 1"],
        "uses `k` of the setup cell c2, which stands further down",
    ),
    "name of a shown cell": (
        ["#| show\nfigure = 1", "#| test: it\nassert figure"],
        "uses `figure` of cell c1, which no test holds",
    ),
    "name of a cell never run": (
        ["#| eval: false\nk = 1", "#| test: it\nassert k"],
        "uses `k` of cell c1, which no test holds",
    ),
    "setup out of reach": (
        ["k = 1", "#| setup\nj = k", "## Two", "#| test: it\nassert j"],
        "uses `k` (in cell c2) of cell c1",
    ),
    "global": (
        ["n = 3\n\n\ndef up():\n    global n\n    n += 1", "#| test: it\nup()\nassert n == 4"],
        "c1 says `global`",
    ),
    "globals()": (["#| test: it\nassert globals()"], "uses `globals`"),
    "exported name bound anew": (
        [MODULE, "#| export\ndef f(): ...", "#| test: it\nf = 1\nassert f"],
        "c3 (test_it) binds `f` anew (in cell c3)",
    ),
    "imported name bound anew": (
        ["import math", "math = 1", "#| test: it\nassert math"],
        "binds `math` anew (in cell c2)",
    ),
    "device bound anew": (
        ["#| test: it\nfor device in [1]:\n    assert device"],
        "binds `device` anew",
    ),
    "built-in read, then bound": (
        ["max = max(1, 2)", "#| test: it\nassert max"],
        "binds `max` anew",
    ),
    "two imports of one name": (
        ["import numpy as np", "import math as np", "#| test: it\nassert np"],
        "imports two things as `np`",
    ),
    "import and export of one name": (
        [MODULE, "#| export\ndef sqrt(): ...", "from math import sqrt"],
        "imports and exports `sqrt`",
    ),
    "star import": (["from math import *", "#| test: it\nassert True"], "imports *"),
    "import on a line with other code": (["import math; k = 1"], "on a line with other code"),
    "export to nowhere": (["#| export\nk = 1"], "no `#| default_exp module`"),
    "class that reads and binds": (
        ["size = 4", "class Net:\n    size = size", "#| test: it\nassert Net.size"],
        "a class that reads and binds `size`",
    ),
    "shared name bound anew": (
        ["#| setup: once\nrun = [1]", "#| test: it\nrun = [*run, 2]\nassert run"],
        "binds `run` anew",
    ),
    "shared name augmented": (
        ["#| setup: once\nn = 1", "#| test: it\nn += 1\nassert n"],
        "binds `n` anew",
    ),
    "shared object changed": (
        ["#| setup: once\nrun = [1]", "#| test: it\nrun[0] = 2\nassert run"],
        "changes `run`, which tests share",
    ),
    "setup on top of an expensive one": (
        ["#| setup: once\nrun = 1", "#| setup\nscore = run + 1", "#| test: it\nassert score"],
        "c2 uses `run` of a `#| setup: once` cell",
    ),
    "no Python": (["k = = 1"], "c1 is not Python"),
    "no Python of a cell": (["return 1"], "c1 is not Python: 'return' outside function"),
}


@pytest.mark.parametrize("cells, message", REFUSE.values(), ids=REFUSE.keys())
def test_refusal_says_where_and_why(cells, message, tmp_path):
    problems = refused(tmp_path, *cells)
    assert all(p.startswith("05_sample.ipynb") for p in problems)
    assert any(message in p for p in problems), problems


def test_all_refusals_come_at_once_and_nothing_is_written(tmp_path):
    write(tmp_path, TITLE, "assert 1", "assert 2", name="01_bad")
    write(tmp_path, TITLE, "#| test: good\nassert True", name="02_good")
    write(tmp_path, TITLE, "#| test: far\nassert nowhere", name="03_bad")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(str(tmp_path), str(out))
    assert str(stop.value).count("01_bad") == 2 and "03_bad" in str(stop.value)
    assert not out.exists()


def test_unasserting_setup_may_define_a_checking_helper(tmp_path):
    helper = "#| setup\ndef close(a, b):\n    assert abs(a - b) < 1e-6"
    call_it(text_of(tmp_path, helper, "## Two", "#| test: it\nclose(1, 1)"))


def test_variables_of_comprehensions_stay_inside_on_every_python():
    code = "a = [x for x in b if {y: z for y, z in x} and {w for w in x if (v := w)}]"
    assert names(code) == ({"a", "v"}, {"b"}, set())


# --- the text


def test_the_text_is_deterministic_and_says_where_it_comes_from(tmp_path):
    cells = [
        "import torch\nfrom torch import nn, Tensor",
        "#| test: it\nassert nn and torch and Tensor",
    ]
    text = text_of(tmp_path, *cells)
    assert text == text_of(tmp_path, *cells)
    assert text.startswith('"""Made from nbs/05_sample.ipynb by tools/cells_to_tests.py.')
    assert "import torch\nfrom torch import Tensor, nn\n" in text
    assert "    # cell c2\n    assert" in text


def test_tests_that_share_no_name_do_not_hold_one_another(tmp_path):
    cells = [
        "import torch",
        "k = 1",
        "#| test: first\nx = torch.ones(1)\nassert x",
        "#| test: it\nassert k",
    ]
    assert text_of(tmp_path, *cells).count("# cell c3") == 1


def test_imports_without_a_use_and_cells_of_imports_alone_leave_no_trace(tmp_path):
    text = text_of(tmp_path, "import math\nimport json", "#| test: it\nassert math")
    assert "json" not in text and "cell c1" not in text and "import math" in text


def test_what_the_notebook_exports_is_imported_from_its_modules(tmp_path):
    cells = [
        MODULE,
        "#| export\ndef f(): ...",
        "#| export testing\ndef g(): ...",
        "#| exporti\n_h = 1",
    ]
    text = text_of(tmp_path, *cells, "#| test: it\nassert f and g and _h")
    assert "from metabook.sample import _h, f\nfrom metabook.testing import g\n" in text


def test_guarded_imports_of_exported_cells_come_from_the_module(tmp_path):
    guarded = "#| export\ntry:\n    from jaxtyping import Float\nexcept ImportError:\n    pass"
    text = text_of(tmp_path, MODULE, guarded, "#| test: it\ndef f(x: Float): ...\n\nassert f")
    assert "from metabook.sample import Float" in text


def test_device_is_a_fixture_where_it_is_used(tmp_path):
    setup = "#| setup\ndevice = 'mine'\nk = 1"
    text = text_of(
        tmp_path,
        setup,
        "#| test: it\nassert device == 'given'",
        "## Two",
        "#| test: other\nassert k",
    )
    assert "def test_it(device):" in text and "def test_other():" in text and "mine" not in text
    call_it(text, device="given")


def test_marks_come_from_every_cell_that_a_test_holds(tmp_path):
    text = text_of(
        tmp_path,
        "#| setup: once\n#| data: omniglot\nimages = 1",
        "#| slow\nk = 2",
        "#| test: it\n#| cuda\n#| proves: eq-a, eq-b\nassert images and k",
        "## Two",
        "#| test: plain\nassert True",
    )
    marks = ["slow", "cuda", 'data("omniglot")', 'proves("eq-a", "eq-b")']
    assert "".join(f"@pytest.mark.{mark}\n" for mark in marks) + "def test_it(once_c1):" in text
    assert "\n\n\ndef test_plain():" in text


def test_shown_cells_and_unused_fixtures_are_left_out(tmp_path):
    text = text_of(
        tmp_path, "#| setup: once\nrun = 1", "#| show\nexplore = 2", "#| test: it\nassert True"
    )
    assert "run" not in text and "explore" not in text and "pytest" not in text


def test_expensive_setups_give_only_what_is_used_and_may_build_on_another(tmp_path):
    text = text_of(
        tmp_path,
        "#| setup\nk = 1",
        "#| setup: once\nnet, log = [k], {}",
        "#| setup: once\nscore = len(net)",
        "## Two",
        "#| test: it\nassert score == 1",
    )
    assert (
        "def once_c3(once_c2):" in text
        and "SimpleNamespace(net=net)" in text
        and "log=log" not in text
    )


def test_ruff_has_nothing_to_say(tmp_path):
    folder = tmp_path / "tests" / "chapters"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for n, cells in enumerate(SURVIVE.values()):
        (folder / f"test_{n}.py").write_text(text_of(tmp_path, *cells))
    for verb in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *verb, "tests"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_files_of_notebooks_that_are_gone_are_removed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "test_04_gone.py").write_text("")
    main(str(write(tmp_path, TITLE, "#| test: it\nassert True")), str(out))
    assert [p.name for p in out.iterdir()] == ["test_05_sample.py"]


# --- the same files under pytest

RUN_ME = [
    "import random",
    "import torch",
    "## Shared",
    "#| setup: once\nwith open('runs.txt', 'a') as log:\n    print('once on', device, file=log)\ndraw = random.random()",
    "#| test: one\nassert draw and device.type in ('cpu', 'meta')",
    "#| test: two\nrandom.random()\nassert draw",
    "## Alone",
    "#| test: seeds\ntorch.set_default_dtype(torch.float64)\nassert f'{random.random():.4f}' == '0.8444'",
    "#| test: type_is_restored\nassert torch.get_default_dtype() == torch.float32",
    "## Cuda",
    "#| test: gpu\n#| cuda\nassert device.type == 'cuda'",
    "## Data",
    "#| test: images\n#| data: omniglot\nassert True",
    "## More data",
    "#| test: other_images\n#| data: fc100\nassert False",
]


def pytest_on(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run pytest on the files of a folder, with the project's conftest as a plugin."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "METABOOK"))}
    env |= {
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}.",
        "CUDA_VISIBLE_DEVICES": "",
    } | environment
    options = f"-m pytest -p conftest -c {os.devnull} -rs --rootdir .".split()
    command = [sys.executable, *options, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_made_file_under_pytest(tmp_path):
    """On two devices, of which every machine has both: an expensive setup runs once on each."""
    main(str(write(tmp_path, TITLE, *RUN_ME)), str(tmp_path / "tests"))
    (tmp_path / "omniglot").mkdir()
    (tmp_path / "omniglot" / "images_background.zip").touch()
    (tmp_path / "two.py").write_text(
        "import conftest\n\nconftest.devices = lambda config: ['cpu', 'meta']\n"
    )
    done = pytest_on(tmp_path, "-p", "two", "tests", METABOOK_DATA=str(tmp_path))
    assert "7 passed, 2 skipped" in done.stdout, done.stdout
    assert "needs a CUDA device" in done.stdout
    assert "METABOOK_DATA does not hold fc100" in done.stdout
    assert (tmp_path / "runs.txt").read_text() == "once on cpu\nonce on meta\n"


def test_unknown_data_and_a_missing_device_are_errors(tmp_path):
    cells = ["#| test: images\n#| data: omnigolt\nassert True"]
    main(str(write(tmp_path, TITLE, *cells)), str(tmp_path / "tests"))
    assert "no data set is called 'omnigolt'" in pytest_on(tmp_path, "tests").stderr
    done = pytest_on(tmp_path, "--device", "cuda", "tests")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "no CUDA device" in done.stderr


# --- notebooks as they are committed


def test_an_unclean_notebook_is_named(tmp_path):
    path = write(tmp_path, TITLE, "1 + 1") / "05_sample.ipynb"
    assert unclean(path) == []
    book = nbformat.read(path, 4)
    book.cells[1].update(execution_count=3, metadata={"collapsed": True})
    book.metadata["language_info"] = {"name": "python"}
    nbformat.write(book, path)
    assert [p.split(": ")[1][:12] for p in unclean(path)] == [
        "has metadata",
        "cell c1 hold",
        "cell c1 has ",
    ]


def test_directives_are_read_in_each_of_their_forms(tmp_path):
    cells = '#| hide\n#|echo: false\n#| export other\n#| breaks: "a: b" -> "c"\n#| breaks: "d" -> "e"\nk = 1'
    [_, cell] = read(write(tmp_path, TITLE, cells) / "05_sample.ipynb").cells
    assert cell.source == "k = 1"
    assert cell.directives == {
        "hide": [""],
        "echo": ["false"],
        "export": ["other"],
        "breaks": ['"a: b" -> "c"', '"d" -> "e"'],
    }
