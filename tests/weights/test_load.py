"""Where weights come from: our own files, timm's, and what is said of keys and channels that differ."""

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import ssd.weights.load
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from tests.weights.networks import RESNET, TINY, again, pictures, same, tiny_convnext, tiny_resnet, tiny_swin, tiny_vit
from tests.weights.test_checkpoint import checkpoint_of

# ------------------------------------------------------------------ key accounting and our own files


def test_a_checkpoint_gives_its_teacher_unless_another_network_is_named(tmp_path):
    student, teacher = tiny_vit(seed=1), tiny_vit(seed=2)
    torch.save(checkpoint_of(student, teacher), tmp_path / "last.ckpt")
    same(again(teacher, tmp_path / "last.ckpt"), teacher)
    same(again(student, f"{tmp_path}/last.ckpt#student"), student)


def test_a_folder_whose_name_has_a_hash_is_a_folder(tmp_path):
    backbone = tiny_vit()
    folder = tmp_path / "run#2"
    folder.mkdir()
    save_file(backbone.model.state_dict(), folder / "model.safetensors")
    same(again(backbone, folder), backbone)


def test_positions_of_another_grid_are_resized_and_that_is_said(tmp_path):
    """The network of 32 px shown 64 px resizes by the same rule, so both answer the same."""
    backbone = tiny_vit(img_size=32)
    torch.save(backbone.model.state_dict(), tmp_path / "small.pth")
    with pytest.warns(UserWarning, match="positions resized from 2 x 2 to 4 x 4"):
        larger = again(backbone, tmp_path / "small.pth", img_size=64)
    same(larger, backbone, size=64)


def test_weights_of_another_network_list_every_key(tmp_path):
    backbone = tiny_vit()
    torch.save(backbone.model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"1 unknown: extra\."):
        again(backbone, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"12 missing: blocks\.3\.norm1\.weight"):
        again(backbone, tmp_path / "vit.pth", arguments={"depth": 4})
    with pytest.raises(UserError, match=r"of another shape: patch_embed\.proj\.weight \(24, 3, 16, 16\) instead of"):
        again(backbone, tmp_path / "vit.pth", arguments={"patch_size": 8})
    with pytest.raises(UserError, match=r"unknown.*missing"):
        ConvNet("resnet18", weights=f"{tmp_path}/vit.pth", arguments=RESNET)


