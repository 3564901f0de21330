"""DINOv2: DINO between views and iBOT inside them, with features kept apart, in the form that scales.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024, arXiv 2304.07193.
Departs from the published code: a sample's nearest neighbour is never itself, groups of neighbours have a size of their own
instead of that of a GPU's batch, and a centre counts every masked patch of all GPUs alike.
"""

from typing import Any

from torch import Tensor

from lightning_modules.base import SelfDistillation, StepReport
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Rows, Scores, Targets, Whole
from ssd.errors import UserError
from ssd.heads import PrototypeHead
from ssd.losses.prototype import cross_view_cross_entropy, token_cross_entropy
from ssd.losses.spread import check_koleo_group, koleo
from ssd.masking.recipes import BlockMasks, Masking, require_whole_crops
from ssd.optim import Clip
from ssd.patch_heads import PatchBranch, PatchHead
from ssd.patch_targets import patch_diagnostics, patch_measures
from ssd.schedules import Cosine, Linear, Schedule
from ssd.targets import Centering, Sinkhorn, target_by_rule
from ssd.teachers import EMA
from ssd.views.view import Views, require_globals


class DINOv2(SelfDistillation):
    """DINOv2 (Oquab et al. 2024). Defaults are those of the short ImageNet recipe.

    Args:
        backbone: a ViT, with LayerScale (arguments: {init_values: 1.0e-5}) and drop path by the rule "subset" as published.
        views: recipe with two "global" views or more; they alone are masked, and seen by the teacher.
        masks: how patches of the global views are masked; half of the crops must stay whole.
        num_prototypes: K, of pictures, and of patches where they have no number of their own.
        num_patch_prototypes: K of patches with a head of their own; null = `num_prototypes`.
        shared_head: one head for pictures and patches; false gives each its own, better for large models and data.
        student_temperature: what the student's logits are divided by.
        teacher_temperature: of the teacher's answers, pictures' and patches'; lower is sharper.
        dino_weight: of the loss between views.
        ibot_weight: of the loss of masked patches.
        koleo_weight: of the term that spreads the global views' features over the sphere; 0 leaves it out.
        koleo_group: samples among which each is kept from its nearest neighbour, the same whatever the number of slices
            and processes; published is what a GPU held of a step: 64.
        momentum: share of the old teacher that is kept; nearer 1 for small batches and long runs.
        target_rule: "centering", or "sinkhorn" for targets that use all prototypes alike; for pictures and for patches.
        center_momentum: share of the old centre that is kept, of pictures and of patches.
        head_hidden_dim, head_layers: sizes of the heads' MLPs.
        head_bottleneck_dim: width in which pictures are compared with prototypes, and patches where the head is shared.
        patch_head_bottleneck_dim: that of patches with a head of their own.
        head_batch_norm: batch normalisation in the heads; much better on small data, where without it all pictures get nearly
            the same answer for long. Pictures and patches are normalised apart.
        norm_last_layer: holds the prototypes' gains at 1.
        renormalize_prototypes: instead of weight normalisation, brings prototypes back to unit length after each step:
            another path of training, cheaper with many prototypes.
    """

    student: PatchBranch
    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "dinov2",
        masks: Masking = BlockMasks(smallest=4, largest=0.5, even=True),  # noqa: B008 (frozen)
        num_prototypes: int = 65_536,
        num_patch_prototypes: int | None = None,
        shared_head: bool = True,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = Linear(0.04, 0.07, until=0.3),  # noqa: B008
        dino_weight: float | Schedule = 1.0,
        ibot_weight: float | Schedule = 1.0,
        koleo_weight: float | Schedule = 0.1,
        koleo_group: int = 64,
        momentum: float | Schedule = Cosine(0.992, 1.0),  # noqa: B008
        target_rule: str = "centering",
        center_momentum: float = 0.9,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        patch_head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        head_batch_norm: bool = False,
        norm_last_layer: bool = False,
        renormalize_prototypes: bool = False,
        lr: float | Schedule = Cosine(4e-3, 1e-6, warmup=0.1),  # noqa: B008
        lr_rule: str = "sqrt",
        lr_reference_batch: int = 1024,
        decay_rule: str = "bias_norm_and_scale",
        layer_decay: float = 0.9,
        patch_embed_lr_scale: float = 0.2,
        clip: Clip | None = Clip(3.0, over="module"),  # noqa: B008
        freeze_by: str = "rate",
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_rule=lr_rule,
            lr_reference_batch=lr_reference_batch,
            decay_rule=decay_rule,
            layer_decay=layer_decay,
            patch_embed_lr_scale=patch_embed_lr_scale,
            clip=clip,
            freeze_by=freeze_by,
            **engine,
        )
        backbone.require("masked", by=type(self).__name__)
        require_globals(self.views, 2, by=type(self).__name__)
        require_whole_crops(masks, by=type(self).__name__)
        check_koleo_group(koleo_group)
        if shared_head and num_patch_prototypes is not None:
            raise UserError("num_patch_prototypes is for patches with a head of their own. Set shared_head: false.")
        self.masking = {"global": masks}
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.dino_weight = dino_weight
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.koleo_group = koleo_group
        self.momentum = momentum

        sizes = {"hidden_dim": head_hidden_dim, "num_layers": head_layers, "batch_norm": head_batch_norm}
        sizes |= {"train_gain": not norm_last_layer, "renormalize": renormalize_prototypes}

        def head(prototypes: int, bottleneck: int) -> Any:
            return self.make_head(backbone.embed_dim, prototypes, bottleneck_dim=bottleneck, **sizes)

        patches = num_prototypes if num_patch_prototypes is None else num_patch_prototypes
        if shared_head:
            self.student = PatchBranch(backbone, PatchHead(head(num_prototypes, head_bottleneck_dim)))
        else:
            heads = head(num_prototypes, head_bottleneck_dim), head(patches, patch_head_bottleneck_dim)
            self.student = PatchBranch(backbone, *heads)
        self.teacher = EMA(self.student, without=("mask_token",))
        self.center: Centering | Sinkhorn = target_by_rule(target_rule, num_prototypes, center_momentum)
        self.patch_center: Centering | Sinkhorn = target_by_rule(target_rule, patches, center_momentum)

    def make_head(self, dim: int, num_prototypes: int, **sizes: Any) -> Any:
        return PrototypeHead(dim, num_prototypes, **sizes)

    def targets(self, batch: Batch) -> Targets:
        masks = batch.masks["global"]
        weight = masks.token_weight()  # (U,), of all slices
        answers = self.teacher({"global": batch.views["global"]}, places={"global": masks.flat_in_whole()})
        temperature = self.at("teacher_temperature")
        logits = answers.pictures.logits()  # (V, B, K)
        return Targets(
            logits=logits,
            probs=self.center(logits, temperature),  # (V, B, K)
            patch_probs=Rows(self.patch_center(answers.patches.logits(), temperature, weight > 0)),  # (U, K)
            patch_weight=Rows(weight),
            patch_features=Whole(answers.patches.features),
            patch_prototypes=Whole(answers.patches.prototypes),
        )

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        answers = self.student(
            batch.views, masked={"global": masks.boolean}, places={"global": masks.flat_in_whole()}
        )  # features (S, B, d) and (U, d)
        temperature = self.student_temperature
        dino = cross_view_cross_entropy(answers.pictures, targets.probs, temperature, skip_same_view=True)  # (B,)
        ibot = token_cross_entropy(answers.patches, targets.patch_probs, temperature)  # (U,)
        # the weights of a crop's masked patches sum to 1, and a crop without any counts as a crop
        crops = len(masks.boolean) * batch.total
        terms = {"dino": dino.sum() / batch.total, "ibot": (targets.patch_weight * ibot).sum() / crops}
        if self.koleo_weight != 0:
            check_koleo_group(self.koleo_group, len(batch), self.micro_batches)
            features = answers.tokens["global"].pooled().unflatten(0, masks.boolean.shape[:2])  # (V, B, D)
            terms["koleo"] = koleo(features, self.koleo_group).sum() / batch.total
        return terms

    def update(self, targets: Targets) -> None:
        self.center.update(targets.logits)
        patches = Scores(targets.patch_features, targets.patch_prototypes)
        self.patch_center.update(patches, targets.patch_weight > 0)
        self.teacher.update(self.student, self.at("momentum"))

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        return patch_measures(targets)

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        return patch_diagnostics(report, report.terms["dino"])
