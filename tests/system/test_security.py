"""What SECURITY.md promises: nothing that is read is ever executed, downloads are checked, archives are bounded."""

from __future__ import annotations

import ast
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from notebooks import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from metabook import saving
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.prototypes import ProtoNet
from metabook.saving import load, save
from metabook.sources import SOURCES

OURS = ["metabook", "bench", "tools", "docs", "tests"]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
INTERPRETERS = {"eval", "exec", "compile", "__import__", "runpy", "code", "codeop"}

# Where something is executed or pickled nevertheless, and why it may be.
ALLOWED = {
    ("tools/notebooks.py", "compile"),  # to see whether a cell is Python; it is not run
    ("tools/proofs.py", "compile"),  # the book's own tests, against mutations of its own code
    ("tools/proofs.py", "exec"),
    ("tests/system/test_cells_to_tests.py", "compile"),  # tests that the test itself has made
    ("tests/system/test_cells_to_tests.py", "exec"),
    ("tests/system/test_readme.py", "compile"),  # the examples of the README
    ("tests/system/test_readme.py", "exec"),
    ("tests/system/test_bad_data.py", "pickle"),  # makes a hostile file, which must be refused
}


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Every Python file below these folders: its path, and its syntax tree."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), parsed(path)


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def aliases(tree: ast.Module) -> dict[str, str]:
    """What the names that a file imports stand for, at any depth: "np" is "numpy"."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = [a.name if a.asname else a.name.partition(".")[0] for a in node.names]
            found |= {a.asname or top: top for a, top in zip(node.names, whole, strict=True)}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def imported(tree: ast.Module) -> set[str]:
    """The packages that a file imports."""
    return {name.partition(".")[0] for name in aliases(tree).values()}


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of what is called: "open", "numpy.load"; of what has none the end, ".extract"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST, known: dict[str, str]) -> list[tuple[str, ast.Call]]:
    """What is called, and how."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(dotted(call.func, known).removeprefix("builtins."), call) for call in found]


def literal(call: ast.Call, name: str) -> object:
    """The constant that a call is given by keyword, or nothing."""
    given = {k.arg: k.value for k in call.keywords}.get(name)
    return given.value if isinstance(given, ast.Constant) else None


def functions(*folders: str) -> Iterator[tuple[str, str, str, ast.Call]]:
    """Every call in a function: its file, the function, what is called, the call."""
    for path, tree in sources(*folders):
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef):
                for name, call in calls(f, aliases(tree)):
                    yield path, f.name, name, call


def unsafe(name: str, call: ast.Call) -> str | None:
    """The name of a call that executes what it is given, or what it reads."""
    if name in INTERPRETERS or name.startswith(("os.system", "os.popen", "os.exec", "os.spawn")):
        return name
    if name == "torch.load":
        return None if literal(call, "weights_only") is True else name
    if name == "numpy.load":
        return None if literal(call, "allow_pickle") is False else name
    if name.startswith(("torch.jit.load", "torch.hub.", "torch.package.", "yaml.")):
        return name
    return "shell=" if any(k.arg == "shell" for k in call.keywords) else None


def executed(tree: ast.Module) -> set[str]:
    """Where a file may execute what it has read."""
    found = {unsafe(*call) for call in calls(tree, aliases(tree))} - {None}
    return found | (imported(tree) & (UNPICKLERS | INTERPRETERS))


# --- nothing that is read is executed


def test_nothing_that_is_read_is_executed():
    found = {(path, what) for path, tree in sources(*OURS) for what in executed(tree)}
    assert found == ALLOWED


UNSAFE = [
    "import pickle",
    "from pickle import loads",
    "def f():\n    import dill.source",
    "eval(text)",
    "exec(text)",
    "__import__(name)",
    "import runpy",
    "os.system(text)",
    "subprocess.run(text, shell=True)",
    "subprocess.run(text, shell=asked)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=asked)",
    "torch.hub.load(name)",
    "import numpy as np\nnp.load(path)",
    "import numpy\nnumpy.load(path, allow_pickle=True)",
    "from numpy import load as array_of\narray_of(path)",
    "from torch import load\nload(path)",
    "def f():\n    from os import system\n    system(text)",
    "import builtins\nbuiltins.exec(text)",
    "yaml.load(text)",
]
SAFE = [
    "learner.eval()",
    "torch.compile(f)",
    "re.compile(text)",
    "torch.load(path, weights_only=True)",
    "import numpy as np\nnp.load(path, allow_pickle=False)",
    "subprocess.run([program, text])",
    "json.loads(text)",
]


