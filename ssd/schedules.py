"""A value over time. Any scalar setting of a method accepts a number or a schedule.

Schedules are frozen values without a counter: progress comes in, so resuming needs nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ssd.errors import UserError

Length = float | str
"""A share of the run in [0, 1], or a count with its unit: `"10 epochs"`, `"500 steps"`."""


def in_steps(length: Length, total: int, steps_per_epoch: int) -> int:
    """A length in optimiser steps. Raises UserError for a share outside [0, 1] or an unknown unit."""
    if isinstance(length, str):
        count, _, unit = length.strip().partition(" ")
        scale = {"epoch": steps_per_epoch, "epochs": steps_per_epoch, "step": 1, "steps": 1}.get(unit.strip())
        try:
            if scale is not None and float(count) >= 0:
                return round(float(count) * scale)
        except ValueError:
            pass
        raise UserError(
            f"length '{length}' is not understood. Write a share of the run (0.1), '10 epochs' or '500 steps'."
        )
    if not 0 <= length <= 1:
        raise UserError(
            f"length {length} is not a share of the run in [0, 1]. For a count write its unit: '{length:g} epochs'."
        )
    return round(length * total)


@dataclass(frozen=True)
class Schedule:
    """What all schedules share: a start, an end, and a clock that ticks every step or every epoch.

    Args:
        start: value at the beginning (for `Cosine` with a warm-up: the peak).
        end: value that is approached or reached.
        every: "step" moves always; "epoch" gives the staircase of recipes written per epoch.
        scaled_end: where a rate follows the batch, `end` follows too and stays the share of `start` that it is; false
            leaves it as it is written, as the released code of DINO, iBOT and DINOv2 does.
        after: for how long the schedule stands at its beginning; the rest of the run is then all that it knows of,
            and what its shares are shares of.
    """

    start: float
    end: float
    every: str = "step"
    after: Length = 0.0
    scaled_end: bool = False

    def value(self, step: int, total: int, steps_per_epoch: int) -> float:
        """The value in force during optimiser step `step` (from 0) of `total`."""
        waiting = in_steps(self.after, total, steps_per_epoch)
        step, total = max(step - waiting, 0), max(total - waiting, 1)
        if self.every == "epoch":
            step, epochs = step // steps_per_epoch, math.ceil(total / steps_per_epoch)
            return self._value(
                step, epochs, lambda length: round(in_steps(length, total, steps_per_epoch) / steps_per_epoch)
            )
        return self._value(step, total, lambda length: in_steps(length, total, steps_per_epoch))

    def _value(self, tick: int, ticks: int, length_in_ticks: Callable[[Length], int]) -> float:
        raise TypeError(f"{type(self).__name__} must say its value at a tick")

    def scaled(self, factor: float) -> "Schedule":
        """The same shape with the start (the peak) multiplied; the end is a floor and stays, unless it is `scaled_end`."""
        return replace(self, start=self.start * factor, end=self.end * factor if self.scaled_end else self.end)

    def __post_init__(self):
        if self.every not in ("step", "epoch"):
            raise UserError(f"every: '{self.every}' is not a clock. Use 'step' or 'epoch'.")


@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` to `end` in equal steps, both included, over the first `until`; then `end`.

    Args:
        until: how long the way takes, a share of the run or a count with its unit.
        reaches_end: false: `end` is what would follow the last step of the way.
    """

    until: Length = 1.0
    reaches_end: bool = True

    def _value(self, tick: int, ticks: int, length_in_ticks: Callable[[Length], int]) -> float:
        way = length_in_ticks(self.until)
        if tick >= way:
            return self.end
        return self.start + (self.end - self.start) * tick / (max(way - 1, 1) if self.reaches_end else way)


@dataclass(frozen=True)
class Cosine(Schedule):
    """A linear rise from `warmup_start` to `start` over `warmup`, both ends included, then half a cosine to `end`.

    Over the n ticks after the warm-up: end + (start - end) (1 + cos(pi i / n)) / 2 for i = 0 .. n - 1, so
    `start` occurs twice where there is a warm-up and `end` is approached, never reached (Caron et al.
    2021, released schedules).

    Args:
        warmup: length of the rise, a share of the run or a count with its unit.
        reaches_end: the other form: the rise does not include its end, so `start` occurs once, and the last tick is at
            `end` (DINOv3's long recipes).
        truncate: share of the half cosine that the run goes through, pi i / n times it, so that it ends between `start` and
            `end` (Darcet et al. 2025: .8, which leaves .0955 of the way).
    """

    warmup: Length = 0.0
    warmup_start: float = 0.0
    reaches_end: bool = False
    truncate: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.truncate <= 1:
            raise UserError(f"truncate: {self.truncate} is not a share above 0 and at most 1. 1 is half a cosine.")

    def _value(self, tick: int, ticks: int, length_in_ticks: Callable[[Length], int]) -> float:
        rise = length_in_ticks(self.warmup)
        if tick < rise:
            way = rise if self.reaches_end else max(rise - 1, 1)
            return self.warmup_start + (self.start - self.warmup_start) * tick / way
        if tick >= ticks:
            return self.end
        if self.reaches_end:
            rise, ticks = min(rise, ticks - 2), ticks - 1
        gone = self.truncate * (tick - rise) / (ticks - rise)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * gone))


@dataclass(frozen=True)
class TriStage(Schedule):
    """A linear rise from `warmup_start` to `start` over `warmup`, `start` for `hold`, then exponentially to `end` over the rest
    (Hsu et al., "HuBERT", 2021; DinoSR).

    Args:
        warmup, hold: lengths, shares of the run or counts with their unit.
    """

    warmup: Length = 0.03
    warmup_start: float = 0.0
    hold: Length = 0.47

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.end <= self.start:
            raise UserError(
                f"a TriStage falls exponentially from {self.start} to {self.end}. Use an end above 0, not above start."
            )

    def _value(self, tick: int, ticks: int, length_in_ticks: Callable[[Length], int]) -> float:
        rise = length_in_ticks(self.warmup)
        falls = rise + length_in_ticks(self.hold)
        if tick < rise:
            return self.warmup_start + (self.start - self.warmup_start) * tick / rise
        if tick < falls:
            return self.start
        share = min(1.0, (tick - falls) / max(ticks - falls, 1))
        return self.start * (self.end / self.start) ** share


@dataclass(frozen=True)
class Exponential(Schedule):
    """From `start` towards `end`, nearer by a factor of e in each `scale`; `end` itself once it is as near as `reached`
    (the teacher of SpidR, Poli et al. 2025).

    Args:
        scale: a share of the run or a count with its unit.
        reached: distance from `end` that is none any more.
    """

    scale: Length = 0.05
    reached: float = 1e-7

    def _value(self, tick: int, ticks: int, length_in_ticks: Callable[[Length], int]) -> float:
        left = (self.start - self.end) * math.exp(-tick / max(length_in_ticks(self.scale), 1))
        return self.end if abs(left) <= self.reached else self.end + left


def value_at(setting: float | Schedule, step: int, total: int, steps_per_epoch: int) -> float:
    """A plain number is its own value at any time."""
    return setting.value(step, total, steps_per_epoch) if isinstance(setting, Schedule) else setting
