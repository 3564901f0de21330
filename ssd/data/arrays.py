"""Pictures in NumPy arrays: a stack of them in one file, mapped and not read."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ssd.data.folder import MOST_CHANNELS
from ssd.data.memory import SharedArray
from ssd.errors import UserError

SUFFIXES = (".npy", ".npz")
PICTURES = ("images", "pictures", "x", "x_train", "data", "arr_0")
LABELS = ("labels", "label", "y", "y_train", "targets", "target")
SAMPLED = 64  # pictures that the fingerprint looks into


class ArraySource:
    """A stack of pictures, (N, H, W), (N, H, W, C) or (N, C, H, W) with C up to 16, of one `.npy` or `.npz` file.

    A `.npy` is mapped, so that processes share what was read and no more is read than is asked for; its labels are
    the file beside it that ends in `-labels.npy` or `_labels.npy`. A `.npz` is read whole, its pictures by one of the
    names `images`, `pictures`, `x`, `data`, its labels by `labels`, `y` or `targets`. Raises UserError for other shapes.
    """

    def __init__(self, path: str | Path, labels: bool | str = "auto"):
        self.path = Path(path)
        self.classes: list[str] | None = None
        self._shared: SharedArray | None = None
        self._mapped: np.ndarray | None = None
        try:
            pictures, found = self._read_npz() if self.path.suffix == ".npz" else self._map_npy()
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"'{path}' cannot be read as a NumPy file: {error}. Write it again.") from None
        if pictures.ndim == 4 and pictures.shape[1] <= MOST_CHANNELS < pictures.shape[3]:
            self._channels_first = True
        elif pictures.ndim in (3, 4):
            self._channels_first = False
        else:
            raise UserError(
                f"'{path}' holds an array of shape {pictures.shape}. Give (N, height, width), or that with channels."
            )
        self._length = len(pictures)
        if not self._length:
            raise UserError(f"'{path}' holds no pictures: its shape is {pictures.shape}.")
        self._labels = None
        if labels is not False and found is not None:
            if found.shape != (self._length,) or found.dtype.kind not in "iu":
                raise UserError(
                    f"labels of '{path}' are {found.dtype} of shape {found.shape}. Give {self._length} whole numbers."
                )
            self._labels = SharedArray.of(found.astype(np.int64))

    def _read_npz(self) -> tuple[np.ndarray, np.ndarray | None]:
        with np.load(self.path, allow_pickle=False) as file:
            name = next((name for name in PICTURES if name in file), None)
            if name is None:
                raise UserError(
                    f"'{self.path}' holds {', '.join(file.files)} and no pictures under one of {', '.join(PICTURES)}."
                )
            labels = next((file[name].squeeze() for name in LABELS if name in file), None)
            self._shared = SharedArray.of(file[name])
        return self._shared.array, labels

    def _map_npy(self) -> tuple[np.ndarray, np.ndarray | None]:
        beside = [self.path.with_name(f"{self.path.stem}{mark}labels.npy") for mark in "-_"]
        labels = next((np.load(file, allow_pickle=False) for file in beside if file.is_file()), None)
        return self._array(), labels

    def _array(self) -> np.ndarray:
        if self._shared is not None:
            return self._shared.array
        if self._mapped is None:
            self._mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._mapped

    def __len__(self) -> int:
        return self._length

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> np.ndarray:
        picture = self._array()[index]
        return np.ascontiguousarray(picture.transpose(1, 2, 0) if self._channels_first else picture)

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        return f"{self.path}, picture {index}"

    def fingerprint(self) -> str:
        """Of the shape, the labels and a few pictures."""
        array = self._array()
        state = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
        if self._labels is not None:
            state.update(self._labels.array.data)
        for index in np.linspace(0, self._length - 1, min(SAMPLED, self._length)).astype(int).tolist():
            state.update(np.ascontiguousarray(array[index]).data)
        return state.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}
