"""What folders, lists and stacks of pictures share."""

import multiprocessing
from typing import Any

from datamodules.base import choose
from datamodules.colour import ColourData
from ssd.data.broken import BrokenSamples
from ssd.data.cache import AUTO_BYTES, PictureCache, Pictures
from ssd.data.dataset import CollateEvaluation, EvaluationPictures, TrainingPictures
from ssd.data.pictures import Levels
from ssd.data.sources import Source
from ssd.data.statistics import NUM_SURVEYED, measured_levels, survey
from ssd.errors import UserError
from ssd.native import views as native
from ssd.views.clips import ClipViews
from ssd.views.view import PictureViews, Views

NUM_SIZED = 64  # pictures that tell how large the decoded set is where none need to be measured


class PictureData(ColourData):
    """Pictures. A subclass says in `sources` what there is.

    Args:
        value_range: of pictures of more than 8 bits: "type" = the whole range of 16-bit numbers, "data" = measured for
            each channel on up to 200 pictures, or [black, white], each a number or one for each channel.
        cache: keep decoded pictures in memory; "auto" = when all of them take less than 1 GiB.
    """

    sample_word = "picture"
    views_class = PictureViews
    views: PictureViews

    def __init__(
        self,
        *,
        value_range: str | list[Any] = "type",
        cache: bool | str = "auto",
        **loading: Any,
    ):
        super().__init__(**loading)
        choose("cache", cache, ("auto", True, False))
        self.value_range = value_range
        self.levels = given_levels(value_range)
        self.cache = cache

    def takes(self, views: Views) -> bool:
        """Views of clips are views of pictures over time, which a picture has none of."""
        return super().takes(views) and not isinstance(views, ClipViews)

    def describe_state(self) -> dict[str, Any]:
        levels = self.levels
        state = {"value_range": "type" if levels is None else [list(levels.low), list(levels.high)]}
        return state | super().describe_state()

    def training_samples(self, source: Source, broken: BrokenSamples) -> TrainingPictures:
        native.available()  # compiled here, once, and not by every worker
        if self.value_range == "data":
            self.levels = measured_levels(source, self.channels, broken)
        found = survey(
            Pictures(source, self.channels, levels=self.levels), broken, NUM_SIZED if self.given else NUM_SURVEYED
        )
        self.mean, self.std = self.given or (found.mean, found.std)
        capacity = int(found.bytes_per_picture * len(source) * 1.1) + 2**16
        wanted = capacity <= AUTO_BYTES if self.cache == "auto" else self.cache
        context = multiprocessing.get_context(self.start_method)
        cache = PictureCache(len(source), capacity, context) if wanted else None
        return TrainingPictures(
            Pictures(source, self.channels, cache, self.levels),
            self.views,
            broken,
            seed=self.seed,
            variants=self.view_variants,
        )

    def evaluation_samples(self, source: Source, broken: BrokenSamples) -> EvaluationPictures:
        return EvaluationPictures(Pictures(source, self.channels, levels=self.levels), self.views, broken)

    def evaluation_collate(self) -> CollateEvaluation:
        assert self.views.evaluation_size is not None, "settled when the recipe was built"
        return CollateEvaluation(self.mean, self.std, self.views.evaluation_size)


def given_levels(value_range: Any) -> Levels | None:
    """Levels that need no measuring, None for "type" and for "data"."""
    if isinstance(value_range, str) and value_range in ("type", "data"):
        return None
    mistake = UserError(
        f"value_range is {value_range!r}. Use 'type', 'data' or [black, white], for instance [0, 4095]."
    )
    if not isinstance(value_range, list | tuple) or len(value_range) != 2:
        raise mistake
    try:
        low, high = (
            tuple(float(value) for value in (limit if isinstance(limit, list | tuple) else [limit]))
            for limit in value_range
        )
    except (TypeError, ValueError):
        raise mistake from None
    if len(low) != len(high) or not low or not all(black < white for black, white in zip(low, high, strict=True)):
        raise mistake
    return Levels(low, high)
