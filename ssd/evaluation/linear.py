"""The linear probe: a grid of learning rates trained at once, the rate chosen on a held-out part of the training set.

The training of Oquab et al., "DINOv2", 2023, appendix B.3 (SGD, momentum 0.9, cosine to zero, no weight
decay, a grid of rates), on cached features. Departs from it: features are standardised, and the rate is
not chosen on the test set.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd.data.randomness import generator
from ssd.errors import UserError
from ssd.evaluation.heads import Fit, Heads, probabilities
from ssd.evaluation.protocol import check_finite, check_labels, count_classes
from ssd.evaluation.scaling import standardise
from ssd.evaluation.splits import held_out

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
ORDER = 3


def linear_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int | None = None,
    rates: Sequence[float] = RATES,
    held_out_share: float = 0.1,
    seed: int = 0,
    **training,
) -> Fit:
    """Classes of the test features by the head whose rate was best on the held-out part.

    (N, D), (N,) and (Q, D). With the chosen rate the head is trained again on the whole training set;
    ties go to the smaller rate. A single rate needs no held-out part. `training` is passed to `train_heads`.
    """
    check_labels("the linear probe", train=labels)
    check_finite(train=train, test=test)
    num_classes = num_classes or count_classes(labels)
    rates = sorted(rates)
    if len(rates) > 1:
        rates = [best_rate(train, labels, num_classes, rates, held_out_share, seed, **training)[0]]
    train, test = standardise(train, test)
    heads = train_heads(train, labels, rates, num_classes, seed=seed, **training)
    return Fit(heads.logits(test)[0].argmax(1), rates[0])


def best_rate(
    train: Tensor,
    labels: Tensor,
    num_classes: int,
    rates: Sequence[float] = RATES,
    held_out_share: float = 0.1,
    seed: int = 0,
    **training,
) -> tuple[float, float]:
    """The rate that is best on the held-out part of the training set, the smaller of equal ones, and its accuracy there."""
    rates = sorted(rates)
    (train,) = standardise(train)
    fit, held = held_out(labels, held_out_share, seed)
    heads = train_heads(train[fit], labels[fit], rates, num_classes, seed=seed, **training)
    correct = (heads.logits(train[held]).argmax(2) == labels[held]).sum(1)
    best = int(correct.argmax())
    return rates[best], int(correct[best]) / len(held)


def train_heads(
    features: Tensor,
    labels: Tensor,
    rates: Sequence[float],
    num_classes: int,
    epochs: int = 10,
    min_steps: int = 1000,
    batch_size: int = 256,
    momentum: float = 0.9,
    seed: int = 0,
) -> Heads:
    """One head for each learning rate, from zero, all seeing the same batches. (N, D), (N,) -> G = len(rates).

    Cross-entropy averaged over the batch, SGD with momentum, rate falling to zero along half a cosine.
    Small sets go through more epochs than asked for, until there were `min_steps` steps.
    """
    if min(rates, default=0) <= 0:
        raise UserError(f"learning rates {list(rates)} of the linear probe: give at least one, all above 0.")
    number, width = features.shape
    batch_size = min(batch_size, number)
    steps_per_epoch = number // batch_size
    epochs = max(epochs, math.ceil(min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    # one column for each class and rate, the rates of a class side by side
    weight = features.new_zeros(width, num_classes * len(rates))
    bias = features.new_zeros(num_classes * len(rates))
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    rate = torch.tensor(rates).to(features).repeat(num_classes)
    minus_one = features.new_full((), -1.0)
    for epoch in range(epochs):
        order = torch.from_numpy(generator(ORDER, seed, epoch).permutation(number)).to(features.device)
        for step in range(steps_per_epoch):
            rows = order[step * batch_size : (step + 1) * batch_size]
            batch = features[rows]
            logits = torch.addmm(bias, batch, weight).unflatten(1, (num_classes, len(rates)))
            residual = probabilities(logits, dim=1)  # (b, C, G)
            true_class = labels[rows, None, None].expand(-1, 1, len(rates))
            residual.scatter_add_(1, true_class, minus_one.expand(true_class.shape))
            residual = residual.flatten(1)
            weight_speed.addmm_(batch.T, residual, beta=momentum, alpha=1 / batch_size)
            bias_speed.mul_(momentum).add_(residual.mean(0))
            now = rate * (math.cos(math.pi * (epoch * steps_per_epoch + step) / total) + 1) / 2
            weight.addcmul_(weight_speed, now, value=-1)
            bias.addcmul_(bias_speed, now, value=-1)
    heads = weight.unflatten(1, (num_classes, len(rates))).permute(2, 0, 1)
    return Heads(heads.contiguous(), bias.unflatten(0, (num_classes, len(rates))).T.contiguous())
