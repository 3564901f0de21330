"""What is to be said about data: sentences that tell what, how many, which for example, and what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssd.data.checks.crops import TINY, Enlargement, smallest_side
from ssd.data.checks.examine import Examined
from ssd.data.checks.repeats import Repeats, repeated, shared
from ssd.data.sources import Source
from ssd.views.view import Views

STOP, WARNING, NOTE = "stop", "warning", "note"
LEVELS = (STOP, WARNING, NOTE)
SHOWN = 3  # examples in a sentence
ENLARGED, BLOWN_UP = 1.25, 2.0  # medians from which crops are worth a note, and a warning
UNEVEN = 10  # times as many pictures in the largest class as in the smallest


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        level: "stop" = a run would stop, "warning" = it would learn less than it could, "note" = worth knowing.
        check: what was looked at, one word.
        text: one sentence or two.
    """

    level: str
    check: str
    text: str


def of(count: int, total: int) -> str:
    share = count / total
    shown = f" ({share:.1%})" if share >= 0.001 else ""
    return f"{count:,} of {total:,}{shown}" if count < total else f"all {total:,}"


def listed(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (", ..." if count > len(names) else "")


def broken(part: str, seen: Examined, max_share: float) -> list[Finding]:
    """Pictures that cannot be read, and whether they are too many, as `BrokenSamples` counts them."""
    count, total = len(seen.reasons), len(seen)
    if not count:
        return []
    rows = sorted(seen.reasons)
    shown = "; ".join(f"{seen.source.describe(row)}: {seen.reasons[row]}" for row in rows[:SHOWN])
    if count == total:
        text = (
            f"none of the {total:,} {part} pictures can be read: {shown}. Are they pictures, with as many channels as "
            "data.channels?"
        )
        return [Finding(STOP, "broken", text)]
    first = f"{of(count, total)} {part} pictures cannot be read"
    if count > max_share * total:
        text = (
            f"{first}, more than max_broken_share = {max_share:g} allows: {shown}. Mend or remove them, or raise "
            "data.max_broken_share."
        )
        return [Finding(STOP, "broken", text)]
    what = "replaced by others" if part == "training" else "left out"
    return [Finding(WARNING, "broken", f"{first} and are {what}: {shown}. Mend or remove them.")]


def not_compared(part: str, seen: Examined) -> list[Finding]:
    """Pictures of other data that cannot be read, so that nothing is known of them."""
    if not seen.reasons:
        return []
    rows = sorted(seen.reasons)
    shown = "; ".join(f"{seen.source.describe(row)}: {seen.reasons[row]}" for row in rows[:SHOWN])
    text = f"{of(len(rows), len(seen))} {part} pictures cannot be read and were not compared: {shown}."
    return [Finding(WARNING, "broken", text)]


def blank(part: str, seen: Examined) -> list[Finding]:
    rows = np.flatnonzero(seen.records["blank"])
    if not len(rows):
        return []
    text = (
        f"{of(len(rows), len(seen))} {part} pictures are blank, for instance {listed(seen.names(rows), len(rows))}. "
        "Leave them out: there is nothing to learn from them."
    )
    return [Finding(WARNING, "blank", text)]


def tiny(part: str, seen: Examined, views: Views) -> list[Finding]:
    """Pictures too small for the smallest crop that a view may be."""
    least = smallest_side(views)
    side = np.minimum(seen.records["height"], seen.records["width"])
    rows = np.flatnonzero(seen.records["readable"] & (side < least))
    if not len(rows):
        return []
    first = int(rows[0])
    size = f"{seen.records['width'][first]} x {seen.records['height'][first]} px"
    text = (
        f"{of(len(rows), len(seen))} {part} pictures are tiny: with a side below {least:.0f} px their smallest crops are "
        f"enlarged more than {TINY:g}-fold, for instance {seen.names(rows, 1)[0]} ({size}). Use smaller views or larger "
        "crops, or leave them out."
    )
    return [Finding(WARNING, "tiny", text)]


def crops(found: Sequence[Enlargement]) -> list[Finding]:
    """What the views make of pictures of these sizes, in words."""
    findings = []
    for kind in found:
        if kind.median < ENLARGED:
            continue
        text = (
            f"{kind.share:.0%} of the {kind.kind} crops are enlarged to {kind.size} px, {kind.median:.1f}-fold at the "
            f"median and more than {kind.high:.1f}-fold in one of twenty. {kind.kind.capitalize()} views of about "
            f"{max(8, round(kind.crop / 8) * 8)} px would cost less and show as much."
        )
        findings.append(Finding(WARNING if kind.median > BLOWN_UP else NOTE, "crops", text))
    return findings


def grey(seen: Examined) -> list[Finding]:
    """Pictures without colour where colour is expected."""
    count, readable = int(seen.records["grey"].sum()), int(seen.records["readable"].sum())
    if not count:
        return []
    text = f"{of(count, readable)} pictures have no colour"
    if count == readable:
        return [Finding(NOTE, "grey", f"{text}. data.channels 1 would load less and learn the same.")]
    return [Finding(NOTE, "grey", f"{text}: they have three equal channels. Nothing has to be done.")]


def classes(source: Source) -> list[Finding]:
    """How evenly labelled pictures are spread over classes, and how many have none."""
    counts = class_counts(source)
    if counts is None or source.labels is None:
        return []
    findings = []
    unlabelled = int((source.labels == -1).sum())
    if unlabelled:
        text = f"{of(unlabelled, len(source))} pictures have no label. They are trained on, and not evaluated."
        findings.append(Finding(NOTE, "classes", text))
    empty = [name for name, count in counts.items() if not count]
    if empty:
        text = (
            f"{of(len(empty), len(counts))} classes have no training picture, for instance {listed(empty[:SHOWN], len(empty))}. "
            "Scores of these classes mean nothing: add pictures, or leave the classes out."
        )
        findings.append(Finding(WARNING, "classes", text))
    full = {name: count for name, count in counts.items() if count}
    small, large = min(full, key=full.__getitem__), max(full, key=full.__getitem__)
    if full[large] >= UNEVEN * full[small]:
        text = (
            f"classes are uneven: {full[large]:,} pictures of '{large}' and {full[small]:,} of '{small}'. Read "
            "accuracies class by class, or even the classes out."
        )
        findings.append(Finding(NOTE, "classes", text))
    return findings


def class_counts(source: Source) -> dict[str, int] | None:
    """Pictures of each class by name, those of none left out; None where there are no labels."""
    labels = source.labels
    if labels is None or not (labels >= 0).any():
        return None
    names = source.classes
    counts = np.bincount(labels[labels >= 0], minlength=0 if names is None else len(names))
    if names is None:
        # plain numbers: one that never occurs is no class
        return {str(number): int(counts[number]) for number in np.flatnonzero(counts)}
    return {name: int(count) for name, count in zip(names, counts)}


def duplicates(part: str, seen: Examined, found: Repeats) -> list[Finding]:
    """Pictures that occur again within a part: the same pixels, and what only looks the same."""
    again = repeated(found.same[part])
    near = np.setdiff1d(repeated(found.alike[part]), again)
    findings = []
    for rows, groups, what in (
        (again, found.same[part], "are exact copies of others"),
        (near, found.alike[part], "look like another to within compression and size"),
    ):
        if len(rows):
            row = int(rows[0])
            other = int(np.flatnonzero(groups == groups[row])[0])
            text = (
                f"{of(len(rows), len(seen))} {part} pictures {what}, for instance {seen.source.describe(row)} and "
                f"{seen.source.describe(other)}. Leave them out, so that they do not count more than once."
            )
            findings.append(Finding(WARNING, "duplicates", text))
    return findings


def leaks(of_part: str, into: str, parts: Mapping[str, Examined], found: Repeats) -> list[Finding]:
    """Pictures of one part, such as the held-out one, that are in another, such as the training one, as well."""
    findings = []
    exact = shared(found.same[of_part], found.same[into])
    near = np.setdiff1d(shared(found.alike[of_part], found.alike[into]), exact)
    for rows, groups, what in ((exact, found.same, "are"), (near, found.alike, "look like pictures")):
        if len(rows):
            row = int(rows[0])
            other = int(np.flatnonzero(groups[into] == groups[of_part][row])[0])
            text = (
                f"{of(len(rows), len(parts[of_part]))} {of_part} pictures {what} in the {into} data as well, for instance "
                f"{parts[of_part].source.describe(row)} and {parts[into].source.describe(other)}. Leave them out of one "
                "of both: scores on them do not tell what was learned."
            )
            findings.append(Finding(WARNING, "leakage", text))
    return findings
