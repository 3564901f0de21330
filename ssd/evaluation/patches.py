"""Features of every patch of a set, once: what attentive and dense probes start from.

They are many (1,000 pictures of 196 patches and 384 dimensions take 150 MB), so that they are kept in 16 bits, and in a
file where a folder is given.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from ssd.batch import Tokens, network_input
from ssd.errors import UserError
from ssd.evaluation.features import AUTOCAST

NUMBERS_AT_ONCE = 2**25
"""Features that are held in 32 bits at a time: 128 MiB."""


class Patches(NamedTuple):
    """Features (N, P, D) float16, row-major over `grid`, labels (N,) with -1 for none, and the place (N,) in the source."""

    features: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]
    grid: tuple[int, ...]


def extract_patches(
    embed: Callable[[Tensor], Tokens],
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    precision: str = "32-true",
    file: str | Path | None = None,
    progress: str | None = None,
) -> Patches:
    """Patch tokens of every sample, on the CPU, in the loader's order; of one process.

    The loader gives {"sample" (B, ...), "label" (B,), "index" (B,)}; a module runs in eval mode and is put back.
    `file` is written with the features, which then are a memory map of it. `progress` is the text beside a bar.
    Raises UserError for features that 16 bits do not hold, and for samples of different lengths.
    """
    device, half = torch.device(device), AUTOCAST[precision]
    modes = [(part, part.training) for part in embed.modules()] if isinstance(embed, nn.Module) else []
    for part, _ in modes:
        part.training = False
    parts, labels, index, grid = [], [], [], None
    try:
        with (
            nullcontext() if file is None else open(file, "wb") as stream,
            torch.no_grad(),
            torch.autocast(device.type, half, enabled=half is not None),
        ):
            for batch in track(loader, progress or "", disable=progress is None):
                if not len(batch["index"]):
                    continue  # every picture of the batch is broken
                tokens = embed(network_input(batch).to(device, non_blocking=True))
                if tokens.valid is not None or grid not in (None, tokens.grid):
                    raise UserError(
                        "probes on patches need samples of one length. Ask for measures of pooled features."
                    )
                grid = tokens.grid
                features = tokens.patches.half().cpu()
                if not features.isfinite().all():
                    raise UserError(
                        "patch features are not finite in 16 bits. The network has diverged or its outputs are above "
                        "65,504; probe an earlier checkpoint or another one."
                    )
                if stream is None:
                    parts.append(features)
                else:
                    stream.write(features.numpy().tobytes())
                shape = features.shape[1:]
                labels.append(batch["label"])
                index.append(batch["index"])
    finally:
        for part, mode in modes:
            part.training = mode
    if grid is None:
        raise UserError("the loader gave no pictures to embed: the set is empty, or every picture in it is broken.")
    places = torch.cat(index)
    if file is None:
        whole = torch.cat(parts)
    else:
        whole = torch.from_numpy(np.memmap(file, np.float16, mode="c", shape=(len(places), *shape)))
    return Patches(whole, torch.cat(labels), places, grid)


def pictures_at_once(features: Tensor) -> int:
    """How many samples of (N, P, D) are turned into 32 bits at a time."""
    return max(1, NUMBERS_AT_ONCE // (features.shape[1] * features.shape[2]))


def in_parts(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Patch features (N, P, D) in float32, some samples at a time, and which."""
    step = pictures_at_once(features)
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        yield rows, features[rows].float()


def scaling(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and factor (D,) that bring every dimension of (N, P, D) to mean 0 and deviation 1 over all patches.

    As `scaling.standardise`: a dimension that is constant up to rounding becomes 0.
    """
    count = features.shape[0] * features.shape[1]
    mean = torch.stack([part.double().sum((0, 1)) for _, part in in_parts(features)]).sum(0) / count
    squares = torch.stack([(part.double() - mean).square().sum((0, 1)) for _, part in in_parts(features)]).sum(0)
    deviation = (squares / count).sqrt()
    constant = deviation <= 1e-6 * (mean.abs() + deviation.max())
    return mean.float(), torch.where(constant, 0.0, 1 / deviation).float()
