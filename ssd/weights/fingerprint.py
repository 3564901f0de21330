"""What tells one network's weights from another's."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of every tensor of a state by its name, type and shape, wherever it lies and in whatever order."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
