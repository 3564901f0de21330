"""Transformer layers whose attention turns queries and keys by where tokens lie, and that have no biases."""

import math

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.drop_path import add_on_subset
from ssd.errors import UserError

EPS = 1e-5  # of root-mean-square normalisation


class RotaryPositions(nn.Module):
    """Rotations of the channels of a head by a token's place in the unit square.

    The first half of the channels is turned by the row, the second by the column: at n = head_dim / 4 angular frequencies
    2 pi f with f evenly spaced in its logarithm from 7 down to 7e-4, each for channels i and i + n of its half (Darcet et al.
    2025, arXiv 2502.08769, appendix; Su et al. 2021, arXiv 2104.09864). Frequencies are a buffer: they do not learn.

    Args:
        head_dim: channels of a head, a multiple of 4.
    """

    freqs: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        if head_dim % 4:
            raise UserError(
                f"heads of {head_dim} channels cannot be turned along two axes. Choose num_heads so that embed_dim / num_heads "
                "is a multiple of 4."
            )
        half = 2 * math.pi * 7.0 * 1e4 ** torch.linspace(0, -1, head_dim // 4)
        rows = torch.cat([half, half, torch.zeros(head_dim // 2)])
        self.register_buffer("freqs", torch.stack([rows, rows.roll(head_dim // 2)]))

    def forward(self, places: Tensor) -> Tensor:
        """Rows and columns (B, n, 2) in [0, 1] -> cosines and sines, (B, 1, n, 2 head_dim), float32."""
        # no matrix product: autocast would round angles of up to 14 pi to three digits
        angles = places[..., :1] * self.freqs[0] + places[..., 1:] * self.freqs[1]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]


def turned(x: Tensor, rope: Tensor, mixed_axes: bool = False) -> Tensor:
    """Heads (B, h, n, d) by rotations (B or 1, 1, n, 2 d).

    `mixed_axes` pairs channel i with i + d / 2, which turns by the other axis: no rotation, and products of queries and keys
    then depend on where both lie, not only on how far apart. The published code of CAPI does so, and its weights need it.
    """
    cos, sin = rope.chunk(2, dim=-1)
    first, second = x.unflatten(-1, (1 if mixed_axes else 2, 2, -1)).unbind(-2)
    return (x * cos + torch.stack([-second, first], dim=-2).flatten(-3) * sin).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attention of tokens to each other, or to a context.

    Args:
        context_dim: width of the context's tokens.
        mixed_axes: see `turned`.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, mixed_axes: bool):
        super().__init__()
        self.num_heads = num_heads
        self.mixed_axes = mixed_axes
        self.fused_attn = True
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(context_dim, dim, bias=False)
        self.v_proj = nn.Linear(context_dim, dim, bias=False)
        self.attn_drop = nn.Identity()  # where a look at the shares hooks in
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, context: Tensor | None, context_rope: Tensor | None) -> Tensor:
        source = x if context is None else context
        query = turned(self.heads(self.q_proj(x)), rope, self.mixed_axes)
        key = turned(self.heads(self.k_proj(source)), rope if context_rope is None else context_rope, self.mixed_axes)
        value = self.heads(self.v_proj(source))
        if self.fused_attn:
            answer = F.scaled_dot_product_attention(query, key, value)
        else:
            shares = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(dim=-1)
            answer = self.attn_drop(shares).to(value.dtype) @ value
        return self.proj(answer.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, h, n, d)"""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers, the inner one four times as wide, GELU between them."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RotaryBlock(nn.Module):
    """Attention and MLP, each behind a root-mean-square normalisation with gain. Linear weights are Xavier uniform.

    Args:
        drop_path_rate: share of samples for which a branch is not computed (`add_on_subset`).
        context_dim: width of a context that is attended to instead of the tokens themselves; null = there is none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        drop_path_rate: float = 0.0,
        context_dim: int | None = None,
        mixed_axes: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=EPS)
        self.attn = RotaryAttention(dim, num_heads, dim if context_dim is None else context_dim, mixed_axes)
        self.norm2 = nn.RMSNorm(dim, eps=EPS)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path_rate)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)

    def forward(
        self, x: Tensor, rope: Tensor, context: Tensor | None = None, context_rope: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, n, D) at rotations (B or 1, 1, n, 2 d) -> (B, n, D); a context (B, m, E) has rotations of its own."""
        rate = self.drop_path.drop_prob
        if not self.training or not rate:
            x = x + self.attn(self.norm1(x), rope, context, context_rope)
            return x + self.mlp(self.norm2(x))

        def attend(rows: Tensor, kept: Tensor) -> Tensor:
            return self.attn(self.norm1(rows), *(of_rows(each, kept) for each in (rope, context, context_rope)))

        x = add_on_subset(x, rate, attend)
        return add_on_subset(x, rate, lambda rows, kept: self.mlp(self.norm2(rows)))


def of_rows(value: Tensor | None, kept: Tensor) -> Tensor | None:
    """What belongs to the kept rows; what is one for all stays."""
    return value if value is None or len(value) == 1 else value.index_select(0, kept)


def normalised(x: Tensor) -> Tensor:
    """(..., D) over its root mean square, without gain."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def grid_places(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Rows and columns of a grid's tokens, from 0 in the first to 1 in the last; one alone is at 0. (N, 2)"""
    axes = (torch.linspace(0, 1, side, device=device) for side in grid)
    return torch.cartesian_prod(*axes)


def border_places(count: int, device: torch.device | None = None) -> Tensor:
    """`count` places, a multiple of 4, evenly around the border of the unit square from its first corner. (count, 2)"""
    side = torch.arange(count // 4, device=device) / max(count // 4, 1)
    low, high = torch.zeros_like(side), torch.ones_like(side)
    sides = ((side, low), (high, side), (1 - side, high), (low, 1 - side))
    return torch.cat([torch.stack(each, dim=1) for each in sides])
