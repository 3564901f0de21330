"""How fast a run is and how much memory it takes."""

import statistics
import time
from collections import deque

import pytorch_lightning as pl
import torch


class Throughput(pl.Callback):
    """Logs images per second over the whole job and peak device memory, and keeps the median for the end table.

    Time between batches counts, so a slow loader shows; evaluations and checkpoints between them do not.
    """

    def __init__(self) -> None:
        self.rates: deque[float] = deque(maxlen=10_000)
        self.seconds = 0.0
        self.images = 0
        self._last: float | None = None

    @property
    def images_per_second(self) -> float | None:
        return statistics.median(self.rates) if self.rates else None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._last = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.rates.append(batch.total / (now - self._last))
            self.seconds += now - self._last
            self.images += batch.total
        self._last = now
        every = trainer.log_every_n_steps
        if every and pl_module.step % every == 0 and self.rates:
            recent = list(self.rates)[-every:]
            pl_module.log("train/speed/images_per_s", statistics.median(recent))
            if torch.cuda.is_available():
                pl_module.log("train/memory/peak_gib", torch.cuda.max_memory_allocated() / 2**30)
