"""Vision transformers of timm: learned positions (VisionTransformer) and rotary ones (Eva)."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.base import Attention, Backbone, create, say_padding, tap_names
from ssd.backbones.drop_path import SUBSET, set_drop_path
from ssd.backbones.positions import sincos_positions
from ssd.backbones.post_norm import WITH_POST_NORM, normalise_behind
from ssd.backbones.redundancy import least_redundant
from ssd.batch import Tokens
from ssd.distributed import is_sharded
from ssd.errors import UserError

BEFORE_BLOCKS: tuple[int | str, ...] = (0, "block0")
FAMILIES = {"vision_transformer", "deit", "eva"}  # timm's own modules
STEMS = ("linear", "conv")


class ViT(Backbone):
    """A vision transformer of timm by name.

    Inputs of any size: learned positions are resized bicubically, rotary ones are computed. Sizes that
    the patch does not divide are padded with zeros at the right and bottom, which is said once.

    Args:
        name: timm's name, for instance vit_tiny_patch16_224, vit_small_patch14_reg4_dinov2,
            vit_small_patch16_dinov3.
        img_size: pixels of the side (or height and width) that learned positions are kept for; the
            name's own where None. Other inputs work, at the cost of resizing positions.
        stem: what turns pixels into patches: "linear", one convolution as wide as the patch, timm's own; "conv", convolutions
            of 3x3 that overlap, each of stride 2, with batch normalisation (Xiao et al. 2021, arXiv 2106.14881), with which
            a small ViT learns from few steps. Masked patches are then hidden in the picture too, or their neighbours
            would show their edges. Plain timm has no such stem, so it exports as safetensors only.
        drop_path_rate: share of samples whose residual branch is skipped, in the last block at least.
        drop_path_rule: "linear": the share grows from 0 in the first block; "uniform": it is the same in all; "subset":
            the same, and what is skipped is not computed (DINOv2), which saves its time and memory.
        activation_checkpointing: keep each block's input alone and run the block again in the backward pass: the same
            gradients in less memory, for a third more time.
        weights: start from "timm", "timm:TAG", an exported folder, a weights file or a checkpoint.
        rgb_channels: which channels are red, green and blue, counted from 0, where `weights` are of an RGB network and
            the pictures have more channels; null = the first three.
        fixed_positions: sines and cosines that are not trained (MAE) in place of learned positions.
        post_norm: normalise behind each residual sum and behind the embedding instead of before, with no final norm
            (data2vec 2.0). Plain timm has no such block, so it exports as safetensors only.
        arguments: further arguments of the timm model, for instance {depth: 4, embed_dim: 96}.
    """

    can = frozenset({"masked", "visible", "taps", "until", "keep"})

    def __init__(
        self,
        name: str = "vit_small_patch16_224",
        *,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        stem: str = "linear",
        drop_path_rate: float = 0.0,
        drop_path_rule: str = "linear",
        activation_checkpointing: bool = False,
        weights: str | None = None,
        rgb_channels: list[int] | None = None,
        fixed_positions: bool = False,
        post_norm: bool = False,
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__(name, in_chans, drop_path_rate, rgb_channels)
        self.activation_checkpointing = activation_checkpointing
        arguments = dict(arguments or {})
        if arguments.get("patch_drop_rate"):
            raise UserError("patch_drop_rate drops patches unseen by the method. Use a method that passes `visible`.")
        kwargs: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
        kwargs |= {"dynamic_img_size": True, "dynamic_img_pad": True}
        if img_size is not None:
            kwargs["img_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
        if post_norm:
            kwargs["final_norm"] = False
        # without a pooling of timm's, the final norm is that of the tokens
        build = {**kwargs, "global_pool": "", "drop_path_rate": drop_path_rate}
        if timm.is_model(name) and not timm.models.is_model_in_modules(name, FAMILIES):
            raise UserError(
                f"'{name}' is not a vision transformer that ViT can adapt. Use ConvNet for networks that answer "
                "a map of features, or a name such as vit_small_patch16_224 or vit_small_patch16_dinov3."
            )
        if post_norm and timm.models.is_model_in_modules(name, {"eva"}):
            raise UserError(f"post_norm: the blocks of '{name}' are built another way. {WITH_POST_NORM}")
        model = create(name, build, arguments)
        if hasattr(model, "dist_token"):
            raise UserError(f"'{name}' has a distillation token, which no method here uses. Use the name without it.")
        if stem not in STEMS:
            raise UserError(f"stem: '{stem}' is unknown. Choose one of {', '.join(STEMS)}.")
        self.convolved = stem == "conv"
        self.edits = convolve_stem(model, name) if self.convolved else []
        self.edits += normalise_behind(model, name) if post_norm else []
        set_drop_path(model.blocks, drop_path_rate, drop_path_rule)
        model.global_pool = "avg" if model.cls_token is None else "token"
        self.model = model
        self.rotary = isinstance(model, Eva)
        # spelled out: what the name alone implies is lost in an exported folder
        kwargs["img_size"] = tuple(model.patch_embed.img_size)
        norm_after_pooling = "use_fc_norm" if self.rotary else "fc_norm"
        self.kwargs = {**kwargs, "global_pool": model.global_pool, norm_after_pooling: False, **arguments}
        size = model.patch_embed.img_size
        fitting = tuple(-(-side // patch) * patch for side, patch in zip(size, self.patch, strict=True))
        if size != fitting:
            raise UserError(
                f"img_size {img_size} of '{name}' is not a multiple of its patches of {self.patch_size} px. "
                f"Use a multiple, for instance {list(fitting)}."
            )
        if fixed_positions:
            fix_positions(model, name)
        self.attention = self.find_attention()
        self.padding_said = False
        self.start_from(weights)

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @property
    def patch(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.patch_size)

    @property
    def patch_size(self) -> int | tuple[int, int]:
        rows, columns = self.patch
        return rows if rows == columns else (rows, columns)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    @property
    def num_registers(self) -> int:
        return 0 if self.model.reg_token is None else self.model.reg_token.shape[1]

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches in a tap: the class token, then the registers."""
        return self.model.num_prefix_tokens

    def grid(self, *lengths: int) -> tuple[int, ...]:
        return tuple(-(-length // side) for length, side in zip(lengths, self.patch, strict=True))

    def describe_timm(self) -> dict[str, Any]:
        return {"name": self.name, "kwargs": dict(self.kwargs), "edits": list(self.edits)}

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
        last = self.last_block(until)
        wanted = tap_names([tap for tap in taps if tap not in BEFORE_BLOCKS], last, self.num_blocks, self.name)

        keep = keep or {}
        self.check_keep(keep, last)

        grid, sequence, ropes = self.embed(x, masked, mask_token, visible)
        places, kept = visible, {}
        tapped: dict[str, Tensor] = {"block0": sequence} if set(taps) & set(BEFORE_BLOCKS) else {}
        for number, block in enumerate(self.blocks[:last], 1):
            if number - 1 in keep:
                chosen = least_redundant(sequence[:, self.num_prefix :], keep[number - 1])
                sequence = only_visible(sequence, chosen, self.num_prefix)
                ropes = [None if rope is None else kept_rope(rope, chosen) for rope in ropes]
                places = chosen if places is None else places.gather(1, chosen)
                kept[number - 1] = places
            place: dict[str, Any] = {"rope": ropes[number - 1]} if self.rotary else {}
            if f"block{number}.qkv" in wanted:
                tapped[f"block{number}.qkv"] = queries_keys_values(block, sequence, place)
            if f"block{number}.mlp" in wanted:
                sequence, tapped[f"block{number}.mlp"] = block_and_mlp(block, sequence, place)
            else:
                sequence = self.run(block, sequence, **place)
            if f"block{number}" in wanted:
                tapped[f"block{number}"] = sequence

        return replace(self.tokens_at(sequence, grid), taps=tapped, kept=kept)

    def check_keep(self, keep: Mapping[int, int], last: int) -> None:
        """Raises UserError for patches that are dropped where no block follows."""
        wrong = [number for number in keep if not 0 <= number < last]
        if wrong:
            raise UserError(
                f"keep names block {wrong[0]} of '{self.name}', behind which no block runs. Use 0, for what enters the first, "
                f"to {last - 1}."
            )

    def tokens_at(self, tap: Tensor, grid: tuple[int, ...]) -> Tokens:
        """What stopping after the tapped block would have answered: the final norm is applied."""
        sequence = self.model.norm(tap)  # (B, prefix + N, D)
        prefix = self.num_prefix
        return Tokens(
            patches=sequence[:, prefix:],
            grid=grid,
            cls=None if self.model.cls_token is None else sequence[:, 0],
            registers=sequence[:, prefix - self.num_registers : prefix] if self.num_registers else None,
        )

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Attention:
        """Of the class token, or the mean over all patches where there is none; after softmax, as the block computes it."""
        self.check_input(x)
        self.use_fitting_attention(x)
        grid, sequence, ropes = self.embed(x, None, None, None)
        places: list[dict[str, Any]] = [{"rope": rope} if self.rotary else {} for rope in ropes]
        # a look at a few pictures is no reason to compile for their shape
        with torch.compiler.set_stance("force_eager"):
            for block, place in zip(self.blocks[:-1], places[:-1]):
                sequence = self.run(block, sequence, **place)
            shares = attention_of(self.blocks[-1], sequence, places[-1])[..., self.num_prefix :]  # (B, heads, n, N)
        if self.model.cls_token is not None:
            return Attention(shares[:, :, 0], grid, "class token")
        return Attention(shares[:, :, self.num_prefix :].mean(2), grid, "mean of the patches")

    def embed(
        self, x: Tensor, masked: Tensor | None, mask_token: Tensor | None, visible: Tensor | None
    ) -> tuple[tuple[int, int], Tensor, Sequence[Tensor | None]]:
        """The token grid, what enters the first block (B, prefix + N or n, D), and rotary positions for each block."""
        height, width = x.shape[-2:]
        rows, columns = self.patch
        if (height % rows or width % columns) and not self.padding_said and not torch.compiler.is_compiling():
            self.padding_said = True
            say_padding(self.name, (height, width), self.patch)

        rows, columns = self.grid(height, width)
        grid = (rows, columns)
        all_patches = (len(x), rows * columns)
        masked = None if masked is None else as_boolean(masked, all_patches)  # (B, N)
        if visible is not None and len(visible) % len(x):
            raise UserError(
                f"visible has {len(visible)} rows for {len(x)} pictures. Give one row for each, or a multiple of it."
            )
        if self.convolved and masked is not None:
            x = hide_pixels(x, masked, grid, self.patch)
        if self.convolved and visible is not None:
            # what is hidden differs from set to set, and neighbours see it through the stem
            x = x.repeat(len(visible) // len(x), 1, 1, 1)
            x = hide_pixels(x, ~as_boolean(visible, (len(x), all_patches[1])), grid, self.patch)
        patches = self.model.patch_embed(x)  # (B, h, w, D)
        if masked is not None:
            patches = replace_masked(patches.flatten(1, 2), masked, mask_token).unflatten(1, grid)
        sequence, rope = self.model._pos_embed(patches) if self.rotary else (self.model._pos_embed(patches), None)
        if visible is not None:
            sequence = only_visible(sequence, visible, self.num_prefix)  # (M B, prefix + n, D)
        return grid, self.model.norm_pre(sequence), self.rotations(rope, grid, visible)

    def rotations(self, rope: Tensor | None, grid: tuple[int, int], visible: Tensor | None) -> Sequence[Tensor | None]:
        """Rotary positions of what enters the blocks, for each of them: one for all, a model's own for each, or drawn for
        each where positions are rescaled at random in training (DINOv3)."""
        if rope is None:
            return [None] * self.num_blocks
        each: list[Tensor]
        if self.model.rope_mixed:
            each = list(rope)
        elif self.training and getattr(self.model.rope, "aug_active", False):
            each = [self.model.rope.get_embed(shape=list(grid)) for _ in self.blocks]
        else:
            each = [rope]
        if visible is not None:
            each = [visible_rope(rotation, visible) for rotation in each]
        return each if len(each) > 1 else each * self.num_blocks


@torch.no_grad()
def fix_positions(model: Any, name: str) -> None:
    """Sets learned positions to sines and cosines and freezes them; a class token's and registers' are 0."""
    if getattr(model, "pos_embed", None) is None:
        raise UserError(f"fixed_positions: '{name}' has no learned positions to replace. Leave it out.")
    grid = tuple(model.patch_embed.grid_size)
    positions = sincos_positions(grid, model.embed_dim)
    model.pos_embed.zero_()
    model.pos_embed[0, model.pos_embed.shape[1] - len(positions) :] = positions
    model.pos_embed.requires_grad_(False)


def as_boolean(chosen: Tensor, patches: tuple[int, int]) -> Tensor:
    """Patches of pictures, bool (B, N) or indices (B, M), as bool of shape `patches` (B, N)."""
    if chosen.dtype != torch.bool:
        none = torch.zeros(patches, dtype=torch.bool, device=chosen.device)
        return none.scatter(1, chosen, True)
    if chosen.shape != patches:
        raise UserError(f"masked is {tuple(chosen.shape)}, the pictures have {patches} patches.")
    return chosen


def replace_masked(patches: Tensor, masked: Tensor, mask_token: Tensor | None) -> Tensor:
    """Patch embeddings (B, N, D) with the masked ones, bool (B, N), set to the token."""
    if mask_token is None:
        raise UserError("`masked` was given without a `mask_token`. The method's network owns one of D values.")
    return torch.where(masked[..., None], mask_token.reshape(1, 1, -1).to(patches.dtype), patches)


def hide_pixels(x: Tensor, hidden: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Pictures (B, C, H, W) with 0, the mean of the data, in the patches that are hidden, bool (B, N)."""
    places = hidden.unflatten(1, grid).repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    return x.masked_fill(places[:, None, : x.shape[2], : x.shape[3]], 0.0)


def convolve_stem(model: Any, name: str) -> list[str]:
    """Give a ViT a stem of convolutions that overlap; the lines of Python that do the same elsewhere."""
    rows, columns = model.patch_embed.patch_size
    layers = rows.bit_length() - 1
    if rows != columns or rows != 2**layers or layers < 1:
        raise UserError(
            f"stem: conv halves the picture with each convolution, and the patches of '{name}' are {rows} x {columns} px. "
            "Use patches of 2, 4, 8, 16 or 32 px, or stem: linear."
        )
    before, width = model.patch_embed.proj.in_channels, model.embed_dim
    parts: list[nn.Module] = []
    written: list[str] = []
    for layer in range(layers):
        after = max(width // 2 ** (layers - layer), 1)
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
        written += [f"torch.nn.Conv2d({before}, {after}, 3, stride=2, padding=1, bias=False)"]
        written += [f"torch.nn.BatchNorm2d({after})", "torch.nn.GELU()"]
        before = after
    model.patch_embed.proj = nn.Sequential(*parts, nn.Conv2d(before, width, 1))
    written += [f"torch.nn.Conv2d({before}, {width}, 1)"]
    for part in model.patch_embed.proj:
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return [f"model.patch_embed.proj = torch.nn.Sequential({', '.join(written)})"]


def only_visible(sequence: Tensor, visible: Tensor, prefix: int) -> Tensor:
    """Of (B, prefix + N, D) what stands before the patches and the patches of each of M sets `visible` (M B, n), all rows
    under their first set, then under their second. -> (M B, prefix + n, D)"""
    batch, _, dim = sequence.shape
    sets = visible.unflatten(0, (len(visible) // batch, batch))  # (M, B, n)
    places = sets.transpose(0, 1).flatten(1)  # (B, M n): M copies of all patches are never made
    rest = sequence[:, prefix:].gather(1, places[..., None].expand(-1, -1, dim))
    rest = rest.unflatten(1, (len(sets), -1)).transpose(0, 1)  # (M, B, n, D)
    first = sequence[:, :prefix].expand(len(sets), -1, -1, -1)
    return torch.cat([first, rest], dim=2).flatten(0, 1)


def visible_rope(rope: Tensor, visible: Tensor) -> Tensor:
    """Rotary positions of the visible patches (B, n): of (N, d), (B, 1, n, d); of (heads, N, d), (B, heads, n, d)."""
    chosen = rope[..., visible, :]  # (B, n, d) or (heads, B, n, d)
    return chosen[:, None] if rope.ndim == 2 else chosen.transpose(0, 1)


def kept_rope(rope: Tensor, kept: Tensor) -> Tensor:
    """Rotary positions of the patches that are kept (B, n), of those of all samples or of each."""
    if rope.ndim < 4:
        return visible_rope(rope, kept)
    return rope.gather(2, kept[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))


def queries_keys_values(block: Any, sequence: Tensor, place: dict[str, Any]) -> Tensor:
    """What the attention of a block makes of its tokens (B, n, D), as it is about to multiply it: (3, B, heads, n, d).

    Computed beside the block, so that its fused attention stays as it is and a compiled block is not asked.
    """
    if any(is_sharded(parameter) for parameter in block.parameters()):
        raise UserError(
            "queries, keys and values of a network that is spread over processes cannot be tapped. Use strategy ddp."
        )
    if type(block) not in {*SUBSET, *SUBSET.values()}:
        raise UserError(
            f"{type(block).__name__} normalises or attends in another order than most, and its queries, keys and values "
            "cannot be tapped. Use another network, for instance vit_base_patch16_224."
        )
    attention: Any = block.attn
    normed = block.norm1(sequence)
    if getattr(attention, "qkv", None) is None:
        parts = [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)]
    elif getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts = list(F.linear(normed, attention.qkv.weight, bias).chunk(3, dim=-1))
    else:
        parts = list(attention.qkv(normed).chunk(3, dim=-1))
    queries, keys, values = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if place.get("rope") is not None:
        queries, keys = (rotated(part, place["rope"], attention).type_as(values) for part in (queries, keys))
    return torch.stack([queries, keys, values])


def rotated(tokens: Tensor, rope: Tensor, attention: Any) -> Tensor:
    """(B, heads, n, d) with the patches turned by their positions; what stands before them has none."""
    prefix, patches = tokens[:, :, : attention.num_prefix_tokens], tokens[:, :, attention.num_prefix_tokens :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attention.rotate_half)], dim=2)


def block_and_mlp(block: Any, sequence: Tensor, place: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A block's output, and its MLP's before layer scale, drop path, the residual sum and a norm behind it.

    What is compiled knows of no hook, so a compiled block runs as it was written.
    """
    compiled = getattr(block, "_compiled_call_impl", None) is not None
    seen: list[Tensor] = []
    hook = block.mlp.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return block(sequence, **place), seen[0]
    finally:
        hook.remove()


def attention_of(block: nn.Module, sequence: Tensor, place: dict[str, Any]) -> Tensor:
    """What each token (B, n, D) gives each other in a block that is not compiled, softmax over the last dimension.
    (B, heads, n, n)"""
    own: list[Any] = [module for module in block.modules() if hasattr(module, "fused_attn")]
    if len(own) != 1:
        raise UserError(
            f"{type(block).__name__} has {len(own)} attentions, and only that of one can be shown. Ask for pca."
        )
    seen: list[Tensor] = []
    # the fused product never holds the shares; the plain one hands them to their dropout
    fused, own[0].fused_attn = own[0].fused_attn, False
    hook = own[0].attn_drop.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        block(sequence, **place)
    finally:
        hook.remove()
        own[0].fused_attn = fused
    return seen[0]
