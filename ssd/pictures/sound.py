"""Sounds as a waveform over a log-mel spectrogram, and when each view was taken."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ssd.batch import Batch
from ssd.frames import Frames
from ssd.pictures.layout import FAINT, INK, LINE, Colour, font, stacked, with_margin
from ssd.pictures.sheet import COLOURS
from ssd.spectrogram import MELS, log_mel

RANGE_DB = 70  # below the loudest, where the picture is black
WAVE_HEIGHT, ROW_HEIGHT = 40, 2  # px, of the waveform and of one mel band
LONGEST = 1000  # px, of a whole sound


def sound_picture(samples: Tensor, rate_hz: int, wide: int) -> Image.Image:
    """The waveform (S,), at its own full height, over the spectrogram; low tones at the bottom."""
    return stacked([waveform(samples, wide), spectrogram(samples, rate_hz, wide, MELS * ROW_HEIGHT)], gap=1)


def spectrogram(samples: Tensor | np.ndarray, rate_hz: int, wide: int, high: int) -> Image.Image:
    """Log-mel levels of (S,), low tones at the bottom."""
    levels = log_mel(torch.as_tensor(samples), rate_hz)
    shown = ((levels - levels.max()) / RANGE_DB + 1).clamp(0, 1).flip(0).numpy()
    coloured = (255 * matplotlib.colormaps["magma"](shown)[:, :, :3]).astype(np.uint8)
    return Image.fromarray(coloured).resize((wide, high), Image.Resampling.BILINEAR)


def waveform(samples: Tensor, wide: int) -> Image.Image:
    """The smallest and the largest value of each pixel's samples, joined."""
    picture = Image.new("RGB", (wide, WAVE_HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    values = samples.float().numpy()
    middle, largest = (WAVE_HEIGHT - 1) / 2, max(peak(samples), 1e-12)
    for x, part in enumerate(np.array_split(values, wide)):
        low, high = (part.min(), part.max()) if len(part) else (0.0, 0.0)
        pen.line((x, middle - middle * high / largest, x, middle - middle * low / largest), fill=(70, 90, 130))
    return picture


def peak(samples: Tensor) -> float:
    """The largest value either way, of full scale."""
    return float(samples.abs().max()) if len(samples) else 0.0


def sound_sheet(
    batch: Batch,
    originals: Sequence[Tensor],
    places_s: Sequence[dict[str, list[tuple[float, float]]]],
    rate_hz: int,
    frames: Mapping[str, Frames] | None = None,
) -> Image.Image:
    """For each sample the whole sound with the time of every view, then each view as the network gets it, at one scale.

    Args:
        batch: views (V, B, S) with `valid`; padding is left out.
        originals: whole sounds (S,).
        places_s: of each sample, kind -> start and end of each view, s.
        frames: kind -> which samples each token sees, of kinds whose masks hide moments; they are shown grey.
    """
    tints = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(batch.views)}
    longest = max(map(len, originals))
    blocks = []
    for row, (original, places) in enumerate(zip(originals, places_s, strict=True)):
        scale = LONGEST / longest
        wide = max(1, round(len(original) * scale))
        duration_s = len(original) / rate_hz
        parts = [
            line(f"sound of {duration_s:.2f} s at {rate_hz} Hz, peak {peak(original):.2f}", INK),
            sound_picture(original, rate_hz, wide),
            spans(places, tints, duration_s, wide),
        ]
        for kind, views in batch.views.items():
            for number, view in enumerate(views[:, row]):
                samples = view.detach().cpu()
                if kind in batch.valid:
                    samples = samples[batch.valid[kind][number, row].cpu()]
                start, end = places[kind][number]
                title = f"{kind} {number + 1}: {start:.2f} to {end:.2f} s, peak {peak(samples):.2f}"
                shown = sound_picture(samples, rate_hz, max(1, round(len(samples) * scale)))
                if frames and kind in frames:
                    hidden = batch.masks[kind].boolean[number, row]
                    seen = hidden[: frames[kind].count(len(samples))]
                    shown = hide_moments(shown, seen, frames[kind], len(samples))
                    title += f", {int(seen.sum())} of {len(seen)} tokens hidden"
                parts += [line(title, tints[kind]), shown]
        blocks.append(stacked(parts, gap=3))
    return with_margin(stacked(blocks, gap=24))


def hide_moments(picture: Image.Image, hidden: Tensor, frames: Frames, samples: int) -> Image.Image:
    """Grey over the moments of hidden tokens (T,), each as wide as a hop, around the middle of what it sees."""
    scale, first = picture.width / samples, (frames.receptive_field - frames.hop) / 2
    veil = Image.new("L", picture.size, 0)
    pen = ImageDraw.Draw(veil)
    for token in hidden.nonzero()[:, 0].tolist():
        left, right = ((first + place * frames.hop) * scale for place in (token, token + 1))
        pen.rectangle((round(left), 0, round(right) - 1, picture.height), fill=190)
    return Image.composite(Image.new("RGB", picture.size, (128, 128, 128)), picture, veil)


def line(text: str, colour: Colour = FAINT) -> Image.Image:
    picture = Image.new("RGB", (int(font().getlength(text)) + 2, LINE), "white")
    ImageDraw.Draw(picture).text((0, 0), text, fill=colour, font=font())
    return picture


def spans(
    places: dict[str, list[tuple[float, float]]], tints: dict[str, Colour], duration_s: float, wide: int
) -> Image.Image:
    """A line for each view, from its start to its end, of the whole sound's width."""
    bars = Image.new("RGB", (wide, 6 * sum(map(len, places.values()))), "white")
    pen = ImageDraw.Draw(bars)
    y = 0
    for kind, table in places.items():
        for start, end in table:
            left, right = (round(edge / duration_s * (wide - 1)) for edge in (start, end))
            pen.rectangle((left, y, max(left + 1, right), y + 3), fill=tints[kind])
            y += 6
    return bars
