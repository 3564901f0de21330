import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers

from ssd.errors import UserError
from ssd.evaluation.splits import balanced_draws, held_out, labels_per_class


@settings(deadline=None, max_examples=30)
@given(number=integers(20, 200), classes=integers(1, 7), per_class=integers(1, 12), seed=integers(0, 5))
def test_every_draw_has_the_same_number_of_each_class_and_no_sample_twice(number, classes, per_class, seed):
    labels = torch.randint(classes, (number,), generator=torch.Generator().manual_seed(seed))
    drawn = balanced_draws(labels, per_class, 4, seed)
    for row in drawn:
        assert len(row.unique()) == len(row)
        expected = labels.bincount(minlength=classes).clamp_max(per_class)
        assert torch.equal(labels[row].bincount(minlength=classes), expected)


def test_draws_differ_from_each_other_and_repeat_with_the_seed():
    labels = torch.arange(100) % 5
    first = balanced_draws(labels, 3, 20, seed=1)
    assert torch.equal(first, balanced_draws(labels, 3, 20, seed=1))
    assert torch.equal(first[:7], balanced_draws(labels, 3, 7, seed=1))
    assert len({tuple(row.tolist()) for row in first}) == 20
    assert not torch.equal(first, balanced_draws(labels, 3, 20, seed=2))


def test_every_sample_is_drawn_equally_often():
    """2000 draws of 2 of 10 in each class: each sample expects 400, standard deviation 18."""
    counts = balanced_draws(torch.arange(30) % 3, 2, 2000, seed=0).flatten().bincount(minlength=30)
    assert (counts - 400).abs().max() < 5 * 18


@settings(deadline=None, max_examples=30)
@given(number=integers(10, 200), classes=integers(1, 7), seed=integers(0, 5))
def test_the_held_out_part_takes_its_share_of_every_class(number, classes, seed):
    labels = torch.arange(number) % classes
    fit, held = held_out(labels, 0.2, seed)
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(number))
    counts = labels.bincount()
    expected = torch.where(counts > 1, (0.2 * counts).round().clamp_min(1), 0)
    assert torch.equal(labels[held].bincount(minlength=classes), expected.long())


def test_a_class_of_one_sample_stays_in_the_part_that_is_fitted():
    fit, held = held_out(torch.tensor([0, 0, 0, 1, 2, 2]), 0.1, 0)
    assert 3 in fit and len(held) == 2


def test_nothing_to_hold_out_is_said():
    with pytest.raises(UserError, match="leave none to hold out"):
        held_out(torch.arange(4), 0.1, 0)


@pytest.mark.parametrize(("number", "share", "expected"), [(1297, 0.01, 1), (1297, 0.1, 13), (50_000, 0.01, 50)])
def test_a_share_of_the_labels_is_rounded_to_labels_per_class(number, share, expected):
    assert labels_per_class(torch.arange(number) % 10, share) == expected
