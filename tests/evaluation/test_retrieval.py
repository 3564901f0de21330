import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from ssd.errors import UserError
from ssd.evaluation import retrieval
from ssd.evaluation.retrieval import average_precisions, chance_hit, chance_precision, retrieval_numbers
from tests.evaluation.samples import clouds, digits


def on_a_line(*cosines):
    """Points in the plane whose similarity to (1, 0) is as given."""
    return torch.tensor([[value, (1 - value * value) ** 0.5] for value in cosines])


def test_worked_example():
    """Right, wrong, right, wrong, right: (1/1 + 2/3 + 3/5) / 3, and 1, 2 and 3 of the first 1, 3 and 5."""
    bank, labels = on_a_line(0.9, 0.8, 0.7, 0.6, 0.5), torch.tensor([1, 0, 1, 2, 1])
    precision, found = average_precisions(torch.tensor([[1.0, 0]]), torch.tensor([1]), bank, labels, first=(1, 3, 5))
    assert precision.item() == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert found.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("among", ["test", "train"])
def test_average_precision_is_that_of_scikit_learn_for_every_query(among):
    train, labels, test, truth = digits()
    bank = {"test": (None, None), "train": (train, labels)}[among]
    ours, found = average_precisions(test, truth, *bank, first=(5,))
    other, classes = (test, truth) if among == "test" else (train, labels)
    scores = (F.normalize(test, dim=1) @ F.normalize(other, dim=1).T).numpy()
    for place in range(0, len(test), 7):
        kept = np.arange(len(other)) != (place if among == "test" else -1)
        relevant = (classes == truth[place]).numpy()[kept]
        # float32 products in another order of samples: neighbours that are equal to 1e-7 may change places
        assert ours[place].item() == pytest.approx(average_precision_score(relevant, scores[place][kept]), abs=1e-4)
        assert found[place].item() == relevant[np.argsort(-scores[place][kept], kind="stable")[:5]].sum()


def test_equal_similarities_share_a_threshold_and_win_nothing():
    """One right and one wrong at .9, two right at .5, one wrong at .5: precisions 1/2, then 3/5 twice, as scikit-learn."""
    scores, labels = (0.9, 0.9, 0.5, 0.5, 0.5), torch.tensor([1, 0, 1, 1, 0])
    precision, found = average_precisions(
        torch.tensor([[1.0, 0]]), torch.tensor([1]), on_a_line(*scores), labels, first=(1, 2, 3, 4, 5)
    )
    assert precision.item() == pytest.approx((1 / 2 + 3 / 5 + 3 / 5) / 3)
    assert precision.item() == pytest.approx(average_precision_score(labels == 1, scores))
    assert found.tolist() == [[0, 1, 1, 2, 3]]


def test_collapsed_features_rank_nothing():
    """All alike: precision is the share of the class, and none of the first is right."""
    labels = torch.arange(40) % 4
    map_, recall1, recall5, precision10 = retrieval_numbers(
        torch.ones(4, 8), torch.arange(4), torch.ones(40, 8), labels
    )
    assert map_.value == pytest.approx(9 / 39)
    assert recall1.value == recall5.value == precision10.value == 0


def test_chance_is_the_mean_over_all_orders():
    """Two relevant of five: all 120 orders, by hand."""
    precisions, hits = [], []
    for order in itertools.permutations([1, 1, 0, 0, 0]):
        precisions.append(average_precision_score(order, [5, 4, 3, 2, 1]))
        hits.append(any(order[:3]))
    assert chance_precision(torch.tensor([2]), 5).item() == pytest.approx(np.mean(precisions))
    assert chance_hit(torch.tensor([2]), 5, 3).item() == pytest.approx(np.mean(hits))
    assert chance_hit(torch.tensor([3]), 5, 3).item() == 1.0


def test_noise_gives_chance():
    labels = torch.arange(600) % 5
    noise = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    for number in retrieval_numbers(noise, labels, noise, labels):
        # 600 queries, one right or wrong each at worst: a deviation of 0.02
        assert number.value == pytest.approx(number.chance, abs=0.06)


def test_chunks_change_nothing(monkeypatch):
    test, labels = clouds(150)
    whole = average_precisions(test, labels)
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", 1000)
    for first, second in zip(whole, average_precisions(test, labels), strict=True):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=0)  # products of another shape round otherwise


def test_the_order_of_the_samples_does_not_matter():
    test, labels = clouds(120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(average_precisions(test, labels)[0][order], average_precisions(test[order], labels[order])[0])


def test_queries_without_another_of_their_class_are_left_out_and_said():
    (train, labels), (test, _) = clouds(20), clouds(9, seed=1)
    truth = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    precision, _ = average_precisions(test, truth)
    assert precision.isnan().tolist() == [False] * 8 + [True]
    numbers = retrieval_numbers(train, labels, test, truth)
    assert [number.name for number in numbers] == ["retrieval/map", "retrieval/recall1", "retrieval/recall5"]
    assert numbers[0].value == pytest.approx(precision[:8].mean().item())
    assert numbers[0].protocol == "retrieval-v1 cosine, each test sample among 8 others, 1 without another left out"
    assert len(retrieval_numbers(train, labels, test, truth, among="train")) == 4


def test_what_cannot_be_ranked_is_said():
    features = torch.randn(4, 3)
    with pytest.raises(UserError, match="a class with two samples"):
        retrieval_numbers(features, torch.arange(4), features, torch.arange(4))
    with pytest.raises(UserError, match="among 'test' or 'train'"):
        retrieval_numbers(features, torch.arange(4), features, torch.arange(4), among="both")
    features[1, 1] = float("nan")
    with pytest.raises(UserError, match="1 of 4 rows of the test features"):
        retrieval_numbers(torch.randn(4, 3), torch.arange(4), features, torch.arange(4))
