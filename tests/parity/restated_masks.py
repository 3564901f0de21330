"""The published mask algorithms crop by crop, with Python's own random numbers, and what their laws say exactly."""

import math
import random

import numpy as np
import torch

from ssd.parity.mask_statistics import of_inverse_blocks, statistics

CROPS = 24_000


def block(rng, side, wanted, smallest, cap):
    """BEiT's loop: rectangles until the count is reached or ten tries fail."""
    mask, count = np.zeros((side, side), dtype=bool), 0
    while count < wanted:
        budget = min(wanted - count, cap)
        for _ in range(10):
            area = rng.uniform(smallest, budget)
            stretch = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            high, wide = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
            if high >= side or wide >= side:
                continue
            top, left = rng.randint(0, side - high), rng.randint(0, side - wide)
            part = mask[top : top + high, left : left + wide]
            fresh = high * wide - int(part.sum())
            if 0 < fresh <= budget:
                part[:] = True
                count += fresh
                break
        else:
            break
    return mask


def of_law(masks, share):
    """Statistics of simulated crops, with the share of masked ones as the law has it."""
    return statistics(np.stack(masks)) | {"masked crops": torch.tensor(share)}


def blocks():
    rng = random.Random(0)
    return of_law([block(rng, 14, rng.uniform(0.1, 0.5) * 196, 16, 196) for _ in range(CROPS)], 0.5)


def scattered():
    """int(r N) places of N, every one as likely: what each statistic is, by counting."""
    ratios = [int(r * 196) / 196 for r in np.linspace(0.1, 0.5, 200_001)]
    mean, square = np.mean(ratios), np.mean(np.square(ratios))
    # of n hidden among N: two given places are both hidden with n (n - 1) / (N (N - 1)), one of them with 2 n / N less that
    both = np.mean([r * (196 * r - 1) / 195 for r in ratios])
    values = {
        "masked crops": 0.5,
        "mean ratio": mean,
        "deviation of ratio": math.sqrt(square - mean**2),
        "neighbours": both / (2 * mean - both),
        "on the border": mean,
        "in the middle": mean,
    }
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def even(rng, masked, tokens, upper):
    """The request of each of `masked` crops of a batch: their shares lie in equal parts of .1 to .5."""
    edges = [0.1 + 0.4 * i / masked for i in range(masked + 1)]
    return [int((high if upper else rng.uniform(low, high)) * tokens + 1e-9) for low, high in zip(edges, edges[1:])]


def even_blocks():
    rng = random.Random(1)
    masks = [block(rng, 14, wanted, 4, 98) for _ in range(CROPS // 60) for wanted in even(rng, 60, 196, False)]
    return of_law(masks, 0.5)


def filled(rng, wanted):
    mask = block(rng, 16, wanted, 4, 128)
    rest = [place for place in range(256) if not mask.flat[place]]
    for place in rng.sample(rest, wanted - int(mask.sum())):
        mask.flat[place] = True
    return mask


def filled_blocks():
    rng = random.Random(2)
    return of_law([filled(rng, wanted) for _ in range(CROPS // 60) for wanted in even(rng, 60, 256, True)], 0.5)


def filled_counts():
    """DINOv3: 16 masked crops of 256 patches."""
    counts = [32, 38, 44, 51, 57, 64, 70, 76, 83, 89, 96, 102, 108, 115, 121, 128]
    return {"fewest": torch.tensor(counts), "most": torch.tensor(counts)}


def inverse_blocks():
    """CAPI: 90 visible patches of a rectangle in raster order, rolled to any place."""
    rng, masks = random.Random(3), []
    for _ in range(CROPS):
        shown, side = 256 - int(256 * 0.65), 16
        low, high = max(math.log(0.5), math.log(shown / side**2)), min(math.log(2), math.log(side**2 / shown))
        stretch = math.exp(rng.uniform(low, high))
        rows, columns = math.ceil(math.sqrt(shown * stretch)), math.ceil(math.sqrt(shown / stretch))
        rows, columns = min(rows, side), min(columns, side)
        top, left = rng.randint(0, side - rows), rng.randint(0, side - columns)
        visible = np.zeros((side, side), dtype=bool)
        for number in range(shown):
            visible[top + number // columns, left + number % columns] = True
        visible = np.roll(visible, (rng.randrange(side), rng.randrange(side)), (0, 1))
        masks.append(~visible)
    return of_inverse_blocks(np.stack(masks))


def inverse_counts():
    return {"fewest": torch.tensor([166]), "most": torch.tensor([166])}
