"""What is seen of pictures is what is in them, the same with any number of processes."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from ssd.data.broken import BrokenSamples
from ssd.data.cache import Pictures
from ssd.data.checks import findings as say
from ssd.data.checks.crops import TINY, enlargements, smallest_side
from ssd.data.checks.examine import CHUNK, RECORD, examine
from ssd.data.checks.repeats import repeated, repeats, shared
from ssd.data.checks.speed import Speed, measure, recommended, worker_counts
from ssd.data.folder import FolderSource
from ssd.data.statistics import survey
from ssd.errors import UserError
from ssd.views.recipes import DINOViews, PlainViews
from tests.data.files import encoded, scene, write

CONTEXT = multiprocessing.get_context("fork")


def look(folder, workers=0, channels=3):
    return examine(Pictures(FolderSource(folder, labels=False), channels), workers, CONTEXT)


@pytest.fixture
def folder(tmp_path):
    """Seven pictures, one of each kind: 0 and 4 are equal pixels in two formats."""
    picture = scene(40, 60, 1)
    write(tmp_path / "0.png", encoded(picture))
    write(tmp_path / "1.png", encoded(scene(30, 30, 2)[:, :, 0]))
    write(tmp_path / "2.png", encoded(np.full((20, 50, 3), (255, 255, 250), np.uint8)))
    write(tmp_path / "3.jpg", b"these are words")
    write(tmp_path / "4.bmp", encoded(picture, "BMP"))
    write(tmp_path / "5.png", encoded(np.zeros((20, 50, 3), np.uint8)))
    write(tmp_path / "6.png", encoded(np.zeros((20, 50, 3), np.uint8)))
    return tmp_path


def test_each_picture_is_told_by_what_it_shows(folder):
    seen = look(folder)
    records = seen.records
    assert records["readable"].tolist() == [True, True, True, False, True, True, True]
    assert list(zip(records["height"].tolist(), records["width"].tolist(), strict=True)) == [
        (40, 60), (30, 30), (20, 50), (0, 0), (40, 60), (20, 50), (20, 50),
    ]  # fmt: skip
    assert np.flatnonzero(records["blank"]).tolist() == [2, 5, 6]
    assert np.flatnonzero(records["grey"]).tolist() == [1, 5, 6], "a tint of 5 levels is colour"
    assert list(seen.reasons) == [3] and "not a picture" in seen.reasons[3]
    assert seen.sizes.tolist()[0] == [40, 60] and len(seen.sizes) == 6


def test_one_bright_pixel_is_enough_not_to_be_blank(tmp_path):
    """Beyond the pixels that are looked at first."""
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[199, 199] = 30
    write(tmp_path / "a.png", encoded(picture))
    assert not look(tmp_path).records["blank"][0]


def test_statistics_are_those_a_run_measures(folder):
    source = FolderSource(folder)
    measured = survey(Pictures(source, 3), BrokenSamples(source, 0.5, CONTEXT))
    seen = look(folder)
    np.testing.assert_allclose(seen.mean, measured.mean, rtol=1e-12)
    np.testing.assert_allclose(seen.std, measured.std, rtol=1e-12)


@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (1, "spawn")])
def test_processes_change_nothing(tmp_path, workers, method):
    for number in range(CHUNK + 7):
        write(tmp_path / f"{number:03}.png", encoded(scene(8 + number % 5, 12, number)))
    write(tmp_path / "070.png", b"broken")
    alone = look(tmp_path)
    apart = examine(Pictures(FolderSource(tmp_path), 3), workers, multiprocessing.get_context(method))
    assert apart.records.tobytes() == alone.records.tobytes()
    assert (apart.reasons, apart.mean, apart.std) == (alone.reasons, alone.mean, alone.std)
    assert list(apart.reasons) == [70]


class Deadly(FolderSource):
    """Kills the process that opens its second picture, as a decoder's fault or the system's memory guard would."""

    def open(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(index)


def test_a_process_that_dies_is_told_and_not_waited_for(folder):
    with pytest.raises(UserError, match="ended by force"):
        examine(Pictures(Deadly(folder), 3), 1, CONTEXT)


def test_a_million_pictures_take_less_than_a_hundred_megabytes():
    assert RECORD.itemsize * 1_000_000 < 100e6


# ---------------------------------------------------------------- repeats


def test_repeats_are_counted_without_the_first_and_blank_ones_are_none(folder):
    seen = look(folder)
    found = repeats({"training": seen})
    assert repeated(found.same["training"]).tolist() == [4]
    assert repeated(found.alike["training"]).tolist() == [4]
    assert found.alike["training"][[2, 3, 5, 6]].tolist() == [-1] * 4
    (finding,) = say.duplicates("training", seen, found)
    assert "1 of 7" in finding.text and "4.bmp" in finding.text and "0.png" in finding.text


def test_what_is_in_both_parts_leaks_exactly_or_nearly(tmp_path):
    first, second = scene(64, 80, 1, detail=3), scene(64, 80, 2, detail=3)
    write(tmp_path / "a" / "0.png", encoded(first))
    write(tmp_path / "a" / "1.png", encoded(second))
    write(tmp_path / "a" / "2.png", encoded(np.zeros((9, 9, 3), np.uint8)))
    write(tmp_path / "b" / "0.bmp", encoded(first, "BMP"))
    write(tmp_path / "b" / "1.jpg", encoded(second, "JPEG", quality=60))
    write(tmp_path / "b" / "2.png", encoded(scene(64, 80, 3, detail=3)))
    write(tmp_path / "b" / "3.png", encoded(np.zeros((9, 9, 3), np.uint8)))
    parts = {"training": look(tmp_path / "a"), "held-out": look(tmp_path / "b")}
    found = repeats(parts)
    assert shared(found.same["held-out"], found.same["training"]).tolist() == [0]
    assert shared(found.alike["held-out"], found.alike["training"]).tolist() == [0, 1]
    exact, near = say.leaks("held-out", "training", parts, found)
    assert "1 of 4 (25.0%) held-out pictures are in the training" in exact.text and "0.bmp" in exact.text
    assert "1.jpg" in near.text and "look like" in near.text
    assert say.duplicates("training", parts["training"], found) == []


def test_parts_of_which_nothing_can_be_read_have_no_repeats(tmp_path):
    write(tmp_path / "a.png", b"words")
    found = repeats({"training": look(tmp_path)})
    assert found.alike["training"].tolist() == [-1]


# ---------------------------------------------------------------- crops


def test_enlargement_follows_from_the_sizes_of_the_crops():
    """A view of 48 px of the whole of 24 x 24 px is enlarged twice, of 96 x 96 px halved."""
    views = PlainViews(size=48)
    (small,) = enlargements(views, np.array([[24, 24]] * 5), seed=0)
    (large,) = enlargements(views, np.array([[96, 96]] * 5), seed=0)
    assert (small.share, small.median, small.high, small.crop) == (1.0, 2.0, 2.0, 24.0)
    assert (large.share, large.median) == (0.0, 0.5)
    (mixed,) = enlargements(views, np.array([[24, 24]] * 3 + [[96, 96]]), seed=0)
    assert mixed.share == 0.75


def test_the_median_crop_is_the_root_of_the_median_area():
    """A share uniform in [0.1, 0.5] of 100 x 100 px: at the median 0.3 of the area, 54.8 px."""
    views = DINOViews(global_size=32, global_scale=(0.1, 0.5), ratio=(1.0, 1.0), local_count=0)
    (found,) = enlargements(views, np.array([[100, 100]] * 2000), seed=1)
    assert found.crop == pytest.approx(np.sqrt(0.3) * 100, abs=1.0)


def test_tiny_is_where_the_smallest_crop_is_enlarged_more_than_it_may_be(folder):
    views = DINOViews(global_size=64, global_scale=(0.25, 1.0), local_count=1, local_size=16, local_scale=(0.25, 0.5))
    assert smallest_side(views) == 64 / (TINY * 0.5) == 32
    (finding,) = say.tiny("training", look(folder), views)
    assert finding.text.startswith("4 of 7") and "32 px" in finding.text and "30 x 30" in finding.text


# ---------------------------------------------------------------- speed


class Loader:
    """Four batches of five an epoch."""

    def __iter__(self):
        return iter([[0] * 5] * 4)


def test_speed_is_pictures_behind_the_first_batch_over_the_time_they_took(monkeypatch):
    clock = iter([0.0, 7.0, *(7.0 + 0.5 * step for step in range(1, 100))])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    asked = []
    (found,) = measure(lambda workers: asked.append(workers) or Loader(), [3], seconds=2.0)
    assert asked == [3] and found == Speed(3, 10.0, 7.0)


def test_the_fewest_workers_within_a_tenth_of_the_best_are_recommended():
    assert recommended([Speed(0, 50, 0), Speed(1, 91, 0), Speed(2, 100, 0), Speed(4, 99, 0)]) == 1
    assert worker_counts(1) == [0, 1] and worker_counts(6) == [0, 1, 2, 4, 6] and worker_counts(8) == [0, 1, 2, 4, 8]
