"""What a number is: its value with the name and version of the protocol that gave it, and what chance would give.

A protocol's version changes when the same features would give another number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

from ssd.errors import UserError

SCORES = ("brier", "nll")
"""Measures that chance has a meaning for and that are no shares."""


@dataclass(frozen=True)
class Number:
    """One result.

    Args:
        name: group and measure, as it is logged after the stage: "knn/top1". Accuracies end in "top1".
        value: accuracies are shares in [0, 1].
        protocol: name, version and settings; equal protocols on equal features give equal numbers.
        chance: what is had without looking, of accuracies by always answering the commonest class of the test labels; None
            where chance has no meaning.
        spread: standard deviation over repeated draws, None for a single run.
        low, high: 95 % interval of an accuracy of a single run: what another test set of the same size could have given.
    """

    name: str
    value: float
    protocol: str
    chance: float | None = None
    spread: float | None = None
    low: float | None = None
    high: float | None = None

    def text(self) -> str:
        """The value for people: shares, which are what chance has a meaning for, in percent; the rest as they are, with more
        decimals where small."""
        text = self.written(self.value)
        return text if self.spread is None else f"{text} ± {self.written(self.spread)}"

    def chance_text(self) -> str:
        return "" if self.chance is None else self.written(self.chance)

    def written(self, value: float) -> str:
        if self.name.endswith(SCORES):
            return f"{value:.3f}"
        if self.chance is not None:
            return f"{100 * value:.1f}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    def interval_text(self) -> str:
        return "" if self.low is None or self.high is None else f"{100 * self.low:.1f} to {100 * self.high:.1f}"


def accuracy_number(name: str, value: float, protocol: str, labels: Tensor) -> Number:
    """An accuracy over the test labels (N,), with chance and interval."""
    return Number(name, value, protocol, chance_level(labels), None, *wilson_interval(value, len(labels)))


def wilson_interval(share: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Between which shares the true one lies in 95 of 100 test sets of that many independent samples.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    reach = z * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2) / (1 + z * z / samples)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def top1(predictions: Tensor, labels: Tensor, num_classes: int) -> float:
    """Share of (N,) predictions that equal the labels, every sample counting the same."""
    counts = multiclass_stat_scores(predictions, labels, num_classes, average="micro", validate_args=False)
    right, *_, samples = counts.tolist()
    return right / samples


def chance_level(labels: Tensor) -> float:
    """Share of the commonest class among (N,) labels."""
    return float(labels.bincount().max()) / len(labels)


def count_classes(*labels: Tensor) -> int:
    """One more than the largest label."""
    return 1 + max(int(part.max()) for part in labels)


def check_finite(**features: Tensor) -> None:
    """Raises UserError that names the features with NaN or infinite values."""
    for name, part in features.items():
        # a sum is not finite where one of its terms is not, and needs a tenth of the time; the reverse is then looked at
        if part.sum(1).isfinite().all():
            continue
        broken = int((~part.isfinite().all(1)).sum())
        if broken:
            raise UserError(
                f"{broken} of {len(part)} rows of the {name} features are NaN or infinite. "
                "The network has diverged or overflows in this precision: extract with precision 32-true, "
                "or probe an earlier checkpoint."
            )


def check_labels(purpose: str, **labels: Tensor) -> None:
    """Raises UserError where a set is empty or has samples without a label (-1)."""
    for name, part in labels.items():
        unlabelled = int((part < 0).sum())
        if len(part) == 0 or unlabelled:
            raise UserError(
                f"{purpose} needs labels, and {unlabelled} of the {len(part)} {name} samples have none. "
                "Give data with labels (class folders, a list file with labels, or a label column), "
                "or ask for the measures of the spectrum alone, which need none."
            )


def commas(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
