"""Losses that spread the features of a batch over the sphere."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.distributed import gather_rows_with_gradient, rank, world_size
from ssd.errors import UserError


def koleo(features: Tensor, group_size: int, eps: float = 1e-8) -> Tensor:
    """Minus the log of each sample's distance to its nearest neighbour of the same view and group.

    (V, B, D), of any length -> (V, B), float32: -ln(|x - x_nn + eps| + eps) on the unit sphere, x_nn the row of the
    highest cosine, which is never x itself. Sablayrolles et al. 2019, arXiv 1806.03198; Oquab et al. 2023, section 4.
    Gradients flow to both.

    Groups are neighbours in the step's samples, in rank order, so that ranks and slices do not change them: as many
    whole groups as fit in B, or B a whole part of a group that spans ranks, whose features are then gathered.
    Raises UserError where neither holds, and for groups of one.
    """
    views, batch, _ = features.shape
    check_koleo_group(group_size, batch)
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=eps)
        if group_size <= batch:
            own = others = x.reshape(views * (batch // group_size), group_size, -1)
            first = 0
        else:
            # (V, B, D) of every rank -> those of this rank's group
            step = gather_rows_with_gradient(x.transpose(0, 1)).transpose(0, 1)
            begin = rank() * batch // group_size * group_size
            own, others, first = x, step[:, begin : begin + group_size], rank() * batch - begin
        with torch.no_grad():
            cosine = own @ others.transpose(1, 2)  # (groups, rows, group_size)
            cosine.diagonal(first, 1, 2).fill_(-torch.inf)
            nearest = cosine.argmax(2)
        neighbour = others.gather(1, nearest[..., None].expand(-1, -1, x.shape[-1]))
        distance = torch.linalg.vector_norm(own - neighbour + eps, dim=-1)
        return -torch.log(distance + eps).view(views, batch)


def check_koleo_group(group_size: int, batch: int | None = None, slices: int = 1) -> None:
    """Raises UserError for groups without neighbours, or that `batch` samples on each rank, one of so many slices, cannot
    be divided into."""
    if group_size < 2:
        raise UserError(f"koleo_group: {group_size} samples have no neighbours. Use 2 or more, or koleo_weight: 0.")
    if batch is None or batch % group_size == 0:
        return
    if slices > 1:
        raise UserError(
            f"koleo_group: {group_size} does not fit the {batch} samples of a slice. Use a divisor of them, or fewer "
            "micro_batches."
        )
    if group_size % batch or world_size() * batch % group_size:
        raise UserError(
            f"koleo_group: {group_size} does not fit {batch} samples on each of {world_size()} processes. Use a divisor of "
            "data.batch_size, or a multiple of it that divides the whole step."
        )
