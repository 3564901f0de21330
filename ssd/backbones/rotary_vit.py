"""A vision transformer with rotary positions that timm has not: CAPI's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.base import Attention, Backbone, say_padding, tap_names
from ssd.backbones.rotary import RotaryBlock, RotaryPositions, border_places, grid_places, normalised
from ssd.backbones.vit import BEFORE_BLOCKS, attention_of
from ssd.batch import Tokens
from ssd.decoders import places
from ssd.errors import UserError
from ssd.predictors import CrossAttentionPredictor


class RotaryTransformer(nn.Module):
    """The weights of a `RotaryViT`."""

    pretrained_cfg = {"first_conv": "patch_embed"}

    def __init__(
        self,
        in_chans: int,
        patch_size: int,
        dim: int,
        num_registers: int,
        blocks: list[RotaryBlock],
        rope: RotaryPositions,
        predictor: CrossAttentionPredictor | None,
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.flatten(1))
        self.registers = nn.Parameter(torch.empty(1, num_registers, dim).normal_(std=0.02)) if num_registers else None
        self.blocks = nn.ModuleList(blocks)
        self.rope = rope
        self.predictor = predictor


class RotaryViT(Backbone):
    """A vision transformer with rotary positions, registers, no class token and no biases (Darcet et al. 2025).

    Registers lie evenly around the border of the smallest rectangle that holds the visible patches. Inputs of any size: the
    first row of patches is at 0 and the last at 1, so that rotations do not leave what was trained. Sizes that the patch does
    not divide are padded with zeros at the right and bottom, which is said once.

    Args:
        patch_size: px. Published is 14.
        embed_dim, depth, num_heads: of the encoder; the defaults are ViT-L's.
        num_registers: a multiple of 4.
        predictor_depth: blocks of a predictor of hidden places that comes with the network, which CAPI trains; 0 = none.
        predictor_dim: its width, in heads as wide as the encoder's; null = the encoder's.
        drop_path_rate: share of samples for which a residual branch is not computed, the same in all blocks.
        mixed_axes: turn channels of rows against channels of columns, as the published code does: for its weights alone.
        activation_checkpointing: keep each block's input alone and run the block again in the backward pass.
        weights: start from an exported folder, a weights file or a checkpoint; published ones need mixed_axes: true.
        rgb_channels: which channels are red, green and blue, as in `ViT`.
    """

    of_timm = False

    def __init__(
        self,
        *,
        in_chans: int = 3,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_registers: int = 16,
        predictor_depth: int = 0,
        predictor_dim: int | None = None,
        drop_path_rate: float = 0.0,
        mixed_axes: bool = False,
        activation_checkpointing: bool = False,
        weights: str | None = None,
        rgb_channels: list[int] | None = None,
    ):
        super().__init__("rotary_vit", in_chans, drop_path_rate, rgb_channels)
        counts = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        for setting, number in counts.items():
            if number < 1:
                raise UserError(f"{setting}: {number} is not a positive count. Use 1 or more.")
        if embed_dim % num_heads:
            raise UserError(f"num_heads: {num_heads} does not divide embed_dim: {embed_dim}. Use a divisor.")
        if num_registers < 0 or num_registers % 4:
            raise UserError(
                f"num_registers: {num_registers} does not lie evenly on the four sides of a square. Use a multiple of 4, or 0."
            )
        head_dim = embed_dim // num_heads
        predictor_dim = embed_dim if predictor_dim is None else predictor_dim
        if predictor_depth < 0 or predictor_dim < head_dim or predictor_dim % head_dim:
            raise UserError(
                f"predictor_depth: {predictor_depth} and predictor_dim: {predictor_dim} make no predictor. Use 0 blocks or more, "
                f"and a multiple of the encoder's heads of {head_dim}."
            )
        every: dict[str, Any] = {"drop_path_rate": drop_path_rate, "mixed_axes": mixed_axes}
        predictor = None
        if predictor_depth:
            heads = predictor_dim // head_dim
            predictor = CrossAttentionPredictor(
                embed_dim, dim=predictor_dim, depth=predictor_depth, num_heads=heads, **every
            )
        blocks = [RotaryBlock(embed_dim, num_heads, **every) for _ in range(depth)]
        rope = RotaryPositions(head_dim)
        self.model = RotaryTransformer(in_chans, patch_size, embed_dim, num_registers, blocks, rope, predictor)
        self.can = frozenset({"visible", "taps", "until"} | ({"predict"} if predictor_depth else set()))
        self.mixed_axes = mixed_axes
        self.activation_checkpointing = activation_checkpointing
        self.attention = self.find_attention()
        self.padding_said = False
        self.start_from(weights)

    @property
    def embed_dim(self) -> int:
        return self.model.patch_embed.out_channels

    @property
    def predictor_dim(self) -> int:
        return self.model.predictor.mask_token.shape[1]

    @property
    def patch_size(self) -> int:
        return self.model.patch_embed.kernel_size[0]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches in a tap: the registers."""
        return 0 if self.model.registers is None else self.model.registers.shape[1]

    def grid(self, *lengths: int) -> tuple[int, ...]:
        return tuple(-(-length // self.patch_size) for length in lengths)

    def describe_timm(self) -> dict[str, Any]:
        raise UserError(f"timm has no network like '{self.name}'. Give `weights` as a file, a folder or a checkpoint.")

    def instead(self, ability: str) -> str:
        if ability == "predict":
            return "Set its predictor_depth: published is half of depth."
        return super().instead(ability)

    def forward(
        self,
        x: Tensor,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible: Tensor | None = None,
        taps: Sequence[int | str] = (),
        until: int | None = None,
        keep: Mapping[int, int] | None = None,
    ) -> Tokens:
        """As `Backbone.forward`. Taps are whole sequences (B, num_prefix + N, D) before the final norm;
        what is answered went through the final norm, also after an early stop."""
        self.check_input(x)
        self.use_fitting_attention(x)
        self.refuse(keep=keep)
        if masked is not None:
            raise UserError(f"'{self.name}' has no mask token to put in place of patches. Give the `visible` ones.")
        last = self.last_block(until)
        wanted = tap_names([tap for tap in taps if tap not in BEFORE_BLOCKS], last, self.num_blocks, self.name)
        if any("." in name for name in wanted):
            raise UserError(f"'{self.name}' answers whole blocks. Tap a number, or a name such as block3.")

        grid, sequence, rope = self.embed(x, visible)
        tapped: dict[str, Tensor] = {"block0": sequence} if set(taps) & set(BEFORE_BLOCKS) else {}
        for number, block in enumerate(self.blocks[:last], 1):
            sequence = self.run(block, sequence, rope)
            if f"block{number}" in wanted:
                tapped[f"block{number}"] = sequence
        return replace(self.tokens_at(sequence, grid), taps=tapped)

    def tokens_at(self, tap: Tensor, grid: tuple[int, ...]) -> Tokens:
        """What stopping after the tapped block would have answered: the final norm is applied."""
        sequence = normalised(tap)  # (B, prefix + N, D)
        prefix = self.num_prefix
        return Tokens(patches=sequence[:, prefix:], grid=grid, registers=sequence[:, :prefix] if prefix else None)

    def predict(
        self, tokens: Tokens, visible: Tensor | None = None, predicted: Tensor | None = None, until: int | None = None
    ) -> Tensor:
        """As `Backbone.predict`."""
        seen, asked = (
            self.places_of(tokens.grid, chosen, tokens.patches.device)  # (B or 1, n, 2)
            for chosen in (visible, predicted)
        )
        parts = [tokens.patches] if tokens.registers is None else [tokens.registers, tokens.patches]
        rope = self.model.rope(self.with_registers(seen))
        return self.model.predictor(torch.cat(parts, dim=1), rope, self.model.rope(asked), until)

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Attention:
        """Of the mean over all patches; after softmax, as the block computes it."""
        self.check_input(x)
        grid, sequence, rope = self.embed(x, None)
        with torch.compiler.set_stance("force_eager"):
            for block in self.blocks[:-1]:
                sequence = block(sequence, rope)
            shares = attention_of(self.blocks[-1], sequence, {"rope": rope})[..., self.num_prefix :]  # (B, heads, n, N)
        return Attention(shares[:, :, self.num_prefix :].mean(2), grid, "mean of the patches")

    def embed(self, x: Tensor, visible: Tensor | None) -> tuple[tuple[int, int], Tensor, Tensor]:
        """The token grid, what enters the first block (B, prefix + N or n, D), and its rotations."""
        height, width = x.shape[-2:]
        below, right = -height % self.patch_size, -width % self.patch_size
        if below or right:
            if not self.padding_said and not torch.compiler.is_compiling():
                self.padding_said = True
                say_padding(self.name, (height, width), (self.patch_size, self.patch_size))
            x = F.pad(x, (0, right, 0, below))
        patches = self.model.patch_embed(x)  # (B, D, h, w)
        grid = (patches.shape[2], patches.shape[3])
        sequence = patches.flatten(2).mT
        if visible is not None:
            sequence = places(sequence, visible)
        if self.model.registers is not None:
            sequence = torch.cat([self.model.registers.to(sequence.dtype).expand(len(x), -1, -1), sequence], dim=1)
        return grid, sequence, self.model.rope(self.with_registers(self.places_of(grid, visible, x.device)))

    def places_of(self, grid: tuple[int, ...], chosen: Tensor | None, device: torch.device) -> Tensor:
        """Where the chosen tokens (B, n) of a grid lie, or all: (B or 1, n, 2)."""
        everywhere = grid_places((grid[0], grid[1]), device)
        return everywhere[None] if chosen is None else everywhere[chosen]

    def with_registers(self, patches: Tensor) -> Tensor:
        """Places of the registers, on the border of the rectangle that holds the patches, and of the patches (B, n, 2)."""
        if self.model.registers is None:
            return patches
        low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
        return torch.cat([low + border_places(self.num_prefix, patches.device) * (high - low), patches], dim=1)
