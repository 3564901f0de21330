"""`ssd look --data PATH --views RECIPE`: what a network will be shown, as a picture."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ssd.data.dataset import TrainingPictures
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import Masking
from ssd.record import build
from ssd.summary import check_json, check_writable, console, write_json
from ssd.verbs.arguments import Parser, at_least_one, import_choices, split_data, subclasses
from ssd.verbs.loading import check_pictures, load_data, typed_data
from ssd.views.parameters import Box
from ssd.pictures.sheet import CELL, sheet
from ssd.views.view import Views
from ssd.weights.checkpoint import read_checkpoint

MOST = 64  # samples on a sheet


def run(argv: list[str]) -> int:
    own, chosen = split_data(argv)
    arguments = options().parse_args(own)
    check_json(arguments.json)
    check_writable("--out", arguments.out)
    if Path(arguments.out).suffix.lower() != ".png":
        raise UserError(f"--out {arguments.out} is no PNG. Give a name that ends in .png.")
    data = data_of(arguments.file, chosen)
    if arguments.masks is not None:
        if arguments.file is not None:
            raise UserError("--masks is the checkpoint's own. Leave it out, or leave the checkpoint out.")
        data.masks = {"global": mask_plan(arguments.masks, arguments.patch, data.views)}
    samples = min(arguments.samples, len(data.source), MOST)
    # the first samples of the run's own order: views follow the seed and the place, not the size of the batch
    data.batch_size, data.num_workers, data.photometry = samples, 0, "worker"
    loader = data.train_dataloader()
    dataset: TrainingPictures = loader.dataset
    batch = next(iter(loader))
    originals = [dataset.pictures[index] for index in batch.index.tolist()]
    page = sheet(batch, originals, data.mean, data.std, arguments.bands, arguments.cell)
    page.save(arguments.out)
    out = console()
    names = [data.source.describe(index) for index in batch.index.tolist()]
    for row, name in enumerate(names, start=1):
        out.print(f"row {row}: {name}", markup=False, highlight=False, soft_wrap=True)
    views = ", ".join(f"{len(views)} {kind} of {views.shape[-1]} px" for kind, views in batch.views.items())
    out.print(f"{arguments.out}: {samples} samples, {views}", markup=False, highlight=False, soft_wrap=True)
    boxes = {kind: table.transpose(0, 1).int().tolist() for kind, table in batch.boxes.items()}
    rows = [
        {"picture": name, "boxes": {kind: table[row] for kind, table in boxes.items()}}
        for row, name in enumerate(names)
    ]
    write_json(arguments.json, {"file": arguments.out, "box": [column.name.lower() for column in Box], "rows": rows})
    return 0


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd look",
        description="Writes the first samples of a run as a PNG: each picture with its crops drawn in, then its views as "
        "the network gets them, with what masks hide of them: those of a checkpoint's method, or of --masks.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit. "
        "--views takes a recipe (default: dino), and --views.KEY VALUE its settings; --config method/NAME takes those of a run.",
    )
    parser.add_argument(
        "file", nargs="?", metavar="CHECKPOINT", help="its views, normalisation and, without --data, data"
    )
    parser.add_argument(
        "--masks",
        metavar="RECIPE",
        help="without a checkpoint: hide patches of the global views, by a recipe such as BlockMasks or "
        "'{class_path: RandomMasks, init_args: {ratio: 0.6}}'",
    )
    parser.add_argument("--patch", type=at_least_one, default=16, help="side of --masks' patches, px; default: 16")
    parser.add_argument("--out", default="sheet.png", metavar="FILE", help="default: sheet.png")
    parser.add_argument("--samples", type=at_least_one, default=6, help=f"rows, at most {MOST}; default: 6")
    parser.add_argument("--cell", type=at_least_one, default=CELL, help=f"side of each picture, px; default: {CELL}")
    parser.add_argument(
        "--bands",
        type=int,
        nargs="+",
        metavar="N",
        help="channels shown as red, green, blue, from 0; one is shown grey",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the pictures and the boxes of their views as JSON")
    return parser


def mask_plan(text: str, patch: int, views: Views) -> MaskPlan:
    """The masks of the global views. Raises UserError for a recipe that is none, and for patches that do not fit."""
    import_choices()
    recipes = {recipe.__name__: recipe for recipe in subclasses(Masking)}
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError:
        record = text
    name = record.get("class_path") if isinstance(record, dict) else record
    recipe = recipes.get(str(name).rpartition(".")[2])
    if recipe is None:
        raise UserError(f"--masks {text} is no recipe of masks. Choose one of {', '.join(sorted(recipes))}.")
    try:
        masks = recipe(**(record.get("init_args") or {} if isinstance(record, dict) else {}))
    except TypeError as error:
        raise UserError(f"--masks {text}: {error}. Settings go into init_args.") from None
    kinds = views.kinds()
    if "global" not in kinds:
        raise UserError(f"--masks hides patches of global views, and these views have {', '.join(kinds)}.")
    size = kinds["global"][0].size
    if size % patch:
        raise UserError(f"--patch {patch} does not divide global views of {size} px. Use a divisor.")
    return MaskPlan(masks, len(kinds["global"]), (size // patch, size // patch))


def data_of(checkpoint: str | None, chosen: list[str]) -> Any:
    """The data, prepared with its views, and with the masks of a checkpoint's method.

    Raises UserError where views are given beside a checkpoint.
    """
    if checkpoint is None:
        data, views = typed_data(chosen, "look")
        check_pictures(data, "look")
        # taken out again on the sheet, so that nothing has to be measured
        data.given = data.given or ([0.5] * data.channels, [0.25] * data.channels)
        data.prepare(views)
        return data
    if any(word.partition("=")[0].startswith("--views") for word in chosen):
        raise UserError(
            "--views is the checkpoint's own, as in its training. Leave it out, or leave the checkpoint out."
        )
    about = read_checkpoint(checkpoint)["ssd"]
    data = load_data(chosen, about, "look")
    check_pictures(data, "look")
    # the grid of tokens is the network's; the slices of a step are none of a sheet's
    data.masks = {name: replace(plan, slices=1) for name, plan in build(about["method"]).mask_plans().items()}
    return data
