"""Our values of DMJD: histograms of gradients, pairs of masks, and twenty steps from two masks of one picture."""

from typing import Any

import numpy as np
import torch

from ssd.batch import Batch, Masks
from ssd.hog import hog_targets, oriented_gradients
from ssd.masking.batch import ordered
from ssd.masking.recipes import DisjointMasks, RandomMasks
from ssd.optim import Clip
from ssd.parity.inputs import equal_masks, level_pictures, levels, normalisation
from ssd.parity.mask_statistics import all_crops
from ssd.parity.masked_trajectories import DECODER, RATE, run_masked, vit
from ssd.parity.parts import Outputs
from ssd.parity.trajectories import SAMPLES
from ssd.views.recipes import CropViews

# ---------------------------------------------------------------------- parts


def gradients(device: torch.device) -> Outputs:
    """Of pictures, of one without an edge and of a ramp; patches of four cells."""
    view = levels("levels", 2, 3, 2, 16, 24).to(device)
    ramp = torch.arange(8.0, device=device).expand(1, 1, 1, 8, 8)
    return {
        "histograms": oriented_gradients(view, 4),
        "targets": hog_targets(view, 8, 4),
        "ramp": hog_targets(ramp, 8, 8),
        "without an edge": hog_targets(torch.full_like(ramp, 7.0), 8, 8),
    }


def pairs(device: torch.device) -> Outputs:
    """Of cells of four places, all crops."""
    return all_crops(DisjointMasks(0.6, cell=2), 14)


PAIRS = {
    "random .60": DisjointMasks(0.6),
    "random .75": DisjointMasks(0.75),
    "random .90": DisjointMasks(0.9),
    "random .40": DisjointMasks(0.4),
    "block .60": DisjointMasks(0.6, cell=2),
    "block .75": DisjointMasks(0.75, cell=2),
}


def pair_counts(device: torch.device) -> Outputs:
    """Of 196 places those that a view shows, those that one of two hides at least, and those that both hide: the fewest and
    the most of 128 pairs."""
    values = {}
    for name, recipe in PAIRS.items():
        first, second = recipe.draw(2, 128, (14, 14), 0, 0)
        counts = [(~first).sum(1), (~second).sum(1), (first | second).sum(1), (first & second).sum(1)]
        values[name] = torch.tensor(np.array([[count.min(), count.max()] for count in counts]))
    return values


# ---------------------------------------------------------------------- twenty steps


def dmjd(device: torch.device) -> Outputs:
    """Histograms of gradients; two masks of 60 % raise the learning rate by 1 / .6."""
    return of_two_masks(device, masks=DisjointMasks(0.6), cell=4, clip=Clip(1.5, over="all"))


def dmjd_teacher(device: torch.device) -> Outputs:
    """What a frozen network makes of whole pictures; masks of another recipe leave the learning rate as it is."""
    teacher = vit(embed_dim=32, depth=3)
    return of_two_masks(device, masks=RandomMasks(0.6), target="teacher", teacher=teacher, visible_weight=0.5)


def of_two_masks(device: torch.device, **settings: Any) -> Outputs:
    from lightning_modules.dmjd import DMJD

    module = DMJD(vit(), views=CropViews(size=32), predictor_dim=10, **DECODER, **settings, **RATE)
    return run_masked(module, device, batches=of_levels)


def of_levels(step: int) -> Batch:
    """One view of each picture, whose levels are whole numbers, under two masks."""
    hidden = torch.cat([equal_masks(step + 5 * number, shown=6) for number in range(2)])
    masks = Masks(hidden, ordered(hidden.numpy()), ordered(~hidden.numpy()))
    index = torch.arange(SAMPLES)
    return Batch(
        {"global": level_pictures(step)}, index, SAMPLES, masks={"global": masks}, normalisation=normalisation()
    )
