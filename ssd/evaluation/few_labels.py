"""Linear probes on few labels: logistic regression on many class-balanced draws of the labelled set at once.

A single draw of few labels says more about the draw than about the features, so that mean and spread are
over many, the same ones for all feature sets that are compared.
"""

import torch
from torch import Tensor

from ssd.evaluation.heads import Heads
from ssd.evaluation.logistic import fit_logistic
from ssd.evaluation.protocol import check_finite, check_labels, count_classes
from ssd.evaluation.scaling import principal_axes, standardise
from ssd.evaluation.splits import balanced_draws

NUMBERS_AT_ONCE = 2**26
"""Features and logits held at a time, over all draws that are solved together: 256 MiB."""


def few_label_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    per_class: int,
    draws: int = 20,
    seed: int = 0,
    **settings,
) -> Tensor:
    """Accuracy on the test set of each draw of `per_class` labels per class. (draws,) float64 in [0, 1].

    All arguments are those of `few_label_correct`.
    """
    correct = few_label_correct(train, train_labels, test, test_labels, per_class, draws, seed, **settings)
    return correct.double().mean(1)


def few_label_correct(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    per_class: int,
    draws: int = 20,
    seed: int = 0,
    l2: float = 1.0,
    num_classes: int | None = None,
) -> Tensor:
    """Whether each test sample is answered rightly after each draw of `per_class` labels per class. (draws, Q) bool.

    (N, D), (N,), (Q, D), (Q,). Features are standardised over the whole training set, labelled or not. `l2`
    multiplies half the squared length of the weights, beside the sum of the cross-entropy over the labelled
    samples (scikit-learn's 1 / C); it is fixed because so few labels leave none to choose it on.
    """
    check_labels("the few-label probe", train=train_labels, test=test_labels)
    check_finite(train=train, test=test)
    num_classes = num_classes or count_classes(train_labels, test_labels)
    train, test = standardise(train, test)
    drawn = balanced_draws(train_labels, per_class, draws, seed)  # (draws, M)
    numbers = drawn.shape[1] * (train.shape[1] + num_classes) + len(test) * num_classes
    few = drawn.shape[1] < train.shape[1]  # then the axes of a draw are fewer
    shared = None if few else principal_axes(train)[0]
    correct = []
    for rows in drawn.split(max(1, NUMBERS_AT_ONCE // numbers)):
        basis = principal_axes(train[rows])[0] if shared is None else shared  # (draws, D, R) or (D, R)
        heads = fit_logistic(train[rows] @ basis, train_labels[rows], torch.full((len(rows),), l2), num_classes)
        heads = Heads(basis @ heads.weight, heads.bias)
        correct.append(heads.logits(test).argmax(2) == test_labels)
    return torch.cat(correct)
