import io
import math

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.evaluation.few_labels import few_label_accuracy
from ssd.evaluation.knn import knn_accuracy
from ssd.evaluation.protocol import Number
from ssd.evaluation.spectrum import alpha_req, rankme
from ssd.evaluation.suite import MEASURES, evaluate, few_label_report, monitor, report_table, table
from tests.evaluation.samples import clouds, digits


def printed(drawn):
    console = Console(file=io.StringIO(), width=140)
    console.print(drawn)
    return console.file.getvalue()


def test_the_probe_names_every_number_once_with_protocol_and_chance():
    (train, labels), (test, truth) = clouds(150), clouds(100, seed=1)
    numbers = {number.name: number for number in evaluate(train, labels, test, truth, draws=3)}
    assert list(numbers) == [
        *(f"{group}/k{k}/top1" for group in ("knn", "knn_centred") for k in (10, 20, 100)),
        "linear/top1", "logistic/top1", "ridge/top1", "logistic_1pct/top1", "logistic_10pct/top1",
        "spectrum/rankme", "spectrum/alpha_req",
    ]  # fmt: skip
    for name, number in numbers.items():
        assert "-v1" in number.protocol
        assert number.chance == (None if name.startswith("spectrum") else pytest.approx(0.2))
        assert (number.spread is None) == ("pct" not in name)


def test_the_numbers_are_those_of_the_parts():
    (train, labels), (test, truth) = clouds(150), clouds(100, seed=1)
    numbers = {number.name: number.value for number in evaluate(train, labels, test, truth, draws=4, seed=5)}
    assert numbers["knn/k20/top1"] == knn_accuracy(train, labels, test, truth, (20,))[20]
    assert numbers["knn_centred/k20/top1"] == knn_accuracy(train, labels, test, truth, (20,), center=True)[20]
    expected = few_label_accuracy(train, labels, test, truth, per_class=3, draws=4, seed=5)
    assert numbers["logistic_10pct/top1"] == pytest.approx(expected.mean().item())
    assert numbers["spectrum/rankme"] == rankme(train)


