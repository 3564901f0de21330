"""Every picture of a source looked at once: size, what it shows, and whether it can be read at all."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ssd.data.broken import UNREADABLE
from ssd.data.cache import Pictures
from ssd.data.checks.hashes import THUMBNAIL, perceptual_hash, pixel_hash, small_picture, thumbnail
from ssd.data.sources import Source
from ssd.data.statistics import moments, normalisation, thinned
from ssd.errors import UserError

CHUNK = 64  # pictures that a process takes at a time
FLAT = 8  # grey levels between darkest and brightest pixel, in each channel, of a picture that shows nothing
COLOURLESS = 4  # grey levels between channels of a picture without colour

# 91 bytes a picture: a million take less than 100 MB, and no objects
RECORD = np.dtype(
    [
        ("pixels", np.uint64),
        ("seen", np.uint64),
        ("thumbnail", np.uint8, THUMBNAIL**2),
        ("height", np.int32),
        ("width", np.int32),
        ("readable", bool),
        ("blank", bool),
        ("grey", bool),
    ]
)


@dataclass
class Examined:
    """What was seen of a source.

    Args:
        records: (N,) `RECORD`, one for each picture, zeros for those that cannot be read.
        reasons: why, by number, for each of these.
        mean, std: of each channel in [0, 1], every readable picture counting alike; empty where none is.
    """

    source: Source
    records: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> np.ndarray:
        """(R, 2) height and width of readable pictures, px."""
        readable = self.records[self.records["readable"]]
        return np.stack([readable["height"], readable["width"]], 1)

    def names(self, rows: np.ndarray, most: int = 3) -> list[str]:
        return [self.source.describe(int(row)) for row in rows[:most]]


@dataclass
class Seen:
    """What was seen of some pictures in a row."""

    records: np.ndarray
    reasons: dict[int, str]
    moments: tuple[np.ndarray, np.ndarray] | None


def examine(pictures: Pictures, workers: int, context: BaseContext, progress: str = "looking at pictures") -> Examined:
    """Each picture decoded once, in `workers` processes, 0 for this one. The result does not depend on them.

    Raises UserError where a process ends by force.
    """
    examined = Examined(pictures.source, np.zeros(len(pictures), RECORD))
    starts = range(0, len(pictures), CHUNK)
    total: tuple[np.ndarray, np.ndarray] | None = None
    with chunks(pictures, starts, workers, context) as results:
        console = Console(stderr=True)
        shown = track(results, progress, len(starts), console=console, disable=not sys.stderr.isatty(), transient=True)
        for start, seen in zip(starts, shown):
            examined.records[start : start + len(seen.records)] = seen.records
            examined.reasons.update(seen.reasons)
            if seen.moments is not None:
                total = seen.moments if total is None else (total[0] + seen.moments[0], total[1] + seen.moments[1])
    if total is not None:
        count = int(examined.records["readable"].sum())
        examined.mean, examined.std = normalisation(total[0] / count, total[1] / count)
    return examined


@contextlib.contextmanager
def chunks(pictures: Pictures, starts: range, workers: int, context: BaseContext) -> Iterator[Iterator[Seen]]:
    """Results for the pictures from each start on, in this order, by processes that end with the `with`."""
    if not workers:
        yield map(Examiner(pictures), starts)
        return
    with contextlib.suppress(*UNREADABLE):
        # what a source reads when it is first asked is then shared by the processes that start afterwards
        pictures.source.open(0)
    pool = ProcessPoolExecutor(workers, context, start, (pictures,))
    try:
        yield pool.map(examined_here, starts)
    except BrokenProcessPool:
        raise UserError(
            "a process that decodes was ended by force, most often for lack of memory. Use fewer --workers, or "
            "--workers 0 to see which picture it is."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


here: Callable[[int], Seen]


def start(pictures: Pictures) -> None:
    """Of a process: what it looks at, one thread, and no traceback of its own when the user interrupts."""
    global here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    here = Examiner(pictures)


def examined_here(start: int) -> Seen:
    return here(start)


class Examiner:
    """Looks at the `CHUNK` pictures from a number on."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __call__(self, start: int) -> Seen:
        records = np.zeros(min(CHUNK, len(self.pictures) - start), RECORD)
        reasons: dict[int, str] = {}
        total: tuple[np.ndarray, np.ndarray] | None = None
        for place, record in enumerate(records):
            try:
                picture = self.pictures[start + place]
            except UNREADABLE as error:
                reasons[start + place] = str(error)
                continue
            first, second = note(picture, record)
            total = (first, second) if total is None else (total[0] + first, total[1] + second)
        return Seen(records, reasons, total)


def note(picture: np.ndarray, record: np.void) -> tuple[np.ndarray, np.ndarray]:
    """Fills in the record of a picture (H, W, C) uint8, and gives the moments of its channels."""
    some = thinned(picture)
    small = small_picture(picture)
    record["height"], record["width"] = picture.shape[:2]
    record["readable"] = True
    # all pixels only where some of them say so
    record["blank"] = flat(some) and flat(picture.reshape(-1, picture.shape[2]))
    record["grey"] = picture.shape[2] == 3 and colourless(some)
    record["pixels"], record["seen"] = pixel_hash(picture), perceptual_hash(small)
    record["thumbnail"] = thumbnail(small)
    return moments(some)


def flat(pixels: np.ndarray) -> bool:
    """Whether each channel of (P, C) has about one value."""
    return all(int(channel.max()) - int(channel.min()) <= FLAT for channel in pixels.T)


def colourless(pixels: np.ndarray) -> bool:
    """Whether the channels of (P, 3) are about equal in each pixel."""
    red, green, blue = pixels.T.astype(np.int16)
    return all(
        int(np.abs(one - other).max()) <= COLOURLESS for one, other in ((red, green), (green, blue), (red, blue))
    )
