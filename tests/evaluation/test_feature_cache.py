"""What is read back is what was made, of the same network and data and of nothing else."""

import json
import os

import pytest
import torch

from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.evaluation.feature_cache import feature_table, forget_oldest
from ssd.evaluation.features import extract
from ssd.weights.fingerprint import weights_fingerprint
from tests.evaluation.test_features import batches

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 2}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViT("vit_tiny_patch16_224", img_size=4, in_chans=1, arguments=SMALL).eval()


@pytest.fixture
def loader():
    return batches(23, 5)[0]


def never():
    raise AssertionError("the data was looked at again")
    yield


def same(one, other):
    return all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts) and torch.equal(
        one.labels, other.labels
    )


def test_the_second_time_features_are_read_and_the_data_is_left_alone(vit, loader, tmp_path):
    made, how = feature_table(vit, loader, 23, {"data": 1}, tmp_path)
    assert how == "made"
    read, how = feature_table(vit, never(), 23, {"data": 1}, tmp_path)
    assert how == "read" and same(made, read) and torch.equal(read.index, torch.arange(23))
    own = extract(lambda pictures: vit(pictures).pooled(), loader)
    assert torch.equal(read.features().features, own.features) and torch.equal(read.labels, own.labels)
    assert read.features("cls+mean_patch").features.shape == (23, 48)


def test_nothing_is_kept_where_no_folder_is_named(vit, loader, tmp_path):
    made, how = feature_table(vit, loader, 23, {}, None)
    kept, _ = feature_table(vit, loader, 23, {}, tmp_path)
    assert how == "made" and same(made, kept)


def test_whatever_could_change_a_feature_makes_them_anew(vit, loader, tmp_path):
    feature_table(vit, loader, 23, {"data": 1}, tmp_path)
    for about, settings in (
        ({"data": 2}, {}),
        ({"data": 1}, {"precision": "bf16-mixed"}),
        ({"data": 1}, {"dtype": "float16"}),
    ):
        assert feature_table(vit, loader, 23, about, tmp_path, **settings)[1] == "made"
    with torch.no_grad():
        vit.model.blocks[1].mlp.fc1.bias[3] += 1e-6
    assert feature_table(vit, loader, 23, {"data": 1}, tmp_path)[1] == "made"
    assert len(list(tmp_path.iterdir())) == 5


def test_weights_have_the_same_print_in_another_network_and_another_in_another_shape(vit):
    again = ViT("vit_tiny_patch16_224", img_size=4, in_chans=1, arguments=SMALL)
    assert weights_fingerprint(again.state_dict()) != weights_fingerprint(vit.state_dict())
    again.load_state_dict(vit.state_dict())
    assert weights_fingerprint(again.state_dict()) == weights_fingerprint(vit.state_dict())
    assert weights_fingerprint(torch.nn.Linear(2, 3).state_dict()) != weights_fingerprint(
        torch.nn.Linear(3, 2).state_dict()
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: os.truncate(place / "cls-1.npy", 200),
        lambda place: (place / "mean-1.npy").write_bytes(b""),
        lambda place: (place / "labels.npy").unlink(),
        lambda place: (place / "about.json").write_text("{"),
        lambda place: (place / "about.json").write_text(json.dumps({"rows": 22, "parts": ["cls-1"]})),
        lambda place: (place / "about.json").unlink(),
    ],
)
def test_a_damaged_folder_is_made_again(vit, loader, tmp_path, harm):
    expected = feature_table(vit, loader, 23, {}, None)[0]
    feature_table(vit, loader, 23, {}, tmp_path)
    (place,) = tmp_path.iterdir()
    harm(place)
    mended, how = feature_table(vit, loader, 23, {}, tmp_path)
    assert how == "damaged, made again" and same(mended, expected)
    assert feature_table(vit, never(), 23, {}, tmp_path)[1] == "read"


def test_a_pass_that_fails_leaves_nothing_behind(vit, loader, tmp_path):
    def half():
        yield loader[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="gone"):
        feature_table(vit, half(), 23, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert feature_table(vit, loader, 23, {}, tmp_path)[1] == "made"


def test_samples_that_are_broken_have_no_row(vit, loader, tmp_path):
    for _ in range(2):
        table, _ = feature_table(vit, [loader[0], loader[2]], 23, {}, tmp_path)
        assert table.index.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and len(table.parts["cls-1"]) == 10
    with pytest.raises(UserError, match="no pictures to embed"):
        feature_table(vit, [], 23, {"nothing": True}, tmp_path)


def test_float16_keeps_eleven_bits_and_refuses_what_it_cannot_hold(vit, loader, tmp_path):
    full = feature_table(vit, loader, 23, {}, tmp_path)[0].features().features
    half = feature_table(vit, loader, 23, {}, tmp_path, dtype="float16")[0].features().features
    assert half.dtype == torch.float32 and torch.equal(half, full.half().float()) and not torch.equal(half, full)
    with torch.no_grad():
        vit.model.norm.weight *= 1e6
    with pytest.raises(UserError, match="float16 ends at 65504"):
        feature_table(vit, loader, 23, {}, tmp_path, dtype="float16")


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cls-1.npy").write_bytes(bytes(1000))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    forget_oldest(tmp_path, 2500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
    forget_oldest(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
