"""What a file is worth counting for, read from its header alone: size, length and rate."""

import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from ssd.data.clips import VIDEO_SUFFIXES, BrokenClip, Clip
from ssd.data.folder import MOST_CHANNELS, SUFFIXES
from ssd.data.pictures import EXIF_ORIENTATION
from ssd.data.sound import SOUND_SUFFIXES, BrokenSound, Sound

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose height is stored as width


def counted(path: str) -> dict[str, float]:
    """Of `height` and `width` (px), `length` (frames or samples) and `rate` (of them a second) what the file has.

    Raises OSError for a file that is damaged or gone. A file whose damage lies behind its header is not found out.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in COUNTERS:
        raise OSError(f"no known kind of file: {', '.join(COUNTERS)}")
    return COUNTERS[kind](path)


def count_picture(path: str) -> dict[str, float]:
    """Of the picture upright."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    return {"height": width, "width": height} if sideways else {"height": height, "width": width}


def count_array(path: str) -> dict[str, float]:
    """Of one picture (H, W), (H, W, C) or (C, H, W)."""
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (ValueError, EOFError) as error:
        raise OSError(str(error)) from None
    if len(shape) not in (2, 3):
        raise OSError(f"an array of shape {shape} is no picture")
    channels_first = len(shape) == 3 and shape[0] <= MOST_CHANNELS < shape[2]
    height, width = shape[1:] if channels_first else shape[:2]
    return {"height": height, "width": width}


def count_sound(path: str) -> dict[str, float]:
    """Samples that the file holds, whatever its header says of more."""
    try:
        with open(path, "rb") as file, Sound(file) as sound:
            return {"length": sound.length, "rate": sound.rate_hz}
    except BrokenSound as error:
        raise OSError(str(error)) from None


def count_clip(path: str) -> dict[str, float]:
    """Frames that its packets hold, none of them decoded, and how many are shown a second on average."""
    try:
        with open(path, "rb") as file, Clip(file) as clip:
            timeline = clip.timeline
    except BrokenClip as error:
        raise OSError(str(error)) from None
    seconds = timeline.duration_s
    return {"length": len(timeline)} | ({"rate": round(len(timeline) / seconds, 6)} if seconds > 0 else {})


# last letters of a name -> what counts such files; a kind of data adds its own
COUNTERS: dict[str, Callable[[str], dict[str, float]]] = {
    **dict.fromkeys(SUFFIXES, count_picture),
    ".npy": count_array,
    **dict.fromkeys(SOUND_SUFFIXES, count_sound),
    **dict.fromkeys(VIDEO_SUFFIXES, count_clip),
}
