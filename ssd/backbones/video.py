"""Vision transformers over clips: the parts of a picture transformer of timm, over tubes of pixels in place of squares."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.base import Backbone, tap_names
from ssd.backbones.drop_path import set_drop_path
from ssd.backbones.positions import flat_positions, sincos_positions
from ssd.backbones.vit import BEFORE_BLOCKS, ViT, as_boolean, block_and_mlp, replace_masked
from ssd.batch import Tokens
from ssd.errors import UserError
from ssd.weights.checkpoint import strict_load

ATTENTIONS = ("joint", "divided")
POSITIONS = ("sincos", "flat", "learned")
INFLATIONS = ("central", "mean")


class VideoViT(Backbone):
    """A vision transformer over clips (B, C, T, H, W): the widths, blocks and prefix tokens of a picture transformer of timm,
    its patches `tubelet` frames deep.

    Clips of any size: frames that `tubelet` does not divide are filled up by the last one, heights and widths that the patch
    does not divide by zeros at the right and bottom, as is said once.

    Args:
        name: timm's name of a picture transformer with learned positions, such as vit_small_patch16_224.
        tubelet: frames of a tube.
        attention: "joint": all tokens of a clip see each other. "divided": in each block a token first sees those of its
            place at other times, then those of its time (Bertasius et al. 2021, arXiv 2102.05095); what looks through time
            adds nothing at first.
        positions: "sincos": sines and cosines of time, row and column, for any grid. "flat": of the place in the sequence,
            as VideoMAE (Tong et al. 2022, arXiv 2203.12602). "learned": those of pictures, and one of each time.
        img_size, frames: side and length of the clips that learned positions are kept for; others resize them.
        prefix_per_slot: in joint attention the class token and registers weigh as if each time had its own: as in a picture
            transformer whatever the length, at the cost of a bias in each attention.
        drop_path_rate, drop_path_rule, activation_checkpointing: as of `ViT`.
        weights: as of `ViT`, of clips or of pictures, whose patches become tubes and whose answer to a clip that stands
            still is kept: exactly with divided attention, with `prefix_per_slot`, or without prefix tokens.
        inflation: how patches become tubes: "central": all weight lies on the middle frame (Arnab et al. 2021, arXiv
            2103.15691); "mean": on all frames alike.
        rgb_channels: as of `ViT`.
        arguments: further arguments of the timm model, for instance {depth: 4, embed_dim: 96}.
    """

    can = frozenset({"masked", "visible", "taps", "until"})
    of_timm: ClassVar[bool] = False
    axes: ClassVar[int] = 3

    def __init__(
        self,
        name: str = "vit_small_patch16_224",
        *,
        in_chans: int = 3,
        tubelet: int = 2,
        attention: str = "joint",
        positions: str = "sincos",
        img_size: int | Sequence[int] | None = None,
        frames: int = 16,
        prefix_per_slot: bool = False,
        drop_path_rate: float = 0.0,
        drop_path_rule: str = "linear",
        activation_checkpointing: bool = False,
        weights: str | None = None,
        inflation: str = "central",
        rgb_channels: list[int] | None = None,
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__(name, in_chans, drop_path_rate, rgb_channels)
        for setting, value, choices in (
            ("attention", attention, ATTENTIONS),
            ("positions", positions, POSITIONS),
            ("inflation", inflation, INFLATIONS),
        ):
            if value not in choices:
                raise UserError(f"{setting}: '{value}' is unknown. Choose one of {', '.join(choices)}.")
        for setting, count in {"tubelet": tubelet, "frames": frames}.items():
            if count < 1:
                raise UserError(f"{setting}: {count} is not a positive count.")
        if attention == "divided" and prefix_per_slot:
            raise UserError("prefix_per_slot: true is for joint attention; divided attention does so by itself.")
        of_clips = None if weights is None else clip_state(weights)
        picture = ViT(
            name,
            in_chans=in_chans,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            rgb_channels=rgb_channels,
            weights=None if of_clips is not None else weights,
            arguments=arguments,
        )
        if picture.rotary or picture.model.pos_embed is None:
            raise UserError(
                f"'{name}' has rotary positions or none, and a clip's are laid over a picture's learned ones. Use a name such "
                "as vit_small_patch16_224."
            )
        if weights is not None and of_clips is None and positions != "learned":
            raise UserError(
                f"weights: '{weights}' are of pictures and know places by their own positions, which positions: '{positions}' "
                "would replace. Use positions: learned."
            )
        self.tubelet = tubelet
        self.divided = attention == "divided"
        self.positions = positions
        self.prefix_per_slot = prefix_per_slot
        self.activation_checkpointing = activation_checkpointing
        self.model = VideoTransformer(picture.model, tubelet, -(-frames // tubelet), positions == "learned")
        if weights is not None and of_clips is None:
            self.model.patch_embed.inflate(picture.model.patch_embed.proj, inflation)
        if self.divided:
            for block in self.blocks:
                divide(block)
        set_drop_path(self.model.blocks, drop_path_rate, drop_path_rule)
        self.attention = self.find_attention()
        self.padding_said = False
        if of_clips is not None:
            resize_positions(of_clips, self.model)
            strict_load(self.model, of_clips, f"weights '{weights}'")

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches in a tap: the class token, then the registers."""
        return self.model.num_prefix_tokens

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a tube."""
        return self.model.patch_embed.size

    @property
    def patch_size(self) -> int | tuple[int, int]:
        _, rows, columns = self.patch
        return rows if rows == columns else (rows, columns)

    def grid(self, *lengths: int) -> tuple[int, ...]:
        if len(lengths) != 3:
            raise UserError(
                f"'{self.name}' is for clips, and was asked for its tokens on views of {lengths}. Use views of clips, such as "
                "the recipe 'clip'."
            )
        return tuple(-(-length // side) for length, side in zip(lengths, self.patch, strict=True))

    def instead(self, ability: str) -> str:
        return "Use another backbone."

    def check_input(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise UserError(
                f"'{self.name}' was built for clips of {self.in_chans} channels, (B, {self.in_chans}, T, H, W), and was given "
                f"{tuple(x.shape)}. Give it clips, and set in_chans to their channels."
            )

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
        """As `Backbone.forward`, of clips. Taps and what is answered as of `ViT.forward`.

        `visible` (M B, n) may list several sets of tubes of each clip, all clips under their first set, then under their
        second. What is not listed is not even embedded.
        """
        self.check_input(x)
        self.refuse(keep=keep)
        self.use_fitting_attention(x)
        last = self.last_block(until)
        wanted = tap_names([tap for tap in taps if tap not in BEFORE_BLOCKS], last, self.num_blocks, self.name)

        grid, sequence, place = self.embed(x, masked, mask_token, visible)
        tapped: dict[str, Tensor] = {"block0": sequence} if set(taps) & set(BEFORE_BLOCKS) else {}
        for number, block in enumerate(self.blocks[:last], 1):
            if f"block{number}.mlp" in wanted:
                sequence, tapped[f"block{number}.mlp"] = block_and_mlp(block, sequence, place)
            else:
                sequence = self.run(block, sequence, **place)
            if f"block{number}" in wanted:
                tapped[f"block{number}"] = sequence
        return replace(self.tokens_at(sequence, grid), taps=tapped)

    def tokens_at(self, tap: Tensor, grid: tuple[int, ...]) -> Tokens:
        """What stopping after the tapped block would have answered: the final norm is applied."""
        sequence = self.model.norm(tap)  # (B, prefix + N, D)
        cls, registers, prefix = self.model.cls_token, self.model.reg_token, self.num_prefix
        return Tokens(
            patches=sequence[:, prefix:],
            grid=grid,
            cls=None if cls is None else sequence[:, 0],
            registers=None if registers is None else sequence[:, prefix - registers.shape[1] : prefix],
        )

    def filled(self, x: Tensor) -> Tensor:
        """Clips whose frames, height and width tubes divide."""
        lengths = tuple(x.shape[2:])
        frames, rows, columns = (-length % side for length, side in zip(lengths, self.patch, strict=True))
        if not (frames or rows or columns):
            return x
        if not self.padding_said and not torch.compiler.is_compiling():
            self.padding_said = True
            warnings.warn(
                f"'{self.name}' fills up clips of {' x '.join(map(str, lengths))}, by their last frame and by zeros at the right "
                f"and bottom: its tubes are {' x '.join(map(str, self.patch))}. Multiples of them cost nothing.",
                stacklevel=4,
            )
        x = F.pad(x, (0, columns, 0, rows))
        return torch.cat([x, x[:, :, -1:].expand(-1, -1, frames, -1, -1)], dim=2)

    def embed(
        self, x: Tensor, masked: Tensor | None, mask_token: Tensor | None, visible: Tensor | None
    ) -> tuple[tuple[int, ...], Tensor, dict[str, Any]]:
        """The token grid, what enters the first block (M B, prefix + N or n, D), and what blocks need of its places."""
        x = self.filled(x)
        grid = self.grid(*x.shape[2:])
        tokens = math.prod(grid)
        if masked is None:
            patches = self.model.patch_embed(x, visible)  # (B, N, D) or (M B, n, D)
        else:
            patches = replace_masked(self.model.patch_embed(x, None), as_boolean(masked, (len(x), tokens)), mask_token)
            patches = patches if visible is None else gathered(patches, visible)
        positions, of_prefix = self.positions_of(grid, patches)
        patches = patches + (positions if visible is None else positions[visible])
        prefix = self.model.prefix_tokens(len(patches), of_prefix)
        sequence = self.model.norm_pre(torch.cat([*prefix, patches], dim=1))
        return grid, sequence, self.place(grid, sequence, visible)

    def positions_of(self, grid: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of patches (N, D), and of prefix tokens (1, P, D) where they have learned ones."""
        if self.positions == "learned":
            return self.model.learned_positions(grid)
        fixed = sincos_positions if self.positions == "sincos" else flat_positions
        return fixed(grid, like.shape[2]).to(like), None

    def place(self, grid: tuple[int, ...], sequence: Tensor, visible: Tensor | None) -> dict[str, Any]:
        """What each block is given beside the sequence."""
        slots, places, prefix = grid[0], math.prod(grid[1:]), self.num_prefix
        if not self.divided:
            if not (self.prefix_per_slot and prefix and slots > 1):
                return {}
            bias = sequence.new_zeros(sequence.shape[1])
            bias[:prefix] = math.log(slots)
            return {"attn_mask": bias.expand(len(sequence), 1, 1, -1)}
        if visible is None:
            return {"layout": Layout(slots, prefix)}
        time, where = visible // places, visible % places  # (B, n)
        every = torch.arange(slots, device=visible.device).repeat_interleave(prefix).expand(len(visible), -1)
        of_all = torch.cat([every, time], dim=1)  # prefix tokens, once for each time
        same_place = where[:, None, :, None] == where[:, None, None, :]
        same_time = of_all[:, None, :, None] == of_all[:, None, None, :]
        return {"layout": Layout(slots, prefix, same_place, same_time)}


