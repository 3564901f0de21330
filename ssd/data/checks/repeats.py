"""Which pictures occur more than once, within a part of the data and in several."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ssd.data.checks.examine import Examined
from ssd.data.checks.hashes import alike_pictures, same_pictures


@dataclass(frozen=True)
class Repeats:
    """Which pictures of several parts are the same or look the same. Blank and broken ones are in no group.

    Args:
        same, alike: part -> (N,) number of each picture's group over all parts, -1 for none; groups of `same` lie
            within those of `alike`.
    """

    same: dict[str, np.ndarray]
    alike: dict[str, np.ndarray]


def repeats(parts: Mapping[str, Examined]) -> Repeats:
    shows = {name: seen.records["readable"] & ~seen.records["blank"] for name, seen in parts.items()}
    kept = [seen.records[shows[name]] for name, seen in parts.items()]
    pixels, seen_as = (np.concatenate([records[column] for records in kept]) for column in ("pixels", "seen"))
    same = same_pictures(pixels)
    # one of each group of equal pictures stands for all
    first = np.unique(same, return_index=True)[1]
    thumbnails = np.concatenate([records["thumbnail"] for records in kept])
    alike = alike_pictures(seen_as[first], thumbnails[first])[same]
    ends = np.cumsum([len(records) for records in kept])[:-1]

    def spread(groups: np.ndarray) -> dict[str, np.ndarray]:
        placed = {}
        for (name, mask), part in zip(shows.items(), np.split(groups, ends)):
            placed[name] = np.full(len(mask), -1, np.int64)
            placed[name][mask] = part
        return placed

    return Repeats(spread(same), spread(alike))


def repeated(groups: np.ndarray) -> np.ndarray:
    """(N,) groups -> numbers of all pictures but the first of each group, in order."""
    shown = np.flatnonzero(groups >= 0)
    first = shown[np.unique(groups[shown], return_index=True)[1]]
    return np.setdiff1d(shown, first)


def shared(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Numbers of pictures whose group occurs among the others too."""
    return np.flatnonzero((groups >= 0) & np.isin(groups, others))
