"""Positions that are computed, not learned."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.errors import UserError


@lru_cache(maxsize=32)
def sincos_positions(grid: tuple[int, ...], dim: int, base: float = 10_000.0) -> Tensor:
    """Fixed positions (N, dim) of a grid (h, w), (t, h, w) or (t,): sines and cosines of each coordinate in a part of its own.

    Each coordinate takes an equal even number of dimensions, the last coordinate (columns) first as in MAE's code, in each
    sines before cosines at frequencies base^(-i / n); dimensions that are left over are 0. Vaswani et al. 2017, section 3.5.
    """
    each = dim // (2 * len(grid))
    if each == 0:
        raise UserError(f"positions on a grid of {len(grid)} axes need at least {2 * len(grid)} dimensions, not {dim}.")
    frequencies = base ** (-torch.arange(each, dtype=torch.float64) / each)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    parts = []
    for axis in reversed(axes):
        angle = axis.flatten()[:, None] * frequencies
        parts += [angle.sin(), angle.cos()]
    positions = torch.cat(parts, dim=1)
    return F.pad(positions, (0, dim - positions.shape[1])).float()


@lru_cache(maxsize=32)
def flat_positions(grid: tuple[int, ...], dim: int, base: float = 10_000.0) -> Tensor:
    """Fixed positions (N, dim) by the place i in the flattened sequence alone: sin(i w_k) and cos(i w_k) in turn with
    w_k = base^(-2 k / dim). Vaswani et al. 2017, section 3.5; of clips Tong et al. 2022."""
    if dim % 2:
        raise UserError(f"positions: 'flat' needs an even width, not {dim}. Use 'sincos'.")
    frequencies = base ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    angle = torch.arange(math.prod(grid), dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()
