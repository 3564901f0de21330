"""Linear classifiers, many at a time: the grids and draws of the linear probes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Heads:
    """G linear classifiers of D dimensions into C classes.

    Args:
        weight: (G, D, C).
        bias: (G, C).
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, D), shared by all, or (G, N, D) -> (G, N, C)."""
        return product(features, self.weight) + self.bias[:, None]


@dataclass
class Fit:
    """What a probe with a chosen setting answers.

    Args:
        predictions: (Q,) classes of the test features.
        setting: the value (learning rate or penalty) that was chosen without the test set.
    """

    predictions: Tensor
    setting: float


def product(features: Tensor, weight: Tensor) -> Tensor:
    """(N, D) or (G, N, D) with (G, D, C) -> (G, N, C); features shared by all go through one product."""
    if features.dim() == 3:
        return torch.bmm(features, weight)
    groups, _, classes = weight.shape
    return (features @ weight.transpose(0, 1).flatten(1)).unflatten(1, (groups, classes)).transpose(0, 1)


def probabilities(logits: Tensor, dim: int) -> Tensor:
    """Softmax in which nothing is below 1e-17 / C.

    Numbers too small for float32's usual form appear where a head is sure, and make a product with them ten to a
    hundred times as slow. Sums over the first of several dimensions are faster so than `torch.softmax`.
    """
    weights = (logits - logits.amax(dim, keepdim=True)).clamp_min_(-40).exp_()
    return weights.div_(weights.sum(dim, keepdim=True))
