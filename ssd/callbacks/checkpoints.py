"""Checkpoints that a crash, a full disk or a preemption cannot harm."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ssd.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: readers see the old file or the new one, whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(unfinished, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`, from which a run goes on exactly, and `best.ckpt` by a monitor.

    Args:
        folder: where they go; null is `checkpoints` in the run's folder.
        every_n_steps: how often `last` is written besides at the end of epochs and after evaluations; 0 = never.
        every_n_epochs: how often `last` is written at the end of an epoch; 0 = never.
        monitor: logged number that decides which is best; where it is not logged, `fallback` decides.
        mode: "max" or "min".
        fallback: monitor for data without labels, larger is better.
    """

    def __init__(
        self,
        folder: str | None = None,
        every_n_steps: int = 1000,
        every_n_epochs: int = 1,
        monitor: str = "val/knn/top1",
        mode: str = "max",
        fallback: str | None = "val/spectrum/rankme",
    ):
        if mode not in ("max", "min"):
            raise UserError(f"checkpoint mode '{mode}' is unknown. Use 'max' or 'min'.")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.monitor = monitor
        self.mode = mode
        self.fallback = fallback
        self.best_value: float | None = None
        self.best_monitor: str | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self._saved_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = self.folder or os.path.join(trainer.default_root_dir, "checkpoints")
        self._path = Path(trainer.strategy.broadcast(folder))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        stopping = pl_module.last_report is not None and pl_module.last_report.stop
        if stopping or (self.every_n_steps and pl_module.step % self.every_n_steps == 0):
            self._save(trainer, pl_module, "last.ckpt")

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        monitor = self.monitor if self.monitor in trainer.callback_metrics else self.fallback
        if monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[monitor])
        larger_is_better = self.mode == "max" or monitor == self.fallback
        better = self.best_value is None or (value > self.best_value if larger_is_better else value < self.best_value)
        if better:
            self.best_value, self.best_monitor = value, monitor
            self.best_model_path = str(self._path / "best.ckpt")
            self._save(trainer, pl_module, "best.ckpt")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer, pl_module, "last.ckpt")

    def on_train_end(self, trainer, pl_module) -> None:
        if self._saved_step != pl_module.step:
            self._save(trainer, pl_module, "last.ckpt", must=True)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, must: bool = False) -> None:
        path = self._path / name
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer
            message = f"the checkpoint of step {pl_module.step} could not be written to {path} ({error}). "
            if must:
                raise UserError(message + "Earlier checkpoints are intact.") from error
            warnings.warn(message + "Training goes on; earlier checkpoints are intact.", stacklevel=2)
            return
        if name == "last.ckpt":
            self.last_model_path = str(path)
            self._saved_step = pl_module.step

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_value": self.best_value,
            "best_monitor": self.best_monitor,
            "best_model_path": self.best_model_path,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self.best_monitor = state_dict["best_monitor"]
        self.best_model_path = state_dict["best_model_path"]
