"""Decoded pictures of a source, kept in memory where they are few enough."""

from collections.abc import Callable
from multiprocessing.context import BaseContext

import numpy as np

from ssd.data.memory import SharedArray
from ssd.data.pictures import decode, eight_bits
from ssd.data.sources import Source

AUTO_BYTES = 2**30


class PictureCache:
    """Arrays (H, W, C) uint8 by number, in one block that all workers fill and read.

    A picture that no longer fits is not kept. Nothing is ever replaced.
    """

    def __init__(self, length: int, capacity_bytes: int, context: BaseContext):
        self._content = SharedArray((capacity_bytes,), np.uint8)
        self._used = SharedArray((1,), np.int64)
        self._entries = SharedArray((length, 4), np.int64)  # end in the block (0 = not there), height, width, channels
        self._lock = context.Lock()

    def get(self, index: int) -> np.ndarray | None:
        end, *shape = self._entries.array[index].tolist()
        if not end:
            return None
        height, width, channels = shape
        return self._content.array[end - height * width * channels : end].reshape(shape)

    def held(self) -> tuple[int, int]:
        """Number of pictures and bytes in it."""
        return int(np.count_nonzero(self._entries.array[:, 0])), int(self._used.array[0])

    @property
    def capacity_bytes(self) -> int:
        return len(self._content.array)

    def put(self, index: int, picture: np.ndarray) -> bool:
        """Whether there was room for it."""
        with self._lock:
            start = int(self._used.array[0])
            end = start + picture.nbytes
            if end > len(self._content.array):
                return False
            self._used.array[0] = end
        self._content.array[start:end] = picture.ravel()
        entry = self._entries.array[index]
        entry[1:] = picture.shape
        # last, and behind the lock's barrier: another process that sees the end sees the picture
        with self._lock:
            entry[0] = end
        return True


class Pictures:
    """The pictures of a source as (H, W, channels) uint8 arrays, not to be written to.

    Args:
        levels: how values of more than 8 bits become 8.
    """

    def __init__(
        self,
        source: Source,
        channels: int,
        cache: PictureCache | None = None,
        levels: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.source, self.channels, self.cache, self.levels = source, channels, cache, levels or eight_bits

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises BrokenPicture, or OSError where the file cannot be read."""
        if self.cache is None:
            return decode(self.source.open(index), self.channels, self.levels)
        picture = self.cache.get(index)
        if picture is None:
            picture = decode(self.source.open(index), self.channels, self.levels)
            self.cache.put(index, picture)
        return picture
