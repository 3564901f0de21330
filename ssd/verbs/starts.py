"""Where a comparison or a fine-tuning begins: learned weights by name, or the same network with random ones."""

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from ssd.backbones.base import Backbone
from ssd.errors import UserError
from ssd.record import build, import_class
from ssd.verbs.networks import adapter, load_network, looks
from ssd.weights.checkpoint import strict_load
from ssd.weights.fingerprint import weights_fingerprint

RANDOM = "random"
NETWORK = (
    "checkpoint that ssd fit wrote, exported folder, timm:NAME.TAG, or random:NETWORK = the same with random weights"
)


@dataclass(frozen=True)
class Start:
    """A network that can be built as often as is asked for.

    Args:
        name: as it was typed.
        about: how it looks at pictures and which data it knows, as `load_network` gives it.
        record: how its backbone is built.
        weights: of its model; None = random ones.
    """

    name: str
    about: dict[str, Any]
    record: dict[str, Any]
    weights: dict[str, Tensor] | None

    def backbone(self, seed: int = 0, drop_path: float = 0.0) -> Backbone:
        """Random weights follow from the seed. Raises UserError where the network takes no drop path."""
        settings = dict(self.record["init_args"])
        if "drop_path_rate" in inspect.signature(import_class(self.record["class_path"])).parameters:
            settings["drop_path_rate"] = drop_path
        elif drop_path:
            raise UserError(f"--drop-path is {drop_path:g}, and {self.name} has no blocks that it skips. Leave it out.")
        record = self.record | {"init_args": settings}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            backbone = build(record)
        if self.weights is not None:
            strict_load(backbone.model, self.weights, self.name)
        return backbone.eval()

    def fingerprint(self) -> str:
        """Of the network and its weights."""
        about = json.dumps(self.record, sort_keys=True) + weights_fingerprint(self.weights or {})
        return hashlib.sha256(about.encode()).hexdigest()

    def untrained(self, name: str | None = None) -> "Start":
        """The same network with random weights."""
        return Start(name or f"{RANDOM}:{self.name}", self.about, self.record, None)


def load_start(name: str) -> Start:
    """What `NETWORK` says. Raises UserError for anything else."""
    bare = name.removeprefix(f"{RANDOM}:")
    if bare == RANDOM and not Path(bare).exists():
        raise UserError(
            f"'{RANDOM}' does not say of which network. Give {RANDOM}:NETWORK, for instance {RANDOM}:timm:resnet50 or "
            f"{RANDOM}:runs/NAME/checkpoints/last.ckpt."
        )
    if bare != name and bare.startswith("timm:"):
        return published_untrained(bare.removeprefix("timm:"), name)
    backbone, about = load_network(bare)
    start = Start(bare, about, backbone.record(), backbone.model.state_dict())
    return start if bare == name else start.untrained(name)


def published_untrained(model: str, name: str) -> Start:
    """A network that timm knows, without fetching its weights."""
    bare = model.partition(".")[0]
    if not timm.is_model(bare):
        raise UserError(f"timm has no model named '{bare}'. timm.list_models() lists all.")
    backbone = adapter(bare, {}, None)
    cfg = timm.models.get_pretrained_cfg(model)
    return Start(name, looks(backbone.model.pretrained_cfg if cfg is None else cfg.to_dict()), backbone.record(), None)
