"""Crops of a decoded picture: antialiased bicubic, straight from its bytes, 8 bits in and out.

The filter is Pillow's. Compiled code computes it where it can be had (`ssd.native`), else torch's 8-bit kernel on a
channels-last picture, so that a crop is a view of the picture and not a copy.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.native import views as native
from ssd.views.parameters import settings_of
from ssd.views.view import Views


def empty_views(views: Views, batch: int, channels: int) -> dict[str, Tensor]:
    """Room for the views of a batch: kind -> (V, B, C, size, size) uint8."""
    settings = settings_of(views)
    return {
        kind: torch.empty(where.stop - where.start, batch, channels, *[settings.sizes[kind]] * 2, dtype=torch.uint8)
        for kind, where in settings.kinds.items()
    }


def crop_views(image: np.ndarray, boxes: dict[str, np.ndarray], views: Views) -> dict[str, Tensor]:
    """Every view of one picture: cropped, resized, flipped.

    Image (H, W, C) uint8, boxes kind -> (V, 5) with the columns of `Box` inside that image
    -> kind -> (V, C, size, size) uint8.
    """
    sizes = settings_of(views).sizes
    out = {}
    for kind, table in boxes.items():
        out[kind] = torch.empty(len(table), image.shape[2], sizes[kind], sizes[kind], dtype=torch.uint8)
        crop_into(image, table, out[kind])
    return out


def crop_into(image: np.ndarray, boxes: np.ndarray, out: Tensor) -> None:
    """`boxes` (V, 5) of a picture (H, W, C) uint8, each into its place in `out` (V, C, size, size) uint8."""
    if native.available():
        native.crops(image, boxes, out)
        return
    source, size = channels_last(image), out.shape[-1]
    for (left, top, width, height, flip), place in zip(boxes.astype(int).tolist(), out, strict=True):
        picture = resize(source[:, :, top : top + height, left : left + width], size, size)[0]
        place.copy_(picture.flip(-1) if flip else picture)


def evaluation_picture(image: np.ndarray, size: int, crop: float) -> Tensor:
    """The centre of the picture after its short side is resized to size / crop, to the nearest pixel.

    Image (H, W, C) uint8, size in px, crop in (0, 1] -> (C, size, size) uint8. With 224 and 0.875 this is
    the customary resize to 256 and centre crop of 224.
    """
    height, width = image.shape[:2]
    high, wide, top, left = evaluation_place(height, width, size, crop)
    picture = resize(channels_last(image), high, wide)[0]
    return picture[:, top : top + size, left : left + size].contiguous()


def evaluation_map(labels: np.ndarray, size: int, crop: float) -> np.ndarray:
    """What `evaluation_picture` shows of a picture, of a map (H, W) of labels: the nearest pixel's. -> (size, size)"""
    height, width = labels.shape
    high, wide, top, left = evaluation_place(height, width, size, crop)
    # centre on centre, as the picture's pixels are resized
    rows = (2 * np.arange(top, top + size) + 1) * height // (2 * high)
    columns = (2 * np.arange(left, left + size) + 1) * width // (2 * wide)
    return labels[rows[:, None], columns]


def evaluation_place(height: int, width: int, size: int, crop: float) -> tuple[int, int, int, int]:
    """Height and width to which a picture is resized for evaluation, and top and left of the square that is cut out."""
    short = round(size / crop)
    if height <= width:
        high, wide = short, short * width // height
    else:
        high, wide = short * height // width, short
    return high, wide, round((high - size) / 2), round((wide - size) / 2)


def channels_last(image: np.ndarray) -> Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) over the same bytes, copied only where torch could not hold them."""
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1).unsqueeze(0)


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(picture, size=(height, width), mode="bicubic", antialias=True)
