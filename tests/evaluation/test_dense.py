import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Tokens
from ssd.evaluation.dense import (
    correspondence,
    correspondence_number,
    crops,
    cut,
    has_places,
    pixel_patches,
    places,
)


def coordinates(samples=6, size=32):
    """Pictures whose red is the column and green the row, in [-1, 1]."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    picture = torch.stack([line.expand(size, size), line[:, None].expand(size, size), torch.zeros(size, size)])
    return picture.expand(samples, -1, -1, -1).clone()


class KnowsPlaces:
    """Answers where each patch is in the picture, read off the first crop's red and green; the second's colours are
    undone by what is known of them."""

    def __init__(self, index):
        from ssd.data.randomness import uniforms_of_many

        self.colours = torch.from_numpy(uniforms_of_many((2, 4), [(int(i),) for i in index])[:, 1, :2]).float()
        self.calls = 0

    def __call__(self, pictures):
        if self.calls == 1:
            factor, shift = (self.colours[:, i, None, None, None] for i in (0, 1))
            pictures = (pictures - 0.6 * (shift - 0.5)) / (0.6 + 0.8 * factor)
        self.calls += 1
        means = torch.nn.functional.avg_pool2d(pictures[:, :2], 4).flatten(2).transpose(1, 2)  # (B, N, 2)
        # directions whose cosine falls with distance in the picture
        angles = means * 1.2
        return Tokens(patches=torch.cat([angles.sin(), angles.cos()], -1), grid=(8, 8))


def test_a_network_that_knows_where_patches_are_finds_all_of_them():
    index = torch.arange(6)
    counts = correspondence(KnowsPlaces(index), coordinates(), index)
    assert counts.shape == (6, 3) and (counts[:, 0] > 10).all()
    number = correspondence_number(counts)
    assert number.value == 1.0 and 0.03 < number.chance < 0.3
    assert number.name == "dense/correspondence"


def test_a_network_that_knows_nothing_finds_what_chance_does():
    torch.manual_seed(0)
    index = torch.arange(200)
    counts = correspondence(
        lambda pictures: Tokens(patches=torch.randn(200, 64, 16), grid=(8, 8)), torch.zeros(200, 3, 32, 32), index
    )
    number = correspondence_number(counts)
    assert number.value == pytest.approx(number.chance, abs=0.01)


def test_crops_lie_in_the_picture_and_show_what_their_places_say():
    boxes = torch.from_numpy(crops(np.random.default_rng(0).random((50, 4)))).float()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:3] <= 1).all()
    assert boxes[:, 2].min() > 0.63 and boxes[:, 2].max() < 1 and 10 < boxes[:, 3].sum() < 40
    shown = cut(coordinates(50), boxes, (16, 16))
    where = places(boxes, (16, 16)).transpose(1, 2).unflatten(2, (16, 16))
    inner = (where > 0.05) & (where < 0.95)  # nothing is interpolated beyond the outermost pixels
    assert_close(shown[:, :2][inner], (2 * where - 1)[inner], atol=1e-4, rtol=0)


def test_the_score_does_not_depend_on_the_batch_and_repeats():
    torch.manual_seed(0)
    network = ViT("vit_tiny_patch16_224", img_size=32, arguments=dict(patch_size=8, embed_dim=24, depth=1, num_heads=2))
    pictures, index = torch.randn(5, 3, 32, 32), torch.tensor([7, 3, 9, 1, 4])
    with torch.no_grad():
        whole = correspondence(network.eval(), pictures, index)
        alone = correspondence(network, pictures[2:3], index[2:3])
    assert_close(whole[2:3], alone)
    assert torch.equal(whole[:, 0], correspondence(lambda x: pixel_patches(x, 8), pictures, index)[:, 0])


def test_pixels_are_cut_into_patches_row_by_row():
    picture = torch.arange(64.0).view(1, 1, 8, 8)
    tokens = pixel_patches(picture, 4)
    assert tokens.grid == (2, 2)
    assert torch.equal(tokens.patches[0, 1], picture[0, 0, :4, 4:].flatten())


def test_maps_too_small_to_have_places_are_not_asked():
    with torch.no_grad():
        small = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8] * 4, "stem_width": 8})
        assert not has_places(small(torch.zeros(1, 3, 64, 64))) and has_places(small(torch.zeros(1, 3, 96, 96)))
    assert not has_places(Tokens(patches=torch.zeros(1, 8, 2), grid=(2, 2, 2)))
