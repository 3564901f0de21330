"""Tiny backbones with weights that hide nothing: no zeros, no scales of 1e-6."""

import torch
from torch import Tensor
from torch.testing import assert_close

from ssd.backbones.base import Backbone
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 2}
RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48], "patch_size": 2}


def disturbed(backbone: Backbone, seed: int = 0) -> Backbone:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator) + (0.1 if "running_var" in key else 0))
    return backbone.eval()


def tiny_vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **settings) -> ViT:
    return disturbed(ViT(name, arguments={**TINY, **settings.pop("arguments", {})}, **settings), seed)


def tiny_resnet(seed: int = 0, **settings) -> ConvNet:
    return disturbed(ConvNet("resnet18", arguments=RESNET, **settings), seed)


def tiny_convnext(seed: int = 0, **settings) -> ConvNet:
    return disturbed(ConvNet("convnext_atto", arguments=CONVNEXT, **settings), seed)


def tiny_swin(name: str = "swin_tiny_patch4_window7_224", seed: int = 0, **settings) -> ConvNet:
    arguments = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    return disturbed(ConvNet(name, arguments=arguments, **settings), seed)


def pictures(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def same(ours, reference, size: int = 32) -> None:
    x = pictures(reference.in_chans, size)
    assert_close(ours.eval()(x).patches, reference(x).patches, atol=0, rtol=0)
    assert_close(ours(x).pooled(), reference(x).pooled(), atol=0, rtol=0)


def again(reference: ViT, weights, **settings) -> ViT:
    arguments = {**TINY, **settings.pop("arguments", {})}
    return ViT(reference.name, weights=str(weights), arguments=arguments, **settings)
