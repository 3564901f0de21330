"""Our values of DISCOVR: assignments, and twenty steps of a network for clips and one for their frames."""

from typing import Any

import torch

from ssd.backbones.video import VideoViT
from ssd.batch import Batch, Masks
from ssd.heads import restore_lengths
from ssd.masking.batch import ordered
from ssd.normalisers import standardised_over_patches
from ssd.parity.frozen_teachers import hold_positions
from ssd.parity.inputs import equal_masks, numbers, pictures
from ssd.parity.masked_trajectories import DECODER, RATE, vit
from ssd.parity.parts import Outputs
from ssd.parity.trajectories import CENTRES, SAMPLES, SIZE, run
from ssd.schedules import Linear
from ssd.targets import sinkhorn_knopp
from ssd.views.clips import ClipViews

FRAMES, MASKS = 4, 2


def assignments(device: torch.device) -> Outputs:
    """Of tokens, after ten rounds; of two tokens by hand; and what of frames is compared with prototypes."""
    two = torch.tensor([[1.0, 0.0], [0.9, 0.0]], device=device)
    features = 3 * numbers("frame patches", 2, 5, 7).to(device) + 1
    return {
        "ten rounds": sinkhorn_knopp(numbers("scores", 9, 5).to(device), 0.05, 10),
        "one round by hand": sinkhorn_knopp(two, 0.05, 1),
        "ten rounds by hand": sinkhorn_knopp(two, 0.05, 10),
        "standardised over patches": standardised_over_patches(features),
    }


def discovr(device: torch.device) -> Outputs:
    return of_clips_and_frames(device)


def discovr_released(device: torch.device) -> Outputs:
    """Hard assignments, prototypes that learn from clips alone, and every third frame judged."""
    return of_clips_and_frames(device, hard_assignments=True, prototypes_from_both=False, image_frame_step=3)


def of_clips_and_frames(device: torch.device, **settings: Any) -> Outputs:
    from lightning_modules.discovr import DISCOVR

    views = ClipViews(global_count=1, global_size=32, global_frames=FRAMES, local_count=0)
    module = DISCOVR(
        VideoViT("vit_tiny_patch16_224", tubelet=2, img_size=32, frames=FRAMES, arguments=SIZE),
        vit(embed_dim=32),
        views=views,
        num_masks=MASKS,
        num_prototypes=32,
        num_clusters=12,
        head_hidden_dim=16,
        head_bottleneck_dim=8,
        teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        image_weight=0.5,
        scd_weight=2.0,
        momentum=0.9,
        center_momentum=0.8,
        **DECODER,
        **RATE,
        **settings,
    )

    def begin() -> None:
        hold_positions(module)
        restore_lengths(module)

    def batch(step: int) -> Batch:
        clips = pictures("clips", step, 1, SAMPLES, 3, FRAMES, 32, 32)
        masks = {"global": tubes(step), "frames": of_frames(step, len(module.judged))}
        return Batch({"global": clips}, torch.arange(SAMPLES), SAMPLES, masks=masks)

    memory = {**CENTRES, "image_center.center": "image_center"}
    return run(module, device, after_filling=begin, batches=batch, memory=memory)


def tubes(step: int) -> Masks:
    """The decoder's mask and the others; each hides the same places at both times."""
    return shown_and_hidden(torch.cat([equal_masks(step + 3 * m).repeat(1, 1, 2) for m in range(1 + MASKS)]))


def of_frames(step: int, frames: int) -> Masks:
    """All frames under their first mask, then under their second."""
    each = [equal_masks(step + 5 * m + frame + 1, shown=5) for m in range(MASKS) for frame in range(frames)]
    return shown_and_hidden(torch.cat(each))


def shown_and_hidden(hidden: torch.Tensor) -> Masks:
    return Masks(hidden, ordered(hidden.numpy()), ordered(~hidden.numpy()))
