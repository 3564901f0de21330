"""`ssd cache`, and `ssd fit` with what it made."""

import json

import pytest

from ssd.cached_targets.folder import ShardWriter
from tests.verbs.conftest import typed

RUN = (
    *("--config", "method/dmae_small", "--model.views.size", 16, "--model.views.evaluation_size", 16),
    *(
        "--model.backbone.img_size",
        16,
        "--model.backbone.arguments",
        "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    ),
    *(
        "--model.teacher.img_size",
        16,
        "--model.teacher.arguments",
        "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    ),
    *("--model.masks", "RandomMasks", "--model.masks.ratio", 0.5),
    *("--model.decoder_dim", 16, "--model.decoder_depth", 1, "--model.decoder_heads", 2),
    *("--data", "Digits", "--data.limit", 96, "--data.batch_size", 32, "--data.evaluation_limit", 48),
    *("--trainer.max_epochs", 2, "--trainer.accelerator", "cpu"),
)
LOOKS = ("--data.view_variants", 2)


def test_what_is_stored_is_told_and_a_run_and_its_resume_read_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = typed("cache", *RUN, *LOOKS, "--out", "targets", "--shard", 40, "--json", "made.json")
    assert said.status == 0 and said.err == "", said.err
    content = json.loads((tmp_path / "made.json").read_text())
    # a class token and two of four patches, of 32 dimensions, in half precision
    assert content["bytes_per_look"] == 3 * 32 * 2 and content["bytes"] == 96 * 2 * 192
    assert (content["shards"], content["made"], content["left"]) == (3, 3, 0)
    assert "--model.cached_targets targets --data.view_variants 2" in said.out
    assert not (tmp_path / "runs").exists(), "nothing was run"

    reading = ("--model.cached_targets", "targets", "--trainer.default_root_dir", "run")
    said = typed("fit", *RUN, *LOOKS, *reading)
    assert said.status == 0 and "6 of 6, 0 skipped" in said.out, said.err
    said = typed("fit", "--ckpt_path", "run/checkpoints/last.ckpt")
    assert said.status == 0, said.err
    said = typed("validate", "--ckpt_path", "run/checkpoints/last.ckpt")
    assert said.status == 0, said.err

    said = typed("fit", *RUN, "--data.view_variants", 3, *reading, "--seed_everything", 1)
    assert said.status == 2 and said.err.count("\n") == 1
    for part in ("views.variants is 2 there and 3 here", "views.seed is 0 there and 1 here", "teacher.weights is"):
        assert part in said.err


def test_a_stop_costs_one_shard_and_several_may_share_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish = ShardWriter.finish

    def stopped(self):
        if self.shard == 1:
            raise KeyboardInterrupt
        finish(self)

    monkeypatch.setattr(ShardWriter, "finish", stopped)
    assert typed("cache", *RUN, *LOOKS, "--out", "targets", "--shard", 25).status == 130
    monkeypatch.setattr(ShardWriter, "finish", finish)
    assert not list((tmp_path / "targets").glob("*.unfinished"))
    first = (tmp_path / "targets" / "shard-00000.features.npy").stat().st_mtime_ns
    said = typed("cache", *RUN, *LOOKS, "--out", "targets", "--part", "2/2")
    assert "2 made, 0 were there, 1 of 4 still missing" in said.out and "use them with" not in said.out, said
    said = typed("cache", *RUN, *LOOKS, "--out", "targets")
    assert "1 made, 3 were there" in said.out and "use them with" in said.out, said
    assert (tmp_path / "targets" / "shard-00000.features.npy").stat().st_mtime_ns == first

    typed("cache", *RUN, *LOOKS, "--out", "whole", "--shard", 25)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "targets" / file.name).read_bytes(), file.name

    said = typed("cache", *RUN, *LOOKS, "--out", "targets", "--tokens", 2)
    assert said.status == 2 and "form.tokens is not said there and 2 here" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--config", "method/dino_small", "--data", "Digits", *LOOKS),
            "DINO cannot be stored: what its student learns from",
        ),
        (RUN, "Set data.view_variants"),
        ((*RUN, *LOOKS, "--classes", 4), "Leave --classes out"),
        ((*RUN, *LOOKS, "--part", "0/2"), "0/2 is no part"),
    ],
)
def test_what_cannot_be_stored_is_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    found = typed("cache", *words, "--out", "targets", "--trainer.accelerator", "cpu")
    assert found.status == 2 and found.err.count("\n") == 1 and said in found.err, found.err
    assert not (tmp_path / "targets").exists()


def test_the_last_stage_of_a_run_is_stored_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        *("--config", "method/further_pretraining", "--model.views", "PlainViews", "--model.views.size", 16),
        *("--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.img_size", 16),
        *("--model.backbone.arguments", "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"),
        *("--model.decoder_dim", 16, "--model.decoder_depth", 1, "--model.decoder_heads", 2, "--model.steps", 4),
        *("--data", "Digits", "--data.limit", 64, "--data.batch_size", 32, "--data.evaluation_limit", 48),
        *("--trainer.accelerator", "cpu", "--checkpoints.every_n_steps", 2, "--data.view_variants", 1),
    )
    said = typed("cache", *words, "--out", "targets")
    assert said.status == 2 and "cannot be stored in 2 stages" in said.err, said.err
    said = typed(
        "fit", *words, "--model.stages", "[1, 1]", "--trainer.default_root_dir", "run", "--trainer.limit_val_batches", 0
    )
    assert said.status == 0, said.err
    said = typed("cache", "--ckpt_path", "run/checkpoints/last.ckpt", "--out", "targets")
    assert said.status == 0 and "features 1 x 24 float16" in said.out, said.err
