"""Data in files that are opened one by one: clips and sounds."""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import SampleData
from datamodules.images import part_folders
from ssd.data.groups import Grouped, check_group_by
from ssd.data.media import MediaFiles
from ssd.data.sources import Source
from ssd.errors import UserError


class FileData(SampleData):
    """Files under one path.

    A folder that holds `train` and one of `val`, `valid`, `validation` or `test` is read as both parts.

    Args:
        path: folder of files at any depth, or a text file with one path (and label) a line.
        val_path: held-out labelled files, either kind; null = a part of `path`.
        labels: whether the folders right below `path` are classes: true, false, or "auto" = when all files lie exactly
            one folder down, in two folders or more.
        label_pattern: regular expression with a group `label` that finds the class in a path below `path`, for
            instance '(?P<label>[0-9])_[a-z]+_[0-9]+[.]wav'; in place of `labels`.
        held_out_pattern: regular expression; files in whose path it is found are held out, in place of a fixed share.
        group_by: which samples must not be divided between training and held-out: a number of folders below `path`, or
            a regular expression for the path, whose parentheses name the group, for instance a speaker; null = what a
            manifest says.
    """

    suffixes: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | Path,
        val_path: str | Path | None = None,
        *,
        labels: bool | str = "auto",
        label_pattern: str | None = None,
        held_out_pattern: str | None = None,
        group_by: int | str | None = None,
        **loading: Any,
    ):
        super().__init__(**loading)
        if group_by is not None:
            check_group_by(group_by)
        self.path, self.val_path = part_folders(str(path)) if val_path is None else (str(path), str(val_path))
        if held_out_pattern is not None and self.val_path is not None:
            raise UserError(
                f"held_out_pattern is {held_out_pattern!r} and val_path is '{self.val_path}': both say what is held out. "
                "Leave one of them out; where path holds train and a held-out folder, give the path of train."
            )
        self.labels = labels
        self.label_pattern = label_pattern
        self.held_out_pattern = held_out_pattern
        self.group_by = group_by

    def sources(self) -> tuple[Source, Source | None]:
        files: Source = self._files(self.path)
        if self.group_by is not None:
            files = Grouped(files, self.group_by)
        return files, None if self.val_path is None else self._files(self.val_path)

    def _files(self, path: str) -> MediaFiles:
        return MediaFiles(
            path, self.labels, suffixes=self.suffixes, word=self.sample_word, label_pattern=self.label_pattern
        )

    def division(self, everything: Source) -> tuple[np.ndarray, np.ndarray] | None:
        if self.held_out_pattern is None:
            return super().division(everything)
        files = everything.source if isinstance(everything, Grouped) else everything
        assert isinstance(files, MediaFiles), "as `sources` gives them"
        flags = files.matching("held_out_pattern", self.held_out_pattern)
        return np.flatnonzero(~flags), np.flatnonzero(flags)
