"""What is typed before any parser sees it: which checkpoint a fit goes on from."""

from pathlib import Path

import pytest

from ssd.errors import UserError
from ssd.record import build
from ssd.verbs.arguments import data_arguments, go_on, spelled_out
from ssd.views.recipes import RECIPES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SSD_RUN_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def written(folder: Path) -> str:
    file = folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    return str(file)


def test_last_is_the_checkpoint_of_the_folder_or_a_new_run(folder):
    typed = ["--config", "verify", "--trainer.default_root_dir", "run", "--ckpt_path", "last"]
    assert go_on(typed) == typed[:4]
    file = written(Path("run"))
    assert go_on(typed) == [*typed[:4], "--ckpt_path", file]
    assert go_on(["--ckpt_path=last", "--trainer.default_root_dir=run"]) == [
        "--trainer.default_root_dir=run",
        "--ckpt_path",
        file,
    ]


def test_the_folder_may_stand_in_a_config(folder):
    Path("mine.yaml").write_text("trainer: {default_root_dir: run}")
    file = written(Path("run"))
    assert go_on(["--config", "mine.yaml", "--ckpt_path", "last"])[-1] == file


def test_without_a_folder_last_says_what_is_missing(folder):
    with pytest.raises(UserError, match=r"--trainer\.default_root_dir"):
        go_on(["--config", "verify", "--ckpt_path", "last"])


def test_a_path_is_taken_as_it_is(folder):
    written(Path("run"))
    typed = ["--trainer.default_root_dir", "run", "--ckpt_path", "other/best.ckpt"]
    assert go_on(typed) == typed


def test_a_job_that_was_requeued_goes_on_by_itself_and_a_new_one_does_not(folder, monkeypatch):
    file = written(Path("runs/dino-digits-17"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert go_on(["--config", "quickstart"]) == ["--config", "quickstart"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert go_on(["--config", "quickstart"]) == ["--config", "quickstart", "--ckpt_path", file]
    assert go_on(["--ckpt_path", "best.ckpt"]) == ["--ckpt_path", "best.ckpt"]
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert go_on(["--config", "quickstart"]) == ["--config", "quickstart"], "stopped before its first checkpoint"


@pytest.mark.parametrize("value", ["hf:somebody/pictures", "torchvision:CIFAR10:data:test"])
def test_data_of_other_libraries_is_named_as_it_is(value):
    assert data_arguments(value) == ["--data", "Images", "--data.path", value]


@pytest.mark.parametrize("value", ["train-{000..099}.tar", "train-*.tar"])
def test_a_pattern_of_files_is_found_from_any_folder(folder, value):
    assert data_arguments(value) == ["--data", "Images", "--data.path", str(folder / value)]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_that_is_spelled_out_is_the_recipe(name):
    record = spelled_out(name)
    assert build(record) == RECIPES[name]
