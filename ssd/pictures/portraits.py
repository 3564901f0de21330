"""What samples look like, and maps of their tokens in the same places: pictures, clips as strips of frames, sounds as
spectrograms."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from ssd.data.dataset import EvaluationPictures, evenly
from ssd.pictures.sheet import colours_of
from ssd.pictures.sound import spectrogram
from ssd.views.clips import ClipViews
from ssd.views.sound import SoundViews

FRAMES = 8  # of a clip, in a strip
WIDE, NARROW = 512, 128  # px, of a sound


class Portraits(ABC):
    """Draws the evaluation looks of one kind of data.

    Attributes:
        word: what samples are called, in the plural.
        strips: whether they are wide, so that they go below each other.
    """

    word: ClassVar[str]
    strips: ClassVar[bool] = True

    @abstractmethod
    def whole(self, sample: Any) -> np.ndarray:
        """(h, w, 3) uint8 of what an evaluation dataset has of a sample."""

    @abstractmethod
    def small(self, sample: Any) -> np.ndarray:
        """The same in about a square."""

    @abstractmethod
    def laid(self, values: np.ndarray, grid: Sequence[int], valid: Tensor | None = None) -> np.ndarray:
        """Values (N, ...) of the tokens of a grid where `whole` shows them, (rows, columns, ...); those of padding, where
        `valid` (N,) is False, are left out."""


class OfPictures(Portraits):
    word = "pictures"
    strips = False

    def __init__(self, bands: Sequence[int] | None = None):
        self.bands = bands

    def whole(self, sample: Tensor) -> np.ndarray:
        return colours_of(sample.permute(1, 2, 0).numpy(), self.bands)

    small = whole

    def laid(self, values: np.ndarray, grid: Sequence[int], valid: Tensor | None = None) -> np.ndarray:
        return values.reshape(*grid, *values.shape[1:])


class OfClips(Portraits):
    """
    Args:
        frames: of a clip.
    """

    word = "clips"

    def __init__(self, frames: int, bands: Sequence[int] | None = None):
        self.frames, self.bands = frames, bands

    def strip(self, sample: Tensor, count: int) -> list[np.ndarray]:
        return [
            colours_of(sample[:, frame].permute(1, 2, 0).numpy(), self.bands) for frame in evenly(count, self.frames)
        ]

    def whole(self, sample: Tensor) -> np.ndarray:
        return np.concatenate(self.strip(sample, FRAMES), axis=1)

    def small(self, sample: Tensor) -> np.ndarray:
        """Four frames, row by row."""
        shown = self.strip(sample, 4)
        shown += shown[-1:] * (4 - len(shown))
        return np.concatenate([np.concatenate(shown[:2], axis=1), np.concatenate(shown[2:], axis=1)], axis=0)

    def laid(self, values: np.ndarray, grid: Sequence[int], valid: Tensor | None = None) -> np.ndarray:
        slots = values.reshape(*grid, *values.shape[1:])
        shown = [slots[frame * len(slots) // self.frames] for frame in evenly(FRAMES, self.frames)]
        return np.concatenate(shown, axis=1)


class OfSounds(Portraits):
    """Time from left to right, low tones at the bottom, every sound as wide as the others.

    Args:
        rate_hz: samples a second.
    """

    word = "sounds"

    def __init__(self, rate_hz: int):
        self.rate_hz = rate_hz

    def whole(self, sample: Any) -> np.ndarray:
        return np.asarray(spectrogram(sample, self.rate_hz, WIDE, NARROW))

    def small(self, sample: Any) -> np.ndarray:
        return np.asarray(spectrogram(sample, self.rate_hz, NARROW, NARROW))

    def laid(self, values: np.ndarray, grid: Sequence[int], valid: Tensor | None = None) -> np.ndarray:
        over_time = values.reshape(grid[0], -1, *values.shape[1:])  # (t, rows, ...)
        if valid is not None:
            over_time = over_time[: int(valid.reshape(grid[0], -1)[:, 0].sum())]
        return over_time.swapaxes(0, 1)[::-1]


def portraits_of(dataset: Any, bands: Sequence[int] | None = None) -> Portraits:
    """For the samples of an evaluation dataset."""
    if isinstance(dataset, EvaluationPictures):
        return OfPictures(bands)
    if isinstance(dataset.views, ClipViews):
        return OfClips(dataset.views.evaluation_lengths[0], bands)
    assert isinstance(dataset.views, SoundViews), "pictures, clips and sounds are all there is"
    return OfSounds(dataset.views.rate_hz)


def as_large(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) stretched to a picture (h, w, 3), each value a rectangle."""
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
