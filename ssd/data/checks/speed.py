"""How fast a loader gives pictures, and with how many workers."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

ENOUGH = 0.9  # of the best speed: more workers that bring less than a tenth are not worth their memory


@dataclass(frozen=True)
class Speed:
    """What a loader with so many workers gave."""

    workers: int
    pictures_per_s: float
    first_batch_s: float


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4, 8, ... up to the cores, and the cores themselves."""
    return sorted({0, cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)})


def measure(loader_of: Callable[[int], Any], counts: Sequence[int], seconds: float) -> list[Speed]:
    """Each count's loader of training batches, run for about so many seconds behind its first batch, epoch after epoch.

    `loader_of` makes a loader of batches that have a length, for a number of workers.
    """
    found = []
    for count in counts:
        began = time.perf_counter()
        loader = loader_of(count)
        batches = endless(loader)
        next(batches)
        first = time.perf_counter()
        pictures, now = 0, first
        while pictures == 0 or now - first < seconds:
            pictures += len(next(batches))
            now = time.perf_counter()
        found.append(Speed(count, pictures / (now - first), first - began))
        # its processes end here, before the next ones start
        batches.close()
        del batches, loader
    return found


def endless(loader: Any) -> Generator[Any, None, None]:
    while True:
        yield from loader


def recommended(speeds: Sequence[Speed]) -> int:
    """The fewest workers that give nine tenths of the best speed."""
    best = max(speed.pictures_per_s for speed in speeds)
    return min(speed.workers for speed in speeds if speed.pictures_per_s >= ENOUGH * best)
