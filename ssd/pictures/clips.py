"""Clips as filmstrips: time from left to right, and when and where each view was taken."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ssd.batch import Batch
from ssd.pictures.layout import FAINT, LINE, Colour, font, stacked, with_margin
from ssd.pictures.sheet import COLOURS, colours_of, denormalised, fitted, with_boxes, with_masked
from ssd.views.clips import ClipBox

APART = 2  # px between frames
BAR = 5  # px, of a view's place in time


def clip_sheet(
    batch: Batch,
    originals: Sequence[tuple[np.ndarray, np.ndarray]],
    durations_s: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    cell: int = 96,
    slots: int = 0,
) -> Image.Image:
    """For each sample the clip with the crop and the time of every view, then a strip of each view's frames.

    Args:
        batch: views (V, B, C, T, h, w), normalised, with boxes (V, B, 7); what the first of its masks hides of a view is greyed
            out.
        originals: of each sample some frames (n, H, W, C) uint8 that boxes refer to, and their times (n,), s.
        durations_s: of the whole clips.
        mean, std: of each channel in [0, 1], to be undone.
        cell: side of a frame on the sheet, px.
        slots: times that the tokens of a masked view are of.
    """
    tints = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(batch.views)}
    blocks = []
    for row, ((originally, seconds), duration_s) in enumerate(zip(originals, durations_s, strict=True)):
        boxes = {kind: table[:, row].tolist() for kind, table in batch.boxes.items()}
        shown = [
            with_boxes(frame, at(boxes, time), tints, None, cell) for frame, time in zip(originally, seconds.tolist())
        ]
        whole = filmstrip(shown, f"clip of {duration_s:.2f} s, with the crops of the views that show it at the time")
        strips = [whole, timeline(boxes, tints, duration_s, whole.width)]
        for kind, views in batch.views.items():
            for number, view in enumerate(views[:, row]):
                frames = [colours_of(denormalised(frame, mean, std)) for frame in view.transpose(0, 1)]
                masks = batch.masks.get(kind)
                if masks is not None:
                    hidden = masks.boolean[number, row].unflatten(0, (slots, -1))  # (t, h w)
                    frames = [
                        with_masked(frame, hidden[place * slots // len(frames)]) for place, frame in enumerate(frames)
                    ]
                pictures = [fitted(frame, cell) for frame in frames]
                box = boxes[kind][number]
                flipped = ", mirrored" if box[ClipBox.FLIP] else ""
                span = f"{box[ClipBox.START_S]:.2f} to {box[ClipBox.END_S]:.2f} s"
                text = f"{kind} {number + 1}: {len(pictures)} frames, {span}{flipped}"
                strips.append(filmstrip(pictures, text, tints[kind]))
        blocks.append(stacked(strips, gap=4))
    return with_margin(stacked(blocks, gap=20))


def filmstrip(frames: Sequence[Image.Image], text: str, colour: Colour = FAINT) -> Image.Image:
    """Frames in a row under a line of text."""
    wide = sum(frame.width for frame in frames) + APART * (len(frames) - 1)
    strip = Image.new("RGB", (max(wide, int(font().getlength(text)) + 2), LINE + frames[0].height), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill=colour, font=font())
    x = 0
    for frame in frames:
        strip.paste(frame, (x, LINE))
        x += frame.width + APART
    return strip


def at(boxes: Mapping[str, Sequence[Sequence[float]]], second: float) -> dict[str, list[Sequence[float]]]:
    """The boxes of the views that show this time."""
    return {
        kind: [box for box in table if box[ClipBox.START_S] <= second <= box[ClipBox.END_S]]
        for kind, table in boxes.items()
    }


def timeline(
    boxes: Mapping[str, Sequence[Sequence[float]]], tints: Mapping[str, Colour], duration_s: float, wide: int
) -> Image.Image:
    """A line for each view, from its first to its last frame, of the whole clip's width."""
    count = sum(map(len, boxes.values()))
    bars = Image.new("RGB", (wide, count * (BAR + 2)), "white")
    pen = ImageDraw.Draw(bars)
    y = 0
    for kind, table in boxes.items():
        for box in table:
            start, end = (round(box[edge] / duration_s * (wide - 1)) for edge in (ClipBox.START_S, ClipBox.END_S))
            pen.line((0, y + BAR // 2, wide, y + BAR // 2), fill=(225, 225, 225))
            pen.rectangle((start, y, max(start + 1, end), y + BAR - 1), fill=tints[kind])
            y += BAR + 2
    return bars
