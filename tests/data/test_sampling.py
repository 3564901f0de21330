"""What an epoch draws: exact counts, nothing left out in silence, the same in every process."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, lists

from ssd.data.clusters import ClusterFile, Clusters, cluster, gini, read_clusters, write_clusters
from ssd.data.mixture import Mixture, check_parts
from ssd.data.sampler import EpochSampler, turns
from ssd.data.sampling import Balanced, Fraction, Weighted, draws_of, evenly, fresh, largest_remainder
from ssd.data.sources import Subset
from ssd.errors import UserError


class Numbers:
    """A source of `count` numbers, with labels where they are given."""

    def __init__(self, count, name="numbers", labels=None, classes=None, groups=None):
        self.count, self.name, self.classes = count, name, classes
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.groups = None if groups is None else np.asarray(groups, np.int64)

    def __len__(self):
        return self.count

    def open(self, index):
        return np.full((2, 2), index, np.uint8)

    def label(self, index):
        return -1 if self.labels is None else int(self.labels[index])

    def describe(self, index):
        return f"{self.name} {index}"

    def fingerprint(self):
        return f"{self.name} {self.count}"


# ---------------------------------------------------------------- a fraction


@given(length=integers(2, 200), share=floats(0.01, 0.99), seed=integers(0, 3))
def test_a_fraction_is_another_one_each_epoch_until_all_was_seen(length, share, seed):
    draws = Fraction(share).over(Numbers(length))
    assert draws.size == max(1, round(share * length))
    cycle = -(-length // draws.size)
    epochs = [draws.rows(seed, epoch) for epoch in range(2 * cycle)]
    assert all(len(set(rows.tolist())) == len(rows) == draws.size for rows in epochs)
    for first in (0, cycle):
        times = np.bincount(np.concatenate(epochs[first : first + cycle]), minlength=length)
        assert times.min() == 1 and times.max() <= 2
        seen = np.bincount(np.concatenate(epochs[first : first + cycle - 1] or [epochs[0][:0]]), minlength=length)
        assert seen.max(initial=0) <= 1


def test_a_fraction_makes_the_epoch_shorter_and_goes_on_exactly():
    draws = Fraction(0.25).over(Numbers(80))
    whole = EpochSampler(80, 4, draws=draws, seed=2)
    assert len(whole) == 5
    ranks = [EpochSampler(80, 2, draws=draws, rank=r, world=2, seed=2, steps_done=lambda: 8) for r in (0, 1)]
    later = [a + b for a, b in zip(*ranks, strict=True)]
    assert later == list(EpochSampler(80, 4, draws=draws, seed=2, steps_done=lambda: 5))[3:]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(UserError, match=r"share is .* between 0 and 1"):
        Fraction(share)


# ---------------------------------------------------------------- by weights


def mixture(weights=None, **counts):
    return Mixture({name: Numbers(count, name) for name, count in counts.items()}, weights)


@given(
    counts=lists(integers(1, 40), min_size=2, max_size=4),
    weights=lists(floats(0.1, 9), min_size=4, max_size=4),
    length=integers(1, 200),
    epoch=integers(0, 5),
)
def test_weights_share_out_the_draws_exactly_and_a_parts_samples_alike(counts, weights, length, epoch):
    names = [f"p{n}" for n in range(len(counts))]
    mixed = Mixture(
        {n: Numbers(c, n) for n, c in zip(names, counts, strict=True)}, dict(zip(names, weights, strict=False))
    )
    draws = Weighted(length).over(mixed)
    times = np.bincount(draws.rows(1, epoch), minlength=len(mixed))
    assert times.sum() == length == draws.size
    exact = length * np.array(weights[: len(counts)]) / sum(weights[: len(counts)])
    for part in range(len(counts)):
        own = times[mixed.parts == part]
        assert abs(own.sum() - exact[part]) < 1 and own.max() - own.min() <= 1


def test_a_part_that_is_drawn_less_than_once_is_seen_whole_over_epochs():
    draws = Weighted(20).over(mixture({"a": 1, "b": 1}, a=30, b=5))
    seen = np.concatenate([draws.rows(0, epoch) for epoch in range(3)])
    assert np.bincount(seen, minlength=35)[:30].tolist() == [1] * 30
    assert (
        "a 10 of 30 samples (0.33 epochs, 20 left out); b 10 of 5 samples (2.00 epochs, each at most 2 times)"
        in str(draws)
    )


def test_a_mixture_without_weights_draws_every_sample_once():
    plain = draws_of(mixture(a=6, b=3), None)
    assert sorted(plain.rows(0, 0).tolist()) == list(range(9)) and not plain.repeats
    weighted = draws_of(mixture({"a": 1}, a=6, b=3), None)
    assert weighted.repeats and weighted.draws.tolist() == [5, 4], "an equal share of 9; the rest to the first"
    assert Fraction(0.5).over(mixture(a=6, b=4)).size == 5


def test_weights_hold_in_the_part_that_is_trained_on():
    mixed = mixture({"a": 3, "b": 1}, a=10, b=10)
    draws = draws_of(Subset(mixed, np.array([0, 1, 2, 15, 16])), None)
    assert np.bincount(draws.rows(0, 0) > 2).tolist() == [4, 1]
    with pytest.raises(UserError, match="nothing of b is left"):
        draws_of(Subset(mixed, np.array([0, 1])), None)


def test_largest_remainders_by_hand():
    """10 by 1 : 2 : 4 is 1.43, 2.86, 5.71: the two left over go to 2.86 and 5.71."""
    assert largest_remainder(10, np.array([1.0, 2, 4])).tolist() == [1, 3, 6]


def test_rules_and_data_that_do_not_fit_say_so():
    with pytest.raises(UserError, match="several parts, and the data is one"):
        Weighted().over(Numbers(5))
    for rule in (Fraction(0.5), Balanced("nowhere.npz")):
        with pytest.raises(UserError, match="would ignore the weights"):
            rule.over(mixture({"a": 2}, a=5, b=5))
    with pytest.raises(UserError, match=r"no file of clusters 'nowhere.npz'.*ssd curate"):
        Balanced("nowhere.npz").over(Numbers(5))
    for wrong in ({"length": 0}, {"max_repeats": 0}):
        with pytest.raises(UserError, match="1 or more"):
            Balanced("x", **wrong)


# ---------------------------------------------------------------- mixtures


def test_a_mixture_is_its_parts_end_to_end_with_the_union_of_their_classes():
    first = Numbers(3, "first", [0, 1, -1], ["cat", "dog"], groups=[0, 0, 1])
    second = Numbers(2, "second")
    third = Numbers(2, "third", [1, 0], ["ant", "cat"], groups=[1, -1])
    mixed = Mixture({"x": first, "y": second, "z": third})
    assert mixed.classes == ["ant", "cat", "dog"]
    assert mixed.labels.tolist() == [1, 2, -1, -1, -1, 1, 0] == [mixed.label(i) for i in range(7)]
    assert [mixed.describe(i) for i in (2, 3, 6)] == ["first 2", "second 0", "third 1"]
    assert mixed.open(4)[0, 0] == 1 and mixed.parts.tolist() == [0, 0, 0, 1, 1, 2, 2]
    groups = mixed.groups
    assert groups[0] == groups[1] and len({groups[0], groups[2], groups[5]}) == 3
    assert groups[3] == groups[4] == groups[6] == -1
    assert Mixture({"x": first, "y": third}).fingerprint() != Mixture({"x": third, "y": first}).fingerprint()
    with pytest.raises(UserError, match="names in x and are plain numbers in y"):
        Mixture({"x": first, "y": Numbers(2, labels=[0, 4])})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"a": "A"}, "names 1 part"),
        ({"a": "A", "b": {"weight": 2}}, "the part b"),
        ({"a": "A", "b": {"path": "B", "wieght": 2}}, "the part b"),
        ({"a": "A", "b": {"path": "B", "weight": 0}}, "weight of b in path is 0"),
        ({"a": "A", "b": {"path": "B", "weight": "much"}}, "weight of b"),
        ({"a": "A", "b": 3}, "the part b"),
    ],
)
def test_parts_that_are_none_are_named(path, message):
    with pytest.raises(UserError, match=message):
        check_parts(path)


# ---------------------------------------------------------------- balanced


@given(
    room=lists(integers(0, 30), min_size=1, max_size=12),
    owners=integers(1, 3),
    share=floats(0, 1),
    seed=integers(0, 5),
)
def test_shares_are_as_even_as_the_room_allows(room, owners, share, seed):
    """The plain form: one after the other to whoever has the least and still has room."""
    rng = np.random.default_rng(seed)
    room, owner = np.array(room), rng.integers(0, owners, len(room))
    totals = np.floor(share * np.bincount(owner, room, owners)).astype(np.int64)
    found = evenly(totals, owner, room, rng)
    assert (found <= room).all() and (np.bincount(owner, found, owners) == totals).all()
    for number, total in enumerate(totals.tolist()):
        own, plain = room[owner == number], np.zeros(np.count_nonzero(owner == number), int)
        for _ in range(total):
            plain[np.where(plain < own, plain, 10**6).argmin()] += 1
        assert sorted(found[owner == number].tolist()) == sorted(plain.tolist())


def test_the_rest_goes_to_other_clusters_in_other_epochs():
    got = sum(evenly(np.array([5]), np.zeros(4, int), np.full(4, 9), np.random.default_rng(s)) for s in range(400))
    assert np.abs(got - 500).max() < 60, "5 over 4: a quarter of the rest each, within four deviations"


def clustered(tmp_path, leaf, parents=(), source=None):
    leaf = np.asarray(leaf, np.int32)
    source = source or Numbers(len(leaf))
    count = int(leaf.max()) + 1
    clusters = Clusters(leaf, tuple(map(np.asarray, parents)), count)
    write_clusters(tmp_path / "c.npz", clusters, data="numbers", fingerprint=source.fingerprint())
    return str(tmp_path / "c.npz"), source


def test_every_cluster_has_its_share_and_no_sample_more_than_its_repeats(tmp_path):
    """60, 30, 9 and 1 samples: 25 draws each are too many for the last, whose 4 leave 32 to each of the others."""
    file, source = clustered(tmp_path, np.repeat([0, 1, 2, 3], [60, 30, 9, 1]))
    draws = Balanced(file, max_repeats=4).over(source)
    for epoch in range(3):
        times = np.bincount(draws.rows(0, epoch), minlength=100)
        per_cluster = [times[part].sum() for part in (slice(0, 60), slice(60, 90), slice(90, 99), slice(99, 100))]
        assert per_cluster == [32, 32, 32, 4] and times.max() == 4
        assert times[:60].max() == 1 and set(times[60:90]) == {1, 2} and set(times[90:99]) == {3, 4}
    assert np.array_equal(draws.rows(3, 7), draws.rows(3, 7)) and not np.array_equal(draws.rows(3, 7), draws.rows(3, 8))
    assert "28 left out (28.0%)" in str(draws) and "rarest cluster 4.00 times and the most common 0.53 times" in str(
        draws
    )


def test_levels_share_out_from_the_coarsest_down(tmp_path):
    """Two upper clusters, one of three lower ones and one of a single: half of the draws each."""
    file, source = clustered(tmp_path, np.repeat([0, 1, 2, 3], [25, 25, 25, 25]), [[0, 0, 0, 1]])
    shares = Balanced(file, length=60).over(source).per_cluster(0, 0)
    assert shares.tolist() == [10, 10, 10, 30]
    flat, _ = clustered(tmp_path, np.repeat([0, 1, 2, 3], [25, 25, 25, 25]))
    assert Balanced(flat, length=60).over(source).per_cluster(0, 0).tolist() == [15] * 4


def test_a_sample_without_a_cluster_is_never_drawn_and_that_is_said(tmp_path):
    file, source = clustered(tmp_path, [0, 0, -1, 1, 1, -1])
    draws = Balanced(file).over(source)
    assert set(np.concatenate([draws.rows(0, epoch) for epoch in range(5)]).tolist()) == {0, 1, 3, 4}
    assert "2 of them for want of a cluster" in str(draws)
    with pytest.raises(UserError, match="more than the 4 samples with a cluster give at max_repeats = 2"):
        Balanced(file, length=9, max_repeats=2).over(source)


def test_clusters_follow_the_part_that_is_trained_on_and_refuse_other_data(tmp_path):
    file, source = clustered(tmp_path, [0, 0, 0, 1, 1, 1])
    part = Subset(Subset(source, np.array([1, 2, 3, 5])), np.array([0, 2, 3]))
    assert ClusterFile.of(read_clusters(file), part).leaf.tolist() == [0, 1, 1]
    assert np.bincount(Balanced(file, length=4).over(part).rows(0, 0), minlength=3).tolist() == [2, 1, 1]
    with pytest.raises(
        UserError, match=r"numbers, 6 samples, fingerprint numbers 6.*others 0.*fingerprint others 6.*curate"
    ):
        Balanced(file).over(Subset(Numbers(6, "others"), np.arange(3)))
    np.save(tmp_path / "array.npy", np.zeros(3))
    damaged = bytearray(Path(file).read_bytes())
    damaged[damaged.index(b"leaf.npy") + 40] ^= 255
    for content in ((tmp_path / "array.npy").read_bytes(), bytes(damaged)):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(UserError, match="not a file of clusters"):
            read_clusters(tmp_path / "other.npz")
    (tmp_path / "words.npz").write_text("words")
    with pytest.raises(UserError, match="not a file of clusters"):
        read_clusters(tmp_path / "words.npz")


def test_hierarchical_k_means_finds_clusters_of_clusters():
    """Two far places, of two near places each, one of them with nine tenths of the points."""
    rng = np.random.default_rng(0)
    places = np.array([[0, 0], [0, 3], [50, 0], [50, 3]], np.float32)
    true = np.repeat([0, 1, 2, 3], [900, 30, 40, 30])
    points = places[true] + 0.1 * rng.standard_normal((1000, 2)).astype(np.float32)
    leaf, (parent,) = cluster(points, [4, 2], seed=0)
    assert len(set(zip(leaf.tolist(), true.tolist(), strict=True))) == 4
    assert len(set(zip(parent[leaf].tolist(), (true > 1).tolist(), strict=True))) == 2
    for wrong, said in (([2, 4], "that fall"), ([1], "at least 2"), ([], "none"), ([2000, 5], "more than the 1000")):
        with pytest.raises(UserError, match=said):
            cluster(points, wrong)


def test_gini_by_hand():
    assert gini(np.array([5, 5, 5])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert gini(np.array([1, 3])) == pytest.approx(0.25)


# ---------------------------------------------------------------- repeats


@given(order=lists(integers(0, 6), max_size=40))
def test_a_turn_counts_the_draws_before(order):
    assert turns(np.array(order, np.int64)).tolist() == [order[:place].count(one) for place, one in enumerate(order)]


def test_a_repeat_says_which_it_is_so_that_its_views_are_others():
    draws = Weighted(12).over(mixture({"a": 1, "b": 1}, a=2, b=6))
    places = [place for step in EpochSampler(8, 4, draws=draws, steps_done=lambda: 3) for place in step]
    assert len(set(places)) == len(places) == 12 and {place[0] for place in places} == {1}
    assert {place[2] for place in places if len(place) == 3 and place[1] < 2} == {1, 2}


def test_places_wrap_around_only_at_the_end_of_a_cycle():
    assert sorted(np.concatenate([fresh(7, 3, epoch, 0) for epoch in (0, 1)]).tolist()) != list(range(7))
    assert len(set(np.concatenate([fresh(7, 3, epoch, 0) for epoch in (0, 1, 2)]).tolist())) == 7
