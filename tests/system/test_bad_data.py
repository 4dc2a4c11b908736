"""Bad data: each kind of it is refused with an error that names the thing and the way out."""

from __future__ import annotations

import csv
import hashlib
import io
import pickle
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metabook import datasets, sources
from metabook.datasets import DataError

# --- archives


def zipped(*names: str, content: bytes = b"content", mode: int = 0, method: int = 8) -> bytes:
    """A zip archive of files with these names."""
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        for name in names:
            info = zipfile.ZipInfo()
            info.filename = name  # as it is: the constructor would mend it
            info.external_attr = mode << 16
            archive.writestr(info, content, method)
    return packed.getvalue()


def tarred(*names: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A packed tar archive of members with these names."""
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 7 * (kind == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(b"content"))
    return packed.getvalue()


SYMLINK = 0o120777
UNSAFE = {
    "zip that climbs": ("a.zip", zipped("good", "../../evil"), "'../../evil' would leave"),
    "zip that climbs in the middle": ("a.zip", zipped("x/../../evil"), "would leave"),
    "zip with an absolute path": ("a.zip", zipped("/etc/evil"), "'/etc/evil' would leave"),
    "zip with a drive": ("a.zip", zipped("C:\\evil"), "would leave"),
    "zip with backslashes": ("a.zip", zipped("..\\evil"), "would leave"),
    "zip with a link": ("a.zip", zipped("a link", mode=SYMLINK), "'a link' is a link or a device"),
    "tar that climbs": ("a.tar.gz", tarred("../evil"), "'../evil' would leave"),
    "tar with an absolute path": ("a.tar.gz", tarred("/etc/evil"), "would leave"),
    "tar with a soft link": (
        "a.tar.gz",
        tarred("a link", kind=tarfile.SYMTYPE, link="/etc"),
        "'a link' is a link",
    ),
    "tar with a hard link": (
        "a.tar.gz",
        tarred("a link", kind=tarfile.LNKTYPE, link="x"),
        "'a link' is a link",
    ),
    "tar with a device": ("a.tar.gz", tarred("null", kind=tarfile.CHRTYPE), "'null' is a link or"),
    "zip bomb": ("a.zip", zipped("big", content=bytes(3 << 20)), "more than 2,097,152 bytes"),
    "many small files": ("a.zip", zipped(*map(str, range(60))), "or 50 files"),
}
BROKEN = {
    "no zip at all": ("a.zip", b"<html>404</html>" * 50),
    "empty zip": ("a.zip", b""),
    "zip cut short": ("a.zip", zipped("a", "b")[:-40]),
    "zip cut in half": ("a.zip", zipped("a", content=bytes(range(256)) * 99)[:200]),
    "zip with a wrong byte": ("a.zip", zipped("a", method=0).replace(b"content", b"contend")),
    "no tar at all": ("a.tar.gz", b"<html>404</html>" * 50),
    "tar cut short": ("a.tar.gz", tarred("a", "b")[:-40]),
}


def read_all(path: Path) -> dict[str, bytes]:
    return dict(datasets.members(path, most_bytes=2 << 20, most_files=50))


@pytest.mark.parametrize(("name", "content", "words"), UNSAFE.values(), ids=UNSAFE)
def test_unsafe_archives(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)
    assert "Do not use it" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing was written


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_broken_archives(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"damaged or cut short.*Delete it") as caught:
        read_all(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path, name: str) -> None:
    whole = zipped("a", "b", content=b"some text " * 9) if name == "a.zip" else tarred("a", "b")
    (tmp_path / name).write_bytes(whole)
    right, chance = read_all(tmp_path / name), random.Random(0)
    for _ in range(300):
        bad = bytearray(whole)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        (tmp_path / name).write_bytes(bad)
        try:
            found = read_all(tmp_path / name)
        except DataError:
            continue
        assert set(found.values()) <= set(right.values())


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.zip is damaged or cut short \(.*No such file"):
        read_all(tmp_path / "gone.zip")


# --- folders of one's own images


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(packed := io.BytesIO(), "PNG")
    return packed.getvalue()


def huge() -> bytes:
    """A small file of many pixels."""
    Image.new("1", (14_000, 14_000)).save(packed := io.BytesIO(), "PNG")
    return packed.getvalue()


def deep() -> bytes:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(packed := io.BytesIO(), "TIFF")
    return packed.getvalue()


IMAGES = {
    "zero bytes": ("none.png", lambda: b"", "none.png (cannot identify image file"),
    "text": ("text.png", lambda: b"I am a text", "text.png (cannot identify image file"),
    "cut short": ("half.png", lambda: png((64, 64))[:5000], "half.png (image file is truncated"),
    "a web page": ("page.jpg", lambda: b"<html>", "page.jpg (cannot identify"),
    "a bomb": ("bomb.png", huge, "decompression bomb"),
    "deep": ("deep.tif", deep, "deep.tif (32 bits a pixel"),
    "another program's": ("a.gif", lambda: b"%!PS-Adobe-3.0 EPSF-3.0", "a.gif (cannot identify"),
    "an odd name": ("naïve \n'x'.png", lambda: b"", "naïve"),
}


def folder_of(tmp_path: Path) -> Path:
    """A folder with one good class of two images, and nothing wrong yet."""
    good = tmp_path / "images" / "good"
    good.mkdir(parents=True)
    for i in range(2):
        (good / f"{i}.png").write_bytes(png())
    return good.parent


@pytest.mark.parametrize(("name", "make", "words"), IMAGES.values(), ids=IMAGES)
def test_unreadable_images_are_named(
    tmp_path: Path, name: str, make: Callable[[], bytes], words: str
) -> None:
    folder = folder_of(tmp_path)
    (folder / "good" / name).write_bytes(make())
    with pytest.raises(DataError, match=r"1 of 3 images in .* cannot be read") as caught:
        datasets.from_folder(folder, size=8)
    assert words in str(caught.value) and str(folder) in str(caught.value)
    assert "Repair them or take them away" in str(caught.value)


def test_many_unreadable_images_are_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for i in range(20):
        (folder / "good" / f"bad{i:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"20 of 22 .*bad00.*bad04.*; \.\.\.") as caught:
        datasets.from_folder(folder, size=8)
    assert "bad05" not in str(caught.value)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "good" / "inside.png").symlink_to(folder / "good" / "0.png")
    assert datasets.from_folder(folder, size=8).sizes.tolist() == [3]
    (folder / "good" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"link\.png \(a link that leaves the folder\)"):
        datasets.from_folder(folder, size=8)


def test_linked_classes_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.png").write_bytes(png())
    (folder / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match=r"linked/0\.png \(a link that leaves the folder\)"):
        datasets.from_folder(folder, size=8)


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "good" / "gone.png").symlink_to(folder / "good" / "nothing.png")
    with pytest.raises(DataError, match=r"gone\.png \(.*No such file"):
        datasets.from_folder(folder, size=8)


def test_folders_without_classes_or_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing is no folder; give one"):
        datasets.from_folder(tmp_path / "missing")
    with pytest.raises(DataError, match="holds no folders; put the images of each class into one"):
        datasets.from_folder(tmp_path)
    folder = folder_of(tmp_path)
    for name in ("empty", "nested"):
        (folder / name / "deeper").mkdir(parents=True)
    (folder / "nested" / "deeper" / "0.png").write_bytes(png())
    with pytest.raises(DataError, match=r"2 of 3 classes in .* empty, nested. Add images or take"):
        datasets.from_folder(folder)


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", ".0.png", "drawing.eps", "README"):
        (folder / "good" / name).write_bytes(b"no image")
    (folder / ".git").mkdir()
    (folder / "good" / "9.PNG").write_bytes(png())
    data = datasets.from_folder(folder, size=8)
    assert data.names == ["good"] and data.sizes.tolist() == [3]


# --- data sets that are not what their name says


def omniglot_in(root: Path, content: bytes, leave_out: str = "", size: int = 105) -> None:
    """Archives in the layout of Omniglot; every drawing has the same content."""
    Image.new("1", (size, size), 1).save(plain := io.BytesIO(), "PNG")
    (root / "omniglot").mkdir()
    for part, names in (
        ("background", datasets.OMNIGLOT[:2]),
        ("evaluation", datasets.OMNIGLOT[2:]),
    ):
        with zipfile.ZipFile(root / "omniglot" / f"images_{part}.zip", "w") as archive:
            for name in names:
                for i in range(20):
                    file = f"images_{part}/{name}/0001_{i + 1:02d}.png"
                    if file != leave_out:
                        archive.writestr(file, content or plain.getvalue())


FIRST = "images_background/Alphabet_of_the_Magi/character01/0001_07.png"
OMNIGLOTS = {
    "a drawing is missing": ({"leave_out": FIRST}, "character01 (19 drawings)"),
    "drawings of another size": ({"size": 28}, "28 x 28 pixels, expected 105 x 105"),
    "no drawings": ({"content": b"no png"}, "0001_01.png (cannot identify image file"),
}


@pytest.mark.parametrize(("how", "words"), OMNIGLOTS.values(), ids=OMNIGLOTS)
def test_wrong_omniglot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict, words: str
) -> None:
    monkeypatch.setattr(datasets, "OMNIGLOT", datasets.OMNIGLOT[:3])
    omniglot_in(tmp_path, **{"content": b""} | how)
    with pytest.raises(DataError, match=r"are not Omniglot as published.*Delete them") as caught:
        datasets.Omniglot("test", size=2, root=tmp_path)
    assert words in str(caught.value) and "images_background.zip" in str(caught.value)
    assert not list(tmp_path.rglob("*.npz"))  # and nothing of it is kept


def test_check_reads_the_archives_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "OMNIGLOT", datasets.OMNIGLOT[:3])
    kept = replace(sources.SOURCES["omniglot"], load=datasets.Glyphs)  # as if from kept arrays
    monkeypatch.setitem(sources.SOURCES, "omniglot", kept)
    omniglot_in(tmp_path, b"any content")
    assert sources.check("omniglot", tmp_path)["val"]["classes"] == 195
    archive = tmp_path / "omniglot" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes().replace(b"any content", b"bad content", 1))
    with pytest.raises(DataError, match=r"images_evaluation\.zip is damaged"):
        sources.check("omniglot", tmp_path)


def cifar_in(root: Path) -> Path:
    """Files in the layout of CIFAR-100, all pictures black."""
    folder = root / "cifar-100-binary"
    folder.mkdir()
    for file, each in (("train.bin", 500), ("test.bin", 100)):
        rows = np.zeros((100 * each, 3074), np.uint8)
        rows[:, 1] = np.repeat(np.arange(100), each)
        rows.tofile(folder / file)
    (folder / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    (folder / "coarse_label_names.txt").write_text("\n".join(f"group{i}" for i in range(20)))
    return folder


def test_wrong_cifar(tmp_path: Path) -> None:
    folder = cifar_in(tmp_path)
    with pytest.raises(DataError, match=r"is not CIFAR-100 as published.*Delete the folder"):
        datasets.FC100("test", root=tmp_path)  # no class of that name
    with open(folder / "test.bin", "r+b") as file:
        file.truncate(30_739_999)
    with pytest.raises(DataError, match=r"test\.bin has 30,739,999 bytes, expected 30,740,000"):
        datasets.CIFARFS("val", root=tmp_path)
    (folder / "test.bin").unlink()
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(tarred("cifar-100-binary/train.bin"))
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz does not hold .*test\.bin"):
        datasets.CIFARFS("val", root=tmp_path)


def mini_in(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "0.jpg") -> Path:
    """mini-ImageNet with two classes of one picture each."""
    monkeypatch.setitem(datasets._MINI, "val", 2)
    folder = root / "mini-imagenet"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (100, 90), "green").save(folder / "images" / "0.jpg")
    for split in datasets.SPLITS:
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), (name, "n2"), ("0.jpg", "n1")])
    return folder


def test_mini_imagenet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mini_in(tmp_path, monkeypatch)
    for _ in range(2):  # the second time from the kept array
        data = datasets.MiniImageNet("val", root=tmp_path)
        assert data.names == ["n1", "n2"] and data.x.shape == (2, 3, 84, 84)
        assert data.x[:, 1].float().mean() == pytest.approx(128, abs=2)


def test_wrong_mini_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mini_in(tmp_path, monkeypatch, name="../../outside.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.jpg")
    with pytest.raises(DataError, match="a link that leaves the folder"):
        datasets.MiniImageNet("val", root=tmp_path)
    with pytest.raises(DataError, match=r"train.csv lists 2 classes.*expected 64 classes of 600"):
        datasets.MiniImageNet("train", root=tmp_path)
    (folder / "val.csv").unlink()
    with pytest.raises(DataError, match=r"Put val\.csv into .*mini-imagenet"):
        datasets.MiniImageNet("val", root=tmp_path)


def test_other_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets._GLYPH_PRINTS, "val", "0123456789abcdef")
    with pytest.raises(DataError, match=r"fonts of matplotlib .* draw other .*Install matplotlib"):
        datasets.Glyphs("val", root=tmp_path)


# --- downloads

CONTENT = zipped("some/file")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address on this machine that serves `CONTENT` as /good.zip, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/good.zip" else 404)
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def remote(url: str, md5: str = hashlib.md5(CONTENT).hexdigest()) -> datasets.Remote:
    return datasets.Remote(url, md5, "set/good.zip")


def test_a_download_arrives_whole(tmp_path: Path, server: str) -> None:
    path = datasets.obtain(remote(f"{server}/good.zip"), tmp_path)
    assert path == tmp_path / "set" / "good.zip" and path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["good.zip"]
    path.write_bytes(b"mine")  # what is there already is taken as it is
    assert datasets.obtain(remote("http://127.0.0.1:9/"), tmp_path).read_bytes() == b"mine"


def test_an_archive_is_unpacked_where_files_are_missing(tmp_path: Path, server: str) -> None:
    parts = replace(remote(f"{server}/good.zip"), gives=("some/file",))
    datasets.obtain(parts, tmp_path)
    assert (tmp_path / "set" / "some" / "file").read_bytes() == b"content"
    (tmp_path / "set" / "good.zip").unlink()
    datasets.obtain(parts, tmp_path)  # its files are there: nothing to fetch


@pytest.mark.parametrize(
    ("path", "md5", "words"),
    [
        ("/good.zip", "0" * 32, "gave another file than expected, and it was thrown away"),
        ("/missing.zip", "0" * 32, "could not fetch"),
    ],
    ids=["wrong checksum", "not found"],
)
def test_downloads_that_fail(tmp_path: Path, server: str, path: str, md5: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        datasets.obtain(remote(server + path, md5), tmp_path)
    assert server + path in str(caught.value)
    assert f"put it at {tmp_path / 'set' / 'good.zip'}" in str(caught.value)
    assert not list((tmp_path / "set").iterdir())  # nothing is left behind


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    near = partial(replace, url="http://127.0.0.1:9/closed.zip")
    monkeypatch.setattr(datasets, "OMNIGLOT_FILES", tuple(map(near, datasets.OMNIGLOT_FILES)))
    with pytest.raises(DataError, match=r"could not fetch http://127.0.0.1:9/closed.zip") as caught:
        datasets.Omniglot("test", root=tmp_path)
    where = tmp_path / "omniglot" / "images_background.zip"
    assert f"Fetch it by hand and put it at {where}, or set METABOOK_DATA" in str(caught.value)


# --- folders that cannot be written, and arrays that have gone bad


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")  # no folder can be made below it, not even by root
    shut = tmp_path / "file" / "data"
    with pytest.raises(DataError, match=r"could not fetch .*set METABOOK_DATA to a folder"):
        datasets.Omniglot("test", root=shut)
    monkeypatch.setattr(datasets, "_user_cache", lambda: tmp_path / "cache")
    x = datasets._cached("x", 1, lambda: np.arange(3), shut)
    assert x.tolist() == [0, 1, 2] and len(list((tmp_path / "cache" / "arrays").iterdir())) == 1
    monkeypatch.setattr(datasets, "_user_cache", lambda: shut)
    assert datasets._cached("x", 2, lambda: np.arange(3), shut).tolist() == [0, 1, 2]


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("evil was here"),)


SPOILT = {
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[:-100],
    "another format": lambda whole: b"\x93NUMPY" + whole,
    "zeros": lambda whole: bytes(len(whole)),
    "a pickle": lambda whole: pickle.dumps(Evil()),
    "no array of that name": lambda whole: zipped("y.npy"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_arrays_that_have_gone_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "_user_cache", lambda: tmp_path / "none")
    make = partial(np.arange, 3)
    datasets._cached("x", 1, make, tmp_path)
    (kept,) = (tmp_path / "arrays").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(spoil(whole))
    assert datasets._cached("x", 1, make, tmp_path).tolist() == [0, 1, 2]
    assert kept.read_bytes() == whole and not (tmp_path / "evil was here").exists()
