"""Writing a fine-tuned network, backbone and head, as one model, and proving that it is what others will load."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from ssd.errors import UserError
from ssd.evaluation.finetune import Classifier
from ssd.weights.export import (
    CHECK,
    READ,
    TOLERANCE,
    ExportReport,
    answers_elsewhere,
    card_text,
    check_request,
    compare,
    own_network,
    quoted,
    safetensors_lines,
    timm_config,
    timm_lines,
)

CHECK_CLASSIFIER = (
    READ
    + """
    write({"pooled": model(x).contiguous(), "features": model.backbone(x).patches.contiguous()}, answers)
"""
)
"""Of a network that is this library's own, with its head."""


def export_classifier(
    network: Classifier,
    out: str | Path,
    *,
    lengths: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    crop: float,
    classes: Sequence[str] | None,
    card: Mapping[str, Any],
    looks: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes `network` into the folder `out`, loads it in a fresh process by the lines that are reported, and compares.

    As a folder for `timm.create_model("local-dir:DIR", pretrained=True)`, whose answers are logits, in the order of
    `classes`; a network that timm has no setting for as weights and the lines that rebuild it, with this library where the
    network is its own. The other arguments are those of `export_backbone`. Raises UserError for what cannot be exported,
    RuntimeError where what was loaded differs by more than 1e-4.
    """
    out = Path(out)
    backbone = network.backbone
    own = not backbone.of_timm
    about = own_network(backbone) if own else backbone.describe_timm()
    num_classes = network.head.out_features
    if not own:
        about = about | {"kwargs": about["kwargs"] | {"num_classes": num_classes}}
    to = backbone.exported_as
    check_request(backbone, about, out, to, mean, std)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "export.json"):
        (out / name).unlink(missing_ok=True)

    network = copy.deepcopy(network).cpu().float().eval()
    write_state(backbone.model if own else with_classifier(network), out / "model.safetensors")
    config: dict[str, Any] | None = None
    if own:
        write_state(network.head, out / "head.safetensors")
        config = {"ssd": {"backbone": backbone.record(), **(looks or {})}}
    elif to == "timm":
        assert mean is not None and std is not None, "networks of timm are for pictures"
        config = timm_config(backbone, about, mean, std, lengths[-1], crop)
        config["num_classes"] = config["pretrained_cfg"]["num_classes"] = num_classes
        if classes is not None:
            config["pretrained_cfg"]["label_names"] = list(classes)
    if config is not None:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines = timm_lines(out) if to == "timm" else safetensors_lines(about, out)
    lines = classifier_lines(about["record"], num_classes, out) if own else lines

    inputs = backbone.example(lengths, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = network.backbone(inputs).patches if own else network.backbone.model.forward_features(inputs)
        here = {"pooled": network(inputs), "features": features}
    difference = compare(here, answers_elsewhere(lines, inputs, CHECK_CLASSIFIER if own else CHECK))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"what a fresh process loaded from {out} differs by {difference:.3g} from the network that was written, "
            f"more than {TOLERANCE:g}. The export is not to be trusted."
        )
    report = ExportReport(str(out), to, tuple(lines), difference, TOLERANCE)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    facts = dict(card) | ({} if classes is None else {"classes": list(classes)})
    (out / "export.json").write_text(json.dumps(asdict(report) | versions | facts, indent=2) + "\n")
    architecture = about["name"] if own else f"{about['name']} of timm"
    rows = {"architecture": architecture, "classes": num_classes, **facts}
    what = f"A classifier of {num_classes} classes, fine-tuned on labels. `model(x)` gives logits."
    task = f"{'image' if mean is not None else 'audio'}-classification"
    (out / "README.md").write_text(card_text(task, about["name"], what, report, rows))
    return report


def write_state(model: Any, file: Path) -> None:
    state = {key: value.detach().cpu().float().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, file, metadata={"format": "pt"})


def classifier_lines(record: dict[str, Any], num_classes: int, out: Path) -> list[str]:
    """What rebuilds a network of this library with its head."""
    body, head = (quoted((out / f"{name}.safetensors").as_posix()) for name in ("model", "head"))
    return [
        "from safetensors.torch import load_file",
        "from ssd.evaluation.finetune import Classifier",
        "from ssd.record import build",
        f"model = Classifier(build({record!r}), {num_classes})",
        f"model.backbone.model.load_state_dict(load_file({body}))",
        f"model.head.load_state_dict(load_file({head}))",
    ]


def with_classifier(network: Classifier) -> Any:
    """timm's own model with the head as its classifier, float32 on the CPU."""
    model = copy.deepcopy(network.backbone.model).cpu().float().eval()
    model.reset_classifier(network.head.out_features)
    layer = model.get_classifier()
    if getattr(layer, "weight", None) is None or layer.weight.shape != network.head.weight.shape:
        raise UserError(
            f"'{network.backbone.name}' has no place for a linear layer on its pooled features, so that plain timm cannot "
            "hold the fine-tuned network. Use another network, or leave --out away."
        )
    layer.load_state_dict(network.head.state_dict())
    return model
