"""Which samples a probe may see: the part held out to choose a setting, and the draws of few labelled samples.

Every choice is a function of labels and seed alone, never of features, so that all feature sets of the
same samples are judged on the same draws.
"""

import numpy as np
import torch
from torch import Tensor

from ssd.data.randomness import uniforms
from ssd.errors import UserError

HELD_OUT, DRAWS = 1, 2


def shuffled_by_class(labels: Tensor, *place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An order of the samples, class after class and random inside a class.

    (N,) labels -> (N,) indices in that order, the place (N,) of each inside its class, and the class sizes (C,).
    """
    plain = labels.cpu().numpy()
    counts = np.bincount(plain)
    order = np.lexsort((uniforms((len(plain),), *place), plain))
    return order, np.arange(len(plain)) - np.repeat(np.cumsum(counts) - counts, counts), counts


def held_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A split of the training set that keeps the share of every class: indices (F,) to fit on, (H,) held out.

    A class of one sample is fitted on. Raises UserError where no class has a sample to spare.
    """
    order, place, counts = shuffled_by_class(labels, HELD_OUT, seed)
    spared = np.where(counts > 1, np.clip(np.rint(share * counts), 1, np.maximum(counts - 1, 1)), 0)
    held = place < np.repeat(spared, counts)
    if not held.any():
        raise UserError(
            f"{len(labels)} training samples in {np.count_nonzero(counts)} classes leave none to hold out for choosing "
            "a setting. Give more labelled samples, or one fixed value of the setting."
        )
    fit, rest = (torch.from_numpy(np.sort(part)).to(labels.device) for part in (order[~held], order[held]))
    return fit, rest


def balanced_draws(labels: Tensor, per_class: int, draws: int, seed: int) -> Tensor:
    """Indices (draws, M) of labelled samples, `per_class` of every class, without repeats inside a draw.

    A class with fewer samples gives all it has. Draw number i is the same whatever the number of draws.
    """
    if per_class < 1 or draws < 1:
        raise UserError(f"{draws} draws of {per_class} labels per class draw nothing; both must be at least 1.")
    taken = []
    for draw in range(draws):
        order, place, _ = shuffled_by_class(labels, DRAWS, seed, per_class, draw)
        taken.append(order[place < per_class])
    return torch.from_numpy(np.stack(taken)).to(labels.device)


def labels_per_class(labels: Tensor, share: float) -> int:
    """The whole number of labels per class nearest to `share` of the training set, at least one."""
    return max(1, round(share * len(labels) / len(labels.unique())))
