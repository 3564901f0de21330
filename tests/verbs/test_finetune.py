"""`ssd finetune`: a network trained on labels, from weights that have learned and from random ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.evaluation.finetune import Classifier
from ssd.record import describe
from ssd.verbs.loading import load_data
from ssd.verbs.starts import load_start
from ssd.verbs.supervised import supervised_views
from ssd.views.recipes import DINOViews, PlainViews
from ssd.weights.classifier import with_classifier
from tests.verbs.conftest import typed

QUICK = ("--shares", "0.2", "--seeds", "2", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Pretrained and random weights, two seeds, on a fifth of 96 digits' labels."""
    folder = tmp_path_factory.mktemp("finetune") / "out"
    said = typed("finetune", run.last, *QUICK, "--baseline", "--out", folder, "--json", folder.with_suffix(".json"))
    assert said.status == 0, said.err
    return folder, said, json.loads(folder.with_suffix(".json").read_text())


def test_rows_are_the_accuracies_of_what_was_predicted(finished, run):
    folder, said, content = finished
    assert (content["training"], content["test"], content["classes"]) == (96, 500, 10)
    truth = load_data([], load_start(run.last).about, "finetune").labelled_parts()[1].labels
    assert [row["start"] for row in content["rows"]] == ["pretrained", "random"]
    for row in content["rows"]:
        assert row["labels"] <= 20 and row["per_class"] == 2
        files = sorted(folder.glob(f"runs/{row['start']}-20pct-seed*.json"))
        tops = [float((np.array(json.loads(file.read_text())["predictions"]) == truth).mean()) for file in files]
        assert [one["top1"] for one in row["runs"]] == pytest.approx(tops) and len(tops) == 2
        assert row["value"] == pytest.approx(np.mean(tops)) and row["low"] < row["value"] < row["high"]
        assert [len(one["curve"]) for one in row["runs"]] == [2, 2]
        assert row["protocol"] in said.out and f"{100 * row['value']:.1f}" in said.out
    first, other = content["rows"]
    assert first["gain"]["value"] == pytest.approx(first["value"] - other["value"]) and "gain" not in other
    assert first["protocol"] != other["protocol"], "layer decay is for weights that have learned"
    assert said.err.count("top-1") == 4 and "pretrained, 20 % of the labels, seed 1" in said.err


def test_the_model_answers_in_plain_timm_what_was_predicted(finished, run):
    folder, said, content = finished
    assert content["model"]["training"] == "pretrained, 20 % of the labels, seed 0"
    code = "\n".join(content["model"]["lines"])
    assert code in said.out and content["model"]["difference"] < 1e-4
    scope: dict = {}
    exec(code, scope)
    model = scope["model"].eval()
    assert model.num_classes == 10 and model.pretrained_cfg["label_names"] == [str(n) for n in range(10)]
    data = load_data([], load_start(run.last).about, "finetune")
    with torch.no_grad():
        answers = torch.cat([model(batch["sample"]).argmax(1) for batch in data.test_dataloader()[-1]])
    stored = json.loads((folder / "runs" / "pretrained-20pct-seed0.json").read_text())["predictions"]
    assert (answers != torch.tensor(stored)).sum() <= 2, "but for ties: batches are of another size"


def test_the_same_command_goes_on_and_another_setting_is_refused(finished, run):
    folder, _, content = finished
    again = typed("finetune", run.last, *QUICK, "--baseline", "--out", folder, "--json", folder.with_suffix(".json"))
    assert again.status == 0 and again.err == "", "nothing was trained again"
    assert json.loads(folder.with_suffix(".json").read_text())["rows"] == content["rows"]
    other = typed("finetune", run.last, *QUICK, "--lr", "0.5", "--out", folder)
    assert other.status == 2 and "other settings (training.lr)" in other.err


def test_the_exported_model_is_a_start_again(finished):
    start = load_start(str(finished[0] / "model"))
    assert start.weights is not None and start.backbone().embed_dim == 16
    assert not any(name.startswith("fc.") for name in start.weights), "without its classifier"


