"""Our values of CAPI: its parameter groups and schedules, assignments for each place, and twenty steps of both networks that
learn."""

from typing import Any

import torch

from ssd.backbones.rotary_vit import RotaryViT
from ssd.batch import Masks
from ssd.heads import DirectHead
from ssd.masked_branch import PredictingBranch
from ssd.masking.batch import ordered
from ssd.masking.recipes import InverseBlockMasks
from ssd.optim import parameter_groups
from ssd.parity.inputs import equal_masks, numbers
from ssd.parity.parts import Outputs, curve
from ssd.parity.trajectories import run
from ssd.schedules import Cosine
from ssd.targets import Sinkhorn
from ssd.views.recipes import CropViews


def network() -> RotaryViT:
    """The predictor is wider than the encoder."""
    sizes: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_registers": 8}
    return RotaryViT(patch_size=8, predictor_depth=2, predictor_dim=36, **sizes)


def groups(device: torch.device) -> Outputs:
    """For each parameter of the student its shares of decay and of the learning rate."""
    student = PredictingBranch(network(), DirectHead(36, 20))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {
        names[id(parameter)]: torch.tensor([group["decays"], group["lr_scale"]], dtype=torch.double)
        for group in parameter_groups(student, "bias_and_norms_by_a_tenth", 1.0, 0.2)
        for parameter in group["params"]
    }


def schedules(device: torch.device) -> Outputs:
    return {
        "rate": curve(Cosine(1e-3, 0.0, warmup="4 steps", truncate=0.8)),
        "momentum": curve(Cosine(0.999, 1.0, warmup="4 steps", warmup_start=1.0, truncate=0.8)),
    }


def assignments(device: torch.device) -> Outputs:
    """Of two views of three samples at five places; of coarse scores, so that one can be beyond what exp holds and exact."""
    logits = numbers("teacher logits", 2, 3, 5, 4).to(device)
    far = (256 * logits).round() / 256 + 128 * torch.eye(4, device=device)[2]
    return {"of places": Sinkhorn(apart=2)(logits, 0.06), "far off": Sinkhorn(apart=2)(far, 1.0)}


def capi(device: torch.device) -> Outputs:
    return with_clusters(device, positionwise=True)


def capi_joint(device: torch.device) -> Outputs:
    return with_clusters(device, positionwise=False)


def with_clusters(device: torch.device, positionwise: bool) -> Outputs:
    from lightning_modules.capi import CAPI

    module = CAPI(
        network(),
        views=CropViews(size=32),
        masks=InverseBlockMasks(0.75),
        num_prototypes=20,
        positionwise=positionwise,
        lr=Cosine(2e-3, 0.0, warmup="1 epochs", truncate=0.8),
        clustering_lr=Cosine(1e-3, 0.0, warmup="1 epochs", truncate=0.8),
        momentum=Cosine(0.9, 1.0, warmup="1 epochs", warmup_start=1.0, truncate=0.8),
    )
    return run(module, device, three_asked_for, beside={"clusters": module.clusters})


def three_asked_for(step: int) -> Masks:
    """Four patches are seen and three of the twelve others predicted, others in each step."""
    hidden = equal_masks(step)
    masked = ordered(hidden.numpy())
    asked = torch.tensor(sorted((step + 5 * number) % 12 for number in range(3)))
    return Masks(hidden, masked, ordered(~hidden.numpy()), predicted=masked[:, :, asked])
