"""Data sets of other libraries: torchvision's by name, and those of Hugging Face's `datasets`."""

import hashlib
import inspect
import os
from collections import Counter
from typing import Any

import numpy as np

from ssd.data.memory import SharedArray
from ssd.errors import UserError

HELD_OUT = ("test", "val", "valid", "validation")


class TorchvisionSource:
    """A data set of `torchvision.datasets` that lies on this machine.

    Args:
        name: of the class, for instance "CIFAR10" or "STL10".
        root: folder in which torchvision expects or expects to put it.
        split: "train" or "test", or a name that the class knows ("unlabeled" of STL10).
        download: fetch it where it is missing.
    """

    def __init__(self, name: str, root: str, split: str = "train", download: bool = False):
        import torchvision.datasets

        made = getattr(torchvision.datasets, name, None)
        if not inspect.isclass(made):
            raise UserError(f"torchvision.datasets has no '{name}'. Its names are those of classes, such as CIFAR10.")
        parameters = inspect.signature(made).parameters
        arguments: dict[str, Any] = {"root": os.path.expanduser(root)}
        if "train" in parameters:
            arguments["train"] = split not in HELD_OUT
        elif "split" in parameters:
            arguments["split"] = split
        elif "image_set" in parameters:
            arguments["image_set"] = split
        if "download" in parameters:
            arguments["download"] = download
        try:
            self._set: Any = made(**arguments)
        except (RuntimeError, FileNotFoundError, ValueError, OSError) as error:
            raise UserError(
                f"torchvision:{name} cannot be opened in '{root}': {error}. Give the folder it lies in, as "
                f"torchvision:{name}:FOLDER; fetch it there with torchvision.datasets.{name}(FOLDER, download=True)."
            ) from None
        self.name = f"torchvision:{name}:{root}:{split}"
        classes = getattr(self._set, "classes", None)
        self.classes: list[str] | None = None if classes is None else different_names([str(name) for name in classes])
        labels: Any = next(
            (getattr(self._set, key) for key in ("targets", "labels", "_labels") if hasattr(self._set, key)), None
        )
        self._labels: SharedArray | None = None
        if labels is not None and len(labels) == len(self):
            numbers = np.asarray(labels)
            if numbers.ndim == 1 and numbers.dtype.kind in "iu" and numbers.max() >= 0:
                self._labels = SharedArray.of(numbers.astype(np.int64))

    def __len__(self) -> int:
        return len(self._set)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> np.ndarray:
        picture = self._set[index][0]
        return np.asarray(picture.convert("RGB") if getattr(picture, "mode", "RGB") not in ("L", "RGB") else picture)

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        return f"{self.name}, picture {index}"

    def fingerprint(self) -> str:
        state = hashlib.sha256(f"{type(self._set).__name__} {len(self)}".encode())
        if self._labels is not None:
            state.update(self._labels.array.data)
        for index in range(0, len(self), max(1, len(self) // 16)):
            state.update(np.ascontiguousarray(self.open(index)).data)
        return state.hexdigest()


def different_names(names: list[str]) -> list[str]:
    """Names that occur more than once (ImageNet's crane, a bird and a machine) with the number of their class behind."""
    times = Counter(names)
    return [f"{name} {place}" if times[name] > 1 else name for place, name in enumerate(names)]


class HuggingFaceSource:
    """A data set of Hugging Face's `datasets`: a folder that `save_to_disk` wrote, or a name that it finds or fetches.

    Args:
        name: folder or name.
        split: of a data set with several.
        image_column: null = "image", "img", or the only column of pictures.
        label_column: null = "label", "labels" or "fine_label", where there is one.
    """

    def __init__(
        self, name: str, split: str = "train", image_column: str | None = None, label_column: str | None = None
    ):
        try:
            import datasets
        except ImportError:
            raise UserError(f"hf:{name} needs the package datasets. Install it with pip install 'ssd[hub]'.") from None
        try:
            found = datasets.load_from_disk(name) if os.path.isdir(name) else datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub client raises many kinds
            raise UserError(
                f"hf:{name} cannot be opened: {str(error).splitlines()[0]}. Give a folder that save_to_disk wrote, or a name "
                "that is in the cache or can be fetched from here."
            ) from None
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise UserError(f"hf:{name} has no part '{split}'. It has {', '.join(found)}: hf:{name}:PART.")
            found = found[split]
        pictures = [column for column, kind in found.features.items() if isinstance(kind, datasets.Image)]
        column = image_column or next((c for c in ("image", "img") if c in pictures), pictures[0] if pictures else None)
        if column not in pictures or (len(pictures) > 1 and image_column is None and column not in ("image", "img")):
            raise UserError(
                f"hf:{name} has {', '.join(found.features)}, of which pictures: {', '.join(pictures) or 'none'}."
            )
        self.name = f"hf:{name}:{split}"
        label = label_column or next((c for c in ("label", "labels", "fine_label") if c in found.features), None)
        self.classes: list[str] | None = None
        self._labels: SharedArray | None = None
        if label is not None:
            kind = found.features[label]
            self.classes = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
            numbers = np.asarray(found.with_format("numpy")[label])
            if numbers.ndim == 1 and numbers.dtype.kind in "iu":
                self._labels = SharedArray.of(numbers.astype(np.int64))
        self._set = found.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._print = str(found._fingerprint)

    def __len__(self) -> int:
        return len(self._set)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> bytes:
        entry = self._set[index][self._column]
        if entry["bytes"] is not None:
            return entry["bytes"]
        with open(entry["path"], "rb") as file:
            return file.read()

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def fingerprint(self) -> str:
        """That of `datasets`, which follows the content and what was done to it."""
        return hashlib.sha256(f"{self._print} {len(self)}".encode()).hexdigest()


def open_collection(text: str) -> Any:
    """The source that `torchvision:NAME:FOLDER[:SPLIT]` or `hf:NAME[:SPLIT]` stands for."""
    kind, _, rest = text.partition(":")
    if kind == "torchvision":
        name, _, place = rest.partition(":")
        root, _, split = place.partition(":")
        if not name or not root:
            raise UserError(
                f"'{text}' lacks a part. Write torchvision:CIFAR10:FOLDER or torchvision:STL10:FOLDER:unlabeled."
            )
        return TorchvisionSource(name, root, split or "train")
    name, _, split = rest.rpartition(":") if ":" in rest else (rest, "", "train")
    return HuggingFaceSource(name, split)
