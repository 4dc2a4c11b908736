"""Small valid files, from which a fuzzer starts."""

from __future__ import annotations

import inspect
import io
import json
import tarfile
import zipfile
from functools import cache
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import nn

from metabook import datasets
from metabook.checkpoints import write_checkpoint
from metabook.networks import MLP, Conv4
from metabook.registry import methods
from metabook.saving import load, save

# --- trained folders


@cache
def folders() -> list[bytes]:
    """A trained folder of every method: config.json, a zero byte, learner.safetensors."""
    torch.manual_seed(0)
    made = []
    for _, method in sorted(methods().items()):
        takes = inspect.signature(method).parameters
        how = {"hidden": 2} if "hidden" in takes else {}
        how |= {"relation": MLP([4, 2, 1])} if "relation" in takes else {}
        made.append(method(MLP([2, 3, 2]), **how))
    made.append(methods()["protonet"](Conv4(size=16, width=1, stats="running")))
    return [two_files(learner) for learner in made]


def two_files(learner: nn.Module) -> bytes:
    """What a learner is saved as; it is also loaded, so that nothing is imported later."""
    with TemporaryDirectory() as name:
        folder = save(name, learner)
        load(folder)
        files = (folder / "config.json", folder / "learner.safetensors")
        return b"\0".join(file.read_bytes() for file in files)


def checkpoints() -> list[bytes]:
    """A state of a run: its text without the seal, a zero byte, its tensors."""
    state = {
        "step": 3,
        "rows": [[1, None], {"a": "b"}],
        "x": torch.zeros(2),
        "y": {0: torch.ones(1)},
    }
    with TemporaryDirectory() as name:
        path = write_checkpoint(name, 3, state)
        text = json.loads(path.read_bytes())["checkpoint"].encode()
        return [text + b"\0" + path.with_suffix(".safetensors").read_bytes()]


def configs() -> list[bytes]:
    """What a trained folder says of itself."""
    return [folder.partition(b"\0")[0] for folder in folders()]


def typed() -> list[bytes]:
    """Arguments of a command, a zero byte between them."""
    return [b"lr=0.4\0first_order=True\0net=null", b"sizes=[1, [2]]", b"form=film", b'a={"b": "="}']


def results() -> list[bytes]:
    """Files of results."""
    row = {"budget": "cpu", "seed": 0, "joint": {"mean": 0.5, "ci95": 0.1, "n": 600}}
    return [
        json.dumps({"name": "x", "published": None, "rows": rows}).encode() for rows in ([], [row])
    ]


# --- archives


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(packed := io.BytesIO(), "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return packed.getvalue()


def zips() -> list[bytes]:
    """Archives packed in four ways."""
    entries = {"a/": b"", "a/b.txt": b"some text " * 5, "c": b"", "é": bytes(2000)}
    return [zipped(entries, method) for method in (0, 8, 12, 14)]


def tarred(mode: str, format: int) -> bytes:
    """A folder, two files, a long name."""
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode=mode, format=format) as archive:
        for name, content in {
            "a": None,
            "a/b": b"text",
            "c" * 60 + "/" + "d" * 60: b"",
            "é": bytes(600),
        }.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return packed.getvalue()


def tars() -> list[bytes]:
    """Archives in three formats, plain and packed."""
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return [tarred("w", f)[:6144] for f in formats] + [tarred(f"w:{p}", 1) for p in ("gz", "xz")]


# --- data sets

BETWEEN = b"\n--\n"  # two files
CHARACTERS = ["A/character01"]


def picture(kind: str, mode: str = "RGB", size: int = 5, **how: object) -> bytes:
    """An image in some format."""
    image = Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3))
    (image if mode == "RGB" else image.convert("L").convert(mode)).save(
        packed := io.BytesIO(), kind, **how
    )
    return packed.getvalue()


def images() -> list[bytes]:
    """Images of many formats, depths and kinds of transparency."""
    kinds = ("BMP", "DDS", "GIF", "ICO", "IM", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI")
    plain = [picture(kind) for kind in (*kinds, "TGA", "TIFF", "WEBP")]
    others = [picture("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    packed = [picture("TIFF", compression=way) for way in ("tiff_lzw", "tiff_deflate", "packbits")]
    see_through = [picture("GIF", "P", transparency=1), picture("PNG", "P", transparency=1)]
    turned = Image.Exif()
    turned[0x0112] = 6
    return plain + others + packed + see_through + [picture("JPEG", exif=turned)]


def omniglot() -> list[bytes]:
    """Names and contents of an archive: twenty drawings of one character."""
    Image.new("1", (105, 105), 1).save(drawing := io.BytesIO(), "PNG")
    folder = f"images_background/{CHARACTERS[0]}"
    entries = [f"{folder}/0001_{i:02d}.png\n".encode() + drawing.getvalue() for i in range(20)]
    return [BETWEEN.join(entries), BETWEEN.join([*entries, b"images_background/\n"])]


def cifar() -> list[bytes]:
    """Names of classes, names of superclasses, and two labels for each of 200 pictures."""
    fine = sorted(" ".join(datasets._CIFAR_FS.values()).split())
    coarse = sorted(" ".join(datasets._FC100.values()).split())
    labels = bytes(b for i in range(200) for b in (i % 100 // 5, i % 100))
    return [b"\0".join(["\n".join(fine).encode(), "\n".join(coarse).encode(), labels])]


def lists() -> list[bytes]:
    """Lists of pictures and their classes."""
    plain = b"filename,label\r\n0.png,n1\r\n0.png,n2\r\n"
    return [plain, plain.replace(b"\r", b""), b'label,filename\n"n\n1","0.png"\nn2,./0.png\n']


def arrays() -> list[bytes]:
    """Kept arrays, packed and not."""
    files = [io.BytesIO(), io.BytesIO()]
    for keep, file in zip((np.savez, np.savez_compressed), files, strict=True):
        keep(file, x=np.arange(6, dtype=np.uint8))
    return [file.getvalue() for file in files]
