"""The three ways to a linear classifier: SGD over a grid of rates, logistic regression, ridge."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from ssd.data.randomness import generator
from ssd.errors import UserError
from ssd.evaluation import linear
from ssd.evaluation.heads import product
from ssd.evaluation.linear import linear_predict, train_heads
from ssd.evaluation.logistic import fit_logistic, logistic_predict
from ssd.evaluation.ridge import ridge_predict
from ssd.evaluation.scaling import principal_axes, standardise
from ssd.evaluation.splits import balanced_draws
from tests.evaluation.samples import clouds, digits

PROBES = {"linear": linear_predict, "logistic": logistic_predict, "ridge": ridge_predict}


def accuracy(predictions, labels):
    return float((torch.as_tensor(predictions) == labels).float().mean())


def test_standardised_features_have_mean_0_and_deviation_1_and_constants_become_0():
    features, _ = clouds(200)
    features[:, 3] = 7.1
    train, test = standardise(features, features + 1)
    expected = StandardScaler().fit_transform(np.delete(features.double().numpy(), 3, axis=1))
    assert_close(np.delete(train.numpy(), 3, axis=1), expected.astype("float32"), atol=1e-4, rtol=0)
    assert not train[:, 3].any() and not test[:, 3].any()


@pytest.mark.parametrize(("number", "width"), [(50, 8), (8, 50), (3, 50)])
def test_the_principal_axes_keep_every_inner_product_of_the_features(number, width):
    features = torch.randn(2, number, width, generator=torch.Generator().manual_seed(0))
    basis, power = principal_axes(features)
    turned = features @ basis
    assert_close(turned @ turned.mT, features @ features.mT, atol=1e-4, rtol=1e-4)
    assert_close(turned.mT @ turned / number, torch.diag_embed(power), atol=1e-4, rtol=0)


@pytest.mark.parametrize("l2", [0.1, 1.0, 100.0])
def test_logistic_weights_are_those_of_scikit_learn(l2):
    features, labels = clouds(400)
    (features,) = standardise(features)
    heads = fit_logistic(features.double(), labels, torch.tensor([l2]), 5, tolerance=1e-9)
    theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(features.double().numpy(), labels.numpy())
    # only differences of the biases are determined
    assert_close(heads.weight[0].T.numpy(), theirs.coef_, atol=1e-5, rtol=0)
    bias = heads.bias[0] - heads.bias[0].mean()
    assert_close(bias.numpy(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-5, rtol=0)


def test_logistic_regression_on_two_points_has_its_closed_form():
    """x = +-1, classes 1 and 0: by symmetry the weights are (-w, w) and 2 / (1 + e^(2 w)) = l2 w."""
    points = torch.tensor([[1.0], [-1.0]]).double()
    heads = fit_logistic(points, torch.tensor([1, 0]), torch.tensor([0.5]), 2, tolerance=1e-9)
    w = float(heads.weight[0, 0, 1])
    assert_close(heads.weight[0, 0], torch.tensor([-w, w]).double(), atol=1e-8, rtol=0)
    assert 2 / (1 + np.exp(2 * w)) == pytest.approx(0.5 * w, abs=1e-8)


def test_a_hundred_problems_solved_together_are_those_solved_alone():
    features, labels = clouds(200)
    (features,) = standardise(features)
    drawn = balanced_draws(labels, 4, 6, seed=0)
    penalties = torch.tensor([0.01, 0.1, 1, 1, 10, 1000])
    together = fit_logistic(features[drawn].double(), labels[drawn], penalties, 5, tolerance=1e-9)
    for i, rows in enumerate(drawn):
        alone = fit_logistic(features[rows].double(), labels[rows], penalties[i : i + 1], 5, tolerance=1e-9)
        assert_close(together.weight[i], alone.weight[0], atol=1e-5, rtol=1e-5)
        assert_close(together.bias[i], alone.bias[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("l2", [1.0, 100.0])
def test_logistic_accuracy_on_digits_is_that_of_scikit_learn(l2):
    train, labels, test, truth = digits()
    ours = accuracy(logistic_predict(train, labels, test, l2=l2).predictions, truth)
    scaler = StandardScaler().fit(train.numpy())
    theirs = LogisticRegression(C=1 / l2, max_iter=5000).fit(scaler.transform(train.numpy()), labels.numpy())
    assert ours == pytest.approx(theirs.score(scaler.transform(test.numpy()), truth.numpy()), abs=0.0021)  # one of 500


@pytest.mark.parametrize("l2", [1.0, 30.0, 1000.0])
def test_ridge_predictions_are_those_of_scikit_learn(l2):
    train, labels, test, _ = digits()
    ours = ridge_predict(train, labels, test, l2=(l2,)).predictions
    scaler = StandardScaler().fit(train.numpy())
    theirs = RidgeClassifier(alpha=l2).fit(scaler.transform(train.numpy()), labels.numpy())
    assert ours.tolist() == theirs.predict(scaler.transform(test.numpy())).tolist()


def test_ridge_chooses_by_the_accuracy_of_leaving_each_sample_out():
    """Each sample is left out in earnest, the intercept with it, for every penalty."""
    train, labels = clouds(60, width=20, classes=3)
    (scaled,) = standardise(train)
    penalties = (0.1, 10.0, 1000.0)
    right = []
    for penalty in penalties:
        hits = 0
        for i in range(60):
            kept = np.arange(60) != i
            model = RidgeClassifier(alpha=penalty).fit(scaled.numpy()[kept], labels.numpy()[kept])
            hits += int(model.predict(scaled.numpy()[i : i + 1])[0] == labels[i])
        right.append(hits)
    assert len(set(right)) == 3
    assert ridge_predict(train, labels, train, l2=penalties).setting == pytest.approx(penalties[int(np.argmax(right))])


def test_ridge_with_fewer_samples_than_dimensions_is_that_of_scikit_learn():
    (train, labels), (test, _) = clouds(30, width=80), clouds(50, width=80, seed=1)
    ours = ridge_predict(train, labels, test, l2=(1.0, 100.0))
    scaler = StandardScaler().fit(train.numpy())
    theirs = RidgeClassifier(alpha=ours.setting).fit(scaler.transform(train.numpy()), labels.numpy())
    assert ours.predictions.tolist() == theirs.predict(scaler.transform(test.numpy())).tolist()


def test_heads_trained_at_once_are_those_of_torch_optim_trained_one_by_one():
    features, labels = clouds(70)
    (features,) = standardise(features)
    rates = (0.01, 0.1, 1.0)
    heads = train_heads(features, labels, rates, 5, epochs=3, min_steps=1, batch_size=16, seed=4)
    for i, rate in enumerate(rates):
        layer = torch.nn.Linear(16, 5)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12)
        for epoch in range(3):
            order = torch.from_numpy(generator(linear.ORDER, 4, epoch).permutation(70))
            for rows in order.split(16)[:4]:
                optimiser.zero_grad()
                F.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimiser.step()
                schedule.step()
        # float32 sums in another order: equal to a few parts in 1e5 of the largest weight
        assert_close(heads.weight[i].T, layer.weight.detach(), atol=1e-4, rtol=1e-4)
        assert_close(heads.bias[i], layer.bias.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("probe", PROBES)
def test_separable_classes_are_learnt(probe):
    (train, labels), (test, truth) = clouds(300, spread=0.1), clouds(200, spread=0.1, seed=1)
    assert accuracy(PROBES[probe](train, labels, test).predictions, truth) == 1.0


@pytest.mark.parametrize("probe", PROBES)
def test_noise_gives_chance(probe):
    """5 balanced classes, 2000 independent test samples: 0.2 with a standard deviation of 0.009."""
    (_, labels), (_, truth) = clouds(600), clouds(2000, seed=1)
    random = torch.Generator().manual_seed(0)
    noise, test = torch.randn(600, 16, generator=random), torch.randn(2000, 16, generator=random)
    assert abs(accuracy(PROBES[probe](noise, labels, test).predictions, truth) - 0.2) < 4 * 0.009


@pytest.mark.parametrize("probe", PROBES)
def test_the_setting_is_chosen_without_the_test_features(probe):
    """Other test features, and shuffled ones, leave choice and classifier as they are."""
    (train, labels), (test, _) = clouds(300), clouds(80, seed=1)
    first = PROBES[probe](train, labels, test)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    shuffled = PROBES[probe](train, labels, test[order])
    other = PROBES[probe](train, labels, torch.cat([test, 100 * torch.randn(500, 16)]))
    assert first.setting == shuffled.setting == other.setting
    assert torch.equal(first.predictions[order], shuffled.predictions)
    assert torch.equal(first.predictions, other.predictions[:80])


@pytest.mark.parametrize("probe", ["linear", "logistic"])
def test_whichever_setting_predicts_the_held_out_labels_is_chosen(probe, monkeypatch):
    """The held-out labels are made what one setting, fitted on the rest, says of them: that setting must win."""
    train, labels = clouds(300)
    (scaled,) = standardise(train)
    fit, held = torch.arange(200), torch.arange(200, 300)
    monkeypatch.setattr(sys.modules[PROBES[probe].__module__], "held_out", lambda *_: (fit, held))
    if probe == "linear":
        name, values = "rates", (1e-5, 1e-2, 1.0)
        heads = train_heads(scaled[fit], labels[fit], values, 5)
    else:
        name, values = "l2", (1e4, 30.0, 1e-2)
        heads = fit_logistic(scaled[fit], labels[fit], torch.tensor(values), 5)
    predicted = heads.logits(scaled[held]).argmax(2)
    assert len(predicted.unique(dim=0)) == 3
    for value, row in zip(values, predicted, strict=True):
        labels[held] = row
        assert PROBES[probe](train, labels, train, **{name: values}).setting == value


@pytest.mark.parametrize("probe", PROBES)
def test_scaling_or_shifting_features_changes_nothing(probe):
    (train, labels), (test, _) = clouds(300), clouds(100, seed=1)
    factor, offset = torch.linspace(0.01, 100, 16), torch.linspace(-3, 3, 16)
    first = PROBES[probe](train, labels, test)
    second = PROBES[probe](factor * train + offset, labels, factor * test + offset)
    assert first.setting == second.setting
    # a sample on a border may fall to either side of it by rounding
    assert (first.predictions != second.predictions).sum() <= 1


@pytest.mark.parametrize("probe", PROBES)
def test_the_same_seed_gives_the_same_predictions(probe):
    (train, labels), (test, _) = clouds(200), clouds(100, seed=1)
    first = PROBES[probe](train, labels, test)
    torch.manual_seed(99)
    assert torch.equal(first.predictions, PROBES[probe](train, labels, test).predictions)


@pytest.mark.parametrize("probe", PROBES)
def test_unlabelled_samples_and_diverged_features_are_refused(probe):
    train, labels = clouds(50)
    with pytest.raises(UserError, match="1 of the 50 train samples have none"):
        PROBES[probe](train, torch.where(torch.arange(50) == 4, -1, labels), train)
    train[7, 1] = float("inf")
    with pytest.raises(UserError, match="1 of 50 rows of the train features"):
        PROBES[probe](train, labels, train)


def test_one_product_serves_shared_features_and_batches():
    random = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 3, generator=random), torch.randn(4, 3, 5, generator=random)
    assert_close(product(features, weight), torch.stack([features @ one for one in weight]))
    batched = features.expand(4, 7, 3).contiguous()
    assert_close(product(batched, weight), product(features, weight))


def test_penalties_that_cannot_be_are_refused():
    train, labels = clouds(20)
    with pytest.raises(UserError, match="must not be negative"):
        fit_logistic(train, labels, torch.tensor([-1.0]), 5)
    with pytest.raises(UserError, match="above 0"):
        linear_predict(train, labels, train, rates=(0.0,))
    with pytest.raises(UserError, match="above 0"):
        ridge_predict(train, labels, train, l2=(0.0, 1.0))
