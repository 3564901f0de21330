"""Twenty steps of each method by our engine: every loss term, the gradients' norm, and how far the weights went.

Methods are imported inside, so that the parts stay free of Lightning.
"""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ssd.backbones.vit import ViT
from ssd.batch import Batch, Masks
from ssd.masking.batch import packed
from ssd.optim import Clip
from ssd.parity.inputs import fill, masks, pictures, without_key_bias
from ssd.schedules import Cosine, Linear
from ssd.step import Step
from ssd.teachers import NoTeacher
from ssd.views.recipes import DINOViews, PlainViews

STEPS, PER_EPOCH, SAMPLES = 20, 5, 8
# norms of clipping are amid those of the gradients, because Adam takes no notice of a factor that all steps share

SIZE: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
CENTRES = MappingProxyType({"center.center": "center", "patch_center.center": "patch_center"})
HEAD: dict[str, Any] = {"head_hidden_dim": 16, "head_bottleneck_dim": 8, "num_prototypes": 32}


def dino(device: torch.device) -> dict[str, Tensor]:
    from lightning_modules.dino import DINO

    module = DINO(
        ViT("vit_tiny_patch16_224", img_size=32, arguments=SIZE),
        views=DINOViews(global_size=32, local_size=16, local_count=2),
        **HEAD,
        lr=Cosine(2e-3, 1e-6, warmup="4 steps"),
        lr_reference_batch=16,
        teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        momentum=Cosine(0.9, 1.0),
        clip=Clip(0.5, over="tensor"),
        freeze_last_layer="1 epochs",
        norm_last_layer=False,
    )
    return run(module, device, masked=None)


def ibot(device: torch.device) -> dict[str, Tensor]:
    from lightning_modules.ibot import IBOT

    module = IBOT(
        ViT("vit_tiny_patch16_224", img_size=32, arguments=SIZE),
        views=DINOViews(global_size=32, local_size=16, local_count=2),
        **HEAD,
        shared_head=False,
        mask_start="1 epochs",
        ibot_weight=2.0,
        lr=Cosine(2e-3, 1e-6, warmup="4 steps"),
        lr_reference_batch=16,
        teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        patch_teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        momentum=Cosine(0.9, 1.0),
        clip=Clip(3.0, over="tensor"),
    )
    return run(module, device)


def dinov2_centring(device: torch.device) -> dict[str, Tensor]:
    return dinov2(device, clip=Clip(12.0, over="module"), shared_head=True, target_rule="centering")


def dinov2_sinkhorn(device: torch.device) -> dict[str, Tensor]:
    own = {"shared_head": False, "num_patch_prototypes": 24}
    return dinov2(device, clip=Clip(5.0, over="module"), target_rule="sinkhorn", **own)


def dinov2(device: torch.device, method: Any = None, **settings: Any) -> dict[str, Tensor]:
    from lightning_modules.dinov2 import DINOv2

    module = (method or DINOv2)(
        ViT("vit_tiny_patch16_224", img_size=32, arguments=SIZE | {"init_values": 0.1, "reg_tokens": 2}),
        views=DINOViews(global_size=32, local_size=16, local_count=2),
        **HEAD,
        patch_head_bottleneck_dim=6,
        koleo_group=4,
        lr=Cosine(2e-3, 1e-6, warmup="4 steps"),
        lr_reference_batch=32,
        teacher_temperature=Linear(0.04, 0.07, until=0.5),
        momentum=Cosine(0.9, 1.0),
        **settings,
    )
    return run(module, device)


def franca(device: torch.device) -> dict[str, Tensor]:
    from lightning_modules.franca import Franca

    return dinov2(device, clip=Clip(12.0, over="module"), method=Franca, levels=3)


