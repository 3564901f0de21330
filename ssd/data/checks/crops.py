"""Whether pictures are large enough for the views that are cut out of them."""

from dataclasses import dataclass

import numpy as np

from ssd.data.randomness import generator
from ssd.views.parameters import Box, draw_many
from ssd.views.view import Views

DRAWN = -4  # key of the fixed choice of pictures for which crops are drawn
NUM_DRAWN = 2000
TINY = 4.0  # a picture is tiny when its smallest crops are enlarged more than so many times


@dataclass(frozen=True)
class Enlargement:
    """By how much the crops of one kind of view are enlarged: side of the view / side of the crop.

    Args:
        size: side of the view, px.
        share: of the crops that are enlarged at all, in [0, 1].
        median, high: the factor in the middle and the one that 5 % of the crops exceed; below 1 crops are reduced.
        crop: median side of a crop, the root of its area, px.
    """

    kind: str
    size: int
    share: float
    median: float
    high: float
    crop: float


def enlargements(views: Views, sizes: np.ndarray, seed: int) -> list[Enlargement]:
    """For each kind of view, from the crops that the first epoch draws for up to 2,000 pictures.

    Sizes (N, 2): height and width of the pictures, px, N > 0.
    """
    rows = np.sort(generator(DRAWN).permutation(len(sizes))[:NUM_DRAWN])
    chosen = [(int(height), int(width)) for height, width in sizes[rows]]
    boxes, _ = draw_many(views, chosen, [(seed, 0, int(row)) for row in rows])
    found = []
    for kind, table in boxes.items():
        size = views.kinds()[kind][0].size
        sides = np.sqrt(table[..., Box.WIDTH].astype(np.float64) * table[..., Box.HEIGHT])
        factors = size / sides
        middle, high = np.quantile(factors, [0.5, 0.95])
        found.append(
            Enlargement(kind, size, float((factors > 1).mean()), float(middle), float(high), float(np.median(sides)))
        )
    return found


def smallest_side(views: Views) -> float:
    """Side of a square picture, px, below which its smallest crops are enlarged more than `TINY` times."""
    return max(
        view.size / (TINY * float(np.sqrt(view.scale[0]))) for members in views.kinds().values() for view in members
    )
