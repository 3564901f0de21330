"""What every backbone answers, and the few things that all adapters over timm share."""

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from timm.layers import DropPath
from timm.layers.drop import DropBlock2d
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssd.batch import Tokens
from ssd.errors import UserError
from ssd.frames import Frames
from ssd.record import Recorded

ABILITIES = {
    "masked": "replace patches by a mask token",
    "visible": "encode only the visible patches",
    "taps": "return intermediate outputs",
    "until": "stop after a block",
    "predict": "predict hidden places from visible patches",
    "keep": "go on with fewer patches between blocks",
}


class Attention(NamedTuple):
    """Where the last block looks.

    Args:
        shares: (B, heads, N) of the attention of one query, what falls on each patch; other tokens get the rest of 1.
        grid: (h, w) of the patches.
        query: whose attention it is, in words.
    """

    shares: Tensor
    grid: tuple[int, int]
    query: str


class Backbone(Recorded, nn.Module):
    """A network from pictures (B, C, H, W) to `Tokens`, thin over a timm model.

    The timm model is `self.model` and holds all the weights, so `self.model.state_dict()` is one that
    plain timm loads. Nothing else of a method (mask token, head) lives here.

    Attributes:
        can: which of `ABILITIES` it has. Asking `forward` for another is a UserError.
        embed_dim: D, the width of `Tokens.pooled()`.
        patch_size: pixels from one patch to the next; the total stride of a convnet. (rows, columns)
            where the two differ.
        num_blocks: how many blocks (stages of a convnet) `taps` and `until` count, from 1.
    """

    can: frozenset[str] = frozenset()
    of_timm: ClassVar[bool] = True
    """Whether `model` is timm's own; else what is exported is rebuilt by this library."""
    frames: Frames | None = None
    """Of a network over sound, how many tokens a sound gives over time."""
    axes: ClassVar[int] = 2
    """Of the inputs that tokens are laid over: 2 of pictures, 3 of clips with time first, 1 of sounds."""
    model: Any
    attention: tuple[Any, ...]
    started_from: str | None = None
    """The weights it was given when it was built."""

    def __init__(self, name: str, in_chans: int, drop_path_rate: float, rgb_channels: Sequence[int] | None = None):
        super().__init__()
        if in_chans < 1:
            raise UserError(f"in_chans is {in_chans}, a picture has at least 1 channel.")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"drop_path_rate is {drop_path_rate}, expected a share of at least 0 and below 1.")
        if rgb_channels is not None:
            check_rgb_channels(rgb_channels, in_chans)
        self.rgb_channels = rgb_channels
        self.name = name
        self.in_chans = in_chans
        self.drop_path_rate = drop_path_rate

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
        """Pictures (B, C, H, W), normalised -> tokens.

        Args:
            masked: patches whose embedding becomes `mask_token` before positions are added: bool (B, N)
                or indices (B, M).
            mask_token: D values, for instance a parameter of shape (1, D).
            visible: indices (B, n) of the only patches that pass the blocks, sorted; (M B, n) for M sets of each picture, all
                pictures under their first set, then under their second: M B rows, and pictures are embedded once.
            taps: numbers of the blocks whose output is wanted, as `tokens.taps["block3"]` for 3 and what enters the
                first as 0 (of a ViT), and names such as "block3.mlp" for what a ViT's MLP adds, before scale and residual,
                and "block3.qkv" for the queries, keys and values of its attention, (3, B, heads, n, d).
            until: number of the last block to run, 1 to `num_blocks`.
            keep: number of a block, or 0 for what enters the first -> how many patches go on behind it, those that repeat
                others dropped (`ssd.backbones.redundancy`). The answer's `kept` says which. Other tokens all go on.
        """
        raise NotImplementedError

    def predict(
        self, tokens: Tokens, visible: Tensor | None = None, predicted: Tensor | None = None, until: int | None = None
    ) -> Tensor:
        """Of networks that can "predict": what is said of places (B, P, predictor_dim) from tokens that were answered.

        Args:
            visible: indices (B, n) of the patches that `tokens` are of; None = all.
            predicted: indices (B, P) of the places that are asked for; None = all.
            until: number of the predictor's last block to run.
        """
        raise NotImplementedError

    def tokens_at(self, tap: Tensor, grid: tuple[int, ...]) -> Tokens:
        """What was tapped of a whole block, in the form that `forward` answers: a map (B, C, ...), or patches (B, N, D) on
        the answer's grid."""
        if tap.ndim == 3:
            return Tokens(patches=tap, grid=grid)
        return Tokens(patches=tap.flatten(2).mT, grid=tuple(tap.shape[2:]))

    @property
    def embed_dim(self) -> int:
        raise NotImplementedError

    def block_dim(self, number: int) -> int:
        """Width of what is tapped of the block of this number, from 1."""
        return self.patch_dim

    @property
    def patch_dim(self) -> int:
        """Width of `Tokens.patches`."""
        return self.embed_dim

    @property
    def predictor_dim(self) -> int:
        """Width of what `predict` answers."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int | tuple[int, int]:
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts in order, for compile, checkpointing and layer decay."""
        raise NotImplementedError

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def depths(self) -> dict[str, int]:
        """Name of each parameter -> 0 before the blocks, the number of its block, num_blocks + 1 behind them."""
        numbers = {id(p): number for number, block in enumerate(self.blocks, 1) for p in block.parameters()}
        depths, behind = {}, False
        for name, parameter in self.named_parameters():
            number = numbers.get(id(parameter))
            behind = behind or number is not None
            depths[name] = number if number is not None else self.num_blocks + 1 if behind else 0
        return depths

    def grid(self, *lengths: int) -> tuple[int, ...]:
        """Tokens along each axis of an input of these lengths: (height, width) of a picture in px, with the frames before
        them for a clip, the samples of a sound."""
        raise NotImplementedError

    def example(self, lengths: Sequence[int], generator: torch.Generator) -> Tensor:
        """Two random inputs of these lengths, as `grid` takes them."""
        return torch.randn(2, self.in_chans, *lengths, generator=generator)

    def attention_map(self, x: Tensor) -> Attention:
        """Where each head of the last block looks in pictures (B, C, H, W). Raises UserError where there is no such thing."""
        raise UserError(
            f"{type(self).__name__} '{self.name}' has no attention over all its patches, so there is none to show. Its "
            "features can be shown: ask for pca."
        )

    def describe_timm(self) -> dict[str, Any]:
        """`name` and `kwargs` with which `timm.create_model` builds this model without its training-only
        settings, and `edits`, the lines of Python that then change `model` where timm has no setting."""
        raise NotImplementedError

    @property
    def exported_as(self) -> str:
        """The format of `ssd export` that is nearest to what others load: "timm" where timm's own arguments build it."""
        return "timm" if self.of_timm and not self.describe_timm()["edits"] else "safetensors"

    def require(self, *abilities: str, by: str) -> None:
        """Raise UserError unless the backbone has the abilities that the method named `by` needs."""
        for ability in abilities:
            if ability not in self.can:
                raise UserError(
                    f"{by} needs a backbone that can {ABILITIES[ability]} ('{ability}'), "
                    f"which {type(self).__name__} '{self.name}' cannot. {self.instead(ability)}"
                )

    def last_block(self, until: int | None) -> int:
        """The number of the last block to run. Raises UserError where there is none of that number."""
        if until is not None and not 1 <= until <= self.num_blocks:
            raise UserError(f"until is {until}, expected a block of '{self.name}': 1 to {self.num_blocks}.")
        return self.num_blocks if until is None else until

    def run(self, block: nn.Module, *inputs: Any, **place: Any) -> Tensor:
        """A block's output, kept for the backward pass or, where the backbone saves memory, computed again there."""
        if getattr(self, "activation_checkpointing", False) and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, **place)
        return block(*inputs, **place)

    def refuse(self, **asked: Any) -> None:
        """Raise UserError for the first ability of which something is asked that is not None or empty."""
        ability = next((name for name, value in asked.items() if value is not None and value != {}), None)
        if ability is not None:
            raise UserError(f"'{self.name}' cannot {ABILITIES[ability]}. {self.instead(ability)}")

    def instead(self, ability: str) -> str:
        return "Use a ViT, for instance ViT with name: vit_small_patch16_224."

    def record(self) -> dict[str, Any]:
        """Without `weights`: whoever rebuilds from a record loads the state that was saved beside it."""
        record = super().record()
        record["init_args"].pop("weights", None)
        return record

    def check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UserError(
                f"'{self.name}' was built for pictures of {self.in_chans} channels, (B, {self.in_chans}, H, W), "
                f"and was given {tuple(x.shape)}. Set in_chans to the channels of the data."
            )

    def start_from(self, weights: str | None) -> None:
        self.started_from = weights
        if weights is not None:
            from ssd.weights.load import load_backbone_weights

            load_backbone_weights(self, weights)

    def use_fitting_attention(self, x: Tensor) -> None:
        """Fused attention, except in bfloat16 on the CPU, where its backward pass is slower than all
        the rest of the network together and plain matrix products are not."""
        half = x.dtype == torch.bfloat16
        if torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu") == torch.bfloat16
        fused = not (x.device.type == "cpu" and half)
        for module in self.attention:
            # only on a change: an assignment in every forward would be a side effect of a compiled graph
            if module.fused_attn != fused:
                module.fused_attn = fused

    def find_attention(self) -> tuple[nn.Module, ...]:
        return tuple(module for module in self.model.modules() if hasattr(module, "fused_attn"))


