import itertools

import numpy as np
import pytest
import torch

from ssd.errors import UserError
from ssd.evaluation.clustering import clustering_numbers, kmeans_labels, matched_accuracy
from tests.evaluation.samples import clouds, digits


def test_the_best_matching_is_the_best_of_all():
    random = np.random.default_rng(0)
    labels, clusters = random.integers(4, size=200), random.integers(4, size=200)
    best = max(np.mean(np.array(order)[clusters] == labels) for order in itertools.permutations(range(4)))
    assert matched_accuracy(clusters, labels) == pytest.approx(best)


def test_a_class_may_go_without_a_cluster_and_a_cluster_without_a_class():
    assert matched_accuracy(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2])) == 0.75
    assert matched_accuracy(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1])) == 0.75


def test_classes_that_lie_apart_are_found_whatever_they_are_called():
    train, _ = clouds(10)
    test, labels = clouds(200, spread=0.02)
    renamed = torch.tensor([4, 0, 3, 1, 2])[labels]
    for truth in (labels, renamed):
        numbers = clustering_numbers(train, labels[:10], test, truth)
        assert [number.name for number in numbers] == ["clustering/top1", "clustering/nmi", "clustering/ari"]
        assert [number.value for number in numbers] == pytest.approx([1, 1, 1])
        assert numbers[0].protocol == "k-means-v1 unit length, 5 clusters, best of 10 starts"


def test_noise_and_collapsed_features_give_chance():
    labels = torch.arange(500) % 5
    noise = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    top1, nmi, ari = clustering_numbers(noise, labels, noise, labels)
    assert top1.value < 0.32 and nmi.value < 0.05 and abs(ari.value) < 0.02
    collapsed = clustering_numbers(noise, labels, torch.ones(500, 8), labels)
    assert [number.value for number in collapsed] == [number.chance for number in collapsed] == [0.2, 0, 0]


def test_the_length_of_features_does_not_matter_and_the_seed_repeats():
    _, _, test, _ = digits()
    length = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    first = kmeans_labels(test, 10, 3, seed=1)
    assert (first == kmeans_labels(test, 10, 3, seed=1)).all()
    assert matched_accuracy(kmeans_labels(test * length, 10, 3, seed=1), first) > 0.99


def test_what_cannot_be_clustered_is_said():
    features = torch.randn(6, 3)
    with pytest.raises(UserError, match="needs two classes"):
        clustering_numbers(features, torch.arange(6), features, torch.zeros(6, dtype=torch.long))
    with pytest.raises(UserError, match="0 starts"):
        clustering_numbers(features, torch.arange(6), features, torch.arange(6), starts=0)
