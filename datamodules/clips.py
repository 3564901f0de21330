"""Clips in video files."""

import multiprocessing
from pathlib import Path
from typing import Any

from datamodules.base import choose
from datamodules.colour import ColourData
from datamodules.files import FileData
from ssd.data.broken import BrokenSamples
from ssd.data.cache import AUTO_BYTES
from ssd.data.clip_cache import ClipCache
from ssd.data.clip_samples import (
    ClipReader,
    CollateClips,
    CollateEvaluationClips,
    EvaluationClips,
    TrainingClips,
    survey_clips,
)
from ssd.data.clips import VIDEO_SUFFIXES, import_av
from ssd.data.sources import Source
from ssd.errors import UserError
from ssd.native import views as native
from ssd.views import clips as clip_views
from ssd.views.clips import ClipViews


class Clips(FileData, ColourData):
    """Clips under one path, read through PyAV (`pip install ssd[video]`); the method's views are `ClipViews`.

    Args:
        channels: 1 or 3.
        short_side: px to which frames are shrunk while they are decoded; "auto" = what the views need, null = as
            recorded. Crops and `boxes` are in pixels of the shrunk clip.
        cache: keep decoded clips in memory: true, false, the most GiB to take, or "auto" = when all of them take less
            than 1 GiB.
    """

    sample_word = "clip"
    views_class = ClipViews
    suffixes = VIDEO_SUFFIXES
    colours_by = clip_views
    collate_class = CollateClips
    views: ClipViews

    def __init__(
        self,
        path: str | Path,
        val_path: str | Path | None = None,
        *,
        channels: int = 3,
        short_side: int | str | None = "auto",
        cache: bool | float | str = "auto",
        **loading: Any,
    ):
        super().__init__(path, val_path, channels=channels, **loading)
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}. Clips have 1 (grey) or 3.")
        if isinstance(short_side, bool) or (isinstance(short_side, int) and short_side < 1):
            raise UserError(f"short_side is {short_side!r}. Use px, 1 or more, 'auto' or null for the recorded size.")
        if isinstance(short_side, str):
            choose("short_side", short_side, ("auto",))
        if isinstance(cache, str):
            choose("cache", cache, ("auto",))
        elif not isinstance(cache, bool) and not cache > 0:
            raise UserError(f"cache is {cache!r}. Use true, false, 'auto' or the most GiB to take, above 0.")
        self.short_side = short_side
        self.cache = cache

    def training_samples(self, source: Source, broken: BrokenSamples) -> TrainingClips:
        import_av()
        native.available()  # compiled here, once, and not by every worker
        found = survey_clips(self._reader(source), broken)
        self.mean, self.std = self.given or (found.mean, found.std)
        clips = self._reader(source, self._cache(source, found.bytes_per_picture))
        return TrainingClips(clips, self.views, broken, seed=self.seed, variants=self.view_variants)

    def _cache(self, source: Source, bytes_per_clip: float) -> ClipCache | None:
        capacity = int(bytes_per_clip * len(source) * 1.1) + 2**16
        if self.cache is False or (self.cache == "auto" and capacity > AUTO_BYTES):
            return None
        if not isinstance(self.cache, bool | str):
            capacity = min(capacity, int(self.cache * 2**30))
        return ClipCache(len(source), capacity, multiprocessing.get_context(self.start_method))

    def _reader(self, source: Source, cache: ClipCache | None = None) -> ClipReader:
        short_side = self.views.decoded_size if self.short_side == "auto" else self.short_side
        assert not isinstance(short_side, str), "checked when built"
        return ClipReader(source, self.channels, short_side, cache)

    def evaluation_samples(self, source: Source, broken: BrokenSamples) -> EvaluationClips:
        return EvaluationClips(self._reader(source), self.views, broken)

    def evaluation_collate(self) -> CollateEvaluationClips:
        return CollateEvaluationClips(self.mean, self.std, self.views)
