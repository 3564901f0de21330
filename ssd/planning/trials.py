"""Steps that are really taken, in a process of their own: what they need is then what a run would need."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd.errors import UserError

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "Cannot allocate memory", "MemoryError")
KILLED = -9  # what Linux does to a process that has taken too much


@dataclass(frozen=True)
class Measured:
    """What a trial took.

    Args:
        gib: memory at its highest, evaluation and checkpoint included: of the GPU, or of the process. None where this system
            does not say it.
        imports_gib: of that what the process had before a network was built.
        cache_gib: what decoded samples will still add to that.
        start_s: from the command to the first step.
        step_processor_s: processor time of a step in the training process.
    """

    batch: int
    micro_batches: int
    steps: int
    step_s: float
    step_processor_s: float
    gib: float | None
    imports_gib: float | None
    cache_gib: float
    start_s: float
    checkpoint_s: float
    checkpoint_bytes: int
    evaluation: dict[str, Any] | None

    @property
    def needed_gib(self) -> float | None:
        """Memory of a whole run."""
        return None if self.gib is None else self.gib + self.cache_gib


@dataclass(frozen=True)
class Trials:
    """Trials of one run.

    Args:
        argv: the words of `ssd fit`.
        accelerator: where they are taken, "cpu" or "gpu".
    """

    argv: Sequence[str]
    accelerator: str

    def take(self, batch: int, micro_batches: int, **settings: Any) -> Measured | None:
        """Steps of another batch and other slices; None where memory does not suffice.

        `settings` are those of `ssd.callbacks.trial.Trial`. Raises UserError where the run itself would.
        """
        with tempfile.TemporaryDirectory(prefix="ssd-plan-") as folder:
            file = Path(folder, "trial.json")
            given = {"file": str(file), "started": time.time(), **settings}
            trial = {"class_path": "ssd.callbacks.trial.Trial", "init_args": given}
            command = [sys.executable, "-m", "ssd", "fit", *self.argv, *self._instead(Path(folder))]
            command += ["--data.batch_size", str(batch), "--model.micro_batches", str(micro_batches)]
            command += ["--trainer.callbacks", json.dumps([trial])]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode == 0 and file.is_file():
                return measured(json.loads(file.read_text()), micro_batches)
        said = ended.stderr.strip()
        if ended.returncode == KILLED or any(words in said for words in OUT_OF_MEMORY):
            return None
        lines = said.splitlines() or ["it said nothing"]
        raise UserError(lines[-1].partition("error: ")[2] or f"the measured steps failed: {lines[-1]}")

    def _instead(self, folder: Path) -> list[str]:
        """Settings of one process that leaves nothing behind and evaluates only where it is asked."""
        settings = {
            "trainer.accelerator": self.accelerator,
            "trainer.devices": 1,
            "trainer.num_nodes": 1,
            "trainer.strategy": "auto",
            "trainer.default_root_dir": folder,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.limit_val_batches": 0,
            "checkpoints.folder": "null",
            "checkpoints.every_n_steps": 0,
            "checkpoints.every_n_epochs": 0,
            "json": "null",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def measured(found: dict[str, Any], micro_batches: int) -> Measured:
    cache = found["cache"]
    growth = 0.0
    if cache is not None and cache["pictures"]:
        whole = cache["bytes"] / cache["pictures"] * cache["of"]
        growth = (min(whole, cache["capacity"]) - cache["bytes"]) / 2**30
    return Measured(
        batch=found["batch"],
        micro_batches=micro_batches,
        steps=found["steps"],
        step_s=found["step_s"],
        step_processor_s=found["step_processor_s"],
        gib=found["peak"]["gib"],
        imports_gib=found["peak"]["imports_gib"],
        cache_gib=growth,
        start_s=found["start_s"],
        checkpoint_s=found["checkpoint_s"],
        checkpoint_bytes=found["checkpoint_bytes"],
        evaluation=found.get("evaluation"),
    )
