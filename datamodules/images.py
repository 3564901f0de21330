"""Pictures in files: a folder, a list of files, Parquet, tar shards, NumPy stacks; and other libraries' data sets."""

import os
from pathlib import Path
from typing import Any

from datamodules.pictures import PictureData
from ssd.data.groups import Grouped, check_group_by
from ssd.data.mixture import Mixture, check_parts
from ssd.data.sources import Source, open_source

HELD_OUT_NAMES = ("val", "valid", "validation", "test")


class Images(PictureData):
    """Pictures under one path, whose kind is recognised from what it is.

    A folder that holds `train` and one of `val`, `valid`, `validation` or `test` is read as both parts.

    Args:
        path: folder of pictures at any depth, text file with one path (and label) a line, Parquet or tar file, folder
            of these, a pattern such as data/train-*.parquet or data/train-{000..099}.tar, a NumPy stack (.npy, .npz),
            torchvision:NAME:FOLDER or hf:NAME; or several of these by name, {photos: {path: A, weight: 2}, scans: B}, which
            are read as one. Weights share out the draws of an epoch; without any, every sample is drawn once.
        val_path: held-out labelled pictures, of any of these kinds; null = a part of `path` where it has labels.
        labels: whether the folders right below `path` are classes: true, false, or "auto" = when all
            pictures lie exactly one folder down, in two folders or more.
        group_by: which samples must not be divided between training and held-out: a number of folders below `path`, or
            a regular expression for the path, whose parentheses name the group; null = what a manifest says.
    """

    def __init__(
        self,
        path: dict[str, Any] | str | Path,
        val_path: str | Path | None = None,
        *,
        labels: bool | str = "auto",
        group_by: int | str | None = None,
        **loading: Any,
    ):
        super().__init__(**loading)
        if group_by is not None:
            check_group_by(group_by)
        self.path: str | dict[str, Any]
        self.val_path: str | None
        if isinstance(path, dict):
            check_parts(path)
            self.path, self.val_path = path, None if val_path is None else str(val_path)
        elif val_path is None:
            self.path, self.val_path = part_folders(str(path))
        else:
            self.path, self.val_path = str(path), str(val_path)
        self.labels = labels
        self.group_by = group_by

    def sources(self) -> tuple[Source, Source | None]:
        separate = None if self.val_path is None else open_source(self.val_path, self.labels)
        if isinstance(self.path, str):
            return self._opened(self.path), separate
        paths, weights = check_parts(self.path)
        folders = {name: part_folders(path) for name, path in paths.items()}
        training = Mixture({name: self._opened(path) for name, (path, _) in folders.items()}, weights)
        looks = {name: open_source(path, self.labels) for name, (_, path) in folders.items() if path is not None}
        return training, separate or (Mixture(looks) if looks else None)

    def _opened(self, path: str) -> Source:
        source = open_source(path, self.labels)
        return source if self.group_by is None else Grouped(source, self.group_by)


def part_folders(path: str) -> tuple[str, str | None]:
    """Training and held-out folder inside `path`, or `path` itself and None."""
    training = os.path.join(path, "train")
    if os.path.isdir(training):
        for name in HELD_OUT_NAMES:
            if os.path.isdir(os.path.join(path, name)):
                return training, os.path.join(path, name)
    return path, None
