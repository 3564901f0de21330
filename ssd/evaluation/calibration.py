"""Calibration: is a linear probe as often right as it says?

Logistic regression gives each test sample a probability of every class. Expected calibration error, Brier score and
negative log-likelihood judge these, as they are and after one temperature (Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017). Penalty and temperature are chosen on a held-out part of the training set, which the classifier is
not fitted on: a temperature belongs to the very classifier that it was measured with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from ssd.evaluation.heads import Heads
from ssd.evaluation.logistic import PENALTIES, fit_logistic
from ssd.evaluation.protocol import Number, check_finite, check_labels, count_classes
from ssd.evaluation.scaling import principal_axes, standardise
from ssd.evaluation.splits import held_out

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
"""Of the temperatures that are tried: a held-out part without an error would ask for 0."""


class Probe(NamedTuple):
    """Test logits (Q, C) of the classifier, and the penalty and the temperature that were chosen for it."""

    logits: Tensor
    l2: float
    temperature: float


def calibrated_probe(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int | None = None,
    l2: Sequence[float] = PENALTIES,
    held_out_share: float = 0.1,
    seed: int = 0,
) -> Probe:
    """Logistic regression on nine tenths of the training set, with penalty and temperature from the last one.

    (N, D), (N,) and (Q, D). The penalty is the one with the best held-out accuracy, the larger where two are equal, as in
    `logistic_predict`; the temperature the one with the least held-out negative log-likelihood.
    """
    check_labels("calibration", train=labels)
    check_finite(train=train, test=test)
    num_classes = num_classes or count_classes(labels)
    train, test = standardise(train, test)
    basis, _ = principal_axes(train)
    train, test = train @ basis, test @ basis
    values = sorted(l2, reverse=True)
    fit, held = held_out(labels, held_out_share, seed)
    heads = fit_logistic(train[fit], labels[fit], torch.tensor(values), num_classes)
    logits = heads.logits(train[held])  # (G, H, C)
    best = int((logits.argmax(2) == labels[held]).sum(1).argmax())
    chosen = Heads(heads.weight[best : best + 1], heads.bias[best : best + 1])
    return Probe(chosen.logits(test)[0], values[best], best_temperature(logits[best], labels[held]))


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits (N, C) are divided by for the least negative log-likelihood, between `COLDEST` and `HOTTEST`."""
    exact = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(exact / np.exp(log_temperature), labels))

    found = minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over bins of equal width, by their share of the samples. In [0, 1]."""
    return float(multiclass_calibration_error(probs, labels, probs.shape[1], n_bins=bins, norm="l1"))


def brier_score(probs: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities (N, C) from the truth, in [0, 2] (Brier 1950)."""
    return float((probs - F.one_hot(labels, probs.shape[1])).square().sum(1).mean())


def calibration_numbers(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0
) -> list[Number]:
    """ECE, Brier score and negative log-likelihood (nats) of a logistic probe, plain and at the chosen temperature.

    (N, D), (N,), (Q, D), (Q,). Chance answers the shares of the classes in the training set, whatever the sample.
    """
    check_labels("calibration", training=train_labels, test=test_labels)
    classes = count_classes(train_labels, test_labels)
    probe = calibrated_probe(train, train_labels, test, classes, seed=seed)
    # every class has a share, so that a class that only the test set has costs much and not everything
    shares = (train_labels.bincount(minlength=classes).double() + 1) / (len(train_labels) + classes)
    guessed = judged(shares.log().expand(len(test_labels), -1), test_labels)
    numbers = []
    for group, temperature in (("calibration", 1.0), ("calibration_scaled", probe.temperature)):
        found = judged(probe.logits.double() / temperature, test_labels)
        for measure, value in found.items():
            settings = f" {BINS} bins" if measure == "ece" else ""
            protocol = f"{measure}-v1{settings}, logistic on 90% of train, l2={probe.l2:g}, T={temperature:.3g}"
            numbers.append(Number(f"{group}/{measure}", value, protocol, guessed[measure]))
    return numbers


def judged(logits: Tensor, labels: Tensor) -> dict[str, float]:
    probs = logits.softmax(1)
    return {
        "ece": expected_calibration_error(probs, labels),
        "brier": brier_score(probs, labels),
        "nll": float(F.cross_entropy(logits, labels)),
    }
