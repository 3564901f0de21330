"""The config of a run, beside it and inside its checkpoints."""

import pytest
import yaml
from pytorch_lightning.cli import LightningArgumentParser

from ssd.callbacks.run_config import RunConfig
from ssd.weights.checkpoint import read_checkpoint
from tests.lightning_modules.runs import fit, last, vit


@pytest.fixture
def callback():
    parser = LightningArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--name", type=str | None, default=None)
    return RunConfig(parser, parser.parse_args(["--lr", "0.5"]), config_filename="other.yaml")


def test_the_whole_config_lies_beside_the_run_and_in_its_checkpoints(tmp_path, callback):
    fit(tmp_path / "run", vit(steps=1), callbacks=[callback], limit_val_batches=0)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text) == {"lr": 0.5, "name": None}, "what was not given is there too"
    assert read_checkpoint(last(tmp_path / "run"))["ssd"]["config"] == text


def test_an_evaluation_leaves_the_config_of_the_run_alone(tmp_path, callback):
    trainer = fit(tmp_path, vit(steps=1), callbacks=[callback], limit_val_batches=0)
    (tmp_path / "config.yaml").write_text("of the run")
    trainer.limit_val_batches = 1
    trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
    assert (tmp_path / "config.yaml").read_text() == "of the run"
