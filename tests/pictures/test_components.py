"""Components as colours: the same for features that are turned, and kept over time."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssd.batch import Tokens
from ssd.pictures.components import Basis, all_patches, colours, component_sheet, fit_basis
from ssd.pictures.layout import GAP

SIZES = torch.tensor([5.0, 3.0, 2.0, 0.5, 0.1, 0.1])


def patches(count: int = 200, seed: int = 0) -> torch.Tensor:
    """With main axes of different size and a longer tail on one side of each."""
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return (noise + 0.3 * noise**2) * SIZES + 4


def rotation(size: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def test_scores_are_the_main_components_with_variance_one():
    """Against NumPy's eigenvectors of the covariance."""
    found = patches()
    scores = fit_basis(found).scores(found)
    assert_close(scores.T @ scores / len(scores), torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0)
    values, vectors = np.linalg.eigh(np.cov(found.double().numpy().T, bias=True))
    expected = (found.double().numpy() - found.double().numpy().mean(0)) @ vectors[:, :-4:-1] / values[:-4:-1] ** 0.5
    assert_close(scores.abs(), torch.from_numpy(np.abs(expected)), atol=1e-6, rtol=0)
    assert ((scores**3).mean(0) > 0).all()


def test_features_that_are_turned_mirrored_scaled_and_moved_give_the_same_picture():
    found = patches()
    other = 7 * found @ rotation() - 3
    assert_close(fit_basis(other).scores(other), fit_basis(found).scores(found), atol=1e-4, rtol=0)


def test_components_are_turned_to_those_of_before():
    """Another order and other signs of nearly equal components are undone, and what is learned since remains."""
    found = patches()
    before = fit_basis(found).scores(found)
    turned = before[:, [1, 2, 0]] * torch.tensor([1.0, -1.0, 1.0])
    again = fit_basis(found, like=turned.double()).scores(found)
    assert_close(again, turned, atol=1e-6, rtol=0)
    later = found + 0.05 * patches(seed=5)
    agreement = (fit_basis(later, like=before).scores(later) * before).mean(0)
    assert (agreement > 0.99).all()


def test_a_basis_is_used_on_patches_that_it_was_not_fitted_to():
    basis, other = fit_basis(patches()), patches(seed=9).reshape(4, 50, 6)
    assert isinstance(basis, Basis) and basis.scores(other).shape == (4, 50, 3)
    assert_close(basis.scores(other)[1, 7], basis.scores(other[1, 7]))


@pytest.mark.parametrize("found", [torch.ones(10, 6), torch.ones(1, 6), torch.arange(10.0)[:, None].expand(10, 6)])
def test_components_that_are_not_there_are_grey(found):
    """Constant features, a single patch, and patches on one line."""
    scores = fit_basis(found).scores(found)
    assert scores.isfinite().all() and (scores[:, 1:] == 0).all()
    assert (colours(scores)[:, 1:] == 128).all()


def test_two_dimensions_have_two_components():
    found = torch.randn(20, 2)
    assert (fit_basis(found).scores(found)[:, 2] == 0).all()


def test_colours_are_full_at_two_and_a_half_deviations():
    assert colours(torch.tensor([-9.0, -2.5, 0.0, 1.25, 2.5])).tolist() == [0, 0, 128, 191, 255]


def test_maps_stand_below_their_pictures():
    scores = torch.zeros(2, 4, 3)
    scores[1, 3] = 9  # the last patch of the second picture is white
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
    page = np.array(component_sheet(pictures, colours(scores).reshape(2, 2, 2, 3), cell=8))
    top, left = GAP + 8 + GAP, GAP + 8 + GAP
    square = page[top : top + 8, left : left + 8]
    assert (square[4:, 4:] == 255).all() and (square[:4] == 128).all()
    assert (page[GAP : GAP + 8, left : left + 8] == 0).all()


def test_maps_of_strips_stand_below_each_and_are_as_wide():
    strips = [np.zeros((4, 16, 3), np.uint8)] * 2
    maps = [np.full((1, 2, 3), 10, np.uint8), np.full((2, 4, 3), 20, np.uint8)]
    page = np.array(component_sheet(strips, maps, strips=True, cell=8))
    assert page.shape[:2] == (GAP + 4 * (8 + GAP), 2 * GAP + 32)
    rows = [page[GAP + number * (8 + GAP), GAP : GAP + 32] for number in range(4)]
    assert [np.unique(row).tolist() for row in rows] == [[0], [10], [0], [20]]


def test_padding_is_no_part_of_the_components():
    patches = torch.randn(2, 6, 4)
    valid = torch.arange(6) < torch.tensor([[6], [2]])
    assert torch.equal(
        all_patches(Tokens(patches=patches, grid=(6,), valid=valid)), torch.cat([patches[0], patches[1, :2]])
    )
