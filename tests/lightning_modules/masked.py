"""Batches with masks for methods that have them, at the size all their tests use."""

from typing import Any

import torch
from torch import Tensor

from ssd.batch import Batch, Masks
from ssd.masking.batch import packed

TOKENS = 16  # of a global view of 32 px in patches of 8


def random_batch(samples: int, seed: int, masks: Masks | None = None, gram: bool = False) -> Batch:
    """Two global views of 32 px, two local ones of 16 and, with `gram`, two of 64."""
    generator = torch.Generator().manual_seed(seed)
    views = {
        "global": torch.randn(2, samples, 3, 32, 32, generator=generator),
        "local": torch.randn(2, samples, 3, 16, 16, generator=generator),
    }
    if gram:
        views["gram"] = torch.randn(2, samples, 3, 64, 64, generator=generator)
    return Batch(
        views=views, index=torch.arange(samples), total=samples, masks={} if masks is None else {"global": masks}
    )


def masks_of(*counts: int, length: int = 64) -> Masks:
    """The first `count` tokens of each sample masked, in both of its views."""
    boolean = torch.arange(TOKENS) < torch.tensor(counts)[:, None]
    return packed(boolean.expand(2, -1, -1).numpy(), 1, length)


def drawn(module: Any, samples: int, seed: int, gram: bool = False) -> Batch:
    """A batch with the masks that the method plans."""
    return random_batch(samples, seed, module.mask_plans()["global"].draw(samples, 0, seed), gram)


def terms(module: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))


def sameness(module: Any) -> float:
    """Mean cosine between what the student's head says of different pictures."""
    batch = drawn(module.train(), 16, 0)
    with torch.no_grad():
        places = {"global": batch.masks["global"].flat_in_whole()}
        features = module.student(batch.views, places=places).pictures.features[0]  # (B, d)
    return float((features @ features.T)[~torch.eye(len(features), dtype=torch.bool)].mean())


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """Three rounds, columns then rows, as the papers write it. (n, K) -> (n, K)"""
    q = torch.exp(logits / temperature - (logits / temperature).max())
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q
