"""Each output against timm's own way to the same vector."""

import pytest
import torch
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.evaluation.outputs import outputs_of, parts_of

SMALL = {"depth": 5, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}


def answered(backbone, pictures):
    with torch.no_grad():
        parts = parts_of(backbone, pictures)
    outputs = outputs_of(parts)
    return {name: torch.cat([parts[part] for part in names], 1) for name, names in outputs.items()}


@pytest.fixture
def pictures():
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_outputs_of_a_vit_are_those_of_timms_intermediate_layers(pictures):
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=(16, 24), arguments=SMALL | {"reg_tokens": 2}).eval()
    found = answered(backbone, pictures)
    with torch.no_grad():
        layers = backbone.model.get_intermediate_layers(pictures, n=4, norm=True, return_prefix_tokens=True)
    cls = [prefix[:, 0] for _, prefix in layers]
    mean = layers[-1][0].mean(1)
    expected = {
        "cls": cls[-1],
        "mean_patch": mean,
        "cls+mean_patch": torch.cat([cls[-1], mean], 1),
        "last4_cls": torch.cat(cls, 1),
        "last4_cls+mean_patch": torch.cat([*cls, mean], 1),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_a_vit_without_a_class_token_has_mean_patches_of_its_last_blocks(pictures):
    arguments = SMALL | {"class_token": False, "depth": 2}
    backbone = ViT("vit_tiny_patch16_224", img_size=(16, 24), arguments=arguments).eval()
    found = answered(backbone, pictures)
    with torch.no_grad():
        layers = backbone.model.get_intermediate_layers(pictures, n=2, norm=True)
    assert list(found) == ["mean_patch", "last2_mean_patch"]
    assert_close(found["last2_mean_patch"], torch.cat([layer.mean(1) for layer in layers], 1), atol=1e-5, rtol=1e-4)


def test_outputs_of_a_convnet_are_its_pooling_and_the_means_of_its_stages(pictures):
    backbone = ConvNet("resnet18", arguments=RESNET).eval()
    found = answered(backbone, pictures)
    with torch.no_grad():
        maps = backbone.model.forward_intermediates(pictures, indices=4, intermediates_only=True)
        pooled = backbone.model(pictures)
    assert list(found) == ["pooled", "last2_stages", "last4_stages"]
    assert_close(found["pooled"], pooled)
    means = [each.mean((2, 3)) for each in maps]
    assert_close(found["last2_stages"], torch.cat(means[-2:], 1))
    assert_close(found["last4_stages"], torch.cat(means[-4:], 1))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViT("vit_tiny_patch16_224", img_size=16, arguments=SMALL | {"depth": 1}),
        lambda: ViT("vit_tiny_patch16_224", img_size=16, arguments=SMALL | {"class_token": False}),
        lambda: ViT("vit_small_patch16_dinov3", img_size=16, arguments={"depth": 2}),
        lambda: ConvNet("resnet18", arguments=RESNET),
        lambda: ConvNet("convnext_atto", arguments={"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 16]}),
    ],
    ids=["one block", "no class token", "rotary", "resnet", "convnext"],
)
def test_the_first_output_is_the_networks_own(build):
    backbone = build().eval()
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = next(iter(answered(backbone, pictures).values()))
    with torch.no_grad():
        assert_close(own, backbone(pictures).pooled())
