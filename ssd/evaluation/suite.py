"""The evaluations that the command prints: which probes, with which settings, under which names."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.few_labels import few_label_accuracy
from ssd.evaluation.knn import knn_accuracy
from ssd.evaluation.linear import RATES, linear_predict
from ssd.evaluation.logistic import PENALTIES, logistic_predict
from ssd.evaluation.protocol import Number, chance_level, check_labels, count_classes, top1
from ssd.evaluation.ridge import ridge_predict
from ssd.evaluation.spectrum import alpha_req, rankme
from ssd.evaluation.splits import labels_per_class

MEASURES = ("knn", "linear", "logistic", "ridge", "few_labels", "spectrum")
TEMPERATURE = 0.07


def evaluate(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    measures: Sequence[str] = MEASURES,
    k: Sequence[int] = (10, 20, 100, 200),
    shares: Sequence[float] = (0.01, 0.1),
    draws: int = 20,
    seed: int = 0,
) -> list[Number]:
    """Every number of `ssd probe`, from features and labels of a training and a test set.

    (N, D), (N,), (Q, D), (Q,) on any device; nothing is chosen on the test set. Samples without a label (-1) count
    for the spectrum, which is that of the training features, and for nothing else.

    Args:
        measures: which of knn, linear, logistic, ridge, few_labels and spectrum.
        k: neighbours of k-NN; those above the size of the training set are left out unless all are.
        shares: of the training labels that the few-label probes see, in (0, 1).
        draws: of the labelled set for each share.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise UserError(f"measures {unknown or 'without a name'} are unknown; choose from {', '.join(MEASURES)}.")
    numbers: list[Number] = []
    spectrum = spectrum_numbers(train) if "spectrum" in measures else []
    if set(measures) == {"spectrum"}:
        return spectrum
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0]
    test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0]
    check_labels("the probe", training=train_labels, test=test_labels)
    classes = count_classes(train_labels, test_labels)
    chance = chance_level(test_labels)
    if "knn" in measures:
        fitting = [number for number in sorted(set(k)) if number <= len(train)] or [len(train)]
        for center in (False, True):
            values = knn_accuracy(train, train_labels, test, test_labels, fitting, classes, center=center)
            group = "knn_centred" if center else "knn"
            numbers += [
                Number(f"{group}/k{number}/top1", value, knn_protocol(number, center), chance)
                for number, value in values.items()
            ]
    if "linear" in measures:
        fit = linear_predict(train, train_labels, test, classes, seed=seed)
        protocol = f"linear-v1 best of {len(RATES)} rates on 10% of train: {fit.setting:g}"
        numbers.append(Number("linear/top1", top1(fit.predictions, test_labels, classes), protocol, chance))
    if "logistic" in measures:
        fit = logistic_predict(train, train_labels, test, classes, seed=seed)
        protocol = f"logistic-v1 best of {len(PENALTIES)} penalties on 10% of train: l2={fit.setting:g}"
        numbers.append(Number("logistic/top1", top1(fit.predictions, test_labels, classes), protocol, chance))
    if "ridge" in measures:
        numbers.append(ridge_number(train, train_labels, test, test_labels, "ridge/top1"))
    if "few_labels" in measures:
        for share in shares:
            per_class = labels_per_class(train_labels, share)
            name = f"logistic_{100 * share:g}pct/top1"
            numbers.append(few_label_number(name, train, train_labels, test, test_labels, per_class, draws, seed))
    return numbers + spectrum


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
    """What is cheap enough to ask during training: k-NN (k 20, centred), ridge as the linear probe, RankMe.

    (N, D), (N,), (Q, D), (Q,). RankMe alone, of all training features, where training or test set has no labels,
    or where a feature is not finite: then RankMe is NaN, and a run that may recover goes on.
    """
    labelled, asked = train_labels >= 0, test_labels >= 0
    numbers = []
    if labelled.any() and asked.any() and train.isfinite().all() and test.isfinite().all():
        known = (train[labelled], train_labels[labelled], test[asked], test_labels[asked])
        numbers = [knn_number(*known), ridge_number(*known, "linear/top1")]
    return [*numbers, Number("spectrum/rankme", rankme(train), "rankme-v1")]


def knn_protocol(k: int, center: bool) -> str:
    return f"knn-v1 k={k} T={TEMPERATURE:g}{' centred' if center else ''}"


def knn_number(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Number:
    k = min(20, len(train))
    value = knn_accuracy(train, train_labels, test, test_labels, (k,), temperature=TEMPERATURE, center=True)[k]
    return Number("knn/top1", value, knn_protocol(k, center=True), chance_level(test_labels))


def ridge_number(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, name: str) -> Number:
    classes = count_classes(train_labels, test_labels)
    fit = ridge_predict(train, train_labels, test, classes)
    protocol = f"ridge-v1 best penalty leaving one out: l2={fit.setting:g}"
    return Number(name, top1(fit.predictions, test_labels, classes), protocol, chance_level(test_labels))


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
    spread = float(values.std()) if draws > 1 else None
    amount = "all labels" if per_class >= int(train_labels.bincount().max()) else f"{per_class} per class"
    repeated = f", mean of {draws} draws" if draws > 1 else ""
    protocol = f"logistic-v1 l2=1, {amount}{repeated}"
    return Number(name, float(values.mean()), protocol, chance_level(test_labels), spread)


def spectrum_numbers(features: Tensor) -> list[Number]:
    return [
        Number("spectrum/rankme", rankme(features), "rankme-v1"),
        Number("spectrum/alpha_req", alpha_req(features), "alpha-req-v1"),
    ]


def table(numbers: Sequence[Number], title: str | None = None) -> Table:
    """One line a number: name, value (accuracies in percent), chance, protocol."""
    drawn = Table("measure", title=title)
    drawn.add_column("value", justify="right")
    drawn.add_column("chance", justify="right")
    drawn.add_column("protocol")
    for number in numbers:
        chance = "" if number.chance is None else f"{100 * number.chance:.1f}"
        drawn.add_row(number.name, number.text(), chance, number.protocol)
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
