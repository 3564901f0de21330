"""Features of a whole set, once: what every probe starts from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from ssd.batch import network_input
from ssd.distributed import gather_objects, gather_rows
from ssd.errors import UserError

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Features(NamedTuple):
    """Features (N, D) float32, labels (N,) with -1 for none, and the place (N,) of each sample in its source."""

    features: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]


def extract(
    embed: Callable[[Tensor], Tensor],
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    precision: str = "32-true",
    progress: str | None = None,
) -> Features:
    """`embed` of every picture, on the CPU, in order of index; arguments as `embedded` has them, (B, ...) -> (B, D).

    Under several processes each gives the samples of its own loader and all get the whole.
    """
    device = torch.device(device)
    parts = [
        Features(features.float(), batch["label"].to(device), batch["index"].to(device))
        for features, batch in embedded(embed, loader, device, precision, progress)
    ]
    whole = gathered(parts, device)
    if not len(whole.index):
        raise nothing_to_embed()
    return Features(*(part.cpu() for part in whole))


def embedded(
    embed: Callable[[Tensor], Any],
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    precision: str = "32-true",
    progress: str | None = None,
) -> Iterator[tuple[Any, Mapping[str, Tensor]]]:
    """What `embed` answers of each batch, and the batch.

    The loader gives {"sample" (B, ...), "label" (B,), "index" (B,)}. Samples go to `device`, where `embed` runs without
    gradient; a module runs in eval mode and is put back. `precision` is one of Lightning's names. `progress` is the
    text beside a bar, None for no bar.
    """
    if precision not in AUTOCAST:
        raise UserError(f"precision = '{precision}' is unknown for features; choose one of {', '.join(AUTOCAST)}.")
    device = torch.device(device)
    modes = [(part, part.training) for part in embed.modules()] if isinstance(embed, nn.Module) else []
    for part, _ in modes:
        part.training = False
    half = AUTOCAST[precision]
    try:
        for batch in track(loader, progress or "", disable=progress is None):
            with torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
                answer = embed(network_input(batch).to(device, non_blocking=True))
            yield answer, batch
    finally:
        for part, mode in modes:
            part.training = mode


def nothing_to_embed() -> UserError:
    return UserError("the loader gave no pictures to embed: the set is empty, or every picture in it is broken.")


def gathered(parts: list[Features], device: torch.device | str = "cpu") -> Features:
    """The batches of all processes as one set in order of index, on every process; a sample seen twice counts once.

    A process may have no batch. `device` is where the batches lie.
    """
    width = max(gather_objects(parts[0].features.shape[1] if parts else 0))
    none = torch.zeros(0, dtype=torch.long, device=device)
    parts = [Features(torch.zeros(0, width, device=device), none, none), *parts]
    features, labels, index = (gather_rows(torch.cat(column)) for column in zip(*parts, strict=True))
    index, order = index.sort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    return Features(features[order[first]], labels[order[first]], index[first])


def pixels(loader: Iterable[Mapping[str, Tensor]]) -> Features:
    """The pictures themselves as features: what a network has to beat."""
    return extract(lambda picture: picture.flatten(1), loader)
