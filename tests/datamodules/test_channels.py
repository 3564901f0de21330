"""Pictures of other channels and depths, from their files to trained weights and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import Images
from lightning_modules.dino import DINO
from ssd.backbones.vit import ViT
from ssd.verbs.loading import load_data, load_module
from ssd.verbs.probe import features_of
from tests.data.files import encoded, write
from tests.lightning_modules.runs import HEAD, VIEWS, VIT, fit

CLASSES = ("dim", "bright")


def scan(number: int, channels: int) -> np.ndarray:
    """(24, 24, channels) uint16 in a sixth of its range; the second half of the pictures is brighter."""
    rng = np.random.default_rng(number)
    top = 800 * (1 + np.arange(channels)) * (1 + number % 2)
    return rng.integers(300, 300 + top, (24, 24, channels)).astype(np.uint16)


def save(folder, number: int, kind: str) -> None:
    path = folder / CLASSES[number % 2] / f"{number:02}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "npy":
        np.save(path.with_suffix(".npy"), scan(number, 13))
    elif kind == "tiff":
        write(path.with_suffix(".tif"), encoded(scan(number, 1)[:, :, 0], "TIFF"))
    else:
        first, *rest = [Image.fromarray(page) for page in scan(number, 4).transpose(2, 0, 1)]
        write(path.with_suffix(".tif"), encoded(first, "TIFF", save_all=True, append_images=rest))


@pytest.mark.parametrize(("kind", "channels"), [("npy", 13), ("tiff", 1), ("pages", 4)])
def test_a_run_from_rgb_weights_on_other_channels_and_a_look_at_it_again(tmp_path, kind, channels):
    for number in range(40):
        save(tmp_path / "scans", number, kind)
    torch.manual_seed(0)
    torch.save(ViT("vit_tiny_patch16_224", img_size=16, arguments=VIT).model.state_dict(), tmp_path / "rgb.pth")
    with pytest.warns(UserWarning, match="red, green and blue"):
        backbone = ViT(
            "vit_tiny_patch16_224", img_size=16, in_chans=channels, weights=str(tmp_path / "rgb.pth"), arguments=VIT
        )
    before = backbone.model.patch_embed.proj.weight.detach().clone()
    data = Images(tmp_path / "scans", channels=channels, value_range="data", batch_size=12, num_workers=0)
    module = DINO(backbone, views=VIEWS, **HEAD, lr=1e-3, lr_rule="none")
    fit(tmp_path / "run", module, data, max_epochs=2)

    assert module.step == 6 and module.skipped_steps == 0
    after = module.student.backbone.model.patch_embed.proj.weight.detach()
    assert ((after - before).abs().amax((0, 2, 3)) > 1e-5).all(), "every channel was learned from"
    # measured on the data: a channel of either class fills its own range
    np.testing.assert_allclose(data.levels.high, 300 + 1600 * (1 + np.arange(channels)), rtol=0.02)
    np.testing.assert_allclose(data.levels.low, 300, atol=20)
    assert all(0.3 < mean < 0.45 and std > 0.2 for mean, std in zip(data.mean, data.std, strict=True))

    again, about = load_module(tmp_path / "run" / "checkpoints" / "last.ckpt")
    bank, queries = features_of(again.evaluated_backbone, load_data([], about, "probe"), ["knn"], "", device="cpu")
    assert len(bank.labels) == 36 and len(queries.labels) == 4 and bank.features.isfinite().all()
    pictures = next(iter(data.test_dataloader()[0]))["sample"]
    with torch.no_grad():
        expected = module.eval().evaluated_backbone(pictures).pooled()
    torch.testing.assert_close(bank.features[: len(pictures)], expected, atol=1e-5, rtol=1e-5)
