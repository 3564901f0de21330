"""Our values of what learns from networks that never change, between their blocks and at their end: LEAP and hybrid
distillation."""

from typing import Any

import torch

from ssd.backbones.redundancy import least_redundant
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.cka import linear_cka
from ssd.curriculum import Curriculum
from ssd.mixing import mixed
from ssd.optim import Clip
from ssd.parity.inputs import normalisation, numbers, pictures
from ssd.parity.masked_trajectories import RATE, keep_positions, vit
from ssd.parity.parts import Outputs, leaf, with_gradients
from ssd.parity.trajectories import SAMPLES, SIZE, run
from ssd.relations import KINDS, compared, relation_divergence, relation_logits
from ssd.schedules import Cosine
from ssd.step import Step
from ssd.views.recipes import CropViews

# ---------------------------------------------------------------------- parts


def likeness(device: torch.device) -> Outputs:
    """Of features of other widths, which share a part."""
    x, y = numbers("student rows", 24, 5).to(device), numbers("teacher rows", 24, 7).to(device) + 1
    y[:, :5] += x
    return {
        "unbiased": linear_cka(x, y)[None],
        "plain": linear_cka(x, y, unbiased=False)[None],
        "unrelated": linear_cka(x, numbers("other rows", 24, 7).to(device))[None],
    }


COURSE = (0.2, 0.5, 0.9, 0.9, None, 0.4, 0.3, None, None, 0.1, 0.95, 0.9, 0.99, 0.2, None, 0.3, 0.99, 0.99, 0.99, 0.99)


def courses(device: torch.device) -> Outputs:
    """The target block behind each of twenty steps, some of which measure nothing."""
    values: Outputs = {}
    for name, smoothing, limit in (("each by itself", 1.0, None), ("smoothed", 0.6, None), ("limited", 0.6, 4)):
        curriculum = Curriculum(6, 0.8, smoothing)
        curriculum.begin(2, 0)
        blocks = []
        for step, found in enumerate(COURSE):
            curriculum.update(found, step + 1, limit)
            blocks.append(curriculum.block)
        values[name] = torch.tensor(blocks)
    return values


def mixtures(device: torch.device) -> Outputs:
    return {"mixed": mixed(numbers("pictures", 2, 6, 3).to(device), 0.3, 3)}


def redundancy(device: torch.device) -> Outputs:
    """Of even and odd numbers of patches, and of four of which two are alike."""
    alike = torch.eye(3)[[0, 0, 1, 2]][None].to(device)
    patches = numbers("patches", 2, 11, 4).to(device)
    return {
        "of 10, 6": least_redundant(patches[:, :10], 6),
        "of 11, 8": least_redundant(patches, 8),
        "of two alike": least_redundant(alike, 3),
    }


def relations(device: torch.device) -> Outputs:
    """Two heads of the student compared with three of a wider teacher, of tokens of which one was dropped."""
    values: Outputs = {}
    kept = torch.tensor([0, 1, 3, 4], device=device)
    teacher = numbers("teacher qkv", 3, 2, 3, 5, 6).to(device)[:, :, :, kept]
    for kind in KINDS:
        student = leaf("student qkv", 3, 2, 2, 4, 6, device=device)
        mine, theirs = compared(student, kind, 3), compared(teacher, kind, 3)
        divergence = relation_divergence(relation_logits(mine), relation_logits(theirs))
        values |= with_gradients(kind, divergence, student=student)
    return values


# ---------------------------------------------------------------------- twenty steps


def leap(device: torch.device) -> Outputs:
    """The likeness of ten patches of each picture, without bias, every second step; three steps a block at most."""
    more = {"cka_threshold": 0.3, "cka_patches": 10, "cka_every": 2, "patience": "3 steps"}
    return of_blocks(device, **more)


def leap_published_likeness(device: torch.device) -> Outputs:
    """Of all patches, smoothed, in each step; the teacher's norm is left out."""
    more = {
        "cka_threshold": 0.4,
        "cka_patches": None,
        "unbiased_cka": False,
        "cka_smoothing": 0.5,
        "patience": "2 epochs",
    }
    return of_blocks(device, final_norm=False, start_block=1, **more)


def leap_all_blocks(device: torch.device) -> Outputs:
    return of_blocks(device, match="all", mixup=False)


def of_blocks(device: torch.device, **settings: Any) -> Outputs:
    from lightning_modules.leap import LEAP

    module = LEAP(
        vit(),
        vit(embed_dim=32, depth=4),
        views=CropViews(size=32),
        mixup_group=4,
        cls_weight=0.5,
        lr=Cosine(4.0, 4e-3, warmup="1 epochs"),
        lr_reference_batch=32,
        weight_decay=0.1,
        clip=Clip(0.8, over="all"),
        **settings,
    )

    def course() -> dict[str, float]:
        measured = {"cka": module.evident[0]} if module.evident else {"cka": 0.0}
        return {"block": float(module.curriculum.block), **measured} if module.match == "curriculum" else {}

    return run(module, device, None, after_filling=lambda: hold_positions(module), watched=course)


def hybrid(device: torch.device) -> Outputs:
    """Relations of attention with a wider and deeper teacher of more heads; features of one with other patches, which knows
    pictures by another mean and deviation."""
    relating = vit(embed_dim=32, depth=4, num_heads=4)
    arguments = SIZE | {"embed_dim": 16, "patch_size": 4}
    describing = ViT("vit_tiny_patch16_224", img_size=16, fixed_positions=True, arguments=arguments)
    return of_two_teachers(device, relating, describing, feature_normalize="imagenet", relation_weight=2.0)


def hybrid_values(device: torch.device) -> Outputs:
    """Relations of values, in three heads, squared distances of features, and other places."""
    more: dict[str, Any] = {"relation": "vv", "relation_heads": 3, "feature_distance": "l2", "projector_hidden": (10,)}
    places: dict[str, Any] = {"relation_blocks": (3,), "teacher_relation_blocks": (2,), "drop_behind": (1,)}
    return of_two_teachers(device, vit(), vit(), drop_ratio=0.5, **more, **places)


def of_two_teachers(device: torch.device, relating: ViT, describing: ViT, **settings: Any) -> Outputs:
    from lightning_modules.hybrid import HybridDistillation

    module = HybridDistillation(
        vit(depth=3),
        views=CropViews(size=32),
        relation_teacher=relating,
        feature_teacher=describing,
        clip=Clip(1.3, over="all"),
        **settings,
        **RATE,
    )
    return run(module, device, after_filling=lambda: hold_positions(module), batches=of_known_normalisation)


def of_known_normalisation(step: int) -> Batch:
    """One view of each picture, and by which mean and deviation it was normalised."""
    views = {"global": pictures("global", step, 1, SAMPLES, 3, 32, 32)}
    return Batch(views=views, index=torch.arange(SAMPLES), total=SAMPLES, normalisation=normalisation())


def hold_positions(module: Step) -> None:
    with torch.no_grad():
        keep_positions(module)
