"""Decoded clips of a source, kept in memory where they are few enough."""

from multiprocessing.context import BaseContext

import numpy as np

from ssd.data.cache import PictureCache
from ssd.data.timeline import Timeline


class ClipCache:
    """Decoded clips with their timelines, in memory that all workers share; what no longer fits is not kept."""

    def __init__(self, length: int, capacity_bytes: int, context: BaseContext):
        self._frames = PictureCache(length, capacity_bytes, context)
        # times and times of keyframes, 16 bytes a frame: small beside the frames
        self._times = PictureCache(length, capacity_bytes // 16 + 2**16, context)

    def get(self, index: int) -> tuple[Timeline, np.ndarray] | None:
        rows = self._frames.get(index)
        packed = self._times.get(index)
        if rows is None or packed is None:
            return None
        timeline = unpack_timeline(packed.ravel())
        return timeline, rows.reshape(len(timeline), -1, *rows.shape[1:])

    def put(self, index: int, timeline: Timeline, frames: np.ndarray) -> bool:
        """Whether there was room for it."""
        times = pack_timeline(timeline)[:, None, None]
        return self._frames.put(index, frames.reshape(-1, *frames.shape[2:])) and self._times.put(index, times)


def pack_timeline(timeline: Timeline) -> np.ndarray:
    """(bytes,) uint8"""
    head = np.array([timeline.unit_s, timeline.last_s, len(timeline.times), timeline.timed], np.float64)
    whole = [head.view(np.uint8), timeline.times.view(np.uint8), timeline.keys.astype(np.int64).view(np.uint8)]
    return np.concatenate(whole)


def unpack_timeline(packed: np.ndarray) -> Timeline:
    words = np.frombuffer(packed.tobytes(), np.int64)
    unit_s, last_s, count, timed = words[:4].view(np.float64).tolist()
    places = words[4:]
    return Timeline(places[: int(count)], unit_s, places[int(count) :], last_s, bool(timed))
