"""`ssd check-data PATH`: what a run would make of this data, before anything is spent on it."""

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ssd.data.broken import BrokenPictures
from ssd.data.cache import Pictures
from ssd.data.checks import findings as say
from ssd.data.checks.crops import Enlargement, enlargements
from ssd.data.checks.examine import Examined, examine
from ssd.data.checks.findings import LEVELS, STOP, Finding
from ssd.data.checks.repeats import Repeats, repeated, repeats, shared
from ssd.data.checks.speed import Speed, measure, recommended, worker_counts
from ssd.data.folder import LIST_SUFFIXES
from ssd.data.sources import Source, limited, open_source
from ssd.data.statistics import measured_levels
from ssd.errors import UserError
from ssd.summary import check_json, check_writable, console, write_json
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.loading import typed_data
from ssd.views.view import Views

TRAINING, HELD_OUT, AGAINST = "training", "held-out", "other"


def run(argv: list[str]) -> int:
    own, chosen = split_data(argv)
    arguments = options().parse_args(own)
    if arguments.path is not None:
        chosen = ["--data", arguments.path, *chosen]
    check_json(arguments.json)
    check_writable("--out", arguments.out)
    if arguments.out is not None and not arguments.out.lower().endswith(LIST_SUFFIXES):
        raise UserError(f"--out {arguments.out} has no ending of a list. Use one of {', '.join(LIST_SUFFIXES)}.")
    data, views = typed_data(chosen, "check-data")
    workers = cores() if arguments.workers is None else arguments.workers

    parts, findings = parts_of(data, arguments.against)
    seen = look_at(data, parts, arguments.limit, workers)
    found = repeats(seen)
    findings += [finding for name in seen for finding in findings_of(name, seen, found, data, views)]
    sizes = seen[TRAINING].sizes
    enlarged = enlargements(views, sizes, data.seed) if len(sizes) else []
    findings += say.crops(enlarged)
    speeds: list[Speed] = []
    if not any(finding.level == STOP for finding in findings):
        speeds, refused = try_loading(data, views, seen[TRAINING], arguments.seconds)
        findings += refused
    findings.sort(key=lambda finding: LEVELS.index(finding.level))

    written = None
    if arguments.out is not None:
        # a share that is held out belongs to the same data
        listed = [TRAINING] + [HELD_OUT] * (HELD_OUT in seen and getattr(data, "val_path", None) is None)
        written = write_list(arguments.out, [(seen[name], found.alike[name]) for name in listed])
    stops = any(finding.level == STOP for finding in findings)
    show(seen, found, enlarged, speeds, findings, written)
    write_json(
        arguments.json,
        {
            "parts": {name: facts(name, part, found) for name, part in seen.items()},
            "views": [vars(kind) for kind in enlarged],
            "loader": [vars(speed) for speed in speeds],
            "workers": recommended(speeds) if speeds else None,
            "findings": [vars(finding) for finding in findings],
            "stops": stops,
        },
    )
    return 1 if stops else 0


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd check-data",
        description="Looks at every picture once: broken, blank, tiny and repeated ones, sizes against the crops of the "
        "views, channels, classes, pictures that are both in the training and in the held-out data, and how fast they "
        "load. Exit status 1 when something would stop a run.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit. "
        "--views takes a recipe (default: dino), --views.KEY VALUE its settings; --config method/NAME those of a run.",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="the data, the same as --data PATH")
    parser.add_argument("--against", metavar="PATH", help="other data that should share no picture with this")
    parser.add_argument("--limit", type=at_least_one, help="pictures of each part that are looked at; default: all")
    parser.add_argument("--workers", type=count, help="processes that look, 0 for none; default: one a core")
    parser.add_argument(
        "--seconds", type=seconds, default=3.0, help="for each loader speed that is measured, 0 for none; default: 3"
    )
    parser.add_argument("--out", metavar="FILE", help="also write a list of the good pictures, which --data takes")
    parser.add_argument("--json", metavar="FILE", help="also write everything that was found as JSON")
    return parser


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return value


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------- looking


def parts_of(data: Any, against: str | None) -> tuple[dict[str, Source], list[Finding]]:
    """What is looked at by name, and what a run says against how it fits together."""
    findings = []
    try:
        parts = dict(data.parts())
    except UserError as error:
        everything, separate = data.sources()  # what cannot be opened is the user's to mend
        findings.append(Finding(STOP, "parts", str(error)))
        parts = {TRAINING: everything} if separate is None else {TRAINING: everything, HELD_OUT: separate}
    if against is not None:
        parts[AGAINST] = open_source(against, labels=False)
    return parts, findings


def look_at(data: Any, parts: dict[str, Source], limit: int | None, workers: int) -> dict[str, Examined]:
    context = multiprocessing.get_context(data.start_method)
    if data.value_range == "data":
        source = parts[TRAINING]
        data.levels = measured_levels(source, data.channels, BrokenPictures(source, 1.0, context))
    return {
        name: examine(
            Pictures(limited(source, limit), data.channels, levels=data.levels), workers, context, f"{name} pictures"
        )
        for name, source in parts.items()
    }


