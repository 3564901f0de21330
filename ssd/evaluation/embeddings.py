"""Embeddings of a whole data set in a folder: parts that are written one by one, so that a stop costs one of them."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd.errors import UserError

MANIFEST, INDEX = "_manifest.json", "index.csv"  # what reads a folder of Parquet leaves out names that begin so
PART_BYTES, MOST_OF_A_PART = 2**28, 10_000
"""What is held in memory until it is written, and what a stop may cost."""


@dataclass(frozen=True)
class Identity:
    """What embeddings are of: parts of two identities must not lie in one folder.

    Args:
        weights: hash of the network's weights.
        data: fingerprint of the data.
        looks: hash of how samples are made for the network.
        shape: of one embedding.
        part: samples of each part but the last.
    """

    weights: str
    data: str
    looks: str
    samples: int
    output: str
    format: str
    dtype: str
    precision: str
    shape: tuple[int, ...]
    part: int

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What another one says otherwise, in words."""
        mine = json.loads(json.dumps(asdict(self)))
        return [
            f"{name} is {other.get(name)} there and {value} here"
            for name, value in mine.items()
            if other.get(name) != value
        ]


def part_of_samples(shape: Sequence[int], dtype: str) -> int:
    """How many samples make a part, for embeddings of that shape."""
    each = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return max(1, min(MOST_OF_A_PART, PART_BYTES // each))


class Folder:
    """Where embeddings lie: parts, and a manifest that says what is whole.

    Raises UserError for a folder that holds something else, or embeddings of another identity.
    """

    def __init__(self, path: str | Path, identity: Identity):
        self.path, self.identity = Path(path), identity
        self.parts: dict[int, dict[str, Any]] = {}
        self.path.mkdir(parents=True, exist_ok=True)
        manifest = self.path / MANIFEST
        if not manifest.exists():
            if any(not name.endswith(".unfinished") for name in os.listdir(self.path)):
                raise UserError(f"--out {path} holds other files and no embeddings. Give another folder.")
            return
        try:
            content = json.loads(manifest.read_text())
            known = {int(number): part for number, part in content["parts"].items()}
            found = identity.differences(content["identity"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{manifest} is not what ssd embed writes. Give another folder.") from None
        if found:
            raise UserError(
                f"--out {path} holds other embeddings: {'; '.join(found)}. Give another folder, or remove this one."
            )
        self.parts = known

    def rows(self, number: int) -> range:
        first = number * self.identity.part
        return range(first, min(first + self.identity.part, self.identity.samples))

    def __len__(self) -> int:
        """Parts of the whole."""
        return -(-self.identity.samples // self.identity.part)

    def missing(self) -> Iterator[int]:
        """Numbers of the parts that are not there as the manifest says."""
        for number in range(len(self)):
            part = self.parts.get(number)
            if part is None or not self._is_whole(part):
                yield number

    def _is_whole(self, part: Mapping[str, Any]) -> bool:
        path = self.path / part["file"]
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == part["sha256"]

    def write(self, number: int, features: np.ndarray, broken: Sequence[int], table: Any = None) -> None:
        """A part, then the manifest that knows it.

        Args:
            features: (rows of the part, *shape), not a number where a sample is broken.
            broken: places in the data of samples that could not be read.
            table: what to write instead of the features, for Parquet.
        """
        name = f"features-{number:05d}.{'npy' if table is None else 'parquet'}"
        with written(self.path / name) as path:
            if table is None:
                with open(path, "wb") as file:
                    np.save(file, features)
            else:
                import pyarrow.parquet

                pyarrow.parquet.write_table(table, path)
        with open(self.path / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.parts[number] = {"file": name, "samples": len(features), "sha256": digest, "broken": list(broken)}
        content = {"identity": asdict(self.identity), "parts": dict(sorted(self.parts.items()))}
        with written(self.path / MANIFEST) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")

    @property
    def broken(self) -> list[int]:
        """Places in the data of all samples that could not be read."""
        return [index for _, part in sorted(self.parts.items()) for index in part["broken"]]

    def write_index(self, source: Any) -> None:
        """A line a sample of the data: its place, name, label, class, the file and row of its features, and whether it is
        broken. Parquet files have these as columns."""
        broken = set(self.broken)
        with (
            written(self.path / INDEX) as path,
            open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            table = csv.writer(file)
            table.writerow(["index", "name", "label", "class", "file", "row", "broken"])
            for number in range(len(self)):
                for row, index in enumerate(self.rows(number)):
                    label = -1 if source.labels is None else source.label(index)
                    name = source.describe(index)
                    place = [self.parts[number]["file"], row, int(index in broken)]
                    table.writerow([index, name, label, class_name(source, label), *place])


def class_name(source: Any, label: int) -> str:
    return str(source.classes[label]) if source.classes is not None and label >= 0 else ""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file to write, which gets its name when it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def parquet_table(features: np.ndarray, rows: Sequence[int], broken: Sequence[int], source: Any) -> Any:
    """Columns index, name, label, class, broken and features, a list of numbers that is null where a sample is broken.

    Raises UserError where pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    flat = np.ascontiguousarray(features.reshape(len(features), -1))
    kept = np.isin(np.asarray(rows), broken, invert=True)
    values = pyarrow.array(flat.ravel())
    lists = pyarrow.FixedSizeListArray.from_arrays(values, flat.shape[1])
    lists = (
        pyarrow.compute.if_else(pyarrow.array(kept), lists, pyarrow.scalar(None, lists.type))
        if not kept.all()
        else lists
    )
    labels = [-1 if source.labels is None else source.label(index) for index in rows]
    names = [source.describe(index).encode("utf-8", "backslashreplace").decode() for index in rows]
    columns = {
        "index": pyarrow.array(list(rows), pyarrow.int64()),
        "name": names,
        "label": pyarrow.array(labels, pyarrow.int64()),
        "class": [class_name(source, label) for label in labels],
        "broken": (~kept).tolist(),
        "features": lists,
    }
    table = pyarrow.table(columns)
    return table.replace_schema_metadata({"shape": json.dumps(list(features.shape[1:]))})


def import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--format parquet needs pyarrow, which is not installed: pip install 'ssd[hub]'. Or use --format npy."
        ) from None
    return pyarrow
