"""Which samples a rank sees in which step: a pure function of the seed and of the steps done."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from ssd.data import randomness
from ssd.errors import UserError

NO_SAMPLE = -1  # stands where the index of a sample stands in keys of per-sample randomness


@lru_cache(maxsize=1)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. (length,) int64, not to be written to"""
    order = randomness.generator(seed, epoch, NO_SAMPLE).permutation(length)
    order.flags.writeable = False
    return order


def zero() -> int:
    return 0


class Places(list[tuple[int, int]]):
    """The places `(epoch, index)` of one batch, and which step of the run it is for."""

    def __init__(self, places: Iterable[tuple[int, int]], step: int):
        super().__init__(places)
        self.step = step

    def __reduce__(self):
        return Places, (list(self), self.step)


class EpochSampler(Sampler[Places]):
    """Batches of `(epoch, index)` of one rank, from the step after the last one done to the end of its epoch.

    Step n of an epoch is rows n G to (n + 1) G of the epoch's permutation, with G = `batch_size` x
    `world`; rank r takes the r-th of its `world` equal parts. The last rows that fill no step are left
    out of that epoch. `steps_done` is asked at each `iter`, so nothing that workers have prefetched
    counts. The length is that of a whole epoch.

    Args:
        steps_per_epoch: an epoch ends after so many steps; null = when it has no more.
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
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}. Use 1 or more samples for each process.")
        if length < batch_size * world:
            whole = f"{batch_size * world}" + (f" ({batch_size} on each of {world} processes)" if world > 1 else "")
            most = length // world
            advice = f"Use data.batch_size {most} or smaller" if most else f"Use at most {length} processes"
            raise UserError(f"{length} training samples do not fill one step of {whole}. {advice}, or add samples.")
        self.length, self.batch_size = length, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        self.steps_per_epoch = len(self) if steps_per_epoch is None else min(steps_per_epoch, len(self))
        self.steps_done = steps_done

    def __len__(self) -> int:
        """Steps of a whole epoch, which is what a trainer's own limit is a share of."""
        return self.length // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Places]:
        epoch, start = divmod(self.steps_done(), self.steps_per_epoch)
        order = permutation(self.length, self.seed, epoch)
        for step in range(start, self.steps_per_epoch):
            first = (step * self.world + self.rank) * self.batch_size
            places = [(epoch, index) for index in order[first : first + self.batch_size].tolist()]
            yield Places(places, epoch * self.steps_per_epoch + step)
