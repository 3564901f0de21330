"""Stored targets on disk: shards that are written one by one, so that a stop costs one of them, and read row by row.

A folder holds `manifest.json`, which says what the targets are of, and for each shard one `.npy` file a name, (samples, variants,
V, ...), and `shard-NUMBER.json`, written last, by which a shard is known to be whole. Nothing is written twice, so several
processes or machines may fill one folder, each its own shards.

Rows are read by position and not through memory maps: of a file that was cut short a map ends the process, and each holds a
descriptor.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd.batch import Batch
from ssd.cached_targets.identity import differences
from ssd.errors import UserError
from ssd.evaluation.embeddings import written

MANIFEST = "manifest.json"
SHARD_BYTES = 2**28
"""Of all files of a shard together, where samples are not larger."""
OPEN_FILES = 128  # of each process that reads


@dataclass(frozen=True)
class Layout:
    """What is in the files.

    Args:
        rows: name -> shape (V, ...) and type of what is stored of one look at one sample.
        per_shard: samples of each shard but the last.
    """

    samples: int
    variants: int
    rows: Mapping[str, tuple[tuple[int, ...], str]]
    per_shard: int

    @classmethod
    def of(cls, example: Mapping[str, np.ndarray], samples: int, variants: int, per_shard: int | None) -> "Layout":
        """For answers like these (B, V, ...)."""
        rows = {name: (value.shape[1:], value.dtype.name) for name, value in sorted(example.items())}
        each = sum(row_bytes(row) for row in rows.values()) * variants
        return cls(samples, variants, rows, min(samples, per_shard or max(1, SHARD_BYTES // each)))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Layout":
        rows = {name: (tuple(row["shape"]), str(row["dtype"])) for name, row in record["rows"].items()}
        return cls(int(record["samples"]), int(record["variants"]), rows, int(record["per_shard"]))

    def record(self) -> dict[str, Any]:
        rows = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in self.rows.items()}
        return {"samples": self.samples, "variants": self.variants, "per_shard": self.per_shard, "rows": rows}

    @property
    def bytes_per_look(self) -> int:
        return sum(row_bytes(row) for row in self.rows.values())

    @property
    def shards(self) -> int:
        return -(-self.samples // self.per_shard)

    def samples_of(self, shard: int) -> range:
        first = shard * self.per_shard
        return range(first, min(first + self.per_shard, self.samples))


def row_bytes(row: tuple[tuple[int, ...], str]) -> int:
    shape, dtype = row
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


class TargetFolder:
    """A folder of stored targets. Raises UserError where there is none, or what it says of itself cannot be read.

    Attributes:
        identity: what the targets are of, as `identity_of` says it.
        form: how they are stored, as `Form.record` says it.
        made: with what they were made; differences in it are no mistake.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise UserError(
                f"{path} holds no stored targets ({MANIFEST} is not there). Make them with ssd cache --out {path}."
            )
        try:
            content = json.loads(manifest.read_text())
            self.identity, self.form, self.made = content["identity"], content["form"], content["made"]
            self.layout = Layout.from_record(content["layout"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{manifest} is not what ssd cache writes. Remove the folder and make it again.") from None
        self._files: OrderedDict[Path, tuple[int, int]] = OrderedDict()
        self._missing: dict[int, frozenset[int]] = {}

    @classmethod
    def begin(
        cls,
        path: str | Path,
        identity: Mapping[str, Any],
        form: Mapping[str, Any],
        layout: Layout,
        made: Mapping[str, Any],
    ) -> "TargetFolder":
        """A folder to fill, or to go on with. Raises UserError for one that holds something else."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            if any(not name.endswith(".unfinished") for name in os.listdir(folder)):
                raise UserError(f"--out {path} holds other files and no stored targets. Give another folder.")
            content = {"identity": identity, "form": form, "layout": layout.record(), "made": made}
            with written(folder / MANIFEST) as file:
                file.write_text(json.dumps(content, indent=1) + "\n")
        found = cls(folder)
        other = found.differences(identity, form)
        if other:
            raise UserError(
                f"--out {path} holds other targets: {'; '.join(other)}. Give another folder, or remove this one."
            )
        if found.layout.rows != layout.rows:
            raise UserError(f"--out {path} holds targets of other shapes. Give another folder, or remove this one.")
        return found

    def differences(self, identity: Mapping[str, Any], form: Mapping[str, Any] | None = None) -> list[str]:
        """What is said otherwise of other targets, in words."""
        there, here = dict(self.identity), json.loads(json.dumps(identity))
        if form is not None:
            there["form"], here["form"] = self.form, dict(form)
        return differences(there, here)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    # ------------------------------------------------------------------ writing

    def file(self, shard: int, name: str) -> Path:
        return self.path / f"shard-{shard:05d}.{name}.npy"

    def note(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.json"

    def fault(self, shard: int, contents: bool = False) -> str | None:
        """What is wrong with a shard: None where it is whole, by the length of its files or, with `contents`, by their hashes."""
        note = self.note(shard)
        if not note.is_file():
            return f"{note.name} is not there"
        try:
            files = json.loads(note.read_text())["files"]
            for name in self.layout.rows:
                path, said = self.file(shard, name), files[name]
                if not path.is_file():
                    return f"{path.name} is not there"
                if path.stat().st_size != said["bytes"]:
                    return f"{path.name} has {path.stat().st_size} bytes of {said['bytes']}"
                if contents and digest_of(path) != said["sha256"]:
                    return f"{path.name} does not hold what was written"
        except (ValueError, KeyError, TypeError):
            return f"{note.name} is not what ssd cache writes"
        return None

    def missing(self, part: int = 0, of: int = 1, contents: bool = False) -> Iterator[int]:
        """Shards of every `of`-th from `part` on that are not whole."""
        for shard in range(part, self.layout.shards, of):
            if self.fault(shard, contents) is not None:
                yield shard

    def check_whole(self) -> None:
        """Raises UserError where a shard is missing or was cut short."""
        faults = [fault for shard in range(self.layout.shards) if (fault := self.fault(shard)) is not None]
        if faults:
            raise UserError(
                f"cached_targets {self.path} is not whole: {len(faults)} of {self.layout.shards} shards are missing or damaged "
                f"({faults[0]}). Run the ssd cache command again, which makes what is missing."
            )

    # ------------------------------------------------------------------ reading

    def read(self, index: Sequence[int], variant: Sequence[int]) -> dict[str, Tensor]:
        """Name -> (V, B, ...) in the stored type, of looks `variant` (B,) at samples `index` (B,). Raises UserError for a look
        that is not stored, and for a file that ends too early."""
        found = {}
        for sample, look in zip(index, variant, strict=True):
            self._check(sample, look)
        for name, (shape, dtype) in self.layout.rows.items():
            out = np.empty((len(index), *shape), dtype)
            for row, (sample, look) in enumerate(zip(index, variant, strict=True)):
                self._read_row(name, sample, look, out[row])
            found[name] = torch.from_numpy(out).transpose(0, 1)
        return found

    def attach(self, batch: Batch) -> Batch:
        """The batch with what is stored of its views."""
        assert batch.variant is not None, "data with fixed looks says which"
        batch.taught = self.read(batch.index.tolist(), batch.variant.tolist())
        return batch

    def _check(self, sample: int, look: int) -> None:
        layout = self.layout
        if not (0 <= sample < layout.samples and 0 <= look < layout.variants):
            raise UserError(
                f"cached_targets {self.path} holds {layout.variants} looks at each of {layout.samples} samples; look {look} at "
                f"sample {sample} is not among them. Make targets of this data with ssd cache."
            )
        if not self.holds(sample):
            note = self.note(sample // layout.per_shard).name
            raise UserError(
                f"cached_targets {self.path} holds nothing of sample {sample}, which could not be read when they were made. "
                f"Remove {note} there and run the ssd cache command again, which makes its shard anew."
            )

    def holds(self, sample: int) -> bool:
        """Whether the sample could be read when its shard was made."""
        shard = sample // self.layout.per_shard
        if shard not in self._missing:
            self._missing[shard] = frozenset(json.loads(self.note(shard).read_text())["missing"])
        return sample not in self._missing[shard]

    def _read_row(self, name: str, sample: int, look: int, out: np.ndarray) -> None:
        shard, row = divmod(sample, self.layout.per_shard)
        path = self.file(shard, name)
        descriptor, start = self._opened(path)
        buffer = memoryview(out.reshape(-1).view(np.uint8).data)
        place, done = start + (row * self.layout.variants + look) * len(buffer), 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], place + done)
            if count == 0:
                raise UserError(
                    f"{path} ends before the targets of sample {sample}. Run the ssd cache command again, which makes it anew."
                )
            done += count

    def _opened(self, path: Path) -> tuple[int, int]:
        """A descriptor of the file and where its numbers begin."""
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1][0])
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        self._files[path] = os.open(path, os.O_RDONLY), start
        return self._files[path]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1][0])

    def __del__(self):
        if "_files" in self.__dict__:
            self.close()


class ShardWriter:
    """One shard while it is made; `finish` gives its files their names.

    Used as a context: what is not finished is removed.
    """

    def __init__(self, folder: TargetFolder, shard: int):
        self.folder, self.shard = folder, shard
        self.samples = folder.layout.samples_of(shard)
        self.missing: set[int] = set()
        self.columns: dict[str, np.memmap] = {}

    def __enter__(self) -> "ShardWriter":
        for name, (shape, dtype) in self.folder.layout.rows.items():
            whole = (len(self.samples), self.folder.layout.variants, *shape)
            file = self._unfinished(name)
            self.columns[name] = np.lib.format.open_memmap(
                file, "w+", dtype=np.dtype(dtype), shape=whole, version=(1, 0)
            )
        return self

    def put(self, sample: int, variant: int, row: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Row `row` of arrays (B, V, ...)."""
        for name, column in self.columns.items():
            column[sample - self.samples.start, variant] = arrays[name][row]

    def finish(self) -> None:
        files = {}
        for name in list(self.columns):
            self.columns.pop(name).flush()
            unfinished, path = self._unfinished(name), self.folder.file(self.shard, name)
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {"bytes": unfinished.stat().st_size, "sha256": digest_of(unfinished)}
            os.replace(unfinished, path)
        with written(self.folder.note(self.shard)) as note:
            note.write_text(json.dumps({"files": files, "missing": sorted(self.missing)}) + "\n")

    def __exit__(self, *error: object) -> None:
        self.columns.clear()
        for name in self.folder.layout.rows:
            self._unfinished(name).unlink(missing_ok=True)

    def _unfinished(self, name: str) -> Path:
        path = self.folder.file(self.shard, name)
        return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
