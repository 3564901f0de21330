"""Masks drawn by ours, many of them, by the numbers that tell one law from another."""

import numpy as np
import torch
from torch import Tensor

from ssd.masking.recipes import BlockMasks, InverseBlockMasks, Masking
from ssd.masking.scattered import ScatteredMasks

DRAWS, VIEWS, BATCH = 512, 2, 64


def statistics(masks: np.ndarray) -> dict[str, Tensor]:
    """(n, H, W) bool -> shares in [0, 1], each a mean over crops; all but the first over those that are masked at all.

    "neighbours" is how many of the pairs of neighbours with a hidden token have two: high for blocks, low for scattered
    tokens.
    """
    crops = masks[masks.any((1, 2))]
    ratio = crops.mean((1, 2))
    both = sum(int(pair.sum()) for pair in (crops[:, 1:] & crops[:, :-1], crops[:, :, 1:] & crops[:, :, :-1]))
    either = sum(int(pair.sum()) for pair in (crops[:, 1:] | crops[:, :-1], crops[:, :, 1:] | crops[:, :, :-1]))
    side = masks.shape[1]
    middle = slice(side // 4, side - side // 4)
    border = np.ones((side, side), dtype=bool)
    border[1:-1, 1:-1] = False
    found = {
        "masked crops": len(crops) / len(masks),
        "mean ratio": ratio.mean(),
        "deviation of ratio": ratio.std(),
        "neighbours": both / either,
        "on the border": crops[:, border].mean(),
        "in the middle": crops[:, middle, middle].mean(),
    }
    return {name: torch.tensor(float(value)) for name, value in found.items()}


def span_statistics(masks: np.ndarray) -> dict[str, Tensor]:
    """(n, T) bool -> shares over sequences: of hidden frames, of those whose next is hidden too, and at the ends."""
    found = {
        "hidden": masks.mean(),
        "in twos": (masks[:, 1:] & masks[:, :-1]).mean(),
        "first": masks[:, 0].mean(),
        "last": masks[:, -1].mean(),
    }
    return {name: torch.tensor(float(value)) for name, value in found.items()}


def drawn(recipe: Masking, side: int) -> np.ndarray:
    """(DRAWS, VIEWS, BATCH, side, side)"""
    return np.stack([recipe.draw(VIEWS, BATCH, (side, side), 0, step) for step in range(DRAWS)]).reshape(
        DRAWS, VIEWS, BATCH, side, side
    )


def all_crops(recipe: Masking, side: int) -> dict[str, Tensor]:
    return statistics(drawn(recipe, side).reshape(-1, side, side))


def blocks(device: torch.device) -> dict[str, Tensor]:
    return all_crops(BlockMasks(), 14)


def scattered(device: torch.device) -> dict[str, Tensor]:
    return all_crops(ScatteredMasks(), 14)


def even_blocks(device: torch.device) -> dict[str, Tensor]:
    return all_crops(BlockMasks(smallest=4, largest=0.5, even=True), 14)


def filled_blocks(device: torch.device) -> dict[str, Tensor]:
    return all_crops(BlockMasks(smallest=4, largest=0.5, even=True, filled=True), 16)


def filled_counts(device: torch.device) -> dict[str, Tensor]:
    """Hidden tokens of each masked crop, in order, of 16 samples: the fewest and the most that any step had."""
    recipe = BlockMasks(smallest=4, largest=0.5, even=True, filled=True)
    counts = np.stack([np.sort(recipe.draw(2, 16, (16, 16), 0, step).sum(2).ravel()) for step in range(20)])
    return {"fewest": torch.tensor(counts.min(0)[16:]), "most": torch.tensor(counts.max(0)[16:])}


def inverse_blocks(device: torch.device) -> dict[str, Tensor]:
    return of_inverse_blocks(drawn(InverseBlockMasks(), 16).reshape(-1, 16, 16))


def of_inverse_blocks(masks: np.ndarray) -> dict[str, Tensor]:
    """With the deviation of the visible block's height, which tells the range of its shapes."""
    heights = (~masks).any(2).mean(1)
    return statistics(masks) | {"deviation of height": torch.tensor(float(heights.std()))}


def inverse_counts(device: torch.device) -> dict[str, Tensor]:
    counts = InverseBlockMasks().draw(1, 64, (16, 16), 0, 0).sum(2)
    return {"fewest": torch.tensor([counts.min()]), "most": torch.tensor([counts.max()])}
