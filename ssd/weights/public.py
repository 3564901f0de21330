"""Files of weights as DINO, iBOT, DINOv2, DINOv3, data2vec 2.0, MoCo v3 and CAPI publish them, turned into timm's names, or
our network's own.

Training files hold `student` and `teacher`, each with a backbone and heads; releases hold a backbone alone,
flat or under `state_dict`. data2vec 2.0 publishes its student with the average of it inside.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd.errors import UserError
from ssd.weights.checkpoint import shortened

# learned inputs of masked training, which no backbone uses
MASK_TOKENS = ("mask_token", "masked_embed")
TRAINING_ONLY = ("local_cls_norm.",)
PREDICTOR = "predictor."
HEADS = ("head", "dino_head", "ibot_head")
AVERAGE = "_ema"
PICTURES = "modality_encoders.IMAGE."  # of data2vec 2.0, which also knows sound and text
MOCO = {"teacher": "momentum_encoder.", "student": "base_encoder."}


@dataclass(frozen=True)
class PublicWeights:
    """One network of a public file.

    Args:
        backbone: keys as published, without prefixes.
        heads: "head", "dino_head" or "ibot_head" -> its state with `weight_g` (K, 1) and `weight_v`
            (K, d) for the weight-normed layer, whichever way the file spells it; "projector" of MoCo v3 -> its layers.
    """

    backbone: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]


def read_public(contents: Any, network: str = "teacher", where: str = "the file") -> PublicWeights:
    """The weights of `network` ("teacher" or "student") in what a public file holds; a file of one network
    has no choice. Raises UserError where there are no weights."""
    state = find_state(contents, network, where)
    state = {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in state.items()}
    if any(key.startswith(tuple(MOCO.values())) for key in state):
        return read_moco(state, network, where)
    if not any(key.startswith("backbone.") for key in state):
        return PublicWeights(state, {})
    backbone: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part in HEADS:
            heads.setdefault(part, {})[rest] = value
        else:
            backbone[rest if part == "backbone" else key] = value
    return PublicWeights(backbone, {name: classic_weight_norm(head) for name, head in heads.items()})


def read_moco(state: Mapping[str, Tensor], network: str, where: str) -> PublicWeights:
    """One encoder of a file of MoCo v3, whose projector stands in the classifier's place, as `fc` or `head`."""
    if network not in MOCO:
        raise UserError(f"{where} has no network '{network}'. Name one after the file: #{', #'.join(MOCO)}.")
    backbone: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(MOCO[network]):
            key = key.removeprefix(MOCO[network])
            layer = re.match(r"(?:fc|head)\.(\d+\..*)", key)
            if layer:
                projector[layer[1]] = value
            else:
                backbone[key] = value
    return PublicWeights(backbone, {"projector": projector})


def find_state(contents: Any, network: str, where: str) -> Mapping[str, Tensor]:
    if not isinstance(contents, Mapping):
        raise UserError(f"{where} holds a {type(contents).__name__}, expected a dictionary of weights.")
    networks = [name for name in ("teacher", "student") if isinstance(contents.get(name), Mapping)]
    if network in networks:
        return contents[network]
    if networks:
        raise UserError(f"{where} has no network '{network}'. Name one after the file: #{', #'.join(networks)}.")
    for name in ("state_dict", "model"):
        if isinstance(contents.get(name), Mapping):
            return student_or_average(contents[name], network, where)
    if not contents or not all(isinstance(value, Tensor) for value in contents.values()):
        raise UserError(f"{where} holds no weights that are known here, but the keys {shortened(contents)}.")
    return contents


def student_or_average(state: Mapping[str, Any], network: str, where: str) -> Mapping[str, Tensor]:
    """One of both where a student's weights hold an average of themselves, in single precision and by the same names."""
    if not isinstance(state.get(AVERAGE), Mapping):
        return state
    if network == "teacher":
        return state[AVERAGE]
    if network != "student":
        raise UserError(f"{where} has no network '{network}'. Name one after the file: #teacher, #student.")
    return {key: value for key, value in state.items() if key != AVERAGE}


