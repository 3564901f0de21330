import math

import pytest
import torch
from torch import softmax, tensor
from torch.nn import functional as F
from torch.testing import assert_close

from ssd.batch import Scores
from ssd.losses.prototype import cross_view_cross_entropy, entropy, token_cross_entropy


def plain(student, target, temperature, skip_same_view):
    """The double loop of the paper's pseudo-code."""
    pairs = []
    for v, q in enumerate(target):
        for s, z in enumerate(student):
            if not (skip_same_view and v == s):
                pairs.append(-(q * F.log_softmax(z / temperature, dim=-1)).sum(-1))
    return sum(pairs) / len(pairs), len(pairs)


def test_worked_example():
    """Numbers by hand: student (.2, 0, -.1) at .1 against teacher (.1, .02, -.04) at .04."""
    target = softmax(tensor([[[0.1, 0.02, -0.04]]]) / 0.04, dim=-1)
    loss = cross_view_cross_entropy(tensor([[[0.2, 0.0, -0.1]]]), target, 0.1, skip_same_view=False)
    assert_close(loss, tensor([0.47980]), atol=1e-5, rtol=0)


def test_a_uniform_student_pays_log_k():
    target = softmax(torch.randn(2, 3, 4096), dim=-1)
    loss = cross_view_cross_entropy(torch.zeros(10, 3, 4096), target, 0.1, skip_same_view=True)
    assert_close(loss, torch.full((3,), math.log(4096)))
    assert_close(entropy(torch.full((4096,), 1 / 4096)), tensor(math.log(4096)))


@pytest.mark.parametrize("views, pairs", [(2, 2), (10, 18), (12, 22)])
@pytest.mark.parametrize("scores", [False, True])
def test_it_is_the_double_loop_over_pairs_and_so_is_its_gradient(views, pairs, scores):
    torch.manual_seed(0)
    features, prototypes = torch.randn(views, 4, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    features.requires_grad_()
    prototypes.requires_grad_()
    target = softmax(torch.randn(2, 4, 16, dtype=torch.float64) / 0.1, dim=-1)
    logits = features @ prototypes.T

    expected, count = plain(logits, target, 0.1, True)
    assert count == pairs
    weights = torch.rand(4, dtype=torch.float64)
    found = cross_view_cross_entropy(
        Scores(features, prototypes) if scores else logits, target, 0.1, skip_same_view=True
    )
    # the loss works in float32
    assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((expected * weights).sum(), [features, prototypes], retain_graph=True)
    ours = torch.autograd.grad((found * weights).sum(), [features, prototypes])
    for a, b in zip(ours, gradients):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_swapping_views_swaps_nothing_but_indices():
    student, target = torch.randn(4, 3, 16), softmax(torch.randn(2, 3, 16), dim=-1)
    loss = cross_view_cross_entropy(student, target, 0.1, skip_same_view=True)
    swapped = cross_view_cross_entropy(student[[1, 0, 3, 2]], target[[1, 0]], 0.1, skip_same_view=True)
    assert_close(loss, swapped)


def test_samples_do_not_mix():
    student, target = torch.randn(3, 5, 16), softmax(torch.randn(2, 5, 16), dim=-1)
    loss = cross_view_cross_entropy(student, target, 0.1, skip_same_view=True)
    order = torch.randperm(5)
    assert_close(cross_view_cross_entropy(student[:, order], target[:, order], 0.1, skip_same_view=True), loss[order])


@pytest.mark.parametrize("chunk", [3, 7, 8192])
def test_tokens_pay_their_own_cross_entropy_however_they_are_chunked(chunk):
    torch.manual_seed(0)
    features, prototypes = torch.randn(7, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    target, weights = softmax(torch.randn(7, 16) / 0.1, dim=-1), torch.rand(7)
    expected = torch.stack(
        [-(q * F.log_softmax(z / 0.1, dim=-1)).sum() for q, z in zip(target, features @ prototypes.T)]
    )
    found = token_cross_entropy(Scores(features, prototypes), target, 0.1, chunk=chunk)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_close(token_cross_entropy(features @ prototypes.T, target, 0.1, chunk=chunk), found)
    gradients = torch.autograd.grad((expected * weights).sum(), [features, prototypes], retain_graph=True)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), [features, prototypes]), gradients):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_worked_token():
    """The same numbers as between views: .47980, and ln 3 for a uniform student."""
    target = softmax(tensor([[0.1, 0.02, -0.04]] * 2) / 0.04, dim=-1)
    loss = token_cross_entropy(tensor([[0.2, 0.0, -0.1], [0.5, 0.5, 0.5]]), target, 0.1)
    assert_close(loss, tensor([0.47980, math.log(3)]), atol=1e-5, rtol=0)
