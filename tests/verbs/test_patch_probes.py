"""The measures of every patch, from a datamodule as `ssd probe` prepares it."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from datamodules.digits import Digits
from datamodules.images import Images
from ssd.batch import Tokens
from ssd.errors import UserError
from ssd.evaluation.dense import pixel_patches
from ssd.verbs import patch_probes
from ssd.verbs.patch_probes import attentive_of, check_grid, segmentation_of
from ssd.views.recipes import PlainViews

VIEWS = PlainViews(size=32, evaluation_size=32, evaluation_crop=1.0)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Sixty steps are enough for what is asked here."""
    for name in ("attentive_numbers", "segmentation_numbers"):
        monkeypatch.setattr(patch_probes, name, partial(getattr(patch_probes, name), min_steps=60))


@pytest.fixture
def shapes(tmp_path):
    """Pictures of noise with a dark band and a bright disc, 48 x 32, and their maps; a margin of each has no label."""
    random = np.random.default_rng(0)
    for number in range(30):
        labels = Image.new("P", (48, 32), 0)
        labels.putpalette([random.integers(256) for _ in range(768)])
        pen = ImageDraw.Draw(labels)
        top, left = random.integers(0, 20), random.integers(8, 24)
        pen.rectangle((0, top, 47, top + 9), fill=1)
        pen.ellipse((left, 8, left + 16, 24), fill=2)
        pen.rectangle((0, 0, 9, 31), fill=255)
        level = np.array([120, 30, 220, 0])[np.minimum(np.array(labels), 3)]
        picture = np.clip(level[..., None] + random.normal(0, 12, (32, 48, 3)), 0, 255).astype(np.uint8)
        for kind, image in (("pictures", Image.fromarray(picture)), ("maps", labels)):
            (tmp_path / kind).mkdir(exist_ok=True)
            image.save(tmp_path / kind / f"{number}.png")
    return tmp_path


def prepared(path, **settings):
    data = Images(path, batch_size=8, num_workers=0, **settings)
    data.prepare(VIEWS)
    return data


def brightness(pictures):
    """Mean and spread of every 4 x 4 patch, and the square of the mean: enough to tell the three levels apart."""
    tokens = pixel_patches(pictures, 4)
    mean, spread = tokens.patches.mean(2), tokens.patches.std(2)
    return Tokens(patches=torch.stack([mean, mean.square(), spread], 2), grid=tokens.grid)


def test_pictures_and_maps_are_laid_over_each_other(shapes):
    numbers = {
        number.name: number
        for number in segmentation_of(brightness, prepared(shapes / "pictures"), str(shapes / "maps"))
    }
    for name in ("segmentation/linear", "segmentation/knn"):
        # discs are round and patches are square
        assert numbers[f"{name}/miou"].value > 0.75 > 0.5 > numbers[f"{name}/miou"].chance
        assert numbers[f"{name}/pixel_accuracy"].value > 0.88
    assert numbers["segmentation/knn/miou"].protocol == (
        "segmentation-knn-v1 k=20 T=0.07, at most 1536 patches, 8x8 patches, 32x32 px"
    )


def test_maps_of_other_pictures_are_no_use(shapes):
    """The same maps, each under the name of another picture."""
    maps = [(shapes / "maps" / f"{number}.png").read_bytes() for number in range(30)]
    for number in range(30):
        (shapes / "maps" / f"{number}.png").write_bytes(maps[(number + 7) % 30])
    numbers = segmentation_of(brightness, prepared(shapes / "pictures"), str(shapes / "maps"))
    assert all(number.value < 0.5 for number in numbers if number.name.endswith("miou"))


def test_the_attentive_probe_takes_any_network_of_patches():
    data = Digits(limit=200, num_workers=0)
    data.prepare(PlainViews(size=16, evaluation_size=16, evaluation_crop=1.0))
    (number,) = attentive_of(lambda pictures: pixel_patches(pictures, 8), data)
    # where a stroke lies tells digits apart, and attention knows no places: each quarter by itself tells some
    assert number.value > 0.5 and "4 patches" in number.protocol


def test_what_cannot_be_probed_is_said(shapes):
    data = prepared(shapes / "pictures")
    with pytest.raises(UserError, match="no labels, which the attentive probe needs"):
        attentive_of(brightness, data)
    with pytest.raises(UserError, match="a grid of 3 x 3 patches of pictures of 32 px"):
        check_grid((3, 3), 32)
    (shapes / "maps" / "7.png").unlink()
    with pytest.raises(UserError, match=r"1 of \d+ pictures have no label map"):
        segmentation_of(lambda _: pytest.fail("a network ran"), data, str(shapes / "maps"))
    digits = Digits(limit=50, num_workers=0)
    digits.prepare(PlainViews(size=16, evaluation_size=16, evaluation_crop=1.0))
    with pytest.raises(UserError, match="1 patch a sample"):
        attentive_of(lambda pictures: pixel_patches(pictures, 16), digits)
