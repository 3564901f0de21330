"""How sure an accuracy, or the difference of two, is: bootstrap over test samples and over repeated draws.

Answers come as (R, Q): whether each of Q test samples was answered rightly in each of R repetitions (draws of labels,
seeds). Both are chosen anew with replacement, rows and columns apart, because what a sample is worth repeats over rows and
what a draw is worth repeats over columns (Owen, "The pigeonhole bootstrap", 2007).
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ssd.data.randomness import generator

RESAMPLES = 2000
LEVEL = 0.95
NUMBERS_AT_ONCE = 2**20  # 8 MiB a table: it stays in a near cache


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of what chance would make of a value.

    Args:
        value: as measured.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Of a difference: whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def accuracy_interval(correct: Tensor, seed: int = 0) -> Interval:
    """Of the share of right answers, (R, Q) bool.

    Two right and two wrong answers are added before samples are chosen anew, so that all right of few is not taken for
    certainty (Agresti and Coull 1998): with one row this is close to Wilson's interval.
    """
    low, high = bootstrap(correct.double(), [1.0, 1.0, 0.0, 0.0], seed)
    return Interval(float(correct.double().mean()), low, high)


def difference_interval(correct: Tensor, other: Tensor, seed: int = 0) -> Interval:
    """Of the share of right answers less that of another, sample by sample, (R, Q) bool both.

    Where both have been repeated, the rows belong together (the same draw of labels); a single row stands beside all of
    the other's. One sample that only the one answers and one that only the other answers are added (Bonett and Price
    2012): without them four such samples on one side and none on the other would already count as proof.
    """
    if len(correct) != len(other) and 1 not in (len(correct), len(other)):
        raise ValueError(f"{len(correct)} repetitions against {len(other)}: give as many, or one.")
    difference = correct.double() - other.double()
    low, high = bootstrap(difference, [1.0, -1.0], seed)
    return Interval(float(difference.mean()), low, high)


def bootstrap(values: Tensor, added: list[float], seed: int) -> tuple[float, float]:
    """The middle 95 % of the means of (R, Q) `values` with samples of the `added` values, rows and columns chosen anew."""
    table = np.concatenate([values.numpy(), np.tile(added, (len(values), 1))], axis=1)
    rows, columns = table.shape
    chance = generator(seed, rows, columns)
    means = []
    for start in range(0, RESAMPLES, step := max(1, NUMBERS_AT_ONCE // columns)):
        count = min(step, RESAMPLES - start)
        by_column = chosen(chance, count, rows) @ table  # (S, Q)
        means.append((by_column * chosen(chance, count, columns)).sum(1) / (rows * columns))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def chosen(chance: np.random.Generator, times: int, count: int) -> np.ndarray:
    """How often each of `count` things is drawn in as many draws with replacement, (times, count)."""
    drawn = chance.integers(0, count, (times, count)) + count * np.arange(times)[:, None]
    return np.bincount(drawn.ravel(), minlength=times * count).reshape(times, count)
