"""What was found as tables, as plain data, and as a list of the pictures that are good."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ssd.data.checks.crops import Enlargement
from ssd.data.checks.examine import Examined
from ssd.data.checks.findings import class_counts
from ssd.data.checks.repeats import Repeats, repeated, shared
from ssd.data.checks.speed import Speed, recommended
from ssd.data.sources import Source
from ssd.errors import UserError


def table_of_parts(about: dict[str, dict[str, Any]]) -> Table:
    columns = [rows_of(known) for known in about.values()]
    table = Table("", *about)
    for row in columns[0]:
        table.add_row(row, *(column.get(row, "") for column in columns))
    return table


def table_of_views(enlarged: Sequence[Enlargement]) -> Table:
    table = Table("views", "px", "crops enlarged", "median", "95 %", "median crop, px")
    for kind in enlarged:
        factors = (f"x {kind.median:.2f}", f"x {kind.high:.2f}")
        table.add_row(kind.kind, str(kind.size), f"{kind.share:.0%}", *factors, f"{kind.crop:.0f}")
    return table


def table_of_speeds(speeds: Sequence[Speed]) -> Table:
    table = Table("workers", "pictures/s", "first batch, s")
    best = recommended(speeds)
    for speed in speeds:
        mark = " (use this)" if speed.workers == best else ""
        table.add_row(f"{speed.workers}{mark}", f"{speed.pictures_per_s:,.0f}", f"{speed.first_batch_s:.1f}")
    return table


def rows_of(known: dict[str, Any]) -> dict[str, str]:
    """A part's facts as cells."""
    rows = {"pictures": f"{known['pictures']:,}"}
    if known["looked_at"] < known["pictures"]:
        rows["looked at"] = f"{known['looked_at']:,}"
    for name in ("broken", "blank", "copies", "look_alikes"):
        rows[name.replace("_", "-")] = f"{len(known[name]):,}"
    rows["without colour"] = f"{known['grey']:,}"
    for side in ("width", "height"):
        low, middle, high = known[side] or ("", "", "")
        rows[f"{side}, px"] = f"{low} to {high}, median {middle}" if known[side] else ""
    for name in ("mean", "std"):
        shown = [f"{value:.3f}" for value in known[name]]
        rows[name] = " ".join(shown if len(shown) <= 4 else [*shown[:4], "..."])
    if known["classes"]:
        counts = Counter(known["classes"]).most_common()
        (most, high), (least, low) = counts[0], counts[-1]
        rows["classes"] = str(len(counts))
        rows["largest class"] = f"{most} ({high:,})"
        rows["smallest class"] = f"{least} ({low:,})"
    else:
        rows["classes"] = "no labels"
    return rows


def facts(name: str, whole: Source, part: Examined, found: Repeats, against: str) -> dict[str, Any]:
    """Everything about a part, as plain data: broken pictures with the reason, repeated ones with what they repeat."""
    records, source = part.records, part.source
    sizes = part.sizes
    copies = repeated(found.same[name])
    alike = np.setdiff1d(repeated(found.alike[name]), copies)
    labels = whole.labels
    content: dict[str, Any] = {
        "pictures": len(whole),
        "looked_at": len(part),
        "broken": [{"picture": source.describe(row), "reason": part.reasons[row]} for row in sorted(part.reasons)],
        "blank": part.names(np.flatnonzero(records["blank"]), len(records)),
        "copies": with_first(part, copies, found.same[name]),
        "look_alikes": with_first(part, alike, found.alike[name]),
        "grey": int(records["grey"].sum()),
        "mean": part.mean,
        "std": part.std,
        "classes": class_counts(whole),
        "unlabelled": len(whole) if labels is None else int((labels == -1).sum()),
    }
    for axis, side in enumerate(("height", "width")):
        spread = [int(value) for value in np.quantile(sizes[:, axis], [0, 0.5, 1])] if len(sizes) else None
        content[side] = spread
    if name != against:
        content[f"in_{against}"] = part.names(shared(found.alike[name], found.alike[against]), len(records))
    return content


def with_first(part: Examined, rows: np.ndarray, groups: np.ndarray) -> list[dict[str, str]]:
    """Each repeated picture, and the first of its group."""
    numbers, first = np.unique(groups, return_index=True)
    others = first[np.searchsorted(numbers, groups[rows])]
    describe = part.source.describe
    return [{"picture": describe(row), "of": describe(other)} for row, other in zip(rows.tolist(), others.tolist())]


def write_list(file: str, parts: Sequence[tuple[Examined, np.ndarray]]) -> str:
    """A list of the files that are readable, not blank and no repeats, with their classes, and a line that says so.

    Parts come with the groups of what looks the same, (N,) each. Raises UserError where a picture is no file that a list
    can name.
    """
    taken: set[int] = set()
    lines = []
    for part, groups in parts:
        classes, labels = part.source.classes, part.source.labels
        for row in np.setdiff1d(np.flatnonzero(groups >= 0), repeated(groups)).tolist():
            if int(groups[row]) in taken:
                continue
            taken.add(int(groups[row]))
            name = part.source.describe(row)
            if not os.path.isfile(name) or not listable(name):
                raise no_line(file, name)
            label = -1 if labels is None else int(labels[row])
            word = "" if label < 0 else f"\t{label if classes is None else classes[label]}"
            lines.append(f"{os.path.abspath(name)}{word}\n")
    if not lines:
        raise UserError(f"--out {file}: no picture is left to list.")
    Path(file).write_text("".join(lines), encoding="utf-8")
    total = sum(len(part) for part, _ in parts)
    return f"{len(lines):,} good pictures of {total:,} are listed in {file}: --data {file}"


def check_files(file: str, source: Source) -> None:
    """Raises UserError for pictures that lie in no files of their own, which the first of them tells."""
    name = source.describe(0)
    if not os.path.lexists(name):
        raise no_line(file, name)


def no_line(file: str, name: str) -> UserError:
    return UserError(f"--out {file} lists files, and {name!r} is none that a line can name. Leave --out out.")


def listable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not any(letter in name for letter in "\t\n\r") and name == name.strip()
