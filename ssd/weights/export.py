"""Writing a backbone for others, and proving that what was written is what they will load."""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssd.errors import UserError

if TYPE_CHECKING:
    from ssd.backbones.base import Backbone

FORMATS = ("timm", "safetensors")
TOLERANCE = 1e-4

ALONE = """
import sys
assert not any(name.split(".")[0] == "ssd" for name in sys.modules), "the lines above import ssd"
"""
READ = """
import sys
import torch
from safetensors.torch import load_file as read, save_file as write
given, answers = sys.argv[1:]
model.eval()
x = read(given)["inputs"]
with torch.inference_mode():
"""
CHECK = (
    ALONE
    + READ
    + """
    write({"pooled": model(x).contiguous(), "features": model.forward_features(x).contiguous()}, answers)
"""
)
CHECK_OWN = (
    READ
    + """
    tokens = model(x)
    write({"pooled": tokens.pooled().contiguous(), "features": tokens.patches.contiguous()}, answers)
"""
)
"""Of a network that is this library's own: what is loaded is its adapter."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the network it was written from.

    Args:
        folder: where it lies.
        to: "timm" or "safetensors".
        lines: the Python that gives `model`, the very lines that the check ran.
        difference: the largest difference of features and pooled features, float32 on the CPU, between the
            network and what a fresh process loaded; a share of the largest feature where that is above 1,
            because the last bit of a float is.
        tolerance: what the difference may be.
    """

    folder: str
    to: str
    lines: tuple[str, ...]
    difference: float
    tolerance: float

    @property
    def code(self) -> str:
        return "\n".join(self.lines)


