"""Writing a fine-tuned network, backbone and head, as one model of timm, and proving that it is what others will load."""

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
    TOLERANCE,
    ExportReport,
    answers_elsewhere,
    card_text,
    check_request,
    compare,
    safetensors_lines,
    timm_config,
    timm_lines,
)


def export_classifier(
    network: Classifier,
    out: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    input_size: int,
    crop: float,
    classes: Sequence[str] | None,
    card: Mapping[str, Any],
) -> ExportReport:
    """Writes `network` into the folder `out`, loads it in a fresh process by the lines that are reported, and compares.

    As a folder for `timm.create_model("local-dir:DIR", pretrained=True)`, whose answers are logits, in the order of
    `classes`; a network that timm has no setting for as weights and the lines that rebuild it. The other arguments are
    those of `export_backbone`. Raises UserError for what cannot be exported, RuntimeError where what was loaded differs
    by more than 1e-4.
    """
    out = Path(out)
    backbone = network.backbone
    about = backbone.describe_timm()
    num_classes = network.head.out_features
    about = about | {"kwargs": about["kwargs"] | {"num_classes": num_classes}}
    to = backbone.exported_as
    check_request(backbone, about, out, to, mean, std)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "export.json"):
        (out / name).unlink(missing_ok=True)

    model = with_classifier(network)
    state = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if to == "timm":
        config = timm_config(backbone, about, mean, std, input_size, crop)
        config["num_classes"] = config["pretrained_cfg"]["num_classes"] = num_classes
        if classes is not None:
            config["pretrained_cfg"]["label_names"] = list(classes)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines = timm_lines(out) if to == "timm" else safetensors_lines(about, out)

    pictures = torch.randn(2, backbone.in_chans, input_size, input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own = copy.deepcopy(network).cpu().float().eval()
        here = {"pooled": own(pictures), "features": own.backbone.model.forward_features(pictures)}
    difference = compare(here, answers_elsewhere(lines, pictures))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"what a fresh process loaded from {out} differs by {difference:.3g} from the network that was written, "
            f"more than {TOLERANCE:g}. The export is not to be trusted."
        )
    report = ExportReport(str(out), to, tuple(lines), difference, TOLERANCE)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    facts = dict(card) | ({} if classes is None else {"classes": list(classes)})
    (out / "export.json").write_text(json.dumps(asdict(report) | versions | facts, indent=2) + "\n")
    rows = {"architecture": f"{about['name']} of timm", "classes": num_classes, **facts}
    what = f"A classifier of {num_classes} classes, fine-tuned on labels. `model(x)` gives logits."
    (out / "README.md").write_text(card_text("image-classification", about["name"], what, report, rows))
    return report


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
