"""A few steps of a run that is only planned: what they take of time and memory."""

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ssd.callbacks.online import OnlineEvaluation
from ssd.evaluation.suite import monitor
from ssd.memory import STATUS, status_mib

LONG_RUN = 2000
"""Steps, of which the middle lies behind every first part of a schedule."""

# this module is imported when the libraries are, and before a network is built
IMPORTS_MIB = status_mib("VmRSS") if STATUS.exists() else None


class Trial(pl.Callback):
    """Takes steps as a run takes them half-way, then an evaluation and a checkpoint, and writes what each took.

    Half-way the prototypes are no longer frozen and every term counts, so that time and memory are those of most of the run.

    Args:
        file: JSON that is written.
        started: seconds since the epoch at which the process was started.
        warmup: steps before those that are timed.
        steps: at least so many are timed.
        seconds: for at least so long, until twice what the loaders work ahead has been used up.
        longest: seconds after which `steps` are enough.
        evaluate: also ask for an evaluation's time.
    """

    def __init__(
        self,
        file: str,
        started: float,
        warmup: int = 3,
        steps: int = 5,
        seconds: float = 4.0,
        longest: float = 30.0,
        evaluate: bool = True,
    ):
        self.file, self.started, self.evaluate = Path(file), started, evaluate
        self.warmup, self.steps, self.seconds, self.longest = warmup, steps, seconds, longest
        self.found: dict[str, Any] = {}
        self._ends: list[tuple[float, float]] = []
        self._batch = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._batch:
            return
        self.found["start_s"] = time.time() - self.started
        self._batch = len(batch)
        # a short run has to last for as long as is measured, and its middle is then that of a longer one
        trainer.fit_loop.max_epochs = -1
        pl_module.total_steps = max(pl_module.total_steps, LONG_RUN)
        half = pl_module.total_steps // 2
        pl_module.step = half // pl_module.steps_per_epoch * pl_module.steps_per_epoch or half

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.last_report.stop:
            self.found["stopped"] = time.perf_counter()
            return
        self._ends.append((time.perf_counter(), time.process_time()))
        timed = len(self._ends) - self.warmup
        if timed < self.steps:
            return
        took = self._ends[-1][0] - self._ends[self.warmup - 1][0]
        ahead = 2 * (trainer.train_dataloader.num_workers * (trainer.train_dataloader.prefetch_factor or 0))
        if (took >= self.seconds and timed >= ahead) or took >= self.longest:
            pl_module.stop_requested = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the checkpoint was written at the end of the last step
        self.found["checkpoint_s"] = time.perf_counter() - self.found.pop("stopped")
        path = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
        self.found["checkpoint_bytes"] = path.stat().st_size
        ends = self._ends[self.warmup - 1 :]
        self.found["steps"] = len(ends) - 1
        self.found["step_s"] = (ends[-1][0] - ends[0][0]) / (len(ends) - 1)
        self.found["step_processor_s"] = (ends[-1][1] - ends[0][1]) / (len(ends) - 1)
        self.found["batch"] = self._batch
        self.found["training"] = self._memory(pl_module)
        self.found["cache"] = self._cache(trainer)
        if self.evaluate:
            self.found["evaluation"] = self._evaluation(trainer, pl_module)
        self.found["peak"] = self._memory(pl_module)
        self.file.write_text(json.dumps(self.found))

    def _memory(self, module: pl.LightningModule) -> dict[str, float | None]:
        """The most that was used so far, GiB."""
        if module.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved() / 2**30
            return {"gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": reserved, "imports_gib": 0.0}
        if IMPORTS_MIB is None:
            return {"gib": None, "imports_gib": None}
        return {"gib": status_mib("VmHWM") / 1024, "imports_gib": IMPORTS_MIB / 1024}

    def _cache(self, trainer: pl.Trainer) -> dict[str, int] | None:
        """What decoded samples take by now, and how many may follow."""
        samples: Any = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        cache = getattr(getattr(samples, "pictures", None), "cache", None)
        if cache is None or trainer.train_dataloader.num_workers:  # type: ignore[union-attr]
            return None
        pictures, held = cache.held()
        return {"pictures": pictures, "bytes": held, "capacity": cache.capacity_bytes, "of": len(samples.pictures)}

    # ------------------------------------------------------------------ an evaluation

    @torch.no_grad()
    def _evaluation(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        """Seconds of the batches of each loader, and of the probes on features like theirs."""
        module.eval()
        loaders = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context():
            parts = [self._batches(trainer, module, loader) for loader in loaders]
        width, classes = parts[0].pop("width"), trainer.datamodule.num_classes  # type: ignore[attr-defined]
        for part in parts[1:]:
            part.pop("width")

        def features(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.randint(classes, (samples,)) if classes else torch.full((samples,), -1)
            return torch.randn(samples, width, device=module.device), labels.to(module.device)

        bank, queries = features(parts[0]["samples"]), features(parts[1]["samples"] if len(parts) > 1 else 0)
        began = time.perf_counter()
        monitor(*bank, *queries)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, OnlineEvaluation):
                callback.of_fixed_samples(trainer, module)
        return {"loaders": parts, "probes_s": time.perf_counter() - began}

    def _batches(self, trainer: pl.Trainer, module: Any, loader: Any) -> dict[str, Any]:
        """Of one loader: samples, batches, and seconds of the first batch, of one whose patches are sought again, and of
        any other."""
        from lightning_modules.base import LOOKED_AT

        batches = without_end(loader)
        seconds: dict[str, float] = {}
        width = 0
        # the first call starts workers and makes what later ones use again
        for name, index in (("first_s", 0), ("dense_s", 0), ("plain_s", LOOKED_AT)):
            began = time.perf_counter()
            batch = trainer.strategy.batch_to_device(next(batches))
            width = module.validation_step(batch, index)["features"].shape[1]
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - began
        dense = -(-LOOKED_AT // loader.batch_size)
        return {"samples": len(loader.dataset), "batches": len(loader), "dense": dense, "width": width, **seconds}


def without_end(loader: Iterable[Any]) -> Any:
    """The batches of a loader, and the last one again for ever where they end."""
    last = None
    for last in loader:
        yield last
    yield from itertools.repeat(last)
