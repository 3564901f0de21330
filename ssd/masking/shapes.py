"""Which tokens are hidden, once it is known how many: blocks and random choices for many crops at once."""

import math

import numpy as np

from ssd.data.randomness import GAMMA, mix
from ssd.errors import UserError
from ssd.native import masks as native


def draw_blocks(
    wanted: np.ndarray,
    grid: tuple[int, int],
    smallest: float,
    largest: float,
    aspect: float,
    tries: int,
    keys: np.ndarray,
) -> np.ndarray:
    """(G, H, W) masks of rectangles, at most `wanted` (G,) tokens each; `keys` (G,) uint64 of their random numbers.

    A rectangle's area is uniform from `smallest` to what is left (or `largest`, where that is less), the log of its
    aspect ratio uniform; the first of `tries` that is smaller than the grid and hides at least one token more and
    not too many is taken, and a crop for which none is stays as it is. Compiled code goes through the crops where it can
    be had; here all tries of a round are made at once: their overlap with what is hidden comes from one table of sums.
    """
    height, width = grid
    if native.available() and max(grid) <= native.WIDEST:
        return native.blocks(wanted, grid, smallest, largest, math.log(1 / aspect), tries, keys)
    masks = np.zeros((len(wanted), height, width), dtype=bool)
    active = np.flatnonzero(wanted > 0)
    hidden = np.zeros(len(wanted))
    rows, columns = np.arange(height), np.arange(width)
    spread = math.log(1 / aspect)
    made = 0  # rounds
    while len(active):
        left = np.minimum(wanted[active] - hidden[active], largest)[:, None]  # (A, 1)
        numbers = numbers_of_round(keys[active], made, tries)
        made += 1
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


def numbers_of_round(keys: np.ndarray, number: int, tries: int) -> np.ndarray:
    """(4, A, tries) uniform numbers in [0, 1) of the streams `keys` (A,)."""
    places = np.arange(number * tries * 4, (number + 1) * tries * 4, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = mix(keys[:, None] + GAMMA * (places + np.uint64(1)))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(-1, tries, 4).transpose(2, 0, 1)


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
    limit = np.take_along_axis(np.sort(noise, axis=1), np.maximum(numbers, 1)[:, None] - 1, axis=1)
    return (noise <= limit) & (numbers > 0)[:, None]


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
