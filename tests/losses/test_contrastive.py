import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ssd.losses.contrastive import queue_contrast


def unit(*shape, seed: int = 0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("count, apart, alike", [(65_536, 6.0926, 11.0904), (1023, 2.0660, 6.9315)])
def test_worked_examples(count, apart, alike):
    """ln(1 + K e^-5) where the target is met and all else is orthogonal; ln(K + 1) where all are alike."""
    x = torch.tensor([[1.0, 0.0]])
    assert_close(
        queue_contrast(x, x, torch.tensor([[0.0, 1.0]]).expand(count, 2), 0.2), torch.tensor([apart]), atol=1e-4, rtol=0
    )
    assert_close(queue_contrast(x, x, x.expand(count, 2), 0.2), torch.tensor([alike]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
def test_loss_and_gradient_in_chunks_are_those_of_a_cross_entropy_over_all_logits(chunk):
    rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    target, negatives = unit(10, 6, seed=1).requires_grad_(), unit(30, 6, seed=2).requires_grad_()
    weights = torch.rand(10, generator=torch.Generator().manual_seed(4))
    x = F.normalize(rows, dim=-1)
    logits = torch.cat([(x * target).sum(-1, keepdim=True), x @ negatives.T], dim=1) / 0.2
    plain = F.cross_entropy(logits, torch.zeros(10, dtype=torch.long), reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), rows, retain_graph=True)
    found = queue_contrast(x, target, negatives, 0.2, chunk=chunk)
    assert_close(found, plain.detach(), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((found * weights).sum(), [rows, target, negatives], allow_unused=True)
    assert_close(gradients[0], expected, atol=1e-6, rtol=1e-4)
    assert gradients[1] is None and gradients[2] is None


def test_negatives_that_are_not_there_do_not_count_and_none_cost_nothing():
    x = unit(5, 4).requires_grad_()
    target, negatives = unit(5, 4, seed=1), unit(8, 4, seed=2)
    found = queue_contrast(x, target, negatives, 0.2, valid=torch.arange(8) < 3)
    assert_close(found, queue_contrast(x, target, negatives[:3], 0.2))
    nothing = queue_contrast(x, target, negatives, 0.2, valid=torch.zeros(8, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(nothing.sum(), x)
    assert_close(nothing.detach(), torch.zeros(5), atol=1e-6, rtol=0)
    assert_close(gradient, torch.zeros(5, 4), atol=1e-5, rtol=0)


def test_a_target_that_is_met_with_near_certainty_keeps_its_digits():
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = queue_contrast(x, x.detach(), torch.tensor([[-1.0, 0.0]]), 0.2)
    assert_close(loss, torch.tensor([math.log1p(math.exp(-10))]), atol=1e-6, rtol=1e-3)


def test_products_in_half_precision_stay_near():
    x, target, negatives = unit(16, 32), unit(16, 32, seed=1), unit(64, 32, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = queue_contrast(x, target, negatives, 0.2)
    assert found.dtype == torch.float32
    assert_close(found, queue_contrast(x, target, negatives, 0.2), atol=2e-2, rtol=0)
