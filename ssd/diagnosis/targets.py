"""How targets use their prototypes: what tells collapse from sharpness, measured in a step that is logged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd.batch import Targets
from ssd.distributed import sum_over_ranks, world_size
from ssd.losses.prototype import entropy
from ssd.targets import Centering


@dataclass(frozen=True)
class TargetUse:
    """One kind of targets in one step, in nats.

    Each sample's target may be sharp while together they use all prototypes: `entropy` is low and `entropy_of_mean` high.
    Where every sample gets the same prototype both are near 0, and where every target is uniform both are ln K.

    Args:
        num_prototypes: K.
        rows: targets in the step, over all ranks.
        entropy: mean over the targets.
        entropy_of_mean: of the mean target.
        center_share: length of the centre over that of the mean logits it is an average of, None without a centre.
    """

    num_prototypes: int
    rows: int
    entropy: float
    entropy_of_mean: float
    center_share: float | None = None

    @property
    def uniformity(self) -> float:
        """1 where every target is uniform."""
        return self.entropy / math.log(max(self.num_prototypes, 2))

    @property
    def perplexity(self) -> float:
        """The effective number of prototypes in use, in [1, K]."""
        return math.exp(self.entropy_of_mean)

    @property
    def most(self) -> int:
        """The largest perplexity that sharp targets could have."""
        return min(self.num_prototypes, self.rows)


KINDS = {"picture": ("probs", "center"), "patch": ("patch_probs", "patch_center")}
"""Kind of target -> its name among the targets, and that of its centre in the method."""


def measured_use(targets: Targets, centers: Mapping[str, Tensor | None]) -> dict[str, tuple[int, Tensor]]:
    """Kind of target -> K, and (4,) rows, entropy, entropy of the mean and share of the centre, alike on all ranks.

    Args:
        centers: kind -> the centre in force, of kinds that have one.
    """
    found = {}
    for kind, (name, _) in KINDS.items():
        probs = getattr(targets, name, None)
        if probs is None:
            continue
        rows = probs.detach().float().flatten(0, -2)
        weight = getattr(targets, "patch_weight", None) if kind == "patch" else None
        counts = rows.new_ones(len(rows)) if weight is None else (weight > 0).to(rows)  # padding is uniform
        with torch.autocast(rows.device.type, enabled=False):  # products would be of half precision
            sums = torch.cat([counts @ rows, (counts @ entropy(rows))[None], counts.sum()[None]])
        sums = sum_over_ranks(sums)
        count = sums[-1].clamp_min(1)
        share = center_share(targets, kind, centers.get(kind), rows.device)
        found[kind] = (rows.shape[1], torch.stack([sums[-1], sums[-2] / count, entropy(sums[:-2] / count), share]))
    return found


def target_use(num_prototypes: int, rows: float, entropy: float, entropy_of_mean: float, share: float) -> TargetUse:
    """From the numbers of `measured_use`."""
    return TargetUse(num_prototypes, round(rows), entropy, entropy_of_mean, None if math.isnan(share) else share)


def center_share(targets: Targets, kind: str, center: Tensor | None, device: torch.device) -> Tensor:
    """Length of the centre over that of this step's mean logits; NaN where there is no centre.

    An average of logits can hardly be longer than they are, so far above 1 it is no average any more.
    """
    name = "logits" if kind == "picture" else "patch_features"
    rows: Tensor | None = getattr(targets, name, None)
    if center is None or rows is None:
        return torch.full((), math.nan, device=device)
    mean = rows.detach().float().flatten(0, -2).mean(0)
    if kind == "patch":
        mean = (targets.patch_prototypes.float() * mean).sum(-1)
    mean = sum_over_ranks(mean) / world_size()
    return center.norm() / mean.norm().clamp_min(torch.finfo(torch.float32).tiny)


def centers_of(method: object) -> dict[str, Tensor | None]:
    """Kind of target -> its centre, of methods that centre it."""
    found = {kind: getattr(method, center, None) for kind, (_, center) in KINDS.items()}
    return {kind: part.center for kind, part in found.items() if isinstance(part, Centering)}
