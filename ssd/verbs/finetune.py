"""`ssd finetune NETWORK --data ...`: what a pretrained network is worth to whoever trains it on labels."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.table import Table

from ssd.errors import UserError
from ssd.evaluation.finetune import HEADS, Recipe
from ssd.evaluation.intervals import Interval, accuracy_interval, difference_interval
from ssd.record import describe
from ssd.summary import check_json, console, print_facts, shown, write_json
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.extraction import check_device
from ssd.verbs.loading import load_data
from ssd.verbs.starts import NETWORK, Start, load_start
from ssd.verbs.study import Place, Result, Study
from ssd.verbs.supervised import CROP, check_mixing, supervised_views

SHARES = (0.01, 0.1, 1.0)


def run(argv: list[str]) -> int:
    own, chosen = split_data(argv)
    arguments = options().parse_args(own)
    check_json(arguments.json)
    check_device(arguments.device)
    shares = sorted(set(arguments.shares))
    recipe = recipe_of(arguments)
    start = load_start(arguments.network)
    starts = {start_name(start): start}
    if arguments.baseline:
        if start.weights is None:
            raise UserError(f"--baseline adds random weights, and {start.name} has them already. Leave it out.")
        starts["random"] = start.untrained()

    views = supervised_views(start.about, arguments.crop, arguments.flip, arguments.jitter)
    check_mixing(recipe, views)
    data = load_data(chosen, start.about | {"views": describe(views)}, "finetune")
    study = Study(data, recipe, arguments.device, arguments.out, "finetune")
    study.open_folder(start, kept=Place(next(iter(starts)), shares[-1], arguments.seed))
    try:
        results = {
            (name, share): study.result(begin, name, share, arguments.seeds, arguments.seed)
            for share in shares
            for name, begin in starts.items()
        }
    except KeyboardInterrupt as end:
        again = "" if arguments.out is None else f"The same command goes on in {arguments.out}."
        raise KeyboardInterrupt(again) from end
    rows = [row(name, share, result) for (name, share), result in results.items()]
    if arguments.baseline:
        for entry in rows:
            first, other = results[rows[0]["start"], entry["share"]], results["random", entry["share"]]
            if entry["start"] != "random":
                entry["gain"] = vars(difference_interval(first.correct, other.correct))
    settings = {"training": dataclasses.asdict(recipe), "views": describe(views)}
    content = {"network": arguments.network, **study.facts(), "settings": settings, "rows": rows}
    out = console()
    heading = f"{arguments.network}: top-1 on {content['test']:,} test samples, %"
    out.print(heading, markup=False, highlight=False, soft_wrap=True)
    out.print(table(rows))
    for name, protocols in protocols_of(rows).items():
        for protocol in protocols:
            out.print(f"{name}: {protocol}", markup=False, highlight=False, soft_wrap=True)
    told = {"chance": f"{100 * content['chance']:.1f} %, the commonest of {content['classes']} classes"}
    if study.folder is not None:
        report = json.loads((study.folder / "model" / "export.json").read_text())
        content["model"] = report
        write_json(study.folder / "summary.json", content)
        draw(rows, [result for result in results.values()], study.folder / "curves.png")
        told |= {
            "curves": shown(str(study.folder / "curves.png")),
            "model": f"{shown(report['folder'])}: {report['training']}, largest difference after reloading "
            f"{report['difference']:.2g}. Load it with",
        }
    print_facts(out, told)
    if study.folder is not None:
        out.print("\n".join(report["lines"]), markup=False, highlight=False, soft_wrap=True)
    write_json(arguments.json, content)
    return 0


def row(name: str, share: float, result: Result) -> dict[str, Any]:
    """One line of the table."""
    tops = result.correct.double().mean(1)
    return {
        "start": name,
        "share": share,
        "labels": result.labels,
        "per_class": result.per_class,
        **vars(accuracy_interval(result.correct)),
        "spread": float(tops.std()) if len(tops) > 1 else None,
        "protocol": result.protocol,
        "runs": [
            {"top1": top, **outcome.content(without=("predictions",))}
            for top, outcome in zip(tops.tolist(), result.outcomes, strict=True)
        ],
    }


def protocols_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Start -> how it was trained, each way once."""
    found: dict[str, list[str]] = {}
    for entry in rows:
        told = found.setdefault(entry["start"], [])
        if entry["protocol"] not in told:
            told.append(entry["protocol"])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """In percent; ± is the deviation over seeds."""
    gains = any("gain" in entry for entry in rows)
    drawn = Table("labels", "start")
    for name in ("top-1", "95 % interval", *(["gain over random"] if gains else [])):
        drawn.add_column(name, justify="right")
    for entry in rows:
        spread = "" if entry["spread"] is None else f" ± {100 * entry['spread']:.1f}"
        per_class = "all" if entry["per_class"] is None else f"{entry['per_class']} per class"
        cells = [f"{100 * entry['share']:g} %: {entry['labels']:,} ({per_class})", entry["start"]]
        cells += [f"{100 * entry['value']:.1f}{spread}", f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}"]
        if gains:
            cells.append(told_gain(Interval(**entry["gain"])) if "gain" in entry else "")
        drawn.add_row(*cells)
    return drawn


