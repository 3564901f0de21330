"""Colour of a whole batch of views, as tensor code that gives the same pictures on any device.

Pixel values are float32 in [0, 255], clamped after every operation as 8-bit pictures would be, but not
rounded. Published pipelines cut every colour operation off to whole grey levels and blur by boxes: on a
photograph they come out 0.8 levels darker, 99% of values within 3, and within 6 where they are blurred.

Operations work in place on (n, C, h, w) and take one setting a picture, (n,); with its neutral setting an
operation changes nothing. Brightness, contrast, blur and solarisation take any number of channels; saturation,
hue and grey need red, green and blue and leave other pictures as they are.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.native import views as native
from ssd.views.parameters import FACTORS, ORDER, WARP, Colour

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
CHUNK = 2**19  # values worked on at once on a CPU: 2 MiB of float32 stay in its cache


def apply(
    pictures: Tensor, parameters: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Tensor:
    """Shear and rotation, jitter in each picture's own order, grey, blur, solarise, then normalise.

    Pictures (V, B, C, h, w) uint8, parameters (V, B, 13) with the columns of `Colour`, mean and standard
    deviation of each channel in [0, 1] -> (V, B, C, h, w) float32. Without mean and standard deviation the pictures
    stay as they are meant to be looked at, uint8. On a CPU compiled code does it where it can be had, to 1e-3 levels.
    """
    if pictures.device.type == "cpu" and native.available():
        out = torch.empty(pictures.shape, dtype=torch.uint8 if mean is None else torch.float32)
        native.photometry(pictures.contiguous(), parameters.contiguous(), mean, std, out)
        return out
    flat, parameters = pictures.flatten(0, 1), parameters.flatten(0, 1)
    coloured = flat.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    size = max(CHUNK // coloured[0].numel(), 1) if coloured.device.type == "cpu" else len(coloured)
    with torch.autocast(coloured.device.type, enabled=False):  # half precision loses grey levels
        for part, settings in zip(coloured.split(size), parameters.split(size), strict=True):
            colour(part, settings)
            if mean is not None and std is not None:
                scale_channels(part, mean, std)
    coloured = coloured.unflatten(0, pictures.shape[:2])
    return coloured.add_(0.5).clamp_(0, 255).to(torch.uint8) if mean is None else coloured


def normalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., C, h, w) uint8 -> float32 with `mean` and `std`, in [0, 1], of each channel taken out."""
    return scale_channels(pictures.to(torch.float32, copy=True), mean, std)


def scale_channels(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if not len(mean) == len(std) == pictures.shape[-3]:
        raise ValueError(f"{len(mean)} means and {len(std)} standard deviations for {pictures.shape[-3]} channels.")
    for channel, (center, spread) in enumerate(zip(mean, std, strict=True)):
        pictures[..., channel, :, :].mul_(1 / (255 * spread)).sub_(center / spread)
    return pictures


def colour(pictures: Tensor, settings: Tensor) -> None:
    """Everything but normalising, in place: (n, C, h, w) and (n, 13)."""
    rgb = pictures.shape[1] == 3
    angle, slant = settings[:, WARP].unbind(1)
    on_drawn((angle != 0) | (slant != 0), warp, pictures, angle, slant)
    jitter(pictures, settings[:, FACTORS], settings[:, ORDER].long())
    if rgb:
        drawn = settings[:, Colour.GREY] > 0
        on_drawn(drawn, drop_colour, pictures, drawn)
    deviation = settings[:, Colour.BLUR]
    on_drawn(deviation > 0, blur, pictures, deviation)
    threshold = settings[:, Colour.SOLARIZE]
    on_drawn(threshold < 256, solarize, pictures, threshold)


def on_drawn(drawn: Tensor, operation: Callable[..., None], pictures: Tensor, *settings: Tensor) -> None:
    """The operation on the pictures for which it was drawn.

    On a CPU only these are touched. Elsewhere all are, because to ask which they are would wait for the
    device; the neutral settings of the others do nothing.
    """
    if pictures.device.type != "cpu":
        operation(pictures, *settings)
        return
    rows = drawn.nonzero().squeeze(1)
    if len(rows) == len(pictures):
        operation(pictures, *settings)
    elif len(rows):
        part = pictures.index_select(0, rows)
        operation(part, *(setting.index_select(0, rows) for setting in settings))
        pictures.index_copy_(0, rows, part)


def warp(pictures: Tensor, angle: Tensor, slant: Tensor) -> None:
    """Slants each picture to the right by `slant` (n,) of the height above its centre, then turns it about the centre
    by `angle` (n,) radians, counter-clockwise; bilinear, edge pixels go on outside."""
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # where each pixel comes from: first turned back, then straightened; rows count downwards
    rows = [cosine + slant * sine, slant * cosine - sine, zero, sine, cosine, zero]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(pictures.shape), align_corners=False)
    pictures.copy_(F.grid_sample(pictures, grid, padding_mode="border", align_corners=False))


