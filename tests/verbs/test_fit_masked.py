"""A method that masks, through the command: settings to masks to logs to a checkpoint that is read again."""

import csv
import json
import math

import pytest

from ssd.evaluation.protocol import Number
from ssd.weights.checkpoint import read_checkpoint
from tests.verbs.conftest import typed

TINY = (
    *("--model.backbone.arguments", "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"),
    *("--model.num_prototypes", 16, "--model.head_hidden_dim", 16, "--model.head_bottleneck_dim", 8),
    *("--data", "Digits", "--data.limit", 96, "--data.batch_size", 32, "--data.evaluation_limit", 48),
    *("--trainer.max_epochs", 2, "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", 1),
)


def test_a_run_of_ibot_ends_with_numbers_that_its_checkpoint_gives_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ("--model.masks", "ScatteredMasks", "--model.masks.share", 0.75)
    chosen += ("--model.micro_batches", 2, "--model.ghost_norm", "true")  # its heads normalise by batch
    said = typed("fit", "--config", "method/ibot_small", *TINY, *chosen, "--trainer.default_root_dir", "run")
    assert said.status == 0, said.err
    assert "6 of 6, 0 skipped" in said.out
    assert "--to safetensors" in said.out, "plain timm has no stem of convolutions"

    with open(next(tmp_path.glob("run/csv/*/metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss/ibot")]
    assert len(rows) == 6
    for row in rows:
        share, loss = float(row["train/masks/masked_crops"]), float(row["train/loss/ibot"])
        assert 0.4 < share <= 1, "of 64 crops about three quarters"
        # entropy and divergence, per masked crop, make up the loss over all crops
        patches = float(row["train/teacher/patch_entropy"]) + float(row["train/teacher/patch_kl"])
        assert loss == pytest.approx(share * patches, rel=1e-4)
        assert 0 < float(row["train/teacher/patch_entropy"]) <= math.log(16) + 1e-4

    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    masks = read_checkpoint(last)["ssd"]["method"]["init_args"]["masks"]
    assert masks["class_path"].endswith("ScatteredMasks") and masks["init_args"]["share"] == 0.75
    again = typed("validate", "--ckpt_path", last, "--json", "again.json")
    assert again.status == 0 and again.err == "", again.err
    for number in json.loads((tmp_path / "again.json").read_text())["numbers"]:
        assert Number(number["name"], number["value"], number["protocol"], number["chance"]).text() in said.out


def test_a_convnet_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convnet = ("--model.backbone", "ConvNet", "--model.backbone.name", "resnet18")
    said = typed("fit", "--config", "method/ibot", "--data", "Digits", *convnet)
    assert said.status == 2 and said.err.count("\n") == 1
    assert "iBOT needs a backbone that can replace patches" in said.err and "Use a ViT" in said.err
