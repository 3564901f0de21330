"""PCD: every place of a small convnet's map is drawn to the same place of what a frozen network makes of the picture, and away
from other pictures.

Huang and Guo, "Pixel-Wise Contrastive Distillation", ICCV 2023, arXiv 2211.00218.
Departs from the published code: student and teacher see one view (pairing: index is published: a place of one crop beside the
same place of another); the teacher evaluates always; the student has the paper's block of attention, which the code lacks; the
queue starts empty and not with random vectors; warm-up by steps.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets, Tokens, Whole
from ssd.distributed import sum_over_ranks
from ssd.errors import UserError
from ssd.losses.contrastive import queue_contrast
from ssd.optim import LARS, Clip, OptimizerRule
from ssd.projection import Projection
from ssd.queue import Queue
from ssd.schedules import Cosine, Schedule
from ssd.spatial import MapAttention, PixelHead, spatial_adaptor
from ssd.teachers import Frozen
from ssd.views.overlap import sampled, shared_places
from ssd.views.view import Views

PAIRINGS = ("same", "boxes", "index")


class PixelBranch(nn.Module):
    """A backbone's map through what stands behind it: (V, B, C, H, W) -> (V, B, d, h, w)."""

    def __init__(self, backbone: Backbone, head: nn.Module, attention: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.attention = attention
        self.head = head

    def forward(self, views: Tensor) -> Tensor:
        # one by one: batch normalisation sees the pictures of a view together, and no other view of them
        return torch.stack([self.of_view(view) for view in views])

    def of_view(self, pictures: Tensor) -> Tensor:
        maps = map_of(self.backbone(pictures))
        return self.head(maps if self.attention is None else self.attention(maps))


class PCD(SelfDistillation):
    """PCD (Huang and Guo 2022).

    Args:
        backbone: the network that is trained, published a convnet.
        teacher: a frozen network, for instance ConvNet or ViT with weights; its map is pooled to the student's.
        teacher_head: the projector that the teacher was trained with, used at every place; null takes the teacher's own
            features.
        views: recipe with "global" views, two for pairings of two.
        pairing: what a place of the student's map is drawn to. "same": that place in the same view. "boxes": where another
            view shows the same part of the picture, over what both show. "index": the place of the same number in another
            view, whatever it shows, as published.
        temperature: what similarities are divided by.
        queue_size: K, pooled teacher features of the first view of earlier pictures, the negatives.
        attention_heads: of the block of self-attention behind the student's map, which is no part of what is exported;
            0 leaves it out.
        head_hidden_dim: wide layers of the student's head.
        head_batch_norm: normalise in the student's head.
    """

    student: PixelBranch
    teacher: Frozen

    def __init__(
        self,
        backbone: Backbone,
        teacher: Backbone,
        *,
        teacher_head: Projection | None = None,
        views: str | Views = "pcd",
        pairing: str = "same",
        temperature: float = 0.2,
        queue_size: int = 65_536,
        attention_heads: int = 8,
        head_hidden_dim: int = 4096,
        head_batch_norm: bool = True,
        lr: float | Schedule = Cosine(1.0, 0.0, warmup="10 epochs"),  # noqa: B008
        optimizer: OptimizerRule = LARS(),  # noqa: B008
        weight_decay: float | Schedule = 1e-5,
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        self._check(backbone, teacher, teacher_head, pairing, temperature)
        self.pairing = pairing
        self.temperature = temperature

        dim = teacher.patch_dim if teacher_head is None else teacher_head.out_dim
        freeze_behind_map(backbone, self.size)
        attention = MapAttention(backbone.patch_dim, attention_heads) if attention_heads else None
        head = PixelHead(backbone.patch_dim, head_hidden_dim, dim, head_batch_norm)
        self.student = PixelBranch(backbone, head, attention)
        adaptor = nn.Identity() if teacher_head is None else spatial_adaptor(teacher_head)
        self.teacher = Frozen(PixelBranch(teacher, adaptor))
        self.queue = Queue(queue_size, dim)

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        maps = self.teacher(batch.views["global"]).float()  # (V, B, d, H, W)
        keys = F.normalize(maps.mean((3, 4)), dim=-1)  # (V, B, d)
        if self.pairing != "boxes":
            maps = F.adaptive_avg_pool2d(maps.flatten(0, 1), self.grid).unflatten(0, maps.shape[:2])  # (V, B, d, h, w)
        return {"maps": maps, "keys": keys}

    def asked_of_teacher(self) -> dict[str, Any]:
        return {"grid": None if self.pairing == "boxes" else list(self.grid)}

    def targets(self, batch: Batch) -> Targets:
        taught = self.taught(batch)
        maps, keys = taught["maps"], taught["keys"]
        if self.pairing == "boxes":
            boxes = batch.boxes["global"]
            places, others, valid = shared_places(boxes.flatten(0, 1), boxes.roll(1, 0).flatten(0, 1), self.grid)
            shape = boxes.shape[:2]
            pixels = sampled(maps.roll(1, 0).flatten(0, 1), others).unflatten(0, shape)
            valid = valid.unflatten(0, shape)
            count = sum_over_ranks(valid.sum(dtype=torch.float32))
            placed = {"places": places.unflatten(0, shape), "valid": valid, "count": Whole(count)}
        else:
            pixels, placed = maps.roll(1, 0) if self.pairing == "index" else maps, {}
        return Targets(pixels=F.normalize(pixels, dim=2), keys=keys, **placed)  # (V, B, d, h, w)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        maps = self.student(batch.views["global"])  # (V, B, d, h, w)
        if self.pairing == "boxes":
            maps = sampled(maps.flatten(0, 1), targets.places.flatten(0, 1)).unflatten(0, maps.shape[:2])
        student, target = rows_of(F.normalize(maps.float(), dim=2)), rows_of(targets.pixels)
        negatives, valid = self.queue.vectors, self.queue.valid
        loss = queue_contrast(student, target, negatives, self.temperature, valid=valid)  # (V B N,)
        loss = loss.unflatten(0, (*maps.shape[:2], -1)).mean(-1)  # (V, B)
        if self.pairing == "boxes":
            return {"pixels": torch.where(targets.valid, loss, 0).sum() / targets.count.clamp_min(1)}
        return {"pixels": loss.sum() / (len(loss) * batch.total)}

    def update(self, targets: Targets) -> None:
        self.queue.update(targets.keys[0])

    def _check(
        self, backbone: Backbone, teacher: Backbone, head: Projection | None, pairing: str, temperature: float
    ) -> None:
        views = self.views.kinds().get("global", ())
        if pairing not in PAIRINGS:
            raise UserError(f"pairing: '{pairing}' is unknown. Choose one of {', '.join(PAIRINGS)}.")
        if not views or (pairing != "same" and len(views) < 2):
            raise UserError(
                f"views: this recipe has {len(views)} 'global' views. pairing: {pairing} needs "
                f"{'one' if pairing == 'same' else 'two'} or more."
            )
        if pairing == "boxes" and any(view.rotate or view.shear for view in views):
            raise UserError("pairing: boxes knows crops and flips alone. Set rotate and shear of the views to 0.")
        if not temperature > 0:
            raise UserError(f"temperature: {temperature} is not above 0. The published value is 0.2.")
        self.size = views[0].size
        rows, columns = backbone.grid(self.size, self.size)
        self.grid = (rows, columns)
        theirs = teacher.grid(self.size, self.size)
        if theirs[0] < self.grid[0] or theirs[1] < self.grid[1]:
            raise UserError(
                f"the teacher's map of views of {self.size} px is {theirs[0]} x {theirs[1]} and the student's {self.grid[0]} x "
                f"{self.grid[1]}: a teacher says nothing of places finer than its own. Use one with a map as fine or finer."
            )
        if head is not None and head.in_dim != teacher.patch_dim:
            raise UserError(
                f"teacher_head takes {head.in_dim} numbers and the teacher's map has {teacher.patch_dim}. Use the head it was "
                "trained with, or null."
            )


def map_of(tokens: Tokens) -> Tensor:
    """Patches as a map (B, D, h, w); a class token and registers are no part of it."""
    rows, columns = tokens.grid
    return tokens.patches.mT.unflatten(2, (rows, columns))


def rows_of(maps: Tensor) -> Tensor:
    """(V, B, d, h, w) -> (V B h w, d)"""
    return maps.flatten(3).permute(0, 1, 3, 2).flatten(0, 2)


def freeze_behind_map(backbone: Backbone, size: int) -> None:
    """Leaves out of training what pooled features alone pass: the norm behind a ConvNeXt's pooling, a MobileNet's last layer."""
    shell = copy.deepcopy(backbone).to("meta")
    patches = shell(torch.empty(2, backbone.in_chans, size, size, device="meta")).patches
    trained = {name: parameter for name, parameter in shell.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(patches.sum(), list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            backbone.get_parameter(name).requires_grad_(False)
