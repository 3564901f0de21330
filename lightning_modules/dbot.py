"""dBOT: an encoder of visible patches predicts what a frozen teacher makes of the whole picture; the student becomes the next
teacher, and begins again.

Liu et al., "Exploring Target Representations for Masked Autoencoders", ICLR 2024, arXiv 2209.03917.
Departs from the published code: each stage begins with a whole fresh draw, the same on every process, and an optimiser
without memory (there biases of the patch embedding and moments stay, and processes draw different weights).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.cached_targets.forms import Sampled, picked
from ssd.decoders import MaskedDecoder
from ssd.errors import UserError
from ssd.losses.regression import smooth_error
from ssd.masked_branch import MaskedBranch, has_cls, require_exact, visible_places
from ssd.masking.recipes import Masking, RandomMasks
from ssd.normalisers import standardised
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.parallel import load_whole
from ssd.record import build
from ssd.schedules import Cosine, Schedule
from ssd.teachers import Frozen
from ssd.views.view import Views


class DBOT(SelfDistillation):
    """dBOT (Liu et al. 2022).

    Args:
        backbone: a ViT; published are fixed positions (ViT.fixed_positions) and drop path .2.
        views: recipe with one "global" view or more, each predicted by itself.
        masks: how patches are hidden, the same number in each sample.
        stages: lengths of the stages relative to each other. The first student learns from the first teacher, every later one
            from the student before it; schedules begin anew with each.
        teacher: the first teacher: null is the student's own first draw, as published; else a frozen network of its own, for
            instance ViT with weights, which may be larger and takes one stage.
        teacher_depth: blocks of the first teacher that are run; null is all, 0 leaves the patch embedding (published for
            ViT-L and ViT-H).
        cls_in_loss: also predict the class token, which counts as one more patch.
        decoder_dim, decoder_depth, decoder_heads, decoder_drop_path_rate: of the decoder's blocks.
    """

    student: MaskedBranch
    teacher: Frozen
    fresh_seed: Tensor
    stored_in_part = Sampled(tokens={"patches": 2})

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "crop",
        masks: Masking = RandomMasks(0.75),  # noqa: B008 (frozen)
        stages: Sequence[float] = (1.0, 1.0),
        teacher: Backbone | None = None,
        teacher_depth: int | None = None,
        cls_in_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_drop_path_rate: float = 0.2,
        lr: float | Schedule = Cosine(1.5e-4, 0.0, warmup="40 epochs"),  # noqa: B008
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.05,
        clip: Clip | None = Clip(3.0, over="all"),  # noqa: B008
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
        backbone.require("visible", "taps", by="dBOT")
        first = backbone if teacher is None else teacher
        self._check(masks, stages, teacher, teacher_depth, first)
        self.masking = {"global": masks}
        self.stages = tuple(stages)
        self.teacher_depth = first.num_blocks if teacher_depth is None else teacher_depth
        self.cls_in_loss = cls_in_loss and has_cls(backbone) and has_cls(first)

        decoder = MaskedDecoder(
            backbone.embed_dim,
            first.embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            drop_path_rate=decoder_drop_path_rate,
            has_cls=has_cls(backbone),
        )
        self.student = MaskedBranch(backbone, decoder)
        self.teacher = Frozen(copy.deepcopy(first))
        # of this run, in its state: every process and a resumed run draw the same next students
        self.register_buffer("fresh_seed", torch.randint(2**31, (1,)))

    def targets(self, batch: Batch) -> Targets:
        return Targets(**self.taught(batch))

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        pictures = batch.views["global"]
        teacher: Any = self.teacher.network
        depth = teacher.num_blocks if self.stage > 0 else self.teacher_depth
        tokens = self.teacher(pictures.flatten(0, 1), taps=(depth,), until=max(depth, 1))
        features = standardised(tokens.taps[f"block{depth}"]).unflatten(0, pictures.shape[:2])  # before the final norm
        return {"patches": features[:, :, teacher.num_prefix :], "cls": features[:, :, 0]}  # (V, B, N, D), (V, B, D)

    def asked_of_teacher(self) -> dict[str, Any]:
        return {"depth": self.teacher_depth if self.stage == 0 else None}

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        decoded = self.student(batch.views["global"], visible_places(masks))
        places = getattr(targets, "places", None)  # of the patches whose targets were stored, where not all were
        hidden, predicted = picked(masks.boolean, places), picked(decoded.patches, places)
        error = torch.where(hidden, smooth_error(predicted, targets.patches), 0).sum((0, 2))  # (B,)
        error = error * (masks.boolean.shape[2] / hidden.shape[2])  # 1 where all were
        count = masks.boolean.sum(-1)[0, 0]  # the same in all
        if self.cls_in_loss:
            error, count = error + smooth_error(decoded.cls, targets.cls).sum(0), count + 1
        return {"features": error.sum() / (len(masks.boolean) * count * batch.total)}

    def update(self, targets: Targets) -> None:
        """Nothing: the teacher changes between stages alone."""

    def begin_stage(self, number: int) -> None:
        self.teacher.network.load_state_dict(self.student.backbone.state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.fresh_seed) + number)
            fresh = build(self.record()).student
        load_whole(self.student, fresh.state_dict())

    @staticmethod
    def _check(
        masks: Masking, stages: Sequence[float], teacher: Backbone | None, depth: int | None, first: Backbone
    ) -> None:
        require_exact(masks)
        if not stages or min(stages) <= 0:
            raise UserError(
                f"stages: {list(stages)} are no lengths. Give one number above 0 for each stage, as [1, 1]."
            )
        if teacher is not None and len(stages) > 1:
            raise UserError(
                f"teacher: a network of its own teaches one stage, and stages: {list(stages)} are {len(stages)}, whose "
                "teachers are the students before them. Leave one of them out."
            )
        if depth is not None and not 0 <= depth <= first.num_blocks:
            raise UserError(
                f"teacher_depth: {depth} of {first.num_blocks} blocks cannot be. Use 0 to {first.num_blocks}."
            )
