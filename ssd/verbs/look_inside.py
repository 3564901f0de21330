"""`ssd look FILE --show ...`: what a checkpoint's network sees in held-out samples."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from ssd.batch import Scores, Tokens, map_tensors, network_input
from ssd.data.dataset import evenly, looked_at
from ssd.errors import UserError
from ssd.evaluation.features import extract
from ssd.losses.regression import squared_error
from ssd.masked_branch import MaskedBranch, painted, square_patch
from ssd.masking.batch import masks_for
from ssd.normalisers import patchified
from ssd.pictures.attention import attention_sheet, spread
from ssd.pictures.components import all_patches, component_maps, component_sheet, fit_basis
from ssd.pictures.neighbours import named, nearest, neighbour_sheet
from ssd.pictures.portraits import Portraits, portraits_of
from ssd.pictures.prototypes import answers_of, most_used, patch_in_place, prototype_sheet
from ssd.pictures.reconstruction import reconstruction_sheet
from ssd.pictures.sheet import CELL, colours_of
from ssd.verbs.loading import check_pictures, load_data, load_module
from ssd.views.view import PictureViews

INSIDE = ("attention", "pca", "neighbours", "prototypes", "reconstruction")
OF_PICTURES = ("attention", "prototypes", "reconstruction")
MOST = 64  # samples
ALIKE = 8  # neighbours of each, and pictures of a prototype
SEARCHED = 1000  # training samples in which prototypes are looked for
AT_ONCE = 50

Look = tuple[Image.Image, list[str], dict[str, Any]]


def look_inside(arguments: argparse.Namespace, chosen: list[str]) -> Look:
    """A picture, what to say of it, and its content as JSON."""
    module, about = load_module(arguments.file)
    data = load_data(chosen, about, "look")
    if arguments.show in OF_PICTURES:
        check_pictures(data, f"look --show {arguments.show}")
    backbone = module.evaluated_backbone
    check_of_data(arguments, data)
    if arguments.size is not None:
        data.views = replace(data.views, evaluation_size=sized(arguments.size, backbone))
    if torch.cuda.is_available():
        module.cuda()
    held_out = data.test_dataloader()[-1].dataset
    portraits = portraits_of(held_out, arguments.bands)
    if arguments.show == "prototypes":
        return prototypes(arguments, module, data)
    rows = evenly(min(arguments.samples, MOST), len(held_out))
    looks, batch = looked_at(held_out, rows, data.evaluation_collate())
    if not looks:
        raise UserError(
            f"none of the held-out {portraits.word} can be read, so there is nothing to show. Give other data by --data."
        )
    names = [held_out.source.describe(index) for index in batch["index"].tolist()]
    if arguments.show == "pca":
        return components(arguments, backbone, portraits, looks, batch, names)
    if arguments.show == "neighbours":
        return neighbours(arguments, backbone, data, portraits, looks, batch, names)
    pictures = [portraits.whole(look) for look in looks]
    if arguments.show == "attention":
        return attention(arguments, backbone, pictures, batch, names)
    return reconstruction(arguments, module, data, pictures, batch, names)


def check_of_data(arguments: argparse.Namespace, data: Any) -> None:
    """Raises UserError for settings that sounds do not have."""
    for name in ("size", "bands"):
        if getattr(arguments, name) is not None and not isinstance(data.views, PictureViews):
            raise UserError(f"--{name} does not go with {type(data).__name__}. Leave it out.")


def sized(size: int, backbone: Any) -> int:
    """Raises UserError for a side that a transformer's patches do not divide."""
    patch = backbone.patch_size if "visible" in backbone.can else 1
    wrong = [side for side in (patch if isinstance(patch, tuple) else (patch,)) if size % side]
    if wrong:
        raise UserError(
            f"--size {size} does not divide into patches of {wrong[0]} px. Use a multiple, for instance "
            f"{max(1, size // wrong[0]) * wrong[0]}."
        )
    return size


