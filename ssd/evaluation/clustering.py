"""Clustering: do groups that k-means finds without labels fall together with the classes?"""

import numpy as np
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.protocol import Number, chance_level, check_finite, check_labels

STARTS = 10


def clustering_numbers(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    seed: int = 0,
    starts: int = STARTS,
) -> list[Number]:
    """Accuracy with each cluster given to one class, normalised mutual information and adjusted Rand index.

    (Q, D), (Q,) of the test samples; the training set is not used. K-means on features of unit length, as many clusters as
    classes in the test set, the best of `starts` starts by its own inertia. Chance puts all samples into one cluster.
    """
    check_labels("clustering", test=test_labels)
    check_finite(test=test)
    classes = len(test_labels.unique())
    if classes < 2:
        raise UserError("clustering against classes needs two classes in the test set. Give another data set.")
    if starts < 1:
        raise UserError(f"{starts} starts of k-means find nothing; give at least 1.")
    clusters = kmeans_labels(test, classes, starts, seed)
    truth = test_labels.cpu().numpy()
    protocol = f"k-means-v1 unit length, {classes} clusters, best of {starts} starts"
    return [
        Number("clustering/top1", matched_accuracy(clusters, truth), protocol, chance_level(test_labels)),
        Number("clustering/nmi", float(normalized_mutual_info_score(truth, clusters)), protocol, 0.0),
        Number("clustering/ari", float(adjusted_rand_score(truth, clusters)), protocol, 0.0),
    ]


def kmeans_labels(features: Tensor, count: int, starts: int, seed: int) -> np.ndarray:
    """The cluster of each of (N, D) features at unit length. (N,)"""
    unit = F.normalize(features.float(), dim=1).cpu().numpy()
    different = len(np.unique(unit, axis=0))  # k-means warns where there are fewer points than clusters
    return KMeans(min(count, different), n_init=starts, random_state=seed).fit_predict(unit)


def matched_accuracy(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose cluster is given to their class, each cluster to one class, in the best way (Kuhn 1955)."""
    table = contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum()) / len(labels)
