"""Distances of predicted from target features, one value a token. Sums and means over tokens are the method's."""

from torch import Tensor
from torch.nn import functional as F


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over D of (p - t)^2: (..., D), (..., D) -> (...)."""
    return (predicted.float() - target.float()).square().mean(-1)


def absolute_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over D of |p - t|: (..., D), (..., D) -> (...)."""
    return (predicted.float() - target.float()).abs().mean(-1)


def smooth_error(predicted: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Mean over D of e^2 / (2 beta) below beta and |e| - beta / 2 above: (..., D), (..., D) -> (...).

    With beta 2, as in dBOT and data2vec: e^2 / 4 below 2 and |e| - 1 above.
    """
    return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none", beta=beta).mean(-1)


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, in [0, 2]: (..., D), (..., D) -> (...)."""
    return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)
