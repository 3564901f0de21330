"""DINOv3: DINOv2 for long runs, and Gram anchoring, which keeps patches' similarities from fading in them.

Siméoni et al., "DINOv3", 2025, arXiv 2508.10104.
Departs from the published code: a sample's nearest neighbour is never itself, Sinkhorn targets cannot overflow, a step that is
not finite is never taken, and timm's rotary networks start with smaller projections in deeper blocks.
"""

import copy
from typing import Any

from torch import Tensor

from lightning_modules.base import SelfDistillation, StepReport
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Rows, Targets
from ssd.errors import UserError
from ssd.heads import PrototypeHead
from ssd.losses.gram import gram_loss, resize_tokens
from ssd.losses.prototype import cross_view_cross_entropy, token_cross_entropy
from ssd.losses.spread import check_koleo_group, koleo
from ssd.masking.recipes import BlockMasks, Masking, require_whole_crops
from ssd.optim import Clip
from ssd.patch_heads import PatchBranch
from ssd.patch_targets import patch_diagnostics, patch_measures
from ssd.schedules import Cosine, Length, Linear, Schedule, in_steps
from ssd.targets import Sinkhorn
from ssd.teachers import EMA, Frozen
from ssd.views.view import Views, require_globals
from ssd.weights.load import load_backbone_weights


