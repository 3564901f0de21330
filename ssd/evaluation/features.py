"""Features of a whole set, once: what every probe starts from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.batch import Padded, Tokens, network_input
from ssd.distributed import gather_objects, gather_rows
from ssd.errors import UserError
from ssd.frames import Frames
from ssd.spectrogram import log_mel_inside, mel_filters, window_and_hop
from ssd.views.sound import SoundViews
from ssd.views.view import Views

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
    """The pictures themselves as features, of clips the mean of their frames: what a network has to beat."""
    return extract(lambda seen: (seen.mean(2) if seen.ndim == 5 else seen).flatten(1), loader)


def log_mel_statistics(loader: Iterable[Mapping[str, Tensor]], rate_hz: int) -> Features:
    """Mean and standard deviation over time of each mel band, dB, (B, 2 MELS): what a network over sounds has to beat."""
    windows = log_mel_windows(rate_hz)

    def statistics(sounds: Padded) -> Tensor:
        tokens = windows(sounds)
        assert tokens.valid is not None, "windows of padding are known"
        share = tokens.valid.float()[:, :, None]
        counts = share.sum(1, keepdim=True)
        mean = (tokens.patches * share).sum(1, keepdim=True) / counts
        variance = ((tokens.patches - mean).square() * share).sum(1, keepdim=True) / counts
        return torch.cat([mean, variance.sqrt()], dim=2).flatten(1)

    return extract(statistics, loader)  # type: ignore[arg-type]


def log_mel_windows(rate_hz: int) -> Callable[[Padded], Tokens]:
    """Sounds as windows of 25 ms, the levels of their mel bands in dB as features; one at least counts in each sound."""
    size, hop = window_and_hop(rate_hz)
    frames, filters = Frames(((size, hop),)), mel_filters(size, rate_hz)

    def windows(sounds: Padded) -> Tokens:
        samples = F.pad(sounds.samples, (0, max(0, size - sounds.samples.shape[1])))
        levels = log_mel_inside(samples, filters.to(samples.device), size, hop)  # (B, T, MELS)
        counts = frames.counts(sounds.valid.sum(1)).clamp_min(1)
        valid = torch.arange(levels.shape[1], device=samples.device) < counts[:, None]
        return Tokens(patches=levels, grid=(levels.shape[1],), valid=valid)

    return windows


def without_a_network(loader: Iterable[Mapping[str, Tensor]], views: Views) -> Features:
    """What the samples are worth by themselves, of the kind that these views are of: `pixels` or `log_mel_statistics`."""
    return log_mel_statistics(loader, views.rate_hz) if isinstance(views, SoundViews) else pixels(loader)


def name_without_a_network(views: Views) -> str:
    """What tables call `without_a_network`."""
    return "log-mel" if isinstance(views, SoundViews) else "pixels"
