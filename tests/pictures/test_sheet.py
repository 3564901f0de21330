"""A sheet shows what is in the batch: pixels as they were, boxes where they are, masked tokens greyed out."""

import numpy as np
import pytest
import torch

from ssd.batch import Batch, Masks
from ssd.errors import UserError
from ssd.pictures.sheet import COLOURS, GAP, HEADING, colours_of, denormalised, sheet, with_masked
from ssd.views import photometry

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def batch_of(pictures: torch.Tensor, **more) -> Batch:
    """One kind of (V, B, C, h, w) uint8."""
    return Batch({"global": photometry.normalise(pictures, MEAN, STD)}, torch.arange(pictures.shape[1]), 2, **more)


def cell(page, row: int, column: int, side: int = 32) -> np.ndarray:
    left, top = GAP + column * (side + GAP), HEADING + GAP + row * (side + GAP)
    return np.array(page)[top : top + side, left : left + side]


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_view_stands_in_its_place_as_it_was_before_it_was_normalised(pictures):
    originals = [np.full((32, 32, 3), 10 * row, np.uint8) for row in range(3)]
    page = sheet(batch_of(pictures), originals, MEAN, STD, cell=32)
    assert page.size == (3 * (32 + GAP) + GAP, HEADING + 3 * (32 + GAP) + GAP)
    for row in range(3):
        assert (cell(page, row, 0) == 10 * row).all()
        for view in range(2):
            assert np.array_equal(cell(page, row, 1 + view), pictures[view, row].permute(1, 2, 0).numpy())


def test_crops_are_drawn_where_they_were_cut(pictures):
    """A crop of the right half, top quarter, of an original of 64 x 64 px at half its size."""
    boxes = torch.tensor([32.0, 0, 32, 16, 1]).expand(2, 3, 5).clone()
    page = sheet(batch_of(pictures, boxes={"global": boxes}), [np.zeros((64, 64, 3), np.uint8)] * 3, MEAN, STD, cell=32)
    drawn = (cell(page, 1, 0) == COLOURS[0]).all(2)
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 7, 16, 31)
    assert not drawn[1:7, 17:31].any(), "an outline"


def test_masked_tokens_are_greyed_out_and_no_others(pictures):
    """On a grid of 4 x 4 over 32 px, in the first view alone."""
    boolean = torch.zeros(1, 3, 16, dtype=torch.bool)
    boolean[0, 1, [0, 6]] = True
    page = sheet(
        batch_of(pictures, masks={"global": Masks(boolean)}), [np.zeros((4, 4, 3), np.uint8)] * 3, MEAN, STD, cell=32
    )
    changed = np.zeros((32, 32), bool)
    changed[:8, :8] = changed[8:16, 16:24] = True
    plain = pictures[0, 1].permute(1, 2, 0).numpy()
    shown = cell(page, 1, 1)
    assert np.array_equal(shown[~changed], plain[~changed])
    np.testing.assert_allclose(shown[changed], 0.15 * plain[changed] + 0.85 * 128, atol=0.51)
    assert np.array_equal(cell(page, 1, 2), pictures[1, 1].permute(1, 2, 0).numpy())
    assert np.array_equal(cell(page, 0, 1), pictures[0, 0].permute(1, 2, 0).numpy())


def test_a_grid_that_does_not_divide_the_view_covers_it_and_one_that_is_no_square_is_refused():
    masked = torch.ones(9, dtype=torch.bool)
    assert len(np.unique(with_masked(np.zeros((16, 16, 3), np.uint8), masked))) == 1
    with pytest.raises(ValueError, match="12 tokens"):
        with_masked(np.zeros((16, 16, 3), np.uint8), torch.ones(12, dtype=torch.bool))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_any_number_of_channels_is_shown_in_three(channels):
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, channels)).astype(np.uint8)
    shown = colours_of(picture)
    assert shown.shape == (5, 6, 3) and shown.dtype == np.uint8
    if channels < 3:
        assert all(np.array_equal(shown[:, :, c], picture[:, :, 0]) for c in range(3))
    elif channels < 5:
        assert np.array_equal(shown, picture[:, :, :3])
    else:
        np.testing.assert_allclose(shown[:, :, 0], picture[:, :, :5].mean(2), atol=0.5)
        np.testing.assert_allclose(shown[:, :, 2], picture[:, :, 9:].mean(2), atol=0.5)


def test_bands_can_be_chosen_and_must_be_there():
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 13)).astype(np.uint8)
    assert np.array_equal(colours_of(picture, [3, 2, 1]), picture[:, :, [3, 2, 1]])
    assert np.array_equal(colours_of(picture, [7]), picture[:, :, [7, 7, 7]])
    for wrong in ([13], [0, 1], [-1, 0, 1]):
        with pytest.raises(UserError, match="from 0 to 12"):
            colours_of(picture, wrong)


def test_what_lies_beyond_black_and_white_is_cut_off():
    view = torch.tensor([-100.0, 0.0, 100.0]).reshape(1, 1, 3)
    assert denormalised(view, [0.5], [0.25]).ravel().tolist() == [0, 128, 255]
