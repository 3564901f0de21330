"""Pictures in tar files, as WebDataset shards hold them: read in any order, without unpacking.

The headers of every shard are read once and tell where each file lies. After that a sample is one `pread`, so that
order, processes and resume are those of a folder. What was found is kept beside the shards where one may write there.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ssd.data.folder import SUFFIXES, classes_of_list, read_array
from ssd.data.memory import ByteTable, SharedArray
from ssd.errors import UserError

BLOCK = 512
LABEL_SUFFIXES = (".cls", ".cls.txt", ".label", ".label.txt")
METADATA_LABELS = ("label", "cls", "class", "target")
PACKED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")  # gzip, bzip2, xz, zstandard
INDEX_VERSION = 1


class TarSource:
    """Samples of one or more tar files: files that share a name up to its first dot belong together.

    Of each sample the first picture counts; its label is a file `.cls` or `.label` that holds a
    number or a name, or the entry `label`, `cls`, `class` or `target` of a `.json`. Samples without a picture are
    passed over and counted in `skipped`. Raises UserError for a file that is no tar, or is compressed.

    Args:
        paths: shards; `{000..099}` in a path stands for all of these numbers.
        labels: whether labels are read, which takes time where each is a file of its own.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], labels: bool | str = "auto"):
        given = [paths] if isinstance(paths, str | Path) else paths
        self.paths = [path for text in given for path in expand_braces(str(text))]
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            raise UserError(f"there is no shard '{missing[0]}' ({len(missing)} of {len(self.paths)} are missing).")
        found = [index_of(path, labels is not False) for path in self.paths]
        counts = [len(index["offsets"]) for index in found]
        if not sum(counts):
            raise UserError(f"'{self.paths[0]}' holds no pictures. Looked for files that end in {', '.join(SUFFIXES)}.")
        self.skipped = sum(index["skipped"] for index in found)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._offsets = SharedArray.of(np.array([o for index in found for o in index["offsets"]], np.int64))
        self._sizes = SharedArray.of(np.array([s for index in found for s in index["sizes"]], np.int64))
        self._names = ByteTable.of([name.encode() for index in found for name in index["names"]])
        self._labels: SharedArray | None = None
        self.classes: list[str] | None = None
        if labels is not False:
            numbers, self.classes = classes_of_list([label for index in found for label in index["labels"]])
            self._labels = None if numbers is None else SharedArray.of(numbers)
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> bytes | np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        key = os.getpid(), shard
        if key not in self._files:
            # a handle for each process: two that share one would move each other's place on some systems
            self._files[key] = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115 (kept open)
        size = int(self._sizes.array[index])
        data = os.pread(self._files[key].fileno(), size, int(self._offsets.array[index]))
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


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


def index_of(path: str, labels: bool) -> dict[str, Any]:
    """Where the pictures of a shard lie and what their labels are, from beside the shard where that is up to date."""
    status = os.stat(path)
    beside = Path(f"{path}.index.json")
    stamp = [INDEX_VERSION, status.st_size, status.st_mtime_ns, labels]
    try:
        kept = json.loads(beside.read_text())
        if kept["stamp"] == stamp:
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    index = {"stamp": stamp, **read_index(path, labels)}
    unfinished = beside.with_name(f".{beside.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(index))
        os.replace(unfinished, beside)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a folder that may only be read
    return index


def read_index(path: str, labels: bool) -> dict[str, Any]:
    """Reads the headers of a shard, and the labels that are files. Raises UserError where it is no tar."""
    pictures: dict[str, tuple[int, int, str]] = {}
    named: dict[str, str | None] = {}
    keys: dict[str, None] = {}
    with open(path, "rb") as file:
        for name, offset, size in members(file, path):
            folder, base = os.path.split(name)
            stem, dot, suffix = base.partition(".")
            if not dot or base.startswith("."):
                continue
            key = os.path.join(folder, stem)
            keys[key] = None
            lowered = f".{suffix.lower()}"
            if lowered.endswith(SUFFIXES):
                pictures.setdefault(key, (offset, size, name))
            elif labels and (lowered in LABEL_SUFFIXES or lowered == ".json"):
                text = os.pread(file.fileno(), size, offset).decode("utf-8", "replace").strip()
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
        "skipped": len(keys) - len(chosen),
    }


def label_in_json(text: str) -> str | None:
    try:
        entries = json.loads(text)
    except ValueError:
        return None
    if not isinstance(entries, dict):
        return None
    return next((str(entries[name]) for name in METADATA_LABELS if entries.get(name) is not None), None)


def members(file: Any, path: str):
    """Name, offset and size of every regular file of a tar (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU long names).

    A shard that ends in the middle of a file is an error of its own: what is cut off would never be seen.
    """
    length = os.fstat(file.fileno()).st_size
    place, long_name = 0, None
    while place < length:
        header = os.pread(file.fileno(), BLOCK, place)
        if len(header) < BLOCK and place:
            raise UserError(f"'{path}' is cut short in the header at byte {place}. Fetch it again.")
        header = header.ljust(BLOCK, b"\0")
        if not header.strip(b"\0"):
            return
        size = tar_number(header[124:136])
        if size is None or checksum(header) != tar_number(header[148:156]):
            if place == 0 and header.startswith(PACKED):
                raise UserError(f"'{path}' is compressed. Unpack it to a plain .tar: pictures are compressed already.")
            what = "is not a tar file" if place == 0 else f"is damaged at byte {place}"
            raise UserError(f"'{path}' {what}. Fetch or write it again.")
        offset, kind = place + BLOCK, header[156:157]
        if offset + size > length:
            raise UserError(f"'{path}' is cut short: {length} bytes, {offset + size} expected. Fetch it again.")
        if kind == b"L":
            long_name = os.pread(file.fileno(), size, offset).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            long_name = pax_path(os.pread(file.fileno(), size, offset)) or long_name
        else:
            if kind in (b"0", b"\0"):
                yield long_name or ustar_name(header), offset, size
            long_name = None
        place = offset + -(-size // BLOCK) * BLOCK


def tar_number(field: bytes) -> int | None:
    """Octal digits, or base 256 with the first bit set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def checksum(header: bytes) -> int:
    """Sum of the bytes with the field of the sum itself as spaces."""
    return sum(header) - sum(header[148:156]) + 8 * 32


def ustar_name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], b""
    if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
        prefix = header[345:500].split(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def pax_path(records: bytes) -> str | None:
    """The record `path` of a pax header: "length key=value\\n", again and again."""
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit():
            return None
        record = records[: int(length)]
        key, _, value = record.partition(b" ")[2].partition(b"=")
        if key == b"path":
            return value.rstrip(b"\n").decode("utf-8", "replace")
        records = records[int(length) :]
    return None
