"""Every kind of picture file comes out upright, in 8 bits, with the channels that were asked for."""

import numpy as np
import pytest
from PIL import Image

from ssd.data import pictures
from ssd.data.pictures import BrokenPicture, Levels, MeasuredLevels, decode, eight_bits
from tests.data.files import encoded, scene


def test_colour_png_comes_out_as_it_went_in():
    picture = scene()
    assert np.array_equal(decode(encoded(picture)), picture)


def test_grey_is_repeated_for_three_channels_and_kept_for_one():
    grey = scene()[:, :, 0]
    assert np.array_equal(decode(encoded(grey), 1)[:, :, 0], grey)
    assert np.array_equal(decode(encoded(grey), 3), np.stack([grey] * 3, 2))


def test_colour_as_one_channel_is_pillows_luma():
    picture = scene()
    luma = np.array(Image.fromarray(picture).convert("L"))
    assert np.array_equal(decode(encoded(picture), 1)[:, :, 0], luma)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white_whatever_lies_under_them(mode):
    image = Image.fromarray(scene()).convert(mode)
    alpha = np.full(scene().shape[:2], 255, np.uint8)
    alpha[:5] = 0
    alpha[5:10] = 128
    image.putalpha(Image.fromarray(alpha))
    picture = decode(encoded(image))
    under = np.array(image.convert("RGB"))
    assert (picture[:5] == 255).all()
    share = 128 / 255
    assert np.abs(picture[5:10] - (under[5:10] * share + 255 * (1 - share))).max() <= 1
    assert np.array_equal(picture[10:], under[10:])


def test_palette_pictures_show_their_colours_and_the_transparent_one_is_white():
    image = Image.fromarray(scene()).quantize(16)
    assert np.array_equal(decode(encoded(image)), np.array(image.convert("RGB")))
    first = np.array(image)[0, 0]
    picture = decode(encoded(image, transparency=int(first)))
    assert (picture[np.array(image) == first] == 255).all()


def test_bilevel_pictures_are_black_and_white():
    bits = scene()[:, :, 0] > 127
    assert np.array_equal(decode(encoded(Image.fromarray(bits)), 1)[:, :, 0], bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_black_white_and_order(kind):
    values = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    picture = decode(encoded(Image.fromarray(values), kind), 1)[:, :, 0]
    assert np.array_equal(picture, np.rint(values / 257).astype(np.uint8))
    assert picture.min() == 0 and picture.max() == 255


def test_cmyk_jpeg_shows_the_colours_that_went_in():
    picture = scene()
    assert (
        np.abs(
            decode(encoded(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95)).astype(int) - picture
        ).mean()
        < 3
    )


def test_floats_are_refused_because_nothing_tells_their_range():
    with pytest.raises(BrokenPicture, match="range"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    """The camera held upright sees the scene; undo what the tag says and decode must bring it back."""
    undo = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: np.rot90(p, -1),
    }
    picture = scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](picture))
    options = {"quality": 95} if kind == "JPEG" else {}
    seen = decode(encoded(stored, kind, exif=exif, **options))
    assert seen.shape == picture.shape
    assert np.abs(seen.astype(int) - picture).mean() < (3 if kind == "JPEG" else 1e-9)
    assert seen.flags.c_contiguous


def test_unreadable_exif_does_not_cost_the_picture():
    data = encoded(scene(), "JPEG", exif=b"Exif\0\0nonsense")
    assert decode(data).shape == (24, 32, 3)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_read_alike_with_and_without_the_fast_decoder(monkeypatch, subsampling, grey, channels):
    """Both are libjpeg-turbo, and one channel is the luma that the file stores."""
    pytest.importorskip("simplejpeg")
    picture = scene()[:, :, 0] if grey else scene()
    data = encoded(picture, "JPEG", quality=90, subsampling=subsampling)
    fast = decode(data, channels)
    monkeypatch.setattr(pictures, "simplejpeg", None)
    slow = decode(data, channels)
    assert fast.shape == slow.shape == (24, 32, channels)
    assert np.array_equal(fast, slow)


