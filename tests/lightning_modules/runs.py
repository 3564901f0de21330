"""Small runs of the engine inside Lightning, and what two of them must have in common."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from datamodules.digits import Digits
from lightning_modules.dino import DINO
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from ssd.callbacks.online import OnlineEvaluation
from ssd.errors import UserError
from ssd.schedules import Cosine
from ssd.views.recipes import DINOViews
from ssd.weights.checkpoint import read_checkpoint
from tests.contract import poison

VIEWS = DINOViews(global_size=16, local_count=2, local_size=8)
HEAD = {"num_prototypes": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def convnet(method: type = DINO, **settings: Any) -> Any:
    """With all that a resume could lose: drop path, batch normalisation in two networks, a centre, schedules."""
    torch.manual_seed(0)
    backbone = ConvNet("resnet18", in_chans=1, drop_path_rate=0.3, arguments=RESNET)
    return method(
        backbone, **{"views": VIEWS, **HEAD, "head_batch_norm": True, "momentum": Cosine(0.9, 1.0)} | settings
    )


def vit(method: type = DINO, *, drop_path_rate: float = 0.0, **settings: Any) -> Any:
    """Without layers that couple samples: slices and processes must not matter."""
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=16, in_chans=1, drop_path_rate=drop_path_rate, arguments=VIT)
    return method(backbone, **{"views": VIEWS, **HEAD, "lr": 1e-4, "lr_rule": "none"} | settings)


def digits(**settings: Any) -> Digits:
    """10 steps an epoch."""
    return Digits(**{"batch_size": 16, "limit": 160, "evaluation_limit": 48} | settings)


def fit(
    folder: Path,
    module: Any,
    data: Any = None,
    *,
    callbacks: Sequence[pl.Callback] = (),
    resume: Path | None = None,
    weights_only: bool | None = None,
    checkpoints: dict[str, Any] | None = None,
    evaluation: OnlineEvaluation | None = None,
    **trainer: Any,
) -> pl.Trainer:
    """Trains as the command does, with the callbacks given in front of the evaluation and the checkpoints."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    length = {} if module.steps is not None else {"max_epochs": 3}
    ours = [*callbacks, evaluation or OnlineEvaluation(), Checkpoints(**checkpoints or {})]
    settings = {"accelerator": "cpu", "use_distributed_sampler": False, "default_root_dir": folder, **quiet, **length}
    trainer = pl.Trainer(
        **settings | {"plugins": AtomicCheckpointIO(), "limit_val_batches": 2} | trainer, callbacks=ours
    )
    trainer.fit(module, datamodule=data or digits(), ckpt_path=resume, weights_only=weights_only)
    return trainer


def fit_as_rank(
    rank: int, world: int, folder: Path, build: Callable[..., Any], method: dict[str, Any], trainer: dict[str, Any]
) -> Any:
    """One rank of Lightning's own data-parallel run, in the process group of the fixture `pair`: its module,
    and its UserError or None.

    The module is built here, because tensors that are sent to both processes would be shared by them.
    """
    module = build(**method)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    torch.manual_seed(7)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ranks = {"devices": world, "strategy": "ddp", "limit_val_batches": 0}
            fit(folder, module, digits(batch_size=16 // world), **ranks | trainer)
    except UserError as error:
        return module, str(error)
    finally:
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    return module, None


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def best(folder: Path) -> Path:
    return folder / "checkpoints" / "best.ckpt"


def step_of(checkpoint: Path) -> int:
    return read_checkpoint(checkpoint)["state_dict"]["_extra_state"]["step"]


def everything(checkpoint: Path) -> dict[str, Any]:
    """All that a run goes on from: weights, buffers, counts, optimisers, generators, Lightning's place."""
    found = read_checkpoint(checkpoint)
    return {part: found[part] for part in ("state_dict", "optimizer_states", "generators", "epoch", "global_step")}


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Names of what is not equal to the bit in nested plain data."""
    if isinstance(ours, torch.Tensor):
        return [] if isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs) else [where]
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f"{where}: keys"]
        return [name for key in ours for name in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return [f"{where}: length"]
        return [name for i, pair in enumerate(zip(ours, theirs)) for name in differences(*pair, f"{where}[{i}]")]
    return [] if ours == theirs else [f"{where}: {ours} and {theirs}"]


class CopyCheckpoints(pl.Callback):
    """Keeps the checkpoints of some steps as they were at moments when a run could be killed.

    Copies are named for the file, its step and the hook in which it was first seen. The callback stands in front of
    `Checkpoints`, so a hook sees what the hooks before it have written.
    """

    def __init__(self, folder: Path, steps: Sequence[int]):
        self.folder, self.steps = folder, steps
        folder.mkdir()

    def copy(self, trainer: pl.Trainer, hook: str) -> None:
        if trainer.lightning_module.step not in self.steps or not trainer.is_global_zero:
            return
        for file in Path(trainer.default_root_dir, "checkpoints").glob("*.ckpt"):
            shutil.copyfile(file, self.folder / f"{file.stem}-{step_of(file)}-{hook}.ckpt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.copy(trainer, "next-batch")

    def on_validation_start(self, trainer, pl_module) -> None:
        self.copy(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.copy(trainer, "epoch-end")

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.copy(trainer, "next-epoch")


class At(pl.Callback):
    """Calls `action(trainer, module)` at the end of the step after which that many are done."""

    def __init__(self, step: int, action: Callable[[pl.Trainer, Any], Any]):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.step == self.step:
            self.action(trainer, pl_module)


class Poison(pl.Callback):
    """Puts a NaN into the batches of these steps, counted from 0."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if pl_module.step in self.steps:
            poison(batch)


class Seen(pl.Callback):
    """The samples of every step."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.indices.append(batch.index.tolist())


class LogStep(pl.Callback):
    """Logs `val/step`, so that each evaluation is better than the one before."""

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("val/step", float(pl_module.step))
