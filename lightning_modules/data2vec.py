"""data2vec: a student that sees a picture with patches hidden predicts what the average of its past selves makes of the
whole one in its last blocks.

Baevski et al., "data2vec: A General Framework for Self-supervised Learning", ICML 2022, arXiv 2202.03555.
Departs from the published code: positions are the backbone's own, where BEiT's blocks have relative ones, which timm's ViT
has not; the mean over hidden patches is that of the whole step, where each process took its own.
"""

import torch
from torch import Tensor, nn

from lightning_modules.base import SelfDistillation, StepReport
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets, Whole
from ssd.diagnosis.features import deviation, deviation_logs
from ssd.distributed import sum_over_ranks
from ssd.errors import UserError
from ssd.layer_targets import Encoder, last_blocks, patch_layers, shared_names
from ssd.losses.regression import smooth_error
from ssd.masking.recipes import BlockMasks, Masking
from ssd.normalisers import average, layer_normed
from ssd.optim import Clip
from ssd.schedules import Cosine, Schedule
from ssd.step_report import Terms
from ssd.teachers import EMA
from ssd.views.view import Views


class TokenBranch(nn.Module):
    """Backbone that sees a token of its own at hidden patches, and a linear layer behind its final norm.

    Attributes:
        mask_token: (1, D). It is no part of the backbone, so that what is exported is what timm knows.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, backbone.embed_dim), std=0.02))
        self.head = nn.Linear(backbone.embed_dim, backbone.embed_dim)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, pictures: Tensor, masked: Tensor) -> Tensor:
        """Predictions (V, B, N, D) for all places, from (V, B, C, H, W) with patches hidden where (V, B, N) is True."""
        tokens = self.backbone(pictures.flatten(0, 1), masked=masked.flatten(0, 1), mask_token=self.mask_token)
        return self.head(tokens.patches).unflatten(0, pictures.shape[:2])


class Data2Vec(SelfDistillation):
    """data2vec (Baevski et al. 2022), of pictures.

    Args:
        backbone: a ViT; published are LayerScale (arguments: {init_values: 1.0e-4}), drop path .25 and dropout of attention .05,
            and output layers that begin smaller with depth (fix_init: true).
        views: recipe with one "global" view or more, each predicted by itself.
        masks: which patches the student sees a token in place of; published are blocks of 16 patches or more over 120 of 196.
        top_blocks: how many of the teacher's last blocks are averaged into the targets.
        beta: the error at which its cost goes over from squared to absolute.
        momentum: share of the old teacher that is kept; the published .9998 forgets half in 3,465 steps.
        teacher_shares: "patches" (the embedding), "positions" or both: what the teacher has from the student as it is, and
            not as an average.
    """

    student: TokenBranch
    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "data2vec",
        masks: Masking = BlockMasks(ratio=(0.6125, 0.6125), share=1.0, smallest=16),  # noqa: B008 (frozen)
        top_blocks: int = 6,
        beta: float = 2.0,
        momentum: float | Schedule = 0.9998,
        teacher_shares: list[str] | None = None,
        lr: float | Schedule = Cosine(2e-3, 1e-5, warmup=0.0125),  # noqa: B008
        lr_reference_batch: int = 2048,
        weight_decay: float | Schedule = 0.05,
        clip: Clip | None = Clip(3.0, over="all"),  # noqa: B008
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_reference_batch=lr_reference_batch,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        backbone.require("masked", "taps", by="data2vec")
        if "global" not in self.views.kinds():
            raise UserError("views: this recipe has no 'global' view to hide a part of. Use the recipe 'data2vec'.")
        if not beta > 0:
            raise UserError(f"beta: {beta} is no error. Use a number above 0; published is 2.")
        self.masking = {"global": masks}
        self.layers = [f"block{number}" for number in last_blocks(backbone, top_blocks)]
        self.beta = beta
        self.momentum = momentum

        self.student = TokenBranch(backbone)
        self.teacher = EMA(Encoder(backbone), buffers="average", shared=shared_names(teacher_shares))

    def targets(self, batch: Batch) -> Targets:
        pictures = batch.views["global"]
        layers = patch_layers(self.teacher, pictures.flatten(0, 1), self.layers)  # (V B, N, D) each
        features = layer_normed(average([layer_normed(layer) for layer in layers]))
        hidden = sum_over_ranks(batch.masks["global"].boolean.sum().float())  # of the whole step
        return Targets(
            features=features.unflatten(0, pictures.shape[:2]),  # (V, B, N, D)
            hidden=Whole(hidden.clamp_min(1)),
        )

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masked = batch.masks["global"].boolean
        predicted = self.student(batch.views["global"], masked)
        error = smooth_error(predicted, targets.features, self.beta)  # (V, B, N)
        loss = torch.where(masked, error, 0).sum() / targets.hidden
        return Terms({"features": loss}, prediction_std=deviation(predicted))

    def update(self, targets: Targets) -> None:
        self.teacher.update(self.student, self.at("momentum"))

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        return {"target_std": deviation(targets.features)}

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        return deviation_logs(report.measures)
