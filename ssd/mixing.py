"""Pictures that are sums of two."""

import torch
from torch import Tensor

from ssd.errors import UserError


def mixed(pictures: Tensor, share: float, group: int) -> Tensor:
    """share x + (1 - share) y, y being the picture before x in its group, the last one before the first: mixup without
    labels (Zhang et al. 2018, arXiv 1710.09412). (V, B, ...) -> (V, B, ...)

    Groups are `group` neighbours in the step's samples, whose order is drawn, so that ranks and slices of whole groups do
    not change them. Raises UserError where they do not fit.
    """
    if group < 2 or pictures.shape[1] % group:
        raise UserError(
            f"mixup_group: {group} does not fit the {pictures.shape[1]} samples of a process or slice. Use a divisor of them "
            "from 2 on, or mixup: false."
        )
    groups = pictures.unflatten(1, (-1, group))  # (V, G, g, ...)
    return torch.lerp(groups.roll(1, 2), groups, share).flatten(1, 2)
