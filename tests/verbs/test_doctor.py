"""`ssd doctor` after the fact, and what fit says of its findings."""

import json
import shutil

import pytest
import torch
import yaml

from tests.verbs.conftest import typed


def test_a_healthy_run_ends_without_findings_and_stays_so(run, tmp_path):
    assert "doctor" in run.said.out and "nothing found" in run.said.out
    assert run.numbers["findings"] == []
    assert json.loads((run.folder / "summary.json").read_text()) == run.numbers
    said = typed("doctor", run.folder, "--json", tmp_path / "found.json")
    assert said.status == 0 and said.err == "", said.err
    assert said.out.splitlines()[-1] == "nothing found" and "6 of 6, 0 skipped" in said.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["step"], found["logged_steps"], found["findings"]) == (6, 6, [])
    assert typed("doctor", run.last).out == said.out


@pytest.fixture(scope="module")
def ill(run, tmp_path_factory):
    """A run whose steps are far too large, as typed."""
    folder = tmp_path_factory.mktemp("ill")
    config = yaml.safe_load((run.folder / "config-given.yaml").read_text())
    config["model"]["init_args"] |= {"lr": 3.0, "lr_rule": "none", "freeze_last_layer": 0.0}
    config["trainer"]["max_epochs"] = 10
    (folder / "config-given.yaml").write_text(yaml.safe_dump(config))
    return folder, typed("fit", "--config", folder / "config-given.yaml", "--trainer.default_root_dir", folder)


def test_what_was_found_is_said_where_it_happens_at_the_end_and_for_programs(ill):
    folder, said = ill
    assert said.status == 0
    (line,) = [line for line in said.err.splitlines() if "each step changes weights by" in line]
    assert line.startswith("doctor: step ") and "Divide lr by" in line
    summary = json.loads((folder / "summary.json").read_text())
    assert "lr-too-high" in [finding["kind"] for finding in summary["findings"]]
    assert "each step changes weights by" in said.out
    events = next((folder / "tensorboard").glob("events*")).read_bytes()
    assert b"doctor/lr-too-high" in events


def test_it_is_found_again_in_the_checkpoint_and_in_logs_alone(ill, tmp_path):
    folder, _ = ill
    said = typed("doctor", folder, "--json", tmp_path / "found.json")
    assert said.status == 1 and "lr-too-high" in said.out
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "checkpoints" / "last.ckpt"
    contents = torch.load(file, weights_only=True)
    del contents["callbacks"]
    torch.save(contents, file)
    assert "lr-too-high" in typed("doctor", tmp_path / "old").out
    alone = tmp_path / "alone.ckpt"
    file.rename(alone)
    said = typed("doctor", alone)
    assert "only its weights were looked at" in said.out and said.out.splitlines()[-1] == "nothing found"


def test_weights_that_are_no_numbers_and_a_teacher_that_is_the_student_are_found(run, tmp_path):
    contents = torch.load(run.last, weights_only=True)
    state = contents["state_dict"]
    for name in [name for name in state if name.startswith("teacher.network.")]:
        state[name] = state[name.replace("teacher.network", "student")].clone()
    torch.save(contents, tmp_path / "same.ckpt")
    assert "is its own teacher" in typed("doctor", tmp_path / "same.ckpt").out.replace("\n", " ")
    state["center.center"][3] = float("nan")
    torch.save(contents, tmp_path / "nan.ckpt")
    said = typed("doctor", tmp_path / "nan.ckpt", "--json", tmp_path / "nan.json")
    assert (
        said.status == 1 and json.loads((tmp_path / "nan.json").read_text())["findings"][0]["layer"] == "center.center"
    )


SMALL_VIT = "{patch_size: 8, embed_dim: 96, depth: 4, num_heads: 3%s}"
VIT = "{class_path: ViT, init_args: {name: vit_tiny_patch16_224, img_size: 32, arguments: %s}}"
HEALTHY = {
    "DINO, convnet": ["quickstart"],
    "DINO, ViT": ["method/dino_small", "--model.backbone", VIT % SMALL_VIT % ""],
    "iBOT": ["method/ibot_small", "--model.backbone.init_args.arguments", SMALL_VIT % ""],
    "DINOv2": ["method/dinov2_small", "--model.backbone.init_args.arguments", SMALL_VIT % ""],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", HEALTHY)
def test_healthy_runs_hear_nothing(recipe, tmp_path):
    """The whole of a run of 200 steps, with its warm-up and its end."""
    config, *settings = HEALTHY[recipe]
    given = ("--config", config, "--data", "Digits", "--data.batch_size", 32, "--model.steps", 200)
    said = typed("fit", *given, *settings, "--trainer.default_root_dir", tmp_path, "--trainer.limit_val_batches", 1)
    assert said.status == 0, said.err
    assert json.loads((tmp_path / "summary.json").read_text())["findings"] == []
    assert "doctor:" not in said.err


@pytest.mark.slow
@pytest.mark.data
def test_a_healthy_run_of_dinov3_hears_nothing(real_data, tmp_path):
    """On photographs: of the digits its loss between views learns nothing in so few steps, and the doctor says so."""
    photographs = ("--data", real_data / "cifar10-train.parquet", "--data.limit", 3000, "--data.evaluation_limit", 200)
    size = ("--model.backbone.init_args.arguments", SMALL_VIT % ", init_values: 0.1, num_reg_tokens: 0")
    given = ("--config", "method/dinov3_small", *photographs, *size, "--data.batch_size", 32, "--model.steps", 200)
    said = typed("fit", *given, "--trainer.default_root_dir", tmp_path, "--trainer.limit_val_batches", 1)
    assert said.status == 0, said.err
    assert json.loads((tmp_path / "summary.json").read_text())["findings"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "there is no nothing"),
        (".", "holds no checkpoints/last.ckpt"),
        ("text", "not a file that torch.save"),
    ],
)
def test_what_is_no_run_is_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text")
    said = typed("doctor", given)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1
