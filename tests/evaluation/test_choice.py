"""The output that serves best is found, by training samples alone."""

import pytest
import torch

from ssd.batch import Batch
from ssd.evaluation.choice import choose_for_knn, choose_for_linear
from ssd.evaluation.knn import knn_accuracy
from ssd.evaluation.lidar import lidar_number
from ssd.evaluation.linear import RATES, linear_predict
from ssd.evaluation.protocol import wilson_interval
from ssd.evaluation.spectrum import lidar
from tests.evaluation.samples import clouds

CHOOSE = {"knn": choose_for_knn, "linear": choose_for_linear}


@pytest.fixture
def outputs():
    (train, labels), (test, truth) = clouds(300, spread=1.5), clouds(200, spread=1.5, seed=1)
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 16, generator=random), torch.randn(200, 16, generator=random)
    table = {"noise": noise, "half": (train[:, :6], test[:, :6]), "whole": (train, test)}
    return {name: (lambda pair=pair: pair) for name, pair in table.items()}, labels, truth


@pytest.mark.parametrize("probe", CHOOSE)
def test_the_output_that_tells_the_classes_apart_is_chosen_and_its_number_is_the_probes(outputs, probe):
    features, labels, truth = outputs
    choice = CHOOSE[probe](features, labels, truth)
    assert choice.output == "whole" and list(choice.held_out) == ["noise", "half", "whole"]
    assert choice.held_out["noise"] < 0.38 < choice.held_out["half"] < choice.held_out["whole"]
    train, test = features["whole"]()
    if probe == "knn":
        expected = knn_accuracy(train, labels, test, truth, (20,), center=True)[20]
    else:
        fit = linear_predict(train, labels, test, rates=RATES)
        expected = float((fit.predictions == truth).double().mean())
        assert choice.number.protocol.endswith(f"best of 3 outputs x 13 rates: whole, {fit.setting:g}")
    assert choice.number.value == pytest.approx(expected)
    assert choice.number.low < choice.number.value < choice.number.high


@pytest.mark.parametrize("probe", CHOOSE)
def test_neither_test_labels_nor_test_features_decide(outputs, probe):
    features, labels, truth = outputs
    first = CHOOSE[probe](features, labels, truth)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    other = {name: (lambda give=give: (give()[0], 3 * give()[1][order])) for name, give in features.items()}
    second = CHOOSE[probe](other, labels, truth)
    assert (first.output, first.held_out) == (second.output, second.held_out)
    assert first.number.protocol == second.number.protocol and second.number.value < 0.4


def test_of_equal_outputs_the_one_that_was_named_first_is_taken(outputs):
    features, labels, truth = outputs
    twice = {"one": features["whole"], "two": features["whole"]}
    assert choose_for_knn(twice, labels, truth).output == "one"


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [(50, 100, 0.40383, 0.59617), (0, 10, 0.0, 0.27753), (81, 263, 0.25525, 0.36621)],
)
def test_intervals_are_those_of_the_literature(right, samples, low, high):
    """The last is the example of Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I."""
    assert wilson_interval(right / samples, samples) == pytest.approx((low, high), abs=1e-4)


def test_lidar_is_that_of_all_views_of_each_sample():
    random = torch.Generator().manual_seed(0)
    views = torch.randn(12, 1, 4, 4, generator=random) + torch.randn(4, 12, 1, 4, 4, generator=random)
    batches = [
        Batch({"global": views[2 * look : 2 * look + 2, rows]}, index, total=6)
        for rows, index in ((slice(0, 6), torch.arange(6)), (slice(6, 12), torch.arange(6, 12)))
        for look in range(2)
    ]
    number = lidar_number(lambda pictures: pictures.flatten(1), batches, looks=2)
    assert number.value == pytest.approx(lidar(views.flatten(2).transpose(0, 1)))
    assert number.protocol == "lidar-v1 4 global views of 12 training samples"
    batches[1].index = torch.tensor([0, 1, 2, 7, 4, 5])  # broken, and replaced by another in its second look
    assert lidar_number(lambda pictures: pictures.flatten(1), batches, 2).protocol.endswith("of 11 training samples")
