import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import tensor
from torch.testing import assert_close

from ssd.normalisers import (
    average,
    instance_normed,
    layer_normed,
    patchified,
    standardised,
    unit_length,
    unpatchified,
)


def test_standardising_divides_by_the_unbiased_deviation_and_layer_normalisation_by_the_biased_one():
    values = tensor([1.0, 2.0, 3.0, 4.0])
    assert_close(standardised(values), tensor([-1.16190, -0.38730, 0.38730, 1.16190]), atol=1e-5, rtol=0)
    assert_close(layer_normed(values), tensor([-1.34164, -0.44721, 0.44721, 1.34164]), atol=1e-5, rtol=0)


def test_instance_normalisation_is_over_tokens_and_a_constant_channel_becomes_zero():
    features = tensor([[[1.0, 5.0], [3.0, 5.0]]])  # (1, 2, 2)
    assert_close(instance_normed(features), tensor([[[-1.0, 0.0], [1.0, 0.0]]]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="over 1 token"):
        instance_normed(features[:, :1])


def test_instance_normalisation_of_padded_tokens_is_that_of_the_others():
    features = tensor([[[1.0], [2.0], [3.0], [9.0], [-9.0]], [[4.0], [0.0], [0.0], [0.0], [0.0]]])
    valid = tensor([[True] * 3 + [False] * 2, [True] + [False] * 4])
    normed = instance_normed(features, valid=valid)
    assert_close(normed[0, :3, 0], tensor([-1.224736, 0.0, 1.224736]), atol=1e-5, rtol=0)
    assert normed[1, 0, 0] == 0, "the one token of a sample"
    padded = tensor([[[1.0], [2.0], [3.0], [0.0], [0.0]]])
    assert_close(instance_normed(padded)[0, :3, 0], tensor([-0.1715, 0.6860, 1.5435]), atol=1e-4, rtol=0)
    everything = torch.ones_like(valid)
    assert_close(instance_normed(features, valid=everything), instance_normed(features))


def test_layers_weigh_alike_once_they_are_normalised():
    large, small = 1000 * torch.randn(2, 5, 8), 0.001 * torch.randn(2, 5, 8)
    mean = average([layer_normed(large), layer_normed(1e6 * small)])
    assert_close(mean, (layer_normed(large) + layer_normed(1e6 * small)) / 2)


def test_unit_length_is_that_whatever_the_precision():
    assert_close(unit_length(torch.randn(3, 7).bfloat16()).norm(dim=-1), torch.ones(3))


@given(
    batch=integers(1, 3),
    channels=integers(1, 4),
    rows=integers(1, 4),
    columns=integers(1, 4),
    patch=integers(1, 4),
)
def test_patches_hold_their_pixels_row_by_row_channels_last_and_come_back(batch, channels, rows, columns, patch):
    pictures = torch.randn(batch, channels, rows * patch, columns * patch)
    patches = patchified(pictures, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * channels)
    row, column = rows - 1, columns - 1
    square = pictures[0, :, row * patch :, column * patch :]
    assert torch.equal(patches[0, row * columns + column], square.permute(1, 2, 0).flatten())
    assert torch.equal(unpatchified(patches, (rows, columns), patch), pictures)
