"""How many tokens are hidden in each crop, spread evenly over the samples of a step."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ssd.masking.recipes import BlockMasks, InverseBlockMasks
    from ssd.masking.scattered import ScatteredMasks

SPREAD = 8  # samples among which masked crops are spread evenly


@lru_cache(maxsize=8)
def strata(views: int, batch: int, share: float) -> np.ndarray:
    """(batch, views) which of the evenly spread shares each crop gets, -1 for a crop that stays whole.

    Samples are taken `SPREAD` at a time, and each of these groups gets its part of the masked crops and of small and
    large shares. So every slice of the batch has nearly the same work, whoever draws it. Not to be written to.
    """
    groups = max(1, -(-batch // SPREAD))
    given = np.full((batch, views), -1)
    for group in range(groups):
        rows = np.arange(group * SPREAD, min((group + 1) * SPREAD, batch))
        # masked crops up to here, so that rounding never adds up
        numbers = np.arange(*(floor(share * views * edge) for edge in (rows[0], rows[-1] + 1)))
        given[rows] = np.concatenate([numbers, np.full(len(rows) * views - len(numbers), -1)]).reshape(len(rows), views)
    masked = int((given >= 0).sum())
    order = np.arange(masked)
    # neighbours in the batch get shares that lie far apart: the k-th of group j gets the (k groups + j)-th
    place = np.full(masked, -1)
    by_group = np.array_split(order, groups)
    rank = np.concatenate([np.arange(len(part)) * groups + j for j, part in enumerate(by_group)]) if masked else order
    place[rank.argsort(kind="stable")] = order
    given[given >= 0] = place[given[given >= 0]]
    given.flags.writeable = False
    return given


def wanted_tokens(
    recipe: "BlockMasks | InverseBlockMasks | ScatteredMasks",
    views: int,
    batch: int,
    tokens: int,
    rng: np.random.Generator,
    upper: bool = False,
) -> np.ndarray:
    """(views, batch) number of tokens to mask in each crop, whole numbers where shares are spread evenly; with `upper`
    those are the upper ends of their parts, not drawn."""
    low, high = recipe.ratio  # type: ignore[misc]
    if not recipe.even:
        masked = rng.random((views, batch)) < recipe.share
        return np.where(masked, rng.uniform(low, high, (views, batch)) * tokens, 0.0)
    given = strata(views, batch, recipe.share)
    # within its group each share may fall to any crop
    whole = batch // SPREAD * SPREAD
    groups = rng.permuted(given[:whole].reshape(-1, SPREAD * views), axis=1).reshape(whole, views)
    rest = rng.permutation(given[whole:].copy().reshape(-1)).reshape(-1, views)
    given = np.concatenate([groups, rest])
    number = max(int((given >= 0).sum()), 1)
    share = low + (high - low) * (given + (1 if upper else rng.random(given.shape))) / number
    return np.where(given >= 0, np.floor(share * tokens + 1e-9), 0.0).T


def most_tokens(
    recipe: "BlockMasks | InverseBlockMasks | ScatteredMasks", views: int, batch: int, tokens: int
) -> np.ndarray:
    """(batch,) bound for sums over whole groups of samples: what is drawn lies anywhere within its group."""
    low, high = recipe.ratio  # type: ignore[misc]
    given = strata(views, batch, recipe.share)
    masked = max(int((given >= 0).sum()), 1)
    most = np.where(given >= 0, np.floor((low + (high - low) * (given + 1) / masked) * tokens + 1e-9), 0).sum(1)
    for first in range(0, batch, SPREAD):
        part = most[first : first + SPREAD]
        most[first : first + SPREAD] = part.sum() / len(part)
    return most


def floor(number: float) -> int:
    """int() of a product that is meant to be whole: 0.1 * 30 gives 3."""
    return math.floor(number + 1e-9)
