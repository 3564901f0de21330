"""DINO: a student predicts, from any view, what the average of its past selves says of another.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.14294.
Departs from the published code: nothing.
"""

from torch import Tensor

from lightning_modules.base import SelfDistillation, StepReport
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.heads import Branch, PrototypeHead
from ssd.losses.prototype import cross_view_cross_entropy
from ssd.schedules import Cosine, Linear, Schedule
from ssd.targets import Centering, Sinkhorn, target_by_rule
from ssd.teachers import EMA
from ssd.views.view import Views, require_globals


class DINO(SelfDistillation):
    """DINO (Caron et al. 2021).

    Args:
        backbone: the network to pretrain; give its drop path here, the teacher has none.
        views: recipe with a "global" kind, and any others; the teacher sees "global" alone.
        num_prototypes: K. Smaller for small data: 1024 below 20,000 pictures.
        student_temperature: what the student's logits are divided by.
        teacher_temperature: lower is sharper; the published ablation collapses at a constant 0.08.
        momentum: share of the old teacher that is kept; nearer 1 for small batches and long runs.
        target_rule: "centering", or "sinkhorn" for targets that use all prototypes alike.
        center_momentum: share of the old centre that is kept.
        head_hidden_dim, head_bottleneck_dim, head_layers: sizes of the head's MLP.
        head_batch_norm: batch normalisation in the head; as published for ResNet-50, better on small data.
        norm_last_layer: holds the prototypes' gains at 1; false is better for ViT-S, unstable for larger models.
        renormalize_prototypes: instead of weight normalisation, brings prototypes back to unit length after each step:
            another path of training, cheaper with many prototypes.
        teacher_buffers: "own": the teacher normalises by batch and gathers its own statistics; "average":
            they are averaged like weights and the teacher evaluates.
    """

    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "dino",
        num_prototypes: int = 65_536,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = Linear(0.04, 0.07, until=0.3, every="epoch"),  # noqa: B008 (frozen)
        momentum: float | Schedule = Cosine(0.996, 1.0),  # noqa: B008
        target_rule: str = "centering",
        center_momentum: float = 0.9,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        head_batch_norm: bool = False,
        norm_last_layer: bool = True,
        renormalize_prototypes: bool = False,
        teacher_buffers: str = "own",
        **engine,
    ):
        super().__init__(views=views, **engine)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.momentum = momentum

        head = PrototypeHead(
            backbone.embed_dim,
            num_prototypes,
            hidden_dim=head_hidden_dim,
            bottleneck_dim=head_bottleneck_dim,
            num_layers=head_layers,
            batch_norm=head_batch_norm,
            train_gain=not norm_last_layer,
            renormalize=renormalize_prototypes,
        )
        self.student = Branch(backbone, head)
        self.teacher = EMA(self.student, buffers=teacher_buffers)
        self.center: Centering | Sinkhorn = target_by_rule(target_rule, num_prototypes, center_momentum)
        require_globals(self.views, 1, by="DINO")

    def targets(self, batch: Batch) -> Targets:
        logits = self.teacher({"global": batch.views["global"]}).logits()  # (V, B, K)
        probs = self.center(logits, self.at("teacher_temperature"))  # (V, B, K)
        return Targets(logits=logits, probs=probs)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        scores = self.student(batch.views)  # features (S, B, d), prototypes (K, d)
        loss = cross_view_cross_entropy(scores, targets.probs, self.student_temperature, skip_same_view=True)  # (B,)
        return {"dino": loss.sum() / batch.total}

    def update(self, targets: Targets) -> None:
        self.center.update(targets.logits)
        self.teacher.update(self.student, self.at("momentum"))

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        """Cross-entropy is entropy plus divergence; collapse shows in the two apart, not in their sum."""
        if report.teacher_entropy is None:
            return {}
        return {"train/teacher/kl": report.terms["dino"] - report.teacher_entropy}
