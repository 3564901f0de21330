"""What views do to spectrograms: sums of power, crops on a canvas, and draws that follow from the sample alone."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from datamodules.sound import Sound
from lightning_modules.dinosr import DinoSR
from ssd.backbones.speech import LogMelEncoder
from ssd.errors import UserError
from ssd.spectrogram import DB_PER_NEPER, Levels
from ssd.views.recipes import RECIPES
from ssd.views.sound import SoundViews
from ssd.views.spectra import altered, draw_spectra, mixed_levels, resized_crop
from tests.data.media_files import write_digits
from tests.datamodules.test_pictures import batches, equal

VIEWS = SoundViews(rate_hz=8000, global_length_s=0.15, local_count=0, mix_share=0.4, mix_group=2, resize=(0.6, 1.5))


def levels(values, counts=None, **settings) -> Levels:
    return Levels(torch.as_tensor(values), None if counts is None else torch.tensor(counts), **settings)


# ---------------------------------------------------------------- mixing


def test_power_is_mixed_and_not_its_logarithm():
    """.75 of a power of 2 and .25 of a power of 4 are 2.5, and the other way round 3.5; in dB as well."""
    shares = torch.tensor([0.25, 0.25])
    power = torch.tensor([2.0, 4.0])[:, None, None]
    expected = torch.tensor([2.5, 3.5])[:, None, None]
    assert_close(mixed_levels(levels(power.log()), shares, 2).values, expected.log())
    decibels = levels(10 * power.log10(), per_neper=DB_PER_NEPER)
    assert_close(mixed_levels(decibels, shares, 2).values, 10 * expected.log10())


def test_each_sound_meets_the_one_before_it_in_its_group_and_no_other():
    values = torch.randn(6, 3, 2)
    found = mixed_levels(levels(values), torch.full((6,), 0.4), 3).values
    for row, other in enumerate((2, 0, 1, 5, 3, 4)):
        assert_close(found[row], (0.6 * values[row].exp() + 0.4 * values[other].exp()).log())
    assert_close(mixed_levels(levels(values[3:]), torch.full((3,), 0.4), 3).values, found[3:])


def test_nothing_of_the_other_is_nothing_changed():
    values = torch.randn(2, 3, 2)
    assert_close(mixed_levels(levels(values), torch.zeros(2), 2).values, values)


def test_beyond_its_end_the_other_is_silent_and_a_sound_keeps_its_length():
    values = torch.zeros(2, 4, 1)
    values[1, 2:] = 50.0  # padding has no meaning
    found = mixed_levels(levels(values, [4, 2]), torch.tensor([0.4, 0.4]), 2)
    assert_close(found.values[0, :2], torch.zeros(2, 1))
    assert_close(found.values[0, 2:], torch.full((2, 1), math.log(0.6)))
    assert found.counts.tolist() == [4, 2]


# ---------------------------------------------------------------- crops


def crop(values, scales, places, counts=None) -> torch.Tensor:
    return resized_crop(levels(values, counts), torch.tensor([scales]), torch.tensor([places])).values


def test_a_crop_of_the_sound_itself_changes_nothing():
    values = torch.randn(1, 12, 8)
    # the canvas is 18 long, the sound begins at 3: place 3 of the 7 that a crop of 12 has
    assert_close(crop(values, (1.0, 1.0), (0.0, 3.5 / 7)), values, atol=1e-5, rtol=1e-5)


def test_around_the_sound_is_its_mean_level():
    values = torch.randn(1, 12, 8) + 5
    found = crop(values, (1.0, 1.0), (0.0, 0.0))
    assert_close(found[0, :3], values.mean().expand(3, 8), atol=1e-5, rtol=0)
    assert_close(found[0, 3:], values[0, :9], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "wide"), [(0.75, 9), (1.25, 15)])
def test_a_crop_is_a_bicubic_resize_of_a_part_of_the_canvas(scale, wide):
    """Inside, where no neighbour lies behind an edge."""
    values = torch.randn(1, 12, 8)
    canvas = torch.zeros(18, 8)
    canvas[3:15] = values[0] - values.mean()
    start = int(0.9 * (18 - wide + 1))
    part = canvas[start : start + wide, 1:7]
    expected = F.interpolate(part[None, None], (12, 8), mode="bicubic", align_corners=True)[0, 0] + values.mean()
    found = crop(values, (0.75, scale), (0.4, 0.9))[0]  # 6 of 8 bands from the second on
    assert_close(found[3:9, 2:6], expected[3:9, 2:6], atol=1e-5, rtol=1e-4)


def test_bands_above_the_highest_do_not_exist():
    """Scales above 1 shrink a sound over time alone."""
    values = torch.randn(1, 12, 8)
    assert_close(crop(values, (1.5, 1.0), (0.9, 0.5)), values, atol=1e-5, rtol=1e-5)
    steps = torch.arange(8.0).expand(1, 12, 8)
    half = crop(steps, (0.5, 1.0), (0.99, 0.5))
    assert_close(half[0, 5], torch.linspace(4, 7, 8), atol=0.2, rtol=0)


def test_a_sound_is_cropped_the_same_alone_and_padded():
    values = torch.randn(1, 9, 8)
    alone = crop(values, (0.8, 1.3), (0.3, 0.2))
    padded = torch.cat([values, 99 * torch.ones(1, 5, 8)], dim=1)
    assert_close(crop(padded, (0.8, 1.3), (0.3, 0.2), [9])[:, :9], alone, atol=1e-5, rtol=1e-4)


def test_one_window_is_cropped_to_itself():
    assert_close(crop(torch.ones(1, 1, 8), (0.6, 0.6), (0.9, 0.9)), torch.ones(1, 1, 8))


# ---------------------------------------------------------------- draws


def test_draws_have_the_published_ranges_and_follow_from_their_place():
    views = RECIPES["unfused"]
    assert views.kinds()["global"][0].samples == 15_200
    rows = np.concatenate([draw_spectra(views, 0, 0, index)["global"] for index in range(4000)])
    for column, (low, high) in enumerate(((0, 0.4), (0.6, 1.5), (0.6, 1.5), (0, 1), (0, 1))):
        assert low <= rows[:, column].min() and rows[:, column].max() <= high
        # a mean of 4,000 uniform draws strays by a two hundred and twentieth of their range
        assert abs(rows[:, column].mean() - (low + high) / 2) < 0.02 * (high - low)
    assert np.array_equal(draw_spectra(views, 1, 2, 3)["global"], draw_spectra(views, 1, 2, 3)["global"])
    assert not np.array_equal(draw_spectra(views, 1, 2, 3)["global"], draw_spectra(views, 1, 2, 4)["global"])
    assert draw_spectra(RECIPES["speech"], 0, 0, 0) == {}


def test_workers_change_no_draw_and_slices_cut_it(tmp_path):
    folder = write_digits(tmp_path / "digits")
    alone, apart = (batches(Sound(folder, batch_size=6, num_workers=n), views=VIEWS, step=2) for n in (0, 1))
    assert all(equal(a, b) for a, b in zip(alone, apart, strict=True))
    spectra = alone[0].spectra["global"]
    assert spectra.shape == (2, 6, 5)
    assert torch.equal(spectra, torch.cat([alone[0].part(n, 3).spectra["global"] for n in range(3)], dim=1))
    for view in range(2):
        for row, index in enumerate(alone[0].index.tolist()):
            assert (spectra[view, row] == torch.from_numpy(draw_spectra(VIEWS, 0, 0, index)["global"])[view]).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="mix_group: 2 does not fit the 3 sounds"):
        altered(levels(torch.zeros(6, 4, 8)), torch.zeros(2, 3, 5), VIEWS)
    for settings, said in (
        ({"mix_share": 1.0}, "from 0 to 0.99"),
        ({"mix_group": 1}, "2 or more"),
        ({"resize": (1.5, 0.6)}, "in this order"),
    ):
        with pytest.raises(UserError, match=said):
            SoundViews(**settings)


def test_a_method_that_leaves_spectrograms_alone_refuses_such_views():
    backbone = LogMelEncoder(rate_hz=8000, mels=16, patch=(2, 16), embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(UserError, match="which DinoSR does not"):
        DinoSR(backbone, views=VIEWS)
