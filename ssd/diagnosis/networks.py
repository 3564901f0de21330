"""What can be wrong with the networks themselves: who owns which weights, in which mode they are, who trains them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer

from ssd.diagnosis.findings import Finding
from ssd.distributed import own_part
from ssd.teachers import Teacher

SAMPLED_LAYERS = 8
SAMPLED_WEIGHTS = 2**14
"""Of each sampled layer: enough to tell by how much it moves, and nothing to copy."""


def teachers_in(method: nn.Module) -> dict[str, Teacher]:
    return {name: part for name, part in method.named_modules() if isinstance(part, Teacher)}


def diagnose_networks(method: Any, optimizers: Iterable[Optimizer], step: int) -> list[Finding]:
    """Of a method that trains: teachers that share the student's weights, draw at random, evaluate where they should
    train, or are trained by an optimiser; a student that evaluates."""
    trained = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    students = {storage(parameter): name for name, parameter in method.student.named_parameters()}
    students.pop(0, None)
    findings = []
    for name, teacher in teachers_in(method).items():
        checks = (
            shared_storage(name, teacher, students, step),
            active_noise(name, teacher, step),
            wrong_mode(name, teacher, step),
            trained_teacher(name, teacher, trained, step),
        )
        findings += [finding for finding in checks if finding is not None]
    if not method.student.training:
        findings.append(
            Finding(
                "student-evaluates",
                step,
                "the student is in evaluation mode: without drop path and dropout, and with normalisation statistics that do "
                "not move.",
                "Do not call eval() on it, or call train() before the run begins.",
                layer="student",
            )
        )
    return findings


class Watch:
    """Tells cheaply whether anything has changed of what `diagnose_networks` asks: owners, modes, memory."""

    def __init__(self, method: Any):
        self.method = method
        self.networks = [method.student, *(teacher.network for teacher in teachers_in(method).values())]
        self.parts = [part for network in self.networks for part in network.modules()]
        self.parameters = [parameter for network in self.networks for parameter in network.parameters()]
        self.seen: list[Any] = []

    def changed(self) -> bool:
        """Since the last call; True at the first."""
        state = [
            [method_part is network for method_part, network in zip(self._owned(), self.networks)],
            [part.training for part in self.parts],
            [parameter.requires_grad for parameter in self.parameters],
            [storage(parameter) for parameter in self.parameters],
        ]
        before, self.seen = self.seen, state
        return before != state

    def _owned(self) -> list[nn.Module]:
        teachers = [part for part in self.method.children() if isinstance(part, Teacher)]
        return [self.method.student, *(teacher.network for teacher in teachers)]


def storage(parameter: Tensor) -> int:
    """Where its memory begins, 0 for none."""
    part = own_part(parameter)
    return part.data_ptr() if part.numel() else 0


def shared_storage(name: str, teacher: Teacher, students: Mapping[int, str], step: int) -> Finding | None:
    """A teacher that is the student gives it its own answers as targets."""
    shared = [key for key, parameter in teacher.network.named_parameters() if storage(parameter) in students]
    if not shared:
        return None
    return Finding(
        "shared-storage",
        step,
        f"{name} and student share the memory of {len(shared)} parameters (first: {shared[0]}), so the student is its own "
        "teacher.",
        "Give the teacher a copy: copy.deepcopy(student), or ssd.teachers.EMA(student).",
        layer=f"{name}.network.{shared[0]}",
    )


def active_noise(name: str, teacher: Teacher, step: int) -> Finding | None:
    for key, part in teacher.network.named_modules():
        if not part.training:
            continue
        rate = float(part.drop_prob or 0.0) if isinstance(part, DropPath) else float(getattr(part, "p", 0.0) or 0.0)
        if rate > 0 and isinstance(part, DropPath | nn.modules.dropout._DropoutNd):
            return Finding(
                "teacher-draws",
                step,
                f"{name} is in training mode with {type(part).__name__} of {rate:g} in {key}: its targets are noisy.",
                "Set drop path and dropout of the teacher to 0 (ssd.backbones.base.set_drop_path_zero), or let it evaluate.",
                layer=f"{name}.network.{key}",
            )
    return None


def wrong_mode(name: str, teacher: Teacher, step: int) -> Finding | None:
    """Against what the teacher's own policy says of its mode."""
    for key, part in teacher.network.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training != teacher.trains:
            is_in, should = ("training", "evaluate") if part.training else ("evaluation", "train")
            return Finding(
                "teacher-mode",
                step,
                f"{name} should {should} and its normalisation {key} is in {is_in} mode.",
                "Set its mode by the method's policy (teacher_buffers), not by calling train() or eval() on parts of it.",
                layer=f"{name}.network.{key}",
            )
    return None


def trained_teacher(name: str, teacher: Teacher, trained: set[int], step: int) -> Finding | None:
    for key, parameter in teacher.network.named_parameters():
        if parameter.requires_grad or id(parameter) in trained:
            how = "is given to the optimiser" if id(parameter) in trained else "requires a gradient"
            return Finding(
                "teacher-trained",
                step,
                f"{key} of {name} {how}: the teacher would be trained to please the student.",
                "Keep teachers out of `optimized`, with requires_grad_(False).",
                layer=f"{name}.network.{key}",
            )
    return None


# ---------------------------------------------------------------------- how far weights move


def sampled_weights(student: nn.Module) -> dict[str, nn.Parameter]:
    """Some matrices of a network, evenly over its depth: what moves most tells less than what moves typically."""
    matrices = {name: p for name, p in student.named_parameters() if p.requires_grad and p.ndim > 1 and p.numel() > 64}
    names = list(matrices)
    count = min(SAMPLED_LAYERS, len(names))
    return {names[place * len(names) // count]: matrices[names[place * len(names) // count]] for place in range(count)}


def copies(weights: Iterable[Tensor]) -> list[Tensor]:
    return [own_part(weight.detach()).flatten()[:SAMPLED_WEIGHTS].float().clone() for weight in weights]


def moved(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """|after - before| / |before| of each pair. (n,)"""
    changes = torch._foreach_norm(torch._foreach_sub(after, before))
    return torch.stack(changes) / torch.stack(torch._foreach_norm(before)).clamp_min(1e-12)
