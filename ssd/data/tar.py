"""Pictures in tar files, as WebDataset shards hold them: read in any order, without unpacking.

The headers of every shard are read once and tell where each file lies. After that a sample is one read of a range, so
that order, processes and resume are those of a folder. What was found is kept beside the shards where one may write
there, and in the cache folder for shards that lie elsewhere (`ssd/data/shards.py`).
"""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ssd.data.folder import SUFFIXES, classes_of_list, read_array
from ssd.data.memory import ByteTable, SharedArray
from ssd.data.shards import Shard, is_remote, open_shard
from ssd.data.tar_headers import members
from ssd.errors import UserError

LABEL_SUFFIXES = (".cls", ".cls.txt", ".label", ".label.txt")
METADATA_LABELS = ("label", "cls", "class", "target")
INDEX_VERSION = 4
AT_ONCE = 8  # shards elsewhere that are indexed at the same time


class TarSource:
    """Samples of one or more tar files: files that share a name up to its first dot belong together.

    Of each sample the first picture counts; its label is a file `.cls` or `.label` that holds a
    number or a name, or the entry `label`, `cls`, `class` or `target` of a `.json`. Samples without a picture, and
    further pictures of a sample, are passed over, and a warning says how many. Raises UserError for a file that is no
    tar, or is compressed.

    Args:
        paths: shards, on this machine or elsewhere; `{000..099}` in a path stands for all of these numbers.
        labels: whether labels are read, which takes time where each is a file of its own.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], labels: bool | str = "auto"):
        given = [paths] if isinstance(paths, str | Path) else paths
        self.paths = [path for text in given for path in expand_braces(str(text))]
        missing = [path for path in self.paths if not is_remote(path) and not os.path.isfile(path)]
        if missing:
            raise UserError(f"there is no shard '{missing[0]}' ({len(missing)} of {len(self.paths)} are missing).")
        # those of a place elsewhere wait for each other's answers, not for this machine
        with ThreadPoolExecutor(AT_ONCE if any(map(is_remote, self.paths)) else 1) as pool:
            self._shards = list(pool.map(open_shard, self.paths))
            found = list(pool.map(lambda shard: index_of(shard, labels is not False), self._shards))
        counts = [len(index["offsets"]) for index in found]
        if not sum(counts):
            raise UserError(f"'{self.paths[0]}' holds no pictures. Looked for files that end in {', '.join(SUFFIXES)}.")
        warn_of_left_out(self.paths[0], found)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._offsets = SharedArray.of(np.array([o for index in found for o in index["offsets"]], np.int64))
        self._sizes = SharedArray.of(np.array([s for index in found for s in index["sizes"]], np.int64))
        self._names = ByteTable.of([name.encode() for index in found for name in index["names"]])
        self._labels: SharedArray | None = None
        self.classes: list[str] | None = None
        if labels is not False:
            numbers, self.classes = classes_of_list([label for index in found for label in index["labels"]])
            self._labels = None if numbers is None else SharedArray.of(numbers)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> bytes | np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        size = int(self._sizes.array[index])
        data = self._shards[shard].read(int(self._offsets.array[index]), size)
        if len(data) < size:
            raise OSError(f"{self.describe(index)} is cut short: {len(data)} of {size} bytes")
        if self._names[index].lower().endswith(b".npy"):
            return read_array(io.BytesIO(data), self.describe(index))
        return data

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self.paths[shard]}: {self._names[index].decode(errors='replace')}"

    def fingerprint(self) -> str:
        """Of names, sizes and labels; the same wherever the shards lie."""
        state = hashlib.sha256(self._names.content().data)
        state.update(self._sizes.array.data)
        if self._labels is not None:
            state.update(self._labels.array.data)
        return state.hexdigest()


def expand_braces(text: str) -> list[str]:
    """'a-{00..02}.tar' -> a-00.tar, a-01.tar, a-02.tar; '{a,b}' -> a, b."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            choices.append([part])
        elif found := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            width = len(found[1]) if found[1].startswith("0") else 0
            choices.append([f"{n:0{width}d}" for n in range(int(found[1]), int(found[2]) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(pieces) for pieces in product(*choices)]


def index_of(shard: Shard, labels: bool) -> dict[str, Any]:
    """Where the pictures of a shard lie and what their labels are, as it is kept where that is up to date."""
    stamp = [INDEX_VERSION, shard.size, shard.stamp, labels]
    try:
        kept = json.loads(shard.index_file.read_text())
        if kept["stamp"] == stamp:
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    index = {"stamp": stamp, **read_index(shard, labels)}
    unfinished = shard.index_file.with_name(f".{shard.index_file.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(index))
        os.replace(unfinished, shard.index_file)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a folder that may only be read
    return index


def read_index(shard: Shard, labels: bool) -> dict[str, Any]:
    """Reads the headers of a shard, and the labels that are files. Raises UserError where it is no tar."""
    shard = shard.ahead()
    pictures: dict[str, tuple[int, int, str]] = {}
    named: dict[str, str | None] = {}
    keys: dict[str, None] = {}
    further: list[str] = []
    for name, offset, size in members(shard):
        folder, base = os.path.split(name)
        stem, dot, suffix = base.partition(".")
        if not dot or base.startswith("."):
            continue
        key = os.path.join(folder, stem)
        keys[key] = None
        lowered = f".{suffix.lower()}"
        if lowered.endswith(SUFFIXES):
            if pictures.setdefault(key, (offset, size, name))[2] != name:
                further.append(name)
        elif labels and (lowered in LABEL_SUFFIXES or lowered == ".json"):
            text = shard.read(offset, size).decode("utf-8", "replace").strip()
            label = label_in_json(text) if lowered == ".json" else text
            # a file of its own says more than metadata
            if label is not None and (lowered != ".json" or key not in named):
                named[key] = label
    chosen = [key for key in keys if key in pictures]
    return {
        "offsets": [pictures[key][0] for key in chosen],
        "sizes": [pictures[key][1] for key in chosen],
        "names": [pictures[key][2] for key in chosen],
        "labels": [named.get(key) or None for key in chosen],
        "without_picture": len(keys) - len(chosen),
        "further_pictures": len(further),
        "further_example": further[0] if further else "",
    }


def warn_of_left_out(path: str, indices: Sequence[dict[str, Any]]) -> None:
    without, further = (sum(index[name] for index in indices) for name in ("without_picture", "further_pictures"))
    told = [f"{without} samples without a picture"] if without else []
    if further:
        example = next(index["further_example"] for index in indices if index["further_example"])
        told.append(
            f"{further} pictures, for instance {example}, that share their name up to its first dot with another, which "
            "makes them one sample"
        )
    if told:
        beside = " and the shards beside it" if len(indices) > 1 else ""
        warnings.warn(f"of '{path}'{beside} are passed over: {'; '.join(told)}.", stacklevel=3)


def label_in_json(text: str) -> str | None:
    try:
        entries = json.loads(text)
    except ValueError:
        return None
    if not isinstance(entries, dict):
        return None
    return next((str(entries[name]) for name in METADATA_LABELS if entries.get(name) is not None), None)
