"""Pictures in files: a folder, a list of files, Parquet, tar shards, NumPy stacks; and other libraries' data sets."""

import os
from pathlib import Path
from typing import Any

from datamodules.base import PictureData
from ssd.data.sources import Source, open_source

HELD_OUT_NAMES = ("val", "valid", "validation", "test")


class Images(PictureData):
    """Pictures under one path, whose kind is recognised from what it is.

    A folder that holds `train` and one of `val`, `valid`, `validation` or `test` is read as both parts.

    Args:
        path: folder of pictures at any depth, text file with one path (and label) a line, Parquet or tar file, folder
            of these, a pattern such as data/train-*.parquet or data/train-{000..099}.tar, a NumPy stack (.npy, .npz),
            torchvision:NAME:FOLDER or hf:NAME.
        val_path: held-out labelled pictures, of any of these kinds; null = a part of `path` where it has labels.
        labels: whether the folders right below `path` are classes: true, false, or "auto" = when all
            pictures lie exactly one folder down, in two folders or more.
    """

    def __init__(
        self,
        path: str | Path,
        val_path: str | Path | None = None,
        *,
        labels: bool | str = "auto",
        **loading: Any,
    ):
        super().__init__(**loading)
        self.path, self.val_path = part_folders(str(path)) if val_path is None else (str(path), str(val_path))
        self.labels = labels

    def sources(self) -> tuple[Source, Source | None]:
        separate = None if self.val_path is None else open_source(self.val_path, self.labels)
        return open_source(self.path, self.labels), separate


def part_folders(path: str) -> tuple[str, str | None]:
    """Training and held-out folder inside `path`, or `path` itself and None."""
    training = os.path.join(path, "train")
    if os.path.isdir(training):
        for name in HELD_OUT_NAMES:
            if os.path.isdir(os.path.join(path, name)):
                return training, os.path.join(path, name)
    return path, None
