"""Which samples a rank sees in which step: a pure function of the seed and of the steps done."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ssd.data import randomness
from ssd.errors import UserError

NO_SAMPLE = -1  # stands where the index of a sample stands in keys of per-sample randomness


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch that draws every sample once. (length,) int64"""
    return randomness.generator(seed, epoch, NO_SAMPLE).permutation(length)


def drawn_for(place: Sequence[int], variants: int | None) -> tuple[int, ...]:
    """What the views of a place are drawn for: itself, or (variant, index) where each sample has so many fixed looks.

    Epoch e then shows every sample as epoch e mod `variants` does, and a sample that an epoch draws again in the look that
    follows.
    """
    if variants is None:
        return tuple(place)
    epoch, index, *turn = place
    return (epoch + sum(turn)) % variants, index


class Draws:
    """Which samples of `length` an epoch draws, and in which order: a pure function of (seed, epoch).

    This one draws every sample once. Rules that choose derive from it (`ssd/data/sampling.py`).

    Attributes:
        size: how many samples an epoch draws, the same for every epoch.
        repeats: whether an epoch may draw a sample more than once.
    """

    repeats = False

    def __init__(self, length: int, size: int | None = None):
        self.length = length
        self.size = length if size is None else size
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """Places of the samples drawn. (size,) int64"""
        return permutation(self.length, seed, epoch)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """`rows`, made once for the epoch that was asked for last. Not to be written to."""
        if self._kept is None or self._kept[0] != (seed, epoch):
            rows = self.rows(seed, epoch)
            rows.flags.writeable = False
            self._kept = (seed, epoch), rows
        return self._kept[1]

    def following(self, seed: int, epoch: int, index: int, turn: int = 0) -> np.ndarray:
        """What is drawn after the draw number `turn` of the sample at `index`, up to that draw again. (size - 1,)"""
        order = self.order(seed, epoch)
        at = int(np.flatnonzero(order == index)[turn])
        return np.roll(order, -at)[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class Chosen(Draws):
    """Some rows of the data and no others, each of them once an epoch.

    Args:
        rows: (M,) places of the samples that are drawn.
    """

    def __init__(self, length: int, rows: np.ndarray):
        super().__init__(length, len(rows))
        self.chosen = rows

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        return self.chosen[permutation(self.size, seed, epoch)]


def turns(order: np.ndarray) -> np.ndarray:
    """How often each entry stands in front of itself: 5 3 5 5 -> 0 0 1 2. (N,) int64"""
    by_sample = np.argsort(order, kind="stable")
    starts = np.flatnonzero(np.diff(order[by_sample], prepend=-1))
    lengths = np.diff(starts, append=len(order))
    found = np.empty(len(order), np.int64)
    found[by_sample] = np.arange(len(order)) - np.repeat(starts, lengths)
    return found


def zero() -> int:
    return 0


class Places(list[tuple[int, ...]]):
    """The places of one batch, and which step of the run it is for.

    A place is `(epoch, index)`, or `(epoch, index, turn)` for a sample that the epoch has drawn `turn` times before,
    whose views are to be others; samplers may put more behind that.
    """

    def __init__(self, places: Iterable[tuple[int, ...]], step: int):
        super().__init__(places)
        self.step = step

    def __reduce__(self):
        return Places, (list(self), self.step)


class EpochSampler(Sampler[Places]):
    """Batches of places of one rank, from the step after the last one done to the end of its epoch.

    Step n of an epoch is draws n G to (n + 1) G of the epoch's order, with G = `batch_size` x
    `world`; rank r takes the r-th of its `world` equal parts. The last draws that fill no step are left
    out of that epoch. `steps_done` is asked at each `iter`, so nothing that workers have prefetched
    counts. The length is that of a whole epoch.

    Args:
        length: samples of the data.
        steps_per_epoch: an epoch ends after so many steps; null = when it has no more.
        draws: which samples an epoch takes; null = every one once.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        steps_done: Callable[[], int] = zero,
        draws: Draws | None = None,
    ):
        self.draws = draws or Draws(length)
        length = self.draws.size
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}. Use 1 or more samples for each process.")
        if length < batch_size * world:
            whole = f"{batch_size * world}" + (f" ({batch_size} on each of {world} processes)" if world > 1 else "")
            most = length // world
            advice = f"Use data.batch_size {most} or smaller" if most else f"Use at most {length} processes"
            samples = "training samples" if type(self.draws) is Draws else "draws of an epoch"
            raise UserError(f"{length} {samples} do not fill one step of {whole}. {advice}, or add samples.")
        self.length, self.batch_size = length, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        self.steps_per_epoch = len(self) if steps_per_epoch is None else min(steps_per_epoch, len(self))
        self.steps_done = steps_done

    def __len__(self) -> int:
        """Steps of a whole epoch, which is what a trainer's own limit is a share of."""
        return self.length // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Places]:
        epoch, start = divmod(self.steps_done(), self.steps_per_epoch)
        order = self.draws.order(self.seed, epoch)
        again = turns(order) if self.draws.repeats else np.zeros_like(order)
        for step in range(start, self.steps_per_epoch):
            first = (step * self.world + self.rank) * self.batch_size
            part = slice(first, first + self.batch_size)
            places = [
                (epoch, index, turn) if turn else (epoch, index)
                for index, turn in zip(order[part].tolist(), again[part].tolist(), strict=True)
            ]
            yield Places(places, epoch * self.steps_per_epoch + step)
