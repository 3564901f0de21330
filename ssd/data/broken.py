"""Samples that cannot be read: counted over all workers, named once each, and too many stop the run."""

import logging
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import TypeVar

import numpy as np

from ssd.data.memory import SharedArray
from ssd.data.sampler import Draws
from ssd.data.sources import Source
from ssd.errors import BrokenSample, UserError

log = logging.getLogger(__name__)

UNREADABLE = (BrokenSample, OSError)
SHOWN = 3

T = TypeVar("T")


class BrokenSamples:
    """Which samples of a source have turned out to be broken, in whichever process.

    Args:
        source: what they belong to.
        max_share: of the source's samples, in [0, 1]; more than that raises UserError in `add`.
        context: the kind of process that will share this, of `multiprocessing`.
        word: what messages call a sample.
    """

    def __init__(self, source: Source, max_share: float, context: BaseContext, word: str = "sample"):
        if not 0 <= max_share <= 1:
            raise UserError(f"max_broken_share is {max_share}. It is a share of all samples, from 0 to 1.")
        self.source, self.max_share, self.word = source, max_share, word
        self._flags = SharedArray((len(source),), np.uint8)
        self._lock = context.Lock()

    def __len__(self) -> int:
        return int(np.count_nonzero(self._flags.array))

    def add(self, index: int, reason: Exception) -> None:
        with self._lock:
            known = self._flags.array[index]
            self._flags.array[index] = 1
        if not known:
            log.warning("broken %s %s: %s", self.word, self.source.describe(index), reason)
        self.check()

    def check(self) -> None:
        """Raises UserError when more samples are broken than `max_share` allows."""
        count, length = len(self), len(self.source)
        if count <= self.max_share * length and count < length:
            return
        first = np.flatnonzero(self._flags.array)[:SHOWN].tolist()
        shown = ", ".join(self.source.describe(index) for index in first)
        if count == length:
            raise UserError(
                f"none of the {length} {self.word}s can be read, for instance {shown}. Are they {self.word}s?"
            )
        raise UserError(
            f"{count} of {length} {self.word}s cannot be read, more than max_broken_share = {self.max_share:g} allows: "
            f"{shown}{', ...' if count > SHOWN else ''}. Mend or remove them, or raise data.max_broken_share."
        )


def readable(
    read: Callable[[int], T], broken: BrokenSamples, draws: Draws, seed: int, epoch: int, index: int, turn: int = 0
) -> tuple[int, T]:
    """The sample at `index`, or the next one that the epoch draws and that can be read: its number and what `read` gives.

    `turn` is how often the epoch has drawn the sample before. `read` raises BrokenSample or OSError. Raises UserError when
    more samples are broken than may be.
    """
    try:
        return index, read(index)
    except UNREADABLE as error:
        broken.add(index, error)
    for candidate in draws.following(seed, epoch, index, turn).tolist():
        try:
            return candidate, read(candidate)
        except UNREADABLE as error:
            broken.add(candidate, error)
    raise UserError(
        f"none of the {broken.word}s that this epoch draws can be read. Mend or remove the ones that were named, or draw "
        "more of the data (data.sampling)."
    )
