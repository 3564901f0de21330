"""A small convolutional network over log-mel spectrograms: that of BYOL-A and UnFuSeD."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.base import tap_names
from ssd.backbones.sound import SoundNetwork, Spectral
from ssd.batch import Padded, Tokens
from ssd.errors import UserError
from ssd.frames import Frames
from ssd.spectrogram import Levels, log_mel_around, mel_filters

BLOCKS = 3
WINDOW_S, HOP_S = 0.064, 0.01
HIGHEST = 0.4875
"""Of the rate: 7,800 Hz of 16,000."""


class MelConvNet(SoundNetwork, Spectral):
    """Three blocks of a convolution and max pooling, then an MLP at each moment; a sound's vector is maximum and mean over time,
    added. Niizumi et al., "BYOL for Audio", IJCNN 2021, arXiv 2103.06695, section III-C; Seth et al. 2023.

    Bands are of windows of 64 ms around every 10th ms, natural logarithm. A token is 80 ms. Taps are (B, N, D) of each block,
    bands and channels side by side, the mean over the moments that a token is made of.

    Args:
        rate_hz: samples a second of its inputs.
        mels: bands, a multiple of 8.
        lowest_hz, highest_hz: of the bands; null is .4875 of the rate, 7,800 Hz at 16,000.
        channels: of the convolutions.
        embed_dim: width of the MLP.
        dropout: between its layers.
        weights: start from an exported folder, a weights file or a checkpoint.
    """

    can = frozenset({"taps"})

    def __init__(
        self,
        *,
        rate_hz: int = 16_000,
        mels: int = 64,
        lowest_hz: float = 60.0,
        highest_hz: float | None = None,
        channels: int = 64,
        embed_dim: int = 2048,
        dropout: float = 0.3,
        weights: str | None = None,
    ):
        super().__init__(f"melconv_{channels}x{embed_dim}", rate_hz)
        highest = HIGHEST * rate_hz if highest_hz is None else highest_hz
        check_settings(rate_hz, mels, lowest_hz, highest, channels, embed_dim, dropout)
        self.mels, self.channels = mels, channels
        self.window, self.hop = round(WINDOW_S * rate_hz), round(HOP_S * rate_hz)
        self.frames = Frames(((self.window, self.hop), *[(2, 2)] * BLOCKS), padding=self.window // 2 * 2)
        widths = [1, *[channels] * BLOCKS]
        self.model = nn.ModuleDict(
            {
                "blocks": nn.ModuleList(ConvBlock(*pair) for pair in zip(widths, widths[1:])),
                "mlp": nn.Sequential(
                    nn.Linear(self.block_dim(BLOCKS), embed_dim),
                    nn.ReLU(),
                    nn.Dropout(dropout),
                    nn.Linear(embed_dim, embed_dim),
                    nn.ReLU(),
                ),
            }
        )
        self.filters: Tensor
        filters = mel_filters(self.window, rate_hz, mels, lowest_hz, highest)
        self.register_buffer("filters", filters, persistent=False)
        self.attention = ()
        self.start_from(weights)

    @property
    def embed_dim(self) -> int:
        return self.model.mlp[0].out_features

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def block_dim(self, number: int) -> int:
        return self.channels * (self.mels >> number)

    def hear(self, sounds: Tensor | Padded) -> Levels:
        self.check_input(sounds)
        if not isinstance(sounds, Padded):
            return Levels(log_mel_around(sounds, self.filters, self.window, self.hop))
        # windows reach over a sound's end, where alone there is silence
        samples = sounds.samples.masked_fill(~sounds.valid, 0)
        values = log_mel_around(samples, self.filters, self.window, self.hop)
        return Levels(values, counts=sounds.valid.sum(1) // self.hop + 1)

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Padded | Levels,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible: Tensor | None = None,
        taps: Sequence[int | str] = (),
        until: int | None = None,
        keep: Mapping[int, int] | None = None,
    ) -> Tokens:
        self.refuse(masked=masked, visible=visible, until=until, keep=keep)
        wanted = tap_names(taps, BLOCKS, BLOCKS, self.name)
        if any("." in tap for tap in wanted):
            raise UserError(
                f"taps {wanted}: blocks of '{self.name}' are one convolution each, without MLP or attention. Use numbers."
            )
        levels = x if isinstance(x, Levels) else self.hear(x)
        maps, counts = torch.where(levels.there, levels.values, 0)[:, None], levels.counts  # (B, 1, T, mels)
        found: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks, 1):
            maps = self.run(block, maps)
            counts = None if counts is None else (counts // 2).clamp_min(1)
            if counts is not None:
                maps = torch.where(Levels(maps[:, 0], counts).there[:, None], maps, 0)
            found[f"block{number}"] = (
                maps.transpose(1, 2).transpose(2, 3).flatten(2)
            )  # (B, T / 2^number, bands channels)
        patches = self.model.mlp(found[f"block{BLOCKS}"])  # (B, N, D)
        moments = patches.shape[1]
        valid = None if counts is None else self.first_tokens(counts, moments)
        return Tokens(
            patches=patches,
            grid=(moments,),
            summary=maximum_and_mean(patches, valid),
            valid=valid,
            taps={tap: over_moments(found[tap], moments, 2 ** (BLOCKS - int(tap[5:]))) for tap in wanted},
        )


class ConvBlock(nn.Module):
    """(B, C, T, bands) -> (B, channels, T // 2, bands // 2)"""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(before, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(self.norm(self.conv(maps)).relu(), 2)


def over_moments(tap: Tensor, moments: int, each: int) -> Tensor:
    """(B, T, D) -> (B, moments, D): the mean over `each` neighbours in time, of padded sounds as of one alone; what is left over
    is left out."""
    return tap[:, : moments * each].unflatten(1, (moments, each)).mean(2)


def maximum_and_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """max over time + mean over time of what is no padding, (B, N, D) -> (B, D)."""
    if valid is None:
        return tokens.amax(1) + tokens.mean(1)
    there = valid[..., None]
    mean = torch.where(there, tokens, 0).sum(1) / there.sum(1)
    return torch.where(there, tokens, torch.finfo(tokens.dtype).min).amax(1) + mean


def check_settings(
    rate_hz: int, mels: int, lowest_hz: float, highest_hz: float, channels: int, embed_dim: int, dropout: float
) -> None:
    if rate_hz < 1000:
        raise UserError(f"rate_hz: {rate_hz} leaves too few samples for bands of 64 ms. Use 1000 or more.")
    if mels < 8 or mels % 8 or min(channels, embed_dim) < 1:
        raise UserError(
            f"mels: {mels}, channels: {channels}, embed_dim: {embed_dim} make no network. Use a multiple of 8, which three "
            "poolings divide, and positive widths."
        )
    if not 0 <= lowest_hz < highest_hz <= rate_hz / 2:
        raise UserError(
            f"lowest_hz: {lowest_hz:g}, highest_hz: {highest_hz:g}. Give bands from 0 to half the rate, {rate_hz / 2:g} Hz."
        )
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: {dropout} is not a share of at least 0 and below 1.")
