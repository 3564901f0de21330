import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssd.backbones.base import set_drop_path_zero
from ssd.backbones.convnet import ConvNet
from ssd.errors import UserError
from ssd.record import build, describe

NETWORKS = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48], "patch_size": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "swinv2_tiny_window8_256": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str, **settings) -> ConvNet:
    torch.manual_seed(0)
    backbone = ConvNet(name, arguments={**NETWORKS.get(name, {}), **settings.pop("arguments", {})}, **settings).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():  # layer scales of 1e-6 would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


@each_network
@pytest.mark.parametrize("size", [(96, 64), (224, 224)])
def test_answers_what_timm_answers_at_any_size(name, size):
    backbone = network(name)
    x = torch.randn(2, 3, *size)
    tokens = backbone(x)
    assert_close(tokens.pooled(), backbone.model(x))
    features = backbone.model.forward_features(x)
    rows, columns = backbone.grid(*size)
    assert tokens.grid == (rows, columns) == (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
    last = features if name.startswith("swin") else features.permute(0, 2, 3, 1)
    assert_close(tokens.patches[:, columns + 1], last[:, 1, 1])  # row-major
    assert tokens.patches.shape[-1] == backbone.embed_dim


@each_network
def test_the_grid_is_foretold_where_the_stride_does_not_divide(name):
    backbone = network(name)
    backbone.padding_said = True
    for height, width in ((72, 100), (36, 33)):
        assert backbone.grid(height, width) == backbone(torch.randn(2, 3, height, width)).grid
    assert next(backbone.parameters()).device.type == "cpu"


@each_network
def test_taps_are_the_maps_of_the_stages_and_change_nothing(name):
    backbone = network(name)
    x = torch.randn(2, 3, 64, 64)
    maps = {}
    for number, stage in enumerate(backbone.blocks, 1):
        stage.register_forward_hook(lambda module, given, output, number=number: maps.update({number: output}))
    tokens = backbone(x, taps=(4, 2, 1))
    assert sorted(tokens.taps) == ["block1", "block2", "block4"]
    for number in (1, 2):
        expected = maps[number].permute(0, 3, 1, 2) if name.startswith("swin") else maps[number]
        assert_close(tokens.taps[f"block{number}"], expected, atol=0, rtol=0)
    assert_close(tokens.patches, backbone(x).patches, atol=0, rtol=0)
    assert_close(tokens.summary, backbone(x).summary, atol=0, rtol=0)


@each_network
def test_every_parameter_gets_a_gradient(name):
    backbone = network(name).train()
    tokens = backbone(torch.randn(4, 3, 64, 64))
    (tokens.pooled().square().sum() + tokens.patches.square().sum()).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@each_network
def test_any_number_of_channels(name):
    backbone = network(name, in_chans=5)
    x = torch.randn(2, 5, 64, 64, requires_grad=True)
    backbone(x).pooled().square().sum().backward()
    assert (x.grad.abs().amax((0, 2, 3)) > 0).all()


def test_the_small_stem_keeps_four_times_the_resolution_and_starts_like_timms():
    backbone = ConvNet("resnet18", small_stem=True)
    assert backbone.patch_size == 8
    assert backbone(torch.randn(2, 3, 32, 32)).grid == backbone.grid(32, 32) == (4, 4)
    assert backbone.grid(30, 17) == backbone(torch.randn(2, 3, 30, 17)).grid
    # fan-out variance 2 / (64 * 9); 1728 draws know it to 3.4 %
    assert_close(backbone.model.conv1.weight.var(), torch.tensor(2 / (64 * 9)), rtol=0.15, atol=0)
    rebuilt = ConvNet("resnet18")
    exec("\n".join(backbone.describe_timm()["edits"]), {"torch": torch, "model": rebuilt.model})
    rebuilt.model.load_state_dict(backbone.model.state_dict())


def test_without_its_drops_a_network_in_train_mode_is_the_one_in_eval_mode():
    backbone = network("convnext_atto", drop_path_rate=0.5, arguments={"drop_rate": 0.5})
    x = torch.randn(2, 3, 64, 64)
    expected = backbone(x).summary
    backbone.train()
    assert not torch.allclose(backbone(x).summary, expected)
    set_drop_path_zero(backbone)
    assert_close(backbone(x).summary, expected)
    resnet = ConvNet("resnet18", arguments={**NETWORKS["resnet18"], "drop_rate": 0.5})
    set_drop_path_zero(resnet)
    assert resnet.model.drop_rate == 0


def test_no_drop_path_unless_asked():
    """timm's Swin drops a tenth of its paths by default."""
    modules = network("swin_tiny_patch4_window7_224").modules()
    assert not any(getattr(module, "drop_prob", 0) for module in modules)


def test_swin_in_bfloat16_on_the_cpu_uses_plain_attention(monkeypatch):
    backbone, calls = network("swin_tiny_patch4_window7_224"), []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 64, 64))
    assert not calls
    backbone(torch.randn(1, 3, 64, 64))
    assert len(calls) == 4


def test_a_record_rebuilds_the_network():
    backbone = network("resnet18", small_stem=True, in_chans=1)
    again = build(describe(backbone)).eval()
    again.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 1, 32, 32)
    assert_close(again(x).summary, backbone(x).summary)


@pytest.mark.parametrize("asked", ["masked", "visible", "until"])
def test_what_a_convnet_cannot_do_names_it_and_what_to_use(asked):
    backbone = network("resnet18")
    value = 1 if asked == "until" else torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(UserError, match=f"'{asked}'.*resnet18.*Use .*ViT"):
        backbone(torch.randn(1, 3, 32, 32), **{asked: value})
    with pytest.raises(UserError, match=f"iBOT needs .*'{asked}'.*ConvNet 'resnet18'"):
        backbone.require(asked, by="iBOT")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnt50"}, "resnet50"),
        ({"name": "vit_tiny_patch16_224"}, "Use ViT"),
        ({"name": "convnext_atto", "small_stem": True}, "small_stem.*patch_size: 2"),
        ({"name": "resnet18d", "small_stem": True}, "small_stem"),
        ({"name": "resnet18", "arguments": {"depth": 3}}, "depth"),
    ],
)
def test_impossible_settings_are_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        ConvNet(**settings)


def test_a_tap_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"block5.*1 to 4"):
        network("resnet18")(torch.randn(1, 3, 32, 32), taps=(5,))
    with pytest.raises(UserError, match="one MLP"):
        network("resnet18")(torch.randn(1, 3, 32, 32), taps=("block1.mlp",))


@each_network
def test_there_is_no_attention_to_show_and_the_message_says_what_there_is(name):
    with pytest.raises(UserError, match=f"ConvNet '{name}' has no attention over all its patches.*pca"):
        network(name).attention_map(torch.randn(1, 3, 64, 64))
