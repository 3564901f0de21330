"""From the bytes of a picture file to an array, whatever kind of file it is."""

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

EXIF_ORIENTATION = 0x0112
# Rec. 601 weights in 1 / 65536, the ones that Pillow's "L" has
LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)


class BrokenPicture(Exception):
    """These bytes are no picture that can be read; the message says why."""


def decode(data: bytes | np.ndarray, channels: int = 3) -> np.ndarray:
    """The picture upright, as (H, W, channels) uint8, contiguous.

    EXIF orientation is applied. Transparent pixels are laid on white: the colour under them is
    arbitrary. Palette, CMYK, grey and bilevel pictures become RGB (3) or luma (1); 16-bit values are
    divided by 257, so that black and white stay black and white. Of an animation the first frame
    counts. With other numbers of channels the picture must have just that many bands (2 for grey with
    alpha, 4 for RGBA or CMYK) and they are taken as they are. Arrays are (H, W) or (H, W, C) of uint8
    or uint16. Raises BrokenPicture for what cannot be read and for floats, whose range nothing tells.
    """
    if isinstance(data, np.ndarray):
        return with_channels(eight_bits(data), channels)
    if simplejpeg is not None and channels in (1, 3) and data[:2] == b"\xff\xd8":
        picture = decode_jpeg(data, channels)
        if picture is not None:
            return picture
    return decode_any(data, channels)


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


def decode_any(data: bytes, channels: int) -> np.ndarray:
    """As `decode`, by Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata in pictures that it reads
            image: Image.Image = Image.open(io.BytesIO(data))
            if channels == 1:
                image.draft("L", None)  # a JPEG's own luma, as the fast decoder reads it
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise BrokenPicture(f"not a picture of a known kind: {len(data)} bytes that start with {data[:8]!r}") from None
    except (OSError, SyntaxError, ValueError, KeyError, IndexError, EOFError, struct.error, MemoryError) as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}") from None
    except Image.DecompressionBombError as error:
        raise BrokenPicture(str(error)) from None
    if channels not in (1, 3):
        return with_channels(eight_bits(np.array(image)), channels)
    if image.mode.startswith("I") or image.mode == "F":
        return with_channels(eight_bits(np.array(image)), channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return with_channels(np.array(image), channels)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """uint8 as it is; wider integers are taken as 16-bit, 0 to 65535 -> 0 to 255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "iu":
        raise BrokenPicture(f"{values.dtype} values, whose range is not known; store it with 8 or 16 bits")
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BrokenPicture(f"values from {values.min()} to {values.max()}, beyond 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


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
