"""Random teachers: a student that matches a frozen random network on plain pictures, and sees more in them than it.

Sarnthein et al., "Random Teachers are Good Teachers", ICML 2023, arXiv 2302.12091.
Departs from the published code: the divergence is what is minimised, whose gradient is the cross-entropy's and whose value
is not lost beside the teacher's entropy; prototypes have unit length as in the paper (weight_norm: false is the code).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import SelfDistillation, StepReport
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.cached_targets.forms import Sampled
from ssd.errors import UserError
from ssd.heads import Branch, PrototypeHead
from ssd.losses.divergence import divergence, drawn_divergence
from ssd.optim import Clip
from ssd.record import build, describe
from ssd.schedules import Schedule
from ssd.teachers import Frozen
from ssd.views.view import Views


class RandomTeacher(SelfDistillation):
    """Random teacher (Sarnthein et al. 2023).

    Args:
        backbone: the network to pretrain; the teacher is what it is at the start, evaluating.
        views: any recipe; each "global" view is matched with itself, and one plain view is published.
        distance: of the student's start from the teacher: weights are ((1 - a) teacher + a another draw) / their norm. 0 is
            a copy, where rounding alone decides whether it moves; 1 is another network.
        num_prototypes: K.
        student_temperature, teacher_temperature: what logits are divided by; published are 1.
        head_hidden_dim, head_bottleneck_dim, head_layers: sizes of the head's MLP.
        weight_norm: prototypes of unit length; false draws them small and leaves them free, as the released code does.
    """

    student: Branch
    teacher: Frozen
    stored_in_part = Sampled(logits=("logits",))

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "plain",
        distance: float = 1e-10,
        num_prototypes: int = 65_536,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        weight_norm: bool = True,
        lr: float | Schedule = 1e-3,
        lr_rule: str = "none",
        weight_decay: float | Schedule = 0.0,
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_rule=lr_rule,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        if not 0 <= distance <= 1:
            raise UserError(f"distance: {distance} is not a share in [0, 1]. The published value is about 1e-10.")
        if "global" not in self.views.kinds():
            raise UserError("views: this recipe has no 'global' view, which both networks see. Use the recipe 'plain'.")
        self.student_temperature = student_temperature
        self.weight_norm = weight_norm
        self.teacher_temperature = teacher_temperature

        def head() -> PrototypeHead:
            return PrototypeHead(
                backbone.embed_dim,
                num_prototypes,
                hidden_dim=head_hidden_dim,
                bottleneck_dim=head_bottleneck_dim,
                num_layers=head_layers,
                weight_norm=weight_norm,
            )

        self.student = Branch(backbone, head())
        self.teacher = Frozen(copy.deepcopy(self.student))
        blend(self.student, Branch(build(describe(backbone)), head()), distance)

    def targets(self, batch: Batch) -> Targets:
        taught = self.taught(batch)
        if "classes" in taught:
            return Targets(**taught)  # (V, B, draws), (V, B)
        logits = taught["logits"]
        return Targets(probs=torch.softmax(logits, dim=-1), log_probs=torch.log_softmax(logits, dim=-1))  # (V, B, K)

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "logits": self.teacher({"global": batch.views["global"]}).logits() / self.teacher_temperature
        }  # (V, B, K)

    def asked_of_teacher(self) -> dict[str, Any]:
        return {"temperature": self.teacher_temperature, "weight_norm": self.weight_norm}

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        if torch.is_autocast_enabled(batch.views["global"].device.type):
            raise UserError(
                "the divergence from a random teacher is of the order of 1e-5, which half precision rounds away. Use "
                "trainer.precision: 32-true."
            )
        scores = self.student({"global": batch.views["global"]})  # features (V, B, d)
        if hasattr(targets, "classes"):
            apart = drawn_divergence(scores, targets.classes, targets.entropy, self.student_temperature)  # (V, B)
        else:
            apart = divergence(scores, targets.log_probs, self.student_temperature)  # (V, B)
        return {"kl": apart.mean(0).sum() / batch.total}

    def update(self, targets: Targets) -> None:
        """Nothing: the teacher is frozen, and there is no centre."""

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        if report.teacher_entropy is None:
            return {}
        return {"train/teacher/cross_entropy": report.terms["kl"] + report.teacher_entropy}


@torch.no_grad()
def blend(student: nn.Module, other: nn.Module, share: float) -> None:
    """student <- ((1 - a) student + a other) / sqrt((1 - a)^2 + a^2): of the variance of both. Section 3 of the paper.

    In float64, because the published share is far below float32's resolution of a weight of order 1 and may still move
    smaller ones. Layers that are drawn as constants (normalisation) get the constant.
    """
    norm = ((1 - share) ** 2 + share**2) ** 0.5
    theirs = dict(other.named_parameters())
    for name, parameter in student.named_parameters():
        constant = torch.equal(parameter, theirs[name])
        if not constant:
            mixed = ((1 - share) * parameter.double() + share * theirs[name].double()) / norm
            parameter.copy_(mixed)