def findings_of(name: str, parts: dict[str, Examined], found: Repeats, data: Any, views: Views) -> list[Finding]:
    """Of one part: what is wrong in it, and what of the training data is in it as well."""
    part = parts[name]
    leaks = [] if name == TRAINING else say.leaks(name, TRAINING, parts, found)
    if name == AGAINST:
        return leaks
    return [
        *say.broken(name, part, data.max_broken_share),
        *leaks,
        *say.duplicates(name, part, found),
        *say.blank(name, part),
        *say.tiny(name, part, views),
        *(say.classes(part) + say.grey(part) if name == TRAINING else []),
    ]


def try_loading(data: Any, views: Views, training: Examined, wanted_s: float) -> tuple[list[Speed], list[Finding]]:
    """A run's own loader with 0, 1, 2, ... workers; what it refuses is what would stop the run."""
    data.given = data.given or (training.mean, training.std)  # measured already
    data.cache = False  # the first epoch, and every one of larger data
    if data.photometry == "auto" and torch.cuda.is_available():
        data.photometry = "device"

    def loader_of(workers: int) -> Any:
        data.num_workers = workers
        return data.train_dataloader()

    try:
        data.prepare(views)
        for loader in data.val_dataloader():
            next(iter(loader))
        if not wanted_s:
            next(iter(loader_of(0)))
            return [], []
        return measure(loader_of, worker_counts(cores()), wanted_s), []
    except UserError as error:
        return [], [Finding(STOP, "run", str(error))]


# ---------------------------------------------------------------------- telling


def show(
    seen: dict[str, Examined],
    found: Repeats,
    enlarged: Sequence[Enlargement],
    speeds: Sequence[Speed],
    findings: Sequence[Finding],
    written: str | None,
) -> None:
    out = console()
    out.print(table_of_parts(seen, found))
    if enlarged:
        table = Table("views", "px", "crops enlarged", "median", "95 %", "median crop, px")
        for kind in enlarged:
            factors = (f"x {kind.median:.2f}", f"x {kind.high:.2f}")
            table.add_row(kind.kind, str(kind.size), f"{kind.share:.0%}", *factors, f"{kind.crop:.0f}")
        out.print(table)
    if speeds:
        table = Table("workers", "pictures/s", "first batch, s")
        best = recommended(speeds)
        for speed in speeds:
            mark = " (use this)" if speed.workers == best else ""
            table.add_row(f"{speed.workers}{mark}", f"{speed.pictures_per_s:,.0f}", f"{speed.first_batch_s:.1f}")
        out.print(table)
    for finding in findings:
        out.print(f"{finding.level:<8} {finding.text}", markup=False, highlight=False, soft_wrap=True)
    if not findings:
        out.print("nothing to mend")
    if written is not None:
        out.print(written, markup=False, highlight=False, soft_wrap=True)


def table_of_parts(seen: dict[str, Examined], found: Repeats) -> Table:
    columns = {name: rows_of(facts(name, part, found)) for name, part in seen.items()}
    table = Table("", *seen)
    for row in columns[TRAINING]:
        table.add_row(row, *(column.get(row, "") for column in columns.values()))
    return table


def rows_of(known: dict[str, Any]) -> dict[str, str]:
    """A part's facts as cells."""
    rows = {"pictures": f"{known['pictures']:,}"}
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


def facts(name: str, part: Examined, found: Repeats) -> dict[str, Any]:
    """Everything about a part, as plain data: broken pictures with the reason, repeated ones with what they repeat."""
    records, source = part.records, part.source
    sizes = part.sizes
    copies = repeated(found.same[name])
    alike = np.setdiff1d(repeated(found.alike[name]), copies)
    labels = source.labels
    content: dict[str, Any] = {
        "pictures": len(part),
        "broken": [{"picture": source.describe(row), "reason": part.reasons[row]} for row in sorted(part.reasons)],
        "blank": part.names(np.flatnonzero(records["blank"]), len(records)),
        "copies": with_first(part, copies, found.same[name]),
        "look_alikes": with_first(part, alike, found.alike[name]),
        "grey": int(records["grey"].sum()),
        "mean": part.mean,
        "std": part.std,
        "classes": say.class_counts(part),
        "unlabelled": len(part) if labels is None else int((labels == -1).sum()),
    }
    for axis, side in enumerate(("height", "width")):
        spread = [int(value) for value in np.quantile(sizes[:, axis], [0, 0.5, 1])] if len(sizes) else None
        content[side] = spread
    if name != TRAINING:
        content["in_training"] = part.names(shared(found.alike[name], found.alike[TRAINING]), len(records))
    return content


def with_first(part: Examined, rows: np.ndarray, groups: np.ndarray) -> list[dict[str, str]]:
    first = {int(groups[row]): row for row in range(len(groups) - 1, -1, -1)} if len(rows) else {}
    return [
        {"picture": part.source.describe(row), "of": part.source.describe(first[int(groups[row])])}
        for row in rows.tolist()
    ]


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
                raise UserError(
                    f"--out {file} lists files, and '{name}' is none that a line can name. Leave --out out."
                )
            label = -1 if labels is None else int(labels[row])
            word = "" if label < 0 else f"\t{label if classes is None else classes[label]}"
            lines.append(f"{os.path.abspath(name)}{word}\n")
    if not lines:
        raise UserError(f"--out {file}: no picture is left to list.")
    Path(file).write_text("".join(lines), encoding="utf-8")
    total = sum(len(part) for part, _ in parts)
    return f"{len(lines):,} good pictures of {total:,} are listed in {file}: --data {file}"


def listable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not any(letter in name for letter in "\t\n\r") and name == name.strip()
