"""What earlier steps saw, as negatives of later ones."""

import torch
from torch import Tensor, nn

from ssd.distributed import gather_rows_with_gradient
from ssd.errors import UserError


class Queue(nn.Module):
    """The newest vectors of all ranks, the oldest going out. He et al. 2020, arXiv 1911.05722.

    It starts empty: `filled` counts, and what is not filled is no negative.

    Args:
        size: K, how many are kept.
        dim: d of each.

    Attributes:
        vectors: (K, d).
        filled: () how many of them, from the first, are there.
        place: () where the next one goes.
    """

    vectors: Tensor
    filled: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        if size < 1:
            raise UserError(f"queue_size: {size} is not a positive count. The published value is 65536.")
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @property
    def valid(self) -> Tensor:
        """(K,) True where there is a vector."""
        return torch.arange(len(self.vectors), device=self.vectors.device) < self.filled

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Takes in (n, d) of this rank and as many of each other, in rank order. Raises UserError for more than K."""
        new, size = gather_rows_with_gradient(vectors).to(self.vectors), len(self.vectors)
        if len(new) > size:
            raise UserError(
                f"queue_size: {size} is less than the {len(new)} samples of a step. Use several times as many as there are."
            )
        places = (self.place + torch.arange(len(new), device=new.device)) % size
        self.vectors.index_copy_(0, places, new)
        self.place.add_(len(new)).remainder_(size)
        self.filled.add_(len(new)).clamp_(max=size)
