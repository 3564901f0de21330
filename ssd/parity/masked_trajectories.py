"""Twenty steps of each method of masked regression, which differ from the others in what they see: visible patches alone, at
fixed positions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssd.backbones.vit import ViT, fix_positions
from ssd.batch import Masks
from ssd.masking.batch import ordered
from ssd.parity.inputs import equal_masks, fill
from ssd.parity.trajectories import PER_EPOCH, SIZE, run
from ssd.schedules import Cosine, Linear
from ssd.step import Step
from ssd.views.recipes import CropViews, PlainViews

assert PER_EPOCH == 5  # of which the restatement's warm-ups of an epoch are
DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
RATE: dict[str, Any] = {"lr": Cosine(2e-3, 0.0, warmup="1 epochs"), "lr_reference_batch": 16}


def mae(device: torch.device) -> dict[str, Tensor]:
    from lightning_modules.mae import MAE

    module = MAE(vit(), views=CropViews(size=32), **DECODER, **RATE)
    return run_masked(module, device)


def dbot(device: torch.device) -> dict[str, Tensor]:
    """Stages of 8 and 12 steps; the first teacher stops behind its first block."""
    from lightning_modules.dbot import DBOT
    from ssd.optim import Clip

    module = DBOT(
        vit(),
        views=CropViews(size=32),
        stages=(2.0, 3.0),
        teacher_depth=1,
        **DECODER,
        decoder_drop_path_rate=0.0,
        clip=Clip(0.75, over="all"),
        **RATE,
    )
    begin_stage = module.begin_stage

    def begin_with_known_weights(number: int) -> None:
        begin_stage(number)  # whose own draw follows torch's generator
        fill(module.student, "fresh ")
        keep_positions(module)

    module.begin_stage = begin_with_known_weights  # type: ignore[method-assign]
    return run_masked(module, device)


def dmae(device: torch.device) -> dict[str, Tensor]:
    """A wider and deeper teacher, tapped behind the third of its four blocks."""
    from lightning_modules.dmae import DMAE

    teacher = vit(embed_dim=32, depth=4)
    module = DMAE(vit(), teacher, views=CropViews(size=32), feature_weight=2.0, **DECODER, **RATE)
    return run_masked(module, device)


def further_pretraining(device: torch.device) -> dict[str, Tensor]:
    """Stages of 8 and 12 steps."""
    from lightning_modules.further_pretraining import FurtherPretraining

    module = FurtherPretraining(
        vit(),
        views=PlainViews(size=32),
        stages=(2.0, 3.0),
        distillation_weight=0.5,
        **DECODER,
        lr=Linear(1e-3, 0.0, reaches_end=False),
    )
    return run_masked(module, device)


def vit(**arguments: int) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments=SIZE | arguments)


def keep_positions(module: Step) -> None:
    for network in module.modules():
        if isinstance(network, ViT):
            fix_positions(network.model, network.name)


def visible_alone(step: int) -> Masks:
    hidden = equal_masks(step)
    return Masks(hidden, ordered(hidden.numpy()), ordered(~hidden.numpy()))


def run_masked(
    module: Step, device: torch.device, masked: Callable[[int], Masks] = visible_alone, **more: Any
) -> dict[str, Tensor]:
    """`run` of a method whose networks' positions are fixed; `more` is for it."""

    def begin() -> None:
        with torch.no_grad():
            keep_positions(module)
        module.begin_fresh()

    return run(module, device, masked, after_filling=begin, **more)
