"""Out-of-distribution detection: are samples of what was not in the training set farther from it than held-out ones?

Two distances to the training features, each judged by how well it tells the two kinds apart: that to the k-th nearest
neighbour at unit length (Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022), and the
Mahalanobis distance to the nearest class mean with one covariance for all classes (Lee et al., "A Simple Unified
Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018), here estimated with the
shrinkage of Ledoit and Wolf (2004), so that it exists for few samples and many dimensions.
"""

import math

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.knn import SCORES_AT_ONCE, in_float32, unit_vectors
from ssd.evaluation.protocol import Number, check_finite, check_labels

NEIGHBOUR = 50
ACCEPTED = 0.95


def ood_numbers(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0, k: int = NEIGHBOUR
) -> list[Number]:
    """Held-out classes: of the classes in the data the lower half by number is "in", the rest "out".

    (N, D), (N,), (Q, D), (Q,). With an odd number of classes one more is in than out. Training samples of the classes in
    are what is known; test samples of both kinds are told apart. Nothing is drawn: `seed` is not used.
    """
    check_labels("out-of-distribution detection", training=train_labels, test=test_labels)
    classes = torch.cat([train_labels, test_labels]).unique()
    if len(classes) < 2:
        raise UserError("out-of-distribution detection by held-out classes needs two classes. Give another data set.")
    last = classes[(len(classes) + 1) // 2 - 1]
    known, inside = train_labels <= last, test_labels <= last
    if not known.any() or not inside.any() or inside.all():
        raise UserError(
            f"out-of-distribution detection holds the classes above {int(last)} out, and there are {int(known.sum())} training "
            f"samples of those kept, {int(inside.sum())} test samples of them and {int((~inside).sum())} of the rest. "
            "Give a test set with all classes."
        )
    kept = int((classes <= last).sum())
    return told_apart(
        train[known],
        train_labels[known],
        test[inside],
        test[~inside],
        f"{kept} of {len(classes)} classes in",
        k,
    )


def ood_numbers_of_others(
    train: Tensor, train_labels: Tensor, test: Tensor, others: Tensor, name: str, k: int = NEIGHBOUR
) -> list[Number]:
    """Another data set is "out", of which `others` (M, D) are the features and `name` says what it is."""
    check_labels("out-of-distribution detection", training=train_labels)
    return told_apart(train, train_labels, test, others, f"out: {name}", k)


def told_apart(
    train: Tensor, train_labels: Tensor, inside: Tensor, outside: Tensor, what: str, k: int = NEIGHBOUR
) -> list[Number]:
    """AUROC (outside above inside) and FPR@95 (share of the outside accepted with 95 % of the inside) of both distances."""
    check_finite(training=train, test=inside, outside=outside)
    if not len(inside) or not len(outside):
        raise UserError(f"{len(inside)} samples inside and {len(outside)} outside: give at least one of each.")
    k = min(k, len(train))
    numbers = []
    for group, settings, distances in (
        ("ood_knn", f"ood-knn-v1 k={k}", [neighbour_distance(train, part, k) for part in (inside, outside)]),
        (
            "ood_mahalanobis",
            "ood-mahalanobis-v1 Ledoit-Wolf",
            mahalanobis_distance(train, train_labels, torch.cat([inside, outside])).split([len(inside), len(outside)]),
        ),
    ):
        protocol = f"{settings}, {what}"
        numbers += [
            Number(f"{group}/auroc", auroc(*distances), protocol, 0.5),
            Number(f"{group}/fpr95", false_positive_rate(*distances), protocol, ACCEPTED),
        ]
    return numbers


def neighbour_distance(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Squared distance of each query to its k-th nearest bank vector, both at unit length. (N, D), (Q, D) -> (Q,)"""
    bank, queries = unit_vectors(bank, queries, center=False)
    parts = queries.split(max(1, SCORES_AT_ONCE // len(bank)))
    return torch.cat([2 - 2 * in_float32(part, bank, k)[0][:, -1] for part in parts])


def mahalanobis_distance(bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Squared distance of each query to the nearest class mean, by the covariance around the means. -> (Q,) float64"""
    bank, queries = bank.double(), queries.double()
    classes, member = labels.unique(return_inverse=True)
    sums = bank.new_zeros(len(classes), bank.shape[1]).index_add_(0, member, bank)
    means = sums / member.bincount()[:, None]
    covariance = torch.from_numpy(ledoit_wolf((bank - means[member]).cpu().numpy(), assume_centered=True)[0])
    # dimensions that are constant over all of the bank have no spread to measure by
    floor = max(1e-12 * float(covariance.diagonal().max()), 1e-30)
    half = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance), dtype=torch.float64)).to(bank.device)
    points, centres = (torch.linalg.solve_triangular(half, part.T, upper=False).T for part in (queries, means))
    return torch.cdist(points, centres).amin(1).square()


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How likely a sample from outside has the larger score than one from inside, ties counting half (Mann and Whitney)."""
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside, right=False).double()
    up_to = torch.searchsorted(ordered, outside, right=True).double()
    return float((below + up_to).mean()) / (2 * len(inside))


def false_positive_rate(inside: Tensor, outside: Tensor, accepted: float = ACCEPTED) -> float:
    """Share of the outside below the smallest threshold that accepts so many of the inside."""
    place = math.ceil(accepted * len(inside)) - 1
    return float((outside <= inside.sort().values[place]).double().mean())
