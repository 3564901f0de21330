"""Which output of a network serves a probe best, chosen on a held-out part of the training set.

The grid of Oquab et al., "DINOv2", 2023, appendix B.3: learning rates x last blocks x with or without the mean patch. All
rates of an output are trained at once. Departs from it: nothing is chosen on the test set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssd.evaluation.knn import knn_accuracy
from ssd.evaluation.linear import RATES, best_rate, linear_predict
from ssd.evaluation.protocol import Number, accuracy_number, check_labels, count_classes, top1
from ssd.evaluation.splits import held_out

HELD_OUT_SHARE = 0.1
K, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Choice:
    """
    Args:
        output: the best on the held-out part; of equal ones that which was named first.
        held_out: accuracy there of every output.
        number: accuracy of the best on the test set.
    """

    output: str
    held_out: dict[str, float]
    number: Number


Outputs = Mapping[str, Callable[[], tuple[Tensor, Tensor]]]
"""Name -> what gives training (N, D) and test features (Q, D), asked for one after the other: together they may be large."""


def choose_for_linear(outputs: Outputs, labels: Tensor, test_labels: Tensor, seed: int = 0) -> Choice:
    """The best pair of output and learning rate of the linear probe. Labels (N,) and (Q,)."""
    check_labels("the choice of an output", training=labels, test=test_labels)
    classes = count_classes(labels, test_labels)
    rates, accuracy = {}, {}
    for name, features in outputs.items():
        rates[name], accuracy[name] = best_rate(features()[0], labels, classes, RATES, HELD_OUT_SHARE, seed)
    best = max(accuracy, key=accuracy.__getitem__)
    train, test = outputs[best]()
    fit = linear_predict(train, labels, test, classes, rates=(rates[best],), seed=seed)
    protocol = f"linear-grid-v1 best of {len(outputs)} outputs x {len(RATES)} rates: {best}, {fit.setting:g}"
    value = top1(fit.predictions, test_labels, classes)
    return Choice(best, accuracy, accuracy_number("linear_grid/top1", value, protocol, test_labels))


def choose_for_knn(outputs: Outputs, labels: Tensor, test_labels: Tensor, seed: int = 0) -> Choice:
    """The best output of centred k-NN. Labels (N,) and (Q,)."""
    check_labels("the choice of an output", training=labels, test=test_labels)
    classes = count_classes(labels, test_labels)
    fit, held = held_out(labels, HELD_OUT_SHARE, seed)
    k = min(K, len(fit))
    settings: dict[str, Any] = {"k": (k,), "num_classes": classes, "temperature": TEMPERATURE, "center": True}
    accuracy = {}
    for name, features in outputs.items():
        train, _ = features()
        accuracy[name] = knn_accuracy(train[fit], labels[fit], train[held], labels[held], **settings)[k]
    best = max(accuracy, key=accuracy.__getitem__)
    train, test = outputs[best]()
    value = knn_accuracy(train, labels, test, test_labels, **settings)[k]
    protocol = f"knn-grid-v1 k={k} best of {len(outputs)} outputs: {best}"
    return Choice(best, accuracy, accuracy_number("knn_grid/top1", value, protocol, test_labels))
