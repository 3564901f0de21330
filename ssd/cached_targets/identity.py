"""What stored targets are of: the teacher, what it is asked, and the views that it sees. They serve nothing else."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssd.backbones.base import Backbone
from ssd.errors import UserError
from ssd.record import describe
from ssd.step import Step
from ssd.weights.fingerprint import weights_fingerprint

VERSION = 1
"""Of the files and of what decides a stored number (normalisers, masks, how views are drawn): another one reads no others."""
UNUSED = ("weights", "drop_path_rate", "drop_path_rule", "activation_checkpointing")
"""Settings of a network that say nothing of what a teacher answers beside a hash of its weights."""


def identity_of(module: Step, data: Any) -> dict[str, Any]:
    """Plain data that is equal for equal targets, of a method as it is and data that is prepared for it."""
    teacher = module.teacher
    state = {name: value for name, value in teacher.state_dict().items() if isinstance(value, Tensor)}
    known = data.describe_state()
    names = ("mean", "std", "channels", "value_range")
    kinds = {kind: [describe(view) for view in views] for kind, views in module.views.kinds().items()}
    seen: dict[str, Any] = {"variants": data.view_variants, "seed": data.seed, **kinds}
    if module.teacher_sees_masks:
        seen["masks"] = {kind: describe(recipe) for kind, recipe in module.masking.items()}
    return {
        "version": VERSION,
        "method": type(module).__name__,
        "teacher": {
            "weights": weights_fingerprint(state),
            "networks": [network(part) for part in teacher.modules() if isinstance(part, Backbone)],
            "asked": module.asked_of_teacher(),
        },
        "views": seen,
        "data": {
            "fingerprint": data.fingerprint(),
            "samples": len(data.source),
            **{name: known[name] for name in names if name in known},
        },
    }


def network(backbone: Any) -> dict[str, Any]:
    """How a teacher's network is built."""
    record, parameters = backbone.record(), inspect.signature(type(backbone)).parameters.values()
    defaults = {each.name: describe(each.default) for each in parameters if each.default is not each.empty}
    settings = {**defaults, **record["init_args"]}  # the same whether a default was spelled out or not
    return {"class_path": record["class_path"], **{key: settings[key] for key in sorted(settings) if key not in UNUSED}}


def check_storable(module: Step, data: Any) -> None:
    """Raises UserError where what a method learns from changes, or its views do."""
    reason = module.unstorable()
    if reason is not None:
        raise UserError(f"targets of {type(module).__name__} cannot be stored: {reason}")
    if len(module.stages) > 1 and (module.step == 0 or module.stage < len(module.stages) - 1):
        raise UserError(
            f"targets of {type(module).__name__} cannot be stored in {len(module.stages)} stages, because each has another "
            "teacher. Give the method one stage, or store those of the last stage: --ckpt_path of a run that has reached it."
        )
    if not hasattr(data, "view_variants"):
        raise UserError(
            f"stored targets are of pictures and clips, and the data is {type(data).__name__}. Leave them out."
        )
    if data.view_variants is None:
        raise UserError(
            "stored targets need views that come again. Set data.view_variants to the number of looks of each sample, for "
            "instance 4: every fourth epoch then shows the same views."
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two identities say otherwise, in words."""
    theirs, ours = leaves(there), leaves(here)
    if theirs.get("version") != ours.get("version"):  # what else they say may mean something else
        theirs, ours = ({"version": found.get("version")} for found in (theirs, ours))
    return [
        f"{name} is {shown(theirs.get(name))} there and {shown(ours.get(name))} here"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name)
    ]


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> number or text, of nested plain data."""
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {name: list(value) if isinstance(value, tuple) else value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        parts = [part for part in (name, str(key)) if part and part != "init_args"]
        found |= leaves(item, ".".join(parts))
    return found


def shown(value: Any) -> str:
    text = "not said" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
