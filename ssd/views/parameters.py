"""What a sample's views look like, drawn as a few small arrays before any pixel is touched.

All views of a sample are drawn at once from a stream of uniform numbers that is a pure function of
(seed, epoch, index); row v of the stream belongs to view v, so adding views changes none of the others.
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ssd.data.randomness import uniforms_of_many
from ssd.views.view import View, Views

TRIES = 10  # torchvision's RandomResizedCrop gives up after as many and takes the centre


class Box(enum.IntEnum):
    """Columns of a box: whole source pixels, and 1 where the view is flipped left to right."""

    LEFT = 0
    TOP = 1
    WIDTH = 2
    HEIGHT = 3
    FLIP = 4


class Colour(enum.IntEnum):
    """Columns of a view's photometry. A view that an operation leaves alone holds the neutral value.

    BRIGHTNESS, CONTRAST and SATURATION are factors (neutral 1), HUE is a shift in turns (neutral 0);
    FIRST to FOURTH hold the columns 0 to 3 of these four in the order in which they are applied. GREY is
    1 where colour is dropped. BLUR is the standard deviation of the blur in px of the view (neutral 0).
    SOLARIZE is the value from which pixels are inverted (neutral 256). ROTATE is the angle in radians by which the
    view is turned first, after it was slanted by SHEAR, a row's shift over its height (neutral 0): they move pixels,
    and are here because they too are applied to a whole batch.
    """

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3
    FIRST = 4
    SECOND = 5
    THIRD = 6
    FOURTH = 7
    GREY = 8
    BLUR = 9
    SOLARIZE = 10
    ROTATE = 11
    SHEAR = 12


FACTORS = slice(Colour.BRIGHTNESS, Colour.HUE + 1)
ORDER = slice(Colour.FIRST, Colour.FOURTH + 1)
WARP = slice(Colour.ROTATE, Colour.SHEAR + 1)
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.float32)  # (24, 4)
NEUTRAL = np.array([1, 1, 1, 0, 0, 1, 2, 3, 0, 0, 256, 0, 0], dtype=np.float32)

# places in a view's row of uniform numbers
SHARE_AT = slice(0, 2 * TRIES, 2)
RATIO_AT = slice(1, 2 * TRIES, 2)
LEFT_AT, TOP_AT = 2 * TRIES, 2 * TRIES + 1
AMOUNTS_AT = slice(2 * TRIES + 2, 2 * TRIES + 7)  # brightness, contrast, saturation, hue, blur
ORDER_AT = 2 * TRIES + 7
GATES_AT = slice(2 * TRIES + 8, 2 * TRIES + 13)  # flip, jitter, grey, blur, solarize
WARP_AT = slice(2 * TRIES + 13, 2 * TRIES + 15)  # rotate, shear
DRAWS = 2 * TRIES + 15
PLACE_AT = [*range(2 * TRIES + 2), GATES_AT.start, *range(DRAWS)[WARP_AT]]  # crop, flip, warp: where a pixel comes from


@dataclass(frozen=True)
class Settings:
    """The views of a recipe as arrays with one row a view, all kinds one after another."""

    kinds: dict[str, slice]
    sizes: dict[str, int]  # px
    share: tuple[np.ndarray, np.ndarray]  # (V, 1) lowest, range
    log_ratio: tuple[np.ndarray, np.ndarray]  # (V, 1) lowest, range
    amounts: tuple[np.ndarray, np.ndarray]  # (V, 5) lowest, range
    probs: np.ndarray  # (V, 5)
    threshold: np.ndarray  # (V,)
    warp: np.ndarray  # (V, 2) largest rotation in radians, largest shear
    ratio: np.ndarray  # (V, 2)
    twins: np.ndarray  # (V,) the view whose place in the picture each repeats, itself where it has its own

    def by_kind(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {kind: rows[:, where] for kind, where in self.kinds.items()}


@lru_cache(maxsize=64)
def settings_of(views: Views) -> Settings:
    kinds: dict[str, slice] = {}
    sizes: dict[str, int] = {}
    flat: list[View] = []
    for kind, members in views.kinds().items():
        sizes[kind] = members[0].size
        kinds[kind] = slice(len(flat), len(flat) + len(members))
        flat.extend(members)

    share = np.array([view.scale for view in flat])
    ratio = np.array([view.ratio for view in flat])
    jitter = np.array([view.jitter for view in flat])
    radius = np.array([view.blur_radius for view in flat])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    # a factor is never negative, a hue shift is
    low = np.concatenate([np.maximum(centre - jitter, [0, 0, 0, -1]), radius[:, :1]], axis=1)
    high = np.concatenate([centre + jitter, radius[:, 1:]], axis=1)
    return Settings(
        kinds=kinds,
        sizes=sizes,
        share=(share[:, :1], share[:, 1:] - share[:, :1]),
        log_ratio=(np.log(ratio[:, :1]), np.log(ratio[:, 1:] / ratio[:, :1])),
        amounts=(low, high - low),
        probs=np.array([[v.flip, v.jitter_prob, v.grey_prob, v.blur_prob, v.solarize_prob] for v in flat]),
        threshold=np.array([view.solarize_threshold for view in flat]),
        warp=np.array([[np.deg2rad(view.rotate), view.shear] for view in flat]),
        ratio=ratio,
        twins=np.array([place if view.twin is None else view.twin for place, view in enumerate(flat)]),
    )


def draw(views: Views, height: int, width: int, *place: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Boxes and photometry of every view of one picture, a pure function of `place` = (seed, epoch, index).

    Height and width of the source, px -> kind -> (V, 5) float32 with the columns of `Box`, and
    kind -> (V, 13) float32 with the columns of `Colour`.
    """
    boxes, photometry = draw_many(views, [(height, width)], [place])
    return {kind: rows[0] for kind, rows in boxes.items()}, {kind: rows[0] for kind, rows in photometry.items()}


