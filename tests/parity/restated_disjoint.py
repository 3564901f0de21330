"""DMJD in float64, from its paper's equations: gradients pixel by pixel, masks patch by patch, and twenty steps."""

import math
import random

import numpy as np
import torch

from ssd.parity.inputs import equal_masks, level_pictures, levels, normalisation
from ssd.parity.mask_statistics import statistics
from tests.parity.restated_frozen import ends, still, with_fixed_positions
from tests.parity.restated_layers import over_channels
from tests.parity.restated_masked import EPS, PLACES, encoder_shapes, predicted, rate, smooth, student_shapes
from tests.parity.restated_masks import CROPS
from tests.parity.restated_networks import WIDTH, gelu, layer_norm, parameters, part
from tests.parity.restated_trajectories import SAMPLES, STEPS, Learner

# ---------------------------------------------------------------------- parts


def bins_of(pictures):
    """(..., H, W) -> (..., 9, H, W): the length of each pixel's gradient, at the one of nine bins of 20 degrees it lies in."""
    across, down = torch.zeros_like(pictures), torch.zeros_like(pictures)
    across[..., 1:-1] = pictures[..., 2:] - pictures[..., :-2]
    down[..., 1:-1, :] = pictures[..., 2:, :] - pictures[..., :-2, :]
    angle = torch.rad2deg(torch.atan2(down, across)) % 180.0
    length = (across**2 + down**2).sqrt()
    return torch.stack([torch.where((angle >= low) & (angle < low + 20), length, 0.0) for low in range(0, 180, 20)], -3)


def histograms(pictures, cell):
    """(..., H, W) -> (..., H / cell, W / cell, 9): means over cells."""
    found, (height, width) = bins_of(pictures), pictures.shape[-2:]
    rows = [
        [found[..., i : i + cell, j : j + cell].mean((-2, -1)) for j in range(0, width, cell)]
        for i in range(0, height, cell)
    ]
    return torch.stack([torch.stack(row, -2) for row in rows], -3)


def targets_of(pictures, patch, cell):
    """(B, C, H, W) -> (B, N, D): of each patch its cells, row by row, of each the channels, of each its bins at mean 0."""
    each = over_channels(histograms(pictures, cell))  # (B, C, h, w, 9)
    cells, patches = patch // cell, []
    for top in range(0, each.shape[2], cells):
        for left in range(0, each.shape[3], cells):
            inside = [(top + i, left + j) for i in range(cells) for j in range(cells)]
            patches.append(torch.cat([each[:, c, i, j] for i, j in inside for c in range(each.shape[1])], -1))
    return torch.stack(patches, 1)


def gradients():
    """A ramp of 1 a column has gradients of 2 along rows but in its first and last column: 1.5 in bin 0."""
    view = levels("levels", 2, 3, 2, 16, 24).double()
    ramp = over_channels(torch.tensor([1.5] + [0.0] * 8).double())
    by_hand = torch.tensor([8.0] + [-1.0] * 8).double() / math.sqrt(8)
    assert (ramp - by_hand).abs().max() < 1e-4  # the difference is the 1e-5 beside the variance
    return {
        "histograms": histograms(view, 4).movedim(-1, -3),
        "targets": torch.stack([targets_of(x, 8, 4) for x in view]),
        "ramp": ramp,
        "without an edge": torch.zeros(9),
    }


def pair_of(rng, cells, masked):
    """Two masks of so many cells: the second hides what the first shows, as far as it can, and then what it hides too."""
    first = set(rng.sample(range(cells), masked))
    shown = [n for n in range(cells) if n not in first]
    fresh = rng.sample(shown, min(len(shown), masked))
    return first, set(fresh) | set(rng.sample(sorted(first), masked - len(fresh)))


