"""Networks that answer for every place of a grid from the visible ones: what masked prediction puts behind an encoder."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.positions import sincos_positions
from ssd.errors import UserError

EPS = 1e-6  # of layer normalisation in MAE and all that follow it


class Projector(nn.Sequential):
    """Linear layers with GELU between them: (..., in_dim) -> (..., out_dim).

    Args:
        hidden: widths between the first and the last; none makes it one linear layer.
        norm: layer normalisation before each GELU.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden: Sequence[int] = (), norm: bool = False):
        layers: list[nn.Module] = []
        widths = [in_dim, *hidden, out_dim]
        for number, (width_in, width_out) in enumerate(pairwise(widths), 1):
            linear = nn.Linear(width_in, width_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if number < len(widths) - 1:
                layers += [nn.LayerNorm(width_out, eps=EPS)] if norm else []
                layers.append(nn.GELU())
        super().__init__(*layers)


class MaskedDecoder(nn.Module):
    """MAE's decoder: what the encoder says of visible patches, a learned token at the others, through a few blocks.

    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3. Positions are fixed sines and
    cosines, added to visible and hidden places alike.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: numbers that are predicted for each place.
        dim, depth, num_heads: of the blocks.
        drop_path_rate: share of samples whose residual branch is skipped in the last block, less in earlier ones.
        has_cls: whether a class token comes along, and is answered for.
        embed_bias: whether the first layer, from the encoder's width to `dim`, has a bias.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        drop_path_rate: float = 0.0,
        has_cls: bool = True,
        embed_bias: bool = True,
    ):
        super().__init__()
        if depth < 1 or dim < 1 or dim % num_heads:
            raise UserError(
                f"decoder_depth: {depth}, decoder_dim: {dim} and decoder_heads: {num_heads} make no decoder. Use 1 block or "
                "more, and heads that divide the width."
            )
        self.has_cls = has_cls
        self.embed = nn.Linear(in_dim, dim, bias=embed_bias)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        rates = [drop_path_rate * number / max(depth - 1, 1) for number in range(depth)]

        norm: Any = partial(nn.LayerNorm, eps=EPS)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, out_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor, visible: Tensor, grid: tuple[int, ...], cls: Tensor | None = None) -> Tensor:
        """Predictions for all places, (B, N, out_dim), or (B, 1 + N, out_dim) with that of the class token first.

        Args:
            patches: (B, n, in_dim) of the visible places.
            visible: (B, n) their places, row-major over `grid`.
            cls: (B, in_dim), where the decoder has one.
        """
        tokens = self.embed(patches)
        whole = spread(tokens, visible, math.prod(grid), self.mask_token)
        whole = whole + sincos_positions(tuple(grid), whole.shape[2]).to(whole)
        if self.has_cls:
            assert cls is not None, "this decoder was built with a class token"
            whole = torch.cat([self.embed(cls)[:, None], whole], dim=1)  # its position is 0
        for block in self.blocks:
            whole = block(whole)
        return self.head(self.norm(whole))


class ConvDecoder(nn.Module):
    """data2vec 2.0's light decoder: noise at hidden places, then convolutions over the grid.

    Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations", ICML 2023, section 3.
    Layers are convolution, layer normalisation over channels without gain, GELU, each with a residual where widths agree.

    Args:
        dim, depth, kernel, groups: of the convolutions.
        noise: deviation of the Gaussian noise that stands at hidden places.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        dim: int = 768,
        depth: int = 6,
        kernel: int = 3,
        groups: int = 16,
        noise: float = 0.01,
    ):
        super().__init__()
        if depth < 1 or kernel % 2 == 0 or in_dim % groups or dim % groups:
            raise UserError(
                f"a decoder of {depth} convolutions of {kernel}, {groups} groups over {in_dim} and {dim} channels cannot be. "
                "Use 1 layer or more, an odd kernel and groups that divide both widths."
            )
        self.noise = noise
        widths = [in_dim] + [dim] * depth
        self.layers = nn.ModuleList(
            nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, groups=groups)
            for width_in, width_out in pairwise(widths)
        )
        self.head = nn.Linear(dim, out_dim)

    def forward(self, patches: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, in_dim) at the places `visible` (B, n) of a grid (h, w) -> predictions (B, N, out_dim)."""
        batch, _, dim = patches.shape
        noise = torch.randn(batch, math.prod(grid), dim, dtype=patches.dtype, device=patches.device) * self.noise
        planes = noise.scatter(1, visible[..., None].expand(-1, -1, dim), patches).mT.unflatten(2, grid)
        for layer in self.layers:
            moved = layer(planes).permute(0, 2, 3, 1)  # channels last
            moved = F.layer_norm(moved, moved.shape[3:]).permute(0, 3, 1, 2)
            moved = F.gelu(moved)
            planes = planes + moved if planes.shape == moved.shape else moved
        return self.head(planes.flatten(2).mT)


def spread(tokens: Tensor, visible: Tensor, count: int, filler: Tensor) -> Tensor:
    """Tokens (B, n, D) at their places `visible` (B, n) among `count`, `filler` (1, 1, D) at the others. -> (B, count, D)"""
    batch, _, dim = tokens.shape
    whole = filler.to(tokens.dtype).expand(batch, count, dim)
    return whole.scatter(1, visible[..., None].expand(-1, -1, dim), tokens)


def places(tokens: Tensor, where: Tensor) -> Tensor:
    """The tokens (B, N, D) at the places (B, n), in their order. -> (B, n, D)"""
    return tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[2]))