def attention(
    arguments: argparse.Namespace, backbone: Any, pictures: list[np.ndarray], batch: dict[str, Tensor], names: list[str]
) -> Look:
    with torch.no_grad():
        found = backbone.attention_map(batch["sample"].to(device_of(backbone)))
    told = [f"row {row}: {name}" for row, name in enumerate(names, start=1)]
    rows = [
        {"picture": name, "spread": spread(shares).tolist()} for name, shares in zip(names, found.shares.float().cpu())
    ]
    heads, grid = found.shares.shape[1], found.grid
    what = f"{len(names)} pictures, attention of the {found.query} in {heads} heads of the last block to {grid[0]} x {grid[1]}"
    content = {"query": found.query, "grid": list(grid), "rows": rows}
    return attention_sheet(pictures, found, arguments.cell or CELL), [*told, f"{what} patches"], content


def components(
    arguments: argparse.Namespace,
    backbone: Any,
    portraits: Portraits,
    looks: list[Any],
    batch: dict[str, Tensor],
    names: list[str],
) -> Look:
    tokens = tokens_of(backbone, batch)
    like = None
    if arguments.like is not None:
        other = tokens_of(load_module(arguments.like)[0].evaluated_backbone, batch)
        if other.grid != tokens.grid:
            raise UserError(
                f"--like {arguments.like} has {by(other.grid)} patches of a sample, and the network has {by(tokens.grid)}. Give "
                "a checkpoint of the same backbone."
            )
        like = fit_basis(all_patches(other)).scores(all_patches(other))
    basis = fit_basis(all_patches(tokens), like)
    order = "row" if portraits.strips else "column"
    told = [f"{order} {number}: {name}" for number, name in enumerate(names, start=1)]
    what = (
        f"{len(names)} {portraits.word}, the three main components of {by(tokens.grid)} patches as red, green and blue"
    )
    wholes = [portraits.whole(look) for look in looks]
    sheet = component_sheet(wholes, component_maps(tokens, basis, portraits), portraits.strips, arguments.cell or CELL)
    return sheet, [*told, what], {"grid": list(tokens.grid), "rows": [{"picture": name} for name in names]}


def neighbours(
    arguments: argparse.Namespace,
    backbone: Any,
    data: Any,
    portraits: Portraits,
    looks: list[Any],
    batch: dict[str, Tensor],
    names: list[str],
) -> Look:
    loaders = data.val_dataloader()
    bank = loaders[0].dataset
    progress = "features" if sys.stdout.isatty() else None
    found = extract(lambda x: backbone(x).pooled(), loaders[0], device_of(backbone), progress=progress)
    with torch.no_grad():
        queries = backbone(network_input(batch).to(device_of(backbone))).pooled().float().cpu()
    own = None
    if len(loaders) == 1:  # without labels the samples are of the bank
        places = {index: place for place, index in enumerate(found.index.tolist())}
        own = torch.tensor([places.get(index, -1) for index in batch["index"].tolist()])
    similarity, rows = nearest(queries, found.features, ALIKE, own)
    chosen = [found.index[row].tolist() for row in rows]
    shown = [[portraits.small(readable(bank, index)) for index in row] for row in chosen]
    labels = [found.labels[row].tolist() for row in rows]
    asked = [portraits.small(look) for look in looks]
    sheet = neighbour_sheet(
        asked, shown, similarity, batch["label"].tolist(), labels, data.classes, arguments.cell or CELL
    )
    told = [f"row {row}: {name}" for row, name in enumerate(names, start=1)]
    content = {
        "rows": [
            {
                "picture": name,
                "class": named(label, data.classes),
                "neighbours": [bank.source.describe(index) for index in row],
                "similarity": near,
                "classes": [named(other, data.classes) for other in others],
            }
            for name, label, row, near, others in zip(
                names, batch["label"].tolist(), chosen, similarity.tolist(), labels
            )
        ]
    }
    what = f"{len(names)} {portraits.word} and their {rows.shape[1]} nearest of {len(found.index)} training {portraits.word}"
    return sheet, [*told, what], content


