"""Crops of a decoded picture: antialiased bicubic, straight from its bytes, 8 bits in and out.

The filter is Pillow's, computed by torch's 8-bit kernel on a channels-last picture, so that a crop is
a view of the picture and not a copy.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.views.parameters import settings_of
from ssd.views.view import Views


def crop_views(image: np.ndarray, boxes: dict[str, np.ndarray], views: Views) -> dict[str, Tensor]:
    """Every view of one picture: cropped, resized, flipped.

    Image (H, W, C) uint8, boxes kind -> (V, 5) with the columns of `Box` inside that image
    -> kind -> (V, C, size, size) uint8.
    """
    source = channels_last(image)  # (1, C, H, W)
    sizes = settings_of(views).sizes
    return {kind: crops(source, table, sizes[kind]) for kind, table in boxes.items()}


def crops(source: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """(1, C, H, W) and (V, 5) -> (V, C, size, size)"""
    pictures = []
    for left, top, width, height, flip in boxes.astype(int).tolist():
        picture = resize(source[:, :, top : top + height, left : left + width], size, size)
        pictures.append(picture.flip(-1) if flip else picture)
    return torch.cat(pictures)


def evaluation_picture(image: np.ndarray, size: int, crop: float) -> Tensor:
    """The centre of the picture after its short side is resized to size / crop, to the nearest pixel.

    Image (H, W, C) uint8, size in px, crop in (0, 1] -> (C, size, size) uint8. With 224 and 0.875 this is
    the customary resize to 256 and centre crop of 224.
    """
    height, width = image.shape[:2]
    short = round(size / crop)
    if height <= width:
        high, wide = short, short * width // height
    else:
        high, wide = short * height // width, short
    picture = resize(channels_last(image), high, wide)[0]
    top, left = round((high - size) / 2), round((wide - size) / 2)
    return picture[:, top : top + size, left : left + size].contiguous()


def channels_last(image: np.ndarray) -> Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) over the same bytes, copied only where torch could not hold them."""
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1).unsqueeze(0)


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(picture, size=(height, width), mode="bicubic", antialias=True)
