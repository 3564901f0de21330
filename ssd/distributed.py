"""The few reductions over ranks that methods need, correct on one process too.

Nothing else in the project asks whether a process group exists.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise sum; a new tensor on every rank. Not differentiable."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum; a new tensor on every rank. Not differentiable."""
    largest = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def from_first_rank(tensor: Tensor) -> Tensor:
    """What rank 0 holds; a new tensor on every rank. Not differentiable."""
    theirs = tensor.detach().clone()
    if world_size() > 1:
        dist.broadcast(theirs, src=0)
    return theirs


def object_from_first_rank(value: Any) -> Any:
    """What rank 0 gives, on every rank; plain data of any size."""
    if world_size() == 1:
        return value
    theirs = [value]
    dist.broadcast_object_list(theirs, src=0)
    return theirs[0]


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that is sharded over ranks, sharing its memory; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(value: Any) -> Any:
    """A tensor that is sharded over ranks put together, on every rank; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor, whose import takes half a second that few runs need."""
    return hasattr(value, "to_local")


def sum_of_rows(rows: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over dim 0 of the rows of all ranks together, and their number, float32; ranks may hold unequal numbers.

    (n, K), where only the rows that are `valid` (n,) count -> (K,), (). One reduction of K + 1 numbers.
    """
    if valid is None:
        total, count = rows.sum(0, dtype=torch.float32), rows.new_full((1,), len(rows), dtype=torch.float32)
    else:
        total = torch.where(valid[:, None], rows, 0).sum(0, dtype=torch.float32)
        count = valid.sum(0, keepdim=True, dtype=torch.float32)
    both = sum_over_ranks(torch.cat([total, count]))
    return both[:-1], both[-1]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order, on every rank; ranks may hold unequal numbers of rows. (n, ...) -> (sum n, ...)"""
    if world_size() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    largest = int(max(counts))
    padded = rows.new_zeros((largest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


class GatherRows(torch.autograd.Function):
    """Rows of all ranks, with the gradient that every rank's use of them gives to this rank's."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.mine = slice(rank() * len(rows), (rank() + 1) * len(rows))
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return sum_over_ranks(grad)[ctx.mine]


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """As `gather_rows`, of equal numbers on every rank, and differentiable. (n, ...) -> (world n, ...)"""
    return GatherRows.apply(rows) if world_size() > 1 else rows


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
