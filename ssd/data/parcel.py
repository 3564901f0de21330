"""Batches on their way from a worker: one block of memory, because each shared tensor costs a connection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd.batch import map_tensors

ALIGNMENT_BYTES = 64


@dataclass
class Parcel:
    """All tensors of a structure (dicts, lists, `Batch`) end to end.

    Args:
        block: (bytes,) uint8
        contents: the structure, with tensors of the meta device that stand for parts of the block.
    """

    block: Tensor
    contents: Any

    @classmethod
    def pack(cls, structure: Any) -> "Parcel":
        tensors: list[Tensor] = []

        def leave_out(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        contents = map_tensors(structure, leave_out)
        # shared from the start: a block made elsewhere would be copied when it is sent
        size = sum(room(tensor) for tensor in tensors)
        parcel = cls(torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(1, size))), contents)
        targets = iter(tensors)
        map_tensors(parcel.unpack(), lambda part: part.copy_(next(targets)))
        return parcel

    def unpack(self) -> Any:
        """The structure, its tensors views of the block."""
        start = 0

        def take(tensor: Tensor) -> Tensor:
            nonlocal start
            bytes_of_it = self.block[start : start + tensor.numel() * tensor.element_size()]
            start += room(tensor)
            return bytes_of_it.view(tensor.dtype).view(tensor.shape)

        return map_tensors(self.contents, take)

    def pin_memory(self) -> "Parcel":
        return Parcel(self.block.pin_memory(), self.contents)


def room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a block."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Packed:
    """A collate function whose batches come as parcels."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Parcel:
        return Parcel.pack(self.collate(samples))
