"""LiDAR of a network on the views that it learned from."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ssd.batch import Batch
from ssd.evaluation.features import AUTOCAST
from ssd.evaluation.protocol import Number
from ssd.evaluation.spectrum import lidar

SAMPLES, VIEWS = 1000, 10


def lidar_number(
    embed: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    looks: int,
    device: torch.device | str = "cpu",
    precision: str = "32-true",
) -> Number:
    """LiDAR over the global views of batches that come in groups of `looks`, all of the same samples.

    `embed` (B, ...) -> (B, D). A sample that was replaced by another in one of its looks, because it is broken, is left out.
    """
    device, half = torch.device(device), AUTOCAST[precision]
    samples: list[Tensor] = []
    group: list[Tensor] = []
    seen: list[Tensor] = []
    with torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
        for batch in batches:
            views = batch.views["global"]
            features = embed(views.flatten(0, 1).to(device)).float().cpu()
            group.append(features.unflatten(0, views.shape[:2]))
            seen.append(batch.index)
            if len(group) == looks:
                same = (torch.stack(seen) == seen[0]).all(0)
                samples.append(torch.cat(group).transpose(0, 1)[same])  # (B, V, D)
                group, seen = [], []
    views = torch.cat(samples)
    protocol = f"lidar-v1 {views.shape[1]} global views of {len(views)} training samples"
    return Number("spectrum/lidar", lidar(views), protocol)
