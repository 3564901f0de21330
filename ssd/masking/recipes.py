"""Which tokens a student does not see: every mask sampler, for a whole batch at once.

Masks are drawn for the samples of a step over all ranks and slices, from one stream of random numbers whose
key is the place of use, `(seed, step)`: a rank or a slice takes its rows, and sees what it would have seen alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ssd.data.randomness import generator, uniforms_of_keys
from ssd.errors import UserError
from ssd.masking.counts import floor, most_tokens, wanted_tokens
from ssd.masking.shapes import draw_blocks, expand, in_cells, lowest, lowest_of_each, visible_blocks

MASKS = -2  # stands where the index of a sample stands in keys of per-sample randomness


class Masking:
    """How tokens are hidden. Subclasses are frozen settings.

    Attributes:
        exact: whether every sample has the same number of masked tokens.
    """

    exact: ClassVar[bool] = True

    def draw(self, views: int, batch: int, grid: tuple[int, ...], *place: int) -> np.ndarray:
        """(views, batch, N) bool, True where masked; a pure function of its arguments."""
        rng = generator(*place, MASKS)
        return self.masks(views, batch, grid, rng).reshape(views, batch, -1)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def most(self, views: int, batch: int, tokens: int) -> np.ndarray | None:
        """(batch,) most tokens that may be masked in all views of each sample, where that is known before they are
        drawn: slices are padded to it, so that their shape never changes."""
        return None

    def draw_each(self, lengths: np.ndarray, width: int, keys: np.ndarray) -> np.ndarray:
        """(R, width) bool of sequences of unequal `lengths` (R,), True where masked, never behind a sequence's end.

        Each is a function of its key (R,) uint64 and its length: the same alone as padded beside longer ones. Raises
        UserError for recipes that know no sequences.
        """
        raise UserError(
            f"masks: {type(self).__name__} hides tokens of samples that are alike in size, and these sounds have their own "
            "lengths. Use SpanMasks."
        )


@dataclass(frozen=True)
class RandomMasks(Masking):
    """Tokens hidden at random, the same number in each sample (MAE, dBOT, DMAE; tubes for clips).

    Args:
        ratio: share that is masked; int(N (1 - ratio)) stay visible, as published.
        keep: number of tokens that stay visible, instead of a ratio; of tubes those of each time slot.
        cell: side of the squares that are hidden as one, in tokens.
        tube: on a grid (t, h, w), hide the same places in every time slot, int(ratio h w) of them.
    """

    ratio: float = 0.75
    keep: int | None = None
    cell: int = 1
    tube: bool = False

    def __post_init__(self):
        check_share("ratio", self.ratio)
        check_count("cell", self.cell)
        if self.keep is not None and (self.keep < 1 or self.cell != 1):
            raise UserError(f"keep is {self.keep} with cells of {self.cell}. Keep 1 token or more, hidden one by one.")

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        cells = in_cells(grid[1:] if self.tube else grid, self.cell)
        number = math.prod(cells)
        masked = floor(self.ratio * number) if self.tube else number - floor(number * (1 - self.ratio))
        if self.keep is not None:
            if self.keep >= number:
                raise UserError(f"keep is {self.keep} of {number} tokens, which hides none. Keep fewer.")
            masked = number - self.keep
        chosen = lowest(rng.random((views * batch, number)), masked)
        whole = expand(chosen, cells, self.cell)
        return np.repeat(whole[:, None], grid[0], axis=1) if self.tube else whole


@dataclass(frozen=True)
class DisjointMasks(Masking):
    """Two masks a sample that together hide (nearly) every token (Ma et al. 2023, arXiv 2301.00230).

    Args:
        ratio: share that each masks; int(N (1 - ratio)) stay visible.
        predicted: share that at least one of both masks, at most 2 `ratio`.
        cell: side of the squares that are hidden as one, in tokens.
    """

    ratio: float = 0.6
    predicted: float = 1.0
    cell: int = 1

    def __post_init__(self):
        check_share("ratio", self.ratio)
        if not self.ratio <= self.predicted <= 1:
            raise UserError(f"predicted is {self.predicted}. Use a share from ratio ({self.ratio}) to 1.")
        check_count("cell", self.cell)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        if views != 2:
            raise UserError(f"disjoint masks come in pairs and {views} were asked for. Use 2 masks a sample.")
        cells = in_cells(grid, self.cell)
        number = math.prod(cells)
        masked = number - floor(number * (1 - self.ratio))
        fresh = floor(min(self.predicted - self.ratio, self.ratio) * number)
        first = lowest(rng.random((batch, number)), masked)
        noise = rng.random((batch, number))
        # of the visible ones `fresh` are hidden now, the rest again from those that were hidden
        second = lowest(np.where(first, 2, noise), fresh) | lowest(np.where(first, noise, 2), masked - fresh)
        return expand(np.stack([first, second]).reshape(2 * batch, number), cells, self.cell)


@dataclass(frozen=True)
class BlockMasks(Masking):
    """Rectangles hidden until a drawn share is reached or no more fit (BEiT, iBOT, DINOv2); never above it.

    Args:
        ratio: lowest and highest share of tokens masked in a masked crop.
        share: of crops that are masked at all.
        smallest: area of the smallest rectangle, in tokens; null = a ninth of the grid's short side squared (iBOT).
        largest: share of the grid that one rectangle may add; 1 = whatever is left.
        aspect: of the widest rectangle, height / width; its inverse is the other limit.
        even: True: exactly `share` of the crops are masked, by shares that are spread evenly over `ratio` (DINOv2).
            False: each crop is masked with probability `share`, by a share drawn for itself (iBOT).
        tries: for each rectangle, before the crop is left as it is.
        filled: with `even`: each masked crop hides exactly the upper end of its part of `ratio`, single tokens making up
            what rectangles leave short, so that every step masks the same number of tokens (DINOv3).
    """

    ratio: tuple[float, float] = (0.1, 0.5)
    share: float = 0.5
    smallest: int | None = None
    largest: float = 1.0
    aspect: float = 0.3
    even: bool = False
    tries: int = 10
    filled: bool = False

    exact: ClassVar[bool] = False

    def __post_init__(self):
        check_range("ratio", self.ratio)
        check_share("share", self.share)
        if not 0 < self.largest <= 1:
            raise UserError(f"largest is {self.largest}. It is a share of the grid, above 0 and at most 1.")
        if not 0 < self.aspect <= 1:
            raise UserError(f"aspect is {self.aspect}. Use a number above 0 and at most 1.")
        check_count("tries", self.tries)
        if self.filled and not self.even:
            raise UserError("filled: true is for masks whose shares are spread evenly. Set even: true.")

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        height, width = picture_grid("block masks", grid)
        wanted = wanted_tokens(self, views, batch, height * width, rng, upper=self.filled).reshape(-1)
        smallest = (min(height, width) // 3) ** 2 if self.smallest is None else self.smallest
        largest = height * width if self.largest == 1 else floor(self.largest * height * width)
        keys = rng.integers(0, 2**64, len(wanted), dtype=np.uint64)
        blocks = draw_blocks(wanted, (height, width), smallest, largest, self.aspect, self.tries, keys)
        if not self.filled:
            return blocks
        blocks = blocks.reshape(len(wanted), -1)
        short = wanted.astype(int) - blocks.sum(1)
        return blocks | lowest_of_each(np.where(blocks, 2, rng.random(blocks.shape)), short)

    def most(self, views: int, batch: int, tokens: int) -> np.ndarray | None:
        return most_tokens(self, views, batch, tokens) if self.even else None


@dataclass(frozen=True)
class InverseBlockMasks(Masking):
    """All but one block hidden, the block rolled to any place (CAPI; Franca's cyclic masks with a range of ratios).

    The visible tokens are the first of a rectangle in raster order, exactly as many as asked for.

    Args:
        ratio: share of tokens masked, or lowest and highest share of a masked crop.
        share: of crops that are masked at all; 1 with a single ratio.
        aspect: lowest and highest height / width of the rectangle.
        roll: shift the mask around the borders, so that every place is hidden alike.
    """

    ratio: float | tuple[float, float] = 0.65
    share: float = 1.0
    aspect: tuple[float, float] = (0.5, 2.0)
    roll: bool = True

    even: ClassVar[bool] = True

    def __post_init__(self):
        check_range("ratio", self.ratio if isinstance(self.ratio, tuple | list) else (self.ratio, self.ratio))
        check_share("share", self.share)
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"aspect is {self.aspect}. Use the lowest and the highest height / width, above 0.")
        if not isinstance(self.ratio, tuple | list) and self.share != 1:
            raise UserError(f"share is {self.share} with a single ratio. Use 1, or a range of ratios.")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return not isinstance(self.ratio, tuple | list)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        height, width = picture_grid("inverse block masks", grid)
        tokens = height * width
        if not isinstance(self.ratio, tuple | list):
            masked = np.full(views * batch, floor(tokens * self.ratio))
        else:
            masked = np.floor(wanted_tokens(self, views, batch, tokens, rng).reshape(-1)).astype(int)
        return ~visible_blocks(tokens - masked, (height, width), self.aspect, self.roll, rng)

    def most(self, views: int, batch: int, tokens: int) -> np.ndarray | None:
        return None if self.exact else most_tokens(self, views, batch, tokens)


@dataclass(frozen=True)
class InverseSquareMasks(Masking):
    """Visible squares at random places, the rest hidden, then single tokens until the count is exact (data2vec 2.0).

    Args:
        keep: share that stays visible, int(N keep) tokens.
        side: of the squares, in tokens.
        adjust: added to `keep` for the number of squares, int(N (keep + adjust) / side^2), since they overlap.
    """

    keep: float = 0.2
    side: int = 3
    adjust: float = 0.07

    def __post_init__(self):
        check_share("keep", self.keep)
        check_count("side", self.side)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        height, width = picture_grid("inverse square masks", grid)
        tokens, crops = height * width, views * batch
        squares = max(1, floor(tokens * (self.keep + self.adjust) / self.side**2))
        reach = np.arange(self.side) - self.side // 2
        rows = np.clip(rng.integers(0, height, (crops, squares, 1)) + reach, 0, height - 1)  # (G, S, side)
        columns = np.clip(rng.integers(0, width, (crops, squares, 1)) + reach, 0, width - 1)
        places = (rows[..., :, None] * width + columns[..., None, :]).reshape(crops, -1)
        visible = np.zeros((crops, tokens), dtype=bool)
        np.put_along_axis(visible, places, True, axis=1)
        # too many: some of the squares' tokens go; too few: others come
        return ~lowest(rng.random((crops, tokens)) + ~visible, floor(tokens * self.keep))


@dataclass(frozen=True)
class SpanMasks(Masking):
    """Spans of a sequence hidden, which may overlap; then single ones shown again until all samples have equal counts
    (wav2vec 2.0, data2vec, DinoSR). Sequences of unequal lengths keep their own counts; in one that is not longer than a
    span, spans are shorter, so that a token stays visible.

    Args:
        ratio: spans times their length, as a share of the sequence. Overlap makes the share that is hidden smaller.
        length: of a span, in tokens.
    """

    ratio: float = 0.8
    length: int = 10

    def __post_init__(self):
        if self.ratio <= 0:
            raise UserError(f"ratio is {self.ratio}. Use a number above 0.")
        check_count("length", self.length)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        if len(grid) != 1:
            raise UserError(f"span masks are for sequences, and the tokens lie on a grid of {grid}. Use RandomMasks.")
        (tokens,) = grid
        starts = tokens - self.length
        if starts < 1:
            raise UserError(f"spans of {self.length} do not fit {tokens} tokens. Use a smaller length.")
        rows = views * batch
        spans = np.floor(self.ratio * tokens / self.length + rng.random(rows))
        begun = lowest_of_each(rng.random((rows, starts)), np.clip(spans, 1, starts).astype(int))
        masked = in_spans(begun, tokens, np.full(rows, self.length))
        return lowest(np.where(masked, rng.random((rows, tokens)), 2), int(masked.sum(1).min()))

    def draw_each(self, lengths: np.ndarray, width: int, keys: np.ndarray) -> np.ndarray:
        numbers = uniforms_of_keys(width + 1, keys)  # (R, 1 + width)
        length = np.minimum(self.length, np.maximum(lengths - 1, 0))
        starts = lengths - length  # 1 or more, but for sequences of no token
        spans = np.floor(self.ratio * lengths / np.maximum(length, 1) + numbers[:, 0])
        possible = np.arange(width) < starts[:, None]
        begun = lowest_of_each(np.where(possible, numbers[:, 1:], 2), np.clip(spans, 1, starts).astype(int))
        return in_spans(begun & possible, width, length)


def in_spans(begun: np.ndarray, tokens: int, length: np.ndarray) -> np.ndarray:
    """(R, tokens) bool: hidden where one of the spans, of `length` (R,), that `begun` (R, starts) has begun at last."""
    rows, starts = begun.shape
    began = np.zeros((rows, tokens + 1), dtype=np.int64)
    began[:, 1 : starts + 1] = begun.cumsum(1)
    began[:, starts + 1 :] = began[:, starts : starts + 1]
    before = np.maximum(np.arange(1, tokens + 1) - length[:, None], 0)
    return began[:, 1:] > np.take_along_axis(began, before, axis=1)


# ---------------------------------------------------------------------- checks


def require_whole_crops(masks: Masking, by: str) -> None:
    """Raises UserError for masks that leave no crop whole, which the method named `by` needs."""
    if masks.exact:
        raise UserError(
            f"masks: {type(masks).__name__} masks every crop by the same count, and {by} needs about half of them whole. "
            "Use BlockMasks or ScatteredMasks."
        )


def picture_grid(what: str, grid: tuple[int, ...]) -> tuple[int, int]:
    if len(grid) != 2:
        raise UserError(f"{what} are for pictures, and the tokens lie on a grid of {grid}. Use RandomMasks.")
    return grid[0], grid[1]


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}. It is a share, from 0 to 1.")


def check_range(name: str, value: tuple[float, float]) -> None:
    if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
        raise UserError(f"{name} is {value}. Use the lowest and the highest share, from 0 to 1.")


def check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}. Use 1 or more.")
