"""Networks that say what lies at some places from what was seen at others."""

import torch
from torch import Tensor, nn

from ssd.backbones.rotary import RotaryBlock, normalised


class CrossAttentionPredictor(nn.Module):
    """A learned token at each place that is asked for looks at the encoder's tokens, and never at another such token.

    So the answer for a place does not depend on which others are asked for, and costs what it alone costs. Darcet et al.
    2025, arXiv 2502.08769, section 3.

    Args:
        in_dim: width of the encoder's tokens.
        dim, depth, num_heads: of the blocks.
        drop_path_rate, mixed_axes: as in `RotaryBlock`.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        drop_path_rate: float = 0.0,
        mixed_axes: bool = False,
    ):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(
            RotaryBlock(dim, num_heads, drop_path_rate=drop_path_rate, context_dim=in_dim, mixed_axes=mixed_axes)
            for _ in range(depth)
        )

    def forward(self, context: Tensor, context_rope: Tensor, rope: Tensor, until: int | None = None) -> Tensor:
        """The encoder's tokens (B, m, in_dim) with their rotations, and those of P places, (B or 1, 1, P, 2 d) -> (B, P, dim),
        of root mean square 1; of the first `until` blocks, or all."""
        tokens = self.mask_token.expand(len(context), rope.shape[2], -1)
        for block in self.blocks[:until]:
            tokens = block(tokens, rope, context, context_rope)
        return normalised(tokens)