class DINOv3(SelfDistillation):
    """DINOv3 (Siméoni et al. 2025). Defaults are those of the ImageNet recipe.

    Args:
        backbone: a ViT with rotary positions and LayerScale, for instance vit_large_patch16_dinov3.
        views: recipe with two "global" views or more; they alone are masked, and seen by the teacher. Its "gram" views, where
            it has them (gram_size), are what the Gram teacher sees, else the global ones.
        masks: how patches of the global views are masked; half of the crops must stay whole.
        num_prototypes, num_patch_prototypes: K of pictures and of patches, whose heads share nothing.
        student_temperature: what the student's logits are divided by.
        teacher_temperature: of the teacher's answers, pictures' and patches'; lower is sharper.
        dino_global_weight: of the loss between global views, 1 for each pair as in DINO.
        dino_local_weight: of the loss of local views; 0.5 in the Gram stage.
        ibot_weight: of the loss of masked patches.
        koleo_weight: of the term that spreads the global views' features over the sphere; 0 leaves it out.
        koleo_group: samples among which each is kept from its nearest neighbour, whatever the slices and processes.
        momentum: share of the old teacher that is kept.
        own_local_norm: a final norm of their own for local views while training (the 7B model).
        head_hidden_dim, head_layers: sizes of both heads' MLPs.
        head_batch_norm: batch normalisation in both heads; much better on small data, where without it all pictures get
            nearly the same answer for long.
        head_bottleneck_dim, patch_head_bottleneck_dim: widths in which pictures and patches meet prototypes.
        gram_anchor: whose patches' similarities the student keeps: a checkpoint or exported folder, the one with the best
            dense score; "start": the teacher of the checkpoint in `start_from`; "refresh": this run's teacher, first copied
            at `gram_refresh_from`; null = no Gram teacher.
        gram_weight: of the Gram term.
        gram_refresh_from, gram_refresh_every: when the Gram teacher becomes a copy of the teacher: at multiples of the
            second, from the first on; null = never.
        gram_refreshes: how often at most.
    """

    student: PatchBranch
    teacher: EMA
    gram_teacher: Frozen | None
    added_later = ("gram_teacher.",)

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "dinov2",
        masks: Masking = BlockMasks(smallest=4, largest=0.5, even=True, filled=True),  # noqa: B008 (frozen)
        num_prototypes: int = 65_536,
        num_patch_prototypes: int = 65_536,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = Linear(0.04, 0.07, until=0.3),  # noqa: B008
        dino_global_weight: float | Schedule = 1.0,
        dino_local_weight: float | Schedule = 1.0,
        ibot_weight: float | Schedule = 1.0,
        koleo_weight: float | Schedule = 0.1,
        koleo_group: int = 16,
        momentum: float | Schedule = Cosine(0.992, 1.0),  # noqa: B008
        own_local_norm: bool = False,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        patch_head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        head_batch_norm: bool = False,
        gram_anchor: str | None = None,
        gram_weight: float | Schedule = 2.0,
        gram_refresh_from: Length = 0.0,
        gram_refresh_every: Length | None = None,
        gram_refreshes: int = 3,
        lr: float | Schedule = Cosine(4e-3, 4e-6, scaled_end=True, warmup=0.1),  # noqa: B008
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
        backbone.require("masked", by="DINOv3")
        require_globals(self.views, 2, by="DINOv3")
        require_whole_crops(masks, by="DINOv3")
        check_koleo_group(koleo_group)
        self.masking = {"global": masks}
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.dino_global_weight = dino_global_weight
        self.dino_local_weight = dino_local_weight
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.koleo_group = koleo_group
        self.momentum = momentum
        self.gram_anchor = gram_anchor
        self.gram_weight = gram_weight
        self.gram_refresh_from = gram_refresh_from
        self.gram_refresh_every = gram_refresh_every
        self.gram_refreshes = gram_refreshes

        def head(prototypes: int, bottleneck: int) -> PrototypeHead:
            return PrototypeHead(
                backbone.embed_dim,
                prototypes,
                hidden_dim=head_hidden_dim,
                bottleneck_dim=bottleneck,
                num_layers=head_layers,
                batch_norm=head_batch_norm,
                weight_norm=False,
            )

        heads = head(num_prototypes, head_bottleneck_dim), head(num_patch_prototypes, patch_head_bottleneck_dim)
        self.student = PatchBranch(backbone, *heads, own_local_norm=own_local_norm)
        self.teacher = EMA(self.student, without=("mask_token",))
        self.sinkhorn = Sinkhorn()
        self._check_anchor()
        self.gram_teacher = None if gram_anchor is None else Frozen(copy.deepcopy(backbone))

    def targets(self, batch: Batch) -> Targets:
        masks = batch.masks["global"]
        weight = masks.token_weight()  # (U,), of all slices
        answers = self.teacher({"global": batch.views["global"]}, places={"global": masks.flat_in_whole()})
        temperature = self.at("teacher_temperature")
        gram: dict[str, Tensor] = {}
        if self.gram_teacher is not None and self.anchored():
            seen = batch.views["gram"] if "gram" in batch.views else batch.views["global"]
            tokens = self.gram_teacher(seen.flatten(0, 1))
            patches = resize_tokens(tokens.patches, tokens.grid, answers.tokens["global"].grid)
            gram["gram"] = patches.unflatten(0, seen.shape[:2])  # (V, B, N, D)
        return Targets(
            probs=self.sinkhorn(answers.pictures.logits(), temperature),  # (V, B, K)
            patch_probs=Rows(self.sinkhorn(answers.patches.logits(), temperature, weight > 0)),  # (U, K)
            patch_weight=Rows(weight),
            **gram,
        )

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        views = {kind: pictures for kind, pictures in batch.views.items() if kind != "gram"}
        answers = self.student(
            views, masked={"global": masks.boolean}, places={"global": masks.flat_in_whole()}
        )  # features (S, B, d) and (U, d)
        number, pictures = len(targets.probs), answers.pictures
        student, probs, temperature = len(pictures.features), targets.probs, self.student_temperature
        pairs = number * (student - 1)  # 18 of 2 global and 8 local views
        across = cross_view_cross_entropy(pictures[:number], probs, temperature, skip_same_view=True)  # (B,)
        terms = {"dino_global": number * (number - 1) / pairs * across.sum() / batch.total}
        if student > number:
            local = cross_view_cross_entropy(pictures[number:], probs, temperature, skip_same_view=False)  # (B,)
            terms["dino_local"] = number * (student - number) / pairs * local.sum() / batch.total
        ibot = token_cross_entropy(answers.patches, targets.patch_probs, temperature)  # (U,)
        # the weights of a crop's masked patches sum to 1, and a crop without any counts as a crop
        terms["ibot"] = (targets.patch_weight * ibot).sum() / (number * batch.total)
        tokens = answers.tokens["global"]
        if self.koleo_weight != 0:
            check_koleo_group(self.koleo_group, len(batch), self.micro_batches)
            features = tokens.pooled().unflatten(0, (number, len(batch)))  # (V, B, D)
            terms["koleo"] = koleo(features, self.koleo_group).sum() / batch.total
        if self.anchored():
            gram = gram_loss(tokens.patches, targets.gram.flatten(0, 1))  # (V * B,)
            terms["gram"] = gram.sum() / (number * batch.total)
        return terms

    def update(self, targets: Targets) -> None:
        self.teacher.update(self.student, self.at("momentum"))
        if self.gram_teacher is not None and self._refreshes_after(self.step + 1):
            self._anchor_to_teacher()

    def anchored(self) -> bool:
        """Whether the Gram term counts in this step."""
        return self.gram_teacher is not None and self.at("gram_weight") > 0

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        return patch_measures(targets)

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        return patch_diagnostics(report, report.terms["dino_global"] + report.terms.get("dino_local", 0.0))

    # ------------------------------------------------------------------ the Gram teacher

    def _check_anchor(self) -> None:
        if self.gram_anchor == "start" and self.start_from is None:
            raise UserError(
                "gram_anchor: start is the teacher of the checkpoint that a run starts from. Set start_from."
            )
        if self.gram_anchor == "refresh" and self.gram_refresh_every is None:
            raise UserError("gram_anchor: refresh needs gram_refresh_every, after which the teacher is copied.")

    def begin_fresh(self) -> None:
        if self.gram_teacher is None or self.gram_anchor in ("refresh", None):
            return
        if self.gram_anchor == "start":
            self._anchor_to_teacher()
        else:
            network: Any = self.gram_teacher.network
            load_backbone_weights(network, self.gram_anchor)

    def _refreshes_after(self, done: int) -> bool:
        """Whether the Gram teacher becomes the teacher once `done` steps are done."""
        if self.gram_refresh_every is None:
            return False
        every = max(in_steps(self.gram_refresh_every, self.total_steps, self.steps_per_epoch), 1)
        begins = in_steps(self.gram_refresh_from, self.total_steps, self.steps_per_epoch)
        first = max(-(-begins // every), 1) * every
        return done >= first and (done - first) % every == 0 and (done - first) // every < self.gram_refreshes

    def _anchor_to_teacher(self) -> None:
        anchor: Any = self.gram_teacher
        teacher: Any = self.teacher.network
        anchor.network.load_state_dict(teacher.backbone.state_dict())
