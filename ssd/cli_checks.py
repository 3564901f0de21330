"""What the command refuses before a run begins, and what it fills in: settings that each are fine and together are not."""

import os
import warnings
from typing import Any

from ssd.cores import busy_cores
from ssd.errors import UserError

BUSY = 0.75
"""Share of the cores from which a run of several threads is warned."""


def check_trainer(trainer: Any) -> None:
    """Raises UserError for flags that would take away what a run here always has."""
    if trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing: false would lose the run. Use checkpoints.every_n_steps: 0 and "
            "checkpoints.every_n_epochs: 0 to write only the last and the best checkpoint."
        )
    if trainer.barebones:
        raise UserError("trainer.barebones: true would run without logs and evaluation. Use ssd without it.")


def warn_if_busy(trainer: Any) -> None:
    """Warns where other work has most of this machine's cores and torch would use several: threads that wait for each other,
    while each waits for a core, are much slower than one."""
    import torch

    threads = torch.get_num_threads()
    if (
        trainer.strategy.root_device.type != "cpu" or threads < 2 or trainer.world_size > 1
    ):  # its own processes are others too
        return
    busy = busy_cores()
    if busy > BUSY * (os.cpu_count() or 1):
        warnings.warn(
            f"other work has {busy:.1f} of this machine's {os.cpu_count()} cores, and {threads} threads of a run wait for each "
            "other. If steps are slow, stop the other work, or set OMP_NUM_THREADS=1.",
            stacklevel=2,
        )


TAKEN = {1: "sounds", 2: "pictures", 3: "clips"}
"""What a backbone of so many axes takes."""


def check_view_sizes(model: Any) -> None:
    """Raises UserError for views that the backbone does not take, or that a transformer's patches do not divide, which
    would be padded in every step."""
    from ssd.backbones.video import VideoViT
    from ssd.backbones.vit import ViT
    from ssd.teachers import Preprocessed
    from ssd.views.view import PictureViews

    backbone = model.evaluated_backbone
    lengths = next(iter(model.views.kinds().values()))[0].lengths
    if (1 if lengths is None else len(lengths)) != backbone.axes:  # of whole sounds it is not known
        raise UserError(
            f"the views are {type(model.views).__name__} and {type(backbone).__name__} takes {TAKEN[backbone.axes]}. Use views "
            f"of {TAKEN[backbone.axes]}, or a backbone for such views."
        )
    if not isinstance(model.views, PictureViews):
        return
    resized = {id(part.backbone) for part in model.modules() if isinstance(part, Preprocessed)}
    for name, part in model.named_modules():
        if not isinstance(part, ViT | VideoViT) or id(part) in resized:
            continue
        for kind, views in model.views.kinds().items():
            size = views[0].size
            wrong = [patch for patch in part.patch[-2:] if size % patch]
            if wrong:
                patch = wrong[0]
                fitting = [size // patch * patch, size // patch * patch + patch]
                raise UserError(
                    f"{kind} views of {size} px do not divide into the patches of {patch} px of {part.name} ({name}). Use "
                    f"a multiple of {patch} for {kind}_size, for instance {' or '.join(str(n) for n in fitting if n)}."
                )


def set_channels(config: Any, channels: int) -> None:
    """The data decides how many channels a backbone reads, unless the config says it."""
    from ssd.backbones.base import Backbone
    from ssd.record import import_class

    if not hasattr(config, "class_path") or not hasattr(config, "init_args"):
        return
    if issubclass(import_class(config.class_path), Backbone):
        if config.init_args.get("in_chans") == 3:
            config.init_args.in_chans = channels
        return
    for value in vars(config.init_args).values():
        set_channels(value, channels)
