"""MAE: an encoder of a quarter of the patches, and a decoder that paints the rest. The baseline of masked distillation,
and its first teacher.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
Departs from the published code: nothing.
"""

import math

from torch import Tensor

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.decoders import MaskedDecoder
from ssd.errors import UserError
from ssd.losses.regression import squared_error
from ssd.masked_branch import (
    MaskedBranch,
    has_cls,
    mean_over_hidden,
    patch_of,
    pixel_targets,
    require_exact,
    visible_places,
)
from ssd.masking.recipes import Masking, RandomMasks
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.schedules import Cosine, Schedule
from ssd.teachers import NoTeacher
from ssd.views.view import Views


class MAE(SelfDistillation):
    """MAE (He et al. 2022). There is no teacher: what is predicted are the pixels.

    Args:
        backbone: a ViT; published are fixed positions (ViT.fixed_positions). A VideoViT for clips, with masks that are
            tubes (Tong et al. 2022, arXiv 2203.12602; RandomMasks with ratio 0.9 and tube).
        views: recipe with one "global" view or more, each predicted by itself.
        masks: how patches are hidden, the same number in each sample.
        normalize_pixels: predict each patch's pixels at mean 0 and variance 1, which is better for classification; the
            published visualisation weights, which DMAE's teacher is, were trained without.
        decoder_dim, decoder_depth, decoder_heads: of the decoder's blocks.
    """

    student: MaskedBranch
    teacher: NoTeacher

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "crop",
        masks: Masking = RandomMasks(0.75),  # noqa: B008 (frozen)
        normalize_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        lr: float | Schedule = Cosine(1.5e-4, 0.0, warmup=0.05),  # noqa: B008
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.05,
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
        backbone.require("visible", by="MAE")
        if "global" not in self.views.kinds():
            raise UserError("views: this recipe has no 'global' view to hide a part of. Use the recipe 'crop'.")
        require_exact(masks)
        self.masking = {"global": masks}
        self.normalize_pixels = normalize_pixels
        self.patch = patch_of(backbone)

        decoder = MaskedDecoder(
            backbone.embed_dim,
            math.prod(self.patch) * backbone.in_chans,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            has_cls=has_cls(backbone),
        )
        self.student = MaskedBranch(backbone, decoder)
        self.teacher = NoTeacher()

    def targets(self, batch: Batch) -> Targets:
        return Targets(
            pixels=pixel_targets(batch.views["global"], self.patch, self.normalize_pixels)
        )  # (V, B, N, p p C)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        decoded = self.student(batch.views["global"], visible_places(masks))
        error = squared_error(decoded.patches, targets.pixels)  # (V, B, N)
        return {"pixels": mean_over_hidden(error, masks, batch.total)}

    def update(self, targets: Targets) -> None:
        """Nothing: there is no teacher."""
