"""A polite request to stop becomes a checkpoint and a clean end."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import pytorch_lightning as pl

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(pl.Callback):
    """On SIGTERM or SIGUSR1, to any rank, all ranks finish the step, save `last.ckpt` and stop.

    The engine agrees on the step over ranks; a second signal acts as it would without this callback. In a SLURM job
    SIGUSR1 is the warning that its time ends (`sbatch --signal=SIGUSR1@120`): the job is then put back into the queue,
    where it goes on from its checkpoint. SIGTERM is SLURM's own to follow up.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._limit_val_batches: int | float | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        def request(number: int, frame: Any) -> None:
            self.received = signal.Signals(number).name
            pl_module.stop_requested = True
            signal.signal(number, handlers[signal.Signals(number)])

        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return  # handlers are the main thread's
        handlers: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        self._handlers = handlers
        for number in SIGNALS:
            signal.signal(number, request)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.last_report.stop:
            # an evaluation could outlast the time that is left
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
            if self.received is not None:
                print(f"{self.received}: stopping at step {pl_module.step}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # before Lightning puts its own handlers back to what was there before them
        self._restore()
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        # asked after the checkpoint was written: a job that is requeued is ended at once
        warned = trainer.strategy.reduce_boolean_decision(self.received == "SIGUSR1", all=False)
        if warned and trainer.is_global_zero and pl_module.step < pl_module.total_steps:
            requeue()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def requeue() -> None:
    """Puts the SLURM job this runs in back into the queue; nothing outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    said = "is back in the queue" if answer.returncode == 0 else f"could not be requeued: {answer.stderr.strip()}"
    print(f"SLURM job {job} {said}", file=sys.stderr, flush=True)
