"""Samples of every kind as pictures, and their tokens in the same places."""

import numpy as np
import torch

from ssd.pictures.portraits import NARROW, WIDE, OfClips, OfPictures, OfSounds, as_large


def test_a_picture_is_itself_and_its_map_the_grid():
    look = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert (OfPictures().whole(look) == look.permute(1, 2, 0).numpy()).all()
    assert OfPictures().laid(np.arange(6), (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (OfPictures([2]).whole(look)[..., 0] == look[2].numpy()).all()


def test_frames_stand_side_by_side_with_the_slot_that_each_is_of():
    """Four frames in two slots of 1 x 2 tokens: each slot is shown under both of its frames."""
    clip = torch.arange(4, dtype=torch.uint8)[None, :, None, None].expand(3, 4, 2, 2)
    portraits = OfClips(frames=4)
    assert portraits.whole(clip)[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert portraits.small(clip)[:, :, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert portraits.laid(np.arange(4), (2, 1, 2)).tolist() == [[0, 1, 0, 1, 2, 3, 2, 3]]


def test_a_clip_of_many_frames_shows_eight_of_them_and_one_of_two_repeats_the_last_in_small():
    clip = torch.arange(29, dtype=torch.uint8)[None, :, None, None].expand(3, 29, 1, 1)
    assert OfClips(29).whole(clip)[0, :, 0].tolist() == list(range(0, 29, 4))
    assert OfClips(2).small(clip[:, :2])[:, :, 0].tolist() == [[0, 1], [1, 1]]


def test_a_sound_is_as_wide_as_any_and_its_padding_has_no_colours():
    portraits = OfSounds(8000)
    for samples in (800, 8000):
        sound = np.sin(np.arange(samples) * 0.5).astype(np.float32)
        assert portraits.whole(sound).shape == (NARROW, WIDE, 3) and portraits.small(sound).shape == (NARROW, NARROW, 3)
    valid = torch.tensor([True, True, True, False])
    assert portraits.laid(np.arange(4), (4,), valid).tolist() == [[0, 1, 2]]
    two = valid.repeat_interleave(2)
    found = portraits.laid(np.arange(8), (4, 2), two)
    assert found.tolist() == [[1, 3, 5], [0, 2, 4]], "the lowest band at the bottom"


def test_a_low_tone_is_below_a_high_one():
    def brightest(hertz: float) -> int:
        tone = np.sin(2 * np.pi * hertz * np.arange(8000) / 8000).astype(np.float32)
        return int(OfSounds(8000).whole(tone).sum((1, 2)).argmax())

    assert brightest(200) > brightest(3000) + 20


def test_small_maps_become_rectangles():
    values = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    large = as_large(values, np.zeros((2, 4, 3)))
    assert large[:, :, 0].tolist() == [[1, 1, 4, 4]] * 2
