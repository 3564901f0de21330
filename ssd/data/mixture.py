"""Several sources as one, drawn from by weights."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssd.data.inherited import groups_of, inherited
from ssd.data.memory import SharedArray
from ssd.data.sources import Source
from ssd.errors import UserError

KEYS = ("path", "weight")


class Mixture:
    """Sources end to end.

    Classes are the union of their names, sorted; a sample of a part without labels has the label -1. Parts whose
    labels are plain numbers keep them. Groups of different parts are different. Raises UserError where some parts
    have names and others numbers for labels.

    Args:
        sources: name of each part -> its source.
        weights: name -> share of the draws, relative to the others; None = every sample once. A part that is not
            named has weight 1.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None):
        self.names = list(sources)
        self.sources = list(sources.values())
        self.weighted = bool(weights)
        self.weights = [float((weights or {}).get(name, 1.0)) for name in self.names]
        self._ends = np.cumsum([len(source) for source in self.sources], dtype=np.int64)
        self.classes, labels = joined_labels(self.sources, self.names)
        self._labels = None if labels is None else SharedArray.of(labels)
        groups = joined_groups(self.sources)
        self._groups = None if groups is None else SharedArray.of(groups)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    @property
    def groups(self) -> np.ndarray | None:
        return None if self._groups is None else self._groups.array

    @property
    def parts(self) -> np.ndarray:
        """The number of each sample's part. (N,) int64"""
        return np.repeat(np.arange(len(self.sources)), [len(source) for source in self.sources])

    def _place(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[part], index - (int(self._ends[part - 1]) if part else 0)

    def open(self, index: int) -> bytes | np.ndarray:
        source, place = self._place(index)
        return source.open(place)

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        source, place = self._place(index)
        return source.describe(place)

    def fingerprint(self) -> str:
        """Of the parts in their order. Names and weights do not count: they change no sample."""
        return hashlib.sha256("".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


def parts_of(source: Source) -> tuple[Mixture, np.ndarray] | None:
    """The mixture behind a source and the part of each of the source's samples, None where there is none."""
    behind: Any = source
    while behind is not None and not isinstance(behind, Mixture):
        behind = getattr(behind, "source", None)
    if behind is None:
        return None
    parts = inherited(source, lambda one: one.parts if isinstance(one, Mixture) else None)
    assert parts is not None
    return behind, parts


def check_parts(path: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, float] | None]:
    """Name -> path, and name -> weight where any part has one, of a setting such as {photos: {path: A, weight: 2},
    scans: B}. Raises UserError for other settings."""
    paths: dict[str, str] = {}
    weights: dict[str, float] = {}
    for name, given in path.items():
        part = dict(given) if isinstance(given, Mapping) else {"path": given}
        if not part.get("path") or not isinstance(part["path"], str) or not set(part) <= set(KEYS):
            raise UserError(
                f"path has the part {name}: {given!r}. Give each part a path, or a path and a weight, for instance "
                "{photos: {path: A, weight: 2}, scans: B}."
            )
        paths[str(name)] = part["path"]
        if "weight" in part:
            weight = part["weight"]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise UserError(f"the weight of {name} in path is {weight!r}. Give a number above 0.")
            weights[str(name)] = float(weight)
    if len(paths) < 2:
        raise UserError(f"path names {len(paths)} part. Give two or more, or the path itself.")
    return paths, weights or None


def joined_labels(sources: list[Source], names: list[str]) -> tuple[list[str] | None, np.ndarray | None]:
    labelled = [source.labels is not None for source in sources]
    if not any(labelled):
        return None, None
    named = [name for name, source in zip(names, sources, strict=True) if source.classes is not None]
    numbered = [n for n, source, has in zip(names, sources, labelled, strict=True) if has and source.classes is None]
    if named and numbered:
        raise UserError(
            f"classes have names in {', '.join(named)} and are plain numbers in {', '.join(numbered)}, so they cannot be "
            "told to be the same. Give all parts names, or use labels: false."
        )
    classes = sorted({name for source in sources for name in source.classes or ()}) if named else None
    place = {name: number for number, name in enumerate(classes or ())}
    labels = []
    for source in sources:
        own = source.labels
        if own is None:
            own = np.full(len(source), -1, np.int64)
        elif classes is not None and source.classes is not None:
            own = np.array([*(place[name] for name in source.classes), -1])[own]
        labels.append(own)
    return classes, np.concatenate(labels)


def joined_groups(sources: list[Source]) -> np.ndarray | None:
    found = [groups_of(source) for source in sources]
    if all(groups is None for groups in found):
        return None
    joined, used = [], 0
    for source, groups in zip(sources, found, strict=True):
        if groups is None:
            groups = np.full(len(source), -1, np.int64)
        joined.append(np.where(groups < 0, -1, groups + used))
        used += int(groups.max()) + 1 if len(groups) else 0
    return np.concatenate(joined)