def pairs():
    rng, found = random.Random(5), []
    for _ in range(CROPS // 2):
        for hidden in pair_of(rng, 49, 49 - 19):
            small = np.array([n in hidden for n in range(49)]).reshape(7, 7)
            found.append(np.kron(small, np.ones((2, 2))) > 0)
    return statistics(np.stack(found))


def pair_counts():
    """As the released functions gave them: shown, hidden by one at least, hidden by both."""
    known = {
        "random .60": (78, 196, 40),
        "random .75": (49, 196, 98),
        "random .90": (19, 196, 158),
        "random .40": (117, 157, 1),
        "block .60": (76, 196, 44),
        "block .75": (48, 196, 100),
    }
    return {
        name: torch.tensor([[shown] * 2, [shown] * 2, [one] * 2, [both] * 2])
        for name, (shown, one, both) in known.items()
    }


# ---------------------------------------------------------------------- twenty steps


def shapes(outwards):
    found, width = student_shapes(outwards), WIDTH
    for layer, out in ((0, 10), (3, 10), (6, 10)):
        found |= {f"predictor.0.{layer}.weight": (out, width), f"predictor.0.{layer}.bias": (out,)}
        if layer < 6:
            found |= {f"predictor.0.{layer + 1}.weight": (out,), f"predictor.0.{layer + 1}.bias": (out,)}
        width = out
    return found | {"predictor.2.0.weight": (outwards, 10), "predictor.2.0.bias": (outwards,)}


def of_visible(p, tokens):
    """Three layers with normalisation and GELU between them, normalisation without gain, and one more layer."""
    w, x = part(p, "predictor."), tokens
    for layer in (0, 3):
        x = x @ w[f"0.{layer}.weight"].T + w[f"0.{layer}.bias"]
        x = gelu(layer_norm(x, w[f"0.{layer + 1}.weight"], w[f"0.{layer + 1}.bias"], EPS))
    x = x @ w["0.6.weight"].T + w["0.6.bias"]
    return layer_norm(x, 1.0, 0.0, EPS) @ w["2.0.weight"].T + w["2.0.bias"]


def dmjd():
    """Histograms of cells of 4 px in patches of 8; the rate is 1 / .6 as high, because a patch that is hidden .6 of the
    time is predicted always."""

    mean, deviation = normalisation().double()[:, :, None, None]

    def target(x):
        return targets_of(255 * (x * deviation + mean), 8, 4)

    return of_two_masks({}, target, 3 * 4 * 9, 1.0, 1 / 0.6, 1.5)


def dmjd_teacher():
    teacher = still(encoder_shapes("backbone.model.", 32, 3))
    target = lambda x: over_channels(ends(part(teacher, "backbone.model."), x)[-1][:, 1:])
    return of_two_masks(with_fixed_positions(teacher, "backbone.model."), target, 32, 0.5, 1.0, None)


def of_two_masks(teacher, target, width, weight, factor, clip):
    student = parameters(shapes(width))
    learner = Learner(student, "masked", clip=clip, decay=0.05)
    for i in range(STEPS):
        x = level_pictures(i)[0].double()
        wanted, hidden, seen = target(x), [], []
        for number in range(2):
            rows = equal_masks(i + 5 * number, shown=6)[0].tolist()
            shown = [[n for n in range(PLACES) if not row[n]] for row in rows]
            answer, states = predicted(student, x, shown)
            norm = student["backbone.model.norm.weight"], student["backbone.model.norm.bias"]
            said = of_visible(student, layer_norm(states[-1], *norm, EPS)[:, 1:])
            for b in range(SAMPLES):
                away = [n for n in range(PLACES) if n not in shown[b]]
                hidden += (answer[b, [1 + n for n in away]] - wanted[b, away]).square().mean(1)
                seen += smooth(said[b] - wanted[b, shown[b]]).mean(1)
        terms = {"masked": torch.stack(hidden).mean(), "visible": torch.stack(seen).mean()}
        learner.learn(i, terms["masked"] + weight * terms["visible"], terms, factor * rate(i, STEPS))
    return learner.outputs(teacher, teacher)
