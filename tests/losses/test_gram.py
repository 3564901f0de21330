import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ssd.losses.gram import gram_loss, resize_tokens


def test_worked_example():
    student, teacher = tensor([[[1.0, 0], [0, 1.0]]]), tensor([[[1.0, 0], [1.0, 0]]])
    assert_close(gram_loss(student, teacher), tensor([0.5]))


def test_lengths_and_common_rotations_of_patches_do_not_count():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    assert gram_loss(x, x * torch.rand(3, 7, 1).add(0.5)).max() < 1e-10
    assert gram_loss(x, x @ rotation).max() < 1e-10
    assert gram_loss(x, x.flip(1)).min() > 1e-3


def test_it_is_the_loop_over_pairs_and_widths_may_differ():
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    u, w = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    plain = [sum(((u[b, i] @ u[b, j]) - (w[b, i] @ w[b, j])) ** 2 for i in range(4) for j in range(4)) for b in (0, 1)]
    assert_close(gram_loss(x, y), torch.stack(plain) / 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gram_loss(x, y), torch.stack(plain) / 16)


def test_a_finer_map_comes_to_the_grid_bicubically():
    tokens = torch.randn(2, 48, 5)
    resized = resize_tokens(tokens, (6, 8), (3, 4))
    maps = torch.nn.functional.interpolate(
        tokens.permute(0, 2, 1).reshape(2, 5, 6, 8), size=(3, 4), mode="bicubic", align_corners=False
    )
    assert_close(resized, maps.flatten(2).permute(0, 2, 1))
    assert resize_tokens(tokens, (6, 8), (6, 8)) is tokens


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_map_stays_constant(value):
    assert_close(resize_tokens(torch.full((1, 16, 2), value), (4, 4), (2, 2)), torch.full((1, 4, 2), value))
