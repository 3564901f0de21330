"""Franca: DINOv2 whose clusters are nested, coarse ones on few dimensions of the features, under masks that leave one block.

Venkataramanan et al., "Franca: Nested Matryoshka Clustering for Scalable Visual Representation Learning", 2025, arXiv 2507.14137.
Departs from the published code: levels see the first dimensions and unit length, as in the paper (projected: true is the code);
what DINOv2's file departs from.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import StepReport
from lightning_modules.dinov2 import DINOv2
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Rows, Targets
from ssd.errors import UserError
from ssd.losses.prototype import cross_view_cross_entropy, entropy, token_cross_entropy
from ssd.losses.spread import check_koleo_group, koleo
from ssd.masking.recipes import InverseBlockMasks, Masking
from ssd.nested_heads import NestedHead


class Franca(DINOv2):
    """Franca (Venkataramanan et al. 2025). Targets are by Sinkhorn, each level by itself; pictures and patches have own heads.

    Args:
        backbone: a ViT.
        masks: how patches of the global views are masked: all but a block that is rolled to any place.
        levels: nested widths of the features, each half of the next; 1 is DINOv2.
        projected: each level sees a projection of all dimensions and meets its prototypes at any length, as the released
            weights did.
        settings: of DINOv2; num_prototypes is K of the widest level.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        masks: Masking = InverseBlockMasks(ratio=(0.1, 0.65), share=0.5, aspect=(0.3, 1 / 0.3)),  # noqa: B008 (frozen)
        levels: int = 5,
        projected: bool = False,
        shared_head: bool = False,
        target_rule: str = "sinkhorn",
        **settings,
    ):
        if shared_head or target_rule != "sinkhorn":
            raise UserError(
                "Franca's heads are apart and its targets by Sinkhorn. Set shared_head: false, target_rule: sinkhorn."
            )
        # the heads that DINOv2 asks for while it is built
        self.levels, self.projected = levels, projected
        super().__init__(backbone, masks=masks, shared_head=False, target_rule="sinkhorn", **settings)

    def make_head(self, dim: int, num_prototypes: int, **sizes: Any) -> Any:
        return NestedHead(dim, num_prototypes, self.levels, self.projected, **sizes)

    def targets(self, batch: Batch) -> Targets:
        masks = batch.masks["global"]
        weight = masks.token_weight()  # (U,), of all slices
        answers = self.teacher({"global": batch.views["global"]}, places={"global": masks.flat_in_whole()})
        temperature = self.at("teacher_temperature")
        levels: dict[str, Tensor | Rows] = {}
        for level, (pictures, patches) in enumerate(zip(answers.pictures, answers.patches, strict=True)):
            levels[f"probs_{level}"] = self.center(pictures.logits(), temperature)  # (V, B, K)
            levels[f"patch_probs_{level}"] = Rows(
                self.patch_center(patches.logits(), temperature, weight > 0)
            )  # (U, K)
        return Targets(
            probs=levels[f"probs_{self.levels - 1}"],
            patch_probs=levels[f"patch_probs_{self.levels - 1}"],
            patch_weight=Rows(weight),
            **levels,
        )

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        answers = self.student(
            batch.views, masked={"global": masks.boolean}, places={"global": masks.flat_in_whole()}
        )  # of each level features (S, B, d) and (U, d)
        crops, temperature = len(masks.boolean) * batch.total, self.student_temperature
        terms: dict[str, Tensor] = {}
        for level, (pictures, patches) in enumerate(zip(answers.pictures, answers.patches, strict=True)):
            probs, patch_probs = getattr(targets, f"probs_{level}"), getattr(targets, f"patch_probs_{level}")
            dino = cross_view_cross_entropy(pictures, probs, temperature, skip_same_view=True)  # (B,)
            ibot = targets.patch_weight * token_cross_entropy(patches, patch_probs, temperature)  # (U,)
            terms["dino"] = terms.get("dino", 0) + dino.sum() / batch.total
            terms["ibot"] = terms.get("ibot", 0) + ibot.sum() / crops
        if self.koleo_weight != 0:
            check_koleo_group(self.koleo_group, len(batch), self.micro_batches)
            features = answers.tokens["global"].pooled().unflatten(0, masks.boolean.shape[:2])  # (V, B, D)
            terms["koleo"] = koleo(features, self.koleo_group).sum() / batch.total
        return terms

    def update(self, targets: Targets) -> None:
        self.teacher.update(self.student, self.at("momentum"))

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        levels = range(self.levels)
        of_pictures = torch.stack([entropy(getattr(targets, f"probs_{level}")).mean() for level in levels])
        of_patches = [entropy(getattr(targets, f"patch_probs_{level}")) for level in levels]
        crops = targets.probs.shape[:2].numel()
        return {
            "dino_entropy": of_pictures.sum(),
            "ibot_entropy": (targets.patch_weight * torch.stack(of_patches).sum(0)).sum() / crops,
            "masked_crops": targets.patch_weight.sum() / crops,
        }

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        """Divergences are sums over levels, as the losses are; entropy is the widest level's."""
        if not report.measures:
            return {}
        numbers = {
            "train/teacher/kl": report.terms["dino"] - report.measures["dino_entropy"],
            "train/masks/masked_crops": report.measures["masked_crops"],
        }
        if report.measures["masked_crops"] > 0:
            apart = report.terms["ibot"] - report.measures["ibot_entropy"]
            numbers["train/teacher/patch_kl"] = apart / report.measures["masked_crops"]
        return numbers
