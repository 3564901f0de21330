import math

import pytest
import torch
from torch import softmax, tensor
from torch.nn import functional as F
from torch.testing import assert_close

from ssd.batch import Scores
from ssd.benchmarks.memory import peak_bytes
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
    # logits that are given as such are worked on in float32
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


def double_scores(views, batch, prototypes=11, dim=5, target_views=2):
    torch.manual_seed(0)
    features = torch.randn(views, batch, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(prototypes, dim, dtype=torch.float64, requires_grad=True)
    return features, weight, softmax(3 * torch.randn(target_views, batch, prototypes, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("views, target_views", [(4, 2), (1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("skip_same_view", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_gradients_equal_finite_differences(views, target_views, skip_same_view, chunk):
    features, weight, target = double_scores(views, 3, target_views=target_views)

    def loss(features, weight):
        scores = Scores(features, weight)
        return cross_view_cross_entropy(scores, target, 0.3, skip_same_view=skip_same_view, chunk=chunk)

    assert torch.autograd.gradcheck(loss, (features, weight))


def test_gradients_are_those_of_the_double_loop_whatever_is_done_with_the_losses():
    features, weight, target = double_scores(4, 6)
    uses = {
        "sum": lambda loss: loss.sum() / 3,
        "mean": lambda loss: 0.7 * loss.mean(),
        "one sample": lambda loss: loss[2],
        "weighted": lambda loss: (loss * torch.arange(6)).sum(),
        "squared": lambda loss: loss.square().sum(),
        "twice": lambda loss: loss.sum() + loss[:3].sum(),
    }
    expected, _ = plain(features @ weight.T, target, 0.1, True)
    found = cross_view_cross_entropy(Scores(features, weight), target, 0.1, skip_same_view=True, chunk=5)
    assert_close(found, expected)
    for use in uses.values():  # several backward passes through one graph
        for a, b in zip(
            *(torch.autograd.grad(use(x), [features, weight], retain_graph=True) for x in (found, expected))
        ):
            assert_close(a, b)


def test_targets_get_no_gradient_and_frozen_sides_are_left_alone():
    features, weight, target = double_scores(3, 2)
    loss = cross_view_cross_entropy(Scores(features, weight), target.requires_grad_(), 0.1, skip_same_view=True).sum()
    assert torch.autograd.grad(loss, [target], allow_unused=True) == (None,)
    expected, _ = plain(features @ weight.T, target.detach(), 0.1, True)
    for scores, learns in ((Scores(features, weight.detach()), features), (Scores(features.detach(), weight), weight)):
        loss = cross_view_cross_entropy(scores, target, 0.1, skip_same_view=True).sum()
        assert_close(torch.autograd.grad(loss, learns), torch.autograd.grad(expected.sum(), learns, retain_graph=True))
    with torch.no_grad():
        assert_close(cross_view_cross_entropy(Scores(features, weight), target, 0.1, skip_same_view=True), expected)


def test_gains_far_from_one_stay_finite():
    """Logits of some thousands, as unbounded gains may give: the largest of a row is taken off before exp."""
    features, weight, target = double_scores(3, 2)
    scores = Scores(features.float(), 1000 * weight.float())
    loss = cross_view_cross_entropy(scores, target.float(), 0.1, skip_same_view=True)
    expected, _ = plain(scores.logits(), target.float(), 0.1, True)
    assert_close(loss, expected, rtol=1e-4, atol=0)


def test_under_autocast_products_are_bfloat16_and_the_rest_is_float32():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(6, 8, 64), dim=-1).requires_grad_()
    weight = F.normalize(torch.randn(512, 64), dim=-1).requires_grad_()
    target = softmax(torch.randn(2, 8, 512) / 0.5, dim=-1)
    expected, _ = plain(features @ weight.T, target, 0.1, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_view_cross_entropy(Scores(features, weight), target, 0.1, skip_same_view=True, chunk=20)
        tokens = token_cross_entropy(Scores(features[0], weight), target[0], 0.1, chunk=3)
    assert found.dtype == tokens.dtype == torch.float32
    # 8 bits of mantissa: logits of up to 10 are off by .02 and a mean over 512 of them by much less
    assert_close(found, expected, atol=3e-3, rtol=0)
    assert not torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), [features, weight]) for loss in (found, expected))):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


def test_only_a_chunk_of_logits_is_held():
    """With 2 + 8 views at most a quarter of what the plain form holds, and no more for more prototypes but their own
    gradient."""
    dim, views, batch, chunk = 16, 10, 32, 256

    def peak(prototypes, chunk):
        torch.manual_seed(0)
        features, weight = torch.randn(views, batch, dim, requires_grad=True), torch.randn(prototypes, dim)
        target = softmax(torch.randn(2, batch, prototypes), dim=-1)
        scores = Scores(features, weight.requires_grad_())

        def work():
            if chunk is None:
                loss = plain(scores.logits(), target, 0.1, True)[0]
            else:
                loss = cross_view_cross_entropy(scores, target, 0.1, skip_same_view=True, chunk=chunk)
            loss.sum().backward()

        return peak_bytes(work)

    logits = 4 * views * batch * chunk
    few, many = (peak(prototypes, chunk) - 4 * prototypes * dim for prototypes in (4096, 8192))
    assert many < 1.05 * few < 2.5 * logits
    assert peak(4096, chunk) < peak(4096, None) / 4
    # it would be seen: with a chunk of everything the logits of all prototypes are held
    assert peak(4096, 4096) > 4 * views * batch * 4096
