"""CAPI: from a third of the patches a student predicts to which cluster each hidden one belongs, in clusters that are found
meanwhile among the patches of its average.

Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling", TMLR 2025, arXiv 2502.08769.
Departs from the published code: positions are turned within each axis (there channels of rows are paired with those of columns,
`RotaryViT.mixed_axes`), and Sinkhorn runs in float32.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Scores, Targets
from ssd.decoders import places
from ssd.errors import UserError
from ssd.heads import BiasedPrototypes, DirectHead
from ssd.losses.prototype import entropy, token_cross_entropy
from ssd.masked_branch import PredictingBranch, WholePatches, require_exact, visible_places
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import InverseBlockMasks, Masking
from ssd.optim import AdamW, Clip, Optimized, OptimizerRule
from ssd.schedules import Cosine, Schedule
from ssd.step_report import StepReport
from ssd.targets import Sinkhorn
from ssd.teachers import EMA
from ssd.views.view import Views


class CAPI(SelfDistillation):
    """CAPI (Darcet et al. 2025).

    Two networks learn, each by its own optimiser and from its own loss: the student, and the clusters, which see the
    teacher's features and give none of their gradient on.

    Args:
        backbone: a RotaryViT with a predictor.
        views: recipe with one "global" view or more, each predicted by itself.
        masks: which patches the student does not see, the same number in each sample.
        predicted: share of the masked patches that are predicted, drawn anew in each step; one costs one query.
        num_prototypes: K, the clusters. Large is essential: ADE20k falls from 29.1 to 19.8 with 2048 of 16384.
        positionwise: balance clusters over samples for each place of the grid by itself, so that none of them means a place;
            false balances over all patches of the step, for batches of hundreds.
        student_temperature: of the student's scores.
        teacher_temperature: of the clusters' scores that become targets.
        clustering_temperature: of the clusters' scores that learn to give those targets.
        momentum: of the teacher. It begins at 1; about 1 - lr at the peak.
        clustering_lr, clustering_weight_decay: of the clusters' optimiser, which is of the student's kind.
    """

    student: PredictingBranch
    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "capi",
        masks: Masking = InverseBlockMasks(0.65),  # noqa: B008 (frozen)
        predicted: float = 0.05,
        num_prototypes: int = 16_384,
        positionwise: bool = True,
        student_temperature: float = 0.12,
        teacher_temperature: float | Schedule = 0.06,
        clustering_temperature: float = 0.12,
        momentum: float | Schedule = Cosine(0.999, 1.0, warmup=0.1, warmup_start=1.0, truncate=0.8),  # noqa: B008
        clustering_lr: float | Schedule = Cosine(5e-4, 0.0, warmup=0.1, truncate=0.8),  # noqa: B008
        clustering_weight_decay: float | Schedule = 0.01,
        lr: float | Schedule = Cosine(1e-3, 0.0, warmup=0.1, truncate=0.8),  # noqa: B008
        lr_rule: str = "none",
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.1,
        decay_rule: str = "bias_and_norms_by_a_tenth",
        patch_embed_lr_scale: float = 0.2,
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_rule=lr_rule,
            optimizer=optimizer,
            weight_decay=weight_decay,
            decay_rule=decay_rule,
            patch_embed_lr_scale=patch_embed_lr_scale,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        backbone.require("visible", "predict", by="CAPI")
        require_exact(masks)
        self._check(predicted, student_temperature, clustering_temperature)
        self.masking = {"global": masks}
        self.predicted = predicted
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.clustering_temperature = clustering_temperature
        self.momentum = momentum
        self.clustering_lr = clustering_lr
        self.clustering_weight_decay = clustering_weight_decay

        self.student = PredictingBranch(backbone, DirectHead(backbone.predictor_dim, num_prototypes))
        self.teacher = EMA(WholePatches(backbone))
        self.clusters = BiasedPrototypes(backbone.embed_dim, num_prototypes)
        self.assign = Sinkhorn(apart=2 if positionwise else None)  # of (V, B, N, K) the places

    def mask_plans(self) -> dict[str, MaskPlan]:
        return {kind: replace(plan, predicted=self.predicted) for kind, plan in super().mask_plans().items()}

    def optimized(self) -> list[Optimized]:
        rule, lr, decay = self.optimizer, self.clustering_lr, self.clustering_weight_decay
        return [*super().optimized(), Optimized(self.clusters, rule, lr, decay, self.clip, decay_rule="none")]

    def targets(self, batch: Batch) -> Targets:
        features = F.normalize(self.teacher(batch.views["global"]).float(), dim=-1, eps=1e-7)  # (V, B, N, D)
        logits = self.cluster_scores(features).logits()
        return Targets(features=features, patch_probs=self.assign(logits, self.at("teacher_temperature")))

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        assert masks.predicted is not None, "the plan says which patches are predicted"
        scores = self.student(batch.views["global"], visible_places(masks), masks.predicted)  # features (V, B, P, D)
        wanted = places(targets.patch_probs.flatten(0, 1), masks.predicted.flatten(0, 1))  # (V B, P, K)
        predicted = token_cross_entropy(
            scores.flatten(0, 2), wanted.flatten(0, 1), self.student_temperature
        )  # (V B P,)
        clusters, probs = self.cluster_scores(targets.features), targets.patch_probs.flatten(0, 2)
        clustering = token_cross_entropy(clusters.flatten(0, 2), probs, self.clustering_temperature)  # (V B N,)
        share = len(batch) / batch.total  # all have as many patches
        return {"predicted": predicted.mean() * share, "clustering": clustering.mean() * share}

    def update(self, targets: Targets) -> None:
        self.teacher.update(self.student, self.at("momentum"))

    def cluster_scores(self, features: Tensor) -> Scores:
        """Features (..., D) of unit length compared with the clusters."""
        return Scores(F.pad(features, (0, 1), value=1.0), self.clusters())

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        return {"patch_entropy": entropy(targets.patch_probs).mean()}

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        """Cross-entropies are the targets' entropy plus divergence; that of the student is of the few that it predicts."""
        if "patch_entropy" not in report.measures:
            return {}
        patch_entropy = report.measures["patch_entropy"]
        return {
            "train/teacher/patch_entropy": patch_entropy,
            "train/teacher/patch_kl": report.terms["predicted"] - patch_entropy,
            "train/teacher/cluster_kl": report.terms["clustering"] - patch_entropy,
        }

    @staticmethod
    def _check(predicted: float, student_temperature: float, clustering_temperature: float) -> None:
        if not 0 < predicted <= 1:
            raise UserError(
                f"predicted: {predicted} is not a share above 0 and at most 1. The published value is 0.05."
            )
        temperatures = {"student_temperature": student_temperature, "clustering_temperature": clustering_temperature}
        for name, value in temperatures.items():
            if value <= 0:
                raise UserError(f"{name}: {value} divides scores. Use a number above 0; the published value is 0.12.")
