"""A run from its first step to being gone on with, and what Lightning's verbs make of its checkpoint."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

from ssd.evaluation.protocol import Number
from ssd.weights.checkpoint import read_checkpoint
from tests.verbs.conftest import typed


def refused(*argv) -> str:
    said = typed(*argv)
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    return said.err


def test_a_run_ends_with_what_it_learned_how_fast_and_how_to_load_it(run):
    lines = run.said.out.splitlines()
    assert lines[0] == "DINO, step 6"
    for measure in ("knn/top1", "linear/top1", "spectrum/rankme"):
        assert measure in run.said.out
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines if re.match(r"\w[\w ]+\s{2,}\S", line))
    assert facts["steps"] == "6 of 6, 0 skipped"
    assert re.fullmatch(r"[\d,]+ images/s, \d+% of the time waiting for data.*", facts["speed"])
    best = str(run.folder / "checkpoints" / "best.ckpt")
    assert best in facts["best checkpoint"] and "val/knn/top1" in facts["best checkpoint"]
    assert facts["load it with"] == f"ssd export {best} --to timm --out {run.folder / 'export'}"


def test_nothing_but_progress_stands_beside_it(run):
    assert all(line.startswith("step ") for line in run.said.err.splitlines())


def test_the_same_numbers_are_there_for_programs(run):
    numbers = run.numbers
    assert numbers["finished"] and numbers["steps"] == numbers["evaluated_step"] == 6
    names = {number["name"] for number in numbers["numbers"]}
    spectrum = {f"spectrum/{name}" for name in ("rankme", "alpha_req", "lidar")}
    of_the_run = {"agreement/cosine", "prototypes/perplexity", "prototypes/used"}
    assert names == {"knn/top1", "linear/top1"} | spectrum | of_the_run
    assert all(number["protocol"] for number in numbers["numbers"])
    for number in numbers["numbers"]:
        assert Number(**number).text() in run.said.out


def test_the_seed_is_that_of_the_data_too(run):
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 3


def test_grey_data_makes_a_grey_network(run):
    method = read_checkpoint(run.last)["ssd"]["method"]
    assert method["init_args"]["backbone"]["init_args"]["in_chans"] == 1


def test_logs_are_curves_and_a_table(run):
    assert list(run.folder.glob("tensorboard/events*"))
    header = next(run.folder.glob("csv/*/metrics.csv")).read_text().partition("\n")[0]
    assert {"train/loss/total", "val/knn/top1", "train/schedule/lr"} <= set(header.split(","))


def test_a_checkpoint_alone_gives_the_same_numbers_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = typed("validate", "--ckpt_path", run.last, "--json", "again.json")
    assert said.status == 0 and said.err == "", said.err
    assert json.loads((tmp_path / "again.json").read_text())["numbers"] == run.numbers["numbers"]
    assert said.out.startswith(f"{run.last}, step 6\n")
    assert not (tmp_path / "runs").exists()


def test_predictions_are_written_in_the_order_of_the_data(run, tmp_path):
    shutil.copytree(run.folder / "checkpoints", tmp_path / "checkpoints")
    said = typed("predict", "--ckpt_path", tmp_path / "checkpoints" / "last.ckpt")
    assert said.status == 0 and said.err == ""
    file = tmp_path / "predictions.npz"
    assert str(file) in said.out and "1297 x 16" in said.out
    written = np.load(file)
    assert (written["index"] == np.arange(1297)).all()
    assert written["features"].shape == (1297, 16) and np.isfinite(written["features"]).all()
    assert set(written["labels"]) == set(range(10))


def test_a_run_goes_on_where_it_was_stopped_wherever_it_was_moved(run, tmp_path, monkeypatch):
    """Three steps, then three more from a copy, make the weights of six; without any other argument."""
    stopped = tmp_path / "stopped"
    base = ("--config", run.folder / "config-given.yaml", "--seed_everything", 3, "--trainer.default_root_dir", stopped)
    original = torch.optim.AdamW.step
    count = {"steps": 0}

    def step_and_stop(self, *arguments, **settings):
        count["steps"] += 1
        if count["steps"] == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_stop)
    said = typed("fit", *base)
    monkeypatch.setattr(torch.optim.AdamW, "step", original)
    assert said.status == 130 and "Traceback" not in said.err
    assert f"ssd fit --ckpt_path {stopped / 'checkpoints' / 'last.ckpt'}" in said.err.splitlines()[-1]

    moved = tmp_path / "moved"
    stopped.rename(moved)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = typed("fit", "--ckpt_path", "../moved/checkpoints/last.ckpt")
    assert said.status == 0, said.err
    assert "6 of 6, 0 skipped" in said.out
    assert not stopped.exists() and not list((tmp_path / "here").iterdir())
    ours, theirs = (read_checkpoint(path)["state_dict"] for path in (moved / "checkpoints" / "last.ckpt", run.last))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if isinstance(theirs[name], torch.Tensor))


def test_a_run_that_is_done_says_so_again(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copy")
    said = typed("fit", "--ckpt_path", tmp_path / "copy" / "checkpoints" / "last.ckpt")
    assert said.status == 0 and said.err == "", said.err
    assert "6 of 6" in said.out and str(tmp_path / "copy" / "checkpoints" / "last.ckpt") in said.out


# ---------------------------------------------------------------------- mistakes with a checkpoint


@pytest.fixture
def bad(run, tmp_path):
    """The checkpoint, truncated, foreign, or of something else, by name."""
    whole = (run.folder / "checkpoints" / "last.ckpt").read_bytes()
    files = {name: tmp_path / f"{name}.ckpt" for name in ("half", "start", "foreign", "renamed")}
    files["half"].write_bytes(whole[: len(whole) // 2])
    files["start"].write_bytes(whole[:100])
    torch.save({"state_dict": {"a": torch.zeros(3)}}, files["foreign"])
    other = read_checkpoint(run.last)
    other["ssd"]["method"]["class_path"] = "lightning_modules.gone.Gone"
    torch.save(other, files["renamed"])
    return {name: str(file) for name, file in files.items()}


@pytest.mark.parametrize("verb", ["fit --ckpt_path", "validate --ckpt_path", "predict --ckpt_path", "probe"])
def test_a_truncated_checkpoint_is_refused(bad, verb):
    for name in ("half", "start"):
        said = refused(*verb.split(), bad[name])
        assert bad[name] in said and "truncated" in said and "earlier checkpoint" in said


def test_a_file_of_other_weights_is_refused(bad):
    for command in (("validate", "--ckpt_path"), ("probe",), ("export", "--out", "x")):
        said = refused(*command, bad["foreign"])
        assert "not a checkpoint that `ssd fit` wrote" in said and "weights" in said


def test_a_checkpoint_of_a_method_that_is_not_installed_is_refused(bad):
    assert "lightning_modules.gone.Gone" in refused("probe", bad["renamed"])
    assert "Gone" in refused("validate", "--ckpt_path", bad["renamed"])


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_of_another_shape_is_refused(run, verb):
    said = refused(verb, "--ckpt_path", run.last, "--model.num_prototypes", 8)
    assert "of another shape" in said and "student.head" in said and "(16, 8) instead of (8, 8)" in said


def test_a_checkpoint_of_another_method_is_refused(run):
    said = refused("fit", "--ckpt_path", run.last, "--model", "tests.verbs.other.Other")
    assert "made by DINO and cannot continue as Other" in said and "backbone.weights" in said


def test_a_checkpoint_of_another_length_is_refused(run):
    said = refused("fit", "--ckpt_path", run.last, "--trainer.max_epochs", 9)
    assert "6 steps" in said and "27" in said
