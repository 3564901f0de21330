"""Labels pixel by pixel: a folder of PNG maps beside a folder of pictures, of the same names."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssd.data.inherited import inherited
from ssd.data.pictures import EXIF_ORIENTATION
from ssd.data.sources import Source
from ssd.errors import UserError

IGNORED = 255
"""The label of pixels that count for nothing."""


class LabelMaps:
    """The map of each picture of a source, by the picture's number.

    A picture `a/b.jpg` below its folder has the map `a/b.png` below `folder`, or below the folder in it that is called
    like the pictures' own (`train`, `val`). Maps have 8 bits: palette or grey, the number of a pixel's class in each, 255
    where it has none. Raises UserError where a picture has no map, or pictures are not files in a folder.
    """

    def __init__(self, folder: str | Path, source: Source):
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder of label maps '{folder}'. Give a folder of PNG files.")
        paths = inherited(source, paths_below)
        if paths is None:
            raise UserError(
                f"label maps belong to pictures in a folder, by their names, and {source.describe(0)} is none. "
                "Give --data a folder of pictures."
            )
        self.source = source
        self.files = [map_file(str(folder), path) for path in paths.tolist()]
        missing = [path for path, file in zip(paths.tolist(), self.files, strict=True) if file is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(paths)} pictures have no label map in '{folder}', for instance "
                f"{missing[0][1]}, for which {Path(missing[0][1]).with_suffix('.png')} is expected."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W) uint8, of the size of the picture. Raises UserError for a file that is no such map."""
        labels = read_map(str(self.files[index]))
        expected = picture_size(self.source.open(index))
        if labels.shape != expected:
            raise UserError(
                f"the label map '{self.files[index]}' is {labels.shape[1]} x {labels.shape[0]} px, and its picture "
                f"'{self.source.describe(index)}' {expected[1]} x {expected[0]}. A map has a pixel for each of the picture's."
            )
        return labels


def paths_below(source: Any) -> np.ndarray | None:
    """Name of the source's folder and path below it of each sample, (N,) objects; None for a source of another kind."""
    if not hasattr(source, "path_within"):
        return None
    paths = np.empty(len(source), dtype=object)
    name = os.path.basename(os.path.abspath(source.root))
    paths[:] = [(name, source.path_within(index)) for index in range(len(source))]
    return paths


def map_file(folder: str, path: tuple[str, str]) -> str | None:
    """Where the map of a picture lies, None where there is none."""
    parent, name = path
    name = os.path.splitext(name)[0] + ".png"
    places = (os.path.join(folder, name), os.path.join(folder, parent, name))
    return next((place for place in places if os.path.isfile(place)), None)


def read_map(file: str) -> np.ndarray:
    """(H, W) uint8 labels. Raises UserError for anything but a picture of 8 bits with one number a pixel."""
    try:
        with Image.open(file) as image:
            mode, labels = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the label map '{file}' cannot be read ({error}). Write it again as PNG.") from None
    if mode not in ("1", "L", "P"):
        raise UserError(
            f"the label map '{file}' has mode {mode}. Labels are one number a pixel: PNG with a palette or grey, 8 bits."
        )
    return labels.astype(np.uint8)


def picture_size(data: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of a picture as it is meant, from the head of its file."""
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
        return image.size if turned else (image.height, image.width)
