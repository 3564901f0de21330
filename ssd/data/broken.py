"""Pictures that cannot be read: counted over all workers, named once each, and too many stop the run."""

import logging
from multiprocessing.context import BaseContext

import numpy as np

from ssd.data.memory import SharedArray
from ssd.data.pictures import BrokenPicture
from ssd.data.sources import Source
from ssd.errors import UserError

log = logging.getLogger(__name__)

UNREADABLE = (BrokenPicture, OSError)
SHOWN = 3


class BrokenPictures:
    """Which pictures of a source have turned out to be broken, in whichever process.

    Args:
        source: what they belong to.
        max_share: of the source's pictures, in [0, 1]; more than that raises UserError in `add`.
        context: the kind of process that will share this, of `multiprocessing`.
    """

    def __init__(self, source: Source, max_share: float, context: BaseContext):
        if not 0 <= max_share <= 1:
            raise UserError(f"max_broken_share is {max_share}. It is a share of all pictures, from 0 to 1.")
        self.source, self.max_share = source, max_share
        self._flags = SharedArray((len(source),), np.uint8)
        self._lock = context.Lock()

    def __len__(self) -> int:
        return int(np.count_nonzero(self._flags.array))

    def add(self, index: int, reason: Exception) -> None:
        with self._lock:
            known = self._flags.array[index]
            self._flags.array[index] = 1
        if not known:
            log.warning("broken picture %s: %s", self.source.describe(index), reason)
        self.check()

    def check(self) -> None:
        """Raises UserError when more pictures are broken than `max_share` allows."""
        count, length = len(self), len(self.source)
        if count <= self.max_share * length and count < length:
            return
        first = np.flatnonzero(self._flags.array)[:SHOWN].tolist()
        shown = ", ".join(self.source.describe(index) for index in first)
        if count == length:
            raise UserError(f"none of the {length} pictures can be read, for instance {shown}. Are they pictures?")
        raise UserError(
            f"{count} of {length} pictures cannot be read, more than max_broken_share = {self.max_share:g} allows: "
            f"{shown}{', ...' if count > SHOWN else ''}. Mend or remove them, or raise data.max_broken_share."
        )
