"""What modules of the library import: each other in order, and at first nothing beyond torch, numpy and jaxtyping."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import check
import pytest
import torch
from jaxtyping import TypeCheckError

# The command line is made of typer; nothing imports it.
MODULES = sorted({file.stem for file in check.PACKAGE.glob("[a-z]*.py")} - {"cli"})
BEFORE_USE = {
    "matplotlib",
    "PIL",
    "ipywidgets",
    "pooch",
    "tqdm",
    "safetensors",
    "typer",
    "IPython",
    "fastcore",
    "nbdev",
}

# Imports each module twice: as it is, and in a world with only torch, numpy, jaxtyping and the standard library.
SCRIPT = """
import builtins, importlib, json, sys
import numpy, torch

modules, plain, loaded = sys.argv[1:], builtins.__import__, set(sys.modules)
allowed = {"torch", "numpy", "jaxtyping", "metabook", *sys.stdlib_module_names}
failed = {}


def only_allowed(name, globals=None, locals=None, fromlist=(), level=0):
    asks = (globals or {}).get("__name__", "")
    if asks.split(".")[0] == "metabook" and not level and name.split(".")[0] not in allowed:
        raise ImportError(f"{asks} imports {name}")
    return plain(name, globals, locals, fromlist, level)


for module in modules:
    importlib.import_module(f"metabook.{module}")
added = sorted({name.split(".")[0] for name in set(sys.modules) - loaded})
for name in [name for name in sys.modules if name.split(".")[0] == "metabook"]:
    del sys.modules[name]
builtins.__import__ = only_allowed
for module in modules:
    try:
        importlib.import_module(f"metabook.{module}")
    except ImportError as error:
        failed[module] = str(error)
print(json.dumps([added, failed]))
"""


@pytest.fixture(scope="module")
def imported() -> tuple[list[str], dict[str, str]]:
    """What importing the library adds to torch and numpy, and which modules ask for more than jaxtyping besides."""
    command = [sys.executable, "-c", SCRIPT, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    added, failed = json.loads(done.stdout)
    return added, failed


def test_importing_the_library_loads_nothing_before_its_use(imported):
    assert sorted(BEFORE_USE & set(imported[0])) == []


def test_every_module_imports_with_torch_numpy_and_jaxtyping_alone(imported):
    assert imported[1] == {}


def test_while_testing_calls_are_held_against_their_signatures():
    from metabook.prototypes import prototypes

    z, y = torch.ones(2, 6, 3), torch.eye(2).repeat(3, 1).expand(2, 6, 2)
    assert torch.vmap(prototypes)(z, y).shape == (2, 2, 3)
    with pytest.raises(TypeCheckError, match="parameter 'z'"):
        prototypes(z, y[0])
    with pytest.raises(TypeCheckError, match="parameter 'y'"):
        torch.vmap(prototypes)(z, y[:, :5])


IMPORTS = """
import metabook, torch
import metabook.engine as e
from metabook.episodes import Episode
from .networks import MLP
from . import maml
from metabook import __version__, load


def late():
    from metabook.training import fit
"""


def test_imports_are_seen_in_each_of_their_forms():
    seen = {"engine", "episodes", "networks", "maml", "load", "training"}
    assert check.imports_within(IMPORTS) == seen


def test_what_stands_below_or_nowhere_is_told():
    names = check.order("# in order\nfirst\nsecond  # then\n\nthird\n")
    assert names == ["first", "second", "third"]
    good = {
        "first": "import torch",
        "second": "from .first import f",
        "third": "import metabook.second",
    }
    assert check.import_problems(good, names) == []
    below = check.import_problems(good | {"first": "def f():\n    from .third import g"}, names)
    assert below == ["metabook.first imports third, which does not stand above it"]
    assert "itself" not in names and check.import_problems({"itself": ""}, names) == [
        "metabook.itself does not stand in docs/order.txt"
    ]


UNCHANGED = """
import ctypes, os, torch
torch.func.grad(torch.sum)(torch.ones(1))  # which sets a variable for its compiler
before, library = dict(os.environ), ctypes.CDLL(None)
told = []
if hasattr(library, "mallopt"):
    real, ctypes.CDLL = ctypes.CDLL, lambda name: told.append(name)
import metabook.engine as engine, metabook.episodes as e, metabook.maml as m, metabook.networks as n
engine.gradients(m.MAML(n.MLP([1, 4, 1]), kind="regression"), e.Sinusoids().sample(2))
print(dict(os.environ) == before, told)
"""


def test_neither_an_import_nor_a_gradient_changes_the_process():
    done = subprocess.run(
        [sys.executable, "-c", UNCHANGED], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "[]"]


def test_what_of_pytorch_is_private_is_imported_in_one_place():
    private = re.compile(
        r"^\s*(?:from torch[\w.]*\._|from torch[\w.]* import (?:\(\s*)?_|import torch\._)", re.M
    )
    found = {p.stem for p in check.PACKAGE.glob("*.py") if private.search(p.read_text())}
    assert found == {"structures"}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("as in [chapter 8](08_maml.ipynb) and [Appendix A07](A07_graphs.ipynb)", None),
        ("Andrychowicz et al. 2016, appendix A.", None),
        ("as in chapter 8", "says 'chapter 8': write"),
        ("see [chapter 13](04_prototypes.ipynb)", "calls 4 'chapter 13'"),
        ("see [appendix A1](A14_explore.ipynb)", "calls A14 'appendix A1'"),
    ],
)
def test_chapters_are_named_by_links_whose_number_is_theirs(text, problem):
    found = check.reference_problems("a page", text)
    assert (not found) if problem is None else (len(found) == 1 and problem in found[0])
