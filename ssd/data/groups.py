"""Samples that belong together (of one patient, place or recording): who they are, and splits that keep them whole."""

import os
import re
from typing import Any

import numpy as np

from ssd.data.inherited import groups_of
from ssd.data.manifest import numbered
from ssd.data.memory import SharedArray
from ssd.data.randomness import generator
from ssd.data.sources import HELD_OUT, Source, held_out
from ssd.errors import UserError


class Grouped:
    """A source whose samples are put in groups by where they lie.

    Args:
        source: what is grouped.
        by: a number: the first so many folders of a path, below the folder that was given, name the group. A text: a
            regular expression that is searched for in that path; its parentheses, or else all that fits, name the
            group. A sample that it does not fit stands alone.
    """

    def __init__(self, source: Source, by: int | str):
        self.source = source
        self.classes = source.classes
        self._groups = SharedArray.of(numbered(group_names(source, by)))

    @property
    def groups(self) -> np.ndarray:
        return self._groups.array

    @property
    def labels(self) -> np.ndarray | None:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def open(self, index: int) -> bytes | np.ndarray:
        return self.source.open(index)

    def label(self, index: int) -> int:
        return self.source.label(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def check_group_by(by: Any) -> None:
    """Raises UserError for what is neither a depth nor a regular expression."""
    if isinstance(by, bool) or not isinstance(by, int | str) or (isinstance(by, int) and by < 1) or by == "":
        raise UserError(
            f"group_by is {by!r}. Give a number of folders, 1 or more, or a regular expression such as 'patient(\\d+)'."
        )
    if isinstance(by, str):
        try:
            re.compile(by)
        except re.error as error:
            raise UserError(f"group_by is {by!r}, which is not a regular expression: {error}.") from None


def group_names(source: Source, by: int | str) -> list[str | None]:
    """What names each sample's group. Raises UserError where nothing, or everything, would be one group."""
    within: Any = source
    while not hasattr(within, "path_within") and hasattr(within, "source"):
        within = within.source
    if isinstance(by, int):
        if not hasattr(within, "path_within"):
            raise UserError(
                f"group_by: {by} counts folders, and {source.describe(0)} lies in none. Give a regular expression."
            )
        split = [os.path.dirname(within.path_within(index)).split(os.sep) for index in range(len(source))]
        names: list[str | None] = [
            os.sep.join(folders[:by]) if len(folders) >= by and folders[0] else None for folders in split
        ]
    else:
        pattern = re.compile(by)
        told = getattr(within, "path_within", source.describe)
        found = [pattern.search(told(index)) for index in range(len(source))]
        names = [None if hit is None else "\0".join(map(str, hit.groups() or (hit[0],))) for hit in found]
    different = set(names) - {None}
    if not different or (len(different) == 1 and None not in names):
        example = getattr(within, "path_within", source.describe)(0)
        what = "fits none" if not different else "puts all"
        raise UserError(
            f"group_by: {by!r} {what} of the {len(source)} samples"
            f"{' in one group' if different else ''}; the first is '{example}'."
        )
    return names


def split(source: Source, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, both sorted, with every group on one side; the same in every run.

    `share` is one of the samples with labels, where some have none. Without groups the rows held out are those of
    `held_out`. With groups, whole groups are taken in a fixed order of chance, each where that brings the number held
    out of every class nearer to `share`; in data without labels the miss is at most half of the smallest group that is
    left. Raises UserError where one group holds everything, or all that has a label.
    """
    labels, groups = source.labels, groups_of(source)
    every = np.arange(len(source))
    counted = every if labels is None or not (labels >= 0).any() else np.flatnonzero(labels >= 0)
    if groups is None:
        _, held = held_out(len(counted), share)
        return np.delete(every, counted[held]), counted[held]
    groups = groups.copy()
    alone = groups < 0
    groups[alone] = groups.max() + 1 + np.arange(np.count_nonzero(alone))
    _, groups = np.unique(groups, return_inverse=True)
    if len(np.unique(groups[counted])) == 1:
        which = "" if len(counted) == len(every) else " with a label"
        raise UserError(
            f"all {len(counted)} samples{which} are of one group, which cannot be divided. Give other samples as val_path, "
            "or val_share: 0."
        )
    classes = np.zeros(len(counted), np.int64) if labels is None else labels[counted]
    held_ones = held_groups(groups[counted], int(groups.max()) + 1, classes, share)[groups]
    return every[~held_ones], every[held_ones]


def held_groups(groups: np.ndarray, count: int, classes: np.ndarray, share: float) -> np.ndarray:
    """Which of `count` groups are held out, from the group and the class (N,) of each sample that counts. (count,) bool

    At least one with such samples is, and one with such samples is not.
    """
    width = int(classes.max(initial=0)) + 1
    pairs, samples = np.unique(groups * width + np.maximum(classes, 0), return_counts=True)
    of_class = pairs % width
    starts = np.searchsorted(pairs // width, np.arange(count + 1))
    lacking = share * np.bincount(of_class, samples, width)  # (C,) samples still to hold out
    held = np.zeros(count, bool)
    chance = generator(HELD_OUT).permutation(count)
    for group in chance.tolist():
        part = slice(starts[group], starts[group + 1])
        own, number = of_class[part], samples[part]
        # nearer in the sum of squares over classes
        if (number * (2 * lacking[own] - number)).sum() > 0:
            held[group] = True
            lacking[own] -= number
    sizes = np.bincount(groups, minlength=count)
    counting = chance[sizes[chance] > 0]
    smallest = counting[np.argmin(sizes[counting])]
    if not held.any():
        held[smallest] = True
    if held[counting].all():
        held[smallest] = False
    return held
