"""Which samples an epoch draws, as settings: a share, balanced over clusters, or by the weights of a mixture.

Every rule is a pure function of (seed, epoch), so that an epoch is the same on any number of processes and after a
resume. Each says what it draws, what it leaves out and what it costs.
"""

import time
from dataclasses import dataclass

import numpy as np

from ssd.data.clusters import Clusters, read_clusters
from ssd.data.memory import SharedArray
from ssd.data.mixture import Mixture, parts_of
from ssd.data.randomness import generator
from ssd.data.sampler import Draws
from ssd.data.sources import Source
from ssd.errors import UserError

# keys that keep the draws of these rules apart from each other and from the order of an epoch
CYCLE, SHARED_OUT, WITHIN, SHUFFLED = -11, -12, -13, -14


class Sampling:
    """A rule as it is set; `over` makes the draws of some data from it."""

    def over(self, source: Source) -> Draws:
        """Raises UserError where the rule does not fit the data."""
        raise NotImplementedError(f"{type(self).__name__} must define over")


@dataclass(frozen=True)
class Fraction(Sampling):
    """A random share of the data each epoch, another one each time, until all of it was seen.

    Args:
        share: of the samples that an epoch draws, above 0 and below 1. An epoch is shorter by as much.
    """

    share: float

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(f"share is {self.share}. Give the share of the data that an epoch draws, between 0 and 1.")

    def over(self, source: Source) -> Draws:
        check_no_weights(source, "Fraction")
        return FractionDraws(len(source), max(1, round(self.share * len(source))))


@dataclass(frozen=True)
class Balanced(Sampling):
    """Draws that give every cluster of the data the same share, level by level, as far as its samples go.

    Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach", 2024, arXiv
    2405.15613, section 3.3. Departs: an epoch draws anew and may draw a sample of a small cluster several times, where
    the paper chooses one subset before training.

    Args:
        file: of clusters, which `ssd curate` wrote for this data.
        length: draws of an epoch; null = as many as there are samples.
        max_repeats: no sample is drawn more often than this in an epoch.
    """

    file: str
    length: int | None = None
    max_repeats: int = 4

    def __post_init__(self):
        check_length(self.length)
        if self.max_repeats < 1:
            raise UserError(f"max_repeats is {self.max_repeats}. Use 1 or more: how often an epoch may draw a sample.")

    def over(self, source: Source) -> Draws:
        check_no_weights(source, "Balanced")
        clusters = read_clusters(self.file).of(source)
        size = len(source) if self.length is None else self.length
        most = self.max_repeats * int(np.count_nonzero(clusters.leaf >= 0))
        if size > most:
            raise UserError(
                f"{size} draws of an epoch are more than the {most // self.max_repeats} samples with a cluster give at "
                f"max_repeats = {self.max_repeats}. Lower length or raise max_repeats."
            )
        return BalancedDraws(clusters, size, self.max_repeats)


@dataclass(frozen=True)
class Weighted(Sampling):
    """Draws from the parts of a mixture by their weights; what a mixture with weights does of itself.

    Args:
        length: draws of an epoch; null = as many as all parts have samples.
    """

    length: int | None = None

    def __post_init__(self):
        check_length(self.length)

    def over(self, source: Source) -> Draws:
        found = parts_of(source)
        if found is None:
            raise UserError(
                "Weighted draws by the weights of several parts, and the data is one. Name parts in path, for instance "
                "{photos: {path: A, weight: 2}, scans: B}, or leave sampling out."
            )
        mixture, parts = found
        return WeightedDraws(mixture, parts, len(source) if self.length is None else self.length)


def draws_of(source: Source, sampling: Sampling | None) -> Draws:
    """By a rule, or where none is set by the weights of a mixture that has some, or else every sample once."""
    if sampling is not None:
        return sampling.over(source)
    found = parts_of(source)
    return Draws(len(source)) if found is None or not found[0].weighted else Weighted().over(source)


def check_length(length: int | None) -> None:
    if length is not None and length < 1:
        raise UserError(f"length is {length}. Give the number of draws of an epoch, 1 or more.")


