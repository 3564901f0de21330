"""`ssd quickstart`: from nothing to a pretrained backbone and an honest number, on the bundled digits, or on sounds or clips."""

import csv
import json
import shutil
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ssd.callbacks.throughput import counted
from ssd.cli import run_lightning
from ssd.data.moving_shapes import write_moving_shapes
from ssd.data.tones import write_tones
from ssd.errors import UserError
from ssd.evaluation.suite import report_table
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser, config_file, read_config
from ssd.verbs.export import data_named, export_checkpoint
from ssd.verbs.loading import load_data, load_module
from ssd.verbs.probe import compare_with_baselines, features_of

COLUMNS = ("knn", "linear", "linear_1pct", "linear_10pct")
MADE = {"Sound": ("sounds", "tones", write_tones), "Clips": ("clips", "clips of moving shapes", write_moving_shapes)}
"""Class of data -> what it is called, and what is made where a config names none: what that is, and what writes it."""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd quickstart",
        description="Pretrains a small convnet on scikit-learn's digits without labels, compares it with raw pixels and "
        "the untrained network on held-out digits, draws the curve and exports the backbone. About three minutes on two "
        "CPU cores. --config quickstart-speech does so with sounds and --config quickstart-video with clips: those of --data "
        "FOLDER, or tones and moving shapes that it makes.",
        epilog="--data takes other data than the config's, and --data.KEY VALUE its settings, as in ssd fit.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, views and drawn labels")
    parser.add_argument("--out", default="runs/quickstart", help="folder of the run, replaced if it is there")
    parser.add_argument(
        "--config", default="quickstart", help="of the run: quickstart (default), quickstart-speech or quickstart-video"
    )
    parser.add_argument("--draws", type=int, default=20, help="draws of the labelled set")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too; they are in OUT/summary.json")
    arguments, chosen = parser.parse_known_args(argv)
    strange = [word for word in chosen if word.startswith("-") and word.partition("=")[0].partition(".")[0] != "--data"]
    if strange:
        raise UserError(f"{strange[0]} is not an option of ssd quickstart. ssd quickstart --help lists them.")
    check_json(arguments.json)
    out = Path(arguments.out)
    if out.exists() and not (out / "config.yaml").exists():
        raise UserError(f"--out {out} exists and is not the folder of an earlier run. Give another folder.")
    shutil.rmtree(out, ignore_errors=True)
    out_console = console()
    lacking = lacking_data(arguments.config)
    if lacking is not None and not any(word.partition("=")[0] in ("--data", "--data.path") for word in chosen):
        asked, made, write = MADE[lacking]
        folder = write(out / "made", seed=arguments.seed)
        chosen = ["--data.path", str(folder), *chosen]
        told = f"No {asked} were given (--data FOLDER), so these are {made} that were made for it, in {folder}."
        out_console.print(told, markup=False, highlight=False, soft_wrap=True)

    started = time.monotonic()
    status = run_lightning(
        "fit",
        [
            "--config",
            arguments.config,
            "--seed_everything",
            str(arguments.seed),
            "--trainer.default_root_dir",
            str(out),
            *chosen,
        ],
    )
    seconds = time.monotonic() - started
    if status:
        return status
    checkpoint = out / "checkpoints" / "last.ckpt"
    module, about = load_module(checkpoint)
    if module.step < module.total_steps:
        raise UserError(
            f"the run was stopped at step {module.step} of {module.total_steps}. Go on with ssd fit --ckpt_path {checkpoint}."
        )
    data = load_data([], about, "quickstart")
    bank, queries = features_of(module.evaluated_backbone, data, ["knn"], "pretrained", device="cpu")
    report = compare_with_baselines(about, data, bank, queries, arguments.draws, arguments.seed, device="cpu")
    export = export_checkpoint(checkpoint, out / "export")
    curve = draw_curve(out)
    of_fit = json.loads((out / "summary.json").read_text())
    images = module.step * data.batch_size
    summary = {
        **{row: {column: numbers[column].value for column in COLUMNS} for row, numbers in report.items()},
        "spread": {
            row: {column: numbers[column].spread for column in ("linear_1pct", "linear_10pct")}
            for row, numbers in report.items()
        },
        "protocols": {column: report["pretrained"][column].protocol for column in COLUMNS},
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        "seed": arguments.seed,
        "data": data_named(data.record()),
        "export": export.folder,
        "curve": str(curve),
        "findings": of_fit["findings"],
    }
    write_json(out / "summary.json", summary)
    write_json(arguments.json, summary)
    columns = ("linear_1pct", "linear_10pct", "linear", "knn")
    table = {row: {column: numbers[column] for column in columns} for row, numbers in report.items()}
    out_console.print(
        report_table(table, title=f"held-out {data.sample_word}s of {type(data).__name__}, frozen features, %")
    )
    out_console.print(f"{seconds:.0f} s of training, {images / seconds:,.0f} {counted(data)}/s, curve in {curve}")
    out_console.print(f"ssd report {out} makes a page of it", markup=False, highlight=False, soft_wrap=True)
    out_console.print(
        f"The backbone lies in {export.folder} and differs by {export.difference:.1g} after reloading. Load it with"
    )
    out_console.print(export.code, markup=False, highlight=False, soft_wrap=True)
    return 0


def lacking_data(config: str) -> str | None:
    """The class of data that a config is for where it names none of its own, of those that can be made."""
    data = read_config(config_file(config)).get("data") or {}
    kind = str(data.get("class_path")).rpartition(".")[2]
    return kind if kind in MADE and "path" not in data.get("init_args", {}) else None


def draw_curve(folder: Path) -> Path:
    """Loss, and kNN and linear accuracy of held-out data, over the steps of a run. Returns the picture's path."""
    logs = sorted(folder.glob("csv/version_*/metrics.csv"))
    series: dict[str, list[tuple[int, float]]] = {}
    for log in logs:
        with open(log, newline="") as file:
            for row in csv.DictReader(file):
                for name in ("train/loss/total", "val/knn/top1", "val/linear/top1"):
                    if row.get(name):
                        series.setdefault(name, []).append((int(row["step"]), float(row[name])))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, names, label in (
        (left, ("train/loss/total",), "cross-entropy, nats"),
        (right, ("val/linear/top1", "val/knn/top1"), "held-out accuracy"),
    ):
        for name in names:
            if name in series:
                axes.plot(
                    *zip(*series[name], strict=True), label=name.split("/", 1)[1], marker="." if axes is right else None
                )
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
