"""What a method's losses and a step say of themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ssd.diagnosis.targets import TargetUse


@dataclass(frozen=True)
class StepReport:
    """What one step did, in plain numbers that are the same on every rank.

    Args:
        terms: loss terms before their weight, over the whole step.
        total: what was minimised.
        gradient_norm: L2 norm over all trained parameters before clipping.
        teacher_entropy: mean entropy of the targets `probs` in nats, where it was asked for and there are such.
        measures: what the method's `measures` says of the targets and its `Terms` of the student, where it was asked for.
        uses: kind of target ("picture", "patch") -> how it uses its prototypes, where it was asked for.
        not_finite: what was not finite and made the step be skipped: names of terms, "total" where only
            their sum is not, and "gradient".
        stop: whether any rank was asked to stop.
        gradients: names of the parameters whose gradients were not finite, where a step was skipped for them.
    """

    terms: dict[str, float]
    total: float
    gradient_norm: float
    teacher_entropy: float | None
    not_finite: tuple[str, ...]
    stop: bool
    measures: dict[str, float] = field(default_factory=dict)
    uses: dict[str, TargetUse] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()


class Terms(dict[str, Tensor]):
    """Loss terms of a slice, and beside them what is worth knowing of the student's answers.

    Args:
        measures: tensors on the device, whose means over slices and ranks the report of a logged step gives: scalars as they
            are, others by what the method's `of_answers` makes of them.
    """

    def __init__(self, terms: Mapping[str, Tensor], **measures: Tensor):
        super().__init__(terms)
        self.measures = measures
