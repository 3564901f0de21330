"""A network to look at data with: of a checkpoint, of an exported folder, or one that timm publishes."""

import json
from pathlib import Path
from typing import Any

import timm

from ssd.backbones.base import Backbone
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import FAMILIES, ViT
from ssd.errors import UserError
from ssd.record import build, describe
from ssd.verbs.loading import load_module
from ssd.views.recipes import PlainViews


def load_network(name: str) -> tuple[Backbone, dict[str, Any]]:
    """The backbone in evaluation mode, and how it looks at pictures: `views`, `channels`, `mean`, `std`, `value_range`
    and `data` (None where it knows no data), as a checkpoint has them.

    `name` is a checkpoint that ssd fit wrote, a folder that `ssd export` wrote (for timm, or of a network of this library),
    or "timm:NAME" or "timm:NAME.TAG". Raises UserError for anything else.
    """
    if name.startswith("timm:"):
        return published(name.removeprefix("timm:"))
    if Path(name).is_dir():
        return exported(Path(name))
    module, about = load_module(name)
    return module.evaluated_backbone.eval(), about


def exported(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        if "ssd" in config:
            return own_network(folder, config["ssd"])
        name, kwargs, inputs = config["architecture"], dict(config["model_args"]), config["pretrained_cfg"]
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no config.json. Give a folder that `ssd export` wrote, a checkpoint, or timm:NAME."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not what `ssd export` writes. Export the checkpoint again.") from None
    return adapter(name, kwargs, str(folder)), looks(inputs)


def own_network(folder: Path, about: dict[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """A network that timm has not, rebuilt by its record."""
    backbone = build(about["backbone"])
    backbone.start_from(str(folder))
    return backbone.eval(), {"value_range": "type", "data": None} | about


def published(name: str) -> tuple[Backbone, dict[str, Any]]:
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        raise UserError(
            f"timm has no model named '{bare}'. timm.list_models(pretrained=True) lists those with weights."
        )
    backbone = adapter(bare, {}, f"timm:{tag}" if tag else "timm")
    cfg = timm.models.get_pretrained_cfg(name)
    return backbone, looks(cfg.to_dict() if cfg is not None else backbone.model.pretrained_cfg)


def adapter(name: str, kwargs: dict[str, Any], weights: str | None) -> Backbone:
    """ViT or ConvNet, whichever reads the network of that name."""
    own = {key: kwargs.pop(key) for key in ("in_chans", "img_size") if key in kwargs}
    for key in ("num_classes", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"):
        kwargs.pop(key, None)
    if timm.is_model(name) and timm.models.is_model_in_modules(name, FAMILIES):
        for key in ("global_pool", "fc_norm", "use_fc_norm"):
            kwargs.pop(key, None)
        return ViT(name, **own, weights=weights, arguments=kwargs or None).eval()
    return ConvNet(name, **own, weights=weights, arguments=kwargs or None).eval()


def looks(inputs: dict[str, Any]) -> dict[str, Any]:
    """How pictures are made for a network, from what timm says of its inputs."""
    channels, size, _ = inputs["input_size"]
    crop = inputs.get("crop_pct") or 0.875
    return {
        "views": describe(PlainViews(size=size, evaluation_size=size, evaluation_crop=crop)),
        "channels": channels,
        "mean": list(inputs["mean"]),
        "std": list(inputs["std"]),
        "value_range": "type",
        "data": None,
    }
