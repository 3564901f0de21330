"""Pictures stored as encoded bytes in Parquet files, the layout of the Hugging Face hub."""

import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssd.data.memory import ByteTable, SharedArray
from ssd.errors import UserError

FOOTER_BYTES = 1 << 16


class ParquetSource:
    """Rows of one or more Parquet files: a column of pictures, {bytes, path} or bytes, and optionally labels.

    Up to `memory_gib` of encoded pictures are read whole at the first `open` and shared by processes
    that are forked or spawned later. More than that is read a row group at a time, with the last few
    kept by each process: shuffled reading is then as slow as row groups are large, and a warning says so.

    Args:
        paths: one file, or several that are read as one.
        image_column: name of the column; None = "image", or else the only column of pictures there is.
        label_column: name of the column; None = "label" where there is one.
        memory_gib: what may be held in memory.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        memory_gib: float = 2.0,
    ):
        paths = [paths] if isinstance(paths, str | Path) else paths
        self.paths = [str(path) for path in paths]
        files = [open_file(path) for path in self.paths]
        schema = files[0].schema_arrow
        for path, file in zip(self.paths, files, strict=True):
            if not file.schema_arrow.equals(schema):
                raise UserError(f"'{path}' has other columns than '{self.paths[0]}'. Give files of one data set.")
        self.image_column = image_column or only_picture_column(schema, self.paths[0])
        self.label_column = label_column or ("label" if "label" in schema.names else None)
        for column in (self.image_column, self.label_column):
            if column is not None and column not in schema.names:
                raise UserError(f"'{self.paths[0]}' has no column '{column}'. It has {', '.join(schema.names)}.")

        sizes = [(n, g, group_rows(file, g)) for n, file in enumerate(files) for g in range(file.num_row_groups)]
        self._groups = [(number, group) for number, group, _ in sizes]
        self._ends = np.cumsum([rows for _, _, rows in sizes], dtype=np.int64)  # (groups,) rows up to its end
        if not len(self):
            raise UserError(f"'{self.paths[0]}' has no rows.")
        encoded_gib = sum(column_bytes(file, self.image_column) for file in files) / 2**30
        self._whole = encoded_gib <= memory_gib
        if not self._whole:
            warnings.warn(
                f"'{self.paths[0]}' and the files beside it hold {encoded_gib:.1f} GiB of pictures, more than the "
                f"{memory_gib:g} GiB kept in memory: shuffled reading will be slow. Unpack them into a folder.",
                stacklevel=2,
            )
        self._table: ByteTable | None = None
        self._recent: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

        self.classes: list[str] | None = None
        self._labels: SharedArray | None = None
        if self.label_column is not None:
            labels, self.classes = read_labels(files, self.label_column)
            self._labels = SharedArray.of(labels)
        self._fingerprint = fingerprint_of(self.paths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> bytes:
        if self._table is not None:
            return self._table[index]
        if self._whole:
            self._table = ByteTable(*joined([self._read(group) for group in range(len(self._groups))]))
            return self._table[index]
        group = int(np.searchsorted(self._ends, index, side="right"))
        content, ends = self._group(group)
        row = index - (int(self._ends[group - 1]) if group else 0)
        return content[ends[row - 1] if row else 0 : ends[row]].tobytes()

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        number, _ = self._groups[int(np.searchsorted(self._ends, index, side="right"))]
        first = sum(1 for earlier, _ in self._groups if earlier < number)
        return f"{self.paths[number]}, row {index - (int(self._ends[first - 1]) if first else 0)}"

    def fingerprint(self) -> str:
        """Of the files' sizes and footers, which hold the statistics and places of all columns."""
        return self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict()}

    def _group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Content and ends of one row group, from the few that this process keeps."""
        if group in self._recent:
            self._recent.move_to_end(group)
            return self._recent[group]
        self._recent[group] = self._read(group)
        while len(self._recent) > 1 and sum(content.nbytes for content, _ in self._recent.values()) > 2**28:
            self._recent.popitem(last=False)
        return self._recent[group]

    def _read(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        import pyarrow as pa

        number, within = self._groups[group]
        file = open_file(self.paths[number])
        # no threads: this runs in forked workers, several on a machine
        try:
            column = file.read_row_group(within, columns=[self.image_column], use_threads=False)[self.image_column]
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"row group {within} of '{self.paths[number]}' cannot be read: {error}. Fetch it again."
            ) from None
        parts = []
        for chunk in column.chunks:
            if pa.types.is_struct(chunk.type):
                chunk = chunk.flatten()[chunk.type.get_field_index("bytes")]
            parts.append(bytes_and_ends(chunk.cast(pa.large_binary())))
        return joined(parts)


def open_file(path: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"'{path}' is a Parquet file, which needs pyarrow. Install it with: pip install 'ssd[hub]'"
        ) from None
    from pyarrow import ArrowInvalid

    if not os.path.isfile(path):
        raise UserError(f"there is no file '{path}'.")
    try:
        return parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"'{path}' cannot be read as Parquet: {error}. Is it whole? Fetch it again.") from None


def only_picture_column(schema: Any, path: str) -> str:
    """ "image", or the one column that can hold encoded pictures."""
    import pyarrow as pa

    def may_hold_pictures(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    fit = [field.name for field in schema if may_hold_pictures(field.type)]
    if "image" in fit:
        return "image"
    if len(fit) != 1:
        has = f"{len(fit)} of them ({', '.join(fit)})" if fit else "none"
        raise UserError(
            f"'{path}' should have a column 'image', or just one other, of encoded pictures; it has {has}. "
            f"Its columns are {', '.join(schema.names)}."
        )
    return fit[0]


def group_rows(file: Any, group: int) -> int:
    return file.metadata.row_group(group).num_rows


def column_bytes(file: Any, name: str) -> int:
    """Bytes of the column and of all that is nested in it, before compression."""
    total = 0
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        for place in range(row_group.num_columns):
            column = row_group.column(place)
            if column.path_in_schema.partition(".")[0] == name:
                total += column.total_uncompressed_size
    return total


def bytes_and_ends(binary: Any) -> tuple[np.ndarray, np.ndarray]:
    """A pyarrow array of large_binary as one block (total,) uint8 and the end of each row (N,) int64.

    A missing value is an empty string.
    """
    _, offsets, data = binary.buffers()
    offsets = np.frombuffer(offsets, np.int64)[binary.offset : binary.offset + len(binary) + 1]
    if data is None or not len(binary):
        return np.zeros(0, np.uint8), np.zeros(len(binary), np.int64)
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Several blocks with their ends as one."""
    before = np.cumsum([0, *(len(content) for content, _ in parts)])
    ends = [ends + start for (_, ends), start in zip(parts, before, strict=False)]
    return np.concatenate([content for content, _ in parts]), np.concatenate(ends)


def read_labels(files: Sequence[Any], column: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels (N,) int64, -1 where missing, and class names where the files or the labels themselves have them."""
    import pyarrow as pa

    values = pa.chunked_array(
        [c for file in files for c in file.read(columns=[column], use_threads=False)[column].chunks]
    )
    if pa.types.is_integer(values.type):
        labels = values.cast(pa.int64()).fill_null(-1).to_numpy()
        return labels.copy(), hub_class_names(files[0], column)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"label column '{column}' holds {values.type}. Labels are whole numbers or names.")
    classes = sorted(name for name in values.unique().to_pylist() if name is not None)
    number: dict[str | None, int] = {name: place for place, name in enumerate(classes)}
    return np.array([number.get(name, -1) for name in values.to_pylist()], np.int64), classes


def hub_class_names(file: Any, column: str) -> list[str] | None:
    """Class names that the `datasets` library writes into a file's metadata."""
    stored = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    feature = json.loads(stored).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if isinstance(feature, dict) else None


def fingerprint_of(paths: Sequence[str]) -> str:
    state = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            file.seek(max(0, size - FOOTER_BYTES))
            state.update(size.to_bytes(8, "little") + file.read())
    return state.hexdigest()