def export_backbone(
    backbone: "Backbone",
    out: str | Path,
    to: str = "timm",
    *,
    lengths: Sequence[int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float = 0.875,
    card: Mapping[str, Any] | None = None,
    looks: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write `backbone` into the folder `out`, load it in a fresh process by the lines that are reported,
    and compare.

    Args:
        to: "timm": a folder for `timm.create_model("local-dir:DIR", pretrained=True)`. "safetensors": the
            weights and the lines that rebuild the network around them, with this library where the network is its own.
        lengths: of the inputs of evaluation, as `Views.evaluation_lengths` has them.
        mean, std: of each channel, in [0, 1] units, that inputs were normalised by; None for sounds.
        crop: share of the resized picture's side that evaluation keeps.
        card: facts for the model card, such as method, data and numbers; plain data.
        looks: of a network of this library, how samples are made for it: what a checkpoint says of it.

    Raises UserError for what cannot be exported so, RuntimeError where what was loaded differs by more than
    1e-4.
    """
    out = Path(out)
    about = backbone.describe_timm() if backbone.of_timm else own_network(backbone)
    check_request(backbone, about, out, to, mean, std)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "export.json"):
        (out / name).unlink(missing_ok=True)

    network = copy.deepcopy(backbone).cpu().eval()
    state = {key: value.detach().contiguous().clone() for key, value in network.model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = None
    if to == "timm":
        assert mean is not None and std is not None, "networks of timm are for pictures"
        config = timm_config(network, about, mean, std, lengths[-1], crop)
    elif not backbone.of_timm:
        config = {"ssd": {"backbone": backbone.record(), **(looks or {})}}
    if config is not None:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines = timm_lines(out) if to == "timm" else safetensors_lines(about, out)

    inputs = backbone.example(lengths, torch.Generator().manual_seed(0))
    check = CHECK if backbone.of_timm else CHECK_OWN
    difference = compare(answers_here(network.float(), inputs), answers_elsewhere(lines, inputs, check))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"what a fresh process loaded from {out} differs by {difference:.3g} from the network that was written, "
            f"more than {TOLERANCE:g}. The export is not to be trusted."
        )
    report = ExportReport(str(out), to, tuple(lines), difference, TOLERANCE)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    (out / "export.json").write_text(json.dumps(asdict(report) | versions, indent=2) + "\n")
    (out / "README.md").write_text(model_card(about, report, mean, std, lengths, card or {}))
    return report


def own_network(backbone: "Backbone") -> dict[str, Any]:
    """What `describe_timm` says, of a network that timm has not: the record that this library builds it from."""
    return {"name": backbone.name, "kwargs": backbone.record()["init_args"], "record": backbone.record(), "edits": []}


def check_request(
    backbone: "Backbone",
    about: dict[str, Any],
    out: Path,
    to: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    if to not in FORMATS:
        raise UserError(f"cannot export to '{to}'. Choose one of {', '.join(FORMATS)}.")
    if to == "timm" and not backbone.of_timm:
        raise UserError(
            f"'{about['name']}' is a network of this library, and plain timm has none like it. Export to safetensors, which "
            "comes with the lines that rebuild it."
        )
    if to == "timm" and about["edits"]:
        lines = [edit.partition("\n")[0] for edit in about["edits"]]
        changes = "; ".join(line for line in lines if not line.startswith(("import ", "from ")))
        raise UserError(
            f"'{about['name']}' was changed in a way that timm has no setting for ({changes}), so "
            "plain timm cannot load it. Export to safetensors, which comes with the lines that rebuild it."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Give a folder to export to.")
    if mean is not None and std is not None and (len(mean) != backbone.in_chans or len(std) != backbone.in_chans):
        raise UserError(
            f"mean has {len(mean)} and std {len(std)} values, '{about['name']}' takes {backbone.in_chans} channels."
        )
    try:
        json.dumps(about["kwargs"])
    except TypeError as error:
        raise UserError(f"arguments of '{about['name']}' cannot be written down ({error}). Use plain data.") from None


def timm_config(
    backbone: "Backbone", about: dict[str, Any], mean: Sequence[float], std: Sequence[float], size: int, crop: float
) -> dict[str, Any]:
    """What timm reads from config.json: how to build the model, and how its inputs are made."""
    source = backbone.model.pretrained_cfg
    return {
        "architecture": about["name"],
        "num_classes": 0,
        "num_features": backbone.model.num_features,
        "model_args": about["kwargs"],
        "pretrained_cfg": {
            "input_size": [backbone.in_chans, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop,
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
            "num_classes": 0,
            "first_conv": source.get("first_conv"),
            "classifier": source.get("classifier"),
            "custom_load": False,
        },
    }


def timm_lines(out: Path) -> list[str]:
    return ["import timm", f"model = timm.create_model({quoted(f'local-dir:{out.as_posix()}')}, pretrained=True)"]


def safetensors_lines(about: dict[str, Any], out: Path) -> list[str]:
    file = quoted((out / "model.safetensors").as_posix())
    if "record" in about:
        return [
            "from safetensors.torch import load_file",
            "from ssd.record import build",
            f"model = build({about['record']!r})",
            f"model.model.load_state_dict(load_file({file}))",
        ]
    kwargs = "".join(f", {key}={value!r}" for key, value in about["kwargs"].items())
    return [
        "import timm",
        *(["import torch"] if about["edits"] else []),
        "from safetensors.torch import load_file",
        f"model = timm.create_model({quoted(about['name'])}{kwargs})",
        *about["edits"],
        f"model.load_state_dict(load_file({file}))",
    ]


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@torch.inference_mode()
def answers_here(backbone: "Backbone", inputs: Tensor) -> dict[str, Tensor]:
    tokens = backbone(inputs)
    features = backbone.model.forward_features(inputs) if backbone.of_timm else tokens.patches
    return {"pooled": tokens.pooled(), "features": features}


def answers_elsewhere(lines: Sequence[str], inputs: Tensor, check: str = CHECK) -> dict[str, Tensor]:
    """What a fresh Python gets from `model` after `lines`; by `CHECK` one that never imports ssd."""
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder, "inputs.safetensors"), Path(folder, "answers.safetensors")
        save_file({"inputs": inputs}, given)
        script = "\n".join(lines) + check
        # -P: nothing in the current folder can stand in for timm or torch
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, str(given), str(taken)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"a fresh process could not load the export:\n{done.stderr[-2000:]}")
        return load_file(taken)


def compare(here: dict[str, Tensor], elsewhere: dict[str, Tensor]) -> float:
    shares = [(here[name] - elsewhere[name]).abs().max() / here[name].abs().max().clamp_min(1) for name in here]
    return float(torch.stack(shares).max())  # torch's maximum keeps NaN, Python's may not


def model_card(
    about: dict[str, Any],
    report: ExportReport,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    lengths: Sequence[int],
    card: Mapping[str, Any],
) -> str:
    own = "record" in about
    facts = {"architecture": about["name"] if own else f"{about['name']} of timm", "arguments": about["kwargs"]}
    if mean is not None and std is not None:
        shape = " x ".join(map(str, (len(mean), *lengths)))
        facts |= {"input": f"{shape}, values in [0, 1] less mean, over std", "mean": list(mean), "std": list(std)}
    else:
        facts |= {"input": f"{' x '.join(map(str, lengths))} samples"}
    facts |= card
    loaded = (
        "`model(x)` answers tokens: `model(x).pooled()` is the one vector of each sample, `.patches` what it is pooled from."
        if own
        else "`model(x)` is the pooled vector, `model.forward_features(x)` what it is pooled from."
    )
    what = (
        "A backbone pretrained without labels by self-supervised distillation. It answers features, and has no\n"
        f"classifier; {loaded}"
    )
    return card_text("image-feature-extraction", about["name"], what, report, facts)


def card_text(task: str, name: str, what: str, report: ExportReport, facts: Mapping[str, Any]) -> str:
    """A README of an exported folder: what it is, the lines that load it, its facts, and how the lines were proved."""

    def row(name: str, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return f"| {name} | {' '.join(text.split()).replace('|', chr(92) + '|')} |"

    return "\n".join(
        [
            "---",
            "library_name: timm",
            f"tags: [{task}, timm, self-supervised]",
            "---",
            f"# {name}",
            "",
            what,
            "",
            "```python",
            report.code,
            "```",
            "",
            "| | |",
            "|---|---|",
            *(row(name, value) for name, value in facts.items()),
            "",
            "These lines were run in a fresh process and compared with the network that was written: the largest",
            f"difference on a fixed random input is {report.difference:.2g} (`export.json`).",
            "",
        ]
    )
