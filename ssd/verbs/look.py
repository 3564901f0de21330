"""`ssd look --data PATH --views RECIPE`: what a network will be shown, and what it sees in it, as a picture."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ssd.data.clip_samples import TrainingClips
from ssd.data.dataset import TrainingPictures
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import Masking
from ssd.pictures.first_batch import FRAME, clips_of, sounds_of
from ssd.pictures.sheet import CELL, sheet
from ssd.record import build
from ssd.summary import check_json, check_writable, console, write_json
from ssd.verbs.arguments import Parser, at_least_one, import_choices, split_data, subclasses
from ssd.verbs.loading import load_data, typed_data
from ssd.verbs.look_inside import INSIDE, look_inside
from ssd.views.clips import ClipBox
from ssd.views.parameters import Box
from ssd.views.recipes import RECIPES
from ssd.views.sound import SoundViews
from ssd.views.view import Views
from ssd.weights.checkpoint import read_checkpoint

MOST = 64  # samples on a sheet
NOT_OF_SOUND = ("masks", "bands", "cell")


def run(argv: list[str]) -> int:
    own, chosen = split_data(argv)
    arguments = options().parse_args(own)
    check_json(arguments.json)
    arguments.out = arguments.out or ("sheet.png" if arguments.show == "views" else f"{arguments.show}.png")
    check_writable("--out", arguments.out)
    if Path(arguments.out).suffix.lower() != ".png":
        raise UserError(f"--out {arguments.out} is no PNG. Give a name that ends in .png.")
    check_options(arguments)
    page, told, content = (
        look_at_views(arguments, chosen) if arguments.show == "views" else look_inside(arguments, chosen)
    )
    page.save(arguments.out)
    out = console()
    for text in told[:-1]:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print(f"{arguments.out}: {told[-1]}", markup=False, highlight=False, soft_wrap=True)
    write_json(arguments.json, {"file": arguments.out, **content})
    return 0


def check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that do not go with what is shown."""
    views = arguments.show == "views"
    for name in ("size", "like"):
        if getattr(arguments, name) is not None and views:
            raise UserError(f"--{name} is for what a network sees, and --show is views. Leave it out.")
    if arguments.masks is not None and not views:
        raise UserError(f"--masks is for views, and --show is {arguments.show}. Leave it out.")
    if arguments.like is not None and arguments.show != "pca":
        raise UserError(f"--like is for the colours of pca, and --show is {arguments.show}. Leave it out.")
    if arguments.file is None and not views:
        raise UserError(f"--show {arguments.show} needs the checkpoint of a network. Give its file.")
    if arguments.masks is not None and arguments.file is not None:
        raise UserError("--masks is the checkpoint's own. Leave it out, or leave the checkpoint out.")


def look_at_views(arguments: argparse.Namespace, chosen: list[str]) -> tuple[Image.Image, list[str], dict[str, Any]]:
    """A sheet of the first samples of the run's own order, what to say of it, and its content as JSON."""
    from datamodules.colour import ColourData
    from datamodules.pictures import PictureData

    data = data_of(arguments.file, chosen)
    unused = (
        () if isinstance(data, PictureData) else ("masks", "bands") if isinstance(data, ColourData) else NOT_OF_SOUND
    )
    for name in unused:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} does not go with {type(data).__name__}. Leave it out.")
    if arguments.masks is not None:
        data.masks = {"global": mask_plan(arguments.masks, arguments.patch, data.views)}
    # views follow the seed and the place, not the size of the batch
    data.batch_size, data.num_workers, data.photometry = min(arguments.samples, len(data.source), MOST), 0, "worker"
    if isinstance(data.views, SoundViews):
        data.batch_seconds = None
    loader = data.train_dataloader()
    batch = next(iter(loader))
    names = [data.source.describe(index) for index in batch.index.tolist()]
    told = [f"row {row}: {name}" for row, name in enumerate(names, start=1)]
    rows: list[dict[str, Any]] = [{"picture": name} for name in names]
    columns: Any = Box
    if isinstance(loader.dataset, TrainingPictures):
        originals = [loader.dataset.pictures[index] for index in batch.index.tolist()]
        page = sheet(batch, originals, data.mean, data.std, arguments.bands, arguments.cell or CELL)
        what = [f"{len(views)} {kind} of {views.shape[-1]} px" for kind, views in batch.views.items()]
    elif isinstance(loader.dataset, TrainingClips):
        page, columns = clips_of(batch, loader.dataset, data, arguments.cell or FRAME), ClipBox
        what = [
            f"{len(views)} {kind} of {views.shape[3]} frames of {views.shape[-1]} px"
            for kind, views in batch.views.items()
        ]
    else:
        page, spans = sounds_of(batch, loader, data)
        rows = [row | {"seconds": span} for row, span in zip(rows, spans)]
        what = [f"{len(views)} {kind}" for kind, views in batch.views.items()]
    boxes = {
        kind: (table.int() if columns is Box else table).transpose(0, 1).tolist() for kind, table in batch.boxes.items()
    }
    if boxes:
        rows = [row | {"boxes": {kind: found[n] for kind, found in boxes.items()}} for n, row in enumerate(rows)]
    content = {"box": [column.name.lower() for column in columns] if boxes else [], "rows": rows}
    return page, [*told, f"{len(rows)} samples, {', '.join(what)}"], content


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd look",
        description="Writes the first samples of a run as a PNG: each picture with its crops drawn in, then its views as "
        "the network gets them, with what masks hide of them: those of a checkpoint's method, or of --masks. Clips are shown as "
        "filmstrips, sounds as waveform and spectrogram. Or, of a checkpoint's network, what it sees in held-out samples: "
        "--show pca or neighbours, and of pictures also attention, prototypes or reconstruction.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit. "
        "--views takes a recipe (default: dino, clip or speech, as the data is), and --views.KEY VALUE its settings; --config "
        "method/NAME takes those of a run.",
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
    parser.add_argument(
        "--show",
        default="views",
        choices=["views", *INSIDE],
        metavar="WHAT",
        help="views; attention: where each head of a transformer's last block looks; pca: the three main components of patch "
        "features as colours; neighbours: the training samples that are most alike; prototypes: the samples or patches that "
        "score highest for the most used ones; reconstruction: what a masked autoencoder paints; default: views",
    )
    parser.add_argument("--out", metavar="FILE", help="default: sheet.png for views, else what is shown, as in pca.png")
    parser.add_argument("--samples", type=at_least_one, default=6, help=f"rows, at most {MOST}; default: 6")
    parser.add_argument(
        "--size", type=at_least_one, help="side of what the network is shown, px; default: that of its evaluation"
    )
    parser.add_argument(
        "--like",
        metavar="CHECKPOINT",
        help="turn the components of pca to those of this network, such as an earlier one of the run, so that colours compare",
    )
    parser.add_argument(
        "--cell", type=at_least_one, help=f"side of each picture, px; default: {CELL}, of a clip's frames {FRAME}"
    )
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
    from datamodules.colour import ColourData

    if checkpoint is None:
        data, views = typed_data(chosen, "look")
        if not data.takes(views) and not any(word.startswith(("--views", "--config", "-c")) for word in chosen):
            views = next(recipe for recipe in RECIPES.values() if data.takes(recipe))
        if isinstance(data, ColourData):
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
    # the grid of tokens is the network's; the slices of a step are none of a sheet's
    data.masks = {name: replace(plan, slices=1) for name, plan in build(about["method"]).mask_plans().items()}
    return data