def dinov3(device: torch.device) -> dict[str, Tensor]:
    from lightning_modules.dinov3 import DINOv3

    module = DINOv3(
        ViT("vit_small_patch16_dinov3", img_size=32, arguments=SIZE | {"init_values": 0.1, "num_reg_tokens": 2}),
        views=DINOViews(global_size=32, local_size=16, local_count=2, gram_size=64),
        **HEAD,
        num_patch_prototypes=24,
        patch_head_bottleneck_dim=6,
        own_local_norm=True,
        koleo_group=4,
        dino_local_weight=0.5,
        gram_anchor="refresh",
        gram_refresh_from="8 steps",
        gram_refresh_every="3 steps",
        gram_refreshes=2,
        gram_weight=1.5,
        lr=Cosine(2e-3, 1e-6, warmup="4 steps"),
        lr_reference_batch=32,
        teacher_temperature=Linear(0.04, 0.07, until=0.5),
        momentum=Cosine(0.9, 1.0),
        clip=Clip(5.0, over="module"),
    )
    return run(module, device)


def random_teacher(device: torch.device) -> dict[str, Tensor]:
    from lightning_modules.random_teacher import RandomTeacher, blend

    module = RandomTeacher(
        ViT("vit_tiny_patch16_224", img_size=32, arguments=SIZE),
        views=PlainViews(size=32),
        **HEAD,
        distance=0.3,
    )

    def between_two_draws() -> None:
        other = copy.deepcopy(module.student)
        fill(other, "another ")
        blend(module.student, other, 0.3)

    return run(module, device, masked=None, after_filling=between_two_draws)


def batch_of(module: Step, step: int, masked: Callable[[int], Masks] | None) -> Batch:
    """The pictures of a step, by the views that the method has, and its masks by a fixed table."""
    views = {
        kind: pictures(kind, step, len(each), SAMPLES, 3, each[0].size, each[0].size)
        for kind, each in module.views.kinds().items()
    }
    tables = {} if masked is None else {"global": masked(step)}
    return Batch(views=views, index=torch.arange(SAMPLES), total=SAMPLES, masks=tables)


def of_many_sizes(step: int) -> Masks:
    return packed(masks(step).numpy(), 1, 64)


def run(
    module: Step,
    device: torch.device,
    masked: Callable[[int], Masks] | None = of_many_sizes,
    after_filling: Callable[[], None] | None = None,
    batches: Callable[[int], Batch] | None = None,
    memory: Mapping[str, str] = CENTRES,
    beside: Mapping[str, nn.Module] = MappingProxyType({}),
    watched: Callable[[], dict[str, float]] = dict,
) -> dict[str, Tensor]:
    """Every loss term and the gradients' norm by step; what is remembered and how far each weight of student and teacher
    went.

    Args:
        masked: step -> the masks of its global views; None for a method without.
        after_filling: what a method does before its first step, once weights are there.
        batches: step -> its batch, where that is more than pictures and masks.
        memory: buffers of the module that are compared behind the last step -> what they are called.
        beside: other networks that learn.
        watched: what else is compared behind each step.
    """
    module.to(device).train()
    networks: dict[str, nn.Module] = {"student": module.student, **beside}
    if not isinstance(module.teacher, NoTeacher):
        networks["teacher"] = module.teacher.network  # type: ignore[assignment]
    for network in networks.values():
        fill(network)
    if getattr(module, "gram_teacher", None) is not None:
        fill(module.gram_teacher.network, "gram ")  # type: ignore[union-attr, arg-type]
    if after_filling is not None:
        after_filling()
    before = {kind: copy.deepcopy(dict(network.named_parameters())) for kind, network in networks.items()}

    module.begin(STEPS, PER_EPOCH)
    optimizers = module.build_optimizers()
    curves: dict[str, list[float]] = {}
    for step in range(STEPS):
        batch = batch_of(module, step, masked) if batches is None else batches(step)
        report = module.take_step(batch.to(device), optimizers)
        for name, value in {**report.terms, "gradient norm": report.gradient_norm, **watched()}.items():
            curves.setdefault(name, []).append(value)

    values = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}
    values |= {memory[name]: buffer for name, buffer in module.named_buffers() if name in memory}
    for kind, network in networks.items():
        for name, parameter in network.named_parameters():
            change = without_key_bias(name, (parameter - before[kind][name]).detach())
            if kind == "teacher" or parameter.requires_grad:
                values[f"{kind} {name}"] = change
    return values
