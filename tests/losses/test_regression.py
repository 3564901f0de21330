import math

import torch
from torch import tensor
from torch.testing import assert_close

from ssd.losses.regression import absolute_error, cosine_distance, smooth_error, squared_error
from ssd.normalisers import unit_length


def test_worked_values():
    """dBOT's: .5, 1, 2 and 3 cost .0625, .25, 1 and 2."""
    errors = tensor([[0.5], [1.0], [2.0], [3.0]])
    assert_close(smooth_error(errors, torch.zeros(4, 1)), tensor([0.0625, 0.25, 1.0, 2.0]))
    assert_close(squared_error(errors, torch.zeros(4, 1)), tensor([0.25, 1.0, 4.0, 9.0]))
    assert_close(absolute_error(tensor([[1.0, -3.0]]), torch.zeros(1, 2)), tensor([2.0]))
    assert_close(cosine_distance(tensor([[3.0, 4.0]]), tensor([[4.0, 3.0]])), tensor([0.04]))


def test_what_normal_targets_cost():
    """dBOT's card: 0 against N(0, 1) about .246, N(0, 1) against N(0, 1) about .470."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4096, 256, generator=generator)
    assert abs(smooth_error(torch.zeros_like(one), one).mean() - 0.246) < 2e-3
    assert abs(smooth_error(one, other).mean() - 0.470) < 3e-3


def test_two_random_directions_are_apart_by_the_root_of_four_over_pi_d():
    """DMAE's card: .0353 for 1,024 dimensions."""
    generator = torch.Generator().manual_seed(0)
    one, other = unit_length(torch.randn(2, 512, 1024, generator=generator))
    found = absolute_error(one, other).mean()
    assert abs(found - 2 / math.sqrt(math.pi * 1024)) < 5e-4 and abs(found - 0.0353) < 5e-4


def test_half_precision_is_compared_in_single():
    predicted = tensor([[1.0, 2.0]]).half()
    assert squared_error(predicted, tensor([[1.0, 2.0]])).dtype == torch.float32
