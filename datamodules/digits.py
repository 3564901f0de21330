"""The digits that come with scikit-learn."""

from typing import Any

from datamodules.pictures import PictureData
from ssd.data.digits import DigitsSource
from ssd.data.sources import Source


class Digits(PictureData):
    """1,297 handwritten digits to train on and 500 held out, 8x8 and grey.

    Args:
        batch_size: samples a step on each process.
        num_workers: processes that load.
        channels: 1, or 3 for a network that wants colour.
    """

    def __init__(self, *, batch_size: int = 128, num_workers: int | None = 0, channels: int = 1, **loading: Any):
        super().__init__(batch_size=batch_size, num_workers=num_workers, channels=channels, **loading)

    def sources(self) -> tuple[Source, Source | None]:
        return DigitsSource("train"), DigitsSource("val")
