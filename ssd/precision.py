"""In what dtype matrix products are made, and what is summed of them."""

import torch
from torch import Tensor


def product_dtype(of: Tensor) -> torch.dtype:
    """What autocast would multiply `of` in, except float16: a probability of 1 / K has lost most of its digits there."""
    dtype, kind = of.dtype, of.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return torch.float32 if dtype == torch.float16 else dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax, norms and sums of numbers of this dtype are in: float32, or as fine as they are."""
    return torch.promote_types(dtype, torch.float32)
