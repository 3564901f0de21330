"""The probe of single frames."""

import pytest
import torch
from torch.testing import assert_close

from ssd.batch import Padded, Tokens
from ssd.data.randomness import key
from ssd.evaluation.features import log_mel_windows
from ssd.evaluation.frame_probe import frame_features, frame_numbers, frames_of_clips


def test_moments_lie_evenly_over_what_is_no_padding_and_rows_of_a_moment_are_averaged():
    patches = torch.arange(24.0).view(2, 12, 1)  # 6 moments of 2 rows
    valid = torch.ones(2, 6, 2, dtype=torch.bool)
    valid[1, 2:] = False
    tokens = Tokens(patches=patches, grid=(6, 2), valid=valid.flatten(1))
    assert_close(frame_features(tokens, 3)[..., 0], torch.tensor([[2.5, 6.5, 10.5], [12.5, 14.5, 14.5]]))
    whole = Tokens(patches=patches, grid=(6, 2, 1))
    assert_close(frame_features(whole, 6)[0, :, 0], torch.tensor([0.5, 2.5, 4.5, 6.5, 8.5, 10.5]))
    twice = frame_features(whole, 12)[0, :4, 0]
    assert_close(twice, torch.tensor([0.5, 0.5, 2.5, 2.5]))


def separable(samples: int, seed: int, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four frames a sample; in a `share` of the frames one number is the class, the rest is noise."""
    generator = torch.Generator().manual_seed(key(seed))
    labels = torch.arange(samples) % 3
    features = torch.randn(samples, 4, 5, generator=generator)
    told = torch.rand(samples, 4, generator=generator) < share
    features[..., :3] += 8 * torch.nn.functional.one_hot(labels, 3)[:, None] * told[..., None]
    return features, labels


def test_frames_that_tell_are_right_and_those_that_tell_half_the_time_are_right_when_added():
    train, test = separable(120, 0), separable(60, 1)
    single, added = frame_numbers(*train, *test)
    assert single.name == "frames/top1" and single.value > 0.99 and added.value == 1.0
    assert "4 a sample" in single.protocol and single.chance == pytest.approx(1 / 3)
    single, added = frame_numbers(*separable(120, 2, 0.5), *separable(60, 3, 0.5))
    assert 0.55 < single.value < 0.8 < added.value, "half of the frames tell, two of four nearly always"


def test_frames_without_a_relation_to_labels_are_at_chance():
    train, test = separable(90, 4, 0.0), separable(900, 5, 0.0)
    single, _ = frame_numbers(*train, *test)
    assert abs(single.value - 1 / 3) < 0.05


def test_samples_alone_are_small_frames_and_log_mel_windows():
    clips = torch.rand(2, 3, 5, 32, 32)
    tokens = frames_of_clips(clips)
    assert tokens.grid == (5,) and tokens.patches.shape == (2, 5, 3 * 16 * 16)
    assert_close(tokens.patches[1, 4].view(3, 16, 16)[2, 0, 0], clips[1, 2, 4, :2, :2].mean())
    sounds = Padded(torch.rand(2, 1600), torch.arange(1600) < torch.tensor([[1600], [400]]))
    sounds.samples[1, 400:] = 0
    windows = log_mel_windows(8000)(sounds)
    assert windows.valid is not None and windows.patches.shape[:2] == windows.valid.shape
    assert windows.valid.sum(1).tolist() == [18, 3], "windows of 200 samples every 80 that lie in the sound"