@pytest.mark.parametrize("source", UNSAFE)
def test_what_would_be_executed_is_found(source):
    assert executed(ast.parse(source))


@pytest.mark.parametrize("source", SAFE)
def test_what_is_only_read_is_not(source):
    assert not executed(ast.parse(source))


def test_the_library_does_not_write_pickles_either():
    for path, tree in sources("metabook"):
        assert not {"torch.load", "torch.save"} & {n for n, _ in calls(tree, aliases(tree))}, path


# --- downloads and archives


def test_every_address_is_https_and_every_download_has_a_checksum():
    remotes = [remote for source in SOURCES.values() for remote in source.remotes]
    assert remotes
    for remote in remotes:
        assert remote.url.startswith("https://"), remote.url
        assert re.fullmatch(r"[0-9a-f]{32}", remote.md5), remote.url
    for path, tree in sources("metabook"):
        assert not re.search(r"\b(http|ftp)://", ast.unparse(tree)), path


def test_all_downloads_go_one_way():
    network = {"urllib", "http", "requests", "ftplib", "socket", "ssl", "httpx", "aiohttp"}
    for path, tree in sources("metabook"):
        assert not network & imported(tree), path
    fetched = [
        (path, function, ast.unparse(call.args[1]))
        for path, function, name, call in functions("metabook")
        if name.startswith("pooch.") and name != "pooch.os_cache"
    ]
    assert fetched == [("metabook/datasets.py", "_download", "f'md5:{remote.md5}'")]


def test_archives_are_opened_in_one_place_and_unpacked_by_ours():
    openers = "zipfile.ZipFile", "tarfile.open", "shutil.unpack_archive"
    found = {
        (path, function, name)
        for path, function, name, _ in functions("metabook")
        if name in openers or name.endswith((".extractall", ".extract"))
    }
    place = "metabook/datasets.py", "_entries"
    assert found == {(*place, "zipfile.ZipFile"), (*place, "tarfile.open")}
    users = {function for _, function, name, _ in functions("metabook") if name == "_entries"}
    assert users == {"members"}  # which test_bad_data.py attacks


# --- a trained folder that somebody hostile made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "hostile", ProtoNet(MLP([2, 3])))


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def with_weights(folder: Path, data: bytes) -> None:
    """Other parameters, with the right checksum: a stranger can compute it as well."""
    (folder / "learner.safetensors").write_bytes(data)
    rewrite(folder, lambda config: config.update(weights=saving.checksum(data)))


@pytest.mark.parametrize("name", ["os.system", "torch.nn.Linear", "__import__", "../../protonet"])
def test_a_folder_can_only_name_what_is_registered(folder, name):
    rewrite(folder, lambda c: c["method"]["args"].update(embed={"name": name, "args": {}}))
    with pytest.raises(ValueError, match="unknown network"):
        load(folder)
    rewrite(folder, lambda c: c["method"].update(name=name))
    with pytest.raises(ValueError, match="unknown method"):
        load(folder)


@pytest.mark.parametrize("args", [{"__class__": 1}, {"forward": "x"}, {"self": 1}, ["x"], None, 7])
def test_a_folder_can_only_give_arguments_that_the_constructor_takes(folder, args):
    rewrite(folder, lambda c: c["method"].update(args=args))
    with pytest.raises(ValueError, match=r"cannot be (loaded|built)"):
        load(folder)


@pytest.mark.parametrize("sizes", [[2, 10**30], [2, math.inf], [2, 3.5], [2, -1], [2], "ab", None])
def test_sizes_that_no_network_has_are_refused(folder, sizes):
    rewrite(folder, lambda c: c["method"]["args"]["embed"].update(args={"sizes": sizes}))
    with pytest.raises(ValueError, match="'mlp' cannot be built"):
        load(folder)


