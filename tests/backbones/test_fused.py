"""Fused or not, a ResNet answers, learns and counts its statistics alike."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.fused import FusedBasicBlock, FusedBottleneck, fuse
from ssd.native import norm as native

pytestmark = pytest.mark.skipif(native.functions() is None, reason="no C compiler is at hand, so that nothing is fused")

SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_width": 8}


def pair(name: str, **arguments) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, **arguments)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


def pictures(batch: int = 4, side: int = 64) -> torch.Tensor:
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def learn(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    features = model.forward_features(x)
    weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float32).view(features.shape)
    (features.float() * weights).sum().backward()
    return features.detach().float(), x.grad, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("resnet18", SMALL),
        ("resnet18", SMALL | {"avg_down": True, "zero_init_last": False}),
        ("resnet50", {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}),
        ("seresnet18", {"layers": (1, 1, 1, 1)}),
        ("resnet18", SMALL | {"drop_path_rate": 0.5}),
        ("resnet18", SMALL | {"drop_block_rate": 0.1}),
        ("resnet18d", {"layers": [1, 1, 1, 1]}),
        ("resnetblur18", {"layers": [1, 1, 1, 1]}),
    ],
)
def test_a_fused_network_is_the_network(name, arguments):
    plain, fused = (model.double().float().train() for model in pair(name, **arguments))
    assert list(plain.state_dict()) == list(fused.state_dict())
    found = []
    for model in (plain, fused):
        torch.manual_seed(3)  # of what is dropped
        found.append(learn(model, pictures()))
    (features, gradient, gradients), (fused_features, fused_gradient, fused_gradients) = found
    assert_close(fused_features, features, rtol=1e-3, atol=1e-3 * features.abs().max().item())
    # a value within rounding of zero may pass a ReLU in one and not in the other
    for name, expected in gradients.items() | {("input", gradient)}:
        ours = fused_gradient if name == "input" else fused_gradients[name]
        assert (ours - expected).norm() < 2e-2 * expected.norm() + 1e-5, name
    for name, expected in plain.state_dict().items():
        assert_close(fused.state_dict()[name], expected, rtol=1e-4, atol=1e-4)
    plain.eval(), fused.eval()
    with torch.no_grad():
        assert_close(fused(pictures()), plain(pictures()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 16, 64, 192])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_one_layer_is_normalisation_addition_and_relu_to_rounding(kind, channels, with_residual, relu):
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        values = torch.randn(4, channels, 8, 8, generator=generator) * 2 + 1
        return values.to(kind).contiguous(memory_format=torch.channels_last).requires_grad_()

    x, residual, gradient = drawn(), drawn() if with_residual else None, drawn().detach()
    layer = nn.BatchNorm2d(channels)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    assert native.fits(x, layer, residual)
    out = native.norm_act(x, layer, residual, relu=relu)
    out.backward(gradient)

    # the same in float64, with the ReLU open where it was
    exact = x.detach().double().requires_grad_()
    other = None if residual is None else residual.detach().double().requires_grad_()
    twin = copy.deepcopy(layer).double()
    twin.zero_grad()
    twin.reset_running_stats()
    expected = twin(exact) + (0 if other is None else other)
    if relu:
        assert ((out > 0) != (expected > 0)).sum() <= 2
        expected = expected * (out > 0)
    expected.backward(gradient.double())
    close = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    assert_close(out.double(), expected, **close)
    assert_close(x.grad.double(), exact.grad, **close)
    if other is not None:
        assert_close(residual.grad.double(), other.grad, **close)
    assert_close(layer.weight.grad.double(), twin.weight.grad, rtol=1e-4, atol=1e-3)
    assert_close(layer.bias.grad.double(), twin.bias.grad, rtol=1e-4, atol=1e-3)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(layer, name).double(), getattr(twin, name), rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(bad, kind):
    x = torch.randn(4, 16, 8, 8).to(kind).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = bad
    out = native.norm_act(x.requires_grad_(), nn.BatchNorm2d(16))
    assert not out[:, 3].isfinite().any() and out[:, :3].isfinite().all() and out[:, 4:].isfinite().all()


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_share_the_rows_and_change_nothing(monkeypatch, openmp):
    if openmp and native.team()[0] is None:
        pytest.skip("torch came without an OpenMP that can be asked")
    if not openmp:
        monkeypatch.setattr(native, "team", lambda: (None, None, None))
    x = torch.randn(8, 16, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = nn.BatchNorm2d(16)
    alone = native.norm_act(x, copy.deepcopy(layer))
    monkeypatch.setattr(native.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(native, "SMALLEST_SHARE", 1000)
    assert_close(native.norm_act(x, layer), alone, rtol=1e-6, atol=1e-6)


def test_blocks_are_fused_where_they_can_be_and_layers_where_they_train():
    backbone = ConvNet("resnet18", small_stem=True, arguments=SMALL)
    assert any(isinstance(module, FusedBasicBlock) for module in backbone.modules())
    assert any(isinstance(m, FusedBottleneck) for m in ConvNet("resnet50").modules())
    with_dropped_blocks = ConvNet("resnet18", arguments=SMALL | {"drop_block_rate": 0.1})
    assert not any(isinstance(m, FusedBasicBlock) for m in with_dropped_blocks.model.layer4.modules())
    layer, x = nn.BatchNorm2d(16), torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert native.fits(x, layer)
    assert not native.fits(x, layer.eval())
    assert not native.fits(x.contiguous(), nn.BatchNorm2d(16))
    assert not native.fits(x, nn.SyncBatchNorm(16))
    assert not native.fits(x.double(), nn.BatchNorm2d(16))
    assert not native.fits(x, nn.BatchNorm2d(16), x.to(torch.bfloat16))
    assert not native.fits(x[:1, :, :1, :1], nn.BatchNorm2d(16))
    assert not native.fits(x[:, :12].contiguous(memory_format=torch.channels_last), nn.BatchNorm2d(12))


def test_views_of_two_sizes_learn_where_one_is_fused_and_the_other_is_not():
    """Pictures of 9 give maps that do not divide into tiles; torch normalises those, and its backward pass keeps the running
    statistics, which the fused pass over the other view writes afterwards."""
    plain, fused = (model.train() for model in pair("resnet18", **SMALL))
    odd, even = pictures(9, 32), pictures(64, 32)
    for model in (plain, fused):
        answers = [model.forward_features(x).square().sum() for x in (odd, even)]
        sum(answers).backward()
    for (name, theirs), (_, ours) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-3 * theirs.grad.norm(), name
    for (name, theirs), (_, ours) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_pictures_of_one_channel_are_fused_as_well(monkeypatch):
    calls = []
    fits = native.fits
    monkeypatch.setattr("ssd.backbones.fused.fits", lambda *a: calls.append(fits(*a)) or calls[-1])
    backbone = ConvNet("resnet18", in_chans=1, arguments=SMALL).train()
    x = torch.randn(64, 1, 32, 32)
    answer = backbone(x).pooled()
    assert calls and all(calls)
    monkeypatch.setattr("ssd.backbones.convnet.in_channels_last", lambda x: x)
    assert_close(backbone(x).pooled(), answer, atol=1e-4, rtol=1e-4)