def reconstruction(
    arguments: argparse.Namespace,
    module: Any,
    data: Any,
    pictures: list[np.ndarray],
    batch: dict[str, Tensor],
    names: list[str],
) -> Look:
    normalized = getattr(module, "normalize_pixels", None)
    if not isinstance(module.student, MaskedBranch) or normalized is None:
        raise UserError(
            f"{type(module).__name__} predicts no pixels, so it paints nothing. Show attention, pca or neighbours, or give a "
            "checkpoint of MAE, DMAE or FurtherPretraining."
        )
    samples = batch["sample"].to(device_of(module))
    recipe, grid = module.masking["global"], module.student.backbone.grid(*samples.shape[2:])
    masks = masks_for(recipe, 1, len(samples), grid, data.seed, 0)
    hidden = map_tensors(masks, lambda tensor: tensor.to(samples.device))
    with torch.no_grad():
        answers = painted(module.student, samples, hidden, normalized)
        whole = patchified(samples.float(), square_patch(module.student.backbone))
        wrong = squared_error(patchified(answers, square_patch(module.student.backbone)), whole)  # (B, N)
    errors = torch.where(masks.boolean[0], wrong.cpu(), 0).sum(1) / masks.boolean[0].sum(1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    levels = ((answers.cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    shown = [colours_of(picture.permute(1, 2, 0).numpy(), arguments.bands) for picture in levels]
    told = [f"row {row}: {name}, error {error:.3f}" for row, (name, error) in enumerate(zip(names, errors.tolist()), 1)]
    count = int(masks.boolean[0, 0].sum())
    what = f"{len(names)} pictures, {count} of {masks.boolean.shape[2]} patches hidden and painted"
    if normalized:
        what += ", each at the brightness and contrast that its patch has"
    rows = [{"picture": name, "error": error} for name, error in zip(names, errors.tolist())]
    sheet = reconstruction_sheet(pictures, masks.boolean[0], shown, arguments.cell or CELL)
    return sheet, [*told, what], {"hidden": count, "rows": rows}


def prototypes(arguments: argparse.Namespace, module: Any, data: Any) -> Look:
    network = module.teacher.network if module.teacher.follows else module.student
    bank = data.val_dataloader()[0].dataset
    portraits = portraits_of(bank, arguments.bands)
    rows = evenly(SEARCHED, len(bank))
    features, looks, indices, grid = [], [], [], (1, 1)
    prototypes, what = torch.zeros(0), ""
    batches = [rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)]
    for part in track(batches, "answers", disable=not sys.stdout.isatty()):
        seen, batch = looked_at(bank, part, data.evaluation_collate())
        with torch.no_grad():
            tokens = network.backbone(batch["sample"].to(device_of(network)))
            answers, what = answers_of(network, tokens)
        grid = tokens.grid
        features.append(answers.features.float().cpu())
        prototypes = answers.prototypes.float().cpu()
        looks += seen
        indices += batch["index"].tolist()
    patches = grid[0] * grid[1] if what == "patches" else 1
    shown = most_used(Scores(torch.cat(features), prototypes), min(arguments.samples, MOST), ALIKE, patches)

    def picture(row: int) -> np.ndarray:
        look = portraits.whole(looks[row // patches])
        return patch_in_place(look, row % patches, grid) if what == "patches" else look

    pictures = [[picture(row) for row in found if row >= 0] for found in shown.rows.tolist()]
    sheet = prototype_sheet(shown, pictures, what, arguments.cell or CELL)
    content = {
        "of": what,
        "rows": [
            {
                "prototype": number,
                "share": share,
                "pictures": [bank.source.describe(indices[row // patches]) for row in found if row >= 0],
            }
            for number, share, found in zip(shown.numbers.tolist(), shown.shares.tolist(), shown.rows.tolist())
        ],
    }
    text = f"the {len(pictures)} most used of {len(prototypes)} prototypes, with the {what} of {len(looks)} training pictures"
    return sheet, [f"{text} that score highest"], content


def tokens_of(backbone: Any, batch: dict[str, Tensor]) -> Tokens:
    """Of an evaluation batch, float32 on the CPU. Raises UserError for a network that answers one patch."""
    with torch.no_grad():
        tokens = backbone(network_input(batch).to(device_of(backbone)))
    if len(tokens.patches[0]) < 2:
        raise UserError(
            f"the network answers one patch for samples of {batch['sample'].shape[-1]} px, so there is no map to show. Show it "
            "larger ones by --size."
        )
    valid = None if tokens.valid is None else tokens.valid.cpu()
    return replace(tokens, patches=tokens.patches.float().cpu(), valid=valid)


def by(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))


def readable(samples: Any, index: int) -> Any:
    """The look at a sample that was readable before."""
    item = samples[index]
    assert item is not None, "it was embedded"
    return item["sample"]


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
