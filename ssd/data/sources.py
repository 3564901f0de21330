"""Where samples come from: what every source answers, and which one a path stands for."""

import glob
import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from ssd.data import arrays
from ssd.data.arrays import ArraySource
from ssd.data.collections import open_collection
from ssd.data.folder import LIST_SUFFIXES, SUFFIXES, FolderSource, picture_files
from ssd.data.memory import SharedArray
from ssd.data.parquet import ParquetSource
from ssd.data.randomness import generator
from ssd.data.shards import is_remote
from ssd.data.tar import TarSource, expand_braces
from ssd.errors import UserError

HELD_OUT = -1  # keys of the fixed shuffles: which samples are held out, and which a limit keeps
KEPT = -2


class Source(Protocol):
    """Samples by number. Reading the same number gives the same sample in every process.

    `classes` are names in the order of the labels, None where there are none or labels are plain
    numbers; `labels` is (N,) int64, -1 for a sample without one, or None where no sample has one.
    """

    classes: list[str] | None

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> bytes | np.ndarray:
        """An encoded picture, or (H, W) or (H, W, C) uint8 or uint16. Raises OSError where it cannot be read."""

    def label(self, index: int) -> int: ...

    def describe(self, index: int) -> str:
        """Where the sample lies, for messages."""

    def fingerprint(self) -> str:
        """Cheap, the same for the same data in every run."""


