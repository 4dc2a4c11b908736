"""The readers of files survive what a fuzzer found, and a few random changes of what is valid."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from random import Random

import pytest
from notebooks import ROOT

sys.path.insert(0, str(ROOT))

from fuzz import seeds
from fuzz.mutations import BLIND
from fuzz.survive import Failure, TooLong, bounded, survive
from fuzz.targets import TARGETS

# --- what was found


def packed_zeros(megabytes: int) -> bytes:
    """So many zeros, as a deflated stream of a thousandth of their length."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * megabytes + packer.flush()


def zip_that_lies() -> bytes:
    """A file of 400 megabytes that says it has ten bytes."""
    honest = seeds.zipped({"a": bytes(10)}, method=zipfile.ZIP_DEFLATED)
    content, packed = zlib.compress(bytes(10), wbits=-15), packed_zeros(400)
    start, end = honest.index(content), honest.index(b"PK\1\2")
    assert honest[start + len(content) : end] == b""
    sizes = (struct.pack("<I", len(content)), struct.pack("<I", len(packed)))
    head, middle, tail = honest[:start], honest[end:-22], honest[-22:]
    moved = struct.pack("<II", len(middle), len(head) + len(packed))
    return head.replace(*sizes) + packed + middle.replace(*sizes) + tail[:12] + moved + tail[20:]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_of_a_long_name() -> bytes:
    """The name of a file has 400 megabytes."""
    zeros = gzip.compress(bytes(1 << 20))
    return gzip.compress(header("a", 400 << 20, tarfile.GNUTYPE_LONGNAME)) + zeros * 401


def tar_that_goes_back() -> bytes:
    """After the second file comes the second file again, for the third has less than no bytes."""
    second = header("b", 600 << 10) + bytes(600 << 10)
    return header("a", 0) + second + header("c", -len(second) - 512) + bytes(1024)


DRAWINGS, (NAMES, GROUPS, LABELS) = seeds.omniglot()[0], seeds.cifar()[0].split(b"\0", 2)
ONE_GROUP = b"".join(b"\0" + LABELS[i : i + 1] for i in range(1, 400, 2))


# Random changes found the first four; the others were found by reading on from there.
def tensors(dtype: str, shape: list[int]) -> bytes:
    """A trained folder with a tensor that torch does not know."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    head = json.dumps({"a": entry}).encode()
    return seeds.configs()[0] + b"\0" + struct.pack("<Q", len(head)) + head


CASES: dict[str, tuple[str, bytes]] = {
    "numbers of four bits": ("folder", tensors("F4", [0])),
    "a shape beyond all": ("folder", tensors("F32", [2**63, 0])),
    "a deep configuration": ("config", b"[" * 100_000),
    "a layout that is a list": (
        "config",
        seeds.configs()[0].replace(b'"layout": 2', b'"layout": [2]'),
    ),
    "no results at all": ("results", b""),
    "results in another encoding": ("results", b'{"rows": ["\xf5"]}'),
    "a list in another encoding": (
        "mini",
        base64.b64decode("ZmlsZW5hbWUPbWUPAACxAAAAAAAucG5nLG4xCjAucG4yCg=="),
    ),
    "names of classes in another encoding": ("cifar", b"apple\xff\0" + GROUPS + b"\0" + LABELS),
    "a long name in a tar": ("tar", tar_of_a_long_name()),
    "a tar that goes back": ("tar", tar_that_goes_back()),
    "a zip that lies": ("zip", zip_that_lies()),
    "results of another kind": ("results", b'{"rows": [1]}'),
    "results without a seed": ("results", b'{"rows": [{"budget": "cpu"}]}'),
    "deep results": ("results", b"[" * 100_000),
    "a picture without a class": ("mini", b"filename,label\n0.png,n1\n0.png\n"),
    "a long line": ("mini", b"filename,label\n" + b"x" * 200_000),
    "a picture elsewhere": ("mini", b"filename,label\n0.png,n1\n/0.png,n2\n"),
    "a file outside the folders": ("omniglot", DRAWINGS + seeds.BETWEEN + b"README\n"),
    "superclasses without classes": ("cifar", b"\0".join([NAMES, GROUPS, ONE_GROUP])),
}


@pytest.mark.parametrize(("name", "data"), CASES.values(), ids=CASES)
def test_what_was_found_is_survived(name: str, data: bytes) -> None:
    survive(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_seeds_are_survived(name: str) -> None:
    target, rng = TARGETS[name], Random(0)
    mutations = BLIND + ([target.mutate] if target.mutate else [])
    for seed in target.seeds():
        for mutation in mutations:
            survive(name, mutation(seed, rng))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_to_their_end(name: str, tmp_path: Path) -> None:
    """Or a target would say nothing of what stands behind the first error."""
    for i, seed in enumerate(TARGETS[name].seeds()):
        (folder := tmp_path / str(i)).mkdir()
        TARGETS[name].read(folder, seed)


# --- a target can fail


def test_time_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.survive.SECONDS", 0.1)
    with pytest.raises(TooLong), bounded("x", tmp_path):
        while True:
            pass


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="told by Linux only")
def test_memory_has_a_bound(tmp_path: Path) -> None:
    """In a process of its own: one that has trained may have freed memory left for it."""
    greedy = (
        "import pathlib, sys; from fuzz.survive import bounded\n"
        "with bounded('x', pathlib.Path(sys.argv[1]), megabytes=50):\n"
        "    assert b'x' * (300 << 20)"
    )
    words = [sys.executable, "-c", greedy, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "MiB of memory, more than 50" in done.stderr


def test_writing_elsewhere_is_seen(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with bounded("x", inside):
        (inside / "file").write_text("as it should be")
    for escape in (
        lambda: (inside / ".." / "file").write_text("outside"),
        lambda: (inside / "file").rename(tmp_path / "moved"),
        lambda: subprocess.run([sys.executable, "-V"], capture_output=True),
    ):
        with pytest.raises(Failure, match="x: "), bounded("x", inside):
            escape()


def test_other_errors_and_errors_that_name_no_file_are_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(folder: Path, data: bytes) -> None:
        raise KeyError("a") if data else ValueError("something is wrong")

    monkeypatch.setitem(TARGETS, "x", type(TARGETS["config"])(read, list))
    with pytest.raises(KeyError):
        survive("x", b"a")
    with pytest.raises(Failure, match="does not say where"):
        survive("x", b"")
