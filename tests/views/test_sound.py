"""What a sound's views take of it, how loud, and with how much noise."""

import numpy as np
import pytest

from ssd.errors import UserError
from ssd.views.sound import SoundViews, Window, draw_windows, middle, normalised, root_mean_square, sound_view

PLAIN = {"gain_db": (0.0, 0.0), "noise_prob": 0.0}


def level_db(first: np.ndarray, second: np.ndarray) -> float:
    return 20 * np.log10(root_mean_square(first) / root_mean_square(second))


def windows(views: SoundViews, length: int, count: int = 2000, longest: int | None = None, seed: int = 0):
    return [draw_windows(views, length, longest, seed, 0, index) for index in range(count)]


def test_a_window_lies_in_the_sound_anywhere_alike():
    views = SoundViews(rate_hz=100, global_length_s=0.5, local_count=0)
    starts = np.array([window.start for drawn in windows(views, 89) for window in drawn["global"]])
    assert {window.count for drawn in windows(views, 89, 20) for window in drawn["global"]} == {50}
    counts = np.bincount(starts, minlength=40)
    # 40 places, 100 each: chi squared with 39 degrees of freedom is below 73 in 999 of 1000
    assert len(counts) == 40 and ((counts - 100) ** 2 / 100).sum() < 73


def test_a_short_sound_is_taken_whole_and_a_whole_one_up_to_the_longest():
    views = SoundViews(rate_hz=100, global_length_s=0.5, local_length_s=0.2)
    drawn = draw_windows(views, 30, None, 0, 0, 0)
    assert [(w.start, w.count) for w in drawn["global"]] == [(0, 30)] * 2
    assert {w.count for w in drawn["local"]} == {20}
    whole = SoundViews(rate_hz=100, global_length_s=None, local_count=0)
    assert {w.count for w in draw_windows(whole, 700, None, 0, 0, 0)["global"]} == {700}
    cut = draw_windows(whole, 700, 300, 0, 0, 0)["global"]
    assert {w.count for w in cut} == {300} and all(w.start <= 400 for w in cut)


def test_draws_are_keyed_and_adding_views_changes_none_of_the_others():
    few, many = SoundViews(local_count=1), SoundViews(local_count=5)
    assert draw_windows(few, 9999, None, 1, 2, 3) == draw_windows(few, 9999, None, 1, 2, 3)
    assert draw_windows(few, 9999, None, 1, 2, 3)["global"] == draw_windows(many, 9999, None, 1, 2, 3)["global"]
    for place in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert draw_windows(few, 99999, None, *place) != draw_windows(few, 99999, None, 1, 2, 3)


def test_gains_are_uniform_in_db_and_noise_comes_as_often_as_asked():
    views = SoundViews(gain_db=(-6.0, 6.0), noise_prob=0.3, noise_db=(10.0, 30.0))
    drawn = [window for sample in windows(views, 8000) for window in sample["global"]]
    gains = 20 * np.log10([window.gain for window in drawn])
    # a mean of 4,000 uniform draws over 12 dB strays by 0.055 dB
    assert gains.min() >= -6 and gains.max() <= 6 and abs(gains.mean()) < 0.2
    noisy = [window.noise_level for window in drawn if window.noise_level is not None]
    assert len(noisy) / len(drawn) == pytest.approx(0.3, abs=0.03)
    levels = -20 * np.log10(noisy)
    assert levels.min() >= 10 and levels.max() <= 30


def test_noise_has_its_level_and_its_own_numbers():
    sound = np.sin(np.arange(50_000) / 7).astype(np.float32)
    views = [sound_view(sound, Window(0, 50_000, 1.0, 0.1, (0, 0, 0, view)), False) for view in (0, 0, 1)]
    assert np.array_equal(views[0], views[1]) and not np.array_equal(views[0], views[2])
    # the spread of 50,000 normal numbers is known to 0.3%
    assert level_db(sound, views[0] - sound) == pytest.approx(20, abs=0.1)
    assert not sound_view(np.zeros(100, np.float32), Window(0, 100, 1.0, 0.1, (0,)), False).any(), "silence stays"


def test_gain_is_a_factor_and_normalising_takes_it_out():
    sound = np.sin(np.arange(5000) / 7).astype(np.float32) * 0.1 + 0.05
    loud = sound_view(sound, Window(0, 5000, 2.0, None, (0,)), False)
    assert level_db(loud, sound) == pytest.approx(20 * np.log10(2), abs=1e-4)
    plain = sound_view(sound, Window(0, 5000, 2.0, None, (0,)), True)
    assert abs(plain.mean()) < 1e-5 and plain.std() == pytest.approx(1, abs=1e-5)
    assert plain.dtype == np.float32
    assert not normalised(np.zeros(10, np.float32)).any()


def test_the_middle():
    assert middle(100, 20) == (40, 20) and middle(10, 20) == (0, 10) and middle(10, None) == (0, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_hz": 0}, "rate_hz is 0"),
        ({"global_length_s": 0}, "global_length_s is 0"),
        ({"local_length_s": None}, "local_length_s is None"),
        ({"gain_db": [3, -3]}, "gain_db is"),
        ({"noise_db": [3]}, "noise_db is"),
        ({"noise_prob": 1.5}, "noise_prob is 1.5"),
        ({"global_count": 0}, "global_count is 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        SoundViews(**settings)