def draw_many(
    views: Views, sizes: Sequence[tuple[int, int]], places: Sequence[tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`draw` for B pictures in one go: sizes (height, width), px, and places -> kind -> (B, V, 5), kind -> (B, V, 13)."""
    drawn = ViewDraws(views, places)
    return drawn.boxes(0, sizes), drawn.photometry()


class ViewDraws:
    """The random numbers of a batch's views, drawn at once; boxes follow when the pictures' sizes are known.

    Args:
        places: (seed, epoch, index) of each of B samples.
    """

    def __init__(self, views: Views, places: Sequence[tuple[int, ...]]):
        self.views, self.settings = views, settings_of(views)
        self.numbers = uniforms_of_many((len(self.settings.probs), DRAWS), places)  # (B, V, DRAWS)
        if (self.settings.twins != np.arange(len(self.settings.twins))).any():
            self.numbers[..., PLACE_AT] = self.numbers[:, self.settings.twins][..., PLACE_AT]
        self.gates = self.numbers[..., GATES_AT] < self.settings.probs  # (B, V, 5)

    def draw_again(self, row: int, place: tuple[int, ...]) -> None:
        """Sample `row` as what is drawn for another place."""
        fresh = ViewDraws(self.views, [place])
        self.numbers[row], self.gates[row] = fresh.numbers[0], fresh.gates[0]

    def boxes(self, first: int, sizes: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Of samples from the `first` on, by their sizes (height, width), px. kind -> (len(sizes), V, 5)"""
        rows = slice(first, first + len(sizes))
        boxes = np.empty((len(sizes), self.numbers.shape[1], len(Box)), dtype=np.float32)
        boxes[..., : Box.FLIP] = crops(self.numbers[rows], self.settings, np.array(sizes, dtype=np.float64))
        boxes[..., Box.FLIP] = self.gates[rows, :, 0]
        return self.settings.by_kind(boxes)

    def photometry(self) -> dict[str, np.ndarray]:
        """kind -> (B, V, 13)"""
        return self.settings.by_kind(colours(self.numbers, self.gates[..., 1:], self.settings))


def crops(numbers: np.ndarray, settings: Settings, sizes: np.ndarray) -> np.ndarray:
    """(B, V, 4) left, top, width, height of crops with the distribution of torchvision's RandomResizedCrop:
    area share uniform, log of the aspect ratio uniform, the first of ten tries that fits, else the
    largest centred crop whose aspect ratio is allowed. Sizes (B, 2): height and width, px.
    """
    height, width = sizes[:, 0, None], sizes[:, 1, None]  # (B, 1)
    share = settings.share[0] + settings.share[1] * numbers[..., SHARE_AT]  # (B, V, TRIES)
    side = np.sqrt((height * width)[..., None] * share)
    stretch = np.exp(0.5 * (settings.log_ratio[0] + settings.log_ratio[1] * numbers[..., RATIO_AT]))
    wide = np.rint(side * stretch)
    high = np.rint(side / stretch)
    fits = (wide <= width[..., None]) & (high <= height[..., None]) & (wide > 0) & (high > 0)
    first = fits.argmax(axis=-1)[..., None]
    box = np.empty((*numbers.shape[:2], 4))
    box[..., 2] = np.take_along_axis(wide, first, -1)[..., 0]
    box[..., 3] = np.take_along_axis(high, first, -1)[..., 0]
    box[..., 0] = np.floor(numbers[..., LEFT_AT] * (width - box[..., 2] + 1))
    box[..., 1] = np.floor(numbers[..., TOP_AT] * (height - box[..., 3] + 1))
    for sample, view in np.argwhere(~fits.any(axis=-1)):
        high_px, wide_px = (int(side) for side in sizes[sample])
        box[sample, view] = centre_crop(high_px, wide_px, *settings.ratio[view])
    return box


def centre_crop(height: int, width: int, narrowest: float, widest: float) -> tuple[int, int, int, int]:
    """Left, top, width, height of the largest centred crop with width / height within the limits, px."""
    wide, high = width, height
    if width / height < narrowest:
        high = max(round(width / narrowest), 1)
    elif width / height > widest:
        wide = max(round(height * widest), 1)
    return (width - wide) // 2, (height - high) // 2, wide, high


def colours(numbers: np.ndarray, gates: np.ndarray, settings: Settings) -> np.ndarray:
    """(B, V, 13) float32 with the columns of `Colour`. Gates (B, V, 4): jitter, grey, blur, solarize."""
    jitter, grey, blur, solarize = np.moveaxis(gates, -1, 0)
    amounts = settings.amounts[0] + settings.amounts[1] * numbers[..., AMOUNTS_AT]  # (B, V, 5)
    drawn = np.tile(NEUTRAL, (*numbers.shape[:2], 1))
    drawn[jitter, FACTORS] = amounts[jitter, :4]
    drawn[jitter, ORDER] = ORDERS[(numbers[jitter, ORDER_AT] * len(ORDERS)).astype(np.intp)]
    drawn[..., Colour.GREY] = grey
    drawn[..., WARP] = settings.warp * (2 * numbers[..., WARP_AT] - 1)
    drawn[blur, Colour.BLUR] = amounts[blur, 4]
    drawn[solarize, Colour.SOLARIZE] = np.broadcast_to(settings.threshold, solarize.shape)[solarize]
    return drawn
