"""Few-shot episodes: a handful of classes, told apart by the means of a handful of samples of each.

The classifier of Wang et al., "SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning", 2019,
arXiv 1911.04623 (CL2N): the mean of the training features is taken off, features are brought to unit length, and the
nearest class mean wins. Departs from it: supports are drawn from the training set and queries from the test set, of the
same classes, because there are no labels that the features were trained on.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssd.data.randomness import uniforms
from ssd.errors import UserError
from ssd.evaluation.knn import unit_vectors
from ssd.evaluation.protocol import Number, check_finite, check_labels

EPISODES = 4
"""Key of the draws, apart from those of `splits`."""
NUMBERS_AT_ONCE = 2**25
"""Features held at a time: 128 MiB."""


class Episodes(NamedTuple):
    """E episodes of W classes. `support` (E, W, K) are places in the training set, `query` (E, W, Q) in the test set."""

    support: Tensor
    query: Tensor


def draw_episodes(
    train_labels: Tensor,
    test_labels: Tensor,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    seed: int = 0,
) -> Episodes:
    """Classes without repeats, and of each samples without repeats: a function of the labels, the sizes and the seed.

    (N,), (Q,). Only classes with `shots` training and `queries` test samples take part. Episode number i is the same
    whatever the number of episodes. Raises UserError where fewer than `ways` classes take part.
    """
    if min(ways - 1, shots, queries, episodes) < 1:
        raise UserError(
            f"{episodes} episodes of {ways} ways, {shots} shots and {queries} queries: give at least 2 ways and 1 of the rest."
        )
    train, test = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    length = 1 + max(train.max(initial=0), test.max(initial=0))
    sizes = [np.bincount(labels, minlength=length) for labels in (train, test)]
    fitting = np.flatnonzero((sizes[0] >= shots) & (sizes[1] >= queries))
    if len(fitting) < ways:
        raise UserError(
            f"{ways}-way {shots}-shot episodes need {ways} classes with {shots} training and {queries} test samples each; "
            f"{len(fitting)} of the {np.count_nonzero(sizes[0])} classes have them. Give more samples, or ask for fewer."
        )
    numbers = uniforms((episodes, len(fitting) + ways * (shots + queries)), EPISODES, seed, ways, shots, queries)
    chosen = fitting[np.argsort(numbers[:, : len(fitting)], axis=1, kind="stable")[:, :ways]]  # (E, W)
    rest = numbers[:, len(fitting) :].reshape(episodes, ways, shots + queries)
    drawn = []
    for labels, counts, part in ((train, sizes[0], rest[..., :shots]), (test, sizes[1], rest[..., shots:])):
        order = np.argsort(labels, kind="stable")
        first = np.cumsum(counts) - counts
        drawn.append(torch.from_numpy(order[first[chosen][..., None] + distinct(part, counts[chosen])]))
    return Episodes(*(part.to(train_labels.device) for part in drawn))


def distinct(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Uniform numbers (..., K) in [0, 1) -> K different whole numbers below each count (...), every choice as likely."""
    taken = np.empty(numbers.shape, dtype=np.int64)
    for draw in range(numbers.shape[-1]):
        place = (numbers[..., draw] * (counts - draw)).astype(np.int64)  # among those that are left
        for earlier in np.moveaxis(np.sort(taken[..., :draw], axis=-1), -1, 0):
            place += place >= earlier
        taken[..., draw] = place
    return taken


def episode_accuracy(train: Tensor, test: Tensor, episodes: Episodes) -> Tensor:
    """The share of each episode's queries whose class mean is nearest. (N, D), (Q, D) -> (E,) float64.

    Of means that are as near, the first in the episode counts.
    """
    check_finite(train=train, test=test)
    train, test = unit_vectors(train, test, center=True)
    ways, shots = episodes.support.shape[1:]
    numbers = ways * (shots + episodes.query.shape[2]) * train.shape[1]
    truth = torch.arange(ways, device=train.device)[:, None]
    accuracies = []
    for support, query in zip(*(part.split(max(1, NUMBERS_AT_ONCE // numbers)) for part in episodes), strict=True):
        means = train[support].mean(2)  # (e, W, D)
        asked = test[query].flatten(1, 2)  # (e, W Q, D)
        nearness = asked @ means.mT - means.square().sum(2)[:, None] / 2  # largest where the distance is smallest
        right = nearness.argmax(2).unflatten(1, query.shape[1:]) == truth
        accuracies.append(right.double().mean((1, 2)))
    return torch.cat(accuracies)


def few_shot_numbers(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    seed: int = 0,
    ways: int = 5,
    shots: tuple[int, ...] = (1, 5),
    queries: int = 15,
    episodes: int = 1000,
) -> list[Number]:
    """Mean accuracy over the episodes with its 95 % interval, for each number of shots. (N, D), (N,), (Q, D), (Q,).

    On data with fewer classes than `ways` there are as many as it has. Where classes have fewer test samples than
    `queries`, there are as many queries as three quarters of the classes have, and the rest are left out; name and
    protocol say so. Numbers of shots that fewer than two classes have are left out too; UserError where none is left.
    """
    check_labels("few-shot episodes", training=train_labels, test=test_labels)
    asked = test_labels.bincount()
    taught = train_labels.bincount(minlength=len(asked))[: len(asked)]
    numbers = []
    for shot in shots:
        sizes = asked[(asked > 0) & (taught >= shot)].sort(descending=True).values
        if len(sizes) < 2:
            continue
        possible = min(ways, len(sizes))
        each = min(queries, int(sizes[max(possible, math.ceil(0.75 * len(sizes))) - 1]))
        drawn = draw_episodes(train_labels, test_labels, possible, shot, each, episodes, seed)
        accuracies = episode_accuracy(train, test, drawn)
        mean = float(accuracies.mean())
        reach = half_interval(accuracies)
        kept, present = int((sizes >= each).sum()), int((asked > 0).sum())
        among = "" if kept == present else f" of {kept} of {present} classes"
        protocol = f"few-shot-v1 {possible}-way {shot}-shot, {each} queries, {episodes} episodes{among}"
        name = f"few_shot/{possible}way_{shot}shot/top1"
        numbers.append(Number(name, mean, protocol, 1 / possible, low=mean - reach, high=mean + reach))
    if not numbers:
        raise UserError(
            f"few-shot episodes of {' or '.join(map(str, shots))} shots need two classes with so many training samples and "
            "some test samples. Give more labelled samples."
        )
    return numbers


def half_interval(accuracies: Tensor) -> float:
    """Half the 95 % interval of the mean of (E,) episodes, by the normal approximation."""
    return 1.96 * float(accuracies.std()) / math.sqrt(len(accuracies))
