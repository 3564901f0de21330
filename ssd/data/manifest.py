"""A manifest: a table of files with what is known of each, in CSV, that a person can read, cut and mend.

The first line names the columns. `path` is relative to the manifest's own folder or absolute; the rest is optional:

| column | holds |
|---|---|
| label | a class name, or whole numbers throughout |
| group | a name shared by samples that must not be divided, of one patient or place |
| height, width | of a picture or a clip, upright, in px |
| length | frames of a clip, samples of a recording |
| rate | frames or samples a second, so that length / rate is the duration in seconds |
"""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssd.errors import UserError

PATH_COLUMNS = ("path", "file", "filename", "image", "picture", "clip", "video", "sound", "audio")
COUNTS = ("height", "width", "length", "rate")
COLUMNS = ("path", "label", "group", *COUNTS)


class Manifest(NamedTuple):
    """The rows of a manifest, in its order.

    Args:
        names: paths as written.
        labels: as written, None where there is none.
        group_names: as written, None where there is none.
        counts: of height, width, length and rate those that the manifest has, (N,) float64, NaN where a cell is empty.
    """

    names: list[str]
    labels: list[str | None]
    group_names: list[str | None]
    counts: dict[str, np.ndarray]

    @property
    def groups(self) -> np.ndarray | None:
        """(N,) int64, numbered in the order of their sorted names, -1 for none; None where no row names one."""
        return numbered(self.group_names) if any(self.group_names) else None


def has_header(path: Path) -> bool:
    """Whether a list is a manifest: its first line has two or more cells, and the first is a name for paths."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            cells = next(csv.reader(file, delimiter=separator(path)), [])
    except (UnicodeDecodeError, csv.Error):
        return False  # whoever reads it as a list says what is wrong
    return len(cells) > 1 and cells[0].strip().lower() in PATH_COLUMNS


def read_manifest(path: Path) -> Manifest:
    """Raises UserError for columns that are not known, and for rows that do not have the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator(path))
        try:
            header = [cell.strip().lower() for cell in next(rows)]
            header = ["path" if place == 0 else name for place, name in enumerate(header)]
            check_header(header, path)
            table: list[list[str]] = []
            for row in rows:
                if len(row) != len(header) and row:
                    raise UserError(
                        f"line {rows.line_num} of '{path}' has {len(row)} cells, and the header has {len(header)}. "
                        "Put a name with a comma in it between double quotes."
                    )
                if row:
                    table.append([cell.strip() for cell in row])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"'{path}' is not a table of text: {error}. A manifest is CSV in UTF-8.") from None
    columns = dict(zip(header, map(list, zip(*table, strict=True)), strict=True)) if table else {}
    names = columns.get("path", [])
    labels: list[str | None] = [label or None for label in columns.get("label", [""] * len(names))]
    group_names: list[str | None] = [name or None for name in columns.get("group", [""] * len(names))]
    counts = {name: numbers(columns[name], name, path) for name in COUNTS if name in columns}
    return Manifest(names, labels, group_names, counts)


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line a row, with those columns that any row has; written to a temporary name and renamed."""
    path, rows = Path(path), list(rows)
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    columns += ["label"] if len(columns) == 1 else []  # paths alone would not be told from a plain list
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            mark = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n", delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def numbered(names: list[str | None]) -> np.ndarray:
    """Names as numbers in the order of the sorted names, -1 for None. (N,) int64"""
    number: dict[str | None, int] = {
        name: place for place, name in enumerate(sorted({n for n in names if n is not None}))
    }
    return np.fromiter((number.get(name, -1) for name in names), np.int64, len(names))


def numbers(cells: list[str], name: str, path: Path) -> np.ndarray:
    found = np.full(len(cells), np.nan)
    for place, cell in enumerate(cells):
        try:
            found[place] = float(cell) if cell else np.nan
        except ValueError:
            raise UserError(f"column {name} of '{path}' holds {cell!r} in row {place + 1}. Give numbers.") from None
    return found


def separator(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return "\t" if "\t" in file.readline() else ","


def check_header(header: list[str], path: Path) -> None:
    unknown = [name for name in header if name not in COLUMNS]
    twice = sorted({name for name in header if header.count(name) > 1})
    if unknown:
        raise UserError(
            f"'{path}' has the columns {', '.join(unknown)}, which a manifest does not know. It knows {', '.join(COLUMNS)}. "
            "Take the others out or rename them."
        )
    if twice:
        raise UserError(f"'{path}' has the column {twice[0]} twice. Keep one.")
