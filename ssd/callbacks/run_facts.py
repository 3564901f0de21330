"""What a run is, was given and ran on, and for how long: `run.json` in its folder."""

import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import ssd
from ssd.callbacks.online import OnlineEvaluation
from ssd.cores import available_cores
from ssd.facts import read_facts, write_facts
from ssd.resume import code_version
from ssd.summary import number_rows

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "numpy")


class RunFacts(pl.Callback):
    """Writes `run.json`: method, network, data and machine where a run begins; how far it is, how long it took and what was
    found at every evaluation and at its end. A run that goes on adds a session, so that the time of all of them is known.

    What is written is for people and for `ssd report`; nothing reads it to go on.
    """

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._begun = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # the first hook behind the module's on_train_start, which settles its length, that a resumed run calls too
        if self._facts or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._begun = time.monotonic()
        before = read_facts(Path(trainer.default_root_dir)).get("sessions") if pl_module.step else None
        session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "from_step": pl_module.step}
        self._facts = {
            "method": type(pl_module).__name__,
            "total_steps": pl_module.total_steps,
            "steps_per_epoch": pl_module.steps_per_epoch,
            "backbone": network(pl_module),
            "data": data_card(getattr(trainer, "datamodule", None)),
            "environment": environment(trainer),
            "sessions": [*(before if isinstance(before, list) else []), session],
        }
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._facts and not trainer.sanity_checking:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, OnlineEvaluation):
                    self._facts["numbers"] = number_rows(callback.numbers)
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._facts:
            self._write(trainer, pl_module, ended=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._facts:
            self._facts["sessions"][-1]["error"] = f"{type(exception).__name__}: {exception}"[:500]
            self._write(trainer, pl_module, ended=True)

    def _write(self, trainer: pl.Trainer, pl_module: Any, ended: bool = False) -> None:
        session = self._facts["sessions"][-1]
        if "ended" not in session:  # an evaluation behind the end is no training
            session |= {"step": pl_module.step, "seconds": round(time.monotonic() - self._begun, 1)}
            session |= {"ended": True} if ended else {}
        write_facts(Path(trainer.default_root_dir), self._facts)


def network(module: Any) -> dict[str, Any]:
    backbone = module.evaluated_backbone
    return {
        "class": type(backbone).__name__,
        "name": backbone.name,
        "export": backbone.exported_as,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
    }


def data_card(data: Any) -> dict[str, Any]:
    """Name, counts, fingerprint, channels and normalisation of a datamodule, as far as it has them."""
    card: dict[str, Any] = {"name": type(data).__name__}
    if hasattr(data, "parts"):
        parts = data.parts()
        card |= {"path": getattr(data, "path", None), "samples": {name: len(part) for name, part in parts.items()}}
        card |= {"batch_size": data.batch_size, "num_classes": data.num_classes, "classes": data.classes}
        card |= data.describe_state()
    return {name: str(value) if isinstance(value, Path) else plain(value) for name, value in card.items()}


def plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "ssd": code_version(),
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{trainer.world_size} x {name}",
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
    }


def processor() -> str:
    cores = available_cores()
    return f"CPU with {cores} cores"


def commit() -> str | None:
    """Of the source that runs, None where it is installed."""
    root = Path(ssd.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
