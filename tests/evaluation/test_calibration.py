import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from ssd.errors import UserError
from ssd.evaluation.calibration import (
    COLDEST,
    best_temperature,
    brier_score,
    calibrated_probe,
    calibration_numbers,
    expected_calibration_error,
)
from ssd.evaluation.splits import held_out
from tests.evaluation.samples import clouds, digits


def test_calibration_error_of_a_worked_example():
    """Confidence .9 right twice of three, .6 right once of two: (3 |.9 - 2/3| + 2 |.6 - .5|) / 5."""
    probs = torch.tensor([[0.9, 0.1]] * 3 + [[0.4, 0.6]] * 2)
    labels = torch.tensor([0, 0, 1, 1, 0])
    expected = (3 * abs(0.9 - 2 / 3) + 2 * abs(0.6 - 0.5)) / 5
    assert expected_calibration_error(probs, labels) == pytest.approx(expected, abs=1e-6)


def test_brier_score_of_a_worked_example():
    """Sure and right 0, sure and wrong 2, undecided between three 2/3."""
    probs = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert brier_score(probs, torch.tensor([0, 1, 2])) == pytest.approx((0 + 2 + 2 / 3) / 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=random)
    labels = (logits / temperature).softmax(1).multinomial(1, generator=random).squeeze(1)
    assert best_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


def test_a_held_out_part_without_an_error_asks_for_the_coldest():
    assert best_temperature(torch.eye(4), torch.arange(4)) == pytest.approx(COLDEST, rel=1e-3)


def test_scores_are_those_of_scikit_learn_on_the_same_part_of_the_training_set():
    train, labels, test, truth = digits()
    probe = calibrated_probe(train, labels, test, seed=2)
    fit, held = (rows.numpy() for rows in held_out(labels, 0.1, 2))
    scaler = StandardScaler().fit(train.numpy())
    features, queries = scaler.transform(train.numpy()), scaler.transform(test.numpy())
    model = LogisticRegression(C=1 / probe.l2, tol=1e-8, max_iter=5000).fit(features[fit], labels.numpy()[fit])
    assert F.cross_entropy(probe.logits, truth).item() == pytest.approx(
        log_loss(truth.numpy(), model.predict_proba(queries)), abs=2e-3
    )
    logits = model.decision_function(features[held])
    temperatures = np.geomspace(0.2, 5, 400)
    losses = [F.cross_entropy(torch.from_numpy(logits / t), labels[held]).item() for t in temperatures]
    assert probe.temperature == pytest.approx(temperatures[np.argmin(losses)], rel=0.02)


def test_temperature_mends_overconfidence():
    """Labels that are half noise, learnt by heart from 360 samples in 200 dimensions with next to no penalty."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(3000, 200, generator=random)
    labels = (features[:, 0] + torch.randn(3000, generator=random) > 0).long()
    probe = calibrated_probe(features[:600], labels[:600], features[600:], l2=(1e-3,), held_out_share=0.4)
    plain, scaled = (
        expected_calibration_error((probe.logits / t).softmax(1), labels[600:]) for t in (1, probe.temperature)
    )
    assert probe.temperature > 2 and scaled < plain / 2


def test_six_numbers_beside_what_class_shares_would_get():
    (train, labels), (test, truth) = clouds(300), clouds(200, seed=1)
    numbers = {number.name: number for number in calibration_numbers(train, labels, test, truth)}
    assert list(numbers) == [
        f"{group}/{measure}" for group in ("calibration", "calibration_scaled") for measure in ("ece", "brier", "nll")
    ]
    assert numbers["calibration/nll"].chance == pytest.approx(np.log(5), abs=1e-6)
    assert numbers["calibration/brier"].chance == pytest.approx(0.8, abs=1e-6)
    assert numbers["calibration/ece"].chance == pytest.approx(0, abs=1e-6)
    assert numbers["calibration/nll"].value < numbers["calibration/nll"].chance
    assert numbers["calibration/ece"].protocol.startswith("ece-v1 15 bins, logistic on 90% of train, l2=")


def test_the_test_labels_choose_nothing():
    (train, labels), (test, truth) = clouds(300), clouds(200, seed=1)
    first, second = (calibration_numbers(train, labels, test, part) for part in (truth, truth.flip(0)))
    assert [number.protocol for number in first] == [number.protocol for number in second]
    with pytest.raises(UserError, match="none to hold out"):
        calibration_numbers(train[:3], torch.arange(3), test, truth)
