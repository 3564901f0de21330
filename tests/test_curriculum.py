import pytest
from hypothesis import given
from hypothesis.strategies import floats, lists

from ssd.curriculum import Curriculum
from ssd.errors import UserError


def begun(block: int = 1, num_blocks: int = 4, threshold: float = 0.8, smoothing: float = 1.0) -> Curriculum:
    curriculum = Curriculum(num_blocks, threshold, smoothing)
    curriculum.begin(block, 0)
    return curriculum


def test_one_lucky_step_suffices_without_smoothing():
    curriculum = begun()
    for step, likeness in enumerate([0.79, 0.5, 0.8, 0.2], 1):
        curriculum.update(likeness, step, None)
    assert (curriculum.block, curriculum.since) == (2, 3)


def test_smoothed_from_nothing_a_steady_likeness_takes_its_time():
    """.9 (1 - .95^n) reaches .85 at n = 57."""
    curriculum, steps = begun(threshold=0.85, smoothing=0.05), 0
    while curriculum.block == 1:
        steps += 1
        curriculum.update(0.9, steps, None)
    assert steps == 57 and curriculum.likeness == 0, "the mean of the next block begins from 0"


def test_the_next_block_comes_when_time_is_up_and_counts_from_there():
    curriculum, blocks = begun(), []
    for step in range(1, 13):
        curriculum.update(None if step % 2 else 0.1, step, 3)
        blocks.append(curriculum.block)
    assert blocks == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4]


def test_a_likeness_that_was_not_measured_passes_nothing():
    curriculum = begun(smoothing=0.5)
    curriculum.likeness = 0.9
    curriculum.update(None, 1, None)
    assert curriculum.block == 1


@given(course=lists(floats(0, 1), max_size=30))
def test_blocks_come_in_order_one_at_a_time_and_end_at_the_last(course):
    curriculum, before = begun(threshold=0.3, smoothing=0.7), 1
    for step, likeness in enumerate(course, 1):
        curriculum.update(likeness, step, 2)
        assert before <= curriculum.block <= min(before + 1, 4)
        before = curriculum.block


def test_it_goes_on_from_its_state_in_the_middle_of_a_block():
    straight, first = begun(smoothing=0.3), begun(smoothing=0.3)
    second = Curriculum(4, 0.8, 0.3)
    for step in range(1, 20):
        straight.update(0.81, step, 15)
    for step in range(1, 20):
        if step == 11:
            second.load_state_dict(first.state_dict())
        (first if step < 11 else second).update(0.81, step, 15)
    assert straight.state_dict() == second.state_dict()
    assert second.block > 1


@pytest.mark.parametrize(
    "settings, said", [((4, 0.0, 1.0), "cka_threshold: 0.0"), ((4, 0.8, 0.0), "cka_smoothing: 0.0")]
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        Curriculum(*settings)
