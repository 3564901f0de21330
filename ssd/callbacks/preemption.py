"""A polite request to stop becomes a checkpoint and a clean end."""

import signal
import sys
from typing import Any

import pytorch_lightning as pl

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(pl.Callback):
    """On SIGTERM or SIGUSR1, to any rank, all ranks finish the step, save `last.ckpt` and stop.

    The engine agrees on the step over ranks; a second signal acts as it would without this callback.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def request(number: int, frame: Any) -> None:
            self.received = signal.Signals(number).name
            pl_module.stop_requested = True
            signal.signal(number, self._before[number])

        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, request)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.last_report is not None and pl_module.last_report.stop:
            # an evaluation could outlast the time that is left
            trainer.limit_val_batches = 0
            if self.received is not None:
                print(f"{self.received}: stopping at step {pl_module.step}", file=sys.stderr, flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
