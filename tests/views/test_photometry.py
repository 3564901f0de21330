"""Every colour operation is torchvision's, alone and in every order, on any number of channels.

Differences are in grey levels of 0 to 255. Ours come from `photometry.apply` with a mean of 0 and a
standard deviation of 1, times 255.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import functional as published
from torchvision.transforms.v2 import functional as reference

from ssd.native import views as native
from ssd.views import photometry
from ssd.views.parameters import NEUTRAL, ORDER, ORDERS, Colour, draw
from ssd.views.recipes import DINOViews

# torchvision's luma weights are rounded to four digits and sum to .9999, at most .04 levels below ours
LUMA_ROUNDING = 0.05
FLOAT = 2e-3  # float32 carries 255 to 1.5e-5; a few dozen operations, a division by small chroma among them
OPERATIONS = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


def noise(views: int, batch: int, channels: int = 3, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (views, batch, channels, size, size), dtype=torch.uint8, generator=generator)


def photos(views: int, batch: int, size: int = 24) -> Tensor:
    """Squares of a real photograph, whose neighbouring pixels are alike and some of whose are grey."""
    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    squares = photo.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).transpose(0, 1)
    return squares[: views * batch].unflatten(0, (views, batch)).contiguous()


def settings(views: int, batch: int, **columns: float | Tensor) -> Tensor:
    """(V, B, 13) neutral but for the named columns."""
    table = torch.from_numpy(NEUTRAL).repeat(views, batch, 1)
    for name, value in columns.items():
        table[..., Colour[name.upper()]] = torch.as_tensor(value, dtype=torch.float32)
    return table


def drawn_settings(views: DINOViews, batch: int, kind: str = "global") -> Tensor:
    return torch.from_numpy(np.stack([draw(views, 32, 32, 3, 0, index)[1][kind] for index in range(batch)], axis=1))


def levels(pictures: Tensor, parameters: Tensor) -> Tensor:
    channels = pictures.shape[2]
    return photometry.apply(pictures, parameters, [0.0] * channels, [1.0] * channels) * 255


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def spread(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count)[None]


@pytest.mark.parametrize("make", [noise, photos])
@pytest.mark.parametrize(
    "operation, column, low, high",
    [
        ("adjust_brightness", "brightness", 0.0, 2.0),
        ("adjust_contrast", "contrast", 0.0, 2.0),
        ("adjust_saturation", "saturation", 0.0, 2.0),
        ("adjust_hue", "hue", -0.5, 0.5),
    ],
)
def test_each_jitter_operation_is_torchvisions(make, operation, column, low, high):
    pictures, amounts = make(1, 9), spread(low, high, 9)
    ours = levels(pictures, settings(1, 9, **{column: amounts}))
    for picture, amount, got in zip(pictures[0], amounts[0], ours[0], strict=True):
        theirs = getattr(reference, operation)(picture.float() / 255, amount.item()) * 255
        close(got, theirs, LUMA_ROUNDING if column in ("contrast", "saturation") else FLOAT)


def test_grey_is_itu_601_luma_in_all_three_channels():
    pictures = noise(1, 3)
    ours = levels(pictures, settings(1, 3, grey=torch.tensor([1.0, 0.0, 1.0])))
    close(ours[0, 0], reference.rgb_to_grayscale(pictures[0, 0].float(), 3), LUMA_ROUNDING)
    close(ours[0, 1], pictures[0, 1].float(), FLOAT)
    pillow = Image.fromarray(pictures[0, 2].permute(1, 2, 0).numpy()).convert("L")
    close(ours[0, 2], torch.from_numpy(np.array(pillow)).float().expand(3, -1, -1), 0.5 + FLOAT)  # Pillow rounds


def test_solarize_inverts_from_128_on():
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16)
    ours = levels(ramp, settings(1, 1, solarize=128.0))
    expected = torch.tensor([value if value < 128 else 255 - value for value in range(256)]).float()
    close(ours.flatten(), expected, FLOAT)
    close(ours[0, 0], reference.solarize(ramp[0, 0], 128).float(), FLOAT)
    pillow = ImageOps.solarize(Image.fromarray(ramp[0, 0, 0].numpy()), 128)
    close(ours[0, 0, 0], torch.from_numpy(np.array(pillow)).float(), FLOAT)


@pytest.mark.parametrize("size", [1, 2, 12, 33])
def test_blur_is_a_gaussian_of_that_deviation_with_edges_repeated(size):
    deviations = spread(0.1, 2.0, 8)
    pictures = noise(1, 8, 3, size)
    ours = levels(pictures, settings(1, 8, blur=deviations))
    for picture, deviation, got in zip(pictures[0], deviations[0].tolist(), ours[0], strict=True):
        theirs = gaussian_filter(
            picture.numpy().astype(float), (0, deviation, deviation), mode="nearest", radius=int(5 * deviation + 1)
        )
        # within a very small picture the kernel ends one side away, and its rest is spread over what is left
        close(got, torch.from_numpy(theirs).float(), 0.01 if size > 10 else 5.0)


def test_blur_is_torchvisions():
    pictures = noise(1, 6, 3, 20)
    deviations = spread(0.1, 2.0, 6)
    ours = levels(pictures, settings(1, 6, blur=deviations))
    for picture, deviation, got in zip(pictures[0], deviations[0].tolist(), ours[0], strict=True):
        radius = int(5 * deviation) + 1
        padded = F.pad(picture.float()[None], (radius,) * 4, mode="replicate")[0]  # torchvision would reflect
        theirs = reference.gaussian_blur(padded, [2 * radius + 1] * 2, [deviation] * 2)
        close(got, theirs[:, radius:-radius, radius:-radius], 0.01)


@pytest.mark.parametrize("size", [1, 2, 16, 224])
def test_blur_weights_sum_to_one_and_are_never_denormal(size):
    matrix = photometry.gaussian_matrix(torch.linspace(0, 2, 50), size)
    close(matrix.sum(2), torch.ones(50, size), 1e-5)
    close(matrix[0], torch.eye(size), 0.0)
    inner = matrix[:, :, 1:-1]
    assert ((inner == 0) | (inner > 1e-7)).all()


def test_blur_keeps_a_flat_picture_and_the_height_and_width_of_an_oblong_one():
    flat = torch.full((1, 2, 3, 9, 9), 77, dtype=torch.uint8)
    close(levels(flat, settings(1, 2, blur=2.0)), flat.float(), FLOAT)
    oblong = noise(1, 1)[..., :7]  # 12 x 7
    turned = levels(oblong.mT, settings(1, 1, blur=1.3))
    close(levels(oblong, settings(1, 1, blur=1.3)), turned.mT, FLOAT)


def in_turn(functions, picture, row: list[float]):
    """Jitter in the row's order and grey, by the given library's functions."""
    for place in row[ORDER]:
        picture = getattr(functions, OPERATIONS[int(place)])(picture, row[int(place)])
    return functions.rgb_to_grayscale(picture, 3) if row[Colour.GREY] else picture


@pytest.mark.parametrize("order", ORDERS.astype(int).tolist(), ids=str)
def test_jitter_in_every_order_is_torchvisions(order):
    pictures = photos(1, 4)
    table = settings(1, 4, brightness=1.35, contrast=spread(0.6, 1.4, 4), saturation=1.2, hue=spread(-0.1, 0.1, 4))
    table[..., ORDER] = torch.tensor(order, dtype=torch.float32)
    ours = levels(pictures, table)
    for picture, row, got in zip(pictures[0], table[0].tolist(), ours[0], strict=True):
        # hue after a change of luma by .04 levels can move a channel by several times that
        close(got, in_turn(reference, picture.float() / 255, row) * 255, 4 * LUMA_ROUNDING)


def test_a_drawn_batch_is_torchvisions_operations_one_after_another():
    views = DINOViews(global_size=24)
    pictures, table = photos(2, 60), drawn_settings(views, 60)
    ours = levels(pictures, table)
    differences = []
    for picture, row, got in zip(pictures.flatten(0, 1), table.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        theirs = in_turn(reference, picture.float() / 255, row) * 255
        if row[Colour.BLUR]:
            blurred = gaussian_filter(
                theirs.numpy(), (0, row[Colour.BLUR], row[Colour.BLUR]), mode="nearest", truncate=5
            )
            theirs = torch.from_numpy(blurred)
        if row[Colour.SOLARIZE] < 256:
            theirs = reference.solarize(theirs / 255, row[Colour.SOLARIZE] / 255) * 255
        differences.append((got - theirs).abs().flatten())
    difference = torch.cat(differences)
    assert difference.mean() < 0.02
    assert difference.quantile(0.999) < 4 * LUMA_ROUNDING
    assert difference.max() < 1.5  # solarisation drops by one level where a value crosses 128


def test_published_8_bit_pipeline_is_darker_by_less_than_a_level_because_it_cuts_off():
    """Pillow cuts every result down to a whole level, on average half a level for every operation."""
    views = DINOViews(global_size=24, blur_prob=(0.0, 0.0, 0.0))
    pictures, table = photos(2, 60), drawn_settings(views, 60)
    ours = levels(pictures, table)
    differences = []
    for picture, row, got in zip(pictures.flatten(0, 1), table.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        if row[Colour.SOLARIZE] < 256:
            continue  # inverted, darker becomes brighter
        theirs = in_turn(published, Image.fromarray(picture.permute(1, 2, 0).numpy()), row)
        differences.append((got - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).flatten())
    difference = torch.cat(differences)
    assert 0.3 < difference.mean() < 1.2
    assert difference.abs().mean() < 1.5  # where colours are faint, a level cut off turns the hue a lot


def test_blur_is_near_pillows_which_approximates_a_gaussian_by_boxes():
    pictures = photos(1, 6, 48)
    deviations = spread(0.8, 2.0, 6)
    ours = levels(pictures, settings(1, 6, blur=deviations))
    for picture, deviation, got in zip(pictures[0], deviations[0].tolist(), ours[0], strict=True):
        blurred = Image.fromarray(picture.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(deviation))
        assert (got - torch.from_numpy(np.array(blurred)).permute(2, 0, 1)).abs().mean() < 0.6


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_get_brightness_contrast_blur_and_solarize_in_their_order(channels):
    pictures = noise(2, 40, channels)
    table = drawn_settings(DINOViews(), 40)
    ours = levels(pictures, table)
    for picture, row, got in zip(pictures.flatten(0, 1), table.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        expected = picture.double()
        for place in row[ORDER]:
            if place == Colour.BRIGHTNESS:
                expected = (row[Colour.BRIGHTNESS] * expected).clamp(0, 255)
            if place == Colour.CONTRAST:
                share = row[Colour.CONTRAST]
                expected = (share * expected + (1 - share) * expected.mean()).clamp(0, 255)
        if row[Colour.BLUR]:
            kernel = (0, row[Colour.BLUR], row[Colour.BLUR])
            expected = torch.from_numpy(gaussian_filter(expected.numpy(), kernel, mode="nearest", truncate=6))
        if row[Colour.SOLARIZE] < 256:
            expected = torch.where(expected >= 128, 255 - expected, expected)
        assert ((got - expected).abs() < 0.01).float().mean() > 0.999  # a value at 128 may fall to either side


def test_neutral_settings_only_normalise():
    pictures, mean, std = noise(2, 3), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    coloured = photometry.apply(pictures, settings(2, 3), mean, std)
    close(coloured, photometry.normalise(pictures, mean, std), 1e-6)
    assert torch.equal(photometry.apply(pictures, settings(2, 3)), pictures)


def test_without_a_mean_the_colours_are_those_of_the_normalised_picture_rounded():
    pictures, drawn = photos(2, 8), drawn_settings(DINOViews(), 8)
    exact = levels(pictures, drawn)
    rounded = photometry.apply(pictures, drawn)
    assert rounded.dtype == torch.uint8
    close(rounded.float(), exact, 0.5 + FLOAT)


def test_compiled_code_and_torch_make_the_same_picture(made_by, monkeypatch):
    if made_by == "torch":
        pytest.skip("compared once, with what compiled code makes")
    views = DINOViews(rotate=20, shear=0.2, blur_prob=(0.7, 0.7, 0.7), solarize_prob=(0.3, 0.3, 0.3))
    for pictures in (photos(2, 64), noise(2, 64), noise(2, 64, channels=1), noise(2, 64, channels=5, size=17)):
        drawn = drawn_settings(views, 64)
        compiled = levels(pictures, drawn)
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            by_torch = levels(pictures, drawn)
        # a pixel within rounding of the threshold is inverted by one and not by the other
        apart = (compiled - by_torch).abs() > 0.01
        assert apart.float().mean() < 1e-4


def test_normalise_is_the_written_formula():
    pictures, mean, std = noise(2, 3), torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    expected = (pictures / 255 - mean[:, None, None]) / std[:, None, None]
    close(photometry.normalise(pictures, mean.tolist(), std.tolist()), expected, 1e-5)
    close(photometry.normalise(pictures[0, 0], mean.tolist(), std.tolist()), expected[0, 0], 1e-5)


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="1 means and 1 standard deviations for 3 channels"):
        photometry.normalise(noise(1, 1), [0.5], [0.5])


def test_the_bytes_that_went_in_stay_as_they_were():
    pictures = noise(2, 8)
    before = pictures.clone()
    photometry.apply(pictures, drawn_settings(DINOViews(), 8), [0.5] * 3, [0.25] * 3)
    photometry.normalise(pictures, [0.5] * 3, [0.25] * 3)
    assert torch.equal(pictures, before)


def test_a_picture_is_coloured_by_its_own_settings_alone():
    pictures, table = photos(2, 30), drawn_settings(DINOViews(), 30)
    together = levels(pictures, table)
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    close(levels(pictures[:, shuffle], table[:, shuffle]), together[:, shuffle], FLOAT)
    close(levels(pictures[:, 4:5], table[:, 4:5]), together[:, 4:5], FLOAT)


def test_working_in_small_chunks_changes_nothing(monkeypatch):
    pictures, table = photos(2, 30), drawn_settings(DINOViews(), 30)
    whole = levels(pictures, table)
    monkeypatch.setattr(photometry, "CHUNK", 5000)  # two pictures
    close(levels(pictures, table), whole, FLOAT)


def test_the_form_for_accelerators_that_touches_every_picture_agrees(monkeypatch):
    pictures, table = photos(2, 60), drawn_settings(DINOViews(), 60)
    drawn_only = levels(pictures, table)
    monkeypatch.setattr(photometry, "on_drawn", lambda drawn, operation, pictures, *rest: operation(pictures, *rest))
    close(levels(pictures, table), drawn_only, FLOAT)


def test_autocast_around_it_costs_no_grey_levels():
    pictures, table = photos(2, 8), drawn_settings(DINOViews(), 8)
    alone = levels(pictures, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = levels(pictures, table)
    assert within.dtype == torch.float32
    close(within, alone, FLOAT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [1, 3])
def test_an_accelerator_gives_the_same_pictures(channels):
    pictures, table = noise(2, 64, channels, 33), drawn_settings(DINOViews(), 64)
    there = levels(pictures.cuda(), table.cuda()).cpu()
    difference = (levels(pictures, table) - there).abs()
    assert difference.quantile(0.999) < 0.01
    assert difference.max() < 1.5  # solarisation drops by one level where a value crosses 128


def test_orders_are_the_permutations_of_the_four_operations():
    assert sorted(map(tuple, ORDERS.astype(int).tolist())) == sorted(itertools.permutations(range(4)))
    assert tuple(Colour)[:4] == (Colour.BRIGHTNESS, Colour.CONTRAST, Colour.SATURATION, Colour.HUE)


@pytest.mark.parametrize(
    "degrees, slant", [(-170, 0.0), (-15, 0.0), (3, 0.2), (0, 0.2), (0, -0.3), (90, 0.0), (15, -0.2)]
)
@pytest.mark.parametrize("size", [24, 33])
def test_a_warp_is_torchvisions_where_the_picture_reaches(degrees, slant, size):
    def theirs_of(pictures):
        shear = [math.degrees(math.atan(slant)), 0.0]
        still, bilinear = [0, 0], published.InterpolationMode.BILINEAR
        slanted = reference.affine(pictures, 0.0, still, 1.0, shear, bilinear)
        return slanted if not degrees else reference.affine(pictures, -degrees, still, 1.0, shear, bilinear)

    pictures = photos(1, 3, size)
    ours = levels(pictures, settings(1, 3, rotate=math.radians(degrees), shear=slant))[0]
    theirs, ones = theirs_of(pictures[0].float()), theirs_of(torch.ones(3, 1, size, size))
    inside = (ones > 0.9999).expand_as(ours)
    assert inside.float().mean() > 0.6
    close(ours[inside], theirs[inside], atol=0.05)


def test_a_warp_repeats_the_edge_and_keeps_a_plain_picture():
    plain = torch.full((1, 2, 3, 16, 16), 77, dtype=torch.uint8)
    close(levels(plain, settings(1, 2, rotate=0.6, shear=0.2)), plain.float(), atol=FLOAT)


def test_pictures_that_are_not_warped_are_not_touched():
    pictures = photos(1, 4)
    turned = torch.tensor([0.0, 0.3, 0.0, -0.3])
    ours = levels(pictures, settings(1, 4, rotate=turned))[0]
    close(ours[[0, 2]], pictures[0, [0, 2]].float(), atol=FLOAT)
    assert (ours[1] - pictures[0, 1]).abs().max() > 1
