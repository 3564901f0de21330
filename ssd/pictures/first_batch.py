"""The views of a batch of clips or sounds beside what they were taken from."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ssd.batch import Batch
from ssd.data.clip_samples import TrainingClips
from ssd.data.dataset import evenly
from ssd.data.sound import Sound
from ssd.pictures.clips import clip_sheet
from ssd.pictures.sound import sound_sheet
from ssd.views.sound import draw_windows

STRIP = 12  # frames of a whole clip
FRAME = 96  # px, side of one

Spans = dict[str, list[tuple[float, float]]]
"""Kind -> first and last moment of each view, s."""


def clips_of(batch: Batch, dataset: TrainingClips, data: Any, cell: int = FRAME) -> Image.Image:
    """Strips of the clips and of their views."""
    originals, durations_s = [], []
    for index in batch.index.tolist():
        timeline, shown, frames = dataset.clips.read(index, lambda timeline: np.array(evenly(STRIP, len(timeline))))
        originals.append((frames, timeline.seconds[shown]))
        durations_s.append(timeline.duration_s)
    slots = data.masks["global"].grid[0] if "global" in data.masks else 0
    return clip_sheet(batch, originals, durations_s, data.mean, data.std, cell, slots)


def sounds_of(batch: Batch, loader: Any, data: Any) -> tuple[Image.Image, list[Spans]]:
    """Pictures of the sounds and of their views, and where each view lies in its sound. `batch` is the loader's first, or
    begins it."""
    rate_hz = data.views.rate_hz
    originals, spans = [], []
    for place, index in zip(next(iter(loader.batch_sampler)), batch.index.tolist()):
        with Sound(data.source.open(index)) as sound:
            originals.append(torch.from_numpy(sound.read_at(rate_hz)))
        windows = draw_windows(data.views, len(originals[-1]), None, data.seed, *place[:3])
        spans.append(
            {
                kind: [(window.start / rate_hz, (window.start + window.count) / rate_hz) for window in table]
                for kind, table in windows.items()
            }
        )
    over_time = {kind: plan.frames for kind, plan in data.masks.items() if plan.frames and len(plan.grid) == 1}
    return sound_sheet(batch, originals, spans, rate_hz, over_time), spans
