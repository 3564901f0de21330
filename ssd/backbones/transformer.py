"""A transformer over the frames of a sound: blocks of timm's parts that know what is padding, and its positions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

POSITION_LAYERS, POSITION_WIDTH, POSITION_GROUPS = 5, 95, 16
"""Of positions by convolution as data2vec and DinoSR have them: five of a fifth of the width."""


class Transformer(nn.Module):
    """Positions, then blocks. (B, T, D) -> (B, T, D)

    Args:
        norm: "post": each block normalises its sums (wav2vec 2.0 base, DinoSR); "pre": what enters its parts, and the
            answer is normalised once more.
        positions: what is added to the frames, of (frames, valid); None adds nothing.
        dropout: of what enters the first block and of each part's answer.
        layer_drop: how often a block of a training network is left out, for the whole batch. It is computed all the same,
            so that each parameter has a gradient in each step and on each process.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm: str,
        positions: nn.Module | None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_drop: float = 0.0,
    ):
        super().__init__()
        self.norm_first = norm == "pre"
        self.drop_rate = layer_drop  # the name under which a teacher's copy finds it
        self.positions = positions
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, round(mlp_ratio * dim), self.norm_first, dropout, attention_dropout)
            for _ in range(depth)
        )
        self.apply(draw_linear)

    def forward(
        self, frames: Tensor, valid: Tensor | None, taps: Sequence[str] = (), until: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer of the last block that runs, normalised as `answer` does, and what was tapped.

        `valid` (B, T) is False where a frame is padding: no other frame sees it.
        """
        sequence = frames if self.positions is None else frames + self.positions(frames, valid)
        sequence = self.dropout(sequence if self.norm_first else self.norm(sequence))
        mask = None if valid is None else key_mask(valid, sequence.dtype)
        tapped = {}
        for number, block in enumerate(self.blocks[:until], 1):
            after, mlp = block(sequence, mask)
            if self.training and self.drop_rate:
                kept = torch.rand((), device=sequence.device) >= self.drop_rate
                after = torch.where(kept, after, sequence)
            sequence = after
            for name, value in ((f"block{number}", sequence), (f"block{number}.mlp", mlp)):
                if name in taps:
                    tapped[name] = value
        return self.answer(sequence), tapped

    @property
    def behind_taps(self) -> nn.Module:
        """The one part that no tap of an MLP depends on."""
        return self.norm if self.norm_first else self.blocks[-1].norm2  # type: ignore[return-value]

    def answer(self, sequence: Tensor) -> Tensor:
        """What stopping after a block answers, of that block's output."""
        return self.norm(sequence) if self.norm_first else sequence


class Block(nn.Module):
    """Attention and an MLP. (B, T, D) -> (B, T, D), and what the MLP adds, before dropout (B, T, D)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, norm_first: bool, dropout: float, attention_dropout: float
    ):
        super().__init__()
        self.norm_first = norm_first
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=attention_dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.norm_first:
            sequence = sequence + self.dropout(self.attn(self.norm1(sequence), attn_mask=mask))
            mlp = self.mlp(self.norm2(sequence))
            return sequence + self.dropout(mlp), mlp
        sequence = self.norm1(sequence + self.dropout(self.attn(sequence, attn_mask=mask)))
        mlp = self.mlp(sequence)
        return self.norm2(sequence + self.dropout(mlp)), mlp


class ConvPositions(nn.Module):
    """Positions that convolutions over time find by themselves, (B, T, D) -> (B, T, D); padding is 0 to each of them.

    Args:
        layers: convolutions, each with layer normalisation without gain and GELU (data2vec, Baevski et al. 2022). One alone
            has weight normalisation in its place (wav2vec 2.0, Baevski et al. 2020).
        width: frames that they see together.
        groups: of channels.
    """

    def __init__(self, dim: int, layers: int, width: int, groups: int):
        super().__init__()
        kernel = width // layers
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(layers)
        )
        self.normalised = layers > 1
        if not self.normalised:
            conv: Any = self.convs[0]
            nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * dim)))
            nn.init.zeros_(conv.bias)
            self.convs[0] = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        length = frames.shape[1]
        for conv in self.convs:
            if valid is not None:
                frames = frames.masked_fill(~valid[..., None], 0)
            frames = conv(frames.mT).mT[:, :length]  # an even kernel answers one too many
            frames = F.gelu(F.layer_norm(frames, frames.shape[-1:]) if self.normalised else frames)
        return frames


def key_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) -> (B, 1, 1, T): what is added to the scores of attention, -inf where a frame is padding."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, -torch.inf)[:, None, None]


def draw_linear(module: nn.Module) -> None:
    """BERT's draw: weights of standard deviation .02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
