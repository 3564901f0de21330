"""Arrays that worker processes map instead of copying."""

import ctypes
import multiprocessing
from typing import Any

import numpy as np


class SharedArray:
    """A zeroed array in memory that forked and spawned workers see as one and the same.

    Under spawn only a handle travels, never the content; pickling it for anything else than the start
    of a process is a RuntimeError. Use `array` to read and write; nothing locks it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = shape, np.dtype(dtype)
        size = int(np.prod(shape)) * self.dtype.itemsize
        self._block = multiprocessing.RawArray(ctypes.c_uint8, max(1, size))
        self._view: np.ndarray | None = None

    @classmethod
    def of(cls, content: np.ndarray) -> "SharedArray":
        shared = cls(content.shape, content.dtype)
        shared.array[...] = content
        return shared

    @property
    def array(self) -> np.ndarray:
        if self._view is None:
            count = int(np.prod(self.shape))
            self._view = np.frombuffer(memoryview(self._block), self.dtype, count).reshape(self.shape)
        return self._view

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}


class ByteTable:
    """Many byte strings end to end in one block: a million paths take tens of megabytes, not objects."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        """`content` (total,) uint8 and the end of each string in it, (N,) int64."""
        self._content = SharedArray.of(content)
        self._ends = SharedArray.of(ends)

    @classmethod
    def of(cls, strings: list[bytes]) -> "ByteTable":
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        return cls(np.frombuffer(b"".join(strings), np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        return self._ends.shape[0]

    def __getitem__(self, index: int) -> bytes:
        ends = self._ends.array
        start = ends[index - 1] if index else 0
        return self._content.array[start : ends[index]].tobytes()

    def content(self) -> np.ndarray:
        return self._content.array

    def ends(self) -> np.ndarray:
        return self._ends.array
