"""Crops are those of Pillow and torchvision, and the centre of an evaluation picture is theirs too."""

import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resized_crop

from ssd.native import views as native
from ssd.views.geometry import crop_into, crop_views, evaluation_picture
from ssd.views.parameters import draw
from ssd.views.recipes import DINOViews, PlainViews, views_named


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def small_photo() -> np.ndarray:
    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((32, 32)))


PICTURES = {
    "photo": (load_sample_image("china.jpg")[:375, :500], DINOViews(local_count=3)),
    "small photo": (small_photo(), views_named("dino_small")),
    "noise": (noise(48, 64), DINOViews(global_size=32, local_size=16, local_count=3)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_crops_are_pillows_to_a_grey_level(name):
    image, views = PICTURES[name]
    from_pillow, from_exact, pillow_from_exact = [], [], []
    for index in range(10):
        boxes, _ = draw(views, *image.shape[:2], 0, 0, index)
        for kind, pictures in crop_views(image, boxes, views).items():
            for (left, top, width, height, flip), picture in zip(boxes[kind].astype(int), pictures, strict=True):
                size = picture.shape[-2:]
                cut = image[top : top + height, left : left + width]
                pillow = np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BICUBIC)).astype(float)
                planes = torch.from_numpy(cut.astype(np.float32)).permute(2, 0, 1)[None]
                exact = F.interpolate(planes, size=size, mode="bicubic", antialias=True)[0].clamp(0, 255)
                exact = exact.permute(1, 2, 0).numpy()
                ours = (picture.flip(-1) if flip else picture).permute(1, 2, 0).numpy()
                from_pillow.append(np.abs(ours - pillow).ravel())
                from_exact.append(np.abs(ours - exact).ravel())
                pillow_from_exact.append(np.abs(pillow - exact).ravel())
    difference = np.concatenate(from_pillow)
    assert difference.mean() < 0.05
    # both round and clip between rows and columns; on white noise, which overshoots a lot, that shows
    assert (difference > 1).mean() < (5e-3 if name == "noise" else 1e-4)
    assert np.concatenate(from_exact).mean() < np.concatenate(pillow_from_exact).mean() + 0.01


@pytest.mark.parametrize("name", PICTURES)
def test_crops_are_torchvisions(name, made_by):
    """By torch to the bit; compiled code weighs in floats where torchvision has 8 bits or so, and is nearer to Pillow."""
    image, views = PICTURES[name]
    planar = torch.from_numpy(image.copy()).permute(2, 0, 1)
    boxes, _ = draw(views, *image.shape[:2], 0, 0, 0)
    for kind, pictures in crop_views(image, boxes, views).items():
        for (left, top, width, height, flip), picture in zip(boxes[kind].astype(int), pictures, strict=True):
            size = list(picture.shape[-2:])
            theirs = resized_crop(planar, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True)
            theirs = theirs.flip(-1) if flip else theirs
            if made_by == "torch":
                assert torch.equal(picture, theirs)
            else:
                torch.testing.assert_close(picture.int(), theirs.int(), rtol=0, atol=2)
                assert (picture != theirs).float().mean() < 0.01


