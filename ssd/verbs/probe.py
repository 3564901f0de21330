"""`ssd probe FILE --data ...`: what frozen features are worth."""

import sys
from typing import Any

import torch

from ssd.errors import UserError
from ssd.evaluation.dense import dense_number, pixel_patches
from ssd.evaluation.features import Features, extract, pixels
from ssd.evaluation.protocol import Number
from ssd.evaluation.suite import MEASURES, evaluate, few_label_report, report_table
from ssd.record import build
from ssd.summary import check_json, console, number_rows, print_numbers, write_json
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.extraction import add_extraction, check_device
from ssd.verbs.loading import load_data, load_module


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd probe",
        description="Extracts frozen features of a checkpoint's backbone once, then asks kNN, linear, logistic and "
        "few-label probes and the spectrum, and whether patches find their place again in another crop (dense). Views and "
        "normalisation are the checkpoint's own.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit; "
        "without it the checkpoint's own data is used.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint that ssd fit wrote")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=[*MEASURES, "dense"],
        choices=[*MEASURES, "dense"],
        metavar="MEASURE",
        help=f"which of {', '.join(MEASURES)}, dense; default: all",
    )
    parser.add_argument("--baselines", action="store_true", help="also raw pixels and the untrained network")
    parser.add_argument(
        "--draws", type=at_least_one, default=20, help="draws of the labelled set of few-label probes; default: 20"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and the untrained network; default: 0")
    add_extraction(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    own, chosen = split_data(argv)
    arguments = parser.parse_args(own)
    check_json(arguments.json)
    check_device(arguments.device)

    module, about = load_module(arguments.file)
    data = load_data(chosen, about, "probe")
    out = console()
    settings = {"device": arguments.device, "precision": arguments.precision}
    backbone = module.evaluated_backbone.to(arguments.device)
    of_features = [name for name in arguments.measures if name != "dense"]
    bank, queries = features_of(backbone, data, of_features, "pretrained", **settings)
    numbers = []
    if of_features:
        numbers = evaluate(
            bank.features,
            bank.labels,
            queries.features,
            queries.labels,
            measures=of_features,
            draws=arguments.draws,
            seed=arguments.seed,
        )
    if "dense" in arguments.measures:
        dense = dense_number(backbone, data.test_dataloader()[-1], **settings)
        numbers += [] if dense is None else [dense]
    counts = f"{len(bank.labels)} training, {len(queries.labels)} test samples"
    if queries is bank:
        counts = f"{len(bank.labels)} samples"
    print_numbers(out, numbers, f"{arguments.file}: {counts}")
    content: dict[str, Any] = {"file": arguments.file, "numbers": number_rows(numbers)}
    if arguments.baselines:
        report = compare_with_baselines(about, data, bank, queries, arguments.draws, arguments.seed, **settings)
        if "dense" in arguments.measures:
            add_dense(report, about, backbone, data, arguments.seed, **settings)
        out.print(report_table(report, title="beside raw pixels and the untrained network"))
        content["baselines"] = {name: {key: vars(n) for key, n in row.items()} for name, row in report.items()}
    write_json(arguments.json, content)
    return 0


def features_of(
    backbone: torch.nn.Module, data: Any, measures: list[str], name: str, **settings: Any
) -> tuple[Features, Features]:
    """Features of the training and the test samples, twice the same where only the spectrum is asked of data without
    labels. Raises UserError where a measure needs labels and there are none."""
    loaders = data.test_dataloader()
    if len(loaders) < 2 and not set(measures) <= {"spectrum"}:
        raise UserError(
            "the data has no labels, which kNN and linear probes need. Give data with labels (class folders, a list file "
            "with labels, or a label column) by --data, or ask for --measures spectrum."
        )

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        return backbone(pictures).pooled()

    # a bar that is not on a terminal would be a line in the output
    progress = f"{name} features" if sys.stdout.isatty() else None
    parts = [extract(embed, loader, progress=progress, **settings) for loader in loaders]
    return parts[0], parts[-1]


def add_dense(
    report: dict[str, dict[str, Number]], about: dict[str, Any], backbone: Any, data: Any, seed: int, **settings: Any
) -> None:
    """The dense score of each row of `compare_with_baselines`, where the backbone answers a map."""
    patch = max(backbone.patch_size) if isinstance(backbone.patch_size, tuple) else backbone.patch_size
    torch.manual_seed(seed)
    fresh = build(about["method"]).eval().evaluated_backbone.to(settings["device"])
    networks = {"pixels": lambda pictures: pixel_patches(pictures, patch), "untrained": fresh, "pretrained": backbone}
    found = {name: dense_number(network, data.test_dataloader()[-1], **settings) for name, network in networks.items()}
    for name, number in found.items():
        if number is not None and all(found.values()):
            report[name]["dense"] = number


def compare_with_baselines(
    about: dict[str, Any], data: Any, bank: Features, queries: Features, draws: int, seed: int, **settings: Any
) -> dict[str, dict[str, Number]]:
    """Rows pixels, untrained and pretrained of the same four numbers, on the same draws of labels."""
    torch.manual_seed(seed)
    fresh = build(about["method"]).eval().evaluated_backbone.to(settings["device"])
    untrained = features_of(fresh, data, ["knn"], "untrained", **settings)
    raw = [pixels(loader) for loader in data.test_dataloader()]
    rows = {
        "pixels": (raw[0].features, raw[1].features),
        "untrained": (untrained[0].features, untrained[1].features),
        "pretrained": (bank.features, queries.features),
    }
    return few_label_report(rows, bank.labels, queries.labels, draws=draws, seed=seed)