@dataclass
class Layout:
    """Where the tokens of a sequence lie, for divided attention.

    Args:
        slots: times, and `prefix` the tokens before the patches.
        same_place: (B, 1, n, n) which patches lie at one place, where not all are there.
        same_time: (B, 1, slots prefix + n, slots prefix + n), with the prefix tokens repeated for each time.
    """

    slots: int
    prefix: int
    same_place: Tensor | None = None
    same_time: Tensor | None = None


class VideoTransformer(nn.Module):
    """The weights of a `VideoViT`, named as timm names those of pictures."""

    def __init__(self, picture: Any, tubelet: int, slots: int, learned: bool):
        super().__init__()
        self.patch_embed = TubeEmbed(picture.patch_embed.proj, tubelet)
        self.cls_token, self.reg_token = picture.cls_token, picture.reg_token
        self.num_prefix_tokens = picture.num_prefix_tokens
        self.embed_dim = picture.embed_dim
        self.positions_of_prefix = 0 if picture.no_embed_class else picture.num_prefix_tokens
        self.grid_size = tuple(picture.patch_embed.grid_size)
        self.pos_embed = picture.pos_embed if learned else None
        self.time_embed = nn.Parameter(torch.zeros(1, slots, self.embed_dim)) if learned else None
        self.norm_pre, self.blocks, self.norm = picture.norm_pre, picture.blocks, picture.norm

    def prefix_tokens(self, batch: int, positions: Tensor | None) -> list[Tensor]:
        """Class token and registers with their positions, [(B, P, D)] or nothing."""
        own = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not own:
            return []
        prefix = torch.cat(own, dim=1)
        prefix = prefix if positions is None else prefix + positions
        return [prefix.expand(batch, -1, -1)]

    def learned_positions(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Bicubic in space and linear in time where the grid is another: patches (N, D), prefix (1, P, D) or None."""
        slots, *places = grid
        count = self.positions_of_prefix
        space = resample_abs_pos_embed(
            self.pos_embed, new_size=places, old_size=list(self.grid_size), num_prefix_tokens=count
        )
        time = resized_time(self.time_embed, slots)
        patches = (time[0, :, None] + space[:, count:]).flatten(0, 1)
        return patches, space[:, :count] if count else None


class TubeEmbed(nn.Module):
    """Tubes of pixels to tokens: a convolution whose stride is its size, as one product over the tubes that are wanted."""

    def __init__(self, picture: Any, tubelet: int):
        super().__init__()
        self.size = (tubelet, *picture.kernel_size)
        bias = picture.bias is not None
        self.proj = nn.Conv3d(picture.in_channels, picture.out_channels, self.size, stride=self.size, bias=bias)

    @torch.no_grad()
    def inflate(self, picture: Any, rule: str) -> None:
        """Takes the weights (D, C, p, p) of a picture's patches: a tube that stands still answers what its frame did."""
        if rule == "mean":
            self.proj.weight.copy_(picture.weight[:, :, None] / self.size[0])
        else:
            self.proj.weight.zero_()
            self.proj.weight[:, :, self.size[0] // 2] = picture.weight
        if self.proj.bias is not None:
            self.proj.bias.copy_(picture.bias)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """(B, C, T, H, W) -> (B, N, D) row-major over (t, h, w), or the `visible` (M B, n) ones (M B, n, D)."""
        tubes = tubes_of(x, self.size)
        tubes = tubes if visible is None else gathered(tubes, visible)
        return F.linear(tubes, self.proj.weight.flatten(1), self.proj.bias)


def tubes_of(clips: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C t p p): tubes row-major over (t, h, w), in each the values as a convolution has them."""
    batch, channels, *lengths = clips.shape
    cut = [number for length, side in zip(lengths, size, strict=True) for number in (length // side, side)]
    return clips.reshape(batch, channels, *cut).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3).flatten(2)


def gathered(tokens: Tensor, visible: Tensor) -> Tensor:
    """Tokens (B, N, D) at the places (M B, n), M tables of the B samples one after the other. -> (M B, n, D)"""
    batch, _, dim = tokens.shape
    places = visible.unflatten(0, (-1, batch))[..., None].expand(-1, -1, -1, dim)
    return tokens.expand(len(places), -1, -1, -1).gather(2, places).flatten(0, 1)


# ---------------------------------------------------------------------- divided attention


def divide(block: Any) -> None:
    """Makes a block of timm one of divided attention, in place, with the same names for what it had."""
    if type(block) is not Block:
        raise UserError(f"attention: 'divided' does not know the block {type(block).__name__}. Use 'joint'.")
    attention: Any = copy.deepcopy(block.attn)
    nn.init.zeros_(attention.proj.weight)
    nn.init.zeros_(attention.proj.bias)
    block.time_norm, block.time_attn = copy.deepcopy(block.norm1), attention
    block.__class__ = DividedBlock


class DividedBlock(Block):
    """Attention through time at each place, then through space at each time, then the MLP. Bertasius et al. 2021, section 3.

    Prefix tokens do not look through time; through space they look from each time by itself, and take the mean.
    """

    time_norm: nn.Module
    time_attn: nn.Module

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        prefix, patches = x[:, : layout.prefix], x[:, layout.prefix :]
        patches = patches + self.drop_path1(self.through_time(self.time_norm(patches), layout))
        x = torch.cat([prefix, patches], dim=1)
        x = x + self.drop_path1(self.ls1(self.through_space(self.norm1(x), layout)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def through_time(self, patches: Tensor, layout: Layout) -> Tensor:
        if layout.same_place is not None:
            return self.time_attn(patches, attn_mask=layout.same_place)
        batch = len(patches)
        by_place = patches.unflatten(1, (layout.slots, -1)).transpose(1, 2).flatten(0, 1)  # (B h w, t, D)
        return self.time_attn(by_place).unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)

    def through_space(self, x: Tensor, layout: Layout) -> Tensor:
        batch, prefix = len(x), layout.prefix
        before, patches = x[:, :prefix], x[:, prefix:]
        if layout.same_time is not None:
            whole = torch.cat([before.repeat(1, layout.slots, 1), patches], dim=1)
            seen = self.attn(whole, attn_mask=layout.same_time)
            of_prefix, of_patches = seen.split([layout.slots * prefix, patches.shape[1]], dim=1)
            return torch.cat([of_prefix.unflatten(1, (layout.slots, prefix)).mean(1), of_patches], dim=1)
        by_time = patches.unflatten(1, (layout.slots, -1))  # (B, t, h w, D)
        whole = torch.cat([before[:, None].expand(-1, layout.slots, -1, -1), by_time], dim=2)
        seen = self.attn(whole.flatten(0, 1)).unflatten(0, (batch, layout.slots))
        return torch.cat([seen[:, :, :prefix].mean(1), seen[:, :, prefix:].flatten(1, 2)], dim=1)


# ---------------------------------------------------------------------- weights


def clip_state(weights: str) -> dict[str, Tensor] | None:
    """The state of a network over clips, None where the weights are those of pictures."""
    from ssd.weights.load import read_weights

    if weights == "timm" or (weights.startswith("timm:") and not Path(weights).exists()):
        return None
    state = read_weights(weights)
    embedding = state.get("patch_embed.proj.weight")
    return dict(state) if embedding is not None and embedding.ndim == 5 else None


def resized_time(positions: Any, slots: int) -> Tensor:
    """(1, t, D) -> (1, slots, D), linear."""
    return positions if positions.shape[1] == slots else F.interpolate(positions.mT, slots, mode="linear").mT


def resize_positions(state: dict[str, Tensor], model: VideoTransformer) -> None:
    """To the grid of the model, in place: in time linear, in space bicubic from a square."""
    for name in ("time_embed", "pos_embed"):
        theirs, ours = state.get(name), getattr(model, name)
        if theirs is None or ours is None or theirs.shape == ours.shape or theirs.shape[2] != ours.shape[2]:
            continue
        if name == "time_embed":
            state[name] = resized_time(theirs, ours.shape[1])
            continue
        count = model.positions_of_prefix
        side = math.isqrt(theirs.shape[1] - count)
        if side**2 == theirs.shape[1] - count:
            sizes = {"new_size": list(model.grid_size), "old_size": [side, side]}
            state[name] = resample_abs_pos_embed(theirs, num_prefix_tokens=count, **sizes)
