"""Networks over sound: a transformer over what convolutions make of the waveform, and one over a spectrogram."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.base import tap_names
from ssd.backbones.positions import sincos_positions
from ssd.backbones.sound import SoundNetwork, Spectral
from ssd.backbones.transformer import POSITION_GROUPS, POSITION_LAYERS, POSITION_WIDTH, ConvPositions, Transformer
from ssd.backbones.vit import as_boolean, replace_masked
from ssd.batch import Padded, Tokens
from ssd.errors import UserError
from ssd.frames import Frames, as_layers
from ssd.spectrogram import DB_PER_NEPER, Levels, log_mel_inside, mel_filters, window_and_hop

LAYERS = {
    16_000: ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)),
    8_000: ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2)),
}
"""Samples a second -> (kernel, stride) of the front end, a token every 20 ms (Baevski et al. 2020, section 4.2)."""


class Sounds(SoundNetwork, ABC):
    """What transformers over sound share: sounds (B, S) or `Padded` -> `Tokens` of their frames.

    The weights are those of `self.model`: `front`, which makes tokens of a sound, and the `transformer` over them.
    """

    can = frozenset({"masked", "taps", "until"})

    @property
    def embed_dim(self) -> int:
        return self.model.transformer.norm.normalized_shape[0]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.transformer.blocks

    @abstractmethod
    def embed(self, sounds: Tensor | Padded) -> tuple[Tensor, Tensor | None]:
        """What enters the transformer, (B, N, D), and (B, N) where it is no padding, None where all is sound.

        A sound of fewer samples than a token sees counts as one token.
        """

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Padded,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible: Tensor | None = None,
        taps: Sequence[int | str] = (),
        until: int | None = None,
        keep: Mapping[int, int] | None = None,
    ) -> Tokens:
        """As `Backbone.forward`, of sounds (B, S) or `Padded`. Taps are (B, N, D); "block3.mlp" is what the MLP adds."""
        self.refuse(visible=visible, keep=keep)
        last = self.last_block(until)
        wanted = tap_names(taps, last, self.num_blocks, self.name)
        tokens, valid = self.embed(x)
        return self.encode(tokens, valid, self.grid_of(x), masked, mask_token, wanted, last)

    def encode(
        self,
        tokens: Tensor,
        valid: Tensor | None,
        grid: tuple[int, ...],
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[str] = (),
        until: int | None = None,
    ) -> Tokens:
        """The rest of `forward`, of what `embed` answered."""
        self.use_fitting_attention(tokens)
        if masked is not None:
            batch, length = tokens.shape[:2]
            tokens = replace_masked(tokens, as_boolean(masked, (batch, length)), mask_token)
        sequence, tapped = self.model.transformer(self.placed(tokens, grid), valid, taps, until)
        return Tokens(patches=sequence, grid=grid, valid=valid, taps=tapped)

    def placed(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """With positions that are no part of the transformer."""
        return tokens

    def tokens_at(self, tap: Tensor, grid: tuple[int, ...]) -> Tokens:
        return Tokens(patches=self.model.transformer.answer(tap), grid=grid)


class SpeechEncoder(Sounds):
    """The network of wav2vec 2.0, data2vec and DinoSR: convolutions over the waveform, then a transformer.

    Each convolution is followed by layer normalisation over channels and GELU, so that no frame depends on the length of the
    sound. Its inputs are meant to have mean 0 and variance 1 (SoundViews.normalize).

    Args:
        rate_hz: samples a second of its inputs: 16,000 takes the seven published convolutions, 8,000 leaves the last one out;
            both answer a token every 20 ms.
        layers: (kernel, stride) of each convolution, in place of those of `rate_hz`.
        conv_dim: channels of the convolutions.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer.
        norm: "post": blocks normalise their sums, as in the base networks; "pre": their inputs.
        positions: "convs": five convolutions of 19 frames (data2vec, DinoSR); "conv": one of 128 (wav2vec 2.0).
        dropout, attention_dropout: of the transformer.
        layer_drop: how often a block is left out in training.
        weights: start from an exported folder, a weights file or a checkpoint.
    """

    def __init__(
        self,
        *,
        rate_hz: int = 16_000,
        layers: Sequence[Sequence[int]] | None = None,
        conv_dim: int = 512,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm: str = "post",
        positions: str = "convs",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layer_drop: float = 0.05,
        weights: str | None = None,
    ):
        super().__init__(f"speech_{embed_dim}x{depth}", rate_hz)
        if layers is None and rate_hz not in LAYERS:
            raise UserError(f"rate_hz: {rate_hz} has no published front end. Use 16000 or 8000, or give its layers.")
        check_transformer(embed_dim, depth, num_heads, norm, dropout, attention_dropout, layer_drop)
        if positions not in ("convs", "conv") or embed_dim % POSITION_GROUPS:
            raise UserError(
                f"positions: '{positions}' with embed_dim {embed_dim}. Choose 'convs' or 'conv', and a multiple of "
                f"{POSITION_GROUPS}."
            )
        self.frames = Frames(LAYERS[rate_hz] if layers is None else as_layers(layers))
        check_layers(self.frames.layers)
        places = (POSITION_LAYERS, POSITION_WIDTH) if positions == "convs" else (1, 128)
        transformer = Transformer(
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm,
            ConvPositions(embed_dim, *places, POSITION_GROUPS),
            dropout,
            attention_dropout,
            layer_drop,
        )
        front = FrontEnd(self.frames.layers, conv_dim, embed_dim)
        self.model = nn.ModuleDict({"front": front, "transformer": transformer})
        self.attention = self.find_attention()
        self.start_from(weights)

    def embed(self, sounds: Tensor | Padded) -> tuple[Tensor, Tensor | None]:
        self.check_input(sounds)
        samples = sounds.samples if isinstance(sounds, Padded) else sounds
        return self.model.front(samples), self.valid_tokens(sounds)


class FrontEnd(nn.Module):
    """Frames of a waveform: (B, S) -> (B, T, dim)."""

    def __init__(self, layers: Sequence[tuple[int, int]], conv_dim: int, dim: int):
        super().__init__()
        channels = [1, *(conv_dim for _ in layers)]
        self.convs = nn.ModuleList(
            nn.Conv1d(before, after, kernel, stride, bias=False)
            for before, after, (kernel, stride) in zip(channels, channels[1:], layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(conv_dim) for _ in layers)
        self.norm = nn.LayerNorm(conv_dim)
        self.project = nn.Linear(conv_dim, dim)
        conv: Any
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, samples: Tensor) -> Tensor:
        frames = samples[:, None]
        for conv, norm in zip(self.convs, self.norms):
            frames = F.gelu(norm(conv(frames).mT)).mT
        return self.project(self.norm(frames.mT))


class LogMelEncoder(Sounds, Spectral):
    """A transformer over patches of a log-mel spectrogram, with fixed positions in time and frequency (after Gong et al.,
    "AST: Audio Spectrogram Transformer", Interspeech 2021, arXiv 2104.01778).

    Bands are of windows of 25 ms every 10 ms, each sound at mean 0 and variance 1 over its own patches.

    Args:
        rate_hz: samples a second of its inputs.
        mels: bands.
        patch: windows and bands of a patch.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer.
        norm: "pre" or "post", as of `SpeechEncoder`.
        dropout, attention_dropout, layer_drop: as of `SpeechEncoder`.
        weights: start from an exported folder, a weights file or a checkpoint.
    """

    def __init__(
        self,
        *,
        rate_hz: int = 16_000,
        mels: int = 64,
        patch: Sequence[int] = (4, 16),
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        norm: str = "pre",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_drop: float = 0.0,
        weights: str | None = None,
    ):
        super().__init__(f"logmel_{embed_dim}x{depth}", rate_hz)
        check_transformer(embed_dim, depth, num_heads, norm, dropout, attention_dropout, layer_drop)
        if len(patch) != 2 or min(patch) < 1 or mels < 1 or mels % patch[1]:
            raise UserError(
                f"patch: {list(patch)} of {mels} mels. Give windows and bands of a patch, whose bands divide mels."
            )
        self.window, self.hop = window_and_hop(rate_hz)
        self.patch = (patch[0], patch[1])
        self.mels = mels
        self.frames = Frames(((self.window, self.hop), (self.patch[0], self.patch[0])))
        transformer = Transformer(
            embed_dim, depth, num_heads, mlp_ratio, norm, None, dropout, attention_dropout, layer_drop
        )
        front = nn.Linear(self.patch[0] * self.patch[1], embed_dim)
        self.model = nn.ModuleDict({"front": front, "transformer": transformer})
        self.filters: Tensor
        self.register_buffer("filters", mel_filters(self.window, rate_hz, mels), persistent=False)
        self.attention = self.find_attention()
        self.start_from(weights)

    @property
    def rows(self) -> int:
        return self.mels // self.patch[1]

    def grid(self, *lengths: int) -> tuple[int, ...]:
        return super().grid(*lengths) if self.rows == 1 else (*super().grid(*lengths), self.rows)

    def grid_of(self, x: Tensor | Padded | Levels) -> tuple[int, ...]:
        if not isinstance(x, Levels):
            return super().grid_of(x)
        moments = x.values.shape[1] // self.patch[0]
        return (moments,) if self.rows == 1 else (moments, self.rows)

    def hear(self, sounds: Tensor | Padded) -> Levels:
        self.check_input(sounds)
        samples = sounds.samples if isinstance(sounds, Padded) else sounds
        values = log_mel_inside(samples, self.filters, self.window, self.hop)  # (B, windows, mels)
        inside = Frames(((self.window, self.hop),))
        counts = inside.counts(sounds.valid.sum(1)).clamp_min(1) if isinstance(sounds, Padded) else None
        return Levels(values, counts, per_neper=DB_PER_NEPER)

    def embed(self, sounds: Tensor | Padded | Levels) -> tuple[Tensor, Tensor | None]:
        levels = sounds if isinstance(sounds, Levels) else self.hear(sounds)
        moments, rows = self.grid_of(levels)[0], self.rows
        high, wide = self.patch
        valid = None if levels.counts is None else self.first_tokens(levels.counts // high, moments)
        patches = levels.values[:, : moments * high].unflatten(1, (moments, high)).unflatten(3, (rows, wide))
        patches = patches.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, N, patch values)
        return self.model.front(levelled(patches, valid)), valid

    def placed(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        return tokens + sincos_positions(grid, self.embed_dim).to(tokens)


def levelled(patches: Tensor, valid: Tensor | None) -> Tensor:
    """Each sound's patches (B, N, P) at mean 0 and variance 1 over all of their values that are no padding."""
    share = torch.ones_like(patches[..., :1]) if valid is None else valid[..., None].to(patches)
    count = (share.sum((1, 2), keepdim=True) * patches.shape[2]).clamp_min(1)
    mean = (patches * share).sum((1, 2), keepdim=True) / count
    centred = (patches - mean) * share
    return centred / (centred.square().sum((1, 2), keepdim=True) / count + 1e-5).sqrt()


# ---------------------------------------------------------------------- checks


def check_transformer(embed_dim: int, depth: int, num_heads: int, norm: str, *rates: float) -> None:
    if min(embed_dim, depth, num_heads) < 1 or embed_dim % num_heads:
        raise UserError(
            f"embed_dim: {embed_dim}, depth: {depth}, num_heads: {num_heads} make no transformer. Use positive numbers, "
            "embed_dim a multiple of num_heads."
        )
    if norm not in ("post", "pre"):
        raise UserError(f"norm: '{norm}' is unknown. Choose 'post' or 'pre'.")
    for name, rate in zip(("dropout", "attention_dropout", "layer_drop"), rates, strict=True):
        if not 0 <= rate < 1:
            raise UserError(f"{name}: {rate} is not a share of at least 0 and below 1.")


def check_layers(layers: Sequence[Any]) -> None:
    if not layers or any(not 1 <= stride <= kernel for kernel, stride in layers):
        raise UserError(f"layers: {[list(layer) for layer in layers]}. Give (kernel, stride), 1 <= stride <= kernel.")