def test_a_network_that_the_file_does_not_hold_is_never_built(folder):
    sizes = [2, 10**7, 10**7]  # 400 TB
    rewrite(folder, lambda c: c["method"]["args"]["embed"].update(args={"sizes": sizes}))
    with pytest.raises(ValueError, match=r"config.json describes other parameters"):
        load(folder)


def test_what_is_no_file_is_not_read(folder):
    (folder / "learner.safetensors").unlink()
    (folder / "learner.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="it is no file"):
        load(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff" * 5000])
def test_a_configuration_that_is_nested_too_deep_or_binary(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="is not the configuration of a trained folder") as caught:
        load(folder)
    assert len(str(caught.value)) < 500


def header(claims: dict | bytes, data: bytes = b"") -> bytes:
    """A safetensors file: the length of its header, the header, the tensors."""
    text = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return struct.pack("<Q", len(text)) + text + data


def claim(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHT, BIAS = "embed.layers.0.weight", "embed.layers.0.bias"
LIES = {
    "no header": b"",
    "a header longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "a header that is no JSON": header(b"\x80\x04."),
    "more bytes than there are": header({WEIGHT: claim([3, 2], 24)}, bytes(4)),
    "a terabyte": header({WEIGHT: claim([2**38], 2**40)}, bytes(4)),
    "a shape larger than its bytes": header({WEIGHT: claim([2**40, 2**40], 24)}, bytes(24)),
    "an unknown type": header({WEIGHT: claim([3, 2], 24, "OBJECT")}, bytes(24)),
    "offsets from behind": header({WEIGHT: claim([3, 2], 0, start=24)}, bytes(24)),
    "the same bytes twice": header({WEIGHT: claim([3, 2], 24), BIAS: claim([3], 12)}, bytes(24)),
    "other names": header({"../../x": claim([3, 2], 24)}, bytes(24)),
    "other shapes": header({WEIGHT: claim([3], 12), BIAS: claim([3], 24, start=12)}, bytes(24)),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_parameters_that_lie_are_refused(folder, data):
    with_weights(folder, data)
    with pytest.raises(ValueError, match=r"cannot be loaded|does not hold the parameters"):
        load(folder)


def test_other_parameters_than_those_of_the_checksum_are_refused(folder, tmp_path):
    other = save(tmp_path / "other", MAML(MLP([2, 3])))
    (other / "learner.safetensors").replace(folder / "learner.safetensors")
    with pytest.raises(ValueError, match="checksum"):
        load(folder)


def test_nothing_is_written_where_a_folder_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    load(folder)
    assert sorted(tmp_path.rglob("*")) == before


# --- what is installed

LISTS = ["requirements", "dev_requirements", "bench_requirements"]
SETTINGS = (ROOT / "settings.ini").read_text(encoding="utf-8")
REASONS = "\n".join(line for line in SETTINGS.splitlines() if line.startswith("#"))


def requirements() -> list[Requirement]:
    """All three lists."""
    parser = ConfigParser(delimiters=["="])
    parser.read_string(SETTINGS)
    return [Requirement(word) for name in LISTS for word in parser["DEFAULT"][name].split()]


@pytest.mark.parametrize("asked", requirements(), ids=str)
def test_every_requirement_has_both_bounds_and_a_reason(asked):
    bounds = {s.operator: s.version for s in asked.specifier}
    assert set(bounds) in ({">=", "<"}, {"=="})
    if "<" in bounds:
        assert Version(bounds[">="]) < Version(bounds["<"])
    # The usual upper bound is the next major version, of a 0.x package the next minor one.
    usual = re.fullmatch(r"[1-9]\d*|0\.\d+", bounds.get("<", ""))
    assert usual or re.search(rf"\b{asked.name}\b", REASONS), "say in settings.ini why"


def test_the_bounds_admit_what_is_tested():
    for asked in requirements():
        with suppress(PackageNotFoundError):  # the peers come with `make bench`
            assert asked.specifier.contains(version(asked.name)), asked


def test_the_rule_of_the_bounds_is_written_down():
    assert "Upper bounds:" in REASONS and "Lower bounds:" in REASONS
