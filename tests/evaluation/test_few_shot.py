import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from scipy.spatial.distance import cdist

from ssd.errors import UserError
from ssd.evaluation import few_shot
from ssd.evaluation.few_shot import distinct, draw_episodes, episode_accuracy, few_shot_numbers, half_interval
from tests.evaluation.samples import clouds, digits


@settings(deadline=None, max_examples=30)
@given(classes=integers(2, 8), shots=integers(1, 6), queries=integers(1, 6), seed=integers(0, 5))
def test_an_episode_has_different_samples_of_different_classes(classes, shots, queries, seed):
    train, test = torch.arange(classes * 7).flip(0) % classes, torch.arange(classes * 6) // 6
    drawn = draw_episodes(train, test, min(classes, 3), shots, queries, 20, seed)
    for support, query in zip(*drawn, strict=True):
        assert torch.equal(train[support].amin(1), train[support].amax(1))  # one class a row
        assert torch.equal(train[support][:, 0], test[query][:, 0]) and torch.equal(
            test[query].amin(1), test[query].amax(1)
        )
        assert len(train[support][:, 0].unique()) == min(classes, 3)
        assert len(support.unique()) == support.numel() and len(query.unique()) == query.numel()


def test_classes_and_samples_are_drawn_equally_often():
    """4000 episodes of 2 of 5 classes: 1600 each, deviation 31; 3 of 8 samples of each: 600 each, deviation 24."""
    labels = torch.arange(40) % 5
    drawn = draw_episodes(labels, labels, 2, 3, 3, 4000)
    for part in drawn:
        assert (labels[part[:, :, 0]].flatten().bincount() - 1600).abs().max() < 5 * 31
        assert (part.flatten().bincount(minlength=40) - 600).abs().max() < 5 * 24


def test_every_ordered_choice_is_as_likely():
    """2 different numbers below 3: six outcomes in equal parts of the unit square."""
    grid = (np.arange(60) + 0.5) / 60
    taken = distinct(np.stack(np.meshgrid(grid, grid), -1), np.full((60, 60), 3))
    found, counts = np.unique(taken.reshape(-1, 2), axis=0, return_counts=True)
    assert found.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    assert (counts == 600).all()


def test_episodes_repeat_with_the_seed_and_do_not_depend_on_how_many_are_asked_for():
    labels = torch.arange(100) % 7
    first = draw_episodes(labels, labels, episodes=50, queries=4, seed=3)
    again = draw_episodes(labels, labels, episodes=20, queries=4, seed=3)
    assert all(torch.equal(a[:20], b) for a, b in zip(first, again, strict=True))
    other = draw_episodes(labels, labels, episodes=50, queries=4, seed=4)
    assert not torch.equal(first.support, other.support)


@pytest.mark.parametrize("shots", [1, 5])
def test_each_episode_scores_as_distances_to_the_class_means_say(shots):
    train, labels, test, truth = digits()
    drawn = draw_episodes(labels, truth, 5, shots, 15, 30, seed=1)
    ours = episode_accuracy(train, test, drawn)
    mean = train.mean(0).numpy()
    unit = [
        (part.numpy() - mean) / np.linalg.norm(part.numpy() - mean, axis=1, keepdims=True) for part in (train, test)
    ]
    theirs = []
    for support, query in zip(*(part.numpy() for part in drawn), strict=True):
        means = np.stack([unit[0][row].mean(0) for row in support])
        nearest = cdist(unit[1][query.ravel()], means).argmin(1)
        theirs.append((labels.numpy()[support[:, 0]][nearest] == truth.numpy()[query.ravel()]).mean())
    assert ours.numpy() == pytest.approx(theirs, abs=1e-9)


def test_a_hundred_episodes_together_are_those_alone(monkeypatch):
    (train, labels), (test, truth) = clouds(200), clouds(200, seed=1)
    drawn = draw_episodes(labels, truth, 5, 2, 10, 100)
    together = episode_accuracy(train, test, drawn)
    monkeypatch.setattr(few_shot, "NUMBERS_AT_ONCE", 1)
    assert torch.equal(episode_accuracy(train, test, drawn), together)


def test_far_apart_classes_are_told_apart_and_noise_is_not():
    (train, labels), (test, truth) = clouds(200, spread=0.01), clouds(200, spread=0.01, seed=1)
    assert [number.value for number in few_shot_numbers(train, labels, test, truth, episodes=50)] == [1.0, 1.0]
    random = torch.Generator().manual_seed(0)
    noise = [torch.randn(200, 16, generator=random) for _ in range(2)]
    for number in few_shot_numbers(noise[0], labels, noise[1], truth, episodes=400):
        # 400 episodes of 75 queries share 200 samples: the deviation of a mean of all of them is 0.028
        assert number.chance == 0.2 and abs(number.value - 0.2) < 3 * 0.028


def test_names_and_protocols_say_what_was_drawn():
    (train, labels), (test, truth) = clouds(60, classes=3), clouds(24, classes=3, seed=1)
    one, five = few_shot_numbers(train, labels, test, truth, episodes=10)
    assert one.name == "few_shot/3way_1shot/top1" and five.name == "few_shot/3way_5shot/top1"
    assert one.protocol == "few-shot-v1 3-way 1-shot, 8 queries, 10 episodes"
    assert one.chance == 1 / 3 and one.low < one.value < one.high


def test_a_class_with_few_test_samples_does_not_make_episodes_small():
    """Seven classes of nine test samples and one of two: nine queries each, of the seven."""
    (train, labels), (test, _) = clouds(80, classes=8), clouds(65, classes=8, seed=1)
    truth = torch.cat([torch.arange(63) % 7, torch.tensor([7, 7])])
    one, _ = few_shot_numbers(train, labels, test, truth, episodes=10)
    assert one.protocol == "few-shot-v1 5-way 1-shot, 9 queries, 10 episodes of 7 of 8 classes"


def test_the_interval_is_the_usual_one():
    """Ten right and ten wrong episodes: deviation sqrt(20 / 19) / 2, divided by the root of 20."""
    accuracies = torch.tensor([0.0, 1.0] * 10).double()
    assert half_interval(accuracies) == pytest.approx(1.96 * (20 / 19) ** 0.5 / 2 / 20**0.5)


def test_what_cannot_be_drawn_is_said():
    labels = torch.arange(20) % 4
    with pytest.raises(UserError, match=r"5-way 1-shot episodes need 5 classes .* 4 of the 4 classes have them"):
        draw_episodes(labels, labels, queries=3)
    with pytest.raises(UserError, match="at least 2 ways"):
        draw_episodes(labels, labels, ways=1)
    features = torch.randn(20, 4)
    with pytest.raises(UserError, match="need two classes"):
        few_shot_numbers(features, labels, features, labels, shots=(9,))
    with pytest.raises(UserError, match="1 of the 20 test samples have none"):
        few_shot_numbers(features, labels, features, torch.where(torch.arange(20) == 3, -1, labels))
