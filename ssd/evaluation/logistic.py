"""Multinomial logistic regression by L-BFGS, many problems at a time.

Problems differ in penalty, in samples (draws of few labels), or in both. They share every product, so
that a grid of penalties or a hundred draws cost little more than one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.heads import Fit, Heads, probabilities
from ssd.evaluation.protocol import check_finite, check_labels, count_classes
from ssd.evaluation.scaling import principal_axes, standardise
from ssd.evaluation.splits import held_out

PENALTIES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)


def logistic_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int | None = None,
    l2: float | Sequence[float] = PENALTIES,
    held_out_share: float = 0.1,
    seed: int = 0,
) -> Fit:
    """Classes of the test features by logistic regression on standardised training features.

    (N, D), (N,) and (Q, D). `l2` multiplies half the squared length of the weights, beside the sum of the
    cross-entropy over samples (scikit-learn's 1 / C). Of several values, the one with the best accuracy on
    a held-out part of the training set is fitted again on all of it; ties go to the larger penalty.
    """
    check_labels("logistic regression", train=labels)
    check_finite(train=train, test=test)
    num_classes = num_classes or count_classes(labels)
    train, test = standardise(train, test)
    basis, _ = principal_axes(train)
    train, test = train @ basis, test @ basis
    values = sorted([l2] if isinstance(l2, int | float) else l2, reverse=True)
    if len(values) > 1:
        fit, held = held_out(labels, held_out_share, seed)
        heads = fit_logistic(train[fit], labels[fit], torch.tensor(values), num_classes)
        correct = (heads.logits(train[held]).argmax(2) == labels[held]).sum(1)
        values = [values[int(correct.argmax())]]
    heads = fit_logistic(train, labels, torch.tensor(values), num_classes)
    return Fit(heads.logits(test)[0].argmax(1), values[0])


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    l2: Tensor,
    num_classes: int,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
    memory: int = 10,
    refresh: int = 5,
) -> Heads:
    """G minima of  sum over samples of cross-entropy + l2 / 2 * |weight|^2,  the bias without penalty.

    `features` (N, D) with labels (N,) for all problems, or (G, N, D) with (G, N); `l2` (G,). Stops when no
    entry of the gradient, divided by N, is above `tolerance`. L-BFGS (Nocedal and Wright, "Numerical
    Optimization", algorithms 7.4 and 7.5) that starts from the diagonal of the curvature, taken anew every `refresh`
    steps: in the principal axes of the features it is most of the curvature. Logits are linear in the step, so
    that a line search costs no product with the features.
    """
    if (l2 < 0).any():
        raise UserError(f"l2 = {l2.tolist()} must not be negative.")
    number = features.shape[-2]
    features = F.pad(features, (0, 1), value=1.0)  # the bias is the weight of a constant
    penalty = (l2.to(features) / number)[:, None, None].repeat(1, 1, features.shape[-1])
    penalty[..., -1] = 0  # (G, 1, D + 1)
    squares = features.square()
    # classes before samples, so that what is done to each class's logits runs along memory
    weight = features.new_zeros(len(l2), num_classes, features.shape[-1])
    logits = features.new_zeros(len(l2), num_classes, number)
    loss, gradient, probs = loss_and_gradient(features, labels, weight, logits, penalty)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for iteration in range(max_iterations):
        running = gradient.abs().amax((1, 2)) > tolerance  # (G,)
        if not running.any():
            break
        if iteration % refresh == 0:
            guess = 1 / (summed(probs * (1 - probs), squares) / number + penalty).clamp_min(1e-8)
        direction = -inverse_curvature(gradient, steps, guess) * running[:, None, None]
        along = scores(direction, features)
        length, found = line_search(labels, weight, logits, penalty, direction, along, loss, gradient)
        if not (found & running).any():
            break  # only rounding is left to gain
        step = length[:, None, None] * direction
        weight = weight + step
        logits = logits + length[:, None, None] * along
        loss, after, probs = loss_and_gradient(features, labels, weight, logits, penalty)
        change = after - gradient
        agreement = inner(step, change)
        usable = agreement > 1e-10 * inner(change, guess * change).clamp_min(1e-30)
        steps = [*steps, (step, change, torch.where(usable, 1 / agreement, 0.0))][-memory:]
        gradient = after
    return Heads(weight[..., :-1].mT, weight[..., -1])


def scores(weight: Tensor, features: Tensor) -> Tensor:
    """(G, C, D) with (N, D), shared by all, or (G, N, D) -> (G, C, N)"""
    if features.dim() == 3:
        return weight @ features.mT
    return (weight.flatten(0, 1) @ features.T).unflatten(0, weight.shape[:2])


def summed(values: Tensor, features: Tensor) -> Tensor:
    """Features summed over samples, each times its value. (G, C, N) with (N, D) or (G, N, D) -> (G, C, D)"""
    if features.dim() == 3:
        return values @ features
    return (values.flatten(0, 1) @ features).unflatten(0, values.shape[:2])


def loss_and_gradient(
    features: Tensor, labels: Tensor, weight: Tensor, logits: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective divided by N (G,), its gradient (G, C, D + 1) and the probabilities (G, C, N), from logits that are
    known."""
    probs = probabilities(logits, dim=1)
    chosen = labels.expand(len(weight), -1)[:, None]
    residual = probs.scatter_add(1, chosen, probs.new_full((), -1.0).expand(chosen.shape))
    gradient = summed(residual, features) / features.shape[-2] + penalty * weight
    return objective(labels, weight, logits, penalty), gradient, probs


def objective(labels: Tensor, weight: Tensor, logits: Tensor, penalty: Tensor) -> Tensor:
    """Mean cross-entropy plus penalty of each problem. (G,)"""
    chosen = logits.gather(1, labels.expand(len(weight), -1)[:, None]).squeeze(1)
    return (logits.logsumexp(1) - chosen).mean(1) + (penalty * weight.square()).sum((1, 2)) / 2


def line_search(
    labels: Tensor,
    weight: Tensor,
    logits: Tensor,
    penalty: Tensor,
    direction: Tensor,
    along: Tensor,
    loss: Tensor,
    gradient: Tensor,
    halvings: int = 12,
) -> tuple[Tensor, Tensor]:
    """For each problem the first of 1, 1/2, 1/4, ... that lowers the loss enough (Armijo), and whether there is one.

    Both (G,). The length is 0 where none does.
    """
    slope = inner(gradient, direction)
    rounding = 4 * torch.finfo(loss.dtype).eps * loss.abs()
    length, found = torch.ones_like(loss), torch.zeros_like(loss, dtype=torch.bool)
    for _ in range(halvings):
        reach = length[:, None, None]
        trial = objective(labels, weight + reach * direction, logits + reach * along, penalty)
        found = (trial <= loss + 1e-4 * length * slope + rounding) & (slope < 0) | found
        if (found | (slope >= 0)).all():
            break
        length = torch.where(found, length, length / 2)
    return torch.where(found, length, 0.0), found


def inverse_curvature(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], guess: Tensor) -> Tensor:
    """The gradient times the inverse of the curvature that the last steps have shown. (G, C, D + 1)"""
    rest = gradient.clone()
    shares = []
    for step, change, inverse in reversed(steps):
        share = (inverse * inner(step, rest))[:, None, None]
        rest -= share * change
        shares.append(share)
    if steps:
        step, change, inverse = steps[-1]
        scale = inner(step, change) / inner(change, guess * change).clamp_min(1e-30)
        rest *= torch.where(inverse > 0, scale, 1.0)[:, None, None]
    rest *= guess
    for (step, change, inverse), share in zip(steps, reversed(shares), strict=True):
        rest += step * (share - (inverse * inner(change, rest))[:, None, None])
    return rest


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of G pairs of matrices. (G,)"""
    return (first * second).sum((1, 2))
