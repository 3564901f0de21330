import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ssd.errors import UserError
from ssd.evaluation import few_labels
from ssd.evaluation.few_labels import few_label_accuracy
from ssd.evaluation.splits import balanced_draws
from tests.evaluation.samples import clouds, digits


@pytest.mark.parametrize("per_class", [1, 13])
def test_every_draw_scores_as_scikit_learn_does_on_the_same_labels(per_class):
    """1 per class is fewer samples than dimensions, 13 more: the two ways the axes are found."""
    train, labels, test, truth = digits()
    ours = few_label_accuracy(train, labels, test, truth, per_class, draws=6, seed=3)
    scaler = StandardScaler().fit(train.numpy())
    features, queries = scaler.transform(train.numpy()), scaler.transform(test.numpy())
    theirs = []
    for rows in balanced_draws(labels, per_class, 6, seed=3).numpy():
        model = LogisticRegression(C=1.0, tol=1e-6, max_iter=5000).fit(features[rows], labels.numpy()[rows])
        theirs.append(model.score(queries, truth.numpy()))
    # at most one of 500 test digits lies so near a border that float32 and float64 tell it apart
    assert np.abs(ours.numpy() - theirs).max() < 0.0021


def test_solving_draws_apart_changes_nothing(monkeypatch):
    (train, labels), (test, truth) = clouds(200), clouds(100, seed=1)
    together = few_label_accuracy(train, labels, test, truth, 3, draws=5)
    monkeypatch.setattr(few_labels, "NUMBERS_AT_ONCE", 1)
    assert torch.equal(few_label_accuracy(train, labels, test, truth, 3, draws=5), together)


def test_all_labels_in_one_draw_is_the_plain_probe():
    (train, labels), (test, truth) = clouds(200), clouds(400, seed=1)
    scaler = StandardScaler().fit(train.numpy())
    model = LogisticRegression(C=1.0, tol=1e-6, max_iter=5000).fit(scaler.transform(train.numpy()), labels.numpy())
    expected = model.score(scaler.transform(test.numpy()), truth.numpy())
    assert few_label_accuracy(train, labels, test, truth, 200, draws=1).item() == pytest.approx(expected, abs=1e-6)


def test_more_labels_are_better_and_vary_less():
    train, labels, test, truth = digits()
    one, many = (few_label_accuracy(train, labels, test, truth, number, draws=20) for number in (1, 13))
    assert many.mean() > one.mean() + 0.2
    assert many.std() < one.std() / 2


def test_labels_outside_the_draws_are_never_read():
    """Only drawn samples teach: wrong labels everywhere else, swapped inside the classes' places, change nothing."""
    (train, labels), (test, truth) = clouds(100), clouds(100, seed=1)
    drawn = balanced_draws(labels, 2, 1, seed=0)[0]
    expected = few_label_accuracy(train, labels, test, truth, 2, draws=1)
    moved = train.clone()
    rest = torch.ones(100, dtype=torch.bool)
    rest[drawn] = False
    places = rest.nonzero().squeeze(1)
    moved[places] = train[places.flip(0)]  # the same features overall, other labels beside them
    assert torch.equal(few_label_accuracy(moved, labels, test, truth, 2, draws=1), expected)


def test_no_draws_are_refused():
    train, labels = clouds(20)
    with pytest.raises(UserError, match="draw nothing"):
        few_label_accuracy(train, labels, train, labels, 0)
