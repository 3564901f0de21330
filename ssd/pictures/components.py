"""The three main components of patch features as red, green and blue.

A network's features turn freely while it learns, and components come in any sign and, where they are nearly as large as
each other, in any order. So the components of one moment are turned to agree with those of an earlier one on the same
patches, and colours keep their meaning from one sheet to the next.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd.batch import Tokens
from ssd.pictures.layout import Cell, table
from ssd.pictures.portraits import Portraits, as_large

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


def component_maps(tokens: Tokens, basis: Basis, portraits: Portraits) -> list[np.ndarray]:
    """The colours of each sample's patches (B, N, D), where its portrait shows them: (rows, columns, 3) uint8."""
    coloured = colours(basis.scores(tokens.patches))
    valid = [None] * len(coloured) if tokens.valid is None else tokens.valid.cpu()
    return [portraits.laid(values, tokens.grid, there) for values, there in zip(coloured, valid, strict=True)]


def all_patches(tokens: Tokens) -> Tensor:
    """Those of all samples (P, D), without padding."""
    return tokens.patches.flatten(0, 1) if tokens.valid is None else tokens.patches[tokens.valid]


def component_sheet(
    wholes: Sequence[np.ndarray], maps: Sequence[np.ndarray], strips: bool = False, cell: int = 128
) -> Image.Image:
    """Samples, arrays (h, w, 3) uint8, above their maps (rows, columns, 3); `strips` below each other."""
    pairs = [(Cell(whole), Cell(as_large(found, whole))) for whole, found in zip(wholes, maps, strict=True)]
    if not strips:
        return table([[whole for whole, _ in pairs], [found for _, found in pairs]], cell=cell)
    wide = max(round(cell * whole.shape[1] / whole.shape[0]) for whole in wholes)
    return table([[part] for pair in pairs for part in pair], cell=cell, wide=wide)
