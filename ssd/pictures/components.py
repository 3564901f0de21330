"""The three main components of patch features as red, green and blue.

A network's features turn freely while it learns, and components come in any sign and, where they are nearly as large as
each other, in any order. So the components of one moment are turned to agree with those of an earlier one on the same
patches, and colours keep their meaning from picture to picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd.pictures.layout import Cell, table

WIDEST = 2.5  # standard deviations from the mean at which a colour is full
SMALLEST = 1e-6  # share of the largest component's deviation below which one is rounding


class Basis(NamedTuple):
    """What turns features (..., D) into scores (..., 3) of mean 0 and variance 1 on the patches it was fitted to."""

    mean: Tensor
    directions: Tensor

    def scores(self, patches: Tensor) -> Tensor:
        return (patches.detach().double().cpu() - self.mean) @ self.directions


def fit_basis(patches: Tensor, like: Tensor | None = None) -> Basis:
    """The three main components of patches (P, D), turned to be as near as can be to scores `like` (P, 3) of the same
    patches. Without `like` each component's longer tail is positive. Components that are not there are zero.
    """
    patches = patches.detach().double().cpu()
    mean = patches.mean(0)
    _, sizes, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    count = min(3, len(sizes))
    there = sizes[:count] > SMALLEST * max(float(sizes[0]), 1e-12)
    scale = torch.where(there, len(patches) ** 0.5 / sizes[:count].clamp_min(1e-300), 0.0)
    basis = torch.zeros(patches.shape[1], 3, dtype=torch.float64)
    basis[:, :count] = directions[:count].T * scale
    scores = (patches - mean) @ basis
    if like is None:
        turned = torch.diag(torch.where((scores**3).sum(0) < 0, -1.0, 1.0).double())
    else:
        # orthogonal Procrustes: the rotation or reflection R with the smallest |scores R - like|
        left, _, right = torch.linalg.svd(scores.T @ like.double().cpu())
        turned = left @ right
    return Basis(mean, basis @ turned)


def colours(scores: Tensor) -> np.ndarray:
    """Scores (..., 3) -> uint8, mid-grey at the mean."""
    shown = 0.5 + scores.double().cpu() / (2 * WIDEST)
    return (255 * shown.clamp(0, 1)).round().to(torch.uint8).numpy()


def component_sheet(
    pictures: Sequence[np.ndarray], scores: Tensor, grid: tuple[int, int], cell: int = 128
) -> Image.Image:
    """Pictures, B arrays (h, w, 3) uint8, above the maps of their scores (B, N, 3)."""
    maps = colours(scores).reshape(len(pictures), *grid, 3)
    return table([[Cell(picture) for picture in pictures], [Cell(found) for found in maps]], cell=cell)
