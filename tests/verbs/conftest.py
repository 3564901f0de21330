"""One small run that the verbs' tests share."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from ssd.cli import main

CONFIG = """
model:
  class_path: DINO
  init_args:
    backbone:
      class_path: ConvNet
      init_args:
        name: resnet18
        arguments: {layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_width: 8}
    views: {class_path: DINOViews, init_args: {global_size: 16, local_count: 0}}
    num_prototypes: 16
    head_hidden_dim: 16
    head_bottleneck_dim: 8
data: {class_path: Digits, init_args: {limit: 96, batch_size: 32}}
trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}
"""


class Said(NamedTuple):
    status: int
    out: str
    err: str


def typed(*argv: str) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in argv])
    return Said(status, out.getvalue(), err.getvalue())


class Run(NamedTuple):
    folder: Path
    said: Said
    numbers: dict

    @property
    def last(self) -> str:
        return str(self.folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """A run of six steps on some of the digits, seed 3, as typed by a user."""
    folder = tmp_path_factory.mktemp("run")
    config, numbers = folder / "config-given.yaml", folder / "numbers.json"
    config.write_text(CONFIG)
    said = typed(
        "fit",
        *("--config", config, "--seed_everything", 3, "--trainer.default_root_dir", folder, "--json", numbers),
    )
    assert said.status == 0, said.err
    return Run(folder, said, json.loads(numbers.read_text()))