def jitter(pictures: Tensor, factors: Tensor, order: Tensor) -> None:
    """Brightness, contrast, saturation and hue, (n, 4), each picture in its own order, (n, 4).

    The first three are all a mix with something greyer, so one mix serves pictures that are at different
    operations. Hue is not: three mixes before it and three after it hold every order, with the neutral
    factor 1 where a picture has nothing to do.
    """
    rgb = pictures.shape[1] == 3
    factor = factors.gather(1, order)  # (n, 4), first to last
    hue = order == Colour.HUE
    after_hue = hue.cumsum(1) > 0
    idle = hue if rgb else hue | (order == Colour.SATURATION)
    contrast, saturation = order == Colour.CONTRAST, order == Colour.SATURATION

    def mix_step(place: int, late: bool) -> None:
        busy = ~idle[:, place] & (after_hue[:, place] == late)
        amount = torch.where(busy, factor[:, place], 1.0)
        on_drawn(amount != 1, mix, pictures, amount, contrast[:, place], saturation[:, place])

    for place in (0, 1, 2):
        mix_step(place, late=False)
    if rgb:
        shift = factors[:, Colour.HUE]
        on_drawn(shift != 0, turn_hue, pictures, shift)
    for place in (1, 2, 3):
        mix_step(place, late=True)


def mix(pictures: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> None:
    """factor * picture + (1 - factor) * base, where base is the picture's mean luma for contrast, its
    luma for saturation and black for brightness.
    """
    plane = luma(pictures)  # (n, h, w)
    rest = 1 - factor
    level = plane.mean((1, 2)) * rest * contrast
    plane.mul_((rest * saturation)[:, None, None]).add_(level[:, None, None])
    pictures.mul_(factor[:, None, None, None]).add_(plane[:, None]).clamp_(0, 255)


def luma(pictures: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, h, w): ITU-R BT.601 luma of colour pictures, the mean channel of others."""
    if pictures.shape[1] != 3:
        return pictures.mean(1)
    red, green, blue = pictures.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def turn_hue(pictures: Tensor, shift: Tensor) -> None:
    """Turns the hue by `shift` turns at constant value and saturation (HSV)."""
    red, green, blue = pictures.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # hue in sixths of a turn: red 0, green 2, blue 4
    inverse = 1 / torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    hue.add_(6 * shift[:, None, None])
    hue.sub_(6 * torch.floor(hue / 6))
    low = value - chroma
    # each channel is a trapezium over the hue, 1 for two sixths around its own colour
    red.copy_((hue - 3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low))
    green.copy_((hue - 2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low))
    blue.copy_((hue - 4).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low))


def drop_colour(pictures: Tensor, drawn: Tensor) -> None:
    torch.where(drawn[:, None, None, None], luma(pictures)[:, None], pictures, out=pictures)


def blur(pictures: Tensor, deviation: Tensor) -> None:
    """Gaussian blur, edge pixels repeated outwards. Deviation (n,) in px, 0 = none.

    A product with one matrix for the columns and one for the rows.
    """
    height, width = pictures.shape[-2:]
    rows = gaussian_matrix(deviation, height)
    columns = rows if height == width else gaussian_matrix(deviation, width)
    lines = pictures.flatten(1, 2) @ columns.mT  # (n, C h, w)
    torch.matmul(rows[:, None], lines.unflatten(1, (-1, height)), out=pictures).clamp_(0, 255)


def gaussian_matrix(deviation: Tensor, size: int) -> Tensor:
    """(n,) -> (n, size, size): row i holds what each pixel gives to blurred pixel i; rows sum to 1.

    Weights are the Gaussian at whole pixels, cut off five deviations away (6e-7 of its area), or one
    picture side where that is less: further out they are denormal numbers, which make the product ten
    times slower.
    """
    narrow = deviation.clamp_min(1e-3)[:, None]  # at 1e-3 px all weight is on the pixel itself
    distance = torch.arange(-size, size + 1, device=deviation.device) / narrow  # in deviations
    logit = torch.where(distance.abs() > 5, -torch.inf, -0.5 * distance**2)
    weight = logit.softmax(dim=1)  # (n, 2 size + 1)
    place = torch.arange(size, device=deviation.device)
    matrix = weight[:, place[:, None] - place + size]  # (n, size, size)
    # pixels beyond an edge are copies of the edge pixel
    matrix[:, :, -1] = weight.cumsum(1)[:, place + 1]
    matrix[:, :, 0] = 1 - matrix[:, :, 1:].sum(2)
    return matrix


def solarize(pictures: Tensor, threshold: Tensor) -> None:
    """Inverts pixels from `threshold` (n,) on; 256 inverts none."""
    torch.where(pictures >= threshold[:, None, None, None], 255 - pictures, pictures, out=pictures)
