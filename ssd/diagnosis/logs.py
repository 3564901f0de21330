"""A run after the fact: its logged numbers as looks, and what its checkpoint holds."""

import csv
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ssd.diagnosis.course import Look, Phase, diagnose_course
from ssd.diagnosis.features import logged_deviations
from ssd.diagnosis.findings import Finding, is_news
from ssd.diagnosis.targets import TargetUse

REMEMBERED = 300  # looks that a rule may go back
RECENT = 50  # steps of which skipped ones are counted


def read_logs(folder: Path) -> dict[int, dict[str, float]]:
    """Steps done -> the numbers logged then, of all parts of a run; a later part counts where they overlap."""
    rows: dict[int, dict[str, float]] = {}
    for file in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with open(file, newline="") as lines:
            for row in csv.DictReader(lines):
                numbers = {name: float(text) for name, text in row.items() if text and name not in ("epoch", "step")}
                rows.setdefault(int(row["step"]) + 1, {}).update(numbers)
    return dict(sorted(rows.items()))


def looks_of(
    rows: Mapping[int, Mapping[str, float]],
    prototypes: Mapping[str, int],
    targets: Mapping[str, int],
    temperatures: Callable[[int], tuple[float | None, float | None]],
) -> list[Look]:
    """
    Args:
        prototypes: kind of target -> K.
        targets: kind of target -> how many of them a step has, of kinds for which that is known.
        temperatures: step -> of teacher and student.
    """
    looks: list[Look] = []
    skips: deque[tuple[int, float]] = deque()
    largest = 0.0
    for step, row in rows.items():
        if "train/loss/total" not in row:
            continue
        rate = row.get("train/schedule/lr", 0.0)
        largest = max(largest, rate)
        skips.append((step, row.get("train/health/skipped_steps", 0.0)))
        while skips[0][0] < step - RECENT:
            skips.popleft()
        before = skips[0]
        looks.append(
            Look(
                step=step,
                terms={
                    name.removeprefix("train/loss/"): value
                    for name, value in row.items()
                    if name.startswith("train/loss/") and name != "train/loss/total"
                },
                uses=uses_of(row, prototypes, targets),
                rank=row.get("train/spectrum/effective_rank"),
                gradient_norm=row.get("train/grad/norm"),
                update=row.get("train/update/share"),
                rate_share=rate / largest if largest else 0.0,
                skipped=round(skips[-1][1] - before[1]),
                recent=step - before[0],
                temperatures=temperatures(step),
                deviations=logged_deviations(row),
            )
        )
    return looks


def uses_of(
    row: Mapping[str, float], prototypes: Mapping[str, int], targets: Mapping[str, int]
) -> dict[str, TargetUse]:
    found = {}
    for kind, size in prototypes.items():
        before = "" if kind == "picture" else f"{kind}_"
        entropy, perplexity = row.get(f"train/teacher/{before}entropy"), row.get(f"train/prototypes/{before}perplexity")
        if entropy is not None and perplexity is not None:
            share = row.get(f"train/center/{before}share")
            found[kind] = TargetUse(size, targets.get(kind, 0), entropy, math.log(perplexity), share)
    return found


def diagnose_logs(looks: Sequence[Look], phase: Phase) -> list[Finding]:
    """What the doctor would have said, look by look."""
    found: list[Finding] = []
    for count in range(1, len(looks) + 1):
        for finding in diagnose_course(looks[max(0, count - REMEMBERED) : count], phase):
            if is_news(finding, found):
                found.append(finding)
    return found


def skipped_steps(rows: Mapping[int, Mapping[str, float]]) -> list[Finding]:
    """Steps that were not finite, as far as the log tells: when and how many."""
    counted = [
        (step, row["train/health/skipped_steps"]) for step, row in rows.items() if "train/health/skipped_steps" in row
    ]
    if not counted or not counted[-1][1]:
        return []
    first = next(step for step, count in counted if count)
    return [
        Finding(
            "not-finite",
            counted[-1][0],
            f"{counted[-1][1]:.0f} steps were skipped because loss or gradient was not finite, the first by step {first}.",
            "Lower lr: a third; with 16-mixed use bf16-mixed.",
        )
    ]


def diagnose_weights(state: Mapping[str, Any], step: int) -> list[Finding]:
    """Of a checkpoint's state dict: weights that are no numbers, and a teacher that is the student."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
    findings = []
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        findings.append(
            Finding(
                "weights-not-finite",
                step,
                f"{len(broken)} tensors of the checkpoint are not finite, first {broken[0]}.",
                "Go on from an earlier checkpoint, with a third of lr.",
                layer=broken[0],
            )
        )
    pairs = list(same_names(tensors))
    if step > 0 and pairs and all(bool((student == teacher).all()) for student, teacher in pairs):
        findings.append(
            Finding(
                "shared-storage",
                step,
                "teacher and student have the same weights, so the student is its own teacher.",
                "Give the teacher a copy of its own (ssd.teachers.EMA) and a momentum above 0.",
                layer="teacher",
            )
        )
    return findings


def same_names(tensors: Mapping[str, Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    for name, student in tensors.items():
        teacher = tensors.get(f"teacher.network.{name.removeprefix('student.')}")
        # a teacher of its own may have layers of the same names and other sizes
        if name.startswith("student.") and teacher is not None and teacher.shape == student.shape:
            yield student, teacher
