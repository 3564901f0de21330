"""What a run will take, from a few steps of it: hours, memory, disk; and which batches fit a memory."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ssd.evaluation.moments import steps_of
from ssd.planning.facts import Facts
from ssd.planning.trials import Measured

SHARE_USED = 0.95
"""Of a memory, what a proposal may be predicted to take."""


@dataclass(frozen=True)
class Cost:
    """Seconds and GiB of a whole run; `gib` is None where it was not measured."""

    start_s: float
    steps_s: float
    evaluations: int
    evaluation_s: float
    checkpoints: int
    checkpoint_s: float
    gib: float | None
    disk_gib: float

    @property
    def seconds(self) -> float:
        return self.start_s + self.steps_s + self.evaluations * self.evaluation_s + self.checkpoints * self.checkpoint_s

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "hours": self.seconds / 3600}


def cost_of(
    facts: Facts, measured: Measured, trainer: Any, checkpoints: Any, times: int | Sequence[float] | None = None
) -> Cost:
    """Of a run whose steps were measured on one process.

    Args:
        trainer, checkpoints, times: the run's own settings (`evaluation.times`), of which evaluations and checkpoints follow.
    """
    evaluations = evaluations_of(facts, trainer, times)
    ends = facts.steps // facts.steps_per_epoch
    every_steps = facts.steps // checkpoints.every_n_steps if checkpoints.every_n_steps else 0
    every_epochs = ends // checkpoints.every_n_epochs if checkpoints.every_n_epochs else 0
    # gradients are gathered in buckets of their own where processes exchange them
    buckets = facts.trainable * 4 / 2**30 if facts.processes > 1 else 0.0
    return Cost(
        start_s=measured.start_s,
        steps_s=facts.steps * measured.step_s,
        evaluations=evaluations,
        evaluation_s=evaluation_seconds(measured, trainer.limit_val_batches, facts.processes),
        checkpoints=max(every_steps + every_epochs, 1) + evaluations,
        checkpoint_s=measured.checkpoint_s,
        gib=None if measured.needed_gib is None else measured.needed_gib + buckets,
        disk_gib=(2 + len(checkpoints.also)) * measured.checkpoint_bytes / 2**30,
    )


def evaluations_of(facts: Facts, trainer: Any, times: int | Sequence[float] | None = None) -> int:
    """How often a run is evaluated: at the trainer's intervals or at `times`, and at the end."""
    if trainer.limit_val_batches == 0:
        return 0
    if times is not None:
        return len(steps_of(times, facts.steps) | {facts.steps})
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    epochs = facts.steps // facts.steps_per_epoch
    if interval in (None, 1.0) and not isinstance(interval, int):
        done, last = epochs // every, epochs // every * every * facts.steps_per_epoch
    else:
        between = interval if isinstance(interval, int) else max(int(facts.steps_per_epoch * interval), 1)
        if every is None:
            done = facts.steps // between
            last = done * between
        else:
            done = epochs // every * (facts.steps_per_epoch // between)
            last = epochs // every * every * facts.steps_per_epoch if facts.steps_per_epoch % between == 0 else -1
    return done + (last != facts.steps)


def evaluation_seconds(measured: Measured, limit: int | float | None, processes: int) -> float:
    """Of one evaluation: the batches of both loaders, shared out over processes, and the probes."""
    if measured.evaluation is None:
        return 0.0
    total = measured.evaluation["probes_s"]
    for part in measured.evaluation["loaders"]:
        batches = math.ceil(part["batches"] / processes)
        if isinstance(limit, int) and not isinstance(limit, bool):
            batches = min(batches, limit)
        elif limit is not None:
            batches = int(batches * limit)
        dense = min(batches, part["dense"])
        # the first starts workers, which the next epoch's do again
        total += max(part["first_s"] - part["dense_s"], 0.0)
        total += dense * part["dense_s"] + (batches - dense) * part["plain_s"]
    return total


# ---------------------------------------------------------------------- batches that fit


@dataclass(frozen=True)
class MemoryLine:
    """GiB = fixed + of_sample * batch + of_slice * (batch / micro_batches)."""

    fixed: float
    of_sample: float
    of_slice: float

    def gib(self, batch: int, micro_batches: int) -> float:
        return self.fixed + self.of_sample * batch + self.of_slice * batch / micro_batches

    def most(self, gib: float) -> float:
        """The largest batch that passes at once."""
        slope = self.of_sample + self.of_slice
        return (gib - self.fixed) / slope if slope > 0 else math.inf


def memory_line(trials: Sequence[Measured]) -> MemoryLine:
    """Through trials of two batches, and of another number of slices where there is one; no part is below zero."""
    rows = [(1.0, trial.batch, trial.batch / trial.micro_batches) for trial in trials]
    sliced = len({trial.micro_batches for trial in trials}) > 1
    columns = np.array(rows) if sliced else np.array(rows)[:, [0, 2]]
    scale = columns.max(0)
    found, _ = nnls(columns / scale, np.array([trial.needed_gib for trial in trials]))
    found = found / scale
    return MemoryLine(found[0], found[1] if sliced else 0.0, found[-1])


@dataclass(frozen=True)
class Proposal:
    """A batch of one process and its slices, and what it is predicted, or was measured, to take."""

    what: str
    batch: int
    micro_batches: int
    predicted_gib: float
    measured_gib: float | None = None

    def row(self) -> dict[str, Any]:
        return asdict(self)


def proposals(line: MemoryLine, facts: Facts, gib: float, can_slice: bool) -> list[Proposal]:
    """The largest batch that fits at once, and the configured one in as few slices as fit; none that does not fit."""
    room, unit = SHARE_USED * gib, facts.koleo_group or (8 if facts.batch >= 8 else 1)
    most = min(line.most(room), facts.draws // facts.processes)
    largest = int(most // unit * unit)
    found = []
    if largest:
        found.append(Proposal("the largest batch at once", largest, 1, line.gib(largest, 1)))
    divisors = [n for n in range(1, facts.batch + 1) if facts.batch % n == 0 and fits_group(facts, n)]
    for slices in divisors if can_slice else [1]:
        if line.gib(facts.batch, slices) <= room:
            found.append(Proposal("the batch that was asked for", facts.batch, slices, line.gib(facts.batch, slices)))
            break
    return found


def fits_group(facts: Facts, slices: int) -> bool:
    """Whether groups of KoLeo stay whole in slices."""
    return facts.koleo_group is None or slices == 1 or (facts.batch // slices) % facts.koleo_group == 0
