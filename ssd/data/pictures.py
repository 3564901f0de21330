"""From the bytes of a picture file to an array, whatever kind of file it is."""

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ssd.errors import BrokenSample

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

EXIF_ORIENTATION = 0x0112
# Rec. 601 weights in 1 / 65536, the ones that Pillow's "L" has
LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)


class BrokenPicture(BrokenSample):
    """These bytes are no picture that can be read; the message says why."""


def eight_bits(values: np.ndarray) -> np.ndarray:
    """uint8 as it is; wider integers are taken as 16-bit, 0 to 65535 -> 0 to 255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "iu":
        raise BrokenPicture(f"{values.dtype} values, whose range is not known: set value_range to data or [low, high]")
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BrokenPicture(f"values from {values.min()} to {values.max()}, beyond 16 bits: set value_range")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


@dataclass(frozen=True)
class Levels:
    """Which values become black and white in pictures of more than 8 bits; what lies beyond is cut off.

    Args:
        low, high: one value for all channels of the stored picture, or one for each.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """uint8 as it is, others scaled; not-a-number becomes black."""
        if values.dtype == np.uint8:
            return values
        bands = 1 if values.ndim == 2 else values.shape[2]
        if len(self.low) not in (1, bands):
            raise BrokenPicture(f"{bands} channels, and value_range is for {len(self.low)}")
        low, high = (np.array(limit, np.float32) for limit in (self.low, self.high))
        if values.ndim == 2:
            low, high = low[0], high[0]
        share = np.nan_to_num((values.astype(np.float32) - low) / (high - low), nan=0.0)
        return np.rint(share.clip(0, 1) * 255).astype(np.uint8)


class MeasuredLevels:
    """Stands where `Levels` stand and notes the values that it is shown.

    Args:
        most: pixels of each picture that are noted.
    """

    def __init__(self, most: int = 4096):
        self.most = most
        self.seen: list[np.ndarray] = []

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if values.dtype == np.uint8:
            return values
        pixels = values.reshape(-1, 1 if values.ndim == 2 else values.shape[2]).astype(np.float32)
        self.seen.append(pixels[:: max(1, len(pixels) // self.most)])
        return np.zeros(values.shape, np.uint8)

    def levels(self, share: float = 0.001) -> Levels | None:
        """All but the lowest and highest `share` of each channel; None where every picture has 8 bits."""
        if not self.seen:
            return None
        bands = self.seen[0].shape[1]
        pixels = np.concatenate([pixels for pixels in self.seen if pixels.shape[1] == bands])
        low, high = np.nanquantile(pixels, [share, 1 - share], axis=0)
        high = np.where(high > low, high, low + 1)  # a blank channel
        return Levels(tuple(low.tolist()), tuple(high.tolist()))


def decode(
    data: bytes | np.ndarray, channels: int = 3, levels: Callable[[np.ndarray], np.ndarray] = eight_bits
) -> np.ndarray:
    """The picture upright, as (H, W, channels) uint8, contiguous.

    EXIF orientation is applied. Transparent pixels are laid on white: the colour under them is
    arbitrary. Palette, CMYK, grey and bilevel pictures become RGB (3) or luma (1); wider values become
    8 bits by `levels`, which divides by 257 unless it is told a range, so that black and white stay black
    and white. Of an animation the first frame counts. With other numbers of channels the picture must have
    just that many bands (2 for grey with alpha, 4 for RGBA or CMYK), or be a TIFF of that many pages of one band each, and
    they are taken as they are. Arrays
    are (H, W) or (H, W, C) of whole numbers; of floats only with `Levels`. Raises BrokenPicture for what
    cannot be read.
    """
    if isinstance(data, np.ndarray):
        return with_channels(levels(data), channels)
    if simplejpeg is not None and channels in (1, 3) and data[:2] == b"\xff\xd8":
        picture = decode_jpeg(data, channels)
        if picture is not None:
            return picture
    return decode_any(data, channels, levels)


def decode_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """As `decode`, by libjpeg-turbo; None where Pillow has to judge (CMYK, damage, odd marker order)."""
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray"):
            return None
        picture = simplejpeg.decode_jpeg(data, colorspace="RGB" if channels == 3 else "GRAY")
    except ValueError:
        return None
    orientation = jpeg_orientation(data)
    return picture if orientation == 1 else upright(picture, orientation)


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or where it cannot be read, as viewers do."""
    start = data.find(b"Exif\0\0", 0, 65536)
    if start < 0:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data[start : start + 65536])
        orientation = exif.get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, OSError, struct.error):
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored -> as meant. CIPA DC-008 (EXIF 2.3), tag Orientation."""
    if orientation >= 5:
        picture = picture.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def decode_any(data: bytes, channels: int, levels: Callable[[np.ndarray], np.ndarray] = eight_bits) -> np.ndarray:
    """As `decode`, by Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata in pictures that it reads
            image: Image.Image = Image.open(io.BytesIO(data))
            if channels == 1:
                image.draft("L", None)  # a JPEG's own luma, as the fast decoder reads it
            image.load()
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if channels not in (1, 3) and pages == channels and len(image.getbands()) == 1:
                return with_channels(levels(stacked_pages(image)), channels)
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise BrokenPicture(f"not a picture of a known kind: {len(data)} bytes that start with {data[:8]!r}") from None
    except (OSError, SyntaxError, ValueError, KeyError, IndexError, EOFError, struct.error, MemoryError) as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}") from None
    except Image.DecompressionBombError as error:
        raise BrokenPicture(str(error)) from None
    if channels not in (1, 3) or image.mode.startswith("I") or image.mode == "F":
        return with_channels(levels(np.array(image)), channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return with_channels(np.array(image), channels)


def stacked_pages(image: Any) -> np.ndarray:
    """The pages of a TIFF, one channel each, as (H, W, pages)."""
    pages = []
    for number in range(image.n_frames):
        image.seek(number)
        pages.append(np.array(image))
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise BrokenPicture("pages of several sizes or depths, which are no channels of one picture")
    return np.stack(pages, axis=2)


def with_channels(picture: np.ndarray, channels: int) -> np.ndarray:
    """(H, W) or (H, W, C) -> (H, W, channels): grey is repeated, RGB becomes luma."""
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim != 3 or 0 in picture.shape:
        raise BrokenPicture(f"an array of shape {picture.shape}, not (height, width) or (height, width, channels)")
    if picture.shape[2] == channels:
        return np.ascontiguousarray(picture)
    if channels == 3 and picture.shape[2] == 1:
        return np.repeat(picture, 3, axis=2)
    if channels == 1 and picture.shape[2] == 3:
        return ((picture @ LUMA + 0x8000) >> 16).astype(np.uint8)[:, :, None]
    raise BrokenPicture(f"{picture.shape[2]} channels where {channels} are expected")
