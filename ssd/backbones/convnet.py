"""Networks of timm that answer a map of features: ResNet, ConvNeXt, Swin and their like."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ssd.backbones.base import Backbone, create, say_padding, tap_names
from ssd.backbones.fused import fuse
from ssd.batch import Tokens
from ssd.errors import UserError


class ConvNet(Backbone):
    """A convolutional or hierarchical network of timm by name.

    `patches` is the last map of features, row-major; `summary` is the network's own pooling, with the
    norm of its own head. (A few networks, MobileNetV3 for one, widen while they pool: there `embed_dim`
    is the width of the summary, and patches are narrower.) Taps are the maps of stages, (B, C, h, w).

    Args:
        name: timm's name, for instance resnet50, convnext_tiny, swin_tiny_patch4_window7_224.
        small_stem: for ResNets on small pictures: a 3x3 stem of stride 1 and no max-pool, which divides
            the stride by 4. Plain timm has no such stem, so it exports as safetensors only.
        img_size: for networks with windows, such as Swin: the side their windows are laid out for.
            Other inputs work.
        drop_path_rate: share of samples whose residual branch is skipped in the last block.
        weights: start from "timm", "timm:TAG", an exported folder, a weights file or a checkpoint.
        rgb_channels: which channels are red, green and blue, counted from 0, where `weights` are of an RGB network and
            the pictures have more channels; null = the first three.
        arguments: further arguments of the timm model: {layers: [1, 1, 1, 1], channels: [32, 64, 128, 256]}
            of a resnet18, {depths: ..., dims: ..., patch_size: 2} of a ConvNeXt.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        in_chans: int = 3,
        small_stem: bool = False,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        weights: str | None = None,
        rgb_channels: list[int] | None = None,
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__(name, in_chans, drop_path_rate, rgb_channels)
        kwargs: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
        if img_size is not None:
            kwargs["img_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
        if name.startswith(("swin_", "swinv2_")):
            kwargs["strict_img_size"] = False
        # passed only where it is asked for: some families do not take it; Swin's own default is 0.1
        drop_path = {"drop_path_rate": drop_path_rate} if drop_path_rate or name.startswith("swin") else {}
        model = create(name, {**kwargs, **drop_path}, arguments)
        if hasattr(model, "num_prefix_tokens"):
            raise UserError(f"'{name}' answers a sequence of tokens, not a map of features. Use ViT with name: {name}.")
        self.edits: list[str] = []
        if small_stem:
            self.edits = shrink_stem(model, name, in_chans)
        fuse(model)
        self.model = model
        if model.pretrained_cfg.get("fixed_input_size"):
            # spelled out, because windows are laid out for it: what the name implies is lost in an exported folder
            kwargs.setdefault("img_size", tuple(model.pretrained_cfg["input_size"][-2:]))
        self.kwargs = {**kwargs, **(arguments or {})}
        stages = [model.get_submodule(info["module"]) for info in model.feature_info]
        self.stages = tuple(stage for stage in stages if any(True for _ in stage.parameters()))
        self.can = frozenset({"taps"}) if hasattr(model, "forward_intermediates") else frozenset()
        self.attention = self.find_attention()
        self.padding_said = False
        self.start_from(weights)

    @property
    def embed_dim(self) -> int:
        return self.model.head_hidden_size

    @property
    def patch_dim(self) -> int:
        return self.model.num_features

    def block_dim(self, number: int) -> int:
        return self.model.feature_info[len(self.model.feature_info) - self.num_blocks + number - 1]["num_chs"]

    @property
    def patch_size(self) -> int:
        return self.model.feature_info[-1]["reduction"] // (4 if self.edits else 1)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.stages

    def grid(self, *lengths: int) -> tuple[int, ...]:
        height, width = lengths
        if height % self.patch_size == 0 and width % self.patch_size == 0:
            return height // self.patch_size, width // self.patch_size
        # networks round each in their own way: a copy without memory answers
        shell = copy.deepcopy(self.model).to("meta").eval()
        with torch.no_grad():
            features = shell.forward_features(self.padded(torch.empty(1, self.in_chans, height, width, device="meta")))
        rows, columns = self.channels_last(features).shape[1:3]
        return rows, columns

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
        asked = {"masked": masked, "visible": visible, "taps": taps or None, "until": until, "keep": keep or None}
        self.require(*(ability for ability, value in asked.items() if value is not None), by="this forward")
        self.check_input(x)
        self.use_fitting_attention(x)
        # convolutions follow their input's layout, and are faster so; weights stay as they are for sharding
        x = in_channels_last(self.padded(x))
        if taps:
            wanted = tap_names(taps, self.num_blocks, self.num_blocks, self.name)
            features, maps = self.tapped(x, wanted)
        else:
            features, maps = self.model.forward_features(x), {}
        last = self.channels_last(features)  # (B, h, w, D)
        return Tokens(
            patches=last.flatten(1, 2),
            grid=(last.shape[1], last.shape[2]),
            summary=self.model.forward_head(features, pre_logits=True),
            taps=maps,
        )

    def padded(self, x: Tensor) -> Tensor:
        """Zeros at the right and bottom, for networks that cut the picture into patches first."""
        rows, columns = getattr(getattr(self.model, "patch_embed", None), "patch_size", (1, 1))
        height, width = x.shape[-2:]
        if height % rows == 0 and width % columns == 0:
            return x
        if not self.padding_said and not torch.compiler.is_compiling():
            self.padding_said = True
            say_padding(self.name, (height, width), (rows, columns))
        return F.pad(x, (0, -width % columns, 0, -height % rows))

    def tapped(self, x: Tensor, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The last features in the model's own layout, and the named stages' maps (B, C, h, w)."""
        if any("." in name for name in names):
            raise UserError(f"taps {names}: '{self.name}' has stages, without one MLP or attention each. Use numbers.")
        numbers = sorted({int(name.removeprefix("block")) for name in names})
        before = len(self.model.feature_info) - self.num_blocks  # a stem counts in timm's numbering
        features, maps = self.model.forward_intermediates(x, indices=[before + number - 1 for number in numbers])
        return features, {f"block{number}": taken for number, taken in zip(numbers, maps, strict=True)}

    def channels_last(self, features: Tensor) -> Tensor:
        if features.ndim != 4:
            shape = tuple(features.shape)
            raise UserError(f"'{self.name}' answers features of shape {shape}, not a map. Use another network.")
        return features if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)

    def instead(self, ability: str) -> str:
        if ability == "until":
            return "Use taps, which answer the map of a stage, or a ViT."
        return super().instead(ability)


def shrink_stem(model: Any, name: str, in_chans: int) -> list[str]:
    """Give a ResNet the 3x3, stride 1, poolless stem; the lines of Python that do the same elsewhere."""
    fits = isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d)
    if not fits:
        raise UserError(
            f"small_stem is for ResNets whose stem is one convolution, not for '{name}'. "
            "Use resnet18, resnet34 or resnet50, or a ConvNeXt with arguments: {patch_size: 2}."
        )
    width = model.conv1.out_channels
    model.conv1 = nn.Conv2d(in_chans, width, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return [
        f"model.conv1 = torch.nn.Conv2d({in_chans}, {width}, 3, stride=1, padding=1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]


def in_channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) laid out with channels last. A single channel is in both orders, and is taken for the other one unless its
    strides say so."""
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    _, _, height, width = x.shape
    return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))
