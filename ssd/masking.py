"""Which tokens a student does not see: every mask sampler, for a whole batch at once.

Masks are drawn for the samples of a step over all ranks and slices, from one stream of random numbers whose
key is the place of use, `(seed, step)`: a rank or a slice takes its rows, and sees what it would have seen alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ssd.batch import Masks
from ssd.data.randomness import generator
from ssd.errors import UserError

MASKS = -2  # stands where the index of a sample stands in keys of per-sample randomness
SPREAD = 8  # samples among which masked crops are spread evenly
ROUND = 64  # padded lengths are multiples of it, so that few shapes occur


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


@dataclass(frozen=True)
class RandomMasks(Masking):
    """Tokens hidden at random, the same number in each sample (MAE, dBOT, DMAE; tubes for clips).

    Args:
        ratio: share that is masked; int(N (1 - ratio)) stay visible, as published.
        cell: side of the squares that are hidden as one, in tokens.
        tube: on a grid (t, h, w), hide the same places in every time slot, int(ratio h w) of them.
    """

    ratio: float = 0.75
    cell: int = 1
    tube: bool = False

    def __post_init__(self):
        check_share("ratio", self.ratio)
        check_count("cell", self.cell)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        cells = in_cells(grid[1:] if self.tube else grid, self.cell)
        number = math.prod(cells)
        masked = floor(self.ratio * number) if self.tube else number - floor(number * (1 - self.ratio))
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
    """

    ratio: tuple[float, float] = (0.1, 0.5)
    share: float = 0.5
    smallest: int | None = None
    largest: float = 1.0
    aspect: float = 0.3
    even: bool = False
    tries: int = 10

    exact: ClassVar[bool] = False

    def __post_init__(self):
        check_range("ratio", self.ratio)
        check_share("share", self.share)
        if not 0 < self.largest <= 1:
            raise UserError(f"largest is {self.largest}. It is a share of the grid, above 0 and at most 1.")
        if not 0 < self.aspect <= 1:
            raise UserError(f"aspect is {self.aspect}. Use a number above 0 and at most 1.")
        check_count("tries", self.tries)

    def masks(self, views: int, batch: int, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        height, width = picture_grid("block masks", grid)
        wanted = wanted_tokens(self, views, batch, height * width, rng).reshape(-1)
        smallest = (min(height, width) // 3) ** 2 if self.smallest is None else self.smallest
        largest = height * width if self.largest == 1 else floor(self.largest * height * width)
        return draw_blocks(wanted, (height, width), smallest, largest, self.aspect, self.tries, rng)

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
        if self.exact:
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
    (wav2vec 2.0, data2vec, DinoSR).

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
        # a token is hidden where a span began within the last `length` places
        began = np.zeros((rows, tokens + 1), dtype=np.int64)
        began[:, 1 : starts + 1] = begun.cumsum(1)
        began[:, starts + 1 :] = began[:, starts : starts + 1]
        before = np.maximum(np.arange(1, tokens + 1) - self.length, 0)
        masked = began[:, 1:] > began[:, before]
        return lowest(np.where(masked, rng.random((rows, tokens)), 2), int(masked.sum(1).min()))


# ---------------------------------------------------------------------- how many


def strata(views: int, batch: int, share: float) -> np.ndarray:
    """(batch, views) which of the evenly spread shares each crop gets, -1 for a crop that stays whole.

    Samples are taken `SPREAD` at a time, and each of these groups gets its part of the masked crops and of small and
    large shares. So every slice of the batch has nearly the same work, whoever draws it.
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
    return given


def wanted_tokens(
    recipe: "BlockMasks | InverseBlockMasks", views: int, batch: int, tokens: int, rng: np.random.Generator
) -> np.ndarray:
    """(views, batch) number of tokens to mask in each crop, whole numbers where shares are spread evenly."""
    low, high = recipe.ratio  # type: ignore[misc]
    if not recipe.even:
        masked = rng.random((views, batch)) < recipe.share
        return np.where(masked, rng.uniform(low, high, (views, batch)) * tokens, 0.0)
    given = strata(views, batch, recipe.share)
    # within its group each share may fall to any crop
    for first in range(0, batch, SPREAD):
        part = given[first : first + SPREAD]
        given[first : first + SPREAD] = rng.permutation(part.reshape(-1)).reshape(part.shape)
    masked = int((given >= 0).sum())
    share = low + (high - low) * (given + rng.random(given.shape)) / max(masked, 1)
    return np.where(given >= 0, np.floor(share * tokens), 0.0).T


def most_tokens(recipe: "BlockMasks | InverseBlockMasks", views: int, batch: int, tokens: int) -> np.ndarray:
    """(batch,) bound for sums over whole groups of samples: what is drawn lies anywhere within its group."""
    low, high = recipe.ratio  # type: ignore[misc]
    given = strata(views, batch, recipe.share)
    masked = max(int((given >= 0).sum()), 1)
    most = np.where(given >= 0, np.floor((low + (high - low) * (given + 1) / masked) * tokens), 0).sum(1)
    for first in range(0, batch, SPREAD):
        part = most[first : first + SPREAD]
        most[first : first + SPREAD] = part.sum() / len(part)
    return most


# ---------------------------------------------------------------------- which


def draw_blocks(
    wanted: np.ndarray,
    grid: tuple[int, int],
    smallest: float,
    largest: float,
    aspect: float,
    tries: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(G, H, W) masks of rectangles, at most `wanted` (G,) tokens each.

    A rectangle's area is uniform from `smallest` to what is left (or `largest`, where that is less), the log of its
    aspect ratio uniform; the first of `tries` that is smaller than the grid and hides at least one token more and
    not too many is taken, and a crop for which none is stays as it is. All tries of a round are made at once: their
    overlap with what is hidden comes from one table of sums.
    """
    height, width = grid
    masks = np.zeros((len(wanted), height, width), dtype=bool)
    active = np.flatnonzero(wanted > 0)
    hidden = np.zeros(len(wanted))
    rows, columns = np.arange(height), np.arange(width)
    spread = math.log(1 / aspect)
    while len(active):
        left = np.minimum(wanted[active] - hidden[active], largest)[:, None]  # (A, 1)
        numbers = rng.random((4, len(active), tries))
        area = smallest + numbers[0] * (left - smallest)
        stretch = np.exp(spread * (2 * numbers[1] - 1))
        high = np.rint(np.sqrt(area * stretch)).astype(np.intp)
        wide = np.rint(np.sqrt(area / stretch)).astype(np.intp)
        fits = (high < height) & (wide < width)
        high, wide = np.minimum(high, height), np.minimum(wide, width)
        top = (numbers[2] * (height - high + 1)).astype(np.intp)
        start = (numbers[3] * (width - wide + 1)).astype(np.intp)
        sums = np.zeros((len(active), (height + 1) * (width + 1)), dtype=np.intp)
        table = sums.reshape(-1, height + 1, width + 1)
        table[:, 1:, 1:] = masks[active].cumsum(1, dtype=np.intp).cumsum(2)
        above, below = top * (width + 1), (top + high) * (width + 1)
        corners = np.stack([below + start + wide, above + start, above + start + wide, below + start])  # (4, A, tries)
        at = np.take_along_axis(sums[None], corners, axis=2)
        fresh = high * wide - (at[0] + at[1] - at[2] - at[3])
        good = fits & (fresh > 0) & (fresh <= left)
        taken = good.any(1)
        chosen = good.argmax(1)[taken]
        active = active[taken]
        pick = np.flatnonzero(taken), chosen
        inside_rows = (rows >= top[pick][:, None]) & (rows < (top + high)[pick][:, None])
        inside_columns = (columns >= start[pick][:, None]) & (columns < (start + wide)[pick][:, None])
        masks[active] |= inside_rows[:, :, None] & inside_columns[:, None, :]
        hidden[active] += fresh[pick]
        active = active[hidden[active] < wanted[active]]
    return masks


def visible_blocks(
    visible: np.ndarray, grid: tuple[int, int], aspect: tuple[float, float], roll: bool, rng: np.random.Generator
) -> np.ndarray:
    """(G, H, W) True on a block of exactly `visible` (G,) tokens: the first of a rectangle in raster order."""
    height, width = grid
    shown = np.maximum(visible, 1)
    numbers = rng.random((5, len(visible)))
    high_limit = np.minimum(math.log(aspect[1]), np.log(height**2 / shown))
    low_limit = np.minimum(np.maximum(math.log(aspect[0]), np.log(shown / width**2)), high_limit)
    stretch = np.exp(low_limit + (high_limit - low_limit) * numbers[0])
    high = np.clip(np.ceil(np.sqrt(shown * stretch)), 1, height)
    wide = np.clip(np.ceil(np.maximum(np.sqrt(shown / stretch), shown / high)), 1, width)
    high = np.clip(np.maximum(high, np.ceil(shown / wide)), 1, height)
    top = np.floor(numbers[1] * (height - high + 1))
    start = np.floor(numbers[2] * (width - wide + 1))
    if roll:
        top, start = top + np.floor(numbers[3] * height), start + np.floor(numbers[4] * width)
    # place inside the rectangle, counted around the borders
    row = (np.arange(height) - top[:, None]) % height  # (G, H)
    column = (np.arange(width) - start[:, None]) % width  # (G, W)
    place = row[:, :, None] * wide[:, None, None] + column[:, None, :]
    inside = (row < high[:, None])[:, :, None] & (column < wide[:, None])[:, None, :]
    return inside & (place < visible[:, None, None])


def lowest(noise: np.ndarray, number: int) -> np.ndarray:
    """(G, N) True at the `number` smallest of each row."""
    chosen = np.zeros(noise.shape, dtype=bool)
    if number >= noise.shape[1]:
        chosen[:] = True
    elif number > 0:
        np.put_along_axis(chosen, noise.argpartition(number - 1, axis=1)[:, :number], True, axis=1)
    return chosen


def lowest_of_each(noise: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(G, N) True at the `numbers` (G,) smallest of each row."""
    limit = np.take_along_axis(np.sort(noise, axis=1), numbers[:, None] - 1, axis=1)
    return noise <= limit


def in_cells(grid: tuple[int, ...], cell: int) -> tuple[int, ...]:
    if any(side % cell for side in grid):
        raise UserError(f"cells of {cell} tokens do not divide the grid of {grid}. Use a divisor, or 1.")
    return tuple(side // cell for side in grid)


def expand(chosen: np.ndarray, cells: tuple[int, ...], cell: int) -> np.ndarray:
    """(G, cells) -> (G, *grid), each cell repeated along every side of the grid."""
    whole = chosen.reshape(-1, *cells)
    for axis in range(1, whole.ndim):
        whole = whole if cell == 1 else np.repeat(whole, cell, axis=axis)
    return whole


# ---------------------------------------------------------------------- for a step


def masks_for(
    recipe: Masking,
    views: int,
    batch: int,
    grid: tuple[int, ...],
    *place: int,
    rank: int = 0,
    world: int = 1,
    slices: int = 1,
) -> Masks:
    """The masks of one rank's `batch` samples, cut from those of the whole step of `batch` x `world`.

    Raises UserError where `slices` does not divide `batch`.
    """
    if batch % slices:
        raise UserError(f"micro_batches: {slices} does not divide the batch of {batch}. Use a divisor.")
    everywhere = recipe.draw(views, batch * world, grid, *place)
    boolean = everywhere[:, rank * batch : (rank + 1) * batch]
    if recipe.exact:
        whole = torch.from_numpy(np.ascontiguousarray(boolean))
        masked, visible = ordered(boolean), ordered(~boolean)
        return Masks(whole, masked=masked, visible=visible)
    tokens = boolean.shape[2]
    most = recipe.most(views, batch * world, tokens)
    per_slice = batch // slices
    if most is None:
        length = everywhere.sum(2).sum(0).reshape(-1, per_slice).sum(1).max()
        length = -(-int(length) // ROUND) * ROUND
    else:
        length = padded_length(most, per_slice)
    return packed(boolean, slices, max(length, 1))


def padded_length(most: np.ndarray, per_slice: int) -> int:
    """Of flat indices: no slice of `per_slice` samples has more masked tokens, however they lie in their groups."""
    if per_slice % SPREAD == 0:
        return math.ceil(most.reshape(-1, per_slice).sum(1).max() - 1e-6)
    # a slice that cuts a group may get the whole of it
    first = np.arange(0, len(most), per_slice)
    groups = np.add.reduceat(most, np.arange(0, len(most), SPREAD))
    return max(math.ceil(groups[at // SPREAD : -(-(at + per_slice) // SPREAD)].sum() - 1e-6) for at in first.tolist())


def packed(boolean: np.ndarray, slices: int, length: int) -> Masks:
    """Flat places of masked tokens, each slice padded to `length`, with 1 / (masked tokens of the crop) as weight."""
    views, batch, tokens = boolean.shape
    flat = np.zeros((slices, length), dtype=np.int64)
    weight = np.zeros((slices, length), dtype=np.float32)
    per_slice = batch // slices
    for number in range(slices):
        part = boolean[:, number * per_slice : (number + 1) * per_slice].reshape(views * per_slice, tokens)
        places = np.flatnonzero(part)
        flat[number, : len(places)] = places
        counts = part.sum(1)
        weight[number, : len(places)] = np.repeat(1 / np.maximum(counts, 1), counts)
    return Masks(
        torch.from_numpy(np.ascontiguousarray(boolean)), flat=torch.from_numpy(flat), weight=torch.from_numpy(weight)
    )


def ordered(chosen: np.ndarray) -> torch.Tensor:
    """(V, B, N) with equal counts -> (V, B, M) sorted indices of the True ones."""
    return torch.from_numpy(chosen.nonzero()[2].reshape(*chosen.shape[:2], -1))


# ---------------------------------------------------------------------- checks


def picture_grid(what: str, grid: tuple[int, ...]) -> tuple[int, int]:
    if len(grid) != 2:
        raise UserError(f"{what} are for pictures, and the tokens lie on a grid of {grid}. Use RandomMasks.")
    return grid[0], grid[1]


def floor(number: float) -> int:
    """int() of a product that is meant to be whole: 0.1 * 30 gives 3."""
    return math.floor(number + 1e-9)


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}. It is a share, from 0 to 1.")


def check_range(name: str, value: tuple[float, float]) -> None:
    if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
        raise UserError(f"{name} is {value}. Use the lowest and the highest share, from 0 to 1.")


def check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}. Use 1 or more.")