def check_rgb_channels(channels: Sequence[int], in_chans: int) -> None:
    places = list(channels)
    if len(places) != 3 or len(set(places)) != 3 or not all(0 <= place < in_chans for place in places):
        raise UserError(
            f"rgb_channels is {places} for pictures of {in_chans} channels. Give the places of red, green and blue, three "
            f"different numbers from 0 to {in_chans - 1}."
        )


def tap_names(taps: Iterable[int | str], last: int, num_blocks: int, name: str) -> list[str]:
    """Taps as names, "block3" for 3. Raises UserError for a block that does not run."""
    names = [tap if isinstance(tap, str) else f"block{tap}" for tap in taps]
    for tap in names:
        number = tap.removeprefix("block").removesuffix(".mlp").removesuffix(".qkv")
        if not tap.startswith("block") or not number.isdigit() or not 1 <= int(number) <= last:
            stopped = f" and stops after block {last}" if last < num_blocks else ""
            raise UserError(
                f"tap '{tap}' is not an output of '{name}', which has blocks 1 to {num_blocks}{stopped}. "
                "Use a number, or a name such as block3, block3.mlp or block3.qkv."
            )
    return names


def create(name: str, kwargs: dict[str, Any], arguments: dict[str, Any] | None) -> Any:
    """The timm model, with random weights. Raises UserError for an unknown name or argument."""
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        nearest = difflib.get_close_matches(bare, timm.list_models(), n=5, cutoff=0.4)
        hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
        raise UserError(f"timm has no model named '{bare}'.{hint} timm.list_models() lists all.")
    if tag:
        raise UserError(f"name '{name}' has a tag, which names weights. Use name: {bare} and weights: timm:{tag}.")
    own = sorted(set(arguments or {}) & {"in_chans", "img_size", "drop_path_rate", "num_classes", "pretrained"})
    if own:
        raise UserError(f"arguments of '{name}' contain {', '.join(own)}, which the backbone sets or takes by name.")
    try:
        return timm.create_model(name, **kwargs, **(arguments or {}))
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        given = f" with arguments {dict(arguments)}" if arguments else ""
        raise UserError(f"timm could not build '{name}'{given}: {error}") from None


def set_drop_path_zero(module: nn.Module) -> None:
    """Switch off every random drop (path, unit, block, token) and every random move of positions inside `module`: what a
    teacher's copy needs to be the same function in train mode."""
    part: Any
    for part in module.modules():
        if isinstance(part, DropPath | DropBlock2d):
            part.drop_prob = 0.0
        elif isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, PatchDropout | PatchDropoutWithIndices):
            part.prob = 0.0
        if getattr(part, "aug_active", False):
            part.aug_active = False
        # timm's ResNet drops units by a rate that is a plain attribute
        if isinstance(getattr(part, "drop_rate", None), float):
            part.drop_rate = 0.0


def say_padding(name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    warnings.warn(
        f"'{name}' pads pictures of {size[0]} x {size[1]} px with zeros at the right and bottom: "
        f"its patches are {patch[0]} x {patch[1]} px. A multiple of the patch size costs no padding.",
        stacklevel=3,
    )
