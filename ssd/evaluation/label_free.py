"""What a run says of itself without labels: whether teacher and student agree, how many prototypes are in use, and
what of the features tells samples apart and survives their views."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.evaluation.protocol import Number
from ssd.evaluation.spectrum import lidar
from ssd.losses.prototype import entropy


def agreement_number(teacher: Tensor, student: Tensor) -> Number:
    """Mean cosine of both networks' features of the same samples, (N, D) each, about each network's own mean.

    1 where they say the same of every sample and 0 where they have nothing in common. Uncentred it would be close to 1 for
    any two networks whose features have a large constant part.
    """
    ours, theirs = (features.double() - features.double().mean(0) for features in (teacher, student))
    value = F.cosine_similarity(ours, theirs, dim=1).mean()
    return Number("agreement/cosine", float(value), f"agreement-v1 of {len(teacher)} training samples, centred")


def lidar_number(views: Tensor) -> Number:
    """LiDAR of V views of each of B samples, (B, V, D)."""
    return Number(
        "spectrum/lidar", lidar(views), f"lidar-v1 of {len(views)} training samples in {views.shape[1]} views"
    )


class PrototypeUse:
    """Gathers the targets of many batches: how much each prototype gets, and which are ever the first choice.

    Args:
        device: where the targets lie.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.mass = torch.zeros(0, device=device)
        self.chosen = torch.zeros(0, device=device)
        self.rows = torch.zeros(1, device=device)

    def add(self, probs: Tensor) -> None:
        """(..., K) distributions."""
        rows = probs.detach().float().flatten(0, -2)
        if not len(self.mass):
            self.mass, self.chosen = rows.new_zeros(2, rows.shape[1])
        self.mass += rows.sum(0)
        self.chosen += rows.argmax(1).bincount(minlength=rows.shape[1])
        self.rows += len(rows)

    def state(self) -> Tensor:
        """All there is as one (2 K + 1,) tensor, which may be summed over processes."""
        return torch.cat([self.mass, self.chosen, self.rows])


def prototype_numbers(state: Tensor, name: str = "prototypes") -> list[Number]:
    """Of `PrototypeUse.state`: the effective number of prototypes in use, exp of the entropy of the mean target, in [1, K],
    and the share of them that is some view's first choice, of as many as so many views could choose, in (0, 1]."""
    (mass, chosen), rows = state[:-1].chunk(2), float(state[-1])
    perplexity = float(entropy(mass / mass.sum()).exp())
    used = int((chosen > 0).sum()) / min(len(mass), rows)
    protocol = f"prototypes-v1 K={len(mass)}, {rows:.0f} views"
    return [Number(f"{name}/perplexity", perplexity, protocol), Number(f"{name}/used", used, protocol)]
