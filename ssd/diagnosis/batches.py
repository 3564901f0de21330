"""What can be wrong with a batch: values that are none, pictures without content, views or samples that are the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd.batch import Batch
from ssd.diagnosis.findings import Finding

MOST_MEAN, LEAST_SPREAD, MOST_SPREAD = 5.0, 0.05, 10.0
"""Normalised pictures lie around 0 with deviations around 1; no crop, colour or statistics of other data go so far."""
MANY = 0.5  # share of a batch from which its samples are not just odd ones
BATCH_FACTS = ("not_finite", "blank", "same_views", "copies", "mean", "spread")


@dataclass(frozen=True)
class BatchFacts:
    """One rank's batch, its global views: shares of samples, and what all values are like; all NaN of what is no picture.

    Args:
        not_finite: with NaN or infinite values.
        blank: without any content, in all views.
        same_views: whose first two views are equal; NaN where there is one view.
        copies: equal to another sample's view.
        mean, spread: of all values.
    """

    not_finite: float
    blank: float
    same_views: float
    copies: float
    mean: float
    spread: float


def first_views(batch: Batch) -> Tensor | None:
    """(V, B, ...) global pictures or clips, else the first kind; None of sound."""
    views = batch.views.get("global", next(iter(batch.views.values())))
    return views if views.ndim > 3 and views.is_floating_point() else None


def measure_batch(views: Tensor) -> Tensor:
    """(V, B, ...) -> the numbers of `BatchFacts` on the device. (6,)"""
    finite = rows_finite(views)
    average, spread = moments(views)
    same = same_views(views).float().mean() if len(views) > 1 else views.new_full((), torch.nan)
    facts = [(~finite).float().mean(), blank(views).float().mean(), same, copied(views).float().mean(), average, spread]
    return torch.stack([fact.float() for fact in facts])


def moments(views: Tensor) -> tuple[Tensor, Tensor]:
    spread, average = torch.std_mean(views.float())
    return average, spread


def rows_finite(views: Tensor) -> Tensor:
    """(B,) whether all values of a sample are numbers."""
    return views.flatten(2).sum(2).isfinite().all(0)


def blank(views: Tensor) -> Tensor:
    """(B,) whether every channel of every view of a sample is one value."""
    flat = views.flatten(3)
    return (flat.amax(-1) == flat.amin(-1)).all(-1).all(0)


def same_views(views: Tensor) -> Tensor:
    """(B,) whether the first two views of a sample are equal, and not just both blank."""
    return (views[0] == views[1]).flatten(1).all(1) & ~blank(views)


def copied(views: Tensor) -> Tensor:
    """(B,) whether a view of a sample equals the same view of another one.

    Samples are told apart by two sums of their values, one of them with weights that no rearrangement keeps.
    """
    flat = views.flatten(2).float()
    weights = torch.linspace(0.5, 1.5, flat.shape[2], device=flat.device).square()
    prints = torch.stack([flat.sum(2), flat @ weights], -1)  # (V, B, 2)
    equal = (prints[:, :, None] == prints[:, None]).all(-1)  # (V, B, B)
    return (equal.sum(2) > 1).any(0)


def diagnose_batch(
    facts: Sequence[BatchFacts], step: int, follows: bool, least_copies: float = math.inf
) -> list[Finding]:
    """Of the batches of all ranks.

    Args:
        follows: whether the teacher follows the student, for which equal views are no task.
        least_copies: share of equal samples from which to speak of them: those that a term keeps apart, and that nothing
            else, such as masks, tells apart, are infinitely near.
    """
    findings = []
    for rank, fact in enumerate(facts):
        if fact.not_finite > 0:
            findings.append(
                Finding(
                    "input-not-finite",
                    step,
                    f"{fact.not_finite:.0%} of the samples on rank {rank} have values that are NaN or infinite.",
                    "Look at the files that the kept batch names; convert or remove them.",
                    rank=rank,
                )
            )
            continue
        if math.isnan(fact.mean):
            continue
        if fact.blank > MANY:
            findings.append(
                Finding(
                    "blank-inputs",
                    step,
                    f"{fact.blank:.0%} of the samples on rank {rank} are one colour from edge to edge.",
                    "Run ssd check-data and ssd look: is value_range right, are files empty, or do crops miss the content?",
                    rank=rank,
                )
            )
        elif abs(fact.mean) > MOST_MEAN or not LEAST_SPREAD < fact.spread < MOST_SPREAD:
            findings.append(
                Finding(
                    "wrong-normalisation",
                    step,
                    f"pictures reach the network with mean {fact.mean:.3g} and deviation {fact.spread:.3g}, about 0 and 1 "
                    "are expected.",
                    "Set data.normalize: data, which measures the pictures, or the statistics of values in [0, 1].",
                    rank=rank,
                )
            )
        if follows and fact.same_views > MANY:
            findings.append(
                Finding(
                    "identical-views",
                    step,
                    f"the first two views of {fact.same_views:.0%} of the samples are equal, so there is nothing to predict.",
                    "Use a recipe that crops and changes colours, for instance views: dino; see ssd look.",
                    rank=rank,
                )
            )
        if fact.copies > 0 and fact.copies >= least_copies and fact.blank <= MANY:
            findings.append(
                Finding(
                    "koleo-copies",
                    step,
                    f"{fact.copies:.0%} of the samples on rank {rank} equal another one of the batch in a view, so the term "
                    "'koleo' is close to its largest value and pulls at nothing else.",
                    "Remove the copies (ssd check-data lists them), or blank pictures.",
                    term="koleo",
                    rank=rank,
                    severity=fact.copies,
                )
            )
    # one rank is enough to act on
    return list({finding.kind: finding for finding in reversed(findings)}.values())


def guilty_rows(kind: str, views: Tensor) -> Tensor:
    """(n,) samples of the batch that a finding is about, all where it is about none of them in particular."""
    chosen = {
        "not-finite": lambda: ~rows_finite(views),
        "input-not-finite": lambda: ~rows_finite(views),
        "blank-inputs": lambda: blank(views),
        "identical-views": lambda: same_views(views),
        "koleo-copies": lambda: copied(views),
    }.get(kind)
    every = torch.arange(views.shape[1], device=views.device)
    rows = every if chosen is None else every[chosen()]
    return rows if len(rows) else every
