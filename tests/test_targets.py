import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ssd.batch import Scores
from ssd.targets import Centering, Sinkhorn, sinkhorn_knopp


def test_worked_example_of_centring():
    """t = (.1, .02, -.04) at .04, before and after its own update at momentum .9."""
    centering = Centering(3, momentum=0.9)
    logits = torch.tensor([[[0.1, 0.02, -0.04]]])
    assert_close(centering(logits, 0.04), torch.tensor([[[0.8580, 0.1161, 0.0259]]]), atol=5e-5, rtol=0)
    centering.update(logits)
    assert_close(centering.center, torch.tensor([0.010, 0.002, -0.004]))
    assert_close(centering(logits, 0.04), torch.tensor([[[0.8277, 0.1368, 0.0355]]]), atol=5e-5, rtol=0)


def test_reading_does_not_write():
    centering = Centering(8)
    centering(torch.randn(2, 4, 8), 0.04)
    assert not centering.center.any()


def test_sinkhorn_worked_examples():
    t = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.0, 0.1]])
    expected = torch.tensor([[0.6502, 0.3498], [0.6502, 0.3498], [0.2010, 0.7990]])
    assert_close(sinkhorn_knopp(t, 0.1, 3), expected, atol=5e-5, rtol=0)

    t = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log()
    assert_close(sinkhorn_knopp(t, 1.0, 1), torch.tensor([[8 / 13, 5 / 13], [2 / 7, 5 / 7]]))
    assert_close(sinkhorn_knopp(t, 1.0, 100), torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))


def test_identical_rows_are_assigned_uniformly():
    assert_close(sinkhorn_knopp(torch.tensor([[3.0, -1.0, 0.5]] * 4), 0.05, 3), torch.full((4, 3), 1 / 3))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 16), st.integers(2, 16), st.floats(-5, 5), st.integers(0, 10_000))
def test_sinkhorn_uses_every_prototype_alike_and_ignores_shifts(rows, num_prototypes, shift, seed):
    # scores within 1 of each other, at .5: each iteration shrinks what is left to tanh(1)^2 = .58 of it (Birkhoff)
    t = torch.rand(rows, num_prototypes, generator=torch.Generator().manual_seed(seed))
    probs = sinkhorn_knopp(t, 0.5, 200)
    assert_close(probs.sum(1), torch.ones(rows))
    assert_close(probs.sum(0), torch.full((num_prototypes,), rows / num_prototypes), atol=1e-3, rtol=0)
    moved = t.clone()
    moved[:, 0] += shift
    moved[0] -= shift
    assert_close(sinkhorn_knopp(moved, 0.5, 200), probs, atol=1e-3, rtol=0)


def test_sinkhorn_survives_logits_that_overflow_exp():
    t = torch.randn(6, 4)
    t[:, 0] += 1000
    probs = sinkhorn_knopp(t, 0.04, 3)
    t[:, 0] -= 1000
    # adding 1000 rounds the logits themselves to 6e-5, which / .04 is 1.5e-3
    assert probs.isfinite().all()
    assert_close(probs, sinkhorn_knopp(t, 0.04, 3), atol=5e-3, rtol=0)


def test_groups_are_balanced_apart():
    t = torch.randn(2, 5, 4)
    together = sinkhorn_knopp(t, 0.1)
    assert_close(together[0], sinkhorn_knopp(t[0], 0.1))
    t[1] = t[1].flip(0)
    assert_close(sinkhorn_knopp(t, 0.1)[0], together[0])


def test_rows_that_are_not_valid_are_uniform_and_the_others_as_without_them():
    t = torch.randn(6, 4)
    valid = torch.tensor([True, False, True, True, False, True])
    t[1], t[4] = 1000.0, float("-inf")
    probs = sinkhorn_knopp(t, 0.04, 3, valid)
    assert_close(probs[valid], sinkhorn_knopp(t[valid], 0.04, 3))
    assert_close(probs[~valid], torch.full((2, 4), 0.25))
    groups = torch.stack([t, t.flip(0)])
    assert_close(sinkhorn_knopp(groups, 0.04, 3, torch.stack([valid, valid.flip(0)]))[0], probs)
    assert_close(Sinkhorn()(t.view(2, 3, 4), 0.04, valid.view(2, 3)).flatten(0, 1), probs)
    assert_close(sinkhorn_knopp(t, 0.04, 3, torch.zeros(6, dtype=torch.bool)), torch.full((6, 4), 0.25))


def test_a_centre_follows_valid_rows_alone_and_stays_where_there_is_none():
    centering = Centering(3, momentum=0.5)
    logits = torch.tensor([[[1.0, 2.0, 3.0], [float("inf"), 0.0, 0.0]], [[3.0, 2.0, 1.0], [7.0, 7.0, 7.0]]])
    valid = torch.tensor([[True, False], [True, False]])
    centering.update(logits, valid)
    assert_close(centering.center, torch.tensor([1.0, 1.0, 1.0]))
    centering.update(logits, torch.zeros(2, 2, dtype=torch.bool))
    assert_close(centering.center, torch.tensor([1.0, 1.0, 1.0]))


def test_scores_centre_like_their_logits_also_under_autocast():
    scores = Scores(torch.randn(2, 50, 8), torch.randn(16, 8))
    valid = torch.rand(2, 50) > 0.5
    plain, short = Centering(16), Centering(16)
    plain.update(scores.logits(), valid)
    with torch.autocast("cpu", torch.bfloat16):
        short.update(scores, valid)
    assert_close(short.center, plain.center, atol=1e-6, rtol=1e-5)


def test_the_centre_of_two_processes_weighs_rows_not_processes(pair):
    whole = Centering(4)
    whole.update(uneven_rows(), torch.tensor([True, True, False, True, False]))
    for center in pair.run(center_of_rank):
        assert_close(center, whole.center)


def uneven_rows():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def center_of_rank(rank, world):
    """Three valid rows in all: both of rank 0's, one of rank 1's three."""
    mine = (slice(0, 2), slice(2, 5))[rank]
    centering = Centering(4)
    centering.update(uneven_rows()[mine], torch.tensor([True, True, False, True, False])[mine])
    return centering.center


def test_sinkhorn_does_not_hide_what_is_not_a_number():
    logits = torch.randn(4, 6)
    logits[1, 2] = float("nan")
    assert sinkhorn_knopp(logits, 0.1).isnan().any()
    assert sinkhorn_knopp(logits, 0.1, valid=torch.tensor([True, False, True, True])).isfinite().all()


def test_sinkhorn_over_a_dimension_apart_is_that_of_each_of_its_places():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))  # (V, B, N, K)
    probs = Sinkhorn(apart=2)(logits, 0.1)
    for place in range(3):
        alone = sinkhorn_knopp(logits[:, :, place].reshape(10, 4), 0.1)
        assert_close(probs[:, :, place].reshape(10, 4), alone)
    valid = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(1)) > 0.3
    some = Sinkhorn(apart=2)(logits, 0.1, valid)
    rows = valid[:, :, 1].flatten()
    assert_close(some[:, :, 1].reshape(10, 4)[rows], sinkhorn_knopp(logits[:, :, 1].reshape(10, 4)[rows], 0.1))


def balanced_by_place(rank: int, world: int, logits: torch.Tensor) -> torch.Tensor:
    return Sinkhorn(apart=1)(logits.chunk(world)[rank], 0.06)


def test_places_are_balanced_over_the_samples_of_all_processes(pair):
    logits = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
    assert_close(torch.cat(pair.run(balanced_by_place, logits)), Sinkhorn(apart=1)(logits, 0.06))