@pytest.mark.parametrize("name", PICTURES)
def test_compiled_crops_are_pillows_but_for_rounding(name, made_by):
    if made_by == "torch":
        pytest.skip("torch's weights have fewer bits")
    image, views = PICTURES[name]
    for index in range(10):
        boxes, _ = draw(views, *image.shape[:2], 0, 0, index)
        for kind, pictures in crop_views(image, boxes, views).items():
            for (left, top, width, height, flip), picture in zip(boxes[kind].astype(int), pictures, strict=True):
                cut = Image.fromarray(image[top : top + height, left : left + width])
                size = picture.shape[-1]
                # rows first, as Pillow did until it began to choose the cheaper way round
                across = cut.resize((size, height), Image.Resampling.BICUBIC)
                pillow = np.asarray(across.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
                ours = (picture.flip(-1) if flip else picture).permute(1, 2, 0).numpy()
                # sums within a millionth of a half may go either way, and one level early on moves its neighbours
                assert (ours != pillow).mean() < 5e-3 and np.abs(ours - pillow).max() <= 2


@pytest.mark.parametrize("size", [1, 5, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_any_size_and_every_corner_of_a_small_picture(size, channels, made_by, monkeypatch):
    """What the last pixels of rows, strips and the picture give must not depend on how many fit a vector."""
    if made_by == "torch":
        pytest.skip("compared once")
    image = noise(7, 9, channels)
    boxes = np.array([[0, 0, 9, 7, 0], [8, 6, 1, 1, 0], [3, 1, 6, 6, 1], [0, 6, 9, 1, 1], [8, 0, 1, 7, 0]], np.float32)
    out = torch.zeros(len(boxes), channels, size, size, dtype=torch.uint8)
    crop_into(image, boxes, out)
    expected = torch.zeros_like(out)
    monkeypatch.setattr(native, "available", lambda: False)
    crop_into(image, boxes, expected)
    torch.testing.assert_close(out.int(), expected.int(), rtol=0, atol=2)
    assert (out.int() - expected.int()).float().abs().mean() < 0.02


def before_a_forbidden_page(picture: np.ndarray) -> np.ndarray:
    """The picture, its last byte the last one that may be read: behind it lies a page without any rights."""
    size = -(-picture.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0
    assert ctypes.CDLL(None).mprotect(*forbidden) == 0
    placed = np.frombuffer(memory, np.uint8, picture.nbytes, size - picture.nbytes).reshape(picture.shape)
    placed[...] = picture
    return placed


def crop_at_the_ends(size: int, channels: int) -> None:
    faulthandler.disable()
    for height, width in ((7, 9), (5, 1), (1, 6), (1, 1), (64, 64)):
        right, low = width - 1, height - 1
        boxes = np.array(
            [[0, 0, width, height, 0], [right, 0, 1, height, 0], [right, low, 1, 1, 1], [0, low, width, 1, 0]]
        )
        picture = noise(height, width, channels)
        made = [torch.zeros(len(boxes), channels, size, size, dtype=torch.uint8) for _ in range(2)]
        native.crops(before_a_forbidden_page(picture), boxes, made[0])
        native.crops(picture, boxes, made[1])
        assert torch.equal(*made)


def read_one_byte_too_far() -> None:
    faulthandler.disable()
    picture = before_a_forbidden_page(noise(7, 9))
    ctypes.string_at(picture.ctypes.data, picture.nbytes + 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that may die is forked")
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_nothing_behind_the_picture_is_read(channels, made_by):
    if made_by == "torch":
        pytest.skip("reads by itself")
    tried = [(crop_at_the_ends, (size, channels), 0) for size in (1, 16, 33)]
    for target, given, expected in [*tried, (read_one_byte_too_far, (), -signal.SIGSEGV)]:
        process = multiprocessing.get_context("fork").Process(target=target, args=given)
        process.start()
        process.join()
        assert process.exitcode == expected


def test_what_cannot_be_cropped_is_refused(made_by):
    if made_by == "torch":
        pytest.skip("torch refuses by itself")
    image, out = noise(20, 30), torch.empty(1, 3, 8, 8, dtype=torch.uint8)
    for box in ([25, 0, 8, 8, 0], [0, 15, 8, 8, 0], [-1, 0, 8, 8, 0], [0, 0, 0, 8, 0]):
        with pytest.raises(ValueError, match="box"):
            crop_into(image, np.array([box], np.float32), out)
    with pytest.raises(ValueError, match="contiguous"):
        crop_into(image, np.zeros((1, 5), np.float32), out.mT)
    with pytest.raises(ValueError, match="picture"):
        crop_into(image[:, :, :1], np.array([[0, 0, 8, 8, 0]], np.float32), out)


def test_a_crop_of_the_views_own_size_is_the_bytes_themselves():
    image = noise(20, 30)
    boxes = {"global": np.array([[7, 3, 8, 8, 0], [7, 3, 8, 8, 1]], dtype=np.float32)}
    views = crop_views(image, boxes, PlainViews(size=8))["global"]
    expected = torch.from_numpy(image[3:11, 7:15].transpose(2, 0, 1).copy())
    torch.testing.assert_close(views, torch.stack([expected, expected.flip(-1)]), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_each_channel_is_resized_by_itself(channels):
    image, views = noise(40, 50, channels), DINOViews(global_size=16, local_size=8, local_count=2)
    boxes, _ = draw(views, 40, 50, 0, 0, 0)
    together = crop_views(image, boxes, views)
    for channel in range(channels):
        alone = crop_views(image[:, :, channel : channel + 1], boxes, views)
        for kind in alone:
            # kernels for different channel counts round differently
            torch.testing.assert_close(together[kind][:, channel].int(), alone[kind][:, 0].int(), rtol=0, atol=1)


def test_arrays_that_torch_cannot_hold_are_read_without_a_warning():
    image = noise(20, 30)
    frozen = image.copy()
    frozen.flags.writeable = False
    mirrored = image[:, ::-1].copy()[:, ::-1]
    boxes, _ = draw(PlainViews(size=8), 20, 30, 0, 0, 0)
    expected = crop_views(image, boxes, PlainViews(size=8))["global"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (frozen, mirrored):
            torch.testing.assert_close(crop_views(same, boxes, PlainViews(size=8))["global"], expected)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (333, 500), (20, 31), (32, 32)])
@pytest.mark.parametrize("size, crop, short", [(224, 0.875, 256), (32, 1.0, 32), (96, 0.875, 110)])
def test_evaluation_pictures_are_resized_and_centred_like_torchvisions(height, width, size, crop, short):
    image = noise(height, width)
    customary = v2.Compose([v2.Resize(short, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
    expected = customary(torch.from_numpy(image).permute(2, 0, 1))
    torch.testing.assert_close(evaluation_picture(image, size, crop), expected, rtol=0, atol=0)


def test_evaluation_without_a_crop_keeps_a_small_picture_as_it_is():
    image = noise(32, 32)
    expected = torch.from_numpy(image.transpose(2, 0, 1).copy())
    torch.testing.assert_close(evaluation_picture(image, 32, 1.0), expected, rtol=0, atol=0)