def test_random_weights_follow_from_the_seed_and_learned_ones_do_not(run):
    start = load_start(run.last)
    learned = [start.backbone(seed, drop_path).model.state_dict() for seed, drop_path in ((0, 0.0), (1, 0.2))]
    assert all(torch.equal(a, b) for a, b in zip(learned[0].values(), learned[1].values(), strict=True))
    first, same, other = (start.untrained().backbone(seed).model.conv1.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert load_start(f"random:{run.last}").weights is None


def test_a_network_of_timm_with_random_weights_needs_no_file():
    start = load_start("random:timm:resnet10t.c3_in1k")
    assert start.weights is None and start.about["views"]["init_args"]["size"] == 176


def test_views_keep_what_the_checkpoints_views_take_for_the_same_picture():
    digits = DINOViews(global_size=24, flip=0.0, rotate=15.0, shear=0.2, evaluation_crop=0.9)
    found = supervised_views({"views": describe(digits)})
    assert (found.size, found.evaluation_size, found.evaluation_crop) == (24, 24, 0.9)
    assert (found.flip, found.rotate, found.shear) == (0.0, 15.0, 0.2)
    assert supervised_views({"views": describe(PlainViews(size=32))}).flip == 0.5
    assert supervised_views({"views": describe(digits)}, flip=0.25).flip == 0.25


@pytest.fixture
def folders(tmp_path) -> Path:
    chance = np.random.default_rng(0)
    for name in ("one/a", "plain"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(6):
            picture = Image.fromarray(chance.integers(0, 256, (12, 12), dtype=np.uint8))
            picture.save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "--data", "FOLDER/plain"), "the data has no labels to learn from"),
        (("RUN", "--data", "FOLDER/one", "--data.labels", "true"), "are of one class, 'a'"),
        (("RUN", "--shares", "0"), "0 is not a share above 0 and at most 1"),
        (("RUN", "--shares", "10"), "10 is not a share above 0 and at most 1"),
        (("RUN", "--lr", "-1"), "--lr is -1.0"),
        (("RUN", "--drop-path", "1"), "--drop-path is 1.0"),
        (("random",), "does not say of which network"),
        (("random:RUN", "--baseline"), "has them already"),
        (("nowhere.ckpt",), "there is no file nowhere.ckpt"),
        (("random:timm:resnet5000",), "timm has no model named 'resnet5000'"),
        (("RUN", "--out", "FOLDER"), "exists and holds no trainings"),
        (("RUN", "--data", "Sound", "--data.path", "FOLDER"), "Sound makes views by SoundViews"),
        (("RUN", "--data.channels", "3"), "--data.channels is the checkpoint's own"),
    ],
)
def test_a_mistake_is_one_message(run, folders, words, message):
    words = tuple(word.replace("RUN", run.last).replace("FOLDER", str(folders)) for word in words)
    said = typed("finetune", *words)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said


def test_help_says_what_is_chosen_by_default():
    said = typed("finetune", "--help")
    assert (
        said.status == 0
        and "default: 0.01 0.1 1.0" in said.out
        and "never on the test set" in " ".join(said.out.split())
    )


def test_timm_gives_the_logits_of_every_kind_of_network():
    """A ViT with and without class token, one with rotary positions, a ConvNet whose pooling has a norm."""
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    networks = [
        ViT("vit_tiny_patch16_224", img_size=16, arguments={**small, "patch_size": 8}),
        ViT("vit_tiny_patch16_224", img_size=16, arguments={**small, "patch_size": 8, "class_token": False}),
        ViT("vit_small_patch16_dinov3", img_size=32, arguments=small),
        ConvNet("convnext_atto", arguments={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    ]
    for backbone in networks:
        network = Classifier(backbone, 5).eval()
        torch.nn.init.normal_(network.head.weight)
        torch.nn.init.normal_(network.head.bias)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(with_classifier(network)(x), network(x), rtol=1e-5, atol=1e-5)
