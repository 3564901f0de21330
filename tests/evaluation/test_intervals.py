"""Intervals: those of textbooks where textbooks have one, and what repeated draws add."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from ssd.data.randomness import generator
from ssd.evaluation.intervals import accuracy_interval, chosen, difference_interval


def right(count: int, total: int, rows: int = 1) -> torch.Tensor:
    return (torch.arange(total) < count).repeat(rows, 1)


@pytest.mark.parametrize(("count", "total"), [(20, 20), (15, 30), (90, 100), (5, 500), (450, 500), (1400, 2000)])
def test_of_one_accuracy_the_interval_is_wilsons(count, total):
    """Within half a standard error at most: adding two right and two wrong is an approximation of it."""
    found = accuracy_interval(right(count, total))
    wilson = binomtest(count, total).proportion_ci(method="wilson")
    assert found.value == pytest.approx(count / total)
    assert found.low == pytest.approx(wilson.low, abs=0.25 / total**0.5)
    assert found.high == pytest.approx(wilson.high, abs=0.25 / total**0.5)


@pytest.mark.parametrize(
    ("only_ours", "only_theirs"),
    [(4, 0), (5, 0), (6, 0), (7, 0), (9, 1), (13, 3), (15, 10), (20, 8), (40, 30), (45, 20)],
)
def test_of_one_difference_the_verdict_is_mcnemars(only_ours, only_theirs):
    """The exact test of samples that one network alone answers, whose p is here not between .03 and .06 but once."""
    ours, theirs = torch.zeros(2, 1, 400, dtype=torch.bool)
    ours[0, :only_ours] = True
    theirs[0, only_ours : only_ours + only_theirs] = True
    found = difference_interval(ours, theirs)
    assert found.value == pytest.approx((only_ours - only_theirs) / 400)
    assert found.beyond_chance == (binomtest(only_ours, only_ours + only_theirs).pvalue < 0.05)


def test_equal_answers_do_not_differ_and_a_difference_turned_round_is_its_mirror():
    ours, theirs = torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) < torch.tensor([[[0.8]], [[0.7]]])
    same = difference_interval(ours, ours)
    assert same.value == 0 and not same.beyond_chance
    one, other = difference_interval(ours, theirs), difference_interval(theirs, ours)
    assert one.value == -other.value
    assert one.low == pytest.approx(-other.high, abs=0.01)


def test_draws_that_disagree_make_it_wider_and_draws_that_agree_do_not():
    agree = accuracy_interval(right(700, 1000, rows=8))
    one = accuracy_interval(right(700, 1000))
    disagree = accuracy_interval(torch.cat([right(count, 1000) for count in (500, 600, 650, 700, 700, 750, 800, 900)]))
    assert agree.high - agree.low == pytest.approx(one.high - one.low, rel=0.1)
    assert disagree.value == pytest.approx(0.7)
    assert disagree.high - disagree.low > 2 * (one.high - one.low)


def test_one_row_stands_beside_all_of_the_others_and_no_other_number_does():
    many, one = torch.rand(5, 200) < 0.9, torch.rand(1, 200) < 0.4
    assert difference_interval(many, one).value == pytest.approx(float(many.double().mean() - one.double().mean()))
    assert difference_interval(many, one).beyond_chance
    with pytest.raises(ValueError, match="5 repetitions against 2"):
        difference_interval(many, many[:2])


def test_it_holds_the_truth_as_often_as_it_says():
    """Accuracies that depend on the draw and on the sample, 5 draws: 95 % is asked, and 85 % of 60 trials are three
    standard errors less."""
    chance = np.random.default_rng(0)

    def logits(rows: int, columns: int) -> np.ndarray:
        return 1 + chance.normal(0, 0.3, (rows, 1)) + chance.normal(0, 1.5, (1, columns))

    truth = float((1 / (1 + np.exp(-logits(2000, 2000)))).mean())
    hits = 0
    for trial in range(60):
        correct = torch.from_numpy(chance.random((5, 100)) < 1 / (1 + np.exp(-logits(5, 100))))
        found = accuracy_interval(correct, trial)
        hits += found.low <= truth <= found.high
    assert hits >= 51


def test_choosing_anew_takes_as_many_as_there_are():
    times = chosen(generator(0), 50, 20)
    assert times.shape == (50, 20) and (times.sum(1) == 20).all() and times.max() > 1
