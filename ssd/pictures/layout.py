"""Cells in rows under headings: how every picture of a network is laid out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ssd.pictures.sheet import fitted

GAP = 8  # px
LINE = 15  # of text
FRAME = 3
INK, FAINT = (25, 25, 25), (110, 110, 110)

Colour = tuple[int, int, int]


@dataclass
class Cell:
    """
    Args:
        picture: (h, w, 3) uint8.
        caption: one line below it, cut off at the cell's width.
        frame: colour around it, None for none.
    """

    picture: np.ndarray
    caption: str = ""
    frame: Colour | None = None


def table(
    rows: Sequence[Sequence[Cell]],
    headings: Sequence[str] = (),
    titles: Sequence[str] = (),
    cell: int = 96,
    wide: int | None = None,
) -> Image.Image:
    """Rows of cells from the left, of any number each.

    Args:
        headings: one above each column, or none.
        titles: one line above each row, or none.
        cell: side of a cell, px; pictures fill it as far as their shape allows.
        wide: width of a cell where it is no square, px.
    """
    wide = wide or cell
    columns = max(map(len, rows))
    below = LINE if any(found.caption for row in rows for found in row) else 0
    above = LINE if titles else 0
    pitch = above + cell + below + GAP
    top = GAP + (LINE if headings else 0)
    page = Image.new("RGB", (GAP + columns * (wide + GAP), top + len(rows) * pitch), "white")
    pen = ImageDraw.Draw(page)
    for number, heading in enumerate(headings):
        pen.text((GAP + number * (wide + GAP), GAP // 2), cut_off(heading, wide), fill=INK, font=font())
    for number, row in enumerate(rows):
        y = top + number * pitch
        if titles:
            pen.text((GAP, y - 2), titles[number], fill=INK, font=font())
        for column, found in enumerate(row):
            x = GAP + column * (wide + GAP)
            picture = fitted(found.picture, cell, wide)
            left, upper = x + (wide - picture.width) // 2, y + above + (cell - picture.height) // 2
            page.paste(picture, (left, upper))
            if found.frame is not None:
                box = (left, upper, left + picture.width - 1, upper + picture.height - 1)
                pen.rectangle(box, outline=found.frame, width=FRAME)
            if found.caption:
                pen.text((x, y + above + cell), cut_off(found.caption, wide), fill=FAINT, font=font())
    return page


def stacked(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """One below the other, on white."""
    high = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (max(picture.width for picture in pictures), high), "white")
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def with_margin(picture: Image.Image) -> Image.Image:
    return ImageOps.expand(picture, GAP, "white")


@cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)


def cut_off(text: str, width: int) -> str:
    """As much of a line as fits, with three dots where some of it does not."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