def test_shuffled_test_labels_change_no_choice_and_no_draw():
    """Choices stand in the protocols. The test labels decide values and nothing else."""
    (train, labels), (test, truth) = clouds(200), clouds(500, seed=1)
    shuffled = truth[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    first, second = evaluate(train, labels, test, truth, draws=2), evaluate(train, labels, test, shuffled, draws=2)
    assert [number.protocol for number in first] == [number.protocol for number in second]
    assert all(abs(number.value - 0.2) < 0.1 for number in second if number.name.endswith("top1"))


def test_the_same_seed_gives_the_same_numbers_and_the_order_of_test_samples_none():
    (train, labels), (test, truth) = clouds(200), clouds(80, seed=1)
    first = evaluate(train, labels, test, truth, draws=3)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert evaluate(train, labels, test, truth, draws=3) == first
    for number, other in zip(first, evaluate(train, labels, test[order], truth[order], draws=3), strict=True):
        assert number.value == pytest.approx(other.value, abs=1e-6) and number.protocol == other.protocol


def test_samples_without_a_label_count_for_the_spectrum_alone():
    (train, labels), (test, truth) = clouds(120), clouds(80, seed=1)
    more, unlabelled = torch.cat([train, 9 * torch.randn(50, 16)]), torch.cat([labels, torch.full((50,), -1)])
    full = {number.name: number for number in evaluate(train, labels, test, truth, draws=2)}
    mixed = {number.name: number for number in evaluate(more, unlabelled, test, truth, draws=2)}
    for name, number in full.items():
        assert name.startswith("spectrum") or mixed[name] == number
    assert mixed["spectrum/rankme"].value == rankme(more)


def test_no_labels_are_said_unless_only_the_spectrum_is_asked():
    train, labels = clouds(50)
    nothing = torch.full_like(labels, -1)
    with pytest.raises(UserError, match="needs labels"):
        evaluate(train, nothing, train, labels)
    names = [number.name for number in evaluate(train, nothing, train, nothing, measures=("spectrum",))]
    assert names == ["spectrum/rankme", "spectrum/alpha_req"]
    with pytest.raises(UserError, match=", ".join(MEASURES)):
        evaluate(train, labels, train, labels, measures=("knm",))


def test_rows_of_the_report_share_their_draws():
    """A second copy of the features, turned, scaled and widened by nothing, gets the same numbers in every column."""
    (train, labels), (test, truth) = clouds(200), clouds(300, seed=1)
    doubled = (torch.cat([3 * train, torch.zeros(200, 4)], 1), torch.cat([3 * test, torch.zeros(300, 4)], 1))
    report = few_label_report({"one": (train, test), "two": doubled}, labels, truth, draws=5)
    assert list(report["one"]) == ["knn", "linear", "linear_1pct", "linear_10pct"]
    for column, number in report["one"].items():
        other = report["two"][column]
        assert number.value == pytest.approx(other.value, abs=1e-3) and number.protocol == other.protocol
    alone = few_label_report({"one": (train, test)}, labels, truth, draws=5)
    assert alone["one"] == report["one"]


def test_pixels_of_digits_need_labels():
    """What the quickstart prints beside its network: solved with all labels, far from it with one per class."""
    train, labels, test, truth = digits()
    row = few_label_report({"pixels": (train, test)}, labels, truth)["pixels"]
    assert row["knn"].value > 0.97 and row["linear"].value > 0.96
    assert 0.45 < row["linear_1pct"].value < 0.65 and 0.85 < row["linear_10pct"].value < 0.94
    assert row["linear_1pct"].protocol == "logistic-v1 l2=1, 1 per class, mean of 20 draws"
    assert row["linear_10pct"].spread < row["linear_1pct"].spread


def test_rows_of_other_samples_and_missing_labels_are_refused():
    train, labels = clouds(50)
    with pytest.raises(UserError, match="1 of the 50 test samples have none"):
        few_label_report({"full": (train, train)}, labels, torch.where(torch.arange(50) == 4, -1, labels))
    with pytest.raises(UserError, match="row 'short' has 49 training"):
        few_label_report({"full": (train, train), "short": (train[1:], train)}, labels, labels)


def test_the_monitor_without_labels_is_the_spectrum_alone():
    (train, labels), (test, truth) = clouds(100), clouds(50, seed=1)
    labelled = monitor(train, labels, test, truth)
    spectrum = ["spectrum/rankme", "spectrum/alpha_req"]
    assert [number.name for number in labelled] == ["knn/top1", "linear/top1", *spectrum]
    for without in (monitor(train, labels - 9, test, truth), monitor(train, labels, test[:0], truth[:0])):
        assert [number.name for number in without] == spectrum
        assert_close([number.value for number in without], [rankme(train), alpha_req(train)])


def test_the_monitor_of_a_diverged_network_is_a_spectrum_that_is_not_a_number():
    (train, labels), (test, truth) = clouds(100), clouds(50, seed=1)
    train[3, 3] = float("inf")
    numbers = monitor(train, labels, test, truth)
    assert [number.name for number in numbers] == ["spectrum/rankme", "spectrum/alpha_req"]
    assert all(math.isnan(number.value) for number in numbers)


def test_tables_show_percent_spread_chance_and_protocol():
    numbers = [Number("knn/top1", 0.9724, "knn-v1 k=20", 0.1), Number("spectrum/rankme", 31.26, "rankme-v1")]
    text = printed(table(numbers))
    assert "97.2" in text and "10.0" in text and "31.3" in text and "knn-v1 k=20" in text
    spread = Number("linear_1pct/top1", 0.4871, "logistic-v1", 0.1, 0.0512)
    text = printed(report_table({"pixels": {"linear_1pct": spread}}))
    assert "48.7 ± 5.1" in text and "pixels" in text and "linear_1pct: logistic-v1" in text
