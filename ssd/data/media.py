"""Files of clips and sounds: opened one by one, with labels and held-out part from names where asked for."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssd.data.clips import VIDEO_SUFFIXES
from ssd.data.folder import LIST_SUFFIXES, SUFFIXES, FolderSource, classes_of_list, picture_files, read_list
from ssd.data.manifest import has_header, read_manifest
from ssd.data.memory import SharedArray
from ssd.data.sound import SOUND_SUFFIXES
from ssd.errors import UserError

LOOKED_AT = 1000  # files of a folder that tell what it holds


class MediaFiles(FolderSource):
    """Clip or sound files of a folder or list. `open` gives the open file, because a long one is read in parts.

    Args:
        label_pattern: regular expression with a group `label`, looked for in each path below the folder; what the group
            finds is the class. None = labels as in `FolderSource`.
    """

    def __init__(
        self,
        path: str | Path,
        labels: bool | str = "auto",
        *,
        suffixes: tuple[str, ...],
        word: str,
        label_pattern: str | None = None,
    ):
        super().__init__(path, labels if label_pattern is None else False, suffixes=suffixes, word=word)
        if label_pattern is not None:
            found, self.classes = classes_of_list(self.found("label_pattern", label_pattern, "label"))
            self._labels = None if found is None else SharedArray.of(found)

    def open(self, index: int) -> Any:
        return open(self.describe(index), "rb")

    def names(self) -> list[str]:
        """Paths below the folder, with / between folders."""
        return [self.path_within(index).replace(os.sep, "/") for index in range(len(self))]

    def found(self, setting: str, pattern: str, group: str) -> Sequence[str]:
        """What the group finds in each path. Raises UserError for a path in which it finds nothing."""
        expression = compiled(setting, pattern, group)
        matches = [expression.search(name) for name in self.names()]
        missing = [name for name, match in zip(self.names(), matches, strict=True) if not match or not match[group]]
        if missing:
            raise UserError(
                f"{setting} {pattern!r} finds nothing in '{missing[0]}' ({len(missing)} of {len(self)} paths). It is looked "
                f"for in paths relative to '{self.root}'."
            )
        return [match[group] for match in matches if match]

    def matching(self, setting: str, pattern: str) -> np.ndarray:
        """(N,) bool: paths in which the pattern is found. Raises UserError where it is found in none or all."""
        expression = compiled(setting, pattern)
        flags = np.array([expression.search(name) is not None for name in self.names()])
        if flags.all() or not flags.any():
            raise UserError(
                f"{setting} {pattern!r} is found in {flags.sum()} of {len(self)} paths, for instance '{self.names()[0]}'. It "
                "names those that are held out: some, not all."
            )
        return flags


def compiled(setting: str, pattern: str, group: str | None = None) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{setting} {pattern!r} is no regular expression: {error}.") from None
    if group is not None and group not in expression.groupindex:
        raise UserError(f"{setting} {pattern!r} has no group '{group}'. Write (?P<{group}>...) around it.")
    return expression


def kind_of(path: str) -> str:
    """The datamodule for a path that exists: "Clips" or "Sound" where most of its files are such, else "Images"."""
    if os.path.isdir(path):
        below = picture_files(path, (*SUFFIXES, *VIDEO_SUFFIXES, *SOUND_SUFFIXES))
        names = [name for name, _ in zip(below, range(LOOKED_AT))]
    elif path.lower().endswith(LIST_SUFFIXES):
        listed = Path(path)
        known = (*SUFFIXES, *VIDEO_SUFFIXES, *SOUND_SUFFIXES)
        names = (read_manifest(listed).names if has_header(listed) else read_list(listed, known)[0])[:LOOKED_AT]
    else:
        names = []
    counts = {
        kind: sum(name.lower().endswith(suffixes) for name in names)
        for kind, suffixes in (("Images", SUFFIXES), ("Clips", VIDEO_SUFFIXES), ("Sound", SOUND_SUFFIXES))
    }
    return max(counts, key=lambda kind: counts[kind])