def told_gain(gain: Interval) -> str:
    sure = "" if gain.beyond_chance else ", may be chance"
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f}{sure})"


def draw(rows: Sequence[Mapping[str, Any]], results: Sequence[Result], path: Path) -> None:
    """Accuracy over the number of labels, and each training's loss over its epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in dict.fromkeys(entry["start"] for entry in rows):
        own = [entry for entry in rows if entry["start"] == name]
        value, low, high = (np.array([100 * entry[key] for entry in own]) for key in ("value", "low", "high"))
        bars = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
        left.errorbar([entry["labels"] for entry in own], value, bars, marker="o", capsize=3, label=name)
    left.set(xscale="log", xlabel="labels", ylabel="top-1, %, and 95 % interval")
    amounts = sorted({entry["labels"] for entry in rows})
    left.set_xticks(amounts, [f"{amount:,}" for amount in amounts])
    left.set_xticks([], minor=True)
    left.legend()
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(rows)))
    for entry, result, colour in zip(rows, results, colours, strict=True):
        for number, outcome in enumerate(result.outcomes):
            losses = [point["loss"] for point in outcome.curve]
            label = f"{entry['start']}, {100 * entry['share']:g} %" if number == 0 else None
            right.plot(np.linspace(0, 1, len(losses)), losses, color=colour, label=label, linewidth=1)
    right.set(xlabel="share of the training", ylabel="loss, nats")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd finetune",
        description="Trains a backbone with a linear head on all labels and on few of them, and judges it on held-out "
        "data: top-1 with a 95 % interval, beside chance and, with --baseline, beside the same network from random "
        "weights. Which epoch counts is decided on a part of the training labels, never on the test set.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit; "
        "without it a checkpoint's own data is used. Crops, mirroring, turning and slanting are those of a checkpoint's "
        "own views unless they are given.",
    )
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    parser.add_argument(
        "--shares",
        nargs="+",
        type=share_of_labels,
        default=list(SHARES),
        metavar="SHARE",
        help="of the training labels, drawn evenly over classes, at least one of each; default: 0.01 0.1 1.0",
    )
    parser.add_argument("--seeds", type=at_least_one, default=3, help="repetitions of each; default: 3")
    parser.add_argument("--seed", type=int, default=0, help="of the first: draw of labels, order, views; default: 0")
    parser.add_argument("--baseline", action="store_true", help="also the same network from random weights")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the model of the largest share and first seed (for plain timm), curves, and what has been done: "
        "the same command goes on there after a stop",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU where there is one"
    )
    add_recipe(parser)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The options of the training, one for each setting of `Recipe`."""
    group = parser.add_argument_group("training")
    default = Recipe()
    group.add_argument("--epochs", type=int, help="default: 30, or as many as make 400 steps")
    group.add_argument("--batch-size", type=int, default=default.batch_size, help=f"default: {default.batch_size}")
    group.add_argument("--lr", type=float, help="of the head at its peak; default: 1e-4, and 1e-3 from random weights")
    group.add_argument("--warmup", type=float, default=default.warmup, help=f"share; default: {default.warmup:g}")
    group.add_argument(
        "--layer-decay",
        type=float,
        help="factor of the learning rate, block after block downwards; default: 0.75, and 1 from random weights",
    )
    group.add_argument("--weight-decay", type=float, default=default.weight_decay, help=f"{default.weight_decay:g}")
    group.add_argument(
        "--drop-path", type=float, default=0.0, help="in the last block; default: 0, for a large ViT 0.1"
    )
    group.add_argument("--mixup", type=float, default=0.0, help="alpha, not of sounds; default: 0, for much data 0.8")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha, of pictures; default: 0, for much data 1.0")
    group.add_argument("--label-smoothing", type=float, default=0.0, help="default: 0, for much data 0.1")
    group.add_argument(
        "--ema", type=float, default=0.0, help="momentum of averaged weights, as 0.999; default: 0, none"
    )
    group.add_argument(
        "--head",
        choices=HEADS,
        help="begins at a linear probe's weights or at zero; default: linear, and zero on random weights",
    )
    group.add_argument(
        "--held-out",
        type=float,
        default=default.held_out,
        help=f"share of the labels that chooses the epoch; default: {default.held_out:g}",
    )
    group.add_argument("--refit", action="store_true", help="then train again on all labels, up to that epoch")
    on_gpu = torch.cuda.is_available()
    group.add_argument(
        "--precision",
        default="bf16-mixed" if on_gpu else "32-true",
        choices=["32-true", "bf16-mixed"],
        help="default: bf16-mixed on a GPU, else 32-true",
    )
    views = parser.add_argument_group("views", "of pictures and clips; those of sounds are the checkpoint's")
    views.add_argument("--crop", type=float, help=f"smallest share of a picture in a view; default: {CROP:g}")
    views.add_argument("--flip", type=float, help="probability; default: the checkpoint's, 0.5 where none is known")
    views.add_argument("--jitter", type=float, help="of brightness, contrast and saturation; default: 0")


def share_of_labels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and at most 1")
    return value


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})


def start_name(start: Start) -> str:
    return "random" if start.weights is None else "pretrained"