def test_one_pixel_is_a_picture():
    assert decode(encoded(np.full((1, 1, 3), 7, np.uint8))).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"these are words, not pixels\n" * 10,
        encoded(scene(), "JPEG")[:-200],
        encoded(scene(), "JPEG")[:20],
        encoded(scene(), "PNG")[:-40],
        b"\xff\xd8\xff\xe0" + bytes(100),
    ],
    ids=["empty", "text", "half a jpeg", "head of a jpeg", "half a png", "zeros behind a jpeg's start"],
)
def test_what_is_no_whole_picture_is_broken(data):
    with pytest.raises(BrokenPicture):
        decode(data)


def test_arrays_are_pictures_too():
    grey = scene()[:, :, 0]
    assert np.array_equal(decode(grey, 3), np.stack([grey] * 3, 2))
    assert np.array_equal(decode(grey.astype(np.uint16) * 257, 1)[:, :, 0], grey)
    five = np.zeros((4, 6, 5), np.uint8)
    assert decode(five, 5).shape == (4, 6, 5)
    with pytest.raises(BrokenPicture, match="5 channels where 3"):
        decode(five, 3)


def test_four_bands_are_taken_as_they_are():
    image = Image.fromarray(scene()).convert("RGBA")
    image.putalpha(90)
    assert np.array_equal(decode(encoded(image), 4), np.array(image))


# ---------------------------------------------------------------- more than eight bits


def test_levels_put_black_and_white_where_they_are_told():
    values = np.array([[0, 100, 600], [1100, 4000, 65535]], np.uint16)
    assert decode(values, 1, Levels((100,), (1100,)))[:, :, 0].tolist() == [[0, 0, 128], [255, 255, 255]]
    floats = np.array([[-1.0, 0.25, np.nan]])
    assert decode(floats, 1, Levels((0.0,), (1.0,)))[:, :, 0].tolist() == [[0, 64, 0]]


def test_levels_are_for_each_channel_of_the_stored_picture():
    values = np.stack([np.full((4, 5), 10), np.full((4, 5), 1000)], 2).astype(np.uint16)
    levels = Levels((0, 0), (20, 4000))
    assert decode(values, 2, levels)[0, 0].tolist() == [128, 64]
    with pytest.raises(BrokenPicture, match="3 channels, and value_range is for 2"):
        decode(np.zeros((4, 5, 3), np.uint16), 3, levels)


def test_levels_leave_eight_bits_alone():
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    assert np.array_equal(decode(picture, 3, Levels((0,), (20,))), picture)
    assert np.array_equal(decode(encoded(picture), 3, Levels((0,), (20,))), picture)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_levels_reach_sixteen_bit_files(kind):
    values = np.array([[0, 500, 1000]], np.uint16)
    seen = decode(encoded(Image.fromarray(values), kind), 3, Levels((0,), (1000,)))
    assert seen[0, :, 0].tolist() == [0, 128, 255] and seen.shape == (1, 3, 3)


def test_measured_levels_are_the_range_of_what_was_seen_but_for_outliers():
    random = np.random.default_rng(0)
    measured = MeasuredLevels()
    for _ in range(20):
        picture = random.uniform([0, 100], [1, 4100], (50, 40, 2))
        picture[0, 0] = 1e6
        measured(picture)
        measured(np.zeros((3, 3, 2), np.uint8))
    levels = measured.levels()
    np.testing.assert_allclose(levels.low, [0, 100], atol=10)
    np.testing.assert_allclose(levels.high, [1, 4100], rtol=0.01)
    assert MeasuredLevels().levels() is None


def test_pages_of_a_tiff_are_the_channels_that_were_asked_for():
    """16 bits a page, as microscopes write them."""
    pages = np.random.default_rng(0).integers(0, 65536, (4, 6, 7), dtype=np.uint16)
    first, *rest = [Image.fromarray(page) for page in pages]
    data = encoded(first, "TIFF", save_all=True, append_images=rest)
    assert np.array_equal(decode(data, 4), eight_bits(pages.transpose(1, 2, 0)))
    assert np.array_equal(decode(data, 1)[:, :, 0], eight_bits(pages[0])), "one channel: the first page"
    with pytest.raises(BrokenPicture, match="1 channels where 5"):
        decode(data, 5)
    other = encoded(first, "TIFF", save_all=True, append_images=[Image.fromarray(pages[1, :3]), *rest[1:]])
    with pytest.raises(BrokenPicture, match="several sizes"):
        decode(other, 4)
