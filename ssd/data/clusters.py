"""Clusters of a data set on one or more levels, in a file that knows which data they are of.

Level 0 has the finest clusters, of samples; each further level has clusters of the clusters below. Hierarchical k-means
as in Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach", 2024, arXiv
2405.15613: centroids lie more evenly over the data than samples do, and centroids of centroids more evenly still.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd.data.inherited import inherited
from ssd.data.sources import Source
from ssd.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Clusters:
    """Who belongs where.

    Args:
        leaf: the finest cluster of each sample, -1 for one without. (N,) int32
        parents: level by level, the cluster of the next level that each cluster belongs to. (K0,), (K1,), ...
        count: how many of the finest clusters there are.
    """

    leaf: np.ndarray
    parents: tuple[np.ndarray, ...]
    count: int

    def sizes(self) -> np.ndarray:
        """Samples in each of the finest clusters. (K0,) int64"""
        return np.bincount(self.leaf[self.leaf >= 0], minlength=self.count)


@dataclass(frozen=True)
class ClusterFile:
    """Clusters as they were written.

    Args:
        path: of the file.
        data: what they are of, in words.
        fingerprint: of that source.
    """

    path: str
    clusters: Clusters
    data: str
    fingerprint: str

    def of(self, source: Source) -> Clusters:
        """The clusters of the samples of `source`, which is the data they were made of or a choice from it.

        Raises UserError for other data.
        """

        def answer(one: Any) -> np.ndarray | None:
            fits = len(one) == len(self.clusters.leaf) and one.fingerprint() == self.fingerprint
            return self.clusters.leaf if fits else None

        leaf = inherited(source, answer)
        if leaf is None:
            whole = source
            while hasattr(whole, "source"):
                whole = whole.source
            raise UserError(
                f"the clusters in '{self.path}' are of other data: {self.data}, {len(self.clusters.leaf)} samples, "
                f"fingerprint {self.fingerprint[:12]}. The data here is {whole.describe(0)} and so on, {len(whole)} samples, "
                f"fingerprint {whole.fingerprint()[:12]}. Write clusters of it with ssd curate, and the same data.labels."
            )
        return Clusters(leaf, self.clusters.parents, self.clusters.count)


def write_clusters(path: str | Path, clusters: Clusters, *, data: str, fingerprint: str) -> None:
    """One `.npz`, written to a temporary name and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.npz")
    about = {"version": VERSION, "count": clusters.count, "data": data, "fingerprint": fingerprint}
    content: dict[str, Any] = {**about, "leaf": clusters.leaf}
    content |= {f"parent_{level}": parent for level, parent in enumerate(clusters.parents)}
    try:
        np.savez_compressed(unfinished, **content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_clusters(path: str | Path) -> ClusterFile:
    """Raises UserError for a file that is not there or that `ssd curate` did not write."""
    if not os.path.isfile(path):
        raise UserError(
            f"there is no file of clusters '{path}'. Write one: ssd curate CHECKPOINT --data PATH --out {path}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["version"]) != VERSION:
                raise UserError(f"'{path}' was written by another version. Write it again with ssd curate.")
            levels = sum(name.startswith("parent_") for name in file.files)
            clusters = Clusters(
                file["leaf"], tuple(file[f"parent_{level}"] for level in range(levels)), int(file["count"])
            )
            return ClusterFile(str(path), clusters, str(file["data"]), str(file["fingerprint"]))
    except UserError:
        raise
    except Exception:  # NumPy, zip and zlib have many kinds
        raise UserError(f"'{path}' is not a file of clusters that ssd curate wrote. Write it again.") from None


def cluster(features: np.ndarray, levels: Sequence[int], seed: int = 0) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Hierarchical k-means: features (N, D) -> the finest cluster of each row (N,), and the parents level by level.

    `levels` are numbers of clusters, the finest first, falling. Levels of many rows use mini-batches. Clusters that
    come out empty are taken away, so that there may be fewer. Raises UserError for levels that do not fit N.
    """
    check_levels(levels, len(features))
    assignments = []
    points = features.astype(np.float32, copy=False)
    for level, count in enumerate(levels):
        labels, points = kmeans(points, count, seed + level)
        assignments.append(labels)
    return assignments[0], tuple(assignments[1:])


def kmeans(points: np.ndarray, count: int, seed: int, iterations: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each point (N,) int32, and the centroids (K, D) of those that have a point.

    With `iterations` all points in at most so many rounds; else until it settles, of many points in mini-batches.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    settings: dict[str, Any] = {"n_clusters": count, "random_state": seed, "n_init": 1}
    if iterations is not None:
        method = KMeans(max_iter=iterations, tol=0, **settings)
    elif len(points) <= FEW:
        method = KMeans(**settings)
    else:
        method = MiniBatchKMeans(batch_size=max(4096, 4 * count), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: some stay empty
        labels = method.fit_predict(points)
    kept, labels = np.unique(labels, return_inverse=True)
    return labels.reshape(-1).astype(np.int32), method.cluster_centers_[kept]


FEW = 20_000  # points up to which k-means goes through all of them in each round


def check_levels(levels: Sequence[int], samples: int | None = None) -> None:
    falling = all(finer > coarser for finer, coarser in zip(levels, levels[1:], strict=False))
    if not levels or min(levels) < 2 or not falling:
        text = ",".join(map(str, levels))
        raise UserError(f"clusters are {text or 'none'}. Give numbers of at least 2 that fall, such as 1000,100.")
    if samples is not None and levels[0] > samples:
        raise UserError(f"{levels[0]} clusters are more than the {samples} pictures that can be read. Give fewer.")


def gini(sizes: np.ndarray) -> float:
    """How unequal sizes (K,) are: 0 where all are equal, towards 1 where one holds everything."""
    ordered = np.sort(sizes).astype(np.float64)
    count = len(ordered)
    return float(2 * (np.arange(1, count + 1) * ordered).sum() / (count * ordered.sum()) - (count + 1) / count)
