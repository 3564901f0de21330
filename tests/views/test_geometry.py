"""Crops are those of Pillow and torchvision, and the centre of an evaluation picture is theirs too."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resized_crop

from ssd.views.geometry import crop_views, evaluation_picture
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
def test_crops_are_torchvisions_exactly(name):
    image, views = PICTURES[name]
    planar = torch.from_numpy(image.copy()).permute(2, 0, 1)
    boxes, _ = draw(views, *image.shape[:2], 0, 0, 0)
    for kind, pictures in crop_views(image, boxes, views).items():
        for (left, top, width, height, flip), picture in zip(boxes[kind].astype(int), pictures, strict=True):
            size = list(picture.shape[-2:])
            theirs = resized_crop(planar, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True)
            torch.testing.assert_close(picture, theirs.flip(-1) if flip else theirs, rtol=0, atol=0)


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
