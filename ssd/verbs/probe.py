"""`ssd probe FILE --data ...`: what frozen features are worth."""

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ssd.batch import network_input
from ssd.cache_folder import cache_folder
from ssd.errors import UserError
from ssd.evaluation.choice import Choice, choose_for_knn, choose_for_linear
from ssd.evaluation.dense import dense_number, pixel_patches
from ssd.evaluation.feature_cache import DTYPES, FeatureTable, feature_table
from ssd.evaluation.features import Features, extract, name_without_a_network, without_a_network
from ssd.evaluation.lidar import SAMPLES, VIEWS, lidar_number
from ssd.evaluation.logistic import logistic_predict
from ssd.evaluation.ood import ood_numbers_of_others
from ssd.evaluation.outputs import outputs_of, parts_of
from ssd.evaluation.protocol import Number, count_classes
from ssd.evaluation.suite import MEASURES, USUAL, WITHOUT_LABELS, evaluate, few_label_report, report_table
from ssd.memory import keep_freed_memory
from ssd.record import build, describe
from ssd.summary import (
    check_json,
    check_writable,
    console,
    number_rows,
    print_facts,
    print_numbers,
    shown,
    write_json,
)
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.extraction import add_extraction, check_device
from ssd.verbs.loading import load_data
from ssd.verbs.networks import load_network
from ssd.verbs.patch_probes import attentive_of, frames_of, samples_alone, segmentation_of
from ssd.views.recipes import PlainViews
from ssd.views.sound import SoundViews

OF_THE_NETWORK = ("outputs", "lidar", "dense")
"""Measures that need more than one output's features."""
OF_PATCHES = ("attentive", "segmentation", "frames")
"""Measures that need more of every sample than pooled features."""


