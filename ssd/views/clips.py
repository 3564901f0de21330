"""Views of clips: which frames, and one crop, flip and colour setting for all frames of a view.

A clip is its frames side by side: what a picture's view draws is drawn once for a clip's view, and applied to each of
its frames. The time of a view is drawn from numbers of its own, so that it moves nothing else.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssd.data.randomness import uniforms_of_many
from ssd.data.timeline import Timeline
from ssd.errors import UserError
from ssd.views import photometry
from ssd.views.geometry import crop_into, evaluation_picture
from ssd.views.parameters import Box
from ssd.views.view import PictureViews, View, check_count, check_scale, check_size, is_number, keep_as_tuples

TIME = -4  # key of the numbers that place views in time
ROUNDING_S = 1e-6  # times of frames are whole numbers of small units, times asked for are not


class ClipBox(enum.IntEnum):
    """Columns of a clip's box: those of `Box`, in pixels of the clip as it was decoded, and the times of the first and
    the last frame, s from the start of the clip.
    """

    LEFT = 0
    TOP = 1
    WIDTH = 2
    HEIGHT = 3
    FLIP = 4
    START_S = 5
    END_S = 6


@dataclass(frozen=True)
class ClipView(View):
    """A view of a clip: `frames` frames by time, `fps` of them a second, or every `step`-th frame.

    Beyond its end a clip stands still: its last frame is shown again.

    Args:
        frames: number of frames.
        fps: frames a second, or None.
        step: frames from one to the next, or None.
    """

    frames: int = 16
    fps: float | None = 8.0
    step: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_times(self.frames, self.fps, self.step)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.frames, self.size, self.size)


def check_times(frames: int, fps: float | None, step: int | None, kind: str = "") -> None:
    """Raises UserError for frames that cannot be placed in time; `kind` stands before the settings' names."""
    check_count(f"{kind}frames", frames)
    if (fps is None) == (step is None):
        raise UserError(
            f"{kind}fps is {fps!r} and {kind}step is {step!r}. Give one of them, and null for the other: frames by time or "
            "every step-th frame."
        )
    if fps is not None and (not is_number(fps) or not 0 < fps < 10_000):
        raise UserError(f"{kind}fps is {fps!r}. Give frames a second, a number above 0.")
    if step is not None:
        check_count(f"{kind}step", step)


@dataclass(frozen=True, kw_only=True)
class ClipViews(PictureViews):
    """Global and local views of every clip: local ones smaller in space and shorter in time.

    Spatial settings and colours are those of `DINOViews`; solarisation is left out.

    Args:
        global_count: number of global views, 1 or more.
        global_size: side of the global views, px.
        global_scale: smallest and largest share of the picture's area in a global view.
        global_frames: frames of a global view.
        global_fps: frames a second in a global view; null where `global_step` is given. `global_frames` 16 and
            `global_fps` 8 span 2 s.
        global_step: or every so many-th frame.
        local_count: number of local views, 0 or more.
        local_size: side of the local views, px.
        local_scale: smallest and largest share of the picture's area in a local view.
        local_frames: frames of a local view.
        local_fps: frames a second in a local view; null where `local_step` is given.
        local_step: or every so many-th frame.
        ratio: narrowest and widest crop, width / height.
        flip: probability of a left-right flip.
        jitter: how far brightness, contrast, saturation and hue move.
        jitter_prob: probability that a view is jittered.
        grey_prob: probability that a view loses its colour.
        blur_prob: probability of a blur in global and in local views.
        blur_radius: smallest and largest standard deviation of the blur, px.
    """

    global_count: int = 2
    global_size: int = 224
    global_scale: Sequence[float] = (0.4, 1.0)
    global_frames: int = 16
    global_fps: float | None = 8.0
    global_step: int | None = None
    local_count: int = 4
    local_size: int = 96
    local_scale: Sequence[float] = (0.05, 0.4)
    local_frames: int = 8
    local_fps: float | None = 8.0
    local_step: int | None = None
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: Sequence[float] = (0.5, 0.5)
    blur_radius: Sequence[float] = (0.1, 2.0)

    def __post_init__(self):
        keep_as_tuples(self, "global_scale", "local_scale", "ratio", "jitter", "blur_prob", "blur_radius")
        check_count("global_count", self.global_count)
        check_count("local_count", self.local_count, least=0)
        check_size("global_size", self.global_size)
        check_size("local_size", self.local_size)
        check_scale("global_scale", self.global_scale)
        check_scale("local_scale", self.local_scale)
        check_times(self.global_frames, self.global_fps, self.global_step, "global_")
        check_times(self.local_frames, self.local_fps, self.local_step, "local_")
        if len(self.blur_prob) != 2:
            raise UserError(f"blur_prob is {list(self.blur_prob)}. Give two probabilities: global and local views.")
        super().__post_init__()

    def kinds(self) -> dict[str, tuple[ClipView, ...]]:
        def view(name: str, blur_prob: float) -> ClipView:
            return ClipView(
                size=getattr(self, f"{name}_size"),
                scale=getattr(self, f"{name}_scale"),
                ratio=self.ratio,
                flip=self.flip,
                jitter=self.jitter,
                jitter_prob=self.jitter_prob,
                grey_prob=self.grey_prob,
                blur_prob=blur_prob,
                blur_radius=self.blur_radius,
                frames=getattr(self, f"{name}_frames"),
                fps=getattr(self, f"{name}_fps"),
                step=getattr(self, f"{name}_step"),
            )

        kinds = {"global": (view("global", self.blur_prob[0]),) * self.global_count}
        if self.local_count:
            kinds["local"] = (view("local", self.blur_prob[1]),) * self.local_count
        return kinds

    @property
    def image_size(self) -> int:
        return self.global_size

    @property
    def evaluation_lengths(self) -> tuple[int, ...]:
        return (self.kinds()["global"][0].frames, *super().evaluation_lengths)

    @property
    def decoded_size(self) -> int:
        """Short side, px, to which clips are shrunk: that of the evaluation look, and 8 / 7 of the largest view."""
        assert self.evaluation_size is not None, "settled when the recipe was built"
        largest = max(view[0].size for view in self.kinds().values())
        return max(round(self.evaluation_size / self.evaluation_crop), round(largest * 8 / 7))


