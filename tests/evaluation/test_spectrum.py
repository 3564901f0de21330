import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from ssd.errors import UserError
from ssd.evaluation.spectrum import alpha_req, lidar, rankme


def with_spectrum(singular_values, number=60, seed=0):
    """(N, D) with the given singular values and random singular vectors."""
    random = torch.Generator().manual_seed(seed)
    width = len(singular_values)
    left, _ = torch.linalg.qr(torch.randn(number, width, generator=random).double())
    right, _ = torch.linalg.qr(torch.randn(width, width, generator=random).double())
    return (left * torch.tensor(singular_values).double()) @ right.T


@settings(deadline=None, max_examples=30)
@given(values=lists(floats(0.01, 100), min_size=1, max_size=20))
def test_rankme_is_the_exponential_of_the_entropy_of_the_singular_values(values):
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert rankme(with_spectrum(values)) == pytest.approx(expected, rel=1e-4)  # epsilon = 1e-7 for each value


@settings(deadline=None, max_examples=20)
@given(rank=integers(1, 16), scale=floats(1e-3, 1e3))
def test_equal_singular_values_have_their_number_as_rank_at_any_scale(rank, scale):
    features = with_spectrum([scale] * rank + [0.0] * (16 - rank)).float()
    assert rankme(features) == pytest.approx(rank, rel=1e-3)


def test_rankme_of_few_samples_is_that_of_the_transpose():
    features = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert rankme(features) == pytest.approx(rankme(features.T), rel=1e-6)


def test_collapse_is_rank_one_and_nothing_is_rank_zero():
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(50, 8)) == 0


def test_features_that_are_not_finite_have_no_spectrum():
    features = torch.ones(10, 4)
    features[0, 0] = float("nan")
    assert math.isnan(rankme(features)) and math.isnan(alpha_req(features))
    assert math.isnan(lidar(features[:, None].expand(-1, 2, -1)))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("first", "last"), [(1, None), (3, 20)])
def test_a_power_law_has_its_exponent(exponent, first, last):
    """Eigenvalues i^-a of the covariance are singular values i^(-a / 2) of centred features."""
    width = 24
    random = torch.randn(100, width, generator=torch.Generator().manual_seed(0)).double()
    left, _ = torch.linalg.qr(random - random.mean(0))  # orthonormal and of mean 0
    features = left * torch.arange(1, width + 1).double() ** (-exponent / 2)
    assert alpha_req(features + 5, first, last) == pytest.approx(exponent, abs=1e-6)


def test_one_direction_has_no_decay():
    assert math.isnan(alpha_req(torch.randn(20, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 5)))


def test_lidar_counts_the_directions_that_tell_samples_apart():
    """Samples at +-e_i for i up to r, views with the same noise in all directions: rank r."""
    random = torch.Generator().manual_seed(0)
    for rank in (1, 3, 6):
        means = torch.cat([torch.eye(6)[:rank], -torch.eye(6)[:rank]]).repeat(200, 1)
        noise = 0.01 * torch.randn(len(means), 4, 6, generator=random)
        noise -= noise.mean(1, keepdim=True)  # the means are exact
        assert lidar(means[:, None] + noise, delta=0.0) == pytest.approx(rank, rel=0.02)


def test_lidar_does_not_depend_on_the_basis_without_delta():
    random = torch.Generator().manual_seed(0)
    samples = torch.randn(100, 1, 5, generator=random) * torch.tensor([1, 2, 3, 4, 9.0])
    views = samples + torch.randn(100, 6, 5, generator=random)
    mix = torch.randn(5, 5, generator=random)
    assert lidar(views @ mix, delta=0.0) == pytest.approx(lidar(views, delta=0.0), rel=1e-3)


def test_spectra_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="first < last"):
        alpha_req(torch.randn(10, 5), 3, 3)
    with pytest.raises(UserError, match="at least 2 samples with 2 views"):
        lidar(torch.randn(10, 5))
