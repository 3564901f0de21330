"""Single tokens hidden at random, a number of them that is drawn for each crop."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ssd.masking.counts import most_tokens, wanted_tokens
from ssd.masking.recipes import Masking, check_range, check_share
from ssd.masking.shapes import lowest_of_each


@dataclass(frozen=True)
class ScatteredMasks(Masking):
    """Tokens hidden one by one, int(r N) of them where r is the crop's share (iBOT, "rand" in its released models).

    Args:
        ratio: lowest and highest share of tokens masked in a masked crop.
        share: of crops that are masked at all.
        even: as of `BlockMasks`.
    """

    ratio: tuple[float, float] = (0.1, 0.5)
    share: float = 0.5
    even: bool = False

    exact: ClassVar[bool] = False

    def __post_init__(self):
        check_range("ratio", self.ratio)
        check_share("share", self.share)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        tokens = int(np.prod(grid))
        wanted = np.floor(wanted_tokens(self, views, batch, tokens, rng).reshape(-1) + 1e-9).astype(int)
        return lowest_of_each(rng.random((views * batch, tokens)), wanted)

    def most(self, views: int, batch: int, tokens: int) -> np.ndarray | None:
        return most_tokens(self, views, batch, tokens) if self.even else None
