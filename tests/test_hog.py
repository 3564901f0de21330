import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.hog import hog_targets, oriented_gradients


def restated(channel: Tensor, cell: int) -> Tensor:
    """Pixel by pixel, of levels (H, W): (H / cell, W / cell, 9)."""
    height, width = channel.shape
    found = torch.zeros(height // cell, width // cell, 9, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            across = down = 0.0
            if 0 < column < width - 1:
                across = float(channel[row, column + 1] - channel[row, column - 1])
            if 0 < row < height - 1:
                down = float(channel[row + 1, column] - channel[row - 1, column])
            degrees = math.degrees(math.atan2(down, across)) % 180
            found[row // cell, column // cell, int(degrees // 20) % 9] += math.hypot(across, down) / cell**2
    return found


def levels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).float()


def ramp(angle: float, side: int = 32) -> Tensor:
    """One level a pixel along a direction of so many degrees, from the rows downwards. (1, 1, 1, side, side)"""
    place = torch.arange(float(side))
    return (place * math.cos(math.radians(angle)) + place[:, None] * math.sin(math.radians(angle)))[None, None, None]


@pytest.mark.parametrize("cell", [2, 4, 8])
def test_histograms_are_those_of_a_loop_over_pixels(cell):
    pictures = levels(2, 3, 16, 24)
    found = oriented_gradients(pictures, cell)
    assert found.shape == (2, 3, 9, 16 // cell, 24 // cell)
    for sample in range(2):
        for channel in range(3):
            expected = restated(pictures[sample, channel], cell).permute(2, 0, 1).float()
            assert_close(found[sample, channel], expected, atol=1e-3, rtol=1e-5)


def test_a_picture_of_one_colour_has_a_target_of_exactly_zero():
    pictures = torch.tensor([7.0, 130.0, 255.0])[:, None, None].expand(3, 32, 32)[None, None]
    found = hog_targets(pictures, 16, 8)
    assert found.shape == (1, 1, 4, 108) and not found.any()


def test_a_ramp_of_one_level_a_pixel_is_two_in_the_first_bin_and_root_eight_behind_the_norm():
    inside = oriented_gradients(ramp(0), 8)[0, 0, 0, :, 1, 1]
    assert inside.tolist() == [2.0] + [0.0] * 8
    expected = torch.tensor([2.8284] + [-0.3536] * 8)
    for strength in (1.0, 30.0):
        for cell in hog_targets(strength * ramp(0), 16, 8)[0, 0].unflatten(1, (-1, 9)).flatten(0, 1):
            assert_close(cell, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("turned", [0, 180])
@pytest.mark.parametrize("degrees", [10, 30, 50, 70, 90, 110, 130, 150, 170])
def test_a_direction_and_its_opposite_fall_into_the_bin_of_twenty_degrees_that_holds_them(degrees, turned):
    inside = oriented_gradients(ramp(degrees + turned), 8)[0, 0, 0, :, 1, 1]
    assert inside.argmax() == degrees // 20
    assert_close(inside.sum(), torch.tensor(2.0), atol=1e-4, rtol=0)


def test_values_of_a_patch_are_its_own_cells_in_order():
    """An edge in the lower right cell of patch 2 of 2 x 2 moves its last cell alone."""
    pictures = torch.zeros(1, 1, 2, 32, 32)
    pictures[0, 0, 1, 24:32, 10:14] = 9.0  # channel 1, inside rows 24 to 31 and columns 8 to 15
    moved = hog_targets(pictures, 16, 8)[0, 0].any(-1)
    assert moved.tolist() == [False, False, True, False]
    # (cells, channels, bins); rows 23 and columns 9, 14 see the edge too, and lie in the upper and the same cell
    cells = hog_targets(pictures, 16, 8)[0, 0, 2].unflatten(0, (4, 2, 9)).any(-1)
    assert cells.tolist() == [[False, False], [False, True], [False, False], [False, True]]


def test_cells_must_divide_the_picture():
    with pytest.raises(UserError, match="cells of 8 px do not divide"):
        oriented_gradients(levels(1, 1, 12, 16), 8)
