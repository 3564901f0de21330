"""Crops and colours by compiled code, where there is such; see views.c for what it computes."""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ssd.native.build import library

NUM_BOX, NUM_SETTINGS = 5, 13  # columns of a box and of a view's photometry
NUMBER, POINTER = ctypes.c_int64, ctypes.c_void_p


@cache
def functions() -> ctypes.CDLL | None:
    code = library()
    if code is not None:
        code.ssd_crops.argtypes = [POINTER, NUMBER, NUMBER, NUMBER, POINTER, NUMBER, NUMBER, POINTER, NUMBER]
        code.ssd_photometry.argtypes = [POINTER, *[NUMBER] * 4, *[POINTER] * 4]
    return code


def available() -> bool:
    return functions() is not None


def crops(image: np.ndarray, boxes: np.ndarray, out: Tensor) -> None:
    """Each view of one picture, cropped, resized and flipped into its place.

    Image (H, W, C) uint8, boxes (V, 5) inside it, out (V, C, size, size) uint8 whose views may lie apart.
    """
    views, channels, size, _ = out.shape
    image = np.ascontiguousarray(image)
    boxes = np.ascontiguousarray(boxes, dtype=np.float32)
    if out.dtype != torch.uint8 or out.shape[2] != out.shape[3] or not out[0].is_contiguous():
        raise ValueError(
            f"crops go to (V, C, size, size) uint8, each one contiguous, not {tuple(out.shape)} {out.dtype}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or boxes.shape != (views, NUM_BOX):
        raise ValueError(f"picture {image.shape} {image.dtype} and boxes {boxes.shape} for views {tuple(out.shape)}")
    check_inside(boxes, *image.shape[:2])
    failed = functions().ssd_crops(  # type: ignore[union-attr]
        image.ctypes.data, *image.shape, boxes.ctypes.data, views, size, out.data_ptr(), out.stride(0)
    )
    refuse_lack(failed)


def check_inside(boxes: np.ndarray, height: int, width: int) -> None:
    left, top, wide, high = boxes[:, :4].T
    if min(left.min(), top.min()) < 0 or min(wide.min(), high.min()) < 1:
        raise ValueError(f"a box has negative or no extent: {boxes.tolist()}")
    if (left + wide).max() > width or (top + high).max() > height:
        raise ValueError(f"a box reaches beyond the picture of {height} x {width} px: {boxes.tolist()}")


def photometry(
    pictures: Tensor, settings: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, out: Tensor
) -> None:
    """Pictures (..., C, h, w) uint8 and settings (..., 13) -> out, of the pictures' shape: float32 normalised, or
    uint8 where mean and standard deviation are None. All contiguous and on the CPU.
    """
    channels, height, width = pictures.shape[-3:]
    count = pictures.numel() // max(1, channels * height * width)
    wanted = torch.uint8 if mean is None else torch.float32
    if not (pictures.is_contiguous() and out.is_contiguous() and settings.is_contiguous()):
        raise ValueError("photometry takes contiguous tensors")
    if pictures.dtype != torch.uint8 or out.dtype != wanted or settings.dtype != torch.float32:
        raise ValueError(f"photometry turns uint8 into {wanted}, not {pictures.dtype} into {out.dtype}")
    if out.shape != pictures.shape or settings.shape != (*pictures.shape[:-3], NUM_SETTINGS):
        raise ValueError(f"{tuple(pictures.shape)} with settings {tuple(settings.shape)} to {tuple(out.shape)}")
    scale = shift = None
    if mean is not None and std is not None:
        center, spread = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
        scale, shift = (1 / (255 * spread)).astype(np.float32), (center / spread).astype(np.float32)
        if scale.shape != (channels,) or shift.shape != (channels,):
            raise ValueError(f"{len(center)} means and {len(spread)} standard deviations for {channels} channels.")
    failed = functions().ssd_photometry(  # type: ignore[union-attr]
        pictures.data_ptr(),
        count,
        channels,
        height,
        width,
        settings.data_ptr(),
        None if scale is None else scale.ctypes.data,
        None if shift is None else shift.ctypes.data,
        out.data_ptr(),
    )
    refuse_lack(failed)


def refuse_lack(failed: int) -> None:
    if failed:
        raise MemoryError("no memory is left to make views in")
