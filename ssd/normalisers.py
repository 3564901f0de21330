"""What is done to features or pixels before a student regresses them. Pure functions, in float32."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def standardised(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Each vector (..., D) at mean 0 and *unbiased* variance 1: (t - mean) / sqrt(var_{D - 1} + eps).

    Of features in dBOT (Liu et al. 2022), of a patch's pixels in MAE (He et al. 2022, section 3). Layer normalisation divides
    by the biased variance, which for D = 4 is a sixth more.
    """
    exact = features.float()
    variance, mean = torch.var_mean(exact, dim=-1, keepdim=True)
    return (exact - mean) / (variance + eps).sqrt()


def unit_length(features: Tensor) -> Tensor:
    """Each vector (..., D) over its length."""
    return F.normalize(features.float(), dim=-1)


def layer_normed(features: Tensor, eps: float = 1e-5) -> Tensor:
    """Each vector (..., D) at mean 0 and variance 1, without gain and bias."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=eps)


def instance_normed(features: Tensor, eps: float = 1e-5, valid: Tensor | None = None) -> Tensor:
    """Each channel of each sample (B, N, D) at mean 0 and variance 1 over the N tokens; one that is constant becomes 0.

    Patches alone: a class token is none of them (data2vec 2.0, Baevski et al. 2022). With `valid` (B, N) over the tokens that
    are no padding, and what is padding has no meaning; the one token of a sample that has no other becomes 0.
    """
    if features.shape[1] < 2 and valid is None:
        raise ValueError(f"instance normalisation over {features.shape[1]} token says nothing: two or more are needed")
    exact = features.float()
    if valid is None:
        variance, mean = torch.var_mean(exact, dim=1, correction=0, keepdim=True)
        return (exact - mean) / (variance + eps).sqrt()
    share = valid[..., None].float()
    count = share.sum(1, keepdim=True).clamp_min(1)
    centred = exact - (exact * share).sum(1, keepdim=True) / count
    variance = (centred.square() * share).sum(1, keepdim=True) / count
    return centred / (variance + eps).sqrt()


def standardised_over_patches(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Each channel of each sample (B, N, D) at mean 0 and *unbiased* deviation 1 over the N patches, (t - mean) /
    (std_{N - 1} + eps): what SCD compares with prototypes (Mishra et al. 2025)."""
    if features.shape[1] < 2:
        raise ValueError(f"a deviation over {features.shape[1]} patch says nothing: two or more are needed")
    exact = features.float()
    deviation, mean = torch.std_mean(exact, dim=1, keepdim=True)
    return (exact - mean) / (deviation + eps)


def average(layers: Sequence[Tensor]) -> Tensor:
    """Mean of the same tokens in several layers, each (B, N, D) and normalised before: a few channels of a residual stream
    are so large that they would be all that a plain mean shows."""
    return torch.stack(tuple(layers)).mean(0)


def patchified(samples: Tensor, patch: int | Sequence[int]) -> Tensor:
    """Pictures (B, C, H, W) -> (B, N, p p C), clips (B, C, T, H, W) -> (B, N, t p p C): patches, or tubes, row-major, the
    pixels of each likewise, channels last. `patch` is the side of squares, or the lengths along each axis."""
    batch, channels, *lengths = samples.shape
    sides = [patch] * len(lengths) if isinstance(patch, int) else list(patch)
    axes = len(lengths)
    grid = [length // side for length, side in zip(lengths, sides, strict=True)]
    cut = samples.reshape(batch, channels, *(number for pair in zip(grid, sides) for number in pair))
    cut = cut.permute(0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1)
    return cut.reshape(batch, math.prod(grid), math.prod(sides) * channels)


def unpatchified(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchified`: (B, N, p p C) -> (B, C, H, W)."""
    batch, _, values = patches.shape
    rows, columns = grid
    cut = patches.reshape(batch, rows, columns, patch, patch, values // patch**2)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, columns * patch)
