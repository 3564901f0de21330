"""How long the sounds of a folder are, counted once, and batches of sounds that are about as long as one another."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ssd.data.broken import UNREADABLE, BrokenSamples
from ssd.data.media import MediaFiles
from ssd.data.randomness import generator
from ssd.data.sampler import Places, zero
from ssd.data.sound import Sound
from ssd.data.sources import Source, Subset
from ssd.distributed import gather_objects
from ssd.errors import UserError

BIN = 1.1  # the longest of a bin over its shortest
MEMBERS, STEPS = -7, -8  # keys of the shuffles: within a bin, and of the steps


def counted_lengths(files: MediaFiles) -> np.ndarray:
    """(N, 2) int64: samples as recorded and samples a second, both 0 where a file is broken.

    Read from headers once and kept in a hidden file beside the data where one may write there; counted anew when a
    file's size has changed.
    """
    sizes = np.array([size_of(files.describe(index)) for index in range(len(files))], np.int64)
    folder = files.root if os.path.isdir(files.root) else os.path.dirname(files.root)
    kept = Path(folder, f".lengths-{files.fingerprint()[:16]}.npy")
    try:
        known = np.load(kept, allow_pickle=False)
        if known.shape == (len(files), 3) and np.array_equal(known[:, 0], sizes):
            return known[:, 1:]
    except (OSError, ValueError, EOFError):
        pass
    lengths = np.zeros((len(files), 2), np.int64)
    for index in range(len(files)):
        try:
            with Sound(files.open(index)) as sound:
                lengths[index] = sound.length, sound.rate_hz
        except UNREADABLE:
            pass  # stays 0, for which the sample is reported and left out
    unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            np.save(file, np.concatenate([sizes[:, None], lengths], axis=1))
        os.replace(unfinished, kept)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a folder that may only be read
    return lengths


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def rows_in_files(source: Source) -> tuple[MediaFiles, np.ndarray]:
    """The files behind a choice of them, and the place of each chosen one."""
    files, rows = source, np.arange(len(source))
    while not isinstance(files, MediaFiles):
        behind: Any = files
        rows = behind.rows[rows] if isinstance(behind, Subset) else rows
        files = behind.source
    return files, rows


def lengths_at(source: Source, rate_hz: int, broken: BrokenSamples) -> np.ndarray:
    """(N,) int64 samples at `rate_hz` of each sound, 0 for broken ones, which are counted.

    What was broken when lengths were counted is tried again: a disk may have been away, or a reader missing. What one
    process cannot read is broken for all: they would part the sounds into different steps else, and wait for each other.
    """
    files, rows = rows_in_files(source)
    lengths = counted_lengths(files)[rows]
    reasons: dict[int, Exception] = {}
    for index in np.flatnonzero(lengths[:, 0] == 0).tolist():
        try:
            with Sound(files.open(int(rows[index]))) as sound:
                lengths[index] = sound.length, sound.rate_hz
        except UNREADABLE as error:
            reasons[index] = error
    for index in sorted({index for found in gather_objects(list(reasons)) for index in found}):
        lengths[index] = 0
        broken.add(index, reasons.get(index, OSError("another process cannot read it")))
    return -(-lengths[:, 0] * rate_hz // np.maximum(lengths[:, 1], 1))


class LengthSampler(Sampler[Places]):
    """Steps of sounds of about one length, as many as fit into `most` samples on each rank when all are padded.

    Sounds are put into bins by length; within a bin their order, and then the order of the steps, is a function of
    (seed, epoch). How many steps there are and how many sounds each has is the same in every epoch, on every rank. What
    fills no step of its bin goes to the next longer one; fewer than a whole step at the end are left out of an epoch.
    Gives places (epoch, index, 0, samples that the step is padded to).

    Args:
        lengths: (N,) samples of each sound; those of 0 are left out, and longer ones than `most` are cut.
        most: samples of a rank's step, padding included.
        multiple: a rank's sounds in a step are a multiple of this.
        steps_per_epoch: an epoch ends after so many steps; None = when it has no more.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        most: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        multiple: int = 1,
        steps_per_epoch: Callable[[int], int] | None = None,
        steps_done: Callable[[], int] = zero,
    ):
        longest = most // multiple
        self.kept = np.flatnonzero(lengths > 0)
        self.lengths = np.minimum(lengths, longest)
        self.rank, self.world, self.seed, self.steps_done = rank, world, seed, steps_done
        number = np.floor(np.log(np.maximum(self.lengths[self.kept], 1)) / math.log(BIN)).astype(int)
        self.bins = [self.kept[number == each] for each in np.unique(number)]
        self.sizes: list[tuple[int, int]] = []  # of each bin: sounds of a rank's step, and steps
        left = 0
        for members in self.bins:
            size = most // int(self.lengths[members].max()) // multiple * multiple
            steps, left = divmod(left + len(members), size * world)
            self.sizes.append((size, steps))
        self.last = left // world // multiple * multiple  # sounds of a rank in a last, smaller step
        if not len(self):
            raise UserError(
                f"{len(self.kept)} training sounds do not fill one step of {world} processes with {multiple} each. Use fewer "
                "processes or micro_batches, or add sounds."
            )
        self.steps_per_epoch = len(self) if steps_per_epoch is None else steps_per_epoch(len(self))

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return sum(steps for _, steps in self.sizes) + (self.last > 0)

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The sounds of each step of all ranks, in the order of the epoch."""
        left = np.array([], np.int64)
        found: list[np.ndarray] = []
        for number, (members, (size, steps)) in enumerate(zip(self.bins, self.sizes, strict=True)):
            shuffled = members[generator(self.seed, epoch, number, MEMBERS).permutation(len(members))]
            waiting = np.concatenate([left, shuffled])
            whole = size * self.world * steps
            found += np.split(waiting[:whole], steps) if steps else []
            left = waiting[whole:]
        if self.last:
            found.append(left[: self.last * self.world])
        return [found[place] for place in generator(self.seed, epoch, STEPS).permutation(len(found))]

    def __iter__(self) -> Iterator[Places]:
        epoch, start = divmod(self.steps_done(), self.steps_per_epoch)
        for number, step in enumerate(self.steps(epoch)[start : self.steps_per_epoch], start=start):
            padded = int(self.lengths[step].max())
            mine = np.split(step, self.world)[self.rank]
            yield Places([(epoch, index, 0, padded) for index in mine.tolist()], epoch * self.steps_per_epoch + number)
