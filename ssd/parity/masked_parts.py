"""Our values of what masked regression is made of: targets, distances, positions, decoder."""

import torch

from ssd.backbones.positions import sincos_positions
from ssd.decoders import MaskedDecoder
from ssd.losses.regression import absolute_error, smooth_error, squared_error
from ssd.masked_branch import mean_over_hidden, pixel_targets
from ssd.masking.recipes import RandomMasks
from ssd.normalisers import standardised, unit_length
from ssd.parity.inputs import fill, numbers, pictures
from ssd.parity.mask_statistics import all_crops
from ssd.parity.masked_trajectories import visible_alone
from ssd.parity.parts import Outputs, leaf, with_gradients


def features(device: torch.device) -> Outputs:
    values = 3 * numbers("features", 2, 5, 7).to(device) + 1
    return {"standardised": standardised(values), "unit length": unit_length(values)}


def pixels(device: torch.device) -> Outputs:
    """Of pictures of 16x24 px in patches of 8."""
    views = pictures("global", 0, 2, 3, 3, 16, 24).to(device)
    return {"as they are": pixel_targets(views, 8, False), "normalised": pixel_targets(views, 8, True)}


def distances(device: torch.device) -> Outputs:
    """Errors of up to 4, so on both sides of the corner at 2."""
    values: Outputs = {}
    target = 3 * numbers("target features", 2, 5, 7).to(device)
    for name, distance in (("squared", squared_error), ("absolute", absolute_error), ("smooth", smooth_error)):
        predicted = leaf("predicted features", 2, 5, 7, device=device)
        values |= with_gradients(name, distance(predicted, target), predicted=predicted)
    return values


def over_hidden(device: torch.device) -> Outputs:
    """Of half of a step of 16 samples."""
    masks = visible_alone(0)
    masks.boolean = masks.boolean.to(device)
    return {"mean": mean_over_hidden(numbers("errors", 1, 8, 16).to(device), masks, 16)[None]}


def positions(device: torch.device) -> Outputs:
    """On a grid of rows and columns, one whose width leaves dimensions over, one of times, and one of sound."""
    grids = {"2x3, 24": ((2, 3), 24), "3x2, 10": ((3, 2), 10), "2x2x3, 12": ((2, 2, 3), 12), "5, 6": ((5,), 6)}
    return {name: sincos_positions(grid, dim).to(device) for name, (grid, dim) in grids.items()}


def decoder(device: torch.device) -> Outputs:
    """Of 3 visible patches of 6, with a class token and without."""
    values: Outputs = {}
    visible = torch.tensor([[0, 2, 5], [1, 3, 4]], device=device)
    for has_cls, name in ((True, "with class token, "), (False, "")):
        network = MaskedDecoder(6, 5, dim=8, depth=2, num_heads=2, has_cls=has_cls)
        fill(network)
        network.to(device)
        shown = leaf("visible patches", 2, 3, 6, device=device)
        cls = numbers("class tokens", 2, 6).to(device) if has_cls else None
        answer = network(shown, visible, (2, 3), cls)
        values |= with_gradients(f"{name}predictions", answer, shown=shown, **dict(network.named_parameters()))
    return values


def random_masks(device: torch.device) -> Outputs:
    return all_crops(RandomMasks(0.75), 14)


SHOWN = {
    "196, 0.75": (RandomMasks(0.75), 14),
    "196, 0.95": (RandomMasks(0.95), 14),
    "196, 0.98": (RandomMasks(0.98), 14),
    "196, keep 10": (RandomMasks(keep=10), 14),
    "196, keep 4": (RandomMasks(keep=4), 14),
    "64, 0.75": (RandomMasks(0.75), 8),
}


def visible_counts(device: torch.device) -> Outputs:
    """The fewest and the most that any of 256 crops shows."""
    values = {}
    for name, (recipe, side) in SHOWN.items():
        counts = (~recipe.draw(1, 256, (side, side), 0, 0)).sum(2)
        values[name] = torch.tensor([counts.min(), counts.max()])
    return values
