"""The evaluations that the command prints: which probes, with which settings, under which names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.calibration import calibration_numbers
from ssd.evaluation.clustering import clustering_numbers
from ssd.evaluation.few_labels import few_label_accuracy
from ssd.evaluation.few_shot import few_shot_numbers
from ssd.evaluation.knn import knn_accuracy
from ssd.evaluation.linear import RATES, linear_predict
from ssd.evaluation.logistic import PENALTIES, logistic_predict
from ssd.evaluation.ood import ood_numbers
from ssd.evaluation.protocol import Number, accuracy_number, chance_level, check_labels, count_classes, top1
from ssd.evaluation.retrieval import retrieval_numbers
from ssd.evaluation.ridge import ridge_predict
from ssd.evaluation.spectrum import alpha_req, rankme
from ssd.evaluation.splits import labels_per_class

TEMPERATURE = 0.07


@dataclass(frozen=True)
class Sets:
    """What a measure is asked of: features (N, D), (Q, D) of labelled samples, their labels (N,), (Q,), and settings.

    Args:
        everything: training features with those of samples without a label.
        k, shares, draws, seed: as `evaluate` has them.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    everything: Tensor
    num_classes: int
    k: Sequence[int] = (10, 20, 100, 200)
    shares: Sequence[float] = (0.01, 0.1)
    draws: int = 20
    seed: int = 0

    @property
    def labelled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.train, self.train_labels, self.test, self.test_labels


def knn_numbers(sets: Sets) -> list[Number]:
    fitting = [number for number in sorted(set(sets.k)) if number <= len(sets.train)] or [len(sets.train)]
    numbers = []
    for center in (False, True):
        values = knn_accuracy(*sets.labelled, fitting, sets.num_classes, center=center)
        group = "knn_centred" if center else "knn"
        numbers += [
            accuracy_number(f"{group}/k{number}/top1", value, knn_protocol(number, center), sets.test_labels)
            for number, value in values.items()
        ]
    return numbers


def linear_numbers(sets: Sets) -> list[Number]:
    fit = linear_predict(sets.train, sets.train_labels, sets.test, sets.num_classes, seed=sets.seed)
    protocol = f"linear-v1 best of {len(RATES)} rates on 10% of train: {fit.setting:g}"
    value = top1(fit.predictions, sets.test_labels, sets.num_classes)
    return [accuracy_number("linear/top1", value, protocol, sets.test_labels)]


def logistic_numbers(sets: Sets) -> list[Number]:
    fit = logistic_predict(sets.train, sets.train_labels, sets.test, sets.num_classes, seed=sets.seed)
    protocol = f"logistic-v1 best of {len(PENALTIES)} penalties on 10% of train: l2={fit.setting:g}"
    value = top1(fit.predictions, sets.test_labels, sets.num_classes)
    return [accuracy_number("logistic/top1", value, protocol, sets.test_labels)]


def ridge_numbers(sets: Sets) -> list[Number]:
    return [ridge_number(*sets.labelled, "ridge/top1")]


def few_label_numbers(sets: Sets) -> list[Number]:
    return [
        few_label_number(
            f"logistic_{100 * share:g}pct/top1",
            *sets.labelled,
            labels_per_class(sets.train_labels, share),
            sets.draws,
            sets.seed,
        )
        for share in sets.shares
    ]


def spectrum_numbers(sets: Sets) -> list[Number]:
    return spectrum_of(sets.everything)


def spectrum_of(features: Tensor) -> list[Number]:
    return [
        Number("spectrum/rankme", rankme(features), "rankme-v1"),
        Number("spectrum/alpha_req", alpha_req(features), "alpha-req-v1"),
    ]


MEASURES: dict[str, Callable[[Sets], list[Number]]] = {
    "knn": knn_numbers,
    "linear": linear_numbers,
    "logistic": logistic_numbers,
    "ridge": ridge_numbers,
    "few_labels": few_label_numbers,
    "spectrum": spectrum_numbers,
    "few_shot": lambda sets: few_shot_numbers(*sets.labelled, seed=sets.seed),
    "retrieval": lambda sets: retrieval_numbers(*sets.labelled, seed=sets.seed),
    "ood": lambda sets: ood_numbers(*sets.labelled, seed=sets.seed),
    "calibration": lambda sets: calibration_numbers(*sets.labelled, seed=sets.seed),
    "clustering": lambda sets: clustering_numbers(*sets.labelled, seed=sets.seed),
}
"""What is asked of features, in the order of the table."""
USUAL = ("knn", "linear", "logistic", "ridge", "few_labels", "spectrum")
"""What is asked where no measures are named."""
WITHOUT_LABELS = frozenset({"spectrum"})


