"""What can be wrong with the way a run goes: collapse, dead prototypes, rates that do not fit, overflow, waiting.

Rules read `Look`s, the numbers of logged steps, in order. A run begins with targets that are nearly uniform or nearly one
prototype for all, with few directions in its features and rates that warm up, and all that is healthy there: a rule waits
until the run has `settled`, or asks what a number was before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ssd.diagnosis.findings import Finding
from ssd.diagnosis.targets import TargetUse
from ssd.schedules import in_steps, value_at

LEAST_SETTLED = 20  # steps in which a centre of momentum 0.9 has forgotten where it began
LEAST_REACH = 0.005  # share of their length by which all steps of a run together should be able to move weights
IN_A_ROW = 3  # looks that must agree on what moves slowly


@dataclass(frozen=True)
class Look:
    """What is known of a run at one step. None where it was not measured.

    Args:
        step: steps done.
        terms: loss terms before their weight.
        uses: kind of target -> how it uses its prototypes.
        rank: effective rank of the teacher's features of a batch, about their mean.
        gradient_norm: median since the look before.
        update: median over layers of the share by which a step changed their weights.
        rate_share: the learning rate as a share of its largest value so far.
        teacher_moved: share by which the step changed the teacher.
        teacher_due: by how much it should have, by momentum and distance from the student.
        skipped: of the last `recent` steps.
        loss_scale: of 16-bit losses.
        waiting: share of the time since the look before that steps waited for data, of `waited_of` seconds.
        temperatures: of teacher and student.
        deviations: of regressed features over tokens, "target" and "prediction", where a method regresses features.
    """

    step: int
    terms: Mapping[str, float] = field(default_factory=dict)
    uses: Mapping[str, TargetUse] = field(default_factory=dict)
    rank: float | None = None
    gradient_norm: float | None = None
    update: float | None = None
    rate_share: float = 1.0
    teacher_moved: float | None = None
    teacher_due: float | None = None
    skipped: int = 0
    recent: int = 0
    loss_scale: float | None = None
    waiting: float | None = None
    waited_of: float = 0.0
    temperatures: tuple[float | None, float | None] = (None, None)
    deviations: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """How long a run is, and from when on it should have left its beginning.

    Args:
        total_steps: of the run.
        settled: step by which warm-ups are over and centres have found their place.
        follows: whether the teacher follows the student, so that both can collapse together.
    """

    total_steps: int
    settled: int
    follows: bool = True


def phase_of(method: Any) -> Phase:
    """From the method's schedules: the learning rate's warm-up, the freezing of prototypes, the start of masking, and a
    twentieth of the run, at most 1000 steps."""
    total, per_epoch = method.total_steps, method.steps_per_epoch
    lengths = [getattr(method.lr, "warmup", 0.0), method.freeze_last_layer, getattr(method, "mask_start", 0.0)]
    ends = [in_steps(length, total, per_epoch) for length in lengths]
    return Phase(total, max(LEAST_SETTLED, min(total // 20, 1000), *ends), method.teacher.follows)


def temperatures_of(method: Any, step: int) -> tuple[float | None, float | None]:
    """Of teacher and student, in force in the last of so many steps."""
    length = method.total_steps, method.steps_per_epoch
    settings = (getattr(method, f"{of}_temperature", None) for of in ("teacher", "student"))
    teacher, student = (None if value is None else value_at(value, step - 1, *length) for value in settings)
    return teacher, student


def diagnose_course(looks: Sequence[Look], phase: Phase) -> list[Finding]:
    """Everything that the looks so far say is wrong at the last of them."""
    if not looks:
        return []
    return [finding for rule in RULES if (finding := rule(looks, phase)) is not None]


Rule = Callable[[Sequence[Look], Phase], Finding | None]


# ---------------------------------------------------------------------- targets


def uses_of(looks: Sequence[Look], phase: Phase, kind: str, count: int) -> list[TargetUse]:
    """Of the last `count` looks, none where one of them lies before the run has settled or has no such targets."""
    last = looks[-count:]
    if (
        len(last) < count
        or not phase.follows
        or last[0].step < phase.settled
        or any(kind not in look.uses for look in last)
    ):
        return []
    return [look.uses[kind] for look in last]


def uniform_collapse(looks: Sequence[Look], phase: Phase) -> Finding | None:
    for kind in KINDS:
        uses = uses_of(looks, phase, kind, IN_A_ROW)
        if not uses:
            continue
        lowest = min(look.uses[kind].uniformity for look in looks if look.step >= phase.settled and kind in look.uses)
        # small prototypes without weight normalisation begin at 1 and learn at 0.99; who has been lower has fallen back
        if min(use.uniformity for use in uses) < (0.995 if lowest < 0.9 else 0.999):
            continue
        if uses[-1].uniformity < uses[0].uniformity - 1e-4:
            continue  # on its way out
        size, (teacher, student) = math.log(uses[-1].num_prototypes), looks[-1].temperatures
        term = term_of(looks[-1], kind)
        loss = "" if term is None else f" (loss '{term}' {looks[-1].terms[term]:.3f})"
        blunt = teacher is not None and student is not None and teacher >= student
        if blunt:
            advice = f"Lower teacher_temperature, {teacher:g}, below student_temperature, {student:g}: 0.04."
        else:
            advice = "Lower lr: a third." if lowest < 0.9 else "They never were sharper: halve teacher_temperature."
        return Finding(
            "uniform-collapse",
            looks[-1].step,
            f"every {kind} gets the uniform target: teacher entropy {uses[-1].entropy:.3f}, ln K is {size:.3f}{loss}.",
            advice,
            term=term,
        )
    return None


def one_hot_collapse(looks: Sequence[Look], phase: Phase) -> Finding | None:
    for kind in KINDS:
        uses = uses_of(looks, phase, kind, 2)
        if not uses or max(use.perplexity for use in uses) > 1.5 or uses[-1].most < 4:
            continue
        centred = uses[-1].center_share is not None
        return Finding(
            "one-hot-collapse",
            looks[-1].step,
            f"every {kind} gets the same prototype: the mean target uses {uses[-1].perplexity:.2f} of "
            f"{uses[-1].num_prototypes} (sharp targets of different samples would use many).",
            "Lower center_momentum to 0.9, or use target_rule: sinkhorn." if centred else "Use target_rule: centering.",
            term=term_of(looks[-1], kind),
        )
    return None


def dead_prototypes(looks: Sequence[Look], phase: Phase) -> Finding | None:
    for kind in KINDS:
        uses = uses_of(looks, phase, kind, IN_A_ROW)
        if not uses or uses[-1].most < 40 or max(use.perplexity for use in uses) > 0.05 * uses[-1].most:
            continue
        if uses[-1].perplexity > 1.25 * uses[0].perplexity or uses[-1].perplexity < 1.5:
            continue
        return Finding(
            "dead-prototypes",
            looks[-1].step,
            f"targets of {kind}es use {uses[-1].perplexity:.1f} of {uses[-1].num_prototypes} prototypes, the others are dead."
            if kind == "patch"
            else f"targets use {uses[-1].perplexity:.1f} of {uses[-1].num_prototypes} prototypes, the others are dead.",
            "Use target_rule: sinkhorn, or fewer num_prototypes.",
            term=term_of(looks[-1], kind),
            severity=uses[-1].most / uses[-1].perplexity,
        )
    return None


def runaway_center(looks: Sequence[Look], phase: Phase) -> Finding | None:
    for kind in KINDS:
        last = [look.uses[kind].center_share for look in looks[-2:] if kind in look.uses]
        shares = [share for share in last if share is not None]
        if len(shares) < 2 or not min(shares) > 3 or shares[1] < shares[0]:
            continue
        return Finding(
            "runaway-center",
            looks[-1].step,
            f"the centre of {kind} targets is {shares[1]:.1f} times as long as the mean logits it should be an average of, "
            "and grows.",
            "Update it once a step as momentum * center + (1 - momentum) * mean, after use (ssd.targets.Centering does).",
            layer="center" if kind == "picture" else "patch_center",
            severity=shares[1],
        )
    return None


KINDS = ("picture", "patch")


def term_of(look: Look, kind: str) -> str | None:
    """The loss term that such targets are for, where there is one of a known name."""
    names = ("ibot",) if kind == "patch" else ("dino", "dino_global")
    return next((name for name in names if name in look.terms), None)


# ---------------------------------------------------------------------- features


def falling_rank(looks: Sequence[Look], phase: Phase) -> Finding | None:
    """A random network's features vary in more directions than a trained one's, so only what came later counts, and only a
    fall to nearly one direction is no matter of taste."""
    ranks = [look.rank for look in looks if look.rank is not None and look.step >= phase.settled]
    if len(ranks) < IN_A_ROW:
        return None
    peak, now = max(map(min, zip(ranks, ranks[1:]))), max(ranks[-2:])
    if now > min(3, 0.3 * peak):
        return None
    return Finding(
        "falling-rank",
        looks[-1].step,
        f"features vary in {now:.1f} directions (effective rank in a batch) and did in {peak:.1f}: they collapse.",
        "Go on from a checkpoint before it, with a third of lr.",
        severity=peak / max(now, 1e-6),
    )


def flat_features(looks: Sequence[Look], phase: Phase) -> Finding | None:
    """Of targets at variance 1 over their dimensions: where they are alike for all tokens, there is nothing to predict, and
    where predictions are, nothing was learned. The limits of the released data2vec 2.0."""
    last = looks[-IN_A_ROW:]
    if len(last) < IN_A_ROW or last[0].step < phase.settled:
        return None
    for what, limit in LEAST_DEVIATIONS.items():
        found = [look.deviations[what] for look in last if what in look.deviations]
        if len(found) == IN_A_ROW and max(found) < limit and found[-1] <= found[0]:
            return Finding(
                f"flat-{what}s",
                looks[-1].step,
                f"{what}s of different tokens are nearly alike: they deviate by {found[-1]:.2g} where their dimensions "
                "deviate by 1.",
                "Go on from a checkpoint before it, with a third of lr and momentum nearer 1.",
                severity=limit / max(found[-1], 1e-9),
            )
    return None


LEAST_DEVIATIONS = {"target": 0.1, "prediction": 0.01}


# ---------------------------------------------------------------------- rates


def rate_too_high(looks: Sequence[Look], phase: Phase) -> Finding | None:
    updates = [look.update for look in looks[-2:] if look.update is not None]
    if len(updates) < 2 or min(updates) < 0.1:
        return None
    return Finding(
        "lr-too-high",
        looks[-1].step,
        f"each step changes weights by {updates[-1]:.0%} of their length, 0.01 to 1% is usual.",
        f"Divide lr by {10 ** math.ceil(math.log10(updates[-1] / 0.01))}.",
        severity=updates[-1],
    )


def rate_too_low(looks: Sequence[Look], phase: Phase) -> Finding | None:
    """Where all steps of the run, were they all like this one and all in one direction, would hardly move a weight."""
    last = looks[-2:]
    if len(last) < 2 or phase.total_steps < 50 or last[0].step < phase.settled:
        return None
    if any(look.update is None or look.rate_share < 0.5 or look.skipped for look in last):
        return None
    reach = max(look.update or 0.0 for look in last) * phase.total_steps
    if reach > LEAST_REACH:
        return None
    return Finding(
        "lr-too-low",
        looks[-1].step,
        f"each step changes weights by {last[-1].update:.1e} of their length, so all {phase.total_steps} steps could move "
        f"them by {reach:.1%} at most.",
        "Raise lr to about 1e-3 for batches of 256 (lr_rule and warm-up included).",
        severity=LEAST_REACH / max(reach, 1e-9),
    )


def exploding_gradient(looks: Sequence[Look], phase: Phase) -> Finding | None:
    norms = [look.gradient_norm for look in looks if look.gradient_norm is not None]
    if len(norms) < 4:
        return None
    usual, now = median(norms[:-2]), min(norms[-2:])
    if now < 100 * max(usual, 1e-12):
        return None
    return Finding(
        "exploding-gradient",
        looks[-1].step,
        f"the gradient's norm is {now:.3g} and was {usual:.3g}.",
        "Go on from a checkpoint before it, with a third of lr.",
        severity=now / max(usual, 1e-12),
    )


def rising_loss(looks: Sequence[Look], phase: Phase) -> Finding | None:
    """Of a cross-entropy that is far above that of a student that knows nothing."""
    for kind in KINDS:
        last = [look for look in looks[-IN_A_ROW:] if kind in look.uses and term_of(look, kind) in ("dino", "ibot")]
        if len(last) < IN_A_ROW or last[0].step < phase.settled or not phase.follows:
            continue
        term = term_of(last[0], kind)
        assert term is not None
        ignorant = math.log(last[-1].uses[kind].num_prototypes)
        # targets sharpen and centres move at the start, and the loss with them
        first = next(look.terms[term] for look in looks if look.step >= phase.settled and term in look.terms)
        now = min(look.terms[term] for look in last)
        if now < 2 * max(ignorant, first):
            continue
        return Finding(
            "rising-loss",
            looks[-1].step,
            f"the loss '{term}' rose from {first:.2f} to {last[-1].terms[term]:.2f}; a student that knows nothing pays ln K = "
            f"{ignorant:.2f}.",
            "Divide lr by 10.",
            term=term,
            severity=now / max(ignorant, first),
        )
    return None


def still_teacher(looks: Sequence[Look], phase: Phase) -> Finding | None:
    last = looks[-2:]
    if len(last) < 2 or not phase.follows:
        return None
    if any(look.teacher_moved != 0 or look.teacher_due is None or look.teacher_due < 1e-6 for look in last):
        return None
    return Finding(
        "still-teacher",
        looks[-1].step,
        f"the teacher does not move; by momentum and its distance from the student a step should change it by "
        f"{last[-1].teacher_due:.1e}.",
        "Call self.teacher.update(self.student, self.at('momentum')) in the method's update.",
        layer="teacher",
    )


# ---------------------------------------------------------------------- the machine


def overflow(looks: Sequence[Look], phase: Phase) -> Finding | None:
    """A scaler begins high and finds its scale by skipping some steps; it should not go on skipping."""
    look = looks[-1]
    if look.loss_scale is None or look.skipped < 10:
        return None
    return Finding(
        "fp16-overflow",
        look.step,
        f"{look.skipped} of the last {look.recent} steps overflowed in 16 bits and were skipped; the loss scale is down to "
        f"{look.loss_scale:g}.",
        "Use trainer.precision: bf16-mixed, or 32-true where the machine has no bfloat16.",
        layer=None,
        severity=look.skipped,
    )


def loader_bound(looks: Sequence[Look], phase: Phase) -> Finding | None:
    look = looks[-1]
    if look.waiting is None or look.waiting < 0.5 or look.waited_of * look.waiting < 2:
        return None
    return Finding(
        "loader-bound",
        look.step,
        f"steps waited for data in {look.waiting:.0%} of the last {look.waited_of:.0f} s.",
        "Raise data.num_workers; ssd check-data measures what the loader can do.",
        severity=1.0,
    )


RULES: tuple[Rule, ...] = (
    uniform_collapse,
    one_hot_collapse,
    dead_prototypes,
    runaway_center,
    falling_rank,
    flat_features,
    rate_too_high,
    rate_too_low,
    exploding_gradient,
    rising_loss,
    still_teacher,
    overflow,
    loader_bound,
)
