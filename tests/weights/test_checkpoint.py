import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.record import build, describe
from ssd.weights.checkpoint import backbone_state, read_checkpoint, read_file, strict_load
from tests.weights.networks import pictures, tiny_resnet, tiny_vit


class Thing:
    pass


def checkpoint_of(student, teacher) -> dict:
    state = {f"student.backbone.{key}": value for key, value in student.state_dict().items()}
    state |= {f"teacher.network.backbone.{key}": value for key, value in teacher.state_dict().items()}
    state |= {"teacher.network.head.mlp.0.weight": torch.zeros(2, 2), "center.center": torch.zeros(4)}
    method = {"class_path": "lightning_modules.dino.DINO", "init_args": {"backbone": describe(student)}}
    return {"state_dict": state, "ssd": {"method": method, "mean": [0.5, 0.5, 0.5]}}


@pytest.fixture
def saved(tmp_path):
    student, teacher = tiny_resnet(seed=1), tiny_resnet(seed=2)
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint_of(student, teacher), path)
    return path, student, teacher


def test_a_checkpoint_alone_gives_its_backbones(saved):
    path, student, teacher = saved
    checkpoint, x = read_checkpoint(path), pictures()
    backbone = build(checkpoint["ssd"]["method"]["init_args"]["backbone"]).eval()
    strict_load(backbone.model, backbone_state(checkpoint), str(path))
    assert_close(backbone(x).summary, teacher(x).summary, atol=0, rtol=0)
    strict_load(backbone.model, backbone_state(checkpoint, "student"), str(path))
    assert_close(backbone(x).summary, student(x).summary, atol=0, rtol=0)


def test_rebuilding_does_not_look_for_the_weights_that_a_run_started_from(tmp_path):
    start = tmp_path / "start.pth"
    torch.save(tiny_vit().model.state_dict(), start)
    student = tiny_vit(weights=str(start))
    start.unlink()
    backbone = build(describe(student)).eval()
    backbone.load_state_dict(student.state_dict())
    assert_close(backbone(pictures()).cls, student(pictures()).cls, atol=0, rtol=0)


def test_networks_that_are_not_there_or_not_one_are_listed(saved):
    contents = read_checkpoint(saved[0])
    with pytest.raises(UserError, match=r"no backbone under 'partner'.*#student, #teacher\.network"):
        backbone_state(contents, "partner")
    more = {"teacher.large.backbone.model.a": torch.zeros(1), "teacher.small.backbone.model.a": torch.ones(1)}
    with pytest.raises(UserError, match=r"2 backbones under 'teacher'.*#teacher\.large, #teacher\.small"):
        backbone_state({"state_dict": more})
    assert backbone_state({"state_dict": more}, "teacher.small")["a"] == 1


def test_without_a_teacher_like_the_student_the_student_is_meant():
    """MAE has none, dBOT's is a bare backbone; who asks for the teacher by name is told."""
    alone = {"student.backbone.model.a": torch.ones(1), "teacher.network.model.a": torch.zeros(1)}
    assert backbone_state({"state_dict": alone})["a"] == 1
    with pytest.raises(UserError, match=r"no backbone under 'teacher'.*#student"):
        backbone_state({"state_dict": alone}, "teacher")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_clear_message(saved, share):
    path = saved[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"last\.ckpt.*(truncated|not a file)"):
        read_checkpoint(path)


def test_files_of_another_kind_say_what_they_are(tmp_path):
    with pytest.raises(UserError, match=r"no file .*nowhere\.ckpt"):
        read_checkpoint(tmp_path / "nowhere.ckpt")
    (tmp_path / "notes.txt").write_text("learning rates I tried\n")
    with pytest.raises(UserError, match="not a file that torch"):
        read_checkpoint(tmp_path / "notes.txt")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"not a checkpoint that `ssd fit` wrote.*model, epoch"):
        read_checkpoint(tmp_path / "other.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")
    torch.save({"model": Thing()}, tmp_path / "object.pth")
    with pytest.raises(UserError, match=r"Python objects \(.*Thing\).*state dict alone"):
        read_file(tmp_path / "object.pth")


def test_every_wrong_key_is_listed_at_once_and_nothing_is_loaded():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    wrong = {"weight": torch.ones(2, 5), "scale": torch.ones(1), "shift": torch.ones(1)}
    with pytest.raises(UserError) as error:
        strict_load(layer, wrong, "the file")
    message = str(error.value)
    assert "2 unknown: scale, shift" in message
    assert "1 missing: bias" in message
    assert "1 of another shape: weight (2, 5) instead of (2, 3)" in message
    assert_close(layer.weight, before, atol=0, rtol=0)
    strict_load(layer, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "the file")
    assert layer.weight.sum() == 6


@pytest.mark.parametrize("text", ["hi", "", "0", "a text file\n", "c" * 1000, "(lp0\n."])
def test_a_file_of_another_kind_is_refused_whatever_the_unpickler_makes_of_it(tmp_path, text):
    (tmp_path / "notes.ckpt").write_text(text)
    with pytest.raises(UserError, match=r"notes\.ckpt"):
        read_checkpoint(tmp_path / "notes.ckpt")
