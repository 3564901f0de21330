"""Online codebooks: the equations on small numbers, and codes that are the same on all processes."""

import math

import pytest
import torch
from torch.testing import assert_close

from ssd.codebooks import Codebooks, perplexity


def codebook(sums, counts, **settings) -> Codebooks:
    """One codebook of one number a code."""
    made = Codebooks(1, len(sums), 1, **settings)
    made.sums.copy_(torch.tensor(sums)[None, :, None])
    made.counts.copy_(torch.tensor(counts)[None])
    return made


def step(codes: Codebooks, values) -> torch.Tensor:
    """Assigns and takes in one batch of numbers; what they were assigned to."""
    features = torch.tensor(values, dtype=torch.float32)[None, :, None]
    real = torch.ones(len(values), dtype=torch.bool)
    assigned = codes(features)
    codes.update(*codes.hits(features, assigned, real), codes.candidates(features, real))
    return assigned[0]


def test_worked_example():
    codes = codebook([2.0, 10.0], [1.0, 1.0])
    assert step(codes, [1.0, 2.0]).tolist() == [0, 0]
    assert_close(codes.sums.flatten(), torch.tensor([2.1, 10.0]))
    assert_close(codes.counts.flatten(), torch.tensor([1.1, 1.0]))
    assert_close(codes.centroids.flatten(), torch.tensor([1.909091, 10.0]))


def test_a_hundred_batches_bring_the_code_to_its_mean_and_leave_the_other_as_it_was():
    codes = codebook([2.0, 10.0], [1.0, 1.0])
    for _ in range(100):
        step(codes, [1.0, 2.0])
    assert codes.centroids[0, 0, 0].item() == pytest.approx(1.500007, abs=2e-6)
    assert codes.counts[0, 0].item() == pytest.approx(1.999974, abs=2e-6)
    assert codes.sums[0, 1, 0] == 10 and codes.counts[0, 1] == 1 and codes.idle.tolist() == [[0, 100]]


def test_the_first_of_two_equally_near_codes_is_taken():
    assert codebook([0.0, 2.0], [1.0, 1.0])(torch.tensor([[[1.0]]])).tolist() == [[0]]


def test_each_codebook_finds_its_own_nearest_code():
    torch.manual_seed(0)
    codes = Codebooks(3, 16, 8)
    codes.counts.uniform_(0.5, 2)
    features = torch.randn(3, 50, 8)
    assert torch.equal(codes(features), torch.cdist(features, codes.centroids).argmin(-1))


def test_a_draw_has_mean_0_and_variance_1_over_codes_in_each_channel():
    codes = Codebooks(2, 64, 8)
    assert_close(codes.sums.mean(1), torch.zeros(2, 8), atol=1e-6, rtol=0)
    assert_close(codes.sums.var(1, correction=0), torch.ones(2, 8), atol=1e-4, rtol=0)
    assert (codes.counts == 1).all()


def test_padding_counts_for_nothing_even_where_it_is_no_number():
    codes = codebook([2.0, 10.0], [1.0, 1.0])
    features = torch.tensor([[[1.0], [2.0], [math.nan]]])
    sums, counts = codes.hits(features, torch.tensor([[0, 0, 0]]), torch.tensor([True, True, False]))
    assert sums.flatten().tolist() == [3.0, 0.0] and counts.tolist() == [[2.0, 0.0]]


def test_half_precision_of_the_network_is_none_of_theirs():
    codes = Codebooks(1, 4, 2).to(torch.bfloat16)
    assert codes.sums.dtype == codes.counts.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.full((1, 3000, 2), 1.001)
        sums, counts = codes.hits(features, torch.zeros(1, 3000, dtype=torch.long), torch.ones(3000, dtype=torch.bool))
    assert counts[0, 0] == 3000 and sums[0, 0, 0].item() == pytest.approx(3003, abs=0.1)


def test_a_dead_code_begins_anew_at_a_target_of_the_step():
    codes = codebook([2.0, 100.0], [1.0, 1.0], revive_after=3)
    for _ in range(2):
        step(codes, [1.0, 2.0])
    assert codes.centroids[0, 1, 0] == 100
    step(codes, [1.0, 2.0])
    assert codes.centroids[0, 1, 0].item() in (1.0, 2.0)
    assert codes.counts[0, 1] == 1 and codes.idle.tolist() == [[0, 0]]


@pytest.mark.parametrize(("mass", "expected"), [((1.0, 0.0), 1), ((0.5, 0.5), 2), ((6.0, 2.0), 1.754765)])
def test_perplexity(mass, expected):
    assert perplexity(torch.tensor(mass)).item() == pytest.approx(expected, abs=1e-5)


def on_a_rank(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Other draws on each rank, then ten steps of unequal parts; the codes at first and at last."""
    torch.manual_seed(rank)
    codes = Codebooks(2, 8, 4)
    codes.same_on_all_ranks()
    first = codes.sums.clone()
    for number in range(10):
        rows = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(number))
        mine = rows if world == 1 else rows[:, :9] if rank == 0 else rows[:, 9:]
        codes.update(*codes.hits(mine, codes(mine), torch.ones(mine.shape[1], dtype=torch.bool)))
    return first, codes.centroids


def test_two_processes_have_the_codes_of_one(pair):
    alone = on_a_rank(0, 1)
    for first, last in pair.run(on_a_rank):
        assert torch.equal(first, alone[0])
        assert_close(last, alone[1])
