"""Labels from clusters: whitening, k-means once and seeded, what is refused, what is kept."""

import pytest
import torch
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.pseudo_labels import PseudoLabels, whitening
from ssd.weights.checkpoint import strict_load

BLOBS = 4


def blobs(each: int = 10, seed: int = 0) -> torch.Tensor:
    """(BLOBS each, 6) around far corners, blob after blob, along axes of very unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    corners = 10 * torch.eye(BLOBS, 6).repeat_interleave(each, 0)
    noise = torch.randn(BLOBS * each, 6, generator=generator) * 0.1
    return (corners + noise) * torch.tensor([100.0, 1, 1, 0.01, 1, 1]) + 7


def settled(features=None, clusters: int = BLOBS, **settings) -> PseudoLabels:
    labels = PseudoLabels(clusters, **{"whitened_dim": 3} | settings)
    features = blobs() if features is None else features
    labels.settle(features, torch.arange(len(features)), len(features), "data")
    return labels


def test_whitened_features_are_uncorrelated_with_variance_one():
    features = blobs().double()
    mean, components = whitening(features, 4)
    white = (features - mean) @ components
    assert_close(white.mT @ white / (len(white) - 1), torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_directions_along_which_nothing_varies_are_left_out():
    """A feature that repeats another, and one that is constant, would be rounding divided by rounding."""
    features = torch.randn(50, 3)
    features = torch.cat([features, features[:, :1], torch.ones(50, 1)], dim=1).double()
    assert whitening(features, 128)[1].shape == (5, 3)
    assert whitening(torch.randn(4, 10).double(), 128)[1].shape == (10, 3), "4 points vary along 3 directions"


def test_clusters_are_found_whatever_the_scale_of_a_feature():
    found = settled().labels.unflatten(0, (BLOBS, -1))
    assert (found == found[:, :1]).all() and sorted(found[:, 0].tolist()) == list(range(BLOBS))


def test_two_clusterings_with_one_seed_agree():
    features = torch.randn(300, 16)
    first, second = (settled(features, 12, seed=3, whitened_dim=16) for _ in range(2))
    assert torch.equal(first.labels, second.labels) and torch.equal(first.centres, second.centres)


def test_global_random_numbers_are_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    settled(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_clusters_are_left_out_and_the_others_numbered_anew(recwarn):
    points = torch.randn(3, 8).repeat(7, 1)
    labels = settled(points, clusters=5)
    assert sorted(labels.labels.unique().tolist()) == [0, 1, 2] and labels.num_present == 3
    assert labels.sizes().tolist() == [7, 7, 7]
    assert not recwarn.list


def test_labels_are_those_of_the_nearest_centre_and_new_samples_get_one_too():
    labels = settled()
    assert torch.equal(labels.nearest(blobs()), labels.labels)
    assert torch.equal(labels.nearest(blobs(seed=5)), labels.labels)
    assert_close(labels.centres.shape, (BLOBS, 3))


def test_rounds_of_k_means_are_at_most_so_many(monkeypatch):
    import sklearn.cluster

    seen = {}

    class Counted(sklearn.cluster.KMeans):
        def fit_predict(self, points):
            answer = super().fit_predict(points)
            seen.update(rounds=self.n_iter_, most=self.max_iter)
            return answer

    monkeypatch.setattr(sklearn.cluster, "KMeans", Counted)
    settled(torch.randn(500, 16), 20, iterations=2)
    assert seen == {"rounds": 2, "most": 2}
    settled(torch.randn(30_000, 2), 20)
    assert seen["most"] == 20, "all points, however many there are"


def test_samples_that_could_not_be_read_and_unknown_ones_have_no_label():
    labels = PseudoLabels(2, whitened_dim=2)
    labels.settle(blobs(1), torch.tensor([0, 2, 3, 5]), 6, "data")
    assert (labels.labels[[1, 4]] == -1).all() and (labels.labels[[0, 2, 3, 5]] >= 0).all()
    assert labels(torch.tensor([1, 6, 99])).tolist() == [-1] * 3
    assert int(labels.sizes().sum()) == 4


def test_state_holds_labels_and_clustering_whatever_their_sizes():
    labels, fresh = settled(), PseudoLabels(BLOBS, whitened_dim=3)
    strict_load(fresh, labels.state_dict(), "the state")
    for name in PseudoLabels.MEMORY:
        assert torch.equal(getattr(fresh, name), getattr(labels, name))
    assert fresh.fingerprint == "data" and torch.equal(fresh.nearest(blobs()), labels.labels)


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(UserError, match="num_clusters: 50 are more than the 40 training samples"):
        settled(clusters=50)
    with pytest.raises(UserError, match="not finite"):
        settled(torch.full((10, 3), float("nan")))
    with pytest.raises(UserError, match="the same to every sample"):
        settled(torch.full((10, 3), 0.1) * torch.tensor([1.0, 3.0, 7.0]))
    with pytest.raises(UserError, match="no pseudo-labels yet"):
        PseudoLabels(2)(torch.tensor([0]))
    for settings in ({"num_clusters": 1}, {"whitened_dim": 0}, {"iterations": 0}):
        with pytest.raises(UserError, match=f"{next(iter(settings))}: "):
            PseudoLabels(**{"num_clusters": 2, **settings})


def labels_as_rank(rank: int, world: int) -> torch.Tensor:
    """Ranks with features of their own, as those of other kernels would be."""
    return settled(blobs(seed=rank)[torch.randperm(40, generator=torch.Generator().manual_seed(rank))]).labels


def test_every_process_has_the_labels_of_the_first(pair):
    first, second = pair.run(labels_as_rank)
    assert torch.equal(first, second) and len(first.unique()) == BLOBS
