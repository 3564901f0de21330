import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.weights import export
from ssd.weights.export import export_backbone
from tests.weights.networks import CONVNEXT, RESNET, TINY, pictures, tiny_convnext, tiny_resnet, tiny_swin, tiny_vit

THREE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}


@pytest.fixture
def same_process(monkeypatch):
    """The lines of the report, run here: for what needs no fresh process, which takes seconds to import timm."""

    def answers(lines, given, check):
        place = {}
        exec("\n".join(lines), place)
        model = place["model"].eval()
        with torch.inference_mode():
            return {"pooled": model(given), "features": model.forward_features(given)}

    monkeypatch.setattr(export, "answers_elsewhere", answers)


def test_plain_timm_loads_a_resnet_with_arguments_in_a_fresh_process(tmp_path):
    backbone = tiny_resnet()
    card = {"knn/top1": 0.91, "data": "a | b"}
    report = export_backbone(backbone, tmp_path / "out", lengths=(32, 32), card=card, **THREE)
    assert report.lines[-1] == f'model = timm.create_model("local-dir:{tmp_path}/out", pretrained=True)'
    assert report.difference <= 1e-5  # the same float32 sums on the same machine
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    assert_close(model(pictures()), backbone(pictures()).summary)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"]) == ((3, 32, 32), 0.875)
    assert (list(data["mean"]), list(data["std"])) == (THREE["mean"], THREE["std"])

    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["difference"] == report.difference and written["lines"] == list(report.lines)
    card = (tmp_path / "out" / "README.md").read_text()
    assert report.code in card and "| knn/top1 | 0.91 |" in card and r"a \| b" in card

    again = ConvNet("resnet18", weights=str(tmp_path / "out"), arguments=RESNET).eval()
    assert_close(again(pictures()).patches, backbone(pictures()).patches, atol=0, rtol=0)


def test_a_small_stem_leaves_as_safetensors_with_the_lines_that_rebuild_it(tmp_path):
    backbone = tiny_resnet(small_stem=True, in_chans=1)
    with pytest.raises(UserError, match=r"model\.conv1 = .*plain timm cannot load.*safetensors"):
        export_backbone(backbone, tmp_path / "out", "timm", mean=[0.5], std=[0.2], lengths=(32, 32))
    report = export_backbone(backbone, tmp_path / "out", "safetensors", mean=[0.5], std=[0.2], lengths=(32, 32))
    assert report.difference <= 1e-5
    assert not (tmp_path / "out" / "config.json").exists()
    assert "ssd" not in report.code


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_stem_of_convolutions_leaves_as_safetensors_with_the_line_that_rebuilds_it(tmp_path, same_process, name):
    backbone = tiny_vit(name, img_size=32, stem="conv", arguments={"patch_size": 4})
    with pytest.raises(UserError, match=r"patch_embed\.proj = .*plain timm cannot load.*safetensors"):
        export_backbone(backbone, tmp_path / "out", "timm", lengths=(32, 32), **THREE)
    report = export_backbone(backbone, tmp_path / "out", "safetensors", lengths=(48, 48), **THREE)
    assert report.difference <= 1e-5
    assert "torch.nn.BatchNorm2d(12)" in report.code and "ssd" not in report.code


def test_blocks_that_normalise_behind_leave_with_the_lines_that_rebuild_them(tmp_path):
    """In a fresh process: the lines hold the class itself."""
    backbone = tiny_vit(img_size=32, post_norm=True, fixed_positions=True, arguments={"no_embed_class": True})
    said = r"class PostNormBlock\(Block\):; for block in model\.blocks:; model\.norm_pre = .*plain timm cannot load"
    with pytest.raises(UserError, match=said) as refusal:
        export_backbone(backbone, tmp_path / "out", "timm", lengths=(32, 32), **THREE)
    assert "\n" not in str(refusal.value)
    report = export_backbone(backbone, tmp_path / "out", "safetensors", lengths=(48, 48), **THREE)
    assert report.difference <= 1e-5 and "ssd" not in report.code


