"""Which vector of a network a probe may use: its answers by name, all from one pass.

A network is asked for parts (class tokens and mean patches of its last blocks, its own pooling); an output is one
part or several side by side. Parts are told apart by their place from the end: `cls-1` is the last block's. A network with
a predictor of hidden places has one more: the mean of what the predictor's first block says of all places from all
patches (Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling", 2025, section 4).
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from ssd.backbones.base import Backbone
from ssd.batch import Tokens
from ssd.errors import UserError

LAST = 4
"""Blocks, from the end, that are looked at: Oquab et al., "DINOv2", 2023, appendix B.3, takes 1 and 4."""


def parts_of(backbone: Backbone, samples: Tensor) -> dict[str, Tensor]:
    """Parts (B, D) by name, from one pass over the samples, of whatever kind they are."""
    earlier = range(max(1, backbone.num_blocks - LAST + 1), backbone.num_blocks) if "taps" in backbone.can else ()
    tokens = backbone(samples, taps=tuple(earlier))
    parts = {}
    if tokens.cls is None and tokens.summary is not None:
        parts["summary"] = tokens.summary
    before = [backbone.tokens_at(tokens.taps[f"block{number}"], tokens.grid) for number in reversed(earlier)]
    for place, each in enumerate([tokens, *before], start=1):
        if each.cls is not None:
            parts[f"cls-{place}"] = each.cls
        if place == 1 or tokens.cls is None:
            parts[f"mean-{place}"] = mean_patch(each, tokens.valid)
    if "predict" in backbone.can:
        parts["predicted"] = backbone.predict(tokens, until=1).mean(1)
    return parts


def output_of(backbone: Backbone, samples: Tensor, name: str) -> Tensor:
    """One output (B, D) by its name, "pooled" for what the network pools by itself, or "patches" (B, N, D).

    Raises UserError for a name that the network has no output of, listing those it has.
    """
    if name == "patches":
        return backbone(samples).patches
    if name == "pooled":
        return backbone(samples).pooled()
    parts = parts_of(backbone, samples)
    outputs = outputs_of(parts)
    if name not in outputs:
        choices = ", ".join(dict.fromkeys(["pooled", *outputs, "patches"]))
        raise UserError(f"'{backbone.name}' has no output '{name}'. Choose one of {choices}.")
    return torch.cat([parts[part] for part in outputs[name]], dim=1)


def mean_patch(tokens: Tokens, valid: Tensor | None) -> Tensor:
    """(B, D), of the patches that are no padding where the answer says which."""
    valid = valid if valid is not None and valid.shape[1] == tokens.patches.shape[1] else None
    return dataclasses.replace(tokens, cls=None, summary=None, valid=valid).pooled()


def outputs_of(parts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Outputs by name -> the parts that they are made of, the network's own `pooled()` first."""
    names = set(parts)
    depth = sum(name.startswith("cls-" if "cls-1" in names else "mean-") for name in names)
    if "cls-1" in names:
        outputs: dict[str, tuple[str, ...]] = {
            "cls": ("cls-1",),
            "mean_patch": ("mean-1",),
            "cls+mean_patch": ("cls-1", "mean-1"),
        }
        if depth > 1:
            last = last_blocks("cls", depth)
            outputs |= {f"last{depth}_cls": last, f"last{depth}_cls+mean_patch": (*last, "mean-1")}
        return outputs
    word = "stages" if "summary" in names else "mean_patch"
    outputs = {"pooled": ("summary",)} if "summary" in names else {"mean_patch": ("mean-1",)}
    counts = [count for count in (2, LAST) if count <= depth] if "summary" in names else [depth] if depth > 1 else []
    outputs |= {f"last{count}_{word}": last_blocks("mean", count) for count in counts}
    return outputs | ({"predicted": ("predicted",)} if "predicted" in names else {})


def last_blocks(part: str, count: int) -> tuple[str, ...]:
    return tuple(f"{part}-{place}" for place in range(count, 0, -1))
