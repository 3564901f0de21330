"""`ssd export FILE --to FORMAT --out DIR`: the backbone for others, with proof."""

from pathlib import Path
from typing import Any

from ssd.record import build
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser
from ssd.verbs.loading import load_module
from ssd.views.view import WHOLE_SOUND
from ssd.weights.export import FORMATS, ExportReport, export_backbone

LOOKS = ("views", "mean", "std", "channels", "value_range")


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd export",
        description="Writes a checkpoint's backbone, loads it in a fresh process by the lines it prints, and compares.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint that ssd fit wrote")
    parser.add_argument("--to", choices=FORMATS, help="default: timm, and safetensors for what plain timm cannot build")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    report = export_checkpoint(arguments.file, arguments.out, arguments.to)
    write_json(arguments.json, vars(report))
    out = console()
    told = f"{report.folder}: largest difference after reloading {report.difference:.2g}. Load it with"
    for text in (told, report.code):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def export_checkpoint(file: str | Path, out: str | Path, to: str | None = None) -> ExportReport:
    """Exports the backbone that probes judge, without `to` as `Backbone.exported_as` says. Raises as `export_backbone`."""
    module, about = load_module(file)
    views = build(about["views"])
    card: dict[str, Any] = {
        "method": about["method"]["class_path"].rpartition(".")[2],
        "data": data_named(about["data"]),
        "data fingerprint": about["fingerprint"],
        "steps": module.step,
        "ssd version": about["version"],
    }
    backbone = module.evaluated_backbone
    return export_backbone(
        backbone,
        out,
        to or backbone.exported_as,
        lengths=views.evaluation_lengths or WHOLE_SOUND,
        mean=about.get("mean"),
        std=about.get("std"),
        crop=getattr(views, "evaluation_crop", 1.0),
        card=card,
        looks={key: about[key] for key in LOOKS if key in about},
    )


def data_named(record: dict[str, Any] | None) -> str:
    """What the model card says of the data: its class and name, not where it lay on the machine."""
    if record is None:
        return "unknown"
    path = record["init_args"].get("path")
    names = ", ".join(path) if isinstance(path, dict) else path and Path(path).name
    return " ".join(part for part in (record["class_path"].rpartition(".")[2], names) if part)