@pytest.mark.parametrize("to", ["timm", "safetensors"])
@pytest.mark.parametrize(
    "backbone",
    [
        tiny_convnext,
        tiny_swin,
        lambda: tiny_swin("swinv2_tiny_window8_256"),  # windows of the name's own size
        lambda: tiny_swin(img_size=64),
        lambda: tiny_vit(img_size=32),
        lambda: tiny_vit("vit_small_patch14_reg4_dinov2", img_size=(28, 42), drop_path_rate=0.2),
        lambda: tiny_vit("vit_medium_patch16_gap_240"),  # positions of the name's own size, no class token
        lambda: tiny_vit("vit_small_patch16_dinov3"),
        lambda: tiny_vit("eva02_tiny_patch14_224", arguments={"use_rot_pos_emb": True}),
    ],
)
def test_every_family_comes_back_through_the_printed_lines(tmp_path, same_process, backbone, to):
    backbone = backbone()
    report = export_backbone(backbone, tmp_path, to, lengths=(96, 96), **THREE)
    assert report.difference <= 5e-5  # what one last bit of the input makes of itself in a Swin
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == backbone.model.state_dict().keys()


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_come_back_unadapted(tmp_path, same_process, channels):
    """timm sums or repeats the first convolution of three-channel weights; these are not."""
    statistics = {"mean": [0.5] * channels, "std": [0.2] * channels}
    for number, backbone in enumerate((tiny_vit(in_chans=channels), tiny_convnext(in_chans=channels))):
        report = export_backbone(backbone, tmp_path / str(number), lengths=(32, 32), **statistics)
        assert report.difference <= 1e-5


def test_an_exported_convnext_starts_another_run(tmp_path, same_process):
    backbone = tiny_convnext()
    export_backbone(backbone, tmp_path, lengths=(32, 32), **THREE)
    again = ConvNet("convnext_atto", weights=str(tmp_path), arguments=CONVNEXT).eval()
    assert_close(again(pictures()).patches, backbone(pictures()).patches, atol=0, rtol=0)


def test_a_difference_is_an_error_and_leaves_no_proof(tmp_path, monkeypatch, same_process):
    backbone, answers = tiny_vit(img_size=32), export.answers_elsewhere
    export_backbone(backbone, tmp_path, lengths=(32, 32), **THREE)
    assert (tmp_path / "export.json").exists()
    for fault in (1e-3, float("nan")):
        changed = lambda *a, fault=fault: {key: value + fault for key, value in answers(*a).items()}
        monkeypatch.setattr(export, "answers_elsewhere", changed)
        with pytest.raises(RuntimeError, match="differs"):
            export_backbone(backbone, tmp_path, lengths=(32, 32), **THREE)
        assert not (tmp_path / "export.json").exists()


def test_lines_that_fail_or_import_this_package_are_an_error():
    with pytest.raises(RuntimeError, match=r"could not load the export:\nno such model"):
        export.answers_elsewhere(["raise SystemExit('no such model')"], pictures())
    with pytest.raises(RuntimeError, match="import ssd"):
        export.answers_elsewhere(["import ssd.errors", "model = None"], pictures())


def test_exporting_leaves_the_network_as_it_was(tmp_path, same_process):
    backbone = tiny_vit(img_size=32).train()
    for block in backbone.blocks:
        block.compile(backend="eager")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    export_backbone(backbone, tmp_path, lengths=(32, 32), **THREE)
    assert backbone.training
    for key, value in backbone.state_dict().items():
        assert_close(value, before[key], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "onnx"}, "timm, safetensors"),
        ({"mean": [0.5]}, "mean has 1 .* 3 channels"),
    ],
)
def test_impossible_exports_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        export_backbone(tiny_vit(), tmp_path, lengths=(32, 32), **{**THREE, **settings})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_backbone(tiny_vit(), tmp_path / "file", lengths=(32, 32), **THREE)
    with pytest.raises(UserError, match="plain data"):
        arguments = {**TINY, "norm_layer": torch.nn.LayerNorm}
        export_backbone(ViT("vit_tiny_patch16_224", arguments=arguments), tmp_path, lengths=(32, 32), **THREE)


def test_the_difference_is_absolute_for_small_features_and_a_share_of_large_ones():
    small = {"pooled": torch.tensor([0.1, 0.2]), "features": torch.tensor([0.5])}
    moved = {"pooled": torch.tensor([0.1, 0.3]), "features": torch.tensor([0.5])}
    assert export.compare(small, moved) == pytest.approx(0.1)
    large = {name: value * 1000 for name, value in small.items()}
    assert export.compare(large, {name: value * 1000 for name, value in moved.items()}) == pytest.approx(0.5)
    for name in small:
        assert math.isnan(export.compare(small, moved | {name: torch.tensor([float("nan")])}))
