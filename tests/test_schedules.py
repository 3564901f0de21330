import math
from dataclasses import replace

import pytest

from ssd.errors import UserError
from ssd.schedules import Cosine, Exponential, Linear, TriStage, in_steps, value_at


def values(schedule, total, steps_per_epoch=1):
    return [schedule.value(step, total, steps_per_epoch) for step in range(total)]


def test_learning_rate_as_published():
    """Base 1, floor 0, 10 steps, 4 of warm-up: the peak occurs twice and the floor never."""
    expected = [0, 1 / 3, 2 / 3, 1, 1, 0.9330, 0.75, 0.5, 0.25, 0.0670]
    assert values(Cosine(1.0, 0.0, warmup="4 steps"), 10) == pytest.approx(expected, abs=5e-5)


def test_momentum_as_published():
    momentum = Cosine(0.996, 1.0)
    found = [momentum.value(step, 1000, 10) for step in (0, 250, 500, 999)]
    assert found == pytest.approx([0.996, 0.99658579, 0.998, 0.99999999], abs=5e-9)


def test_temperature_moves_once_an_epoch_and_includes_both_ends():
    """linspace(.04, .07, 4) over 4 epochs of 5 steps, then .07."""
    found = values(Linear(0.04, 0.07, until="4 epochs", every="epoch"), 30, steps_per_epoch=5)
    assert found == pytest.approx([0.04] * 5 + [0.05] * 5 + [0.06] * 5 + [0.07] * 15)


def test_a_warmup_longer_than_the_run_is_cut_off_by_its_end():
    found = values(Linear(0.0, 1.0, until="100 steps"), 10)
    assert found == pytest.approx([i / 99 for i in range(10)])


def test_a_share_keeps_its_shape_when_the_run_gets_longer():
    short, long = Cosine(1.0, 0.0, warmup=0.1), Cosine(1.0, 0.0, warmup=0.1)
    assert short.value(500, 1000, 10) == pytest.approx(long.value(5000, 10_000, 10), abs=2e-3)


def test_scaling_moves_the_peak_and_not_the_floor():
    scaled = Cosine(5e-4, 1e-6, warmup=0.1).scaled(4)
    assert scaled.start == 2e-3 and scaled.end == 1e-6


@pytest.mark.parametrize("schedule", [Cosine, Linear, TriStage])
def test_an_end_may_follow_the_peak_and_is_then_the_same_share_of_it(schedule):
    plain = schedule(9.0, 9e-3, scaled_end=True)
    twice = plain.scaled(2)
    assert (twice.start, twice.end) == (18.0, 0.018)
    assert values(twice, 20) == pytest.approx([2 * value for value in values(plain, 20)])


def test_half_a_cosine_is_symmetric():
    found = values(Cosine(1.0, 0.0), 1000)
    for i in range(1, 500):
        assert found[i] + found[1000 - i] == pytest.approx(1.0)
    assert found[500] == pytest.approx(0.5)
    assert math.isclose(value_at(0.3, 7, 10, 1), 0.3)


@pytest.mark.parametrize("length", [1.5, -0.1, "10 parsecs", "epochs", "-3 steps"])
def test_an_impossible_length_is_refused(length):
    with pytest.raises(UserError, match="length"):
        in_steps(length, 100, 10)


def test_a_schedule_that_waits_is_the_schedule_of_the_rest():
    for schedule in (
        Cosine(1.0, 0.0, warmup=0.2),
        Linear(0.04, 0.07, until=0.5),
        Linear(0.04, 0.07, until="2 epochs", every="epoch"),
    ):
        waiting = replace(schedule, after="10 steps")
        rest = [schedule.value(step, 20, 5) for step in range(20)]
        assert [waiting.value(step, 30, 5) for step in range(30)] == pytest.approx(rest[:1] * 10 + rest)
    assert Linear(0.0, 1.0, after="50 steps").value(9, 10, 5) == 0.0, "a run may end before"


def test_the_form_that_reaches_its_end_has_the_published_values():
    """DINOv3: peak 1 and end 0 after a warm-up of 2 of 5 ticks; DINO's form beside it."""
    long = Cosine(1.0, 0.0, warmup="2 steps", reaches_end=True)
    assert [long.value(i, 5, 1) for i in range(6)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert [Cosine(1.0, 0.0, warmup="2 steps").value(i, 5, 1) for i in range(5)] == pytest.approx([0, 1, 1, 0.75, 0.25])
    constant = Cosine(2.0, 2.0, warmup="4 steps", reaches_end=True)
    assert [constant.value(i, 8, 1) for i in range(8)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2])
    only = Cosine(1.0, 0.0, warmup="4 steps", reaches_end=True)
    assert [only.value(i, 5, 1) for i in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 0])


def test_a_truncated_cosine_has_the_published_values():
    """Darcet et al. 2025: 1000 steps, 100 of warm-up, .8 of half a cosine: it ends near (1 + cos .8 pi) / 2 = .0954915."""
    rate = Cosine(1.0, 0.0, warmup=0.1, truncate=0.8)
    momentum = Cosine(0.999, 1.0, warmup=0.1, warmup_start=1.0, truncate=0.8)
    assert rate.value(0, 1000, 10) == 0.0 and momentum.value(0, 1000, 10) == 1.0
    assert rate.value(99, 1000, 10) == rate.value(100, 1000, 10) == 1.0, "the peak occurs twice"
    assert momentum.value(99, 1000, 10) == pytest.approx(0.999)
    assert rate.value(999, 1000, 10) == pytest.approx(0.0963138, abs=5e-8)
    assert momentum.value(999, 1000, 10) == pytest.approx(0.99990369, abs=5e-9)
    assert rate.value(499_999, 500_000, 10) == pytest.approx(0.0954915, abs=5e-6)
    assert rate.value(550, 1000, 10) == pytest.approx(0.5 * (1 + math.cos(0.4 * math.pi)))
    assert rate.value(1000, 1000, 10) == 0.0, "behind its end"
    assert Cosine(1.0, 0.0, truncate=1.0) == Cosine(1.0, 0.0)
    with pytest.raises(UserError, match="truncate: 0"):
        Cosine(1.0, 0.0, truncate=0.0)


def test_three_stages_have_the_published_values():
    """DinoSR: 12,000 of 400,000 steps up, 188,000 at the peak, then to a hundredth."""
    rate = TriStage(5e-4, 5e-6, warmup=0.03, warmup_start=5e-6, hold=0.47)
    at = (0, 6_000, 12_000, 200_000, 300_000, 400_000)
    found = [rate.value(step, 400_000, 1000) for step in at]
    assert found == pytest.approx([5e-6, 2.525e-4, 5e-4, 5e-4, 5e-5, 5e-6])
    assert rate.scaled(2).value(12_000, 400_000, 1000) == pytest.approx(1e-3)
    with pytest.raises(UserError, match="end above 0"):
        TriStage(1.0, 0.0)


def test_the_momentum_of_spidr_has_its_values_and_ends_at_one():
    momentum = Exponential(0.999, 1.0, scale="20000 steps")
    found = [momentum.value(step, 400_000, 1000) for step in (0, 20_000, 100_000)]
    assert found == pytest.approx([0.999, 0.999632, 0.999993], abs=5e-7)
    assert momentum.value(184_000, 400_000, 1000) < 1 and momentum.value(184_300, 400_000, 1000) == 1
