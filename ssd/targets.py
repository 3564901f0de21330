"""How teacher logits become target distributions, with what must be remembered between steps.

`forward` reads, `update` writes; memory is in buffers. Everything in float32.
"""

import torch
from torch import Tensor, nn

from ssd.batch import Scores
from ssd.distributed import max_over_ranks, sum_of_rows, sum_over_ranks
from ssd.errors import UserError


class Centering(nn.Module):
    """softmax((t - c) / temperature) with a running mean c of the teacher's logits. Caron et al. 2021, eq. 4.

    The centre keeps one prototype from winning everywhere; the low temperature keeps the output from
    going uniform. The centre in force is that of earlier steps: call `update` after use.

    Args:
        num_prototypes: K.
        momentum: share of the old centre that is kept, in [0, 1]; 0.999 collapses in the published ablation.
        name: what the setting of it is called, for its error.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9, name: str = "center_momentum"):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise UserError(f"{name}: {momentum} is not a share in [0, 1]. The published value is 0.9.")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., K) distributions. Rows do not meet, so padding needs no mark: `valid` is what Sinkhorn needs."""
        return torch.softmax((logits.float() - self.center).div_(temperature), dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor | Scores, valid: Tensor | None = None) -> None:
        """c <- m c + (1 - m) mean, over the rows of all ranks.

        Logits (..., K), or Scores, whose mean logits are the logits of their mean feature: K numbers a row are then
        never made. Only rows that are `valid` (...) count; the centre stays where there is none.
        """
        rows = logits.features if isinstance(logits, Scores) else logits
        total, count = sum_of_rows(rows.flatten(0, -2), None if valid is None else valid.flatten())
        mean = total / count.clamp_min(1)
        if isinstance(logits, Scores):
            # a sum of products stays in float32 under autocast, where a matrix product would not
            mean = (logits.prototypes.float() * mean).sum(-1)
        self.center.lerp_(mean, (1 - self.momentum) * (count > 0))


class Sinkhorn(nn.Module):
    """Targets that use every prototype alike over the step's rows of all ranks; remembers nothing.

    Args:
        iterations: of `sinkhorn_knopp`; 3 in every published recipe.
        apart: dimension of the logits whose places are assigned each by itself, such as positions; null = none.
    """

    def __init__(self, iterations: int = 3, apart: int | None = None):
        super().__init__()
        self.iterations = iterations
        self.apart = apart

    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., K) distributions; all leading dimensions but `apart` are assigned jointly, rows that are not
        `valid` (...) are uniform and do not count."""
        if self.apart is None:
            rows = None if valid is None else valid.flatten()
            return sinkhorn_knopp(logits.flatten(0, -2), temperature, self.iterations, rows).view(logits.shape)
        groups = logits.movedim(self.apart, 0)  # (g, ..., K)
        rows = None if valid is None else valid.movedim(self.apart, 0).flatten(1)
        probs = sinkhorn_knopp(groups.flatten(1, -2), temperature, self.iterations, rows)
        return probs.view(groups.shape).movedim(0, self.apart)

    def update(self, logits: Tensor | Scores, valid: Tensor | None = None) -> None:
        """Nothing: there is no memory."""


def target_by_rule(
    rule: str, num_prototypes: int, center_momentum: float, name: str = "center_momentum"
) -> Centering | Sinkhorn:
    """ "centering" or "sinkhorn", by name. Raises UserError for another."""
    if rule == "centering":
        return Centering(num_prototypes, center_momentum, name)
    if rule == "sinkhorn":
        return Sinkhorn()
    raise UserError(f"target_rule: '{rule}' is unknown. Choose 'centering' or 'sinkhorn'.")


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3, valid: Tensor | None = None) -> Tensor:
    """Rows that are distributions, columns of (nearly) equal sum, over the rows of all ranks.

    (n, K) -> (n, K), or (g, n, K) with g groups balanced apart. Rows that are not `valid`, (n,) or (g, n), are
    padding: they come out uniform and the others as if they were not there. Alternately divides each prototype's
    column by its sum over all ranks' rows and each row by its sum, ending with rows. The maximum of
    each prototype over all rows is subtracted first, which changes nothing but keeps exp finite
    (Caron et al. 2020, SwAV, arXiv 2006.09882; the constants of the published loops cancel).
    """
    scores = logits.float() / temperature
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None], -torch.inf)
    smallest = torch.finfo(scores.dtype)
    # where no row is valid anywhere the maximum is -inf and the sum 0, of which neither may be taken as it is
    scores = torch.exp(scores - max_over_ranks(scores.amax(-2, keepdim=True)).clamp_min(smallest.min))
    for _ in range(iterations):
        counted = scores if valid is None else scores * valid[..., None]
        scores = scores / sum_over_ranks(counted.sum(-2, keepdim=True)).clamp_min(smallest.tiny)
        # a row that is far from every prototype's best row underflows to zeros; it stays uniform
        row = scores.sum(-1, keepdim=True)
        # what is not a number stays so, and the step is skipped
        empty = row == 0 if valid is None else (row == 0) | ~valid[..., None]
        scores = torch.where(empty, torch.full_like(scores, 1 / scores.shape[-1]), scores / row)
    return scores