def shown_frames(timeline: Timeline, view: ClipView, where: float) -> np.ndarray:
    """(frames,) places in the timeline, never falling. `where` in [0, 1): from the earliest start to the latest."""
    last = len(timeline) - 1
    place = np.arange(view.frames)
    if view.step is not None:
        room = max(0, len(timeline) - (view.frames - 1) * view.step)
        return np.minimum(int(where * room) + place * view.step, last)
    assert view.fps is not None, "a view has one of step and fps"
    start_s = where * max(0.0, timeline.duration_s - view.frames / view.fps)
    asked = start_s + place / view.fps + ROUNDING_S
    return np.searchsorted(timeline.seconds, asked, side="right") - 1


def draw_frames(
    views: ClipViews, timelines: Sequence[Timeline], places: Sequence[tuple[int, ...]]
) -> list[dict[str, np.ndarray]]:
    """Which frames each view of each clip shows, a function of its place (seed, epoch, index).

    -> for each clip: kind -> (V, frames) places in its timeline
    """
    kinds = views.kinds()
    count = sum(map(len, kinds.values()))
    numbers = uniforms_of_many((count,), [(*place, TIME) for place in places])
    chosen = []
    for timeline, row in zip(timelines, numbers.tolist(), strict=True):
        where = iter(row)
        chosen.append(
            {
                kind: np.stack([shown_frames(timeline, view, next(where)) for view in members])
                for kind, members in kinds.items()
            }
        )
    return chosen


def empty_clips(views: ClipViews, batch: int, channels: int) -> dict[str, Tensor]:
    """Room for the views of a batch: kind -> (V, B, C, T, size, size) uint8."""
    return {
        kind: torch.empty(len(members), batch, channels, members[0].frames, *[members[0].size] * 2, dtype=torch.uint8)
        for kind, members in views.kinds().items()
    }


def crop_clip(frames: np.ndarray, shown: np.ndarray, box: np.ndarray, out: Tensor) -> None:
    """Frames (n, H, W, C) uint8 of which `shown` (T,) are shown, each cut by the columns of `Box`, into `out`
    (C, T, size, size) uint8."""
    cut = np.ascontiguousarray(box[None, : len(Box)])
    picture = torch.empty(1, out.shape[0], *out.shape[2:], dtype=torch.uint8)
    for place, frame in enumerate(shown.tolist()):
        if not place or frame != shown[place - 1]:
            crop_into(frames[frame], cut, picture)
        out[:, place] = picture[0]


def evaluation_frames(timeline: Timeline, views: ClipViews) -> np.ndarray:
    """(T,) places of the frames of a global view in the middle of the clip."""
    return shown_frames(timeline, views.kinds()["global"][0], 0.5)


def evaluation_clip(frames: np.ndarray, views: ClipViews) -> Tensor:
    """The centre of each frame: (T, H, W, C) uint8 -> (C, T, size, size) uint8"""
    assert views.evaluation_size is not None, "settled when the recipe was built"
    looks = [evaluation_picture(frame, views.evaluation_size, views.evaluation_crop) for frame in frames]
    return torch.stack(looks, dim=1)


def apply(
    clips: Tensor, parameters: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Tensor:
    """`photometry.apply` on every frame with the settings of its clip.

    (V, B, C, T, h, w) uint8 and (V, B, 13) -> (V, B, C, T, h, w) float32, or uint8 without mean and standard deviation. A
    contrast is about the mean of each frame.
    """
    _, samples, _, frames = clips.shape[:4]
    pictures = clips.transpose(2, 3).flatten(1, 2)  # (V, B T, C, h, w)
    settings = parameters.repeat_interleave(frames, dim=1)
    coloured = photometry.apply(pictures, settings, mean, std)
    return coloured.unflatten(1, (samples, frames)).transpose(2, 3)


def normalise(clips: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., C, T, h, w) uint8 -> float32 with `mean` and `std`, in [0, 1], of each channel taken out."""
    return photometry.normalise(clips.transpose(-4, -3), mean, std).transpose(-4, -3)
