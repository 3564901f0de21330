import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from ssd.errors import UserError
from ssd.evaluation.ood import (
    auroc,
    false_positive_rate,
    mahalanobis_distance,
    neighbour_distance,
    ood_numbers,
    ood_numbers_of_others,
)
from tests.evaluation.samples import clouds, digits


@pytest.mark.parametrize("levels", [5, 1000])
def test_auroc_and_false_positives_are_those_of_scikit_learn(levels):
    """With 5 levels most scores are tied."""
    random = torch.Generator().manual_seed(levels)
    inside, outside = (torch.randint(levels, (n,), generator=random) + shift for n, shift in ((300, 0), (200, 1)))
    truth, scores = np.repeat([0, 1], [300, 200]), torch.cat([inside, outside]).numpy()
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    # there the inside is what is accepted, at the largest score that takes 95 % of it
    rate, accepted, _ = roc_curve(1 - truth, -scores, drop_intermediate=False)
    assert false_positive_rate(inside, outside) == pytest.approx(rate[np.argmax(accepted >= 0.95)], abs=1e-12)


def test_the_neighbour_distance_is_that_of_scikit_learn():
    train, _, test, _ = digits()
    unit = [part.numpy() / np.linalg.norm(part.numpy(), axis=1, keepdims=True) for part in (train, test)]
    distance, _ = NearestNeighbors(n_neighbors=7).fit(unit[0]).kneighbors(unit[1])
    assert neighbour_distance(train, test, 7).sqrt().numpy() == pytest.approx(distance[:, -1], abs=1e-4)


@pytest.mark.parametrize("number", [300, 12])
def test_the_mahalanobis_distance_is_that_of_scipy(number):
    """12 samples are fewer than the dimensions."""
    (train, labels), (test, _) = clouds(number), clouds(20, seed=1)
    ours = mahalanobis_distance(train, labels, test).sqrt()
    means = np.stack([train[labels == label].double().numpy().mean(0) for label in range(5)])
    inverse = LedoitWolf(assume_centered=True).fit(train.double().numpy() - means[labels]).precision_
    theirs = [min(mahalanobis(query, mean, inverse) for mean in means) for query in test.double().numpy()]
    assert ours.numpy() == pytest.approx(theirs, rel=1e-6)


def test_classes_that_lie_apart_are_found_out_and_noise_is_not():
    (train, labels), (test, truth) = clouds(400, spread=0.05), clouds(400, spread=0.05, seed=1)
    for number in ood_numbers(train, labels, test, truth, k=5):
        assert number.value == (1.0 if number.name.endswith("auroc") else 0.0)
        assert number.protocol.endswith("3 of 5 classes in")
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 4
    for number in ood_numbers(noise[:500], labels, noise[500:], labels):
        # an AUROC of 250 and 250 samples has a deviation of 0.026, and a share of 250 one of 0.02 with its threshold's
        assert number.value == pytest.approx(number.chance, abs=0.09)


def test_only_samples_of_the_classes_kept_are_known():
    """Other features of the classes held out, in the training set, change nothing."""
    (train, labels), (test, truth) = clouds(200), clouds(100, seed=1)
    changed = torch.where((labels > 2)[:, None], 0.0, train)
    assert ood_numbers(train, labels, test, truth) == ood_numbers(changed, labels, test, truth)


def test_another_data_set_is_told_apart():
    (train, labels), (test, _) = clouds(200), clouds(100, seed=1)
    numbers = ood_numbers_of_others(train, labels, test, 100 + test, "shifted clouds", k=5)
    assert [number.name for number in numbers] == [
        f"ood_{kind}/{measure}" for kind in ("knn", "mahalanobis") for measure in ("auroc", "fpr95")
    ]
    assert [round(number.value, 2) for number in numbers] == [1, 0, 1, 0]
    assert all(number.protocol.endswith("out: shifted clouds") for number in numbers)


def test_a_constant_dimension_and_collapsed_features_are_survived():
    (train, labels), (test, truth) = clouds(100), clouds(50, seed=1)
    for part in (train, test):
        part[:, 3] = 1.0
    assert all(0 <= number.value <= 1 for number in ood_numbers(train, labels, test, truth))
    for number in ood_numbers(torch.ones(100, 4), labels, torch.ones(50, 4), truth):
        assert number.value == (0.5 if number.name.endswith("auroc") else 1.0)


def test_what_cannot_be_told_apart_is_said():
    features, labels = torch.randn(20, 4), torch.arange(20) % 2
    with pytest.raises(UserError, match="needs two classes"):
        ood_numbers(features, torch.zeros(20, dtype=torch.long), features, torch.zeros(20, dtype=torch.long))
    with pytest.raises(UserError, match=r"above 0 out.* 20 test samples of them and 0 of the rest"):
        ood_numbers(features, labels, features, torch.zeros(20, dtype=torch.long))
    with pytest.raises(UserError, match="20 samples inside and 0 outside"):
        ood_numbers_of_others(features, labels, features, features[:0], "nothing")