def evaluate(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    measures: Sequence[str] = USUAL,
    **settings: Any,
) -> list[Number]:
    """The numbers of `MEASURES`, from features and labels of a training and a test set.

    (N, D), (N,), (Q, D), (Q,) on any device; nothing is chosen on the test set. Samples without a label (-1) count
    for the measures that need none, which are of the training features, and for nothing else.

    Args:
        measures: which of them.
        settings: k, neighbours of k-NN, those above the size of the training set being left out unless all are;
            shares of the training labels that the few-label probes see, in (0, 1); draws of the labelled set for each
            share; seed of splits and draws.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise UserError(f"measures {unknown or 'without a name'} are unknown; choose from {', '.join(MEASURES)}.")
    everything = train
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0]
    test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0]
    classes = 0
    if not WITHOUT_LABELS.issuperset(measures):
        check_labels("the probe", training=train_labels, test=test_labels)
        classes = count_classes(train_labels, test_labels)
    sets = Sets(train, train_labels, test, test_labels, everything, classes, **settings)
    return [number for name, measure in MEASURES.items() if name in measures for number in measure(sets)]


def few_label_report(
    features: Mapping[str, tuple[Tensor, Tensor]],
    train_labels: Tensor,
    test_labels: Tensor,
    draws: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, Number]]:
    """The same four numbers for every feature set, on the same draws of labels.

    `features` maps the name of a row to its training (N, D) and test features (Q, D), all of the same
    samples; D may differ. Each row gets `knn` (k 20, centred), `linear` (logistic regression on all labels),
    `linear_1pct` and `linear_10pct` (the same on that share of the labels, at least one per class, mean and
    standard deviation over `draws`). Raises UserError where a row has another number of samples or a label is missing.
    """
    check_labels("the comparison", training=train_labels, test=test_labels)
    report = {}
    few = {"linear_1pct": labels_per_class(train_labels, 0.01), "linear_10pct": labels_per_class(train_labels, 0.1)}
    everything = int(train_labels.bincount().max())
    for name, (train, test) in features.items():
        if (len(train), len(test)) != (len(train_labels), len(test_labels)):
            raise UserError(
                f"row '{name}' has {len(train)} training and {len(test)} test features for {len(train_labels)} and "
                f"{len(test_labels)} labels; every row must come from the same samples in the same order."
            )
        labelled = (train, train_labels, test, test_labels)
        report[name] = {
            "knn": knn_number(*labelled),
            "linear": few_label_number("linear/top1", *labelled, everything, 1, seed),
        }
        for column, per_class in few.items():
            report[name][column] = few_label_number(f"{column}/top1", *labelled, per_class, draws, seed)
    return report


def monitor(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> list[Number]:
    """What is cheap enough to ask during training: k-NN (k 20, centred), ridge as the linear probe, RankMe and alpha-ReQ.

    (N, D), (N,), (Q, D), (Q,). The spectrum alone, of all training features, where training or test set has no labels,
    or where a feature is not finite: then it is NaN, and a run that may recover goes on.
    """
    labelled, asked = train_labels >= 0, test_labels >= 0
    numbers = []
    if labelled.any() and asked.any() and train.isfinite().all() and test.isfinite().all():
        known = (train[labelled], train_labels[labelled], test[asked], test_labels[asked])
        numbers = [knn_number(*known), ridge_number(*known, "linear/top1")]
    return numbers + spectrum_of(train)


def knn_protocol(k: int, center: bool) -> str:
    return f"knn-v1 k={k} T={TEMPERATURE:g}{' centred' if center else ''}"


def knn_number(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Number:
    k = min(20, len(train))
    value = knn_accuracy(train, train_labels, test, test_labels, (k,), temperature=TEMPERATURE, center=True)[k]
    return accuracy_number("knn/top1", value, knn_protocol(k, center=True), test_labels)


def ridge_number(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, name: str) -> Number:
    classes = count_classes(train_labels, test_labels)
    fit = ridge_predict(train, train_labels, test, classes)
    protocol = f"ridge-v1 best penalty leaving one out: l2={fit.setting:g}"
    return accuracy_number(name, top1(fit.predictions, test_labels, classes), protocol, test_labels)


def few_label_number(
    name: str,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    per_class: int,
    draws: int,
    seed: int,
) -> Number:
    """Logistic regression on `per_class` labels of each class, or on all labels where no class has more."""
    values = few_label_accuracy(train, train_labels, test, test_labels, per_class, draws, seed)
    amount = "all labels" if per_class >= int(train_labels.bincount().max()) else f"{per_class} per class"
    repeated = f", mean of {draws} draws" if draws > 1 else ""
    protocol = f"logistic-v1 l2=1, {amount}{repeated}"
    if draws == 1:
        return accuracy_number(name, float(values.mean()), protocol, test_labels)
    return Number(name, float(values.mean()), protocol, chance_level(test_labels), float(values.std()))


def table(numbers: Sequence[Number], title: str | None = None) -> Table:
    """One line a number: name, value (shares in percent), interval, chance, protocol."""
    drawn = Table("measure", title=title)
    for column in ("value", "95 %", "chance"):
        drawn.add_column(column, justify="right")
    drawn.add_column("protocol")
    for number in numbers:
        drawn.add_row(number.name, number.text(), number.interval_text(), number.chance_text(), number.protocol)
    return drawn


def report_table(report: Mapping[str, Mapping[str, Number]], title: str | None = None) -> Table:
    """One line a feature set, one column a measure, in percent; the protocols stand below."""
    first = next(iter(report.values()))
    caption = "\n".join(f"{column}: {number.protocol}" for column, number in first.items())
    drawn = Table("features", title=title, caption=caption, caption_justify="left")
    for column in first:
        drawn.add_column(column, justify="right")
    for name, row in report.items():
        drawn.add_row(name, *(row[column].text() for column in first))
    return drawn
