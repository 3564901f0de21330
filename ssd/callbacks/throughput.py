"""How fast a run is and how much memory it takes."""

import statistics
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch


def counted(data: Any) -> str:
    """What the samples of a datamodule are called where they are counted: images, clips, sounds."""
    word = getattr(data, "sample_word", "picture")
    return "images" if word == "picture" else f"{word}s"


class Throughput(pl.Callback):
    """Logs images per second over the whole job, the share of the time that steps waited for data, and peak device memory.

    Time between batches counts, so a slow loader shows; evaluations and checkpoints between them do not.
    """

    def __init__(self) -> None:
        self.rates: deque[float] = deque(maxlen=10_000)
        self.seconds = 0.0
        self.waited = 0.0
        self.images = 0
        self._last: float | None = None
        self._wait = 0.0

    @property
    def images_per_second(self) -> float | None:
        return statistics.median(self.rates) if self.rates else None

    @property
    def waiting_share(self) -> float | None:
        """Of the time that counts, the part in which the step waited for its batch, in [0, 1]."""
        return self.waited / self.seconds if self.seconds else None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._last = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._wait = 0.0 if self._last is None else time.perf_counter() - self._last

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.rates.append(batch.total / (now - self._last))
            self.seconds += now - self._last
            self.waited += self._wait
            self.images += batch.total
        self._last = now
        every = trainer.log_every_n_steps
        if every and pl_module.step % every == 0 and self.rates:
            recent = list(self.rates)[-every:]
            pl_module.log("train/speed/images_per_s", statistics.median(recent))
            pl_module.log("train/speed/waiting_share", self.waited / self.seconds)
            if torch.cuda.is_available():
                pl_module.log("train/memory/peak_gib", torch.cuda.max_memory_allocated() / 2**30)
