"""Where tests run, and in which state each of them starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import pytest
import torch
from fresh import start_afresh
from jaxtyping import install_import_hook
from laid_out import missing

# From here on every call of the library is held against the shapes and types of its signature.
install_import_hook("metabook", "beartype.beartype")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

MARKS = {
    "slow": "takes more than a few seconds",
    "cuda": "needs a CUDA device",
    "data(name)": "needs real data in the folder METABOOK_DATA",
    "proves(*equations)": "checks numbered equations of the book",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ["auto", "cpu", "cuda", "both"]
    parser.addoption(
        "--device", default="auto", choices=choices, help="where tests with a device run"
    )


def devices(config: pytest.Config) -> list[str]:
    """The devices that `--device` asks for; `auto` takes every one that there is."""
    asked = config.getoption("--device")
    if asked == "auto":
        asked = "both" if torch.cuda.is_available() else "cpu"
    return ["cpu", "cuda"] if asked == "both" else [asked]


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        # pytest-xdist 3.8 writes groups there: without them each worker would make every expensive setup, and pass.
        raise pytest.UsageError(
            f"pytest {pytest.__version__} does not let tests be grouped: install pytest<9.2"
        )
    if "cuda" in devices(config) and not torch.cuda.is_available():
        asked = config.getoption("--device")
        raise pytest.UsageError(f"--device {asked}: torch finds no CUDA device here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        only_cuda = metafunc.definition.get_closest_marker("cuda")
        where = ["cuda"] if only_cuda else devices(metafunc.config)
        metafunc.parametrize("device", where, indirect=True, scope="session")


def missing_data(name: str) -> str | None:
    """Why a test that needs a data set cannot run; None if it can."""
    try:
        return missing(name)
    except KeyError as error:
        raise pytest.UsageError(error.args[0]) from None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and "cuda" not in devices(config):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for mark in item.iter_markers("data"):
            if reason := missing_data(mark.args[0]):
                item.add_marker(pytest.mark.skip(reason=reason))
        if any(name.startswith("once_") for name in getattr(item, "fixturenames", [])):
            # Under `--dist loadgroup` tests that share an expensive setup share a worker.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    if fixturedef.argname.startswith("once_"):  # whichever test asks for it first
        start_afresh()


def registries() -> list[dict[str, type]]:
    """Of methods and networks, as soon as somebody has imported them."""
    module = sys.modules.get("metabook.registry")
    return [module.METHODS, module.NETWORKS] if module else [{}, {}]


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    start_afresh()
    before = [set(registry) for registry in registries()]
    yield
    for registry, known in zip(registries(), before, strict=True):  # a test's classes are its own
        for name in registry.keys() - known:
            if not registry[name].__module__.startswith("metabook."):
                del registry[name]
    torch.set_default_dtype(torch.float32)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
