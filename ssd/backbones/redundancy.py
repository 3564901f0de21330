"""Which patches say what others say already."""

import torch
from torch import Tensor

from ssd.errors import UserError


@torch.no_grad()
def least_redundant(patches: Tensor, keep: int) -> Tensor:
    """Sorted places (B, keep) of the patches (B, n, D) that stay when those most like another one go.

    Every second patch, from the first on, is compared by cosine with those between, and those that have the nearest go. What
    they are compared with stays, so that of every repeated patch one is left; so at most half of the patches can go.
    Bolya et al., "Token Merging", ICLR 2023, section 3, divides them so. Raises UserError where `keep` is no such number.
    """
    batch, count, _ = patches.shape
    candidates = (count + 1) // 2 if count > 1 else 0
    if not count - candidates <= keep <= count or keep < 1:
        raise UserError(
            f"{keep} of {count} patches cannot be kept: at most every second one goes at once. Keep {count - candidates} to "
            f"{count}, or drop the rest behind a later block."
        )
    places = torch.arange(count, device=patches.device).expand(batch, -1)
    if keep == count:
        return places
    units = torch.nn.functional.normalize(patches.float(), dim=-1)
    with torch.autocast(patches.device.type, enabled=False):  # half precision would tie patches that are not alike
        nearest = (units[:, ::2] @ units[:, 1::2].mT).amax(-1)  # (B, candidates)
    gone = nearest.topk(count - keep, dim=1).indices * 2
    score = torch.zeros(batch, count, dtype=torch.int64, device=patches.device).scatter(1, gone, 1)
    # a stable sort brings those that stay to the front, in their order
    return score.argsort(dim=1, stable=True)[:, :keep]
