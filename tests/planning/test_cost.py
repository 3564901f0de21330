"""Hours, memory and batches that fit, by hand."""

import dataclasses
from types import SimpleNamespace

import pytest

from ssd.planning.cost import Cost, MemoryLine, cost_of, evaluation_seconds, evaluations_of, memory_line, proposals
from ssd.planning.trials import Measured
from tests.planning.test_rules import DINO

LOADERS = [
    {"samples": 1000, "batches": 10, "dense": 4, "first_s": 3.0, "dense_s": 1.0, "plain_s": 0.25},
    {"samples": 300, "batches": 3, "dense": 4, "first_s": 0.5, "dense_s": 1.0, "plain_s": 0.25},
]
MEASURED = Measured(
    batch=64,
    micro_batches=1,
    steps=5,
    step_s=0.5,
    step_processor_s=0.4,
    gib=2.0,
    imports_gib=0.5,
    cache_gib=0.25,
    start_s=10.0,
    checkpoint_s=2.0,
    checkpoint_bytes=2**29,
    evaluation={"loaders": LOADERS, "probes_s": 0.75},
)
CHECKPOINTS = SimpleNamespace(every_n_steps=1000, every_n_epochs=1, also={"best_dense": "val/dense/correspondence"})


def trainer(**settings):
    plain = {"limit_val_batches": None, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    return SimpleNamespace(**plain | settings)


def run(steps=1000, per_epoch=100, **changes):
    return dataclasses.replace(DINO, steps=steps, steps_per_epoch=per_epoch, processes=1, **changes)


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        (1000, {}, 10),
        (1000, {"check_val_every_n_epoch": 3}, 4),  # after 3, 6 and 9 epochs, and at the end
        (1050, {}, 11),
        (50, {}, 1),
        (1000, {"val_check_interval": 0.25}, 40),
        (1000, {"val_check_interval": 50}, 20),
        (1000, {"val_check_interval": 300, "check_val_every_n_epoch": None}, 4),
        (900, {"val_check_interval": 300, "check_val_every_n_epoch": None}, 3),
        (1000, {"limit_val_batches": 0}, 0),
    ],
)
def test_a_run_is_evaluated_at_its_intervals_and_at_the_end(steps, settings, expected):
    assert evaluations_of(run(steps), trainer(**settings)) == expected


@pytest.mark.parametrize(("times", "expected"), [(10, 10), ([0.5], 2), ([0.25, 1.0], 2), (7, 7)])
def test_chosen_times_count_and_the_end(times, expected):
    assert evaluations_of(run(100), trainer(check_val_every_n_epoch=1), times) == expected
    assert evaluations_of(run(100), trainer(limit_val_batches=0), times) == 0


def test_an_evaluation_is_its_batches_its_start_and_the_probes():
    # 2 to start workers, 4 dense and 6 plain batches; 3 dense ones; the probes
    assert evaluation_seconds(MEASURED, None, 1) == pytest.approx(2 + 4 + 1.5 + 3 + 0.75)
    assert evaluation_seconds(MEASURED, 0.5, 1) == pytest.approx(2 + 4 + 0.25 + 1 + 0.75)
    assert evaluation_seconds(MEASURED, 2, 1) == pytest.approx(2 + 2 + 2 + 0.75)
    assert evaluation_seconds(MEASURED, None, 5) == pytest.approx(2 + 2 + 1 + 0.75), "each process takes its part"


def test_the_hours_of_a_run_are_the_sum_of_its_parts():
    cost = cost_of(run(), MEASURED, trainer(check_val_every_n_epoch=5), CHECKPOINTS)
    assert (cost.evaluations, cost.checkpoints) == (2, 1 + 10 + 2)
    assert cost.seconds == pytest.approx(10 + 1000 * 0.5 + 2 * 11.25 + 13 * 2)
    assert cost.row()["hours"] == pytest.approx(cost.seconds / 3600)
    assert cost.disk_gib == 1.5, "the last, the best, and the best by another number"


def test_memory_grows_by_what_will_be_cached_and_by_buckets_between_processes():
    assert cost_of(run(), MEASURED, trainer(), CHECKPOINTS).gib == 2.25
    both = dataclasses.replace(run(trainable=2**28), processes=2)
    assert cost_of(both, MEASURED, trainer(), CHECKPOINTS).gib == 3.25
    unknown = dataclasses.replace(MEASURED, gib=None)
    assert cost_of(run(), unknown, trainer(), CHECKPOINTS).gib is None


def trial(batch, micro_batches, line):
    gib = line.gib(batch, micro_batches)
    return dataclasses.replace(MEASURED, batch=batch, micro_batches=micro_batches, gib=gib, cache_gib=0.0)


@pytest.mark.parametrize("line", [MemoryLine(1.5, 0.01, 0.05), MemoryLine(0.5, 0.0, 0.02)])
def test_the_line_through_trials_that_lie_on_one_is_that_line(line):
    found = memory_line([trial(64, 1, line), trial(32, 1, line), trial(64, 2, line)])
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(line))


def test_without_slices_all_growth_is_the_batch():
    line = MemoryLine(1.5, 0.01, 0.05)
    found = memory_line([trial(64, 1, line), trial(32, 1, line)])
    assert dataclasses.astuple(found) == pytest.approx((1.5, 0.0, 0.06))


def test_the_largest_batch_fits_and_the_next_one_does_not():
    line, facts = MemoryLine(2.0, 0.01, 0.05), run(batch=64)
    largest, asked = proposals(line, facts, 24.0, can_slice=True)
    assert (largest.batch, largest.micro_batches) == (344, 1)
    assert line.gib(largest.batch, 1) <= 0.95 * 24 < line.gib(largest.batch + 8, 1)
    assert (asked.batch, asked.micro_batches, asked.predicted_gib) == (64, 1, pytest.approx(5.84))


def test_a_batch_that_does_not_fit_at_once_is_cut_into_as_few_slices_as_do():
    line, facts = MemoryLine(2.0, 0.01, 0.05), run(batch=256)
    _, asked = proposals(line, facts, 10.0, can_slice=True)
    assert (asked.batch, asked.micro_batches) == (256, 4)
    assert line.gib(256, 4) <= 9.5 < line.gib(256, 2)
    assert [proposal.batch for proposal in proposals(line, facts, 10.0, can_slice=False)] == [120]


def test_groups_of_koleo_stay_whole_in_proposals():
    line, facts = MemoryLine(2.0, 0.01, 0.05), run(batch=256, koleo_group=64)
    largest, asked = proposals(line, facts, 12.0, can_slice=True)
    assert largest.batch == 128
    assert (256 // asked.micro_batches) % 64 == 0
    assert len(proposals(line, facts, 5.0, can_slice=True)) == 0, "four slices of 64 need 7.8 GiB"


def test_no_batch_is_larger_than_an_epoch():
    (largest, _) = proposals(MemoryLine(1.0, 0.0, 1e-6), run(batch=64, draws=1000), 24.0, can_slice=True)
    assert largest.batch == 1000


def test_a_run_without_any_evaluation_has_no_time_for_one():
    alone = dataclasses.replace(MEASURED, evaluation=None)
    cost = cost_of(run(), alone, trainer(limit_val_batches=0), CHECKPOINTS)
    assert isinstance(cost, Cost) and cost.evaluation_s == 0 and cost.evaluations == 0
