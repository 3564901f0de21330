"""One line of progress for the whole run."""

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssd.callbacks.throughput import counted


class RunProgress(ProgressBar):
    """A bar over all steps of the run with loss terms, images per second and time left.

    Where the output is not a terminal it prints a plain line every `plain_every_s` seconds.
    """

    def __init__(self, plain_every_s: float = 30.0):
        super().__init__()
        self.plain_every_s = plain_every_s
        self._enabled = True
        self._progress: Progress | None = None
        self._since: float | None = None
        self._printed = 0.0
        self._first_step = 0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # the first hook of a callback that knows how long the run is
        if self._since is not None or not self._enabled or trainer.global_rank != 0:
            return
        self._since, self._first_step = time.monotonic(), pl_module.step
        self._printed = -math.inf
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(
                type(pl_module).__name__, total=pl_module.total_steps, completed=pl_module.step, numbers=""
            )
            self._progress.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._since is None:
            return
        now = time.monotonic()
        last = pl_module.step == pl_module.total_steps or pl_module.last_report.stop
        if self._progress is not None:
            if pl_module.step % 5 == 0 or last:
                numbers = self._numbers(trainer, pl_module)
                self._progress.update(self._task, completed=pl_module.step, numbers=numbers)
        elif now - self._printed > self.plain_every_s or last:
            self._printed = now
            done = pl_module.step - self._first_step
            left = (now - self._since) / max(done, 1) * (pl_module.total_steps - pl_module.step)
            print(
                f"step {pl_module.step}/{pl_module.total_steps}  {self._numbers(trainer, pl_module)}  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _numbers(self, trainer: pl.Trainer, pl_module: Any) -> str:
        parts = [f"{name} {value:.4f}" for name, value in pl_module.last_report.terms.items()]
        if "train/speed/images_per_s" in trainer.callback_metrics:
            samples = counted(getattr(trainer, "datamodule", None))
            parts.append(f"{trainer.callback_metrics['train/speed/images_per_s']:.0f} {samples}/s")
        parts += [
            f"{name.removeprefix('val/')} {trainer.callback_metrics[name]:.3f}"
            for name in ("val/knn/top1", "val/linear/top1")
            if name in trainer.callback_metrics
        ]
        return "  ".join(parts)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._since = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
