"""Features of a whole set on disk, so that the next probe of the same network and data reads them.

A folder holds one `.npy` file a part, labels, places, and `about.json`, which says what they are of. Its name stands
for all that could change a feature: weights, data, how a sample is looked at, precision, parts. It is written under
another name and then renamed, so that a folder of that name is whole.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.features import Features, embedded, nothing_to_embed
from ssd.evaluation.outputs import LAST, outputs_of, parts_of
from ssd.weights.fingerprint import weights_fingerprint

VERSION = 1
DTYPES = ("float32", "float16")
LARGEST_BYTES = 20 * 2**30
"""Kept in all: when more is written, what was not used for longest goes."""


@dataclass(frozen=True)
class FeatureTable:
    """Parts (N, D) by name, labels (N,) with -1 for none, and the place (N,) of each sample in its source."""

    parts: dict[str, Tensor]
    labels: Tensor
    index: Tensor

    def outputs(self) -> list[str]:
        """Names, the network's own first."""
        return list(outputs_of(self.parts))

    def features(self, output: str | None = None) -> Features:
        """Those of an output, None for the network's own, in float32."""
        outputs = outputs_of(self.parts)
        names = outputs[output or next(iter(outputs))]
        return Features(torch.cat([self.parts[name].float() for name in names], 1), self.labels, self.index)


def feature_table(
    backbone: Any,
    loader: Iterable[Mapping[str, Tensor]],
    rows: int,
    about: Mapping[str, Any],
    folder: Path | None,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    precision: str = "32-true",
    progress: str | None = None,
) -> tuple[FeatureTable, str]:
    """Parts of every sample, in the loader's order, and where they are from: "read", "made" or "damaged, made again".

    Args:
        rows: samples at most.
        about: what tells these samples, and how they are looked at, from others; plain data.
        folder: where tables are kept, None to keep nothing.
        dtype: of the features that are kept: float32, or float16 in half the space.
    """
    device = torch.device(device)
    key = {
        "version": VERSION,
        "weights": weights_fingerprint(backbone.state_dict()),
        "network": backbone.record(),
        "samples": dict(about),
        "last": LAST,
        "dtype": dtype,
        "precision": precision,
        "device": device.type,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    settings: dict[str, Any] = {"dtype": dtype, "device": device, "precision": precision, "progress": progress}
    if folder is None:
        with tempfile.TemporaryDirectory() as unkept:
            write_table(Path(unkept), key, backbone, loader, rows, **settings)
            return read_table(Path(unkept), in_memory=True), "made"
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    kept = folder / name
    if kept.exists():
        try:
            table = read_table(kept)
            os.utime(kept)
            return table, "read"
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            shutil.rmtree(kept)
            how = "damaged, made again"
    else:
        how = "made"
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        write_table(place, key, backbone, loader, rows, **settings)
        try:
            os.replace(place, kept)
        except OSError:  # another process was first
            if not kept.exists():
                raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    forget_oldest(folder, LARGEST_BYTES)
    return read_table(kept), how


def write_table(
    place: Path,
    key: Mapping[str, Any],
    backbone: Any,
    loader: Iterable[Mapping[str, Tensor]],
    rows: int,
    *,
    dtype: str,
    **extraction: Any,
) -> None:
    """Part by part into memory maps while features are made, so that memory holds one batch of them."""
    columns: dict[str, np.memmap] = {}
    filled = 0
    for parts, batch in embedded(lambda samples: parts_of(backbone, samples), loader, **extraction):
        answer = {name: part.float().cpu().numpy() for name, part in parts.items()}
        if dtype == "float16":
            check_range(answer)
        answer |= {"labels": batch["label"].numpy(), "index": batch["index"].numpy()}
        for name, values in answer.items():
            if name not in columns:
                kind = np.dtype(dtype) if name in parts else values.dtype
                columns[name] = np.lib.format.open_memmap(
                    file_of(place, name), "w+", dtype=kind, shape=(rows, *values.shape[1:])
                )
            columns[name][filled : filled + len(values)] = values
        filled += len(batch["index"])
    if not filled:
        raise nothing_to_embed()
    names = [name for name in columns if name not in ("labels", "index")]
    while columns:
        name, column = columns.popitem()
        column.flush()
        if filled < rows:  # some samples were broken
            whole = np.array(column[:filled])
            del column
            np.save(file_of(place, name), whole)
    about = {"key": key, "parts": names, "rows": filled}
    (place / "about.json").write_text(json.dumps(about, indent=1))
    for file in place.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def read_table(place: Path, in_memory: bool = False) -> FeatureTable:
    """Raises OSError, ValueError or KeyError where the folder is not what `write_table` leaves."""
    about = json.loads((place / "about.json").read_text())
    rows = about["rows"]

    def column(name: str) -> Tensor:
        # "c": pages are the file's until they are written to, which they never are; torch wants them writable
        values = np.load(file_of(place, name), mmap_mode=None if in_memory else "c", allow_pickle=False)
        if len(values) != rows:
            raise ValueError(f"{file_of(place, name)} has {len(values)} rows of {rows}.")
        return torch.from_numpy(values)

    labels, index = column("labels"), column("index")
    return FeatureTable({name: column(name) for name in about["parts"]}, labels, index)


def file_of(place: Path, name: str) -> Path:
    return place / f"{name}.npy"


def check_range(parts: Mapping[str, np.ndarray]) -> None:
    """Raises UserError for numbers that float16 cannot hold."""
    largest = max(float(np.abs(values).max(initial=0)) for values in parts.values())
    if np.isfinite(largest) and largest > float(np.finfo(np.float16).max):
        raise UserError(f"features reach {largest:.3g}, and float16 ends at 65504. Keep them as float32.")


def forget_oldest(folder: Path, largest_bytes: int) -> None:
    """Removes the tables that were not used for longest, until the rest take no more than `largest_bytes`; the last one
    used stays."""
    tables = [path for path in folder.iterdir() if not path.name.startswith(".")]
    tables.sort(key=lambda path: path.stat().st_mtime)
    left = sum(file.stat().st_size for path in tables for file in path.iterdir())
    for path in tables[:-1]:
        if left <= largest_bytes:
            break
        left -= sum(file.stat().st_size for file in path.iterdir())
        shutil.rmtree(path, ignore_errors=True)
