"""Sound as power in mel bands."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MELS = 64
WINDOW_S, HOP_S = 0.025, 0.01
DB_PER_NEPER = 10 / math.log(10)
"""Of power: what a factor of e is in dB."""


@dataclass
class Levels:
    """Logarithms of power in mel bands over time, what a network makes of sounds before it learns anything.

    Args:
        values: (B, T, mels); where there is no sound they have no meaning.
        counts: (B,) windows of each sound; None = all T.
        per_neper: units of `values` in which power is e times as much: 1 for natural logarithms, 10 / ln 10 for dB.
    """

    values: Tensor
    counts: Tensor | None = None
    per_neper: float = 1.0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def there(self) -> Tensor:
        """(B, T, 1) True where there is sound."""
        batch, windows, _ = self.values.shape
        if self.counts is None:
            return self.values.new_ones(batch, windows, 1, dtype=torch.bool)
        return (torch.arange(windows, device=self.values.device) < self.counts[:, None])[..., None]


def log_mel(samples: Tensor, rate_hz: int) -> Tensor:
    """Power in mel bands, dB, (S,) -> (MELS, frames): windows of 25 ms every 10 ms, the first around the first sample."""
    size, hop = window_and_hop(rate_hz)
    samples = torch.nn.functional.pad(samples.float(), (0, max(0, size - len(samples))))
    points = 2 ** (size - 1).bit_length()
    power = torch.stft(
        samples,
        points,
        hop,
        size,
        torch.hann_window(size),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    return 10 * torch.log10(mel_filters(points, rate_hz) @ power.abs().square() + 1e-10)


def log_mel_inside(samples: Tensor, filters: Tensor, size: int, hop: int) -> Tensor:
    """Power in mel bands, dB, (B, S) -> (B, frames, mels): of windows that lie inside the sound alone.

    `filters` as `mel_filters` gives them for `size` points.
    """
    with torch.autocast(samples.device.type, enabled=False):  # powers span more than half precision holds
        window = torch.hann_window(size, device=samples.device)
        power = torch.stft(samples.float(), size, hop, size, window, center=False, return_complex=True).abs().square()
        return 10 * torch.log10(filters @ power + 1e-10).mT


def log_mel_around(samples: Tensor, filters: Tensor, size: int, hop: int, floor: float = 1e-7) -> Tensor:
    """Power in mel bands, natural logarithm, (B, S) -> (B, S // hop + 1, mels): of windows around each `hop`-th sample from the
    first on, with silence around the sound.

    `filters` as `mel_filters` gives them for `size` points; `floor` is added to the power.
    """
    with torch.autocast(samples.device.type, enabled=False):  # powers span more than half precision holds
        window = torch.hann_window(size, device=samples.device)
        spectrum = torch.stft(
            samples.float(), size, hop, size, window, center=True, pad_mode="constant", return_complex=True
        )
        return (filters @ spectrum.abs().square() + floor).log().mT


def window_and_hop(rate_hz: int) -> tuple[int, int]:
    """25 and 10 ms in samples."""
    return max(16, round(WINDOW_S * rate_hz)), max(1, round(HOP_S * rate_hz))


def mel_filters(
    points: int, rate_hz: int, mels: int = MELS, lowest_hz: float = 0.0, highest_hz: float | None = None
) -> Tensor:
    """Triangles evenly spaced in mel, 2595 log10(1 + f / 700), of area 1. (mels, points // 2 + 1)

    From `lowest_hz` to `highest_hz`; None = half the rate.
    """
    lowest, highest = (2595 * np.log10(1 + hz / 700) for hz in (lowest_hz, highest_hz or rate_hz / 2))
    edges = 700 * (10 ** (np.linspace(lowest, highest, mels + 2) / 2595) - 1)
    frequencies = np.linspace(0, rate_hz / 2, points // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    # a band narrower than the distance of two frequencies would be empty: it takes the nearest
    empty = triangles.sum(1) == 0
    nearest = np.abs(frequencies - edges[1:-1, None]).argmin(1)
    triangles[empty, nearest[empty]] = 1
    return torch.from_numpy(triangles / triangles.sum(1, keepdims=True)).float()