def test_weights_that_are_not_there_or_not_weights_say_so(tmp_path):
    backbone = tiny_vit()
    with pytest.raises(UserError, match="there is no file"):
        again(backbone, tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="there is no file"):
        again(backbone, tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        again(backbone, tmp_path)
    torch.save({"epoch": 3, "note": "x"}, tmp_path / "notes.pth")
    with pytest.raises(UserError, match=r"no weights.*epoch, note"):
        again(backbone, tmp_path / "notes.pth")
    save_file(backbone.model.state_dict(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        again(backbone, tmp_path / "cut.safetensors")


# ------------------------------------------------------------------ other channels

NETWORKS = {"vit": tiny_vit, "resnet": tiny_resnet, "convnext": tiny_convnext, "swin": tiny_swin}
SIDES = {"swin": 224}


def widened(backbone, file, **settings):
    """The same network for other channels, from the RGB network's weights."""
    arguments = {
        key: value for key, value in backbone.record()["init_args"].items() if key not in ("in_chans", "weights")
    }
    torch.save(backbone.model.state_dict(), file)
    with pytest.warns(UserWarning, match="red, green and blue"):
        return type(backbone)(**{**arguments, **settings}, weights=str(file)).eval()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("channels", "places"), [(4, None), (13, None), (13, [3, 2, 1]), (3, [2, 1, 0])])
def test_more_channels_answer_as_the_rgb_network_whatever_the_others_hold(tmp_path, network, channels, places):
    backbone = NETWORKS[network]()
    wide = widened(backbone, tmp_path / "rgb.pth", in_chans=channels, rgb_channels=places)
    x = pictures(channels, SIDES.get(network, 64))
    # another order of sums in the first layer
    assert_close(wide(x).pooled(), backbone(x[:, places or [0, 1, 2]]).pooled(), atol=1e-4, rtol=1e-4)
    loss = wide(x).pooled().square().sum()
    loss.backward()
    first = wide.model.get_submodule(wide.model.pretrained_cfg["first_conv"]).weight.grad
    assert (first.abs().amax((0, 2, 3)) > 0).all(), "every channel learns"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_grey_picture_is_answered_as_its_three_copies(tmp_path, network, channels):
    backbone = NETWORKS[network]()
    narrow = widened(backbone, tmp_path / "rgb.pth", in_chans=channels)
    grey = pictures(1, SIDES.get(network, 64))
    expected = backbone(grey.expand(-1, 3, -1, -1)).pooled()
    assert_close(narrow(grey.expand(-1, channels, -1, -1)).pooled(), expected, atol=1e-4, rtol=1e-4)


def test_other_numbers_of_channels_are_not_guessed(tmp_path):
    torch.save(tiny_vit(in_chans=5).model.state_dict(), tmp_path / "five.pth")
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight \(24, 5, 16, 16\) instead of \(24, 3, 16, 16\)"):
        again(tiny_vit(), tmp_path / "five.pth")
    for places, channels in (([0, 1], 4), ([0, 1, 1], 4), ([1, 2, 4], 4), ([0, 1, 2], 1)):
        with pytest.raises(UserError, match=r"rgb_channels is .* for pictures of"):
            tiny_vit(in_chans=channels, rgb_channels=places)


# ------------------------------------------------------------------ timm's own


def test_a_tag_of_timm_is_loaded_strictly_without_its_classifier(tmp_path, monkeypatch):
    """timm itself, with the hub replaced by a file."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **TINY)
    save_file(source.state_dict(), tmp_path / "hub.safetensors")
    create, asked = timm.create_model, []

    def from_file(name, **kwargs):
        if kwargs.get("pretrained"):
            asked.append(name)
            kwargs["pretrained_cfg_overlay"] = {"file": str(tmp_path / "hub.safetensors"), "custom_load": False}
            kwargs["pretrained_cfg_overlay"]["num_classes"] = 1000
            kwargs["num_classes"] = 1000
        return create(name, **kwargs)

    monkeypatch.setattr(ssd.weights.load.timm, "create_model", from_file)
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias"):
        backbone = ViT("vit_tiny_patch16_224", weights="timm:augreg_in21k_ft_in1k", arguments=TINY).eval()
    assert asked == ["vit_tiny_patch16_224.augreg_in21k_ft_in1k"] and not backbone.training
    x = pictures(size=224)
    with pytest.warns(UserWarning, match="channels 0, 1, 2 of 4"):
        wide = ViT("vit_tiny_patch16_224", in_chans=4, weights="timm:augreg_in21k_ft_in1k", arguments=TINY).eval()
    four = pictures(4, 224)
    assert_close(wide(four).cls, backbone(four[:, :3]).cls, atol=1e-5, rtol=1e-5)
    assert_close(backbone(x).cls, source.eval().forward_head(source.forward_features(x), pre_logits=True))


def test_timm_weights_that_cannot_be_had_say_why(monkeypatch):
    with pytest.raises(UserError, match=r"no weights with tag 'mine'.*augreg_in21k"):
        ViT("vit_tiny_patch16_224", weights="timm:mine")
    with pytest.raises(UserError, match="publishes no weights"):
        ViT("vit_base_patch16_reg4_gap_256", weights="timm", arguments=TINY)
    create = timm.create_model

    def offline(name, **kwargs):
        if kwargs.get("pretrained"):
            raise ConnectionError("no route to the hub")
        return create(name, **kwargs)

    monkeypatch.setattr(ssd.weights.load.timm, "create_model", offline)
    with pytest.raises(UserError, match=r"could not be fetched.*no route.*copy the weights file"):
        ViT("vit_tiny_patch16_224", weights="timm", arguments=TINY)


def test_nothing_is_said_when_every_key_fits(tmp_path):
    backbone = tiny_vit()
    torch.save(backbone.model.state_dict(), tmp_path / "vit.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again(backbone, tmp_path / "vit.pth")
