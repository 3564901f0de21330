"""A million paths are opened, shuffled and split over ranks in seconds and in less than a GiB.

The fast tests take a tenth of it and a tenth of the limits; run with -m slow for all of it. On one core of a virtual
machine a list of a million lines takes 3.6 s and 340 MB at its peak, 80 MB afterwards; a tree of a thousand folders
with a thousand files, whose listing is made up, 2 s and 270 MB.
"""

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ssd.data.folder import FolderSource
from ssd.data.sampler import EpochSampler
from ssd.data.sources import Subset, held_out, limited, open_source

MILLION = 1_000_000
SECONDS, GIB = 10.0, 1.0


class Entry:
    """A file or folder as `os.scandir` tells it."""

    def __init__(self, name: str, folder: bool):
        self.name, self.folder = name, folder

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder

    def is_symlink(self) -> bool:
        return False


class Tree:
    """Stands for `os.scandir` and `os.stat`: a thousand classes with their share of the files."""

    def __init__(self, files: int, classes: int = 1000):
        self.files, self.classes = files, classes

    def scandir(self, path: str) -> "Listing":
        if os.path.basename(path).startswith("class_"):
            return Listing(Entry(f"picture_{n:07}.jpg", False) for n in range(self.files // self.classes))
        return Listing(Entry(f"class_{n:03}", True) for n in range(self.classes))

    def stat(self, path: str) -> os.stat_result:
        return os.stat_result((0o40755, hash(path), 0, 1, 0, 0, 0, 0, 0, 0))


class Listing:
    def __init__(self, entries: Iterator[Entry]):
        self.entries = entries

    def __enter__(self) -> Iterator[Entry]:
        return self.entries

    def __exit__(self, *error: object) -> None:
        pass


def write_list(folder: Path, count: int) -> Path:
    first = folder / "class_000" / "picture_0000000.jpg"
    first.parent.mkdir(parents=True)
    first.touch()
    lines = (f"class_{n % 1000:03}/picture_{n:07}.jpg\tclass_{n % 1000:03}\n" for n in range(count))
    (folder / "list.txt").write_text("".join(lines))
    return folder / "list.txt"


def tree_source(folder: Path, count: int, monkeypatch) -> FolderSource:
    tree = Tree(count)
    with monkeypatch.context() as patched:
        patched.setattr("ssd.data.folder.os.scandir", tree.scandir)
        patched.setattr("ssd.data.folder.os.stat", tree.stat)
        patched.setattr(Path, "is_dir", lambda path: True)
        return FolderSource(folder)


def use(source, world: int = 8) -> None:
    """What a run does with a source before its first picture: fingerprint, division, order, each rank's batches."""
    count = len(source)
    assert len(source.classes) == 1000 and source.labels.shape == (count,)
    assert source.describe(count - 1).endswith(".jpg")
    source.fingerprint()
    rows, _ = held_out(count, 0.1)
    training = limited(Subset(source, rows), count // 2)
    training.fingerprint()
    seen = np.zeros(count // 2, np.uint8)
    for rank in range(world):
        for batch in EpochSampler(count // 2, 64, rank=rank, world=world, seed=3):
            seen[[index for _, index in batch]] += 1
    assert seen.max() == 1 and seen.sum() == count // 2 // (64 * world) * 64 * world


def opened(kind: str, folder: Path, count: int, monkeypatch):
    if kind == "list":
        path = write_list(folder, count)
        return lambda: open_source(path)
    return lambda: tree_source(folder, count, monkeypatch)


@pytest.mark.parametrize("kind", ["list", "tree"])
def test_a_tenth_of_a_million_paths_takes_a_tenth_of_the_time(tmp_path, monkeypatch, kind):
    """Of the processor's time, which other processes on the machine do not move."""
    make = opened(kind, tmp_path, MILLION // 10, monkeypatch)
    began = time.process_time()
    use(make())
    assert time.process_time() - began < SECONDS / 10


@pytest.mark.parametrize("kind", ["list", "tree"])
def test_a_hundredth_of_a_million_paths_takes_a_hundredth_of_the_memory(tmp_path, monkeypatch, kind):
    make = opened(kind, tmp_path, MILLION // 100, monkeypatch)
    tracemalloc.start()
    try:
        use(make())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < GIB * 2**30 / 100


WHOLE = """
import resource, time
from pathlib import Path
from ssd.data.sources import open_source
from tests.data.test_scale import MILLION, use, write_list
path = write_list(Path({folder!r}), MILLION)
began = time.perf_counter()
use(open_source(path))
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_million_paths_take_less_than_ten_seconds_and_a_gib_with_everything_that_is_imported(tmp_path):
    script = WHOLE.format(folder=str(tmp_path / "million"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, gib = map(float, done.stdout.split())
    assert seconds < SECONDS and gib < GIB, f"{seconds:.1f} s, {gib:.2f} GiB"
