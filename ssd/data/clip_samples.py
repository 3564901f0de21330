"""From clips of a source to samples and batches."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssd.data.broken import UNREADABLE, BrokenSamples, readable
from ssd.data.clip_cache import ClipCache
from ssd.data.clips import Clip
from ssd.data.dataset import Collate, Samples
from ssd.data.randomness import generator
from ssd.data.sampler import Draws, drawn_for
from ssd.data.sources import Source
from ssd.data.statistics import SIDE, SURVEYED, Survey
from ssd.data.timeline import Timeline
from ssd.views import clips as clip_views
from ssd.views.clips import (
    ClipBox,
    ClipViews,
    crop_clip,
    draw_frames,
    empty_clips,
    evaluation_clip,
    evaluation_frames,
)
from ssd.views.parameters import Box, ViewDraws

REMEMBERED = 2**22  # frames whose times a process keeps, 8 bytes each
NUM_SURVEYED = 200
SURVEYED_FRAMES = 4

Read = tuple[Timeline, np.ndarray, np.ndarray]


class ClipReader:
    """The clips of a source: when their frames are shown, and the frames.

    Args:
        source: `open` gives a binary file, or its bytes.
        short_side: px to which frames are shrunk while they are decoded; None = as recorded.
        cache: where whole decoded clips are kept.
    """

    def __init__(self, source: Source, channels: int, short_side: int | None, cache: ClipCache | None = None):
        self.source, self.channels, self.short_side, self.cache = source, channels, short_side, cache
        self._timelines: OrderedDict[int, Timeline] = OrderedDict()
        self._remembered = 0  # frames in them
        self._full = False  # the cache, as far as this process knows

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_timelines": OrderedDict(), "_remembered": 0}

    def read(self, index: int, choose: Callable[[Timeline], np.ndarray]) -> Read:
        """Timeline, wanted places and their frames (n, H, W, C) uint8; `choose` takes the timeline and gives the places,
        ascending. Raises BrokenClip, or OSError where the file cannot be read.
        """
        if self.cache is not None:
            kept = self.cache.get(index)
            if kept is not None:
                wanted = choose(kept[0])
                return kept[0], wanted, kept[1][wanted]
        known = self._timelines.get(index)
        with Clip(self.source.open(index), known) as clip:  # type: ignore[arg-type]
            timeline = self._remember(index, clip.timeline)
            wanted = choose(timeline)
            if self.cache is None or self._full:
                return timeline, wanted, clip.frames(wanted, self.short_side, self.channels)
            whole = clip.frames(np.arange(len(timeline)), self.short_side, self.channels)
        self._full = not self.cache.put(index, timeline, whole)
        return timeline, wanted, whole[wanted]

    def _remember(self, index: int, timeline: Timeline) -> Timeline:
        if index not in self._timelines:
            self._timelines[index] = timeline
            self._remembered += len(timeline)
        while self._remembered > REMEMBERED and len(self._timelines) > 1:
            _, oldest = self._timelines.popitem(last=False)
            self._remembered -= len(oldest)
        return timeline


class TrainingClips(Dataset[Samples]):
    """Views of the clips at places `(epoch, index)`, drawn for (seed, epoch, index) and nothing else.

    A clip's views share one decoding of the frames that any of them shows. Broken clips and `variants` as in
    `TrainingPictures`.
    """

    def __init__(
        self,
        clips: ClipReader,
        views: ClipViews,
        broken: BrokenSamples,
        *,
        seed: int,
        draws: Draws | None = None,
        variants: int | None = None,
    ):
        self.clips, self.views, self.broken, self.seed = clips, views, broken, seed
        self.draws = draws or Draws(len(clips))
        self.variants = variants

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, place: tuple[int, ...]) -> Samples:
        """A batch of one. Raises UserError when more clips are broken than may be."""
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[tuple[int, ...]]) -> Samples:
        """A batch, all views in one block a kind. Raises as `__getitem__`."""
        room = empty_clips(self.views, len(places), self.clips.channels)
        looks = [drawn_for(place, self.variants) for place in places]
        draws = ViewDraws(self.views, [(self.seed, *look) for look in looks])
        seen: list[int] = []
        boxes: dict[str, list[np.ndarray]] = {kind: [] for kind in room}
        for row, place in enumerate(places):
            found, chosen, (timeline, wanted, frames) = self._readable(place)
            seen.append(found)
            if self.variants is not None and found != place[1]:
                draws.draw_again(row, (self.seed, looks[row][0], found))
            drawn = draws.boxes(row, [(frames.shape[1], frames.shape[2])])
            for kind, shown in chosen.items():
                boxes[kind].append(timed_boxes(drawn[kind][0], timeline, shown))
                for view, places_shown in enumerate(shown):
                    own = np.searchsorted(wanted, places_shown)  # (T,) rows of `frames`
                    crop_clip(frames, own, boxes[kind][-1][view], room[kind][view, row])
        return Samples(
            room,
            {kind: np.stack(tables) for kind, tables in boxes.items()},
            draws.photometry(),
            seen,
            [self.clips.source.label(index) for index in seen],
            getattr(places, "step", 0),
            None if self.variants is None else [look[0] for look in looks],
        )

    def _readable(self, place: tuple[int, ...]) -> tuple[int, dict[str, np.ndarray], Read]:
        """Number of the clip that is seen, kind -> (V, T) places that are shown, and what was read for them."""
        chosen: dict[str, np.ndarray] = {}

        def frames_of(candidate: int) -> Read:
            look = place if self.variants is None else (drawn_for(place, self.variants)[0], candidate)

            def every_frame(timeline: Timeline) -> np.ndarray:
                chosen.update(draw_frames(self.views, [timeline], [(self.seed, *look)])[0])
                return np.unique(np.concatenate([shown.ravel() for shown in chosen.values()]))

            return self.clips.read(candidate, every_frame)

        found, read = readable(frames_of, self.broken, self.draws, self.seed, *place)
        return found, chosen, read


def timed_boxes(boxes: np.ndarray, timeline: Timeline, places: np.ndarray) -> np.ndarray:
    """(V, 5) columns of `Box` and (V, T) places of frames -> (V, 7) columns of `ClipBox`"""
    timed = np.empty((len(boxes), len(ClipBox)), np.float32)
    timed[:, : len(Box)] = boxes
    timed[:, ClipBox.START_S] = timeline.seconds[places[:, 0]]
    timed[:, ClipBox.END_S] = timeline.seconds[places[:, -1]]
    return timed


@dataclass(frozen=True)
class CollateClips(Collate):
    """Samples -> Batch with views (V, B, C, T, h, w)."""

    apply: ClassVar[Callable[..., Tensor]] = staticmethod(clip_views.apply)


class EvaluationClips(Dataset[dict[str, Any] | None]):
    """The evaluation look at each clip, in the middle of its time; None where the clip is broken."""

    def __init__(self, clips: ClipReader, views: ClipViews, broken: BrokenSamples):
        self.clips, self.views, self.broken = clips, views, broken

    @property
    def source(self) -> Source:
        return self.clips.source

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        shown: list[np.ndarray] = []

        def middle(timeline: Timeline) -> np.ndarray:
            shown.append(evaluation_frames(timeline, self.views))
            return np.unique(shown[0])

        try:
            _, wanted, frames = self.clips.read(index, middle)
        except UNREADABLE as error:
            self.broken.add(index, error)
            return None
        look = evaluation_clip(frames[np.searchsorted(wanted, shown[0])], self.views)
        return {"sample": look, "label": self.clips.source.label(index), "index": index}


@dataclass(frozen=True)
class CollateEvaluationClips:
    """-> {"sample": (B, C, T, h, w) float32 normalised, "label": (B,) or -1, "index": (B,)}, broken clips left out."""

    mean: Sequence[float]
    std: Sequence[float]
    views: ClipViews

    def __call__(self, samples: list[dict[str, Any] | None]) -> dict[str, Tensor]:
        whole = [s for s in samples if s is not None]
        frames, size = self.views.global_frames, self.views.evaluation_size or 0
        empty = torch.zeros(0, len(self.mean), frames, size, size, dtype=torch.uint8)
        clips = torch.stack([s["sample"] for s in whole]) if whole else empty
        return {
            "sample": clip_views.normalise(clips, self.mean, self.std),
            "label": torch.tensor([s["label"] for s in whole], dtype=torch.int64),
            "index": torch.tensor([s["index"] for s in whole], dtype=torch.int64),
        }


def survey_clips(clips: ClipReader, broken: BrokenSamples, count: int = NUM_SURVEYED) -> Survey:
    """Means and spreads of four frames each of up to `count` clips, chosen by a fixed shuffle, and the mean size of a
    whole decoded clip. Broken ones are passed over and counted. Raises UserError where too many are broken.
    """
    means, squares, sizes = [], [], []
    for index in np.sort(generator(SURVEYED).permutation(len(clips))[:count]).tolist():
        try:
            timeline, _, frames = clips.read(index, some_frames)
        except UNREADABLE as error:
            broken.add(index, error)
            continue
        _, height, width, channels = frames.shape
        sizes.append(len(timeline) * height * width * channels)
        thin = frames[:, :: max(1, height // SIDE), :: max(1, width // SIDE)]
        values = thin.reshape(-1, channels).astype(np.float64)
        means.append(values.mean(0))
        squares.append(np.square(values).mean(0))
    if not means:
        return survey_clips(clips, broken, count=len(clips))
    mean = np.mean(means, 0)
    variance = np.maximum(np.mean(squares, 0) - mean**2, 1.0)  # a blank channel: one grey level
    return Survey((mean / 255).tolist(), (np.sqrt(variance) / 255).tolist(), float(np.mean(sizes)))


def some_frames(timeline: Timeline) -> np.ndarray:
    """Evenly over the first half: what comes late takes longest to decode."""
    return np.unique(np.linspace(0, len(timeline) // 2, SURVEYED_FRAMES).astype(np.intp))
