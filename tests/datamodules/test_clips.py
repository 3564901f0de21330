"""Loaders of clips: the same batches however they are loaded, odd and broken files told apart, one look for a clip."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.clips import Clips
from ssd.data.clips import Clip
from ssd.errors import UserError
from ssd.record import build, describe
from ssd.views.clips import ClipBox, ClipViews, evaluation_clip, normalise
from ssd.views.recipes import DINOViews
from tests.data.media_files import GREY_STEP, write_audio_only, write_clip
from tests.datamodules.test_pictures import batches as picture_batches
from tests.datamodules.test_pictures import equal, in_trainer

av = pytest.importorskip("av")
VIEWS = ClipViews(global_size=16, local_size=8, local_count=2, global_frames=4, local_frames=2)


@pytest.fixture(autouse=True)
def quiet():
    """FFmpeg's own words about broken files."""
    av.logging.set_level(None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of ten clips, of 8 to 27 frames."""
    for number in range(20):
        write_clip(tmp_path / "all" / "ab"[number % 2] / f"{number:02}.mp4", 8 + number, first=number)
    return tmp_path / "all"


def batches(data: Clips, **place):
    return picture_batches(data, views=VIEWS, **place)


@pytest.mark.parametrize("settings", [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 2, "cache": False}])
def test_workers_and_memory_change_no_bit_of_any_batch(folder, settings):
    (folder / "a" / "04.mp4").write_bytes(b"words")
    common = {"batch_size": 4, "max_broken_share": 0.1, "seed": 3, "val_share": 0.2}
    alone = batches(Clips(folder, num_workers=0, cache=False, **common), step=5)
    apart = batches(Clips(folder, **settings, **common), step=5)
    assert len(alone) == len(apart) == 3, "16 to train on make 4 steps; 5 steps are done"
    assert all(equal(a, b) for a, b in zip(alone, apart, strict=True))


def test_a_batch_has_views_first_and_time_inside(folder):
    batch = batches(Clips(folder, batch_size=4, num_workers=0))[0]
    assert batch.views["global"].shape == (2, 4, 3, 4, 16, 16) and batch.views["local"].shape == (2, 4, 3, 2, 8, 8)
    assert batch.views["global"].dtype == torch.float32 and not batch.photometry
    assert batch.boxes["global"].shape == (2, 4, len(ClipBox))
    first, last = batch.boxes["local"][..., ClipBox.START_S], batch.boxes["local"][..., ClipBox.END_S]
    assert (last >= first).all() and torch.allclose(last - first, torch.tensor(0.12), atol=0.041), (
        "an eighth of a second"
    )
    part = batch.part(1, 2)
    assert torch.equal(part.views["global"], batch.views["global"][:, 2:])
    assert torch.equal(part.boxes["local"], batch.boxes["local"][:, 2:])


def test_each_frame_is_the_one_of_its_time(folder):
    """Frames are flat and each brighter than the last, so a view's grey level tells which frame it is."""
    plain = ClipViews(
        global_size=16, local_count=0, global_frames=3, global_fps=None, global_step=2, jitter_prob=0.0, grey_prob=0.0,
        blur_prob=(0.0, 0.0),
    )  # fmt: skip
    data = in_trainer(Clips(folder, batch_size=4, num_workers=0, photometry="device"), views=plain)
    for batch in data.train_dataloader():
        assert batch.views["global"].dtype == torch.uint8 and batch.photometry
        for column, index in enumerate(batch.index.tolist()):
            number = int(Path(data.source.describe(index)).stem)
            times = batch.boxes["global"][:, column, [ClipBox.START_S, ClipBox.END_S]] * 25
            levels = batch.views["global"][:, column].float().mean((1, 3, 4))
            assert torch.allclose(times[:, 1] - times[:, 0], torch.tensor(4.0), atol=1e-4), "2 steps of 2 frames"
            for view in range(2):
                frames = times[view, 0].round() + torch.tensor([0, 2, 4])
                expected = (number + frames * GREY_STEP) % 250
                assert (levels[view] - expected).abs().max() < 4, "H.264 keeps flat grey to a few levels"


def test_photometry_on_the_device_gives_what_the_worker_gives(folder):
    worker = batches(Clips(folder, batch_size=4, num_workers=0))
    data = in_trainer(Clips(folder, batch_size=4, num_workers=0, photometry="device"), views=VIEWS)
    for ready, raw in zip(worker, data.train_dataloader(), strict=True):
        assert equal(data.on_after_batch_transfer(raw, 0), ready)


def test_two_ranks_see_the_halves_of_what_one_process_sees(folder):
    whole = batches(Clips(folder, batch_size=8, num_workers=0))
    halves = [batches(Clips(folder, batch_size=4, num_workers=0), rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for number, part in enumerate(parts):
            assert part.total == 8 and equal(part, batch.part(number, 2))


def test_a_cache_of_a_limited_size_keeps_what_fits_and_changes_nothing(folder, monkeypatch):
    opened = []
    original = Clip.__init__

    def counting(self, file, timeline=None):
        opened.append(file.name)
        original(self, file, timeline)

    common = {"batch_size": 4, "num_workers": 0, "val_share": 0.2}
    plain = batches(Clips(folder, cache=False, **common))
    monkeypatch.setattr(Clip, "__init__", counting)
    counts = {}
    for cache in (True, 1e-4):  # 1e-4 GiB hold about half of the clips, 9 kB a frame
        data = in_trainer(Clips(folder, cache=cache, **common), views=VIEWS)
        loader = data.train_dataloader()
        first = list(loader)
        opened.clear()
        again = list(loader)
        assert all(equal(a, b) and equal(a, c) for a, b, c in zip(first, again, plain, strict=True))
        counts[cache] = len(opened)
    assert counts[True] == 0 and 0 < counts[1e-4] < 16


def test_a_clip_that_the_cache_cannot_keep_is_not_decoded_whole(folder, monkeypatch):
    asked = []
    original = Clip.frames
    monkeypatch.setattr(
        Clip, "frames", lambda self, wanted, *rest: asked.append(len(wanted)) or original(self, wanted, *rest)
    )
    data = in_trainer(Clips(folder, cache=1e-4, batch_size=4, num_workers=0), views=VIEWS)
    loader = data.train_dataloader()
    list(loader)
    asked.clear()
    list(loader)
    assert max(asked) <= sum(view[0].frames * len(view) for view in VIEWS.kinds().values()) < 27


def test_times_are_remembered_of_so_many_frames_however_many_clips_that_is(folder, monkeypatch):
    monkeypatch.setattr("ssd.data.clip_samples.REMEMBERED", 60)
    data = in_trainer(Clips(folder, cache=False, batch_size=4, num_workers=0), views=VIEWS)
    list(data.train_dataloader())
    kept = data._training.clips._timelines
    assert len(kept) > 1 and 30 < sum(map(len, kept.values())) <= 60


def test_evaluation_shows_the_middle_of_each_clip_once_normalised(folder):
    data = in_trainer(Clips(folder, batch_size=3, num_workers=0, normalize="imagenet"), views=VIEWS)
    bank, queries = data.val_dataloader()
    found = [index for batch in bank for index in batch["index"].tolist()]
    assert found == list(range(18))
    batch = next(iter(queries))
    assert batch["sample"].shape == (2, 3, 4, 16, 16)
    source = data._parts[2]
    for row, index in enumerate(batch["index"].tolist()):
        with Clip(source.open(index)) as clip:
            middle = clip.timeline.duration_s / 2
            first = np.searchsorted(clip.timeline.seconds, max(0.0, middle - 0.25) + 1e-6, side="right") - 1
            places = [first, *(first + np.array([1, 2, 3]) * 25 / 8)]
            shown = np.minimum(np.floor(np.array(places) + 1e-6).astype(int), len(clip.timeline) - 1)
            frames = clip.frames(np.arange(len(clip.timeline)), VIEWS.decoded_size)
        look = normalise(evaluation_clip(frames[shown], VIEWS)[None], data.mean, data.std)[0]
        # which of two frames is shown at their very border is a matter of rounding
        assert (batch["sample"][row] - look).abs().max() < GREY_STEP * 1.5 / 255 / min(data.std)
        assert batch["label"][row] == source.label(index)


def test_odd_files_are_read_and_broken_ones_counted_named_and_replaced(tmp_path, caplog):
    good = {
        "header_without_frames.m2v": {"codec": "mpeg2video", "form": "mpeg2video"},
        "one_frame.mp4": {"frames": 1},
        "stream.ts": {},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "plain.mp4": {},
        "motion.avi": {"codec": "mjpeg"},
    }
    for name, settings in good.items():
        write_clip(tmp_path / "all" / name, **{"frames": 12, **settings})
    whole = (tmp_path / "all" / "plain.mp4").read_bytes()
    (tmp_path / "all" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "all" / "words.mp4").write_bytes(b"these are words")
    write_audio_only(tmp_path / "all" / "sound_alone.mp4")
    bad = {"cut.mp4", "words.mp4", "sound_alone.mp4"}
    data = Clips(tmp_path / "all", batch_size=9, num_workers=0, max_broken_share=0.4)
    with caplog.at_level(logging.WARNING):
        (batch,) = batches(data)
    seen = [Path(data.source.describe(index)).name for index in batch.index.tolist()]
    assert len(seen) == 9 and set(seen) == set(good)
    assert len(data._training.broken) == 3
    for name in bad:
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    strict = Clips(tmp_path / "all", batch_size=9, num_workers=0, max_broken_share=0.3)
    with pytest.raises(UserError, match=r"3 of 9 clips cannot be read.*max_broken_share"):
        batches(strict)


def test_a_record_and_a_list_build_the_same_data(folder, tmp_path):
    data = Clips(folder, batch_size=4, num_workers=0, limit=8, short_side=24, normalize="imagenet")
    assert equal(batches(data)[0], batches(build(describe(data)))[0])
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.mp4"))
    (folder / "list.txt").write_text("".join(f"{name} {name.parts[0]}\n" for name in names))
    listed = in_trainer(Clips(folder / "list.txt", batch_size=4, num_workers=0), views=VIEWS)
    assert listed.classes == ["a", "b"] and len(listed._sources[0]) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 2}, "channels is 2. Clips have 1"),
        ({"short_side": 0}, "short_side is 0"),
        ({"short_side": "small"}, "short_side is 'small'"),
        ({"cache": 0.0}, "cache is 0.0"),
        ({"cache": "maybe"}, "cache is 'maybe'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        Clips("anywhere", **settings)


def test_views_of_pictures_are_refused(folder):
    with pytest.raises(UserError, match="Clips makes views by ClipViews, and the method's are DINOViews"):
        in_trainer(Clips(folder, num_workers=0), views=DINOViews())


@pytest.mark.data
def test_real_clips_become_batches_and_none_is_broken(real_data):
    data = Clips(real_data / "clips", batch_size=2, num_workers=0, limit=4, normalize="imagenet")
    data.prepare(ClipViews(global_size=64, local_size=32, local_count=1))
    assert data.classes == ["fight", "other"]
    first, second = data.train_dataloader()
    assert first.views["global"].shape == (2, 2, 3, 16, 64, 64)
    assert second.views["local"].std() > 0.3 and len(data._training.broken) == 0


def test_fixed_looks_of_clips_come_again_also_of_one_that_stands_in_for_a_broken_one(folder):
    (folder / "a" / "04.mp4").write_bytes(b"words")
    settings = {"batch_size": 5, "max_broken_share": 0.1, "val_share": 0, "num_workers": 0, "view_variants": 1}
    epochs: list[dict] = []
    for number in range(2):
        shown: dict[int, list] = {}
        for batch in batches(Clips(folder, **settings), step=4 * number):
            assert batch.variant.tolist() == [0] * 5
            for row, index in enumerate(batch.index.tolist()):
                shown.setdefault(index, []).append((batch.boxes["global"][:, row], batch.views["global"][:, row]))
        epochs.append(shown)
    assert len(epochs[0]) == len(epochs[1]) == 19
    for index, shown in epochs[0].items():
        for box, views in [*shown, *epochs[1][index]]:
            assert torch.equal(box, shown[0][0]) and torch.equal(views, shown[0][1])
