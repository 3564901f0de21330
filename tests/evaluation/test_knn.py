import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers
from sklearn.neighbors import KNeighborsClassifier
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.evaluation import knn
from ssd.evaluation.knn import (
    InBfloat16,
    faster_search,
    in_float32,
    knn_accuracy,
    knn_predict,
    largest,
    unit_vectors,
)
from tests.evaluation.samples import clouds, digits


def by_scikit_learn(bank, labels, queries, k, temperature, center):
    bank, queries = bank.numpy(), queries.numpy()
    if center:
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    votes = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    return votes.fit(bank, labels.numpy()).predict(queries)


@pytest.mark.parametrize("center", [False, True])
def test_predictions_are_those_of_scikit_learn_on_digits(center):
    bank, labels, queries, _ = digits()
    predictions = knn_predict(bank, labels, queries, (1, 10, 20, 100, 200), center=center)
    for k, predicted in predictions.items():
        assert predicted.tolist() == by_scikit_learn(bank, labels, queries, k, 0.07, center).tolist()


@settings(deadline=None, max_examples=15)
@given(k=integers(1, 60), seed=integers(0, 10), center=booleans())
def test_predictions_are_those_of_scikit_learn_on_clouds(k, seed, center):
    (bank, labels), (queries, _) = clouds(60, seed=seed), clouds(40, seed=seed + 100)
    predicted = knn_predict(bank, labels, queries, (k,), temperature=0.2, center=center)[k]
    assert predicted.tolist() == by_scikit_learn(bank, labels, queries, k, 0.2, center).tolist()


def test_two_far_votes_win_over_one_near_vote_only_when_their_weights_say_so():
    """Cosines 1, .8, .8 at temperature t: the near vote weighs e^(.2 / t) of a far one, above 2 where t < .2 / ln 2."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]])
    border = 0.2 / math.log(2)
    assert knn_predict(bank, labels, query, (3,), temperature=0.98 * border)[3].item() == 0
    assert knn_predict(bank, labels, query, (3,), temperature=1.02 * border)[3].item() == 1


def test_centring_compares_directions_from_the_mean_of_the_bank():
    """Seen from the origin all lie in one direction; seen from their mean, (9, 10) and (11, 10) are opposite."""
    bank, labels = torch.tensor([[9.0, 10.0], [11.0, 10.0]]), torch.tensor([0, 1])
    queries = torch.tensor([[2.0, 10.0], [90.0, 10.0]])
    assert knn_predict(bank, labels, queries, (1,), center=True)[1].tolist() == [0, 1]


@pytest.mark.parametrize("search", ["float32", "bfloat16"])
def test_neither_chunks_nor_order_nor_scale_change_a_prediction(search):
    (bank, labels), (queries, _) = clouds(300), clouds(50, seed=1)
    expected = knn_predict(bank, labels, queries, (5, 20), search=search)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for other in (
        knn_predict(bank, labels, queries, (5, 20), chunk=7, search=search),
        knn_predict(bank[order], labels[order], queries, (20, 5), search=search),
        knn_predict(1000 * bank, labels, 0.001 * queries, (5, 20), search=search),
    ):
        assert all(torch.equal(other[k], expected[k]) for k in (5, 20))


@settings(deadline=None, max_examples=20)
@given(seed=integers(0, 1000), count=integers(1, 30), offset=integers(0, 20))
def test_the_search_in_bfloat16_finds_the_neighbours_of_the_search_in_float32(seed, count, offset):
    """A large common offset brings all cosines together, where bfloat16 alone would take other neighbours."""
    random = torch.Generator().manual_seed(seed)
    bank, queries = torch.randn(400, 24, generator=random) + offset, torch.randn(30, 24, generator=random) + offset
    bank, queries = unit_vectors(bank, queries, center=False)
    expected, _ = in_float32(queries, bank, count)
    similarity, index = InBfloat16(bank)(queries, bank, count)
    assert_close(similarity, expected, atol=1e-6, rtol=0)  # sums of 24 products in another order
    assert_close((queries[:, None] * bank[index]).sum(2), expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=20)
@given(seed=integers(0, 1000), columns=integers(1, 900), count=integers(1, 40))
def test_the_largest_of_groups_are_the_largest_of_all(seed, columns, count):
    scores = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    count = min(count, columns)
    values, places = largest(scores, count)
    assert torch.equal(values.sort(1, descending=True)[0], scores.topk(count, dim=1)[0])
    assert torch.equal(scores.gather(1, places), values) and all(len(set(row)) == count for row in places.tolist())


def test_vectors_too_close_together_for_bfloat16_are_compared_in_float32_from_then_on():
    (bank, _), (queries, _) = clouds(400), clouds(40, seed=1)
    bank, queries = unit_vectors(bank + 300, queries + 300, center=False)
    find = InBfloat16(bank)
    for part in queries.split(20):
        similarity, _ = find(part, bank, 5)
        assert_close(similarity, in_float32(part, bank, 5)[0], atol=1e-6, rtol=0)
    assert find.asked == find.repeated == 20, "the second part was not tried"


def test_the_search_is_chosen_by_the_size_of_the_bank_and_what_the_processor_can_do(monkeypatch):
    for able, expected in ((True, ["float32", "bfloat16", "float32", "float32"]), (False, ["float32"] * 4)):
        monkeypatch.setattr(knn, "multiplies_bfloat16", lambda able=able: able)
        asked = [(5000, 1000, 20), (50_000, 1000, 200), (50_000, 1000, 5000), (50_000, 3, 20)]
        assert [faster_search(torch.empty(size, 1), queries, k) for size, queries, k in asked] == expected


def test_a_small_temperature_does_not_overflow():
    (bank, labels), (queries, _) = clouds(100), clouds(20, seed=1)
    nearest = knn_predict(bank, labels, queries, (1,))[1]
    assert torch.equal(knn_predict(bank, labels, queries, (10,), temperature=1e-5)[10], nearest)


def test_more_neighbours_than_samples_uses_all_and_says_so():
    (bank, labels), (queries, _) = clouds(30), clouds(10, seed=1)
    with pytest.warns(UserWarning, match="30 samples: k = 200"):
        predictions = knn_predict(bank, labels, queries, (30, 200))
    assert torch.equal(predictions[30], predictions[200])


def test_the_bank_knows_itself():
    bank, labels = clouds(100)
    assert knn_accuracy(bank, labels, bank, labels, (1,)) == {1: 1.0}


def test_mistakes_are_said_before_anything_is_computed():
    bank, labels = clouds(20)
    with pytest.raises(UserError, match="20 of the 20 bank samples"):
        knn_predict(bank, torch.full_like(labels, -1), bank)
    broken = bank.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(UserError, match="1 of 20 rows of the query features"):
        knn_predict(bank, labels, broken)
    with pytest.raises(UserError, match="at least 1"):
        knn_predict(bank, labels, bank, (0,))
    with pytest.raises(UserError, match="temperature"):
        knn_predict(bank, labels, bank, (1,), temperature=0.0)
