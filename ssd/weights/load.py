"""Starting a backbone from weights: timm's, an exported folder, a file, or one of our checkpoints."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ssd.errors import UserError
from ssd.weights.checkpoint import backbone_state, is_checkpoint, read_file, strict_load
from ssd.weights.public import read_public, timm_state

if TYPE_CHECKING:
    from ssd.backbones.base import Backbone

# settings of timm that decide what comes after the tokens, which published weights have in their own way
POOLING = ("num_classes", "global_pool", "fc_norm", "use_fc_norm")


def load_backbone_weights(backbone: "Backbone", weights: str) -> None:
    """Load what `weights` names, with every key accounted for.

    "timm" or "timm:TAG" (from the hub), an exported folder, a .safetensors or .pth file in timm's or a
    public layout, or a checkpoint: of its teacher, or of its student where no teacher is like it (MAE); `FILE#student` names
    one. Learned positions of another grid are resized bicubically, and an input layer for red, green and blue becomes one for
    `backbone.in_chans` channels (`inflate_input`); that and what no backbone uses (a mask token, a
    classifier) is said. Anything else unknown, missing or mis-shaped is a UserError that lists it.
    """
    if weights == "timm" or weights.startswith("timm:"):
        state: Mapping[str, Tensor] = published_by_timm(backbone, weights.partition(":")[2])
    else:
        state = read_weights(weights)
    state, left_out = timm_state(state, backbone.model)
    left_out += drop_classifier(state, backbone.model)
    if left_out:
        warnings.warn(f"{weights}: not used by a backbone: {', '.join(left_out)}.", stacklevel=2)
    inflate_input(state, backbone.model, backbone.in_chans, backbone.rgb_channels, weights)
    resize_positions(state, backbone.model, weights)
    strict_load(backbone.model, state, f"weights '{weights}'")


def read_weights(weights: str) -> Mapping[str, Tensor]:
    """The weights in a folder or file, without prefixes; keys may still be a public layout's."""
    path, network = Path(weights), None
    if not path.exists() and "#" in weights:
        name, _, network = weights.rpartition("#")
        path = Path(name)
    if path.is_dir():
        path = exported_file(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    contents = read_file(path)
    if is_checkpoint(contents):
        return backbone_state(contents, network, str(path))
    return read_public(contents, network or "teacher", str(path)).backbone


def exported_file(folder: Path) -> Path:
    """The weights in a folder that `ssd export` or timm wrote."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} is not an exported folder: it has no model.safetensors. "
        "`ssd export CHECKPOINT --to timm --out DIR` writes one; a checkpoint is given by its file."
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no file {path}. Give the path of an exported folder or a file of weights.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}). Copy or export it again.") from None


def published_by_timm(backbone: "Backbone", tag: str) -> dict[str, Tensor]:
    """The weights that timm publishes for the backbone's name, as loaded strictly into timm's own model."""
    about = backbone.describe_timm()
    name = about["name"]
    known = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    if not known or (tag and tag not in known):
        choices = f"Choose one of {', '.join(known)}." if known else "Choose another name, or train from the start."
        raise UserError(f"timm publishes no weights{f' with tag {tag!r}' if tag else ''} for '{name}'. {choices}")
    # as published, for three channels: timm's own rule for others keeps no output
    kwargs = {key: value for key, value in about["kwargs"].items() if key not in (*POOLING, "in_chans")}
    try:
        model = timm.create_model(f"{name}.{tag}" if tag else name, pretrained=True, **kwargs)
    except RuntimeError as error:
        raise UserError(f"timm's weights '{tag or known[0]}' do not fit '{name}' as it was built: {error}") from None
    except Exception as error:  # each transport that the hub may use has its own kind
        raise UserError(
            f"timm's weights for '{name}' could not be fetched ({type(error).__name__}: {error}). They need the "
            "network once; without it, copy the weights file over and give its path, or leave `weights` out."
        ) from None
    return model.state_dict()


def drop_classifier(state: dict[str, Tensor], model: Any) -> list[str]:
    """Take the classifier of a supervised network out of `state`; its keys."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    named = (named,) if isinstance(named, str) else named
    keys = [f"{name}.{kind}" for name in named for kind in ("weight", "bias")]
    return [key for key in keys if key not in model.state_dict() and state.pop(key, None) is not None]


def inflate_input(
    state: dict[str, Tensor], model: Any, in_chans: int, rgb_channels: Sequence[int] | None, weights: str
) -> None:
    """Make an input layer for red, green and blue, (D, 3, h, w), one for other channels, (D, in_chans, h, w), in place.

    With three channels or more, those named by `rgb_channels` (red, green, blue; None = the first three) take the layer's
    weights and the others start at zero: the answer is that of the RGB network, whatever the others hold, and
    training finds out what they are worth. With one or two, each takes the sum of the three over their number: a grey
    picture is answered as the RGB network answers it repeated. Repeating weights over N channels and dividing by
    their number, as timm does, would keep neither.
    """
    named = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    for name in (named,) if isinstance(named, str) else named:
        key = f"{name}.weight"
        theirs, ours = state.get(key), model.state_dict().get(key)
        if theirs is None or ours is None or theirs.ndim != 4 or theirs.shape[2:] != ours.shape[2:]:
            continue
        if theirs.shape[0] != ours.shape[0] or theirs.shape[1] != 3 or ours.shape[1] != in_chans:
            continue
        if in_chans < 3:
            state[key] = theirs.sum(1, keepdim=True).expand(-1, in_chans, -1, -1) / in_chans
            warnings.warn(f"{weights}: {name} sums its red, green and blue over {in_chans} channels.", stacklevel=3)
            continue
        places = list(rgb_channels or (0, 1, 2))
        if in_chans == 3 and places == [0, 1, 2]:
            continue
        state[key] = theirs.new_zeros(ours.shape)
        state[key][:, places] = theirs
        said = f"{weights}: {name} reads red, green and blue from channels {', '.join(map(str, places))} of {in_chans}"
        warnings.warn(f"{said}; the others start at zero." if in_chans > 3 else f"{said}.", stacklevel=3)


def resize_positions(state: dict[str, Tensor], model: Any, weights: str) -> None:
    """Bicubic, from a square grid, in place; a shape that is not one of positions is left to be refused."""
    theirs, ours = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if theirs is None or ours is None or theirs.shape == ours.shape or theirs.shape[-1] != ours.shape[-1]:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = math.isqrt(max(theirs.shape[1] - prefix, 0))
    if side == 0 or side**2 != theirs.shape[1] - prefix:
        return
    grid = tuple(model.patch_embed.grid_size)
    state["pos_embed"] = resample_abs_pos_embed(theirs, list(grid), [side, side], num_prefix_tokens=prefix)
    warnings.warn(f"{weights}: positions resized from {side} x {side} to {grid[0]} x {grid[1]} patches.", stacklevel=3)
