"""Histograms of oriented gradients, a target that says of each patch where its edges point and nothing of its colours."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.errors import UserError
from ssd.normalisers import layer_normed

BINS = 9  # of 20 degrees each: a gradient and its opposite are one direction


def oriented_gradients(pictures: Tensor, cell: int) -> Tensor:
    """How strong the gradients of each direction are in each cell: (..., C, H, W) -> (..., C, 9, H / cell, W / cell).

    Central differences p(x + 1) - p(x - 1), 0 at the border; each pixel gives its length to the one bin of its angle modulo
    180 degrees, from 0 degrees (along a row) on; the mean over the cell. Dalal and Triggs 2005, without their blocks.
    Raises UserError where cells of `cell` px do not divide the pictures.
    """
    height, width = pictures.shape[-2:]
    if height % cell or width % cell:
        raise UserError(f"cells of {cell} px do not divide pictures of {height} x {width} px. Use a divisor.")
    exact = pictures.float()
    across = F.pad(exact[..., :, 2:] - exact[..., :, :-2], (1, 1))
    down = F.pad(exact[..., 2:, :] - exact[..., :-2, :], (0, 0, 1, 1))
    length = torch.hypot(across, down)
    angle = torch.atan2(down, across).remainder(math.pi)
    bins = (angle * (BINS / math.pi)).long().clamp_max(BINS - 1)  # just below 180 degrees may round up to it

    def mean_of(number: int) -> Tensor:
        own = torch.where(bins == number, length, 0.0)
        return own.unflatten(-1, (-1, cell)).unflatten(-3, (-1, cell)).mean((-3, -1))

    # one bin after the other: all at once would hold nine times the pictures
    return torch.stack([mean_of(number) for number in range(BINS)], dim=-3)


def hog_targets(pictures: Tensor, patch: int, cell: int) -> Tensor:
    """Of each patch the histograms of its cells and channels, each at mean 0 and variance 1 over its bins.

    Pictures (V, B, C, H, W) of levels in [0, 255] -> (V, B, N, c c C 9) with c = patch / cell: cells row by row, then
    channels, then bins. A cell without an edge is 0, one with edges of a single direction is 8 / sqrt(8) there and
    -1 / sqrt(8) elsewhere, however strong they are. As MaskFeat's target (Wei et al. 2022), without its block normalisation.
    """
    found = layer_normed(oriented_gradients(pictures, cell).movedim(-3, -1))  # (V, B, C, H / cell, W / cell, 9)
    each = patch // cell
    cut = found.unflatten(-2, (-1, each)).unflatten(-4, (-1, each))  # (V, B, C, h, c, w, c, 9)
    return cut.permute(0, 1, 3, 5, 4, 6, 2, 7).flatten(4).flatten(2, 3)
