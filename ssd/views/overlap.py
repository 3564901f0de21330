"""Where two views of one picture show the same places."""

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_OVERLAP = 0.1
"""Share of the smaller view that two views must have in common to be compared: less is a corner seen over and over."""


def shared_places(one: Tensor, other: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of places in what two views both show, as coordinates of either view.

    Boxes (B, 5), left, top, width, height in the source and 1 where flipped -> two (B, h, w, 2), across and down from -1
    to 1 between the view's edges, flips reckoned in, and (B,) whether the views have enough in common. Of views that
    have nothing in common the places mean nothing.
    """
    low = torch.maximum(one[:, :2], other[:, :2])  # (B, 2): across, down
    high = torch.minimum(one[:, :2] + one[:, 2:4], other[:, :2] + other[:, 2:4])
    common = (high - low).clamp_min(0).prod(-1)
    smaller = torch.minimum(one[:, 2:4].prod(-1), other[:, 2:4].prod(-1))
    rows, columns = ((torch.arange(size, device=one.device) + 0.5) / size for size in grid)
    shares = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (h, w, 2)
    places = low[:, None, None] + shares * (high - low)[:, None, None]
    return in_view(places, one), in_view(places, other), common >= LEAST_OVERLAP * smaller


def in_view(places: Tensor, box: Tensor) -> Tensor:
    """Places (B, h, w, 2) of the source in the coordinates of a view of it."""
    seen = 2 * (places - box[:, None, None, :2]) / box[:, None, None, 2:4] - 1
    flip = 1 - 2 * box[:, 4]
    return seen * torch.stack([flip, torch.ones_like(flip)], dim=-1)[:, None, None]


def sampled(maps: Tensor, places: Tensor) -> Tensor:
    """Bilinear values of maps (B, C, h, w) at places (B, H, W, 2) -> (B, C, H, W)"""
    return F.grid_sample(maps.float(), places.float(), padding_mode="border", align_corners=False)