class Subset:
    """Some samples of a source, in the order of `rows`, numbered anew."""

    def __init__(self, source: Source, rows: np.ndarray):
        self.source = source
        self.classes = source.classes
        self._rows = SharedArray.of(rows.astype(np.int64))

    def __len__(self) -> int:
        return self._rows.shape[0]

    @property
    def rows(self) -> np.ndarray:
        """(N,) int64 place of each sample in `source`."""
        return self._rows.array

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.rows]

    def open(self, index: int) -> bytes | np.ndarray:
        return self.source.open(int(self.rows[index]))

    def label(self, index: int) -> int:
        return self.source.label(int(self.rows[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.rows[index]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.rows.tobytes()).hexdigest()


class Renamed:
    """A source with names of classes, its labels numbered like another's `classes`, so that the two can be compared.

    Raises UserError for a class that is not among them.
    """

    def __init__(self, source: Source, classes: list[str]):
        assert source.classes is not None and source.labels is not None
        unknown = sorted(set(source.classes) - set(classes))
        if unknown:
            raise UserError(
                f"the held-out data has classes that the training data lacks: {', '.join(unknown[:10])}. Training has "
                f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}. Give two parts of one data set."
            )
        self.source = source
        self.classes: list[str] | None = classes
        place = {name: number for number, name in enumerate(classes)}
        number = np.array([*(place[name] for name in source.classes), -1])
        self._labels = SharedArray.of(number[source.labels])

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> np.ndarray:
        return self._labels.array

    def open(self, index: int) -> bytes | np.ndarray:
        return self.source.open(index)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


COLLECTIONS = ("torchvision:", "hf:")
KINDS = (
    f"a folder of pictures, a list of paths ({', '.join(LIST_SUFFIXES)}), Parquet (.parquet), tar shards (.tar, by URL too), a "
    "NumPy stack (.npy, .npz), torchvision:NAME:FOLDER or hf:NAME"
)


def open_source(path: str | Path, labels: bool | str = "auto") -> Source:
    """The source that `path` stands for, recognised from what it is.

    A folder of pictures at any depth, a text file that lists them, a Parquet or tar file, a folder of them or a
    pattern such as 'data/train-*.parquet' or 'data/train-{000..099}.tar', tar files by URL, a NumPy stack,
    `torchvision:NAME:FOLDER` or `hf:NAME`. `labels` as in `FolderSource`. Raises UserError for anything else.
    """
    text = os.path.expanduser(str(path))
    if is_remote(text):
        return TarSource(text, labels)
    if text.startswith(COLLECTIONS):
        return without_labels(open_collection(text), labels)
    if "{" in text and not os.path.exists(text):
        return of_files(expand_braces(text), text, labels)
    if glob.has_magic(text) and not os.path.exists(text):
        matches = sorted(glob.glob(text))
        if not matches:
            raise UserError(f"no file fits the pattern '{path}'.")
        return of_files(matches, text, labels)
    if not os.path.exists(text):
        raise UserError(f"there is no '{path}' (seen from '{os.getcwd()}'). Give {KINDS}.")
    if os.path.isdir(text):
        for suffix in SHARDS:
            shards = sorted(str(file) for file in Path(text).glob(f"[!.]*{suffix}"))
            if shards:
                refuse_pictures_beside(shards, text)
                return of_files(one_split(shards, text), text, labels)
        return FolderSource(text, labels)
    if text.endswith(SHARDS):
        return of_files([text], text, labels)
    if text.lower().endswith(arrays.SUFFIXES):
        return without_labels(ArraySource(text, labels), labels)
    if text.lower().endswith(LIST_SUFFIXES):
        return FolderSource(text, labels)
    if text.lower().endswith(SUFFIXES):
        raise UserError(f"'{path}' is a single picture. Give the folder that it lies in.")
    raise UserError(f"'{path}' is of no known kind. Give {KINDS}.")


SHARDS = (".parquet", ".tar")


def refuse_pictures_beside(shards: list[str], folder: str) -> None:
    """Raises UserError where a folder of shards holds pictures as well, such as those that a shard was packed from."""
    # arrays beside shards are something else: labels, features
    picture = next(picture_files(folder, tuple(suffix for suffix in SUFFIXES if suffix != ".npy")), None)
    if picture is not None:
        raise UserError(
            f"folder '{folder}' holds {os.path.basename(shards[0])} and pictures as well, for instance {picture}. Give "
            f"{os.path.join(folder, '*' + Path(shards[0]).suffix)} to read the former, or move it elsewhere to read the latter."
        )


def of_files(files: list[str], text: str, labels: bool | str) -> Source:
    """The source of several Parquet or several tar files."""
    if all(file.endswith(".parquet") for file in files):
        return without_labels(ParquetSource(files), labels)
    if all(file.endswith(".tar") for file in files):
        return TarSource(files, labels)
    other = (
        next(file for file in files if not file.endswith(SHARDS))
        if not all(file.endswith(SHARDS) for file in files)
        else files[-1]
    )
    raise UserError(f"'{text}' fits '{other}'. Patterns are for Parquet files or for tar files, all of one kind.")


def without_labels(source: Source, labels: bool | str) -> Source:
    """Without labels where they are not to be used, or where no sample has one (test parts often have -1 throughout)."""
    given = source.labels
    return Unlabelled(source) if given is not None and (labels is False or not (given >= 0).any()) else source


class Unlabelled:
    """A source whose labels do not count."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def open(self, index: int) -> bytes | np.ndarray:
        return self.source.open(index)

    def label(self, index: int) -> int:
        return -1

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def one_split(shards: list[str], folder: str) -> list[str]:
    """The shards, when they are not a training and a held-out part side by side."""
    splits = {os.path.basename(shard).partition(".")[0].partition("-")[0] for shard in shards}
    if "train" in splits and len(splits) > 1:
        raise UserError(
            f"folder '{folder}' holds several parts: {', '.join(sorted(splits))}. Name one, for instance "
            f"path: {os.path.join(folder, 'train-*' + Path(shards[0]).suffix)}, and another as val_path."
        )
    return shards


def held_out(length: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, both sorted; the same whatever the run's seed is.

    At least one row is held out of two or more.
    """
    count = min(max(1, round(length * share)), length - 1)
    order = generator(HELD_OUT).permutation(length)
    return np.sort(order[count:]), np.sort(order[:count])


def limited(source: Source, limit: int | None) -> Source:
    """The first `limit` samples of a fixed shuffle, sorted; smaller limits are parts of larger ones."""
    if limit is None or limit >= len(source):
        return source
    return Subset(source, np.sort(generator(KEPT).permutation(len(source))[:limit]))