def check_no_weights(source: Source, rule: str) -> None:
    found = parts_of(source)
    if found is not None and found[0].weighted:
        raise UserError(f"{rule} would ignore the weights in path. Leave the weights out, or use Weighted.")


class FractionDraws(Draws):
    """`size` samples an epoch, none twice, and none again before all others were drawn."""

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        rows = fresh(self.length, self.size, epoch, seed)
        return rows[generator(seed, epoch, SHUFFLED).permutation(len(rows))]

    def __str__(self) -> str:
        epochs = -(-self.length // self.size)
        return (
            f"Fraction: {self.size:,} of {self.length:,} samples an epoch, {self.length - self.size:,} left out "
            f"({1 - self.size / self.length:.1%}), others each time: all are seen in {epochs} epochs"
        )


class WeightedDraws(Draws):
    """Each part's share of the draws, exact; a part's samples are drawn equally often, up to one time."""

    repeats = True

    def __init__(self, mixture: Mixture, parts: np.ndarray, size: int):
        """`parts` (N,): the part that each sample belongs to."""
        super().__init__(len(parts), size)
        self.names = mixture.names
        self._rows = SharedArray.of(np.argsort(parts, kind="stable"))
        self.samples = np.bincount(parts, minlength=len(mixture.names))
        empty = [name for name, samples in zip(self.names, self.samples, strict=True) if not samples]
        if empty:
            raise UserError(f"nothing of {', '.join(empty)} is left to train on. Raise limit or give it more samples.")
        self.draws = largest_remainder(size, np.array(mixture.weights))

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        ends = np.cumsum(self.samples)
        drawn = []
        for part, (samples, draws) in enumerate(zip(self.samples.tolist(), self.draws.tolist(), strict=True)):
            own = self._rows.array[ends[part] - samples : ends[part]]
            whole, rest = divmod(draws, samples)
            drawn += [np.tile(own, whole), own[fresh(samples, rest, epoch, seed, part)]]
        rows = np.concatenate(drawn)
        return rows[generator(seed, epoch, SHUFFLED).permutation(len(rows))]

    def __str__(self) -> str:
        told = [
            f"{name} {draws:,} of {samples:,} samples ({draws / samples:.2f} epochs, "
            + (f"{samples - draws:,} left out)" if draws < samples else f"each at most {-(-draws // samples)} times)")
            for name, samples, draws in zip(self.names, self.samples.tolist(), self.draws.tolist(), strict=True)
        ]
        return f"Weighted: {self.size:,} draws an epoch: {'; '.join(told)}"


class BalancedDraws(Draws):
    """Draws shared out over clusters from the coarsest level down, as evenly as their samples allow."""

    repeats = True

    def __init__(self, clusters: Clusters, size: int, max_repeats: int):
        super().__init__(len(clusters.leaf), size)
        self.max_repeats = max_repeats
        self.levels = len(clusters.parents) + 1
        order = np.argsort(clusters.leaf, kind="stable")
        self._rows = SharedArray.of(order[np.count_nonzero(clusters.leaf < 0) :])
        self._leaf = SharedArray.of(clusters.leaf[self._rows.array])
        self.samples = clusters.sizes()
        self.parents = clusters.parents

    def per_cluster(self, seed: int, epoch: int) -> np.ndarray:
        """Draws of each of the finest clusters in an epoch. (K,) int64, their sum is `size`"""
        rng = generator(seed, epoch, SHARED_OUT)
        room = [self.samples * self.max_repeats]
        for parent in self.parents:
            room.append(np.rint(np.bincount(parent, room[-1])).astype(np.int64))
        shares = evenly(np.array([self.size]), np.zeros(len(room[-1]), np.int64), room[-1], rng)
        for parent, own in zip(reversed(self.parents), reversed(room[:-1]), strict=True):
            shares = evenly(shares, parent, own, rng)
        return shares

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        shares = self.per_cluster(seed, epoch)
        rng = generator(seed, epoch, WITHIN)
        mixed = rng.permutation(len(self._rows.array))
        mixed = mixed[np.argsort(self._leaf.array[mixed], kind="stable")]  # random inside each cluster
        samples = self.samples.astype(np.int64)
        place = np.arange(len(mixed)) - np.repeat(np.cumsum(samples) - samples, samples)
        whole, rest = np.divmod(shares, np.maximum(samples, 1))
        times = np.repeat(whole, samples) + (place < np.repeat(rest, samples))
        return rng.permutation(np.repeat(self._rows.array[mixed], times))

    def __str__(self) -> str:
        order, shares = self.order(0, 0), self.per_cluster(0, 0)
        times = np.bincount(order, minlength=self.length)
        present = self.samples > 0
        epochs = shares[present] / self.samples[present]
        without = self.length - len(self._rows.array)
        return (
            f"Balanced: {self.size:,} draws an epoch over {np.count_nonzero(present):,} clusters on {self.levels} levels: "
            f"{np.count_nonzero(times):,} of {self.length:,} samples, {np.count_nonzero(times == 0):,} left out "
            f"({np.mean(times == 0):.1%}"
            + (f", {without:,} of them for want of a cluster" if without else "")
            + f"), {times[times > 0].mean():.2f} times each on average, at most {times.max()}; an epoch sees the rarest "
            f"cluster {epochs[np.argmin(self.samples[present])]:.2f} times and the most common "
            f"{epochs[np.argmax(self.samples[present])]:.2f} times"
        )


def order_cost(draws: Draws, seed: int) -> str:
    """What making the order of an epoch takes here, measured once."""
    start = time.perf_counter()
    draws.rows(seed, 0)
    return f"the order of an epoch takes {time.perf_counter() - start:.2g} s"


def fresh(length: int, count: int, epoch: int, *place: int) -> np.ndarray:
    """`count` of `length` places, none twice; in epochs that follow each other none again before all had their turn.

    Every ceil(length / count) epochs go once through one permutation; the last of them is filled up from its start.
    """
    if not count:
        return np.zeros(0, np.int64)
    cycle, turn = divmod(epoch, -(-length // count))
    order = generator(*place, cycle, CYCLE).permutation(length)
    return np.take(order, np.arange(turn * count, (turn + 1) * count), mode="wrap")


def largest_remainder(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` shared out by weights (K,) in whole numbers, none further than 1 from its exact share. (K,) int64"""
    exact = total * weights / weights.sum()
    shares = np.floor(exact).astype(np.int64)
    most = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
    shares[most] += 1
    return shares


def evenly(totals: np.ndarray, owner: np.ndarray, room: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each of the totals (P,) shared out among the children that it owns, as evenly as their room allows.

    Child k of `owner[k]` gets min(room[k], level) with one level for all children of an owner, and one more for as
    many of those with room as the rest says, chosen at random. `totals` are at most the sum of the children's room.
    owner (K,), room (K,) -> (K,) int64
    """
    order = np.lexsort((room, owner))
    sorted_room, sorted_owner = room[order], owner[order]
    count = np.bincount(owner, minlength=len(totals))
    first = np.cumsum(count) - count
    before = np.cumsum(sorted_room) - sorted_room
    filled = before - before[np.minimum(first[sorted_owner], len(room) - 1)]  # room of the smaller siblings
    left = (first + count)[sorted_owner] - np.arange(len(room))  # siblings from here on, this one among them
    # the first child, in order of room, that can take more than its even share of what the smaller ones leave
    is_full = sorted_room * left + filled <= totals[sorted_owner]
    shares = np.where(is_full, sorted_room, 0)
    full = np.bincount(sorted_owner, is_full, len(totals)).astype(np.int64)
    open_left = np.maximum(count - full, 1)
    rest = totals - np.bincount(sorted_owner, shares, len(totals)).astype(np.int64)
    level, more = np.divmod(rest, open_left)
    shares = np.where(is_full, shares, level[sorted_owner])
    # every child that is not full has room for one more than the level: chance says which get the rest
    by_chance = np.lexsort((rng.random(len(room)), is_full, sorted_owner))
    place = np.arange(len(room)) - first[sorted_owner[by_chance]]
    shares[by_chance] += (place < more[sorted_owner[by_chance]]) & ~is_full[by_chance]
    found = np.empty(len(room), np.int64)
    found[order] = shares
    return found
