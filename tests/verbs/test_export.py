"""`ssd export`: a checkpoint's backbone as others load it."""

import json

import timm
import torch

from ssd.record import build
from ssd.verbs.loading import load_module
from tests.verbs.conftest import typed


def test_the_printed_line_loads_what_probes_judge(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = typed("export", run.last, "--to", "timm", "--out", "exported", "--json", "report.json")
    assert said.status == 0 and said.err == "", said.err
    first, *lines = said.out.splitlines()
    assert first.startswith("exported: largest difference after reloading ")
    assert lines == ["import timm", 'model = timm.create_model("local-dir:exported", pretrained=True)']
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["difference"] <= report["tolerance"] == 1e-4

    module, about = load_module(run.last)
    model = timm.create_model("local-dir:exported", pretrained=True).eval()
    pictures = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(pictures), module.evaluated_backbone(pictures).pooled(), atol=1e-5)

    config = json.loads((tmp_path / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == (about["mean"], about["std"])
    assert config["input_size"] == [1, 16, 16] and config["crop_pct"] == build(about["views"]).evaluation_crop


def test_the_card_says_what_it_is_and_not_where_it_was(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ssd.weights.export.answers_elsewhere", lambda lines, inputs, check: {})
    monkeypatch.setattr("ssd.weights.export.compare", lambda here, elsewhere: 0.0)
    monkeypatch.setattr(
        "ssd.verbs.export.load_module",
        lambda file: (
            (loaded := load_module(file))[0],
            loaded[1] | {"data": {"class_path": "datamodules.images.Images", "init_args": {"path": "/home/me/pets"}}},
        ),
    )
    assert typed("export", run.last, "--out", tmp_path / "exported").status == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| method | DINO |" in card and "| data | Images pets |" in card and "| steps | 6 |" in card
    assert "/home/me" not in card


def test_an_export_over_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = typed("export", run.last, "--out", tmp_path / "file")
    assert said.status == 2 and "is a file" in said.err and said.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
