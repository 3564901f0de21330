"""What a few pictures say about all of them: channel means, spreads, and the size they have when decoded."""

from dataclasses import dataclass

import numpy as np

from ssd.data.broken import UNREADABLE, BrokenSamples
from ssd.data.cache import Pictures
from ssd.data.pictures import Levels, MeasuredLevels
from ssd.data.randomness import generator
from ssd.data.sources import Source

SURVEYED = -3  # key of the fixed choice of pictures that are measured
NUM_SURVEYED = 2000
NUM_MEASURED = 200
SIDE = 64  # larger pictures are thinned to about this many rows and columns


@dataclass(frozen=True)
class Survey:
    """Mean and standard deviation of each channel in [0, 1], every picture counting alike, and the mean
    size of a decoded picture.
    """

    mean: list[float]
    std: list[float]
    bytes_per_picture: float


def survey(pictures: Pictures, broken: BrokenSamples, count: int = NUM_SURVEYED) -> Survey:
    """Of up to `count` pictures, chosen by a fixed shuffle; broken ones are passed over and counted.

    Raises UserError where too many are broken.
    """
    chosen = np.sort(generator(SURVEYED).permutation(len(pictures))[:count])
    means, squares, sizes = [], [], []
    for index in chosen.tolist():
        try:
            picture = pictures[index]
        except UNREADABLE as error:
            broken.add(index, error)
            continue
        sizes.append(picture.nbytes)
        first, second = moments(thinned(picture))
        means.append(first)
        squares.append(second)
    if not means:
        return survey(pictures, broken, count=len(pictures))
    return Survey(*normalisation(np.mean(means, 0), np.mean(squares, 0)), float(np.mean(sizes)))


def thinned(picture: np.ndarray) -> np.ndarray:
    """(H, W, C) -> some of its pixels, (P, C): about 64 x 64, spread evenly."""
    height, width, channels = picture.shape
    return picture[:: max(1, height // SIDE), :: max(1, width // SIDE)].reshape(-1, channels)


def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of values and of their squares, (C,) float64 each. Pixels (P, C) uint8"""
    # channel by channel, which is several times faster; sums of whole numbers are exact in any order
    values = np.ascontiguousarray(pixels.T).astype(np.float32)
    return values.mean(1, dtype=np.float64), np.square(values).mean(1, dtype=np.float64)


def normalisation(mean: np.ndarray, square: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], from the moments of values up to 255."""
    variance = np.maximum(square - mean**2, 1.0)  # a blank channel: one grey level
    return (mean / 255).tolist(), (np.sqrt(variance) / 255).tolist()


def measured_levels(source: Source, channels: int, broken: BrokenSamples) -> Levels | None:
    """The range of values of up to 200 pictures, chosen by a fixed shuffle; None where all have 8 bits."""
    levels = MeasuredLevels()
    pictures = Pictures(source, channels, levels=levels)
    for index in np.sort(generator(SURVEYED).permutation(len(source))[:NUM_MEASURED]).tolist():
        try:
            _ = pictures[index]
        except UNREADABLE as error:
            broken.add(index, error)
    return levels.levels()
