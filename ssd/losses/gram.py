"""Losses between the similarities of patches, which say what belongs together and not what it is."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines of all pairs of a picture's patches.

    (..., N, D) and (..., N, D') -> (...), float32, in [0, 4]: the mean over N x N of (Xs Xs^T - Xt Xt^T)^2 with rows of
    unit length. Simeoni et al. 2025, arXiv 2508.10104, section 4; the mean is the released code's, where the paper writes a
    Frobenius norm.
    """
    with torch.autocast(student.device.type, enabled=False):
        x = F.normalize(student.float(), dim=-1)
        y = F.normalize(teacher.float(), dim=-1)
        return (x @ x.transpose(-2, -1) - y @ y.transpose(-2, -1)).square().mean((-2, -1))


def resize_tokens(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patch features (n, h w, D) on a `grid` (h, w), brought bicubically to another, (n, h' w', D); without antialiasing,
    as in DINOv3's released code."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid).float()
    return F.interpolate(maps, size=to, mode="bicubic").flatten(2).transpose(1, 2)
