import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch import Tensor
from torch.testing import assert_close

from ssd.cka import linear_cka


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_kernels(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, equation 5, on kernels whose diagonals are taken out, for each of the three HSIC."""

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        n = len(one)
        k, m = (kernel - kernel.diag().diag() for kernel in (one @ one.T, other @ other.T))
        trace = torch.trace(k @ m)
        return (trace + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)) / (n * (n - 3))

    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


def test_worked_example():
    """Deviations (-1, 0, 1) and (-4, -1, 5) / 3: 9 / 2 / 14 x 3 = .96429."""
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [2.0], [4.0]])
    assert_close(linear_cka(x, y, unbiased=False), torch.tensor(0.96429), atol=1e-5, rtol=0)


def test_the_unbiased_form_is_the_estimator_on_kernels_wherever_the_rows_lie():
    x, y = rows(20, 6), rows(20, 9, 1)
    y[:, :3] += 2 * x[:, :3]
    expected = by_kernels(x.double(), y.double()).float()
    assert_close(linear_cka(x, y), expected, atol=1e-5, rtol=1e-5)
    assert_close(linear_cka(x + 5, y - 3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
@given(count=integers(4, 20), width=integers(1, 8), scale=floats(0.1, 10))
def test_features_are_wholly_like_themselves_and_like_themselves_turned_and_scaled(unbiased, count, width, scale):
    x = rows(count, width)
    turn = torch.linalg.qr(rows(width, width, 1))[0]
    assert_close(linear_cka(x, x, unbiased=unbiased), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert_close(linear_cka(x, scale * x @ turn, unbiased=unbiased), torch.tensor(1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count, plain", [(64, 0.854), (1024, 0.272), (8192, 0.045)])
def test_few_unrelated_samples_look_alike_to_the_plain_form_alone(count, plain):
    x, y = rows(count, 384), rows(count, 384, 1)
    assert float(linear_cka(x, y, unbiased=False)) == pytest.approx(plain, abs=0.01)
    # 1 / sqrt(D E) is about how far a single estimate strays where n is large, a little more where it is small
    assert abs(float(linear_cka(x, y))) < 0.03


def test_constant_features_are_like_nothing_and_what_is_not_a_number_stays_so():
    x = rows(8, 3)
    assert float(linear_cka(x, torch.ones(8, 3))) == 0
    assert linear_cka(x, x * float("nan")).isnan()


def test_half_precision_is_computed_in_single():
    x, y = rows(64, 8), rows(64, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cka(x, y), linear_cka(x, y))
        assert linear_cka(x, y).dtype == torch.float32
        found = linear_cka(x, y)
    assert torch.equal(found, linear_cka(x, y))


def half(rank: int, world: int, unbiased: bool) -> Tensor:
    x, y = rows(12, 5), rows(12, 7, 1)
    mine = slice(0, 4) if rank == 0 else slice(4, 12)
    return linear_cka(x[mine], y[mine], unbiased=unbiased)


@pytest.mark.parametrize("unbiased", [True, False])
def test_two_processes_with_other_rows_find_what_one_with_all_finds(unbiased, pair):
    first, second = pair.run(half, unbiased)
    assert torch.equal(first, second)
    assert_close(first, linear_cka(rows(12, 5), rows(12, 7, 1), unbiased=unbiased), atol=1e-5, rtol=1e-5)


def test_three_rows_are_too_few():
    with pytest.raises(ValueError, match="too few"):
        linear_cka(rows(3, 2), rows(3, 2, 1))
