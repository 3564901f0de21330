"""Positions of samples: exact, whatever the ranks, and wherever a run was stopped."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers

from ssd.data.sampler import Chosen, EpochSampler
from ssd.errors import UserError


@given(length=integers(1, 200), batch=integers(1, 12), world=integers(1, 4), seed=integers(0, 5), done=integers(0, 300))
def test_ranks_together_take_the_steps_of_one_process_and_a_restart_takes_the_rest(length, batch, world, seed, done):
    if length < batch * world:
        with pytest.raises(UserError):
            EpochSampler(length, batch, world=world)
        return
    whole = EpochSampler(length, batch * world, seed=seed, steps_done=lambda: done)
    ranks = [EpochSampler(length, batch, rank=r, world=world, seed=seed, steps_done=lambda: done) for r in range(world)]
    steps = len(whole)
    assert steps == length // (batch * world) == len(ranks[0])
    alone = list(whole)
    assert alone == [list(chain(*parts)) for parts in zip(*ranks, strict=True)]

    start = EpochSampler(length, batch * world, seed=seed, steps_done=lambda: done // steps * steps)
    assert alone == list(start)[done % steps :]
    assert {epoch for step in alone for epoch, _ in step} == {done // steps}


def test_an_epoch_takes_every_sample_at_most_once_and_leaves_out_less_than_a_step():
    seen = [index for step in EpochSampler(103, 10, seed=3) for _, index in step]
    assert len(seen) == len(set(seen)) == 100
    assert set(seen) <= set(range(103))


@given(steps=integers(1, 12), done=integers(0, 60))
def test_a_shortened_epoch_is_the_beginning_of_its_order(steps, done):
    taken = min(steps, 10)
    whole = list(EpochSampler(103, 10, steps_done=lambda: done // taken * 10))
    shortened = EpochSampler(103, 10, steps_per_epoch=steps, steps_done=lambda: done)
    assert list(shortened) == whole[done % taken : taken]
    assert len(shortened) == 10, "the trainer's limit is a share of this"


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        sampler = EpochSampler(64, 64, seed=seed, steps_done=lambda epoch=epoch: epoch)
        orders.append([index for _, index in next(iter(sampler))])
    matches = [np.mean(np.equal(a, b)) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(matches) < 0.15, "independent orders of 64 agree in one place on average"


def test_the_position_is_asked_at_each_start():
    done = 0
    sampler = EpochSampler(40, 10, steps_done=lambda: done)
    first = list(sampler)
    done = 2
    assert list(sampler) == first[2:]
    done = 4
    assert [epoch for step in sampler for epoch, _ in step] == [1] * 40


def test_too_few_samples_are_told_with_a_size_that_fits():
    with pytest.raises(UserError, match=r"37 training samples.*64 \(32 on each of 2 processes\).*batch_size 18"):
        EpochSampler(37, 32, world=2)


def test_chosen_rows_are_drawn_once_an_epoch_and_no_others_are():
    rows = np.array([3, 17, 4, 29, 8, 11])
    sampler = EpochSampler(30, 2, seed=1, draws=Chosen(30, rows))
    assert len(sampler) == 3
    order = [index for places in sampler for _, index in places]
    assert sorted(order) == sorted(rows)
    later = EpochSampler(30, 2, seed=1, draws=Chosen(30, rows), steps_done=lambda: 3)
    assert order != [index for places in later for _, index in places]
    # what stands in for a broken sample is one of them too
    assert set(Chosen(30, rows).following(1, 0, 17)) == set(rows) - {17}
