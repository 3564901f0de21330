"""How teacher logits become target distributions, with what must be remembered between steps.

`forward` reads, `update` writes; memory is in buffers. Everything in float32.
"""

import torch
from torch import Tensor, nn

from ssd.distributed import max_over_ranks, mean_of_rows, sum_over_ranks
from ssd.errors import UserError


class Centering(nn.Module):
    """softmax((t - c) / temperature) with a running mean c of the teacher's logits. Caron et al. 2021, eq. 4.

    The centre keeps one prototype from winning everywhere; the low temperature keeps the output from
    going uniform. The centre in force is that of earlier steps: call `update` after use.

    Args:
        num_prototypes: K.
        momentum: share of the old centre that is kept, in [0, 1]; 0.999 collapses in the published ablation.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise UserError(f"center_momentum: {momentum} is not a share in [0, 1]. The published value is 0.9.")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., K) -> (..., K) distributions."""
        return torch.softmax((logits.float() - self.center) / temperature, dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """c <- m c + (1 - m) mean, over the rows of all ranks. (..., K)"""
        self.center.lerp_(mean_of_rows(logits.flatten(0, -2)), 1 - self.momentum)


class Sinkhorn(nn.Module):
    """Targets that use every prototype alike over the step's rows of all ranks; remembers nothing.

    Args:
        iterations: of `sinkhorn_knopp`; 3 in every published recipe.
    """

    def __init__(self, iterations: int = 3):
        super().__init__()
        self.iterations = iterations

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., K) -> (..., K) distributions; all leading dimensions are assigned jointly."""
        return sinkhorn_knopp(logits.flatten(0, -2), temperature, self.iterations).view(logits.shape)

    def update(self, logits: Tensor) -> None:
        """Nothing: there is no memory."""


def target_by_rule(rule: str, num_prototypes: int, center_momentum: float) -> Centering | Sinkhorn:
    """ "centering" or "sinkhorn", by name. Raises UserError for another."""
    if rule == "centering":
        return Centering(num_prototypes, center_momentum)
    if rule == "sinkhorn":
        return Sinkhorn()
    raise UserError(f"target_rule: '{rule}' is unknown. Choose 'centering' or 'sinkhorn'.")


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Rows that are distributions, columns of (nearly) equal sum, over the rows of all ranks.

    (n, K) -> (n, K), or (g, n, K) with g groups balanced apart. Alternately divides each prototype's
    column by its sum over all ranks' rows and each row by its sum, ending with rows. The maximum of
    each prototype over all rows is subtracted first, which changes nothing but keeps exp finite
    (Caron et al. 2020, SwAV, arXiv 2006.09882; the constants of the published loops cancel).
    """
    scores = logits.float() / temperature
    scores = torch.exp(scores - max_over_ranks(scores.amax(-2, keepdim=True)))
    for _ in range(iterations):
        scores = scores / sum_over_ranks(scores.sum(-2, keepdim=True))
        # a row that is far from every prototype's best row underflows to zeros; it stays uniform
        row = scores.sum(-1, keepdim=True)
        scores = torch.where(row > 0, scores / row, torch.full_like(scores, 1 / scores.shape[-1]))
    return scores
