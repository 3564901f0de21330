"""Methods without prototypes, and without a teacher, through the commands that look at a run afterwards."""

import json

import pytest
from PIL import Image

from tests.verbs.conftest import typed

SMALL = [
    "--data", "Digits", "--data.batch_size", 32, "--model.steps", 4, "--trainer.log_every_n_steps", 1,
    "--data.evaluation_limit", 64, "--model.views.size", 16, "--model.backbone.arguments.depth", 2,
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("mae", ()),
        ("dbot", ()),
        ("dmjd", ()),
        ("data2vec", ("top_blocks", 1)),
        ("data2vec2", ("top_blocks", 1, "num_masks", 2)),
        ("leap", ("teacher.arguments.depth", 2)),
    ],
)
def test_a_run_is_examined_shown_and_reported_like_any_other(method, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"--model.{word}" if isinstance(word, str) else word for word in own]
    said = typed("fit", "--config", f"method/{method}_small", *SMALL, *settings, "--trainer.default_root_dir", "run")
    assert said.status == 0, said.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["findings"] == []
    said = typed("doctor", "run")
    assert said.status == 0 and said.out.splitlines()[-1] == "nothing found", said
    said = typed("report", "run")
    assert said.status == 0 and (tmp_path / "run" / "report.html").is_file()
    said = typed("look", "run/checkpoints/last.ckpt", "--show", "prototypes", "--out", "p.png")
    assert said.status == 2 and "no prototypes to show" in said.err
    said = typed("look", "run/checkpoints/last.ckpt", "--show", "reconstruction", "--samples", 3, "--json", "r.json")
    if method != "mae":
        assert said.status == 2 and "predicts no pixels" in said.err
        return
    assert said.status == 0, said.err
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["hidden"] == 12 and len(written["rows"]) == 3, "three quarters of 4 x 4 patches"
    # patches are predicted at variance 1, of which a network that has learned nothing misses all; shown is the picture's
    assert all(0 < row["error"] < 4 for row in written["rows"])
    assert Image.open(tmp_path / "reconstruction.png").height > 3 * 100
