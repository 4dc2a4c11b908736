"""The readers of the library, each as a function of a folder to work in and of bytes."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fuzz import seeds
from fuzz.mutations import Mutation, changed_json
from metabook import datasets
from metabook.checkpoints import read_checkpoint
from metabook.cli import settings
from metabook.datasets import DataError
from metabook.reproduction import rows_in
from metabook.saving import checksum, load, read_config


@dataclass(frozen=True)
class Target:
    """A reader, what it is given at first, and how it may end."""

    read: Callable[[Path, bytes], Any]  # writes the bytes into the empty folder, and reads them
    seeds: Callable[[], list[bytes]]
    raises: tuple[type[Exception], ...] = (ValueError,)  # what its documentation says
    megabytes: int = 256  # of memory that it may take
    says: str | None = None  # stands in every such error; `None`: the folder
    mutate: Mutation | None = None  # besides those of bytes


def one_file(name: str, reader: Callable[[Path], Any]) -> Callable[[Path, bytes], None]:
    """The bytes are a file, and the reader takes its path."""

    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        reader(folder / name)

    return read


def json_and_tensors(
    text_name: str,
    tensors_name: str,
    reader: Callable[[Path], Any],
    seal: Callable[[bytes], bytes] = bytes,  # what else the text is wrapped into
) -> Callable[[Path, bytes], None]:
    """The bytes are two files, a zero byte between them, and the reader takes the folder.

    The first names the checksum of the second; it is made right, or nothing behind it would be reached.
    """

    def read(folder: Path, data: bytes) -> None:
        text, _, tensors = data.partition(b"\0")
        for name, content in (
            (text_name, seal(with_checksum(text, tensors))),
            (tensors_name, tensors),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        reader(folder)

    return read


def with_checksum(text: bytes, tensors: bytes) -> bytes:
    """A JSON object whose "weights", if it has any, is the checksum of these tensors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict) or not isinstance(value.get("weights"), str):
        return text
    return json.dumps(value | {"weights": checksum(tensors)}).encode()


def sealed(text: bytes) -> bytes:
    """As `write_checkpoint` wraps it: with a checksum of the text itself."""
    body = text.decode(errors="replace")
    return json.dumps({"checksum": checksum(body.encode()), "checkpoint": body}).encode()


# --- archives

MOST = 1 << 20  # bytes


def unpack(path: Path) -> None:
    """Read all files of an archive, within its bounds."""
    total = 0
    for _, content in datasets.members(path, most_bytes=MOST, most_files=100):
        total += len(content)
        assert total <= MOST


def unpack_tar(folder: Path, data: bytes) -> None:
    """The same of a tar, after each header's checksum was made right."""
    repaired = bytearray(data)
    for i in range(0, len(data) - 511, 512):
        header = data[i : i + 512]
        if header[257:262] == b"ustar":
            total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            repaired[i + 148 : i + 156] = b"%06o\0 " % total
    (folder / "a.tar").write_bytes(repaired)
    unpack(folder / "a.tar")


# --- data sets as published, but smaller


def read_omniglot(folder: Path, data: bytes) -> None:
    """One character; the archive holds what `seeds.omniglot` lists: names and contents."""
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        for entry in data.split(seeds.BETWEEN):
            name, _, content = entry.partition(b"\n")
            archive.writestr(zipfile.ZipInfo(name.decode("latin-1") or "a"), content)
    (folder / "a.zip").write_bytes(packed.getvalue())
    with mock.patch.object(datasets, "OMNIGLOT", seeds.CHARACTERS):
        datasets._omniglot_drawings([folder / "a.zip"], 2)


def read_cifar(folder: Path, data: bytes) -> None:
    """One picture of each class in each file; given are both lists of names and all rows' labels."""
    fine, coarse, labels = data.split(b"\0", 2) if data.count(b"\0") > 1 else (data, b"", b"")
    rows, rest = np.frombuffer(labels, np.uint8), len(labels) % 2
    rows = np.pad(rows[: len(rows) - rest].reshape(-1, 2), ((0, 0), (0, 3072))).tobytes()
    place = folder / "cifar-100-binary"
    place.mkdir()
    (place / "fine_label_names.txt").write_bytes(fine)
    (place / "coarse_label_names.txt").write_bytes(coarse)
    (place / "train.bin").write_bytes(rows[: 100 * 3074])
    (place / "test.bin").write_bytes(rows[100 * 3074 :] + bytes(rest))
    with mock.patch.object(datasets, "_CIFAR_IMAGES", {"train.bin": 1, "test.bin": 1}):
        datasets.CIFARFS("val", root=folder)
        datasets.FC100("val", root=folder)


def read_mini(folder: Path, data: bytes) -> None:
    """Two classes and one picture; given is a list of pictures."""
    place = folder / "mini-imagenet"
    (place / "images").mkdir(parents=True)
    (place / "images" / "0.png").write_bytes(seeds.picture("PNG"))
    for split in datasets.SPLITS:
        (place / f"{split}.csv").write_bytes(data)
    with mock.patch.dict(datasets._MINI, val=2):
        datasets.MiniImageNet("val", size=4, root=folder)


def read_own_images(folder: Path, data: bytes) -> None:
    """A folder of one class and one image, whatever its format."""
    (folder / "class").mkdir()
    (folder / "class" / "image.png").write_bytes(data)
    for channels in (3, 1):
        datasets.from_folder(folder, size=4, channels=channels)


def read_kept(folder: Path, data: bytes) -> None:
    """An array kept beside the data: if its file is broken, it is made again."""
    made = np.arange(6, dtype=np.uint8)
    datasets._cached("kept", "key", lambda: made, folder)
    (file,) = (folder / "arrays").iterdir()
    file.write_bytes(data)
    assert isinstance(datasets._cached("kept", "key", lambda: made, folder), np.ndarray)


def read_results(path: Path) -> None:
    """Rows, each of which says how it was made."""
    for row in rows_in(path):
        row["budget"], row["seed"]


def read_settings(folder: Path, data: bytes) -> None:
    """What somebody typed, one word behind another."""
    settings(data.decode(errors="surrogateescape").split("\0"), "--set")


TARGETS = {
    "config": Target(
        one_file("config.json", lambda path: read_config(path.parent)),
        seeds.configs,
        mutate=changed_json,
    ),
    "folder": Target(
        json_and_tensors("config.json", "learner.safetensors", load),
        seeds.folders,
        mutate=changed_json,
    ),
    "checkpoint": Target(
        json_and_tensors(
            "step-1.json",
            "step-1.safetensors",
            lambda folder: read_checkpoint(folder / "step-1.json"),
            sealed,
        ),
        seeds.checkpoints,
        mutate=changed_json,
    ),
    "settings": Target(read_settings, seeds.typed, says="--set"),
    "results": Target(one_file("row.json", read_results), seeds.results, mutate=changed_json),
    "zip": Target(one_file("a.zip", unpack), seeds.zips, (DataError,)),
    "tar": Target(unpack_tar, seeds.tars, (DataError,)),
    "omniglot": Target(read_omniglot, seeds.omniglot, (DataError,)),
    "cifar": Target(read_cifar, seeds.cifar, (DataError,)),
    "mini": Target(read_mini, seeds.lists, (DataError,)),
    "images": Target(read_own_images, seeds.images, (DataError,), megabytes=2048),
    "kept": Target(read_kept, seeds.arrays, ()),
}
