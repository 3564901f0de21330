"""Checkpoints that a crash, a full disk or a preemption cannot harm."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from ssd.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: readers see the old file or the new one, whole.

    What a process that was killed has left beside the target, the next one overwrites.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`, from which a run goes on exactly, `best.ckpt` by a monitor, and one more for each of `also`.

    One that cannot be written is a warning while the run goes on, and an error at its end. A `fast_dev_run` writes none.

    Args:
        folder: where they go; null is `checkpoints` in the run's folder.
        every_n_steps: how often `last` is written besides at the end of epochs and of the run; 0 = never.
        every_n_epochs: how often `last` is written at the end of an epoch; 0 = never.
        monitor: logged number that decides which is best; where it is not logged, `fallback` decides.
        mode: "max" or "min".
        fallback: monitor for data without labels, larger is better.
        also: name of a further file -> the number of which it keeps the largest, where that is logged: what is best for
            whole pictures need not be best for places in them.
    """

    def __init__(
        self,
        folder: str | None = None,
        every_n_steps: int = 1000,
        every_n_epochs: int = 1,
        monitor: str = "val/knn/top1",
        mode: str = "max",
        fallback: str | None = "val/spectrum/rankme",
        also: dict[str, str] = {"best_dense": "val/dense/correspondence"},  # noqa: B006 (copied)
    ):
        if mode not in ("max", "min"):
            raise UserError(f"checkpoint mode '{mode}' is unknown. Use 'max' or 'min'.")
        check_names(also)
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.monitor = monitor
        self.mode = mode
        self.fallback = fallback
        self.also = dict(also)
        self.best_value: float | None = None
        self.best_monitor: str | None = None
        self.best_model_path = ""
        self.best_of: dict[str, float] = {}
        self.last_model_path = ""
        self._unsaved = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = self.folder or os.path.join(trainer.default_root_dir, "checkpoints")
        self._path = Path(trainer.strategy.broadcast(folder))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # until this run has written its own
        self.last_model_path = str(trainer.ckpt_path or "")
        self._unsaved = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._unsaved = True
        if pl_module.last_report.stop or (self.every_n_steps and pl_module.step % self.every_n_steps == 0):
            self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._keep_best(trainer, pl_module)
        for name, monitor in self.also.items():
            self._keep_largest(trainer, pl_module, name, monitor)

    def _keep_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitor = next((name for name in (self.monitor, self.fallback) if name in trainer.callback_metrics), None)
        if monitor is None:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            rank_zero_warn(
                f"the checkpoint monitor '{self.monitor}' was not logged, so best.ckpt is not written. Logged were: "
                f"{logged or 'no numbers of an evaluation'}."
            )
            return
        value = float(trainer.callback_metrics[monitor])
        # decided by one rank: to save is for all or none
        if not trainer.strategy.broadcast(self._better(monitor, value)):
            return
        before = self.state_dict()
        self.best_value, self.best_monitor, self.best_model_path = value, monitor, str(self._path / "best.ckpt")
        if self._save(trainer, pl_module, "best.ckpt"):
            self._unsaved = True
        else:
            self.load_state_dict(before)

    def _keep_largest(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, monitor: str) -> None:
        if monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[monitor])
        larger = math.isfinite(value) and value > self.best_of.get(name, -math.inf)
        if not trainer.strategy.broadcast(larger):
            return
        before = self.best_of
        self.best_of = before | {name: value}  # before it is saved: the file remembers what it holds
        if self._save(trainer, pl_module, f"{name}.ckpt"):
            self._unsaved = True
        else:
            self.best_of = before

    def kept(self) -> dict[str, tuple[str, float]]:
        """Path of each further checkpoint that was written -> its monitor and value."""
        return {str(self._path / f"{name}.ckpt"): (self.also[name], value) for name, value in self.best_of.items()}

    def _better(self, monitor: str, value: float) -> bool:
        """Whether `value` beats what is best; a value of the fallback never beats one of the monitor."""
        if not math.isfinite(value):
            return False
        if self.best_value is None or self.best_monitor != monitor:
            return self.best_value is None or monitor == self.monitor
        larger_is_better = self.mode == "max" or monitor == self.fallback
        return value > self.best_value if larger_is_better else value < self.best_value

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        epochs, within = divmod(pl_module.step, pl_module.steps_per_epoch)
        if self._unsaved and not within and self.every_n_epochs and epochs % self.every_n_epochs == 0:
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        if self._unsaved:
            self._save_last(trainer, pl_module, must=True)

    def _save_last(self, trainer: pl.Trainer, pl_module: pl.LightningModule, must: bool = False) -> None:
        if self._save(trainer, pl_module, "last.ckpt", must):
            self.last_model_path = str(self._path / "last.ckpt")
            self._unsaved = False

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, must: bool = False) -> bool:
        """Whether it was written; all ranks call this, and all are told."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        path = self._path / name
        failure = ""
        # not trainer.save_checkpoint: there a rank that fails would leave the others waiting
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            trainer.strategy.save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer
            failure = str(error) or type(error).__name__
        failure = trainer.strategy.broadcast(failure)
        if not failure:
            return True
        message = f"the checkpoint of step {pl_module.step} could not be written to {path} ({failure}). "
        if must:
            raise UserError(message + "Earlier checkpoints are intact.")
        rank_zero_warn(message + "Training goes on; earlier checkpoints are intact.")
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_value": self.best_value,
            "best_monitor": self.best_monitor,
            "best_model_path": self.best_model_path,
            "best_of": dict(self.best_of),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self.best_monitor = state_dict["best_monitor"]
        self.best_model_path = state_dict["best_model_path"]
        # those that this run still asks for
        self.best_of = {name: value for name, value in state_dict.get("best_of", {}).items() if name in self.also}


def check_names(also: Mapping[str, str]) -> None:
    """Raises UserError for names that are no names of files, or those of the two that are always kept."""
    for name in also:
        if not re.fullmatch(r"\w[\w.-]*", name) or name in ("last", "best"):
            raise UserError(
                f"checkpoints.also: '{name}' cannot name a further checkpoint. Use letters, digits and '_', and neither "
                "'last' nor 'best', for instance best_dense: val/dense/correspondence."
            )