def classic_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parametrizations.weight.original0` and `original1`, torch's modern spelling, as `weight_g` and `weight_v`."""
    spelling = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    classic: dict[str, Tensor] = {}
    for key, value in state.items():
        for modern, name in spelling.items():
            key = key.replace(modern, name)
        classic[key] = value
    return classic


def timm_state(public: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """A published backbone under timm's names for `model`, and the keys that no backbone uses.

    Keys that are timm's already stay; what is neither is left for the caller to refuse.
    """
    if any(key.startswith(PICTURES) for key in public):
        return timm_state_of_data2vec(public, model)
    if any(".residual1." in key for key in public):
        public = rotary_state_of_capi(public, model)
    predictor = () if any(key.startswith(PREDICTOR) for key in model.state_dict()) else (PREDICTOR,)
    left_out = [key for key in public if key in MASK_TOKENS or key.startswith((*TRAINING_ONLY, *predictor))]
    public = {key: value for key, value in public.items() if key not in left_out}
    if "storage_tokens" in public or any(key.endswith(".attn.qkv.bias_mask") for key in public):
        return timm_state_of_dinov3(public, model), left_out
    state: dict[str, Tensor] = {}
    for key, value in public.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # blocks in chunks keep their own number
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        state[key] = value
    if "register_tokens" in state and "pos_embed" in state:
        place_registers(state, model)
    return state, left_out


def timm_state_of_dinov3(public: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """DINOv3's names: rotary periods are computed by timm, and of the biases of query, key and value those of keys are
    masked away. Where `model` has no such biases, zeros are no loss and others are left to be refused."""
    own = model.state_dict()
    names = {"storage_tokens": "reg_token", ".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
    names |= {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}
    state: dict[str, Tensor] = {}
    for key, value in public.items():
        if key == "rope_embed.periods" or key.endswith(".attn.qkv.bias_mask"):
            continue
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        if key.endswith(".attn.qkv.bias"):
            attention = key.removesuffix("qkv.bias")
            query, _, content = value.chunk(3)
            if f"{attention}q_bias" in own:
                state |= {f"{attention}q_bias": query, f"{attention}v_bias": content}
                continue
            if not query.any() and not content.any():
                continue
        state[key] = value
    return state


def timm_state_of_data2vec(public: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """data2vec 2.0's names, and the keys of its decoder. Blocks may stand in two places, of which those of the picture
    encoder come first; positions are of patches alone, so that other tokens get zeros where `model` gives them some.

    Raises UserError where `model` does not normalise behind its embedding.
    """
    if "norm_pre.weight" not in model.state_dict():
        raise UserError(
            "weights of data2vec 2.0 are of a network that normalises behind each sum. Use ViT with post_norm: true."
        )
    own = {key.removeprefix(PICTURES): value for key, value in public.items() if key.startswith(PICTURES)}
    first = {int(key.split(".")[2]) for key in own if key.startswith("context_encoder.blocks.")}
    names = {"extra_tokens": "cls_token", "fixed_positional_encoder.positions": "pos_embed"}
    names |= {f"local_encoder.proj.{kind}": f"patch_embed.proj.{kind}" for kind in ("weight", "bias")}
    names |= {f"context_encoder.norm.{kind}": f"norm_pre.{kind}" for kind in ("weight", "bias")}
    state: dict[str, Tensor] = {}
    left_out = []
    for key, value in own.items():
        if key.startswith("decoder."):
            left_out.append(f"{PICTURES}{key}")
        elif key.startswith("context_encoder.blocks."):
            state[key.removeprefix("context_encoder.")] = value
        else:
            state[names.get(key, f"{PICTURES}{key}")] = value
    for key, value in public.items():
        if not key.startswith(PICTURES):
            state[re.sub(r"^blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + len(first)}", key)] = value
    if "pos_embed" in state and not getattr(model, "no_embed_class", False):
        beside = state["pos_embed"].new_zeros(1, model.num_prefix_tokens, state["pos_embed"].shape[2])
        state["pos_embed"] = torch.cat([beside, state["pos_embed"]], dim=1)
    return state, left_out


def rotary_state_of_capi(public: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """CAPI's names under those of a `RotaryTransformer`. Every attention has frequencies there, which are all one.

    Raises UserError for a network that turns positions in another way than the published code.
    """
    if not all(block.attn.mixed_axes for block in getattr(model, "blocks", ()) if hasattr(block.attn, "mixed_axes")):
        raise UserError(
            "these weights were trained by the published code of CAPI, whose rotations mix rows and columns. Build the network "
            "with mixed_axes: true."
        )
    names = {
        "residual1.norm.": "norm1.",
        "residual1.fn.": "attn.",
        "residual2.norm.": "norm2.",
        "residual2.fn.": "mlp.",
    }
    state: dict[str, Tensor] = {}
    for key, value in public.items():
        key = re.sub(r"^encoder\.", "", key)
        key = re.sub(r"^(decoder\.|(?=mask_token$))", PREDICTOR, key)
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        if key.endswith(".attn.rope.freqs"):
            # one that differs from the first keeps its name, and is refused
            same = torch.equal(value, state.setdefault("rope.freqs", value))
            key = "rope.freqs" if same else key
        state[key] = value
    return state


def place_registers(state: dict[str, Tensor], model: Any) -> None:
    """DINOv2 gives the class token a position and registers none. timm's models either give none to both,
    so that the class token takes its position in, or one to each, so that registers get zeros."""
    state["reg_token"] = state.pop("register_tokens")
    cls_position, positions = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    if getattr(model, "no_embed_class", False):
        state["cls_token"] = state["cls_token"] + cls_position
        state["pos_embed"] = positions
    else:
        state["pos_embed"] = torch.cat([cls_position, torch.zeros_like(state["reg_token"]), positions], dim=1)
