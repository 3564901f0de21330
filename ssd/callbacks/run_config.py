"""The full config of a run, in its folder and in its checkpoints."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser


class RunConfig(pl.Callback):
    """Writes `config.yaml` into the run's folder and hands its text to the module, whose checkpoints carry it."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **unused: Any):
        self.text = parser.dump(config, skip_none=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.config_text = self.text
        if stage == "fit" and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(self.text)
