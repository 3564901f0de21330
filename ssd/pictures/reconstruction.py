"""What a masked autoencoder paints where it sees nothing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ssd.pictures.layout import Cell, table
from ssd.pictures.sheet import CELL, with_masked

HEADINGS = ("picture", "what it sees", "what it paints")


def reconstruction_sheet(
    pictures: Sequence[np.ndarray], hidden: Tensor, painted: Sequence[np.ndarray], cell: int = CELL
) -> Image.Image:
    """A row for each picture (h, w, 3) uint8: the picture, the patches that are seen, and what is painted with them.

    `hidden` is (n, N) bool, row by row over a square grid.
    """
    rows = [
        [Cell(picture), Cell(with_masked(picture, masked)), Cell(answer)]
        for picture, masked, answer in zip(pictures, hidden, painted, strict=True)
    ]
    return table(rows, HEADINGS, cell=cell)
