"""A method that trains two networks, each by its own optimiser, through the commands that look at a run afterwards."""

import csv
import json
import math

import pytest

from ssd.weights.checkpoint import read_checkpoint
from tests.verbs.conftest import typed

SMALL = [
    "--data", "Digits", "--data.batch_size", 32, "--model.steps", 6, "--trainer.log_every_n_steps", 1,
    "--data.evaluation_limit", 64, "--model.views.size", 16, "--model.backbone.depth", 2,
    "--model.backbone.predictor_depth", 1, "--model.backbone.embed_dim", 32, "--model.num_prototypes", 64,
    "--trainer.accelerator", "cpu",
]  # fmt: skip


def test_a_run_of_capi_is_examined_probed_and_reported_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = typed("fit", "--config", "method/capi_small", *SMALL, "--trainer.default_root_dir", "run")
    assert said.status == 0, said.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["findings"] == []
    assert "--to safetensors" in said.out

    with open(next(tmp_path.glob("run/csv/*/metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss/clustering")]
    assert len(rows) == 6 and float(rows[0]["train/schedule/momentum"]) == 1
    for row in rows:
        entropy, divergence = (float(row[f"train/teacher/{name}"]) for name in ("patch_entropy", "cluster_kl"))
        assert float(row["train/loss/clustering"]) == pytest.approx(entropy + divergence, rel=1e-4)
        assert 0 < entropy <= math.log(64) + 1e-4 and divergence > -1e-4
        assert 1 <= float(row["train/prototypes/patch_perplexity"]) <= 64 + 1e-3
        assert {"train/schedule/lr", "train/schedule/clustering_lr"} <= row.keys()

    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert [len(state["state"]) > 0 for state in read_checkpoint(last)["optimizer_states"]] == [True, True]
    said = typed("doctor", "run")
    assert said.status == 0 and said.out.splitlines()[-1] == "nothing found", said
    said = typed("probe", last, "--output", "predicted", "--measures", "knn", "--cache", "none")
    assert said.status == 0 and "output predicted" in said.out, said.err
    said = typed("report", "run")
    assert said.status == 0 and (tmp_path / "run" / "report.html").is_file()
