"""Every odd file that a folder may hold is read right or counted, and none of them stops a run by itself."""

import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import Images
from ssd.data.pictures import BrokenPicture, decode
from ssd.data.sources import open_source
from ssd.errors import UserError
from ssd.views.recipes import DINOViews
from tests.data.files import encoded, scene, write

VIEWS = DINOViews(global_size=8, local_count=1, local_size=4)
KINDS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 px in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(scene(), "JPEG", exif=exif)


READABLE = {
    "grey.png": lambda: encoded(scene()[:, :, 0]),
    "grey.jpg": lambda: encoded(scene()[:, :, 0], "JPEG"),
    "rgba.png": lambda: encoded(Image.fromarray(scene()).convert("RGBA")),
    "grey_alpha.png": lambda: encoded(Image.fromarray(scene()).convert("LA")),
    "palette.png": lambda: encoded(Image.fromarray(scene()).quantize(16)),
    "palette.gif": lambda: encoded(Image.fromarray(scene()).quantize(16), "GIF"),
    "cmyk.jpg": lambda: encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG"),
    "cmyk.tif": lambda: encoded(Image.fromarray(scene()).convert("CMYK"), "TIFF"),
    "turned.jpg": turned,
    "bilevel.png": lambda: encoded(Image.fromarray(scene()[:, :, 0] > 127)),
    "deep.png": lambda: encoded(Image.fromarray(scene()[:, :, 0].astype(np.uint16) * 257)),
    "deep.tif": lambda: encoded(Image.fromarray(scene()[:, :, 0].astype(np.uint16) * 257), "TIFF"),
    "pixel.png": lambda: encoded(np.full((1, 1, 3), 7, np.uint8)),
    "line.png": lambda: encoded(scene(1, 300)),
    "column.jpg": lambda: encoded(scene(300, 1), "JPEG"),
    "a jpeg.png": lambda: encoded(scene(), "JPEG"),
    "progressive.jpg": lambda: encoded(scene(), "JPEG", progressive=True),
    "UPPER.JPG": lambda: encoded(scene(), "JPEG"),
    "with words behind.jpg": lambda: encoded(scene(), "JPEG") + b"words" * 100,
}
BROKEN = {
    "words.jpg": lambda: b"these are words, not pixels",
    "empty.jpg": lambda: b"",
    "zeros.png": lambda: bytes(500),
    "page.jpg": lambda: b"<html><body>404 Not Found</body></html>",
    "archive.jpg": lambda: b"PK\x03\x04" + bytes(200),
    "bomb.png": bomb,
    "float.tif": lambda: encoded(Image.fromarray(scene()[:, :, 0].astype(np.float32)), "TIFF"),
    "crc.png": lambda: encoded(scene())[:60] + b"\0\0\0\0" + encoded(scene())[64:],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """All of them, a directory and a link that are named like pictures, and one that its owner alone may read."""
    root = tmp_path / "odd"
    for name, made in (READABLE | BROKEN).items():
        write(root / name, made())
    for place in range(10):
        data = encoded(scene(), "JPEG", quality=90)
        write(root / f"cut{place}.jpg", data[: len(data) * place // 10])
    (root / "directory.jpg").mkdir()
    write(root / "directory.jpg" / "inside.png", encoded(scene(seed=9)))
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    write(root / "closed.png", encoded(scene(seed=8)))
    (root / "closed.png").chmod(0)
    yield root
    (root / "closed.png").chmod(stat.S_IRUSR | stat.S_IWUSR)


def unreadable() -> set[str]:
    names = {*BROKEN, *(f"cut{place}.jpg" for place in range(10)), "gone.png", "circle.png"}
    # who may do everything may read it
    return names if os.geteuid() == 0 else {*names, "closed.png"}


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_odd_picture_is_the_scene_it_shows(name, channels):
    picture = decode(READABLE[name](), channels)
    assert picture.dtype == np.uint8 and picture.shape[2] == channels
    if not name.startswith(("pixel", "line", "column", "bilevel")):
        upright = np.rot90(scene(), -1) if name == "turned.jpg" else scene()
        expected = decode(np.ascontiguousarray(upright), channels)
        if name.startswith(("grey.", "deep")):
            expected = np.repeat(scene()[:, :, :1], channels, axis=2)
        if name.startswith("grey_alpha"):
            expected = np.repeat(decode(scene(), 1), channels, axis=2)
        assert picture.shape == expected.shape
        # an upside-down or half-empty picture is off by 60 and more; 16 colours, printing inks and JPEG by less
        assert np.abs(picture.astype(int) - expected).mean() < (30 if name.startswith("palette") else 15)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_broken_and_says_why(name):
    with pytest.raises(BrokenPicture, match=r"\w{4}"):
        decode(BROKEN[name](), 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tenth", range(10))
def test_a_picture_cut_anywhere_is_broken_and_nothing_else(kind, tenth):
    """Never another exception, and never half a picture with an invented rest."""
    data = encoded(scene(), kind)
    with pytest.raises(BrokenPicture):
        decode(data[: len(data) * tenth // 10], 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_passes_over_a_folder_of_all_of_them(folder, workers):
    source = open_source(folder, labels=False)
    names = [os.path.basename(source.describe(index)) for index in range(len(source))]
    assert len(names) == len(READABLE) + len(BROKEN) + 10 + 4, "the directory is looked into, and is no picture"
    assert "inside.png" in names and "directory.jpg" not in names

    data = Images(
        folder, labels=False, batch_size=1, num_workers=workers, max_broken_share=0.6, cache=False, start_method="fork"
    )
    data.prepare(VIEWS)
    loader = data.train_dataloader()
    seen = set()
    for batch in loader:
        assert batch.views["global"].isfinite().all()
        seen |= {names[index] for index in batch.index.tolist()}
    assert seen == set(names) - unreadable()
    counted = loader.dataset.broken
    assert {names[index] for index in range(len(names)) if counted._flags.array[index]} == unreadable()
    # and whoever evaluates sees each readable one once
    found = torch.cat([batch["index"] for batch in data.predict_dataloader()]).tolist()
    assert [names[index] for index in found] == [name for name in names if name not in unreadable()]


def test_above_the_set_share_they_stop_the_run_with_names_and_numbers(folder):
    data = Images(folder, labels=False, num_workers=0, max_broken_share=0.3)
    with pytest.raises(UserError, match=r"of 41 pictures cannot be read, more than max_broken_share = 0\.3"):
        data.prepare(VIEWS)
