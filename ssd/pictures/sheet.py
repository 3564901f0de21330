"""A batch as a picture to look at: each sample's original with its crops, its views, and what masks hide of them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ssd.batch import Batch
from ssd.errors import UserError
from ssd.views.parameters import Box

CELL = 160  # px
GAP = 6
HEADING = 16
HIDDEN = 0.85  # share of grey where a token is masked
COLOURS = ((230, 60, 50), (40, 110, 230), (30, 160, 80), (200, 120, 0), (150, 60, 190))  # of the kinds of views


def sheet(
    batch: Batch,
    originals: Sequence[np.ndarray],
    mean: Sequence[float],
    std: Sequence[float],
    bands: Sequence[int] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """One row a sample: the original with the crop of every view drawn in, then the views as a network sees them.

    Args:
        batch: pictures (V, B, C, h, w), normalised; `boxes` are drawn where there are some, and tokens that `masks`
            hide are greyed out, of a kind's first views where there are masks for fewer of them, under the first of
            several masks.
        originals: B arrays (H, W, C) uint8 that the boxes refer to.
        mean, std: of each channel in [0, 1], to be undone.
        bands: channels shown as red, green and blue, or one as grey; null = `colours_of`'s choice.
        cell: side of a picture on the sheet, px.
    """
    columns = [(kind, view) for kind, views in batch.views.items() for view in range(len(views))]
    wide, high = (GAP + count * (cell + GAP) for count in (1 + len(columns), len(batch)))
    page = Image.new("RGB", (wide, high + HEADING), "white")
    pen = ImageDraw.Draw(page)
    tints = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(batch.views)}

    def place(picture: Image.Image, row: int, column: int) -> None:
        left, top = GAP + column * (cell + GAP), HEADING + GAP + row * (cell + GAP)
        page.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))

    pen.text((GAP, 3), "original", fill="black")
    for number, (kind, view) in enumerate(columns, start=1):
        pen.text((GAP + number * (cell + GAP), 3), f"{kind} {view + 1}", fill=tints[kind])
    for row, original in enumerate(originals):
        boxes = {kind: table[:, row].tolist() for kind, table in batch.boxes.items()}
        place(with_boxes(original, boxes, tints, bands, cell), row, 0)
        for number, (kind, view) in enumerate(columns, start=1):
            picture = colours_of(denormalised(batch.views[kind][view, row], mean, std), bands)
            masks = batch.masks.get(kind)
            if masks is not None and view < len(masks.boolean):
                picture = with_masked(picture, masks.boolean[view, row])
            place(fitted(picture, cell), row, number)
    return page


def denormalised(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(C, h, w) normalised -> (h, w, C) uint8, cut off at black and white."""
    center, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
    values = (view.detach().float().cpu() * spread + center) * 255
    return values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def colours_of(picture: np.ndarray, bands: Sequence[int] | None = None) -> np.ndarray:
    """Any number of channels, (H, W, C) uint8, as red, green and blue, (H, W, 3) uint8.

    Without `bands`: one or two channels show the first as grey, three or four the first three; of more each colour is
    the mean of a third of them, in their order, so that no channel is unseen. Raises UserError for bands that are
    not there.
    """
    channels = picture.shape[2]
    if bands is not None:
        if len(bands) not in (1, 3) or not all(0 <= band < channels for band in bands):
            raise UserError(
                f"bands are {' '.join(map(str, bands))}, and there are {channels} channels. Give one or three numbers "
                f"from 0 to {channels - 1}."
            )
        return np.ascontiguousarray(np.broadcast_to(picture[:, :, list(bands)], (*picture.shape[:2], 3)))
    if channels < 3:
        return np.repeat(picture[:, :, :1], 3, axis=2)
    if channels < 5:
        return np.ascontiguousarray(picture[:, :, :3])
    thirds = np.array_split(picture, 3, axis=2)
    return np.stack([np.rint(third.mean(2)) for third in thirds], 2).astype(np.uint8)


def with_masked(picture: np.ndarray, masked: Tensor) -> np.ndarray:
    """(h, w, 3) with the tokens of a square grid greyed out, row by row where masked (N,) is True.

    Raises ValueError where N is no square.
    """
    side = math.isqrt(len(masked))
    if side * side != len(masked):
        raise ValueError(f"{len(masked)} tokens are no square grid, which is what a square view has.")
    grid = masked.cpu().numpy().reshape(side, side)
    height, width = picture.shape[:2]
    hidden = grid[np.arange(height) * side // height][:, np.arange(width) * side // width]
    shown = picture.astype(np.float32)
    shown[hidden] = (1 - HIDDEN) * shown[hidden] + HIDDEN * 128
    return np.rint(shown).astype(np.uint8)


def with_boxes(
    original: np.ndarray,
    boxes: Mapping[str, Sequence[Sequence[float]]],
    tints: Mapping[str, tuple[int, int, int]],
    bands: Sequence[int] | None,
    cell: int,
) -> Image.Image:
    """The original, fitted, with the rectangle of every view in its kind's colour; kind -> views with `Box`'s columns."""
    picture = fitted(colours_of(original, bands), cell)
    pen = ImageDraw.Draw(picture)
    scale = picture.width / original.shape[1], picture.height / original.shape[0]
    for kind, table in boxes.items():
        for box in table:
            left, top = box[Box.LEFT] * scale[0], box[Box.TOP] * scale[1]
            right, bottom = left + box[Box.WIDTH] * scale[0], top + box[Box.HEIGHT] * scale[1]
            # the last pixel inside, so that the crop of a whole picture is seen
            pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=tints.get(kind, "black"))
    return picture


def fitted(picture: np.ndarray, cell: int, wide: int | None = None) -> Image.Image:
    """As large as fits into the cell, `wide` across where it is no square; small pictures show their pixels."""
    height, width = picture.shape[:2]
    scale = min(cell / height, (wide or cell) / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return Image.fromarray(picture).resize(size, how)
