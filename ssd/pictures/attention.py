"""Where a transformer's last block looks, over the pictures."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd.backbones.base import Attention
from ssd.pictures.layout import Cell, table

HEAT = 0.7  # share of the colour that tells attention, beside the picture in grey
GREY = np.array([0.299, 0.587, 0.114])


def attention_sheet(pictures: Sequence[np.ndarray], attention: Attention, cell: int = 128) -> Image.Image:
    """One row a picture: itself, the mean of the heads, each head. B arrays (h, w, 3) uint8.

    Each map is brightest at its own largest value, or at twice an even share where that is more, so that attention to
    everything alike is no bright picture. The number under it says over how many patches it is spread: the
    exponential of its entropy, all of them where it looks everywhere alike.
    """
    shares = attention.shares.detach().float().cpu()  # (B, heads, N)
    with_mean = torch.cat([shares.mean(1, keepdim=True), shares], dim=1)
    patches = shares.shape[-1]
    rows = [
        [Cell(picture)]
        + [
            Cell(overlaid(picture, share.reshape(attention.grid)), f"spread {float(spread(share)):.0f} of {patches}")
            for share in maps
        ]
        for picture, maps in zip(pictures, with_mean, strict=True)
    ]
    headings = ["picture", "all heads", *(f"head {number + 1}" for number in range(shares.shape[1]))]
    return table(rows, headings, cell=cell)


def spread(shares: Tensor) -> Tensor:
    """Over how many patches attention (..., N) is spread: exp of the entropy of its shares. (...)"""
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def overlaid(picture: np.ndarray, values: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 and values (h, w) that sum to 1 at most -> the picture in grey under their heat, (H, W, 3)."""
    height, width = picture.shape[:2]
    rows, columns = values.shape
    brightest = values.max().clamp_min(2 / values.numel())
    heat = matplotlib.colormaps["inferno"]((values / brightest).numpy())[:, :, :3]
    heat = heat[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    grey = (picture @ GREY / 255)[:, :, None]
    return np.rint(255 * (HEAT * heat + (1 - HEAT) * grey)).astype(np.uint8)
