"""ResNets whose batch normalisation, addition and ReLU are one pass over memory when they train on a CPU.

The networks are timm's, with timm's parameters, names and results: only how their parts are called differs, and only
where compiled code can do it (`ssd.native.norm.fits`).
"""

from typing import Any

from timm.models import checkpoint_seq
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ssd.native.norm import fits, norm_act


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.BatchNorm2d) and fits(x, norm):
        return norm_act(x, norm, relu=False)
    return norm(x)


def activated(x: Tensor, norm: nn.Module, act: nn.Module, residual: Tensor | None = None) -> Tensor:
    """act(norm(x) + residual)"""
    if isinstance(norm, nn.BatchNorm2d) and isinstance(act, nn.ReLU) and fits(x, norm, residual):
        return norm_act(x, norm, residual)
    x = norm(x)
    if residual is not None:
        x = x + residual
    return act(x)


def joined(block: Any, x: Tensor, shortcut: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
    """The end of a residual block: its branch normalised, the shortcut added, activated."""
    if block.downsample is not None:
        *layers, last = block.downsample
        for layer in layers:
            shortcut = layer(shortcut)
        shortcut = normalised(shortcut, last)
    if block.se is None and block.drop_path is None:
        return activated(x, norm, act, shortcut)
    x = normalised(x, norm)
    if block.se is not None:
        x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    return act(x + shortcut)


class FusedBasicBlock(BasicBlock):
    aa: Any

    def forward(self, x: Tensor) -> Tensor:
        inner = self.aa(activated(self.conv1(x), self.bn1, self.act1))
        return joined(self, self.conv2(inner), x, self.bn2, self.act2)


class FusedBottleneck(Bottleneck):
    aa: Any

    def forward(self, x: Tensor) -> Tensor:
        inner = activated(self.conv1(x), self.bn1, self.act1)
        inner = self.aa(activated(self.conv2(inner), self.bn2, self.act2))
        return joined(self, self.conv3(inner), x, self.bn3, self.act3)


class FusedResNet(ResNet):
    maxpool: Any
    layer1: Any
    layer2: Any
    layer3: Any
    layer4: Any

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(activated(self.conv1(x), self.bn1, self.act1))
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x


FUSED: dict[type, type] = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck, ResNet: FusedResNet}


def fuse(model: nn.Module) -> None:
    """Gives the ResNet parts of a timm model their fused calls. Its parameters and their names stay."""
    for module in model.modules():
        # an operation between normalisation and activation keeps a block as it is
        if type(module) in FUSED and isinstance(getattr(module, "drop_block", None) or nn.Identity(), nn.Identity):
            module.__class__ = FUSED[type(module)]
