"""Clips and sounds on sheets: what is shown lies where and when it was."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssd.batch import Batch
from ssd.pictures.clips import APART, BAR, at, clip_sheet, timeline
from ssd.pictures.layout import GAP, LINE
from ssd.pictures.sheet import COLOURS
from ssd.pictures.sound import LONGEST, sound_picture, sound_sheet, spans, waveform
from ssd.spectrogram import MELS, log_mel, mel_filters

RATE_HZ = 8000


def test_a_box_is_drawn_on_the_frames_that_its_view_shows():
    boxes = {"global": [[0, 0, 4, 4, 0, 0.0, 1.0]], "local": [[0, 0, 4, 4, 0, 0.5, 0.75]]}
    assert [len(at(boxes, second)["local"]) for second in (0.4, 0.5, 0.7, 0.8)] == [0, 1, 1, 0]
    bars = np.array(timeline(boxes, {"global": COLOURS[0], "local": COLOURS[1]}, 2.0, 201))
    for bar, (start, end) in enumerate([(0, 100), (50, 75)]):
        (lit,) = np.nonzero((bars[bar * (BAR + 2)] == COLOURS[bar]).all(1))
        assert (lit.min(), lit.max()) == (start, end)


def test_a_strip_shows_the_frames_of_a_view_from_left_to_right():
    levels = torch.arange(0, 250, 50.0)  # five frames, each of one grey
    view = (levels / 255 - 0.5) / 0.25
    clip = view[None, None, None, :, None, None].expand(1, 1, 3, 5, 8, 8)
    batch = Batch({"global": clip}, torch.tensor([0]), 1, boxes={"global": torch.tensor([[[0.0, 0, 8, 8, 1, 0, 1]]])})
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    page = np.array(clip_sheet(batch, [(frames, np.array([0.0, 1.0]))], [1.0], [0.5] * 3, [0.25] * 3, cell=8))
    top = GAP + LINE + 8 + 4 + BAR + 2 + 4 + LINE
    middles = [page[top + 4, GAP + frame * (8 + APART) + 4, 0] for frame in range(5)]
    assert middles == [0, 50, 100, 150, 200]


@pytest.mark.parametrize("tone_hz", [300, 1000, 3000])
def test_a_tone_is_brightest_in_the_band_that_holds_it(tone_hz):
    seconds = torch.arange(RATE_HZ) / RATE_HZ
    levels = log_mel(torch.sin(2 * torch.pi * tone_hz * seconds), RATE_HZ)
    assert levels.shape[0] == MELS and 95 <= levels.shape[1] <= 105
    band = int(levels.mean(1).argmax())
    centre = 700 * (10 ** (2595 * np.log10(1 + RATE_HZ / 2 / 700) * (band + 1) / (MELS + 1) / 2595) - 1)
    assert abs(centre - tone_hz) < 0.06 * tone_hz + 40


def test_bands_weigh_to_one_and_none_is_empty():
    assert_close(mel_filters(256, RATE_HZ).sum(1), torch.ones(MELS))
    assert (mel_filters(256, RATE_HZ) >= 0).all()


def test_a_louder_sound_is_brighter_by_as_many_db():
    noise = torch.randn(RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert_close(
        log_mel(10 * noise, RATE_HZ) - log_mel(noise, RATE_HZ), torch.full((MELS, 101), 20.0), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("samples", [torch.zeros(3), torch.zeros(0), torch.ones(1)])
def test_the_shortest_sounds_and_silence_are_shown(samples):
    assert sound_picture(samples, RATE_HZ, 5).width == 5


def test_a_waveform_reaches_as_high_as_the_sound_where_it_does():
    samples = torch.zeros(100)
    samples[50:55] = 1.0
    drawn = np.array(waveform(samples, 10)).sum(2) < 500
    assert drawn[:, 5].sum() > 15 and drawn[:, 2].sum() <= 2
    assert drawn[0, 5] and not drawn[-1, 5]


def test_views_of_a_sound_are_shown_without_padding_at_the_scale_of_the_whole():
    batch = Batch(
        {"global": torch.randn(1, 2, 80)},
        torch.tensor([0, 1]),
        2,
        valid={"global": (torch.arange(80) < 50).expand(1, 2, 80)},
    )
    places = [{"global": [(0.0, 0.05)]}, {"global": [(0.0, 0.05)]}]
    page = np.array(sound_sheet(batch, [torch.randn(100), torch.randn(50)], places, 1000))
    assert page.shape[1] == LONGEST + 2 * GAP
    bars = np.array(spans(places[0], {"global": COLOURS[0]}, 0.1, 101))
    (lit,) = np.nonzero((bars[0] == COLOURS[0]).all(1))
    assert (lit.min(), lit.max()) == (0, 50)
    dark = (page.sum(2) < 200).any(0)
    assert dark[: GAP + LONGEST].any() and not dark[GAP + LONGEST :].any()
