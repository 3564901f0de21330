"""One crop, flip and colour for all frames of a view, and which frames those are."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssd.data.timeline import Timeline
from ssd.errors import UserError
from ssd.views import clips, photometry
from ssd.views.clips import (
    ClipView,
    ClipViews,
    crop_clip,
    draw_frames,
    evaluation_clip,
    evaluation_frames,
    shown_frames,
)
from ssd.views.geometry import crop_into, evaluation_picture
from ssd.views.parameters import draw


def timeline(count: int, fps: float = 25.0) -> Timeline:
    return Timeline(np.arange(count), 1 / fps, np.array([0]), 1 / fps)


# ---------------------------------------------------------------- time


def test_frames_by_time_are_those_shown_at_these_times():
    view = ClipView(32, frames=4, fps=5.0)  # 0.8 s of 2 s: 5 recorded frames apart
    assert shown_frames(timeline(50), view, 0.0).tolist() == [0, 5, 10, 15]
    assert shown_frames(timeline(50), view, 0.5).tolist() == [15, 20, 25, 30], "from 0.6 s on"
    late = shown_frames(timeline(50), view, 1 - 1e-9)
    assert late.tolist() == [29, 34, 39, 44] or late.tolist() == [30, 35, 40, 45]


def test_frames_by_step_are_so_many_apart_at_any_rate():
    view = ClipView(32, frames=4, fps=None, step=3)
    for fps in (10.0, 30.0):
        assert shown_frames(timeline(20, fps), view, 0.0).tolist() == [0, 3, 6, 9]
        assert shown_frames(timeline(20, fps), view, 1 - 1e-9).tolist() == [10, 13, 16, 19]


def test_uneven_frames_are_shown_until_the_next_one_comes():
    uneven = Timeline(np.array([100, 110, 190, 200]), 0.01, np.array([0]), 0.01)
    view = ClipView(32, frames=5, fps=4.54)
    assert uneven.duration_s == pytest.approx(1.01)
    assert shown_frames(uneven, view, 0.0).tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("pace", [{"fps": 5.0}, {"fps": None, "step": 6}])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_clip_stands_still_beyond_its_end(pace, count):
    for where in (0.0, 0.9):
        shown = shown_frames(timeline(count), ClipView(32, frames=8, **pace), where)
        assert len(shown) == 8 and shown[0] == 0 and shown[-1] == count - 1
        assert (np.diff(shown) >= 0).all()


def test_starts_are_uniform_keyed_and_independent_of_other_views():
    few = ClipViews(local_count=1, global_frames=2, global_step=1, global_fps=None)
    many = ClipViews(local_count=3, global_frames=2, global_step=1, global_fps=None)
    places = [(0, 0, index) for index in range(2000)]
    lines = [timeline(41)] * len(places)
    drawn, again = draw_frames(few, lines, places), draw_frames(many, lines, places)
    starts = np.array([clip["global"][:, 0] for clip in drawn])
    assert all(np.array_equal(a["global"], b["global"]) for a, b in zip(drawn, again, strict=True))
    counts = np.bincount(starts.ravel(), minlength=40)
    # 40 places, 100 each: chi squared with 39 degrees of freedom is below 73 in 999 of 1000
    assert len(counts) == 40 and ((counts - 100) ** 2 / 100).sum() < 73
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.1
    other = draw_frames(few, lines[:50], [(1, 0, index) for index in range(50)])
    assert any(not np.array_equal(a["global"], b["global"]) for a, b in zip(drawn, other))


def test_time_is_drawn_apart_from_space():
    views = ClipViews()
    before, _ = draw(views, 40, 60, 1, 2, 3)
    draw_frames(views, [timeline(60)], [(1, 2, 3)])
    after, _ = draw(ClipViews(global_frames=3, global_fps=1.0), 40, 60, 1, 2, 3)
    assert all(np.array_equal(before[kind], after[kind]) for kind in before)


def test_the_evaluation_look_is_the_middle():
    views = ClipViews(global_frames=4, global_fps=5.0)
    assert evaluation_frames(timeline(50), views).tolist() == [15, 20, 25, 30]
    assert evaluation_frames(timeline(1), views).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- space


def test_each_frame_is_cropped_as_its_picture_would_be():
    frames = np.random.default_rng(0).integers(0, 255, (3, 30, 40, 3), np.uint8)
    for flip in (0, 1):
        box = np.array([5, 3, 22, 18, flip, 0.0, 1.0], np.float32)
        clip = torch.empty(3, 4, 16, 16, dtype=torch.uint8)
        crop_clip(frames, np.array([0, 1, 1, 2]), box, clip)
        for place, number in enumerate([0, 1, 1, 2]):
            alone = torch.empty(1, 3, 16, 16, dtype=torch.uint8)
            crop_into(frames[number], box[None, :5].copy(), alone)
            assert torch.equal(clip[:, place], alone[0])


def test_each_frame_of_the_evaluation_look_is_that_of_a_picture():
    frames = np.random.default_rng(0).integers(0, 255, (3, 30, 40, 3), np.uint8)
    views = ClipViews(global_size=16)
    clip = evaluation_clip(frames, views)
    looks = [evaluation_picture(frame, 16, views.evaluation_crop) for frame in frames]
    assert torch.equal(clip, torch.stack(looks, 1))


def test_what_is_decoded_is_large_enough_for_every_view():
    assert ClipViews().decoded_size == 256
    assert ClipViews(global_size=112).decoded_size == 128
    assert ClipViews(global_size=32, local_size=96).decoded_size == 110


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("channels", [1, 3])
def test_all_frames_of_a_view_have_its_colours_and_no_others(channels):
    views = ClipViews(local_count=0)
    mean, std = [0.4] * channels, [0.3] * channels
    tables = [draw(views, 40, 60, 0, 0, index)[1]["global"] for index in range(3)]
    settings = torch.from_numpy(np.stack(tables, 1))  # (V, B, P)
    batch = torch.randint(0, 255, (2, 3, channels, 4, 12, 12), dtype=torch.uint8)
    coloured = clips.apply(batch, settings, mean, std)
    assert coloured.shape == batch.shape and coloured.dtype == torch.float32
    for frame in range(4):
        alone = photometry.apply(batch[:, :, :, frame], settings, mean, std)
        # pictures in another number to a matrix product round apart
        assert_close(coloured[:, :, :, frame], alone, atol=1e-4, rtol=0)
    levels = clips.apply(batch, settings)
    assert levels.dtype == torch.uint8
    assert_close(clips.normalise(levels, mean, std), coloured, atol=0.51 / 255 / min(std), rtol=0)
    still = batch[:, :, :, :1].expand(-1, -1, -1, 4, -1, -1)
    changed = clips.apply(still, settings, mean, std)
    assert_close(changed, changed[:, :, :, :1].expand_as(changed), atol=1e-4, rtol=0)


def test_normalising_is_by_channel():
    batch = torch.randint(0, 255, (2, 3, 4, 5, 6), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [1.0, 0.5, 2.0]
    expected = (batch / 255 - torch.tensor(mean)[:, None, None, None]) / torch.tensor(std)[:, None, None, None]
    assert_close(clips.normalise(batch, mean, std), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_fps": 8.0, "global_step": 2}, "global_fps is 8.0 and global_step is 2"),
        ({"global_fps": None}, "Give one of them"),
        ({"local_step": 0, "local_fps": None}, "local_step is 0"),
        ({"global_fps": -1.0}, "global_fps is -1.0"),
        ({"global_frames": 0}, "global_frames is 0"),
        ({"global_count": 0}, "global_count is 0"),
        ({"local_count": -1}, "local_count is -1"),
        ({"blur_prob": [0.5]}, "two probabilities"),
        ({"global_scale": [0, 1]}, "global_scale"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        ClipViews(**settings)