def run(argv: list[str]) -> int:
    usual, names = (*USUAL, *OF_THE_NETWORK), (*MEASURES, *OF_THE_NETWORK, *OF_PATCHES)
    parser = Parser(
        prog="ssd probe",
        description="Extracts frozen features once, with every output of the network (class token, mean patch, last blocks), "
        "then asks kNN, linear, logistic and few-label probes, the spectrum, which output serves kNN and the linear probe "
        "best (outputs), how well views of a sample keep together (lidar), and whether patches find their place again in "
        "another crop (dense). Named by --measures, also few-shot episodes, retrieval, out-of-distribution detection (ood), "
        "calibration, clustering, an attentive probe, segmentation and, of clips and sounds, what single frames tell. Views and "
        "normalisation are the network's own.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit; "
        "without it the checkpoint's own data is used. Features are kept on disk and read again when network, data, views, "
        "normalisation and precision are the same.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint that ssd fit wrote, exported folder, or timm:NAME.TAG")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=list(usual),
        choices=names,
        metavar="MEASURE",
        help=f"which of {', '.join(names)}; default: {', '.join(usual)}",
    )
    parser.add_argument(
        "--output",
        metavar="NAME",
        help="what the measures are of: a name from the table of outputs, or best, the linear probe's choice; default: the "
        "network's own, as it is exported",
    )
    parser.add_argument(
        "--labels",
        metavar="MAPS",
        help="folder of label maps for --measures segmentation: PNG of 8 bits, named like the pictures, 255 for none",
    )
    parser.add_argument(
        "--others",
        metavar="DATA",
        help="for --measures ood: another data set, a path or a class name, that the test samples are told from; without it "
        "half of the classes are held out",
    )
    parser.add_argument(
        "--confusion",
        metavar="FILE",
        help="write which classes the logistic probe takes for which as a picture, and print the pairs confused most",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also raw pixels (of sounds log-mel statistics) and the untrained network",
    )
    parser.add_argument(
        "--draws", type=at_least_one, default=20, help="draws of the labelled set of few-label probes; default: 20"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and the untrained network; default: 0")
    add_extraction(parser)
    parser.add_argument(
        "--cache", metavar="FOLDER", help="where features are kept; none = nowhere; default: the user's cache"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the features that are kept; float16 takes half the space"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    own, chosen = split_data(argv)
    arguments = parser.parse_args(own)
    check_json(arguments.json)
    check_device(arguments.device)
    check_confusion(arguments.confusion)
    if ("segmentation" in arguments.measures) != (arguments.labels is not None):
        raise UserError(
            "segmentation needs a label for every pixel, and nothing else does: give --measures segmentation and --labels MAPS "
            "together, or neither."
        )
    if arguments.others is not None and "ood" not in arguments.measures:
        raise UserError(
            "--others is what --measures ood tells the test samples from. Add the measure, or leave it out."
        )
    folder = kept_in(arguments.cache)

    keep_freed_memory()
    backbone, about = load_network(arguments.file)
    data = load_data(chosen, about, "probe")
    check_labelled(data, [*arguments.measures, *([] if arguments.confusion is None else ["logistic"])])
    out = console()
    settings = {"device": arguments.device, "precision": arguments.precision}
    backbone = backbone.to(arguments.device)
    if arguments.output is not None:
        check_output(arguments.output, backbone, data, arguments.device)
    tables, said = tables_of(backbone, data, folder, dtype=arguments.dtype, **settings)
    out.print(said, markup=False, highlight=False, soft_wrap=True)

    choices = {}
    if "outputs" in arguments.measures or arguments.output == "best":
        choices = choices_of(tables, arguments.seed)
    output = choices["linear"].output if arguments.output == "best" else arguments.output or tables[0].outputs()[0]
    bank, queries = (table.features(output) for table in (tables[0], tables[-1]))
    numbers = []
    of_features = [name for name in arguments.measures if name in MEASURES]
    if arguments.others is not None:
        of_features.remove("ood")
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
    if arguments.others is not None:
        numbers += ood_of_others(
            backbone, about, arguments.others, bank, queries, output, folder, arguments.dtype, **settings
        )
    if "outputs" in arguments.measures:
        numbers += [choice.number for choice in choices.values()]
    if "lidar" in arguments.measures:
        numbers += lidar_numbers(backbone, data, output, **settings)
    if "dense" in arguments.measures:
        dense = dense_number(backbone, data.test_dataloader()[-1], **settings)
        numbers += [] if dense is None else [dense]
    every = (arguments.seed, sys.stdout.isatty())
    if "attentive" in arguments.measures:
        numbers += attentive_of(backbone, data, *every, **settings)
    if "segmentation" in arguments.measures:
        numbers += segmentation_of(backbone, data, arguments.labels, *every, **settings)
    if "frames" in arguments.measures:
        numbers += frames_of(backbone, data, *every, **settings)
    counts = f"{len(bank.labels)} training, {len(queries.labels)} test samples"
    if len(tables) == 1:
        counts = f"{len(bank.labels)} samples"
    print_numbers(out, numbers, f"{arguments.file}: {counts}, output {output}")
    content: dict[str, Any] = {"file": arguments.file, "output": output, "numbers": number_rows(numbers)}
    if "outputs" in arguments.measures:
        out.print(outputs_table(tables[0], choices))
        content["outputs"] = {probe: {"best": c.output, "held_out": c.held_out} for probe, c in choices.items()}
    if arguments.confusion is not None:
        pairs, classes = write_confusion(arguments.confusion, bank, queries, data.classes, arguments.seed)
        content["confusion"] = {"file": arguments.confusion, "pairs": pairs, "top1": classes}
        print_facts(
            out, {"confusion": shown(arguments.confusion)} | {f"pair {i}": said for i, said in enumerate(pairs, 1)}
        )
    if arguments.baselines:
        own_bank, own_queries = (table.features() for table in (tables[0], tables[-1]))
        report = compare_with_baselines(
            about, data, own_bank, own_queries, arguments.draws, arguments.seed, backbone, **settings
        )
        if "dense" in arguments.measures:
            add_dense(report, about, backbone, data, arguments.seed, **settings)
        if "frames" in arguments.measures:
            add_frames(report, about, backbone, data, arguments.seed, numbers, **settings)
        title = f"beside {next(iter(report))} and the untrained network"
        out.print(report_table(report, title=title))
        content["baselines"] = {name: {key: vars(n) for key, n in row.items()} for name, row in report.items()}
    write_json(arguments.json, content)
    return 0


# ---------------------------------------------------------------------- features


def kept_in(folder: str | None) -> Path | None:
    """Where features are kept, None for nowhere. Raises UserError for a folder that cannot be written to."""
    if folder == "none":
        return None
    try:
        place = cache_folder() / "features" if folder is None else Path(folder)
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {folder or ''} cannot be written ({error}). Give a folder, or none.") from None
    if not os.access(place, os.W_OK):
        raise UserError(f"--cache {place} cannot be written. Give a folder of your own, or none.")
    return place


def tables_of(
    backbone: Any, data: Any, folder: Path | None, *, dtype: str, **settings: Any
) -> tuple[list[FeatureTable], str]:
    """A table for each of the data's test loaders, and a sentence that says where they are from."""
    tables, ways = [], []
    for source, loader, what in zip(data.test_sources(), data.test_dataloader(), ("training", "test")):
        table, how = feature_table(
            backbone,
            loader,
            len(source),
            samples_print(data, source),
            folder,
            dtype=dtype,
            progress=f"{what} features" if sys.stdout.isatty() else None,
            **settings,
        )
        tables.append(table)
        ways.append(how)
    how = ways[0] if len(set(ways)) == 1 else ", ".join(ways)
    return tables, f"features: {how}" + ("" if folder is None else f", kept in {folder}")


def samples_print(data: Any, source: Any) -> dict[str, Any]:
    """What tells samples, and how they are looked at, from others: also the size and time of files, which a fingerprint of
    names leaves out."""
    state = data.describe_state()
    look = {key: value for key, value in state.items() if key not in ("seed", "fingerprint", "sampling")}
    labels = b"" if source.labels is None else source.labels.tobytes()
    files = hashlib.sha256()
    for index in range(len(source)):
        try:
            about = os.stat(source.describe(index))
        except (OSError, ValueError):
            break  # no source of single files
        files.update(about.st_size.to_bytes(8, "little") + about.st_mtime_ns.to_bytes(8, "little"))
    return {
        "source": source.fingerprint(),
        "labels": hashlib.sha256(labels).hexdigest(),
        "files": files.hexdigest(),
        "views": describe(data.views),
        "look": describe(look),
    }


def check_labelled(data: Any, measures: list[str]) -> None:
    """Raises UserError where a measure needs labels and there are none."""
    if len(data.test_sources()) < 2 and not {*WITHOUT_LABELS, "lidar", "dense", "segmentation"}.issuperset(measures):
        raise UserError(
            "the data has no labels, which kNN and linear probes need. Give data with labels (class folders, a list file "
            "with labels, or a label column) by --data, or ask for --measures spectrum lidar dense."
        )


def features_of(
    backbone: torch.nn.Module, data: Any, measures: list[str], name: str, **settings: Any
) -> tuple[Features, Features]:
    """The network's own output for the training and the test samples, twice the same for data without labels. Raises
    UserError where a measure needs labels and there are none."""
    check_labelled(data, measures)

    def embed(samples: torch.Tensor) -> torch.Tensor:
        return backbone(samples).pooled()

    # a bar that is not on a terminal would be a line in the output
    progress = f"{name} features" if sys.stdout.isatty() else None
    parts = [extract(embed, loader, progress=progress, **settings) for loader in data.test_dataloader()]
    return parts[0], parts[-1]


# ---------------------------------------------------------------------- confusion


def check_confusion(file: str | None) -> None:
    """Raises UserError for a file that no picture could be written to."""
    if file is not None and Path(file).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--confusion {file} is no name of a picture. Give a file that ends in .png, .jpg or .webp.")
    check_writable("--confusion", file)


def write_confusion(
    file: str, bank: Features, queries: Features, classes: list[str] | None, seed: int
) -> tuple[list[str], dict[str, float]]:
    """The picture of what the logistic probe takes for what; the five pairs confused most, in words, and the accuracy of
    each class that has test samples."""
    from ssd.evaluation.confusion import class_accuracies, class_names, confusion, confusion_picture, most_confused

    known, asked = bank.labels >= 0, queries.labels >= 0
    labels, truth = bank.labels[known], queries.labels[asked]
    number = count_classes(labels, truth)
    fit = logistic_predict(bank.features[known], labels, queries.features[asked], number, seed=seed)
    matrix = confusion(fit.predictions, truth, number)
    confusion_picture(matrix, classes, "logistic probe, % of each class").save(file)
    accuracies = zip(class_names(matrix, classes), class_accuracies(matrix).tolist(), strict=True)
    return most_confused(matrix, classes), {name: share for name, share in accuracies if not math.isnan(share)}


# ---------------------------------------------------------------------- outputs


def choices_of(tables: list[FeatureTable], seed: int) -> dict[str, Choice]:
    """The best output for kNN and for the linear probe."""
    bank, queries = tables[0], tables[-1]
    known, asked = bank.labels >= 0, queries.labels >= 0

    def features(name: str) -> Any:
        return lambda: (bank.features(name).features[known], queries.features(name).features[asked])

    outputs = {name: features(name) for name in bank.outputs()}
    labels = (bank.labels[known], queries.labels[asked], seed)
    return {"knn": choose_for_knn(outputs, *labels), "linear": choose_for_linear(outputs, *labels)}


def check_output(name: str, backbone: Any, data: Any, device: str) -> None:
    """Raises UserError for a name that is no output of the network, from a look at one sample."""
    sample = network_input(next(iter(data.test_dataloader()[0])))[:1].to(device)
    with torch.no_grad():
        outputs = outputs_of(parts_of(backbone, sample))
    if name not in outputs and name != "best":
        raise UserError(f"--output {name} is no output of this network. Choose one of {', '.join(outputs)}, or best.")


def outputs_table(table: FeatureTable, choices: Mapping[str, Choice]) -> Table:
    """One line an output, in percent on the held-out part of the training set, the best of each column marked."""
    drawn = Table("output", title="on a tenth of the training samples, held out")
    for column in ("width", *choices):
        drawn.add_column(column, justify="right")
    for name, parts in outputs_of(table.parts).items():
        width = sum(table.parts[part].shape[1] for part in parts)
        marked = (
            f"{'best ' if choice.output == name else ''}{100 * choice.held_out[name]:.1f}"
            for choice in choices.values()
        )
        drawn.add_row(name, str(width), *marked)
    return drawn


def lidar_numbers(backbone: Any, data: Any, output: str, **settings: Any) -> list[Number]:
    """LiDAR of the output, of views as the network learned from; none where they are not known, or are sounds with padding."""
    kinds = data.views.kinds()
    if isinstance(data.views, PlainViews | SoundViews) or "global" not in kinds or len(data.source) < 2:
        return []
    looks = -(-VIEWS // len(kinds["global"]))

    def embed(views: torch.Tensor) -> torch.Tensor:
        parts = parts_of(backbone, views)
        return torch.cat([parts[name] for name in outputs_of(parts)[output]], dim=1)

    return [lidar_number(embed, data.augmented_dataloader(SAMPLES, looks), looks, **settings)]


def ood_of_others(
    backbone: Any,
    about: dict[str, Any],
    others: str,
    bank: Features,
    queries: Features,
    output: str,
    folder: Path | None,
    dtype: str,
    **settings: Any,
) -> list[Number]:
    """How well test samples are told from those of another data set, of which the held-out part is taken where it has one."""
    data = load_data(["--data", others], about, "probe")
    tables, _ = tables_of(backbone, data, folder, dtype=dtype, **settings)
    outside, known = tables[-1].features(output).features, bank.labels >= 0
    name = Path(others).name
    return ood_numbers_of_others(bank.features[known], bank.labels[known], queries.features, outside, name)


# ---------------------------------------------------------------------- baselines


def untrained(about: Mapping[str, Any], backbone: Any, seed: int, device: Any) -> Any:
    """The network as a run of this seed begins, or, of a network that no run is known of, built anew."""
    torch.manual_seed(seed)
    fresh = build(about["method"]).evaluated_backbone if "method" in about else build(backbone.record())
    return fresh.eval().to(device)


def add_dense(
    report: dict[str, dict[str, Number]], about: dict[str, Any], backbone: Any, data: Any, seed: int, **settings: Any
) -> None:
    """The dense score of each row of `compare_with_baselines`, where the backbone answers a map."""
    patch = max(backbone.patch_size) if isinstance(backbone.patch_size, tuple) else backbone.patch_size
    fresh = untrained(about, backbone, seed, settings["device"])
    networks = {"pixels": lambda pictures: pixel_patches(pictures, patch), "untrained": fresh, "pretrained": backbone}
    found = {name: dense_number(network, data.test_dataloader()[-1], **settings) for name, network in networks.items()}
    for name, number in found.items():
        if number is not None and all(found.values()):
            report[name]["dense"] = number


def add_frames(
    report: dict[str, dict[str, Number]],
    about: dict[str, Any],
    backbone: Any,
    data: Any,
    seed: int,
    numbers: list[Number],
    **settings: Any,
) -> None:
    """What single frames tell in each row of `compare_with_baselines`; `numbers` has those of the network itself."""
    fresh = untrained(about, backbone, seed, settings["device"])
    alone, before = (frames_of(embed, data, seed, **settings)[0] for embed in (samples_alone(data.views), fresh))
    known = next(number for number in numbers if number.name == alone.name)
    for row, number in zip(report.values(), (alone, before, known), strict=True):
        row["frames"] = number


def compare_with_baselines(
    about: Mapping[str, Any],
    data: Any,
    bank: Features,
    queries: Features,
    draws: int,
    seed: int,
    backbone: Any = None,
    **settings: Any,
) -> dict[str, dict[str, Number]]:
    """Rows pixels (of sounds log-mel), untrained and pretrained of the same four numbers, on the same draws of labels;
    `backbone` is what is built anew where `about` names no method."""
    fresh = untrained(about, backbone, seed, settings["device"])
    first, last = features_of(fresh, data, ["knn"], "untrained", **settings)
    raw = [without_a_network(loader, data.views) for loader in data.test_dataloader()]
    rows = {
        name_without_a_network(data.views): (raw[0].features, raw[1].features),
        "untrained": (first.features, last.features),
        "pretrained": (bank.features, queries.features),
    }
    return few_label_report(rows, bank.labels, queries.labels, draws=draws, seed=seed)
