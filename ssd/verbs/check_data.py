"""`ssd check-data PATH`: what a run would make of this data, before anything is spent on it."""

import argparse
import logging
import multiprocessing
from collections.abc import Sequence
from typing import Any

import torch

from ssd.cores import available_cores
from ssd.data.broken import BrokenSamples
from ssd.data.cache import Pictures
from ssd.data.checks import findings as say
from ssd.data.checks.crops import Enlargement, enlargements
from ssd.data.checks.examine import Examined, examine
from ssd.data.checks.findings import LEVELS, STOP, Finding
from ssd.data.checks.repeats import Repeats, repeats
from ssd.data.checks.report import check_files, facts, table_of_parts, table_of_speeds, table_of_views, write_list
from ssd.data.checks.speed import Speed, measure, recommended, worker_counts
from ssd.data.folder import LIST_SUFFIXES
from ssd.data.sources import Source, limited, open_source
from ssd.data.statistics import measured_levels
from ssd.errors import UserError
from ssd.summary import check_json, check_writable, console, write_json
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.loading import check_pictures, typed_data
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
    check_pictures(data, "check-data")
    data.check_views(views)
    workers = available_cores() if arguments.workers is None else arguments.workers

    parts, findings = parts_of(data, arguments.against)
    if arguments.out is not None:
        check_files(arguments.out, parts[TRAINING])
    seen = look_at(data, parts, arguments.limit, workers)
    found = repeats(seen)
    findings += [finding for name in seen for finding in findings_of(name, seen, found, data, views)]
    findings += say.classes(parts[TRAINING])
    sizes = seen[TRAINING].sizes
    enlarged = enlargements(views, sizes, data.seed) if len(sizes) else []
    findings += say.crops(enlarged)
    speeds: list[Speed] = []
    if not any(finding.level == STOP for finding in findings):
        speeds, refused = try_loading(data, views, seen[TRAINING], arguments.seconds)
        findings += refused
    findings.sort(key=lambda finding: LEVELS.index(finding.level))

    stops = any(finding.level == STOP for finding in findings)
    about = {name: facts(name, parts[name], part, found, TRAINING) for name, part in seen.items()}
    show(about, enlarged, speeds, findings)
    write_json(
        arguments.json,
        {
            "parts": about,
            "views": [vars(kind) for kind in enlarged],
            "loader": [vars(speed) for speed in speeds],
            "workers": recommended(speeds) if speeds else None,
            "findings": [vars(finding) for finding in findings],
            "stops": stops,
        },
    )
    if arguments.out is not None:
        # a share that is held out belongs to the same data
        listed = [TRAINING] + [HELD_OUT] * (HELD_OUT in seen and getattr(data, "val_path", None) is None)
        said = write_list(arguments.out, [(seen[name], found.alike[name]) for name in listed])
        console().print(said, markup=False, highlight=False, soft_wrap=True)
    return 1 if stops else 0


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd check-data",
        description="Looks at every picture once: broken, blank, tiny and repeated ones, sizes against the crops of the "
        "views, channels, classes, pictures that are both in the training and in the held-out data, and how fast they "
        "load. Exit status 1 when something would stop a run.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit. "
        "--views takes a recipe (default: dino), and --views.KEY VALUE its settings; --config method/NAME takes those of a run.",
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
        data.levels = measured_levels(source, data.channels, BrokenSamples(source, 1.0, context))
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
        return [*say.not_compared(name, part), *leaks]
    return [
        *say.broken(name, part, data.max_broken_share),
        *leaks,
        *say.duplicates(name, part, found),
        *say.blank(name, part),
        *say.tiny(name, part, views),
        *(say.grey(part) if name == TRAINING else []),
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

    named = logging.getLogger(BrokenSamples.__module__)
    level = named.level
    named.setLevel(logging.ERROR)  # each broken picture is in the findings
    try:
        data.prepare(views)
        data.num_workers = 0
        for loader in data.val_dataloader():
            next(iter(loader))
        if not wanted_s:
            next(iter(loader_of(0)))
            return [], []
        return measure(loader_of, worker_counts(available_cores()), wanted_s), []
    except UserError as error:
        return [], [Finding(STOP, "run", str(error))]
    finally:
        named.setLevel(level)


# ---------------------------------------------------------------------- telling


def show(
    about: dict[str, dict[str, Any]],
    enlarged: Sequence[Enlargement],
    speeds: Sequence[Speed],
    findings: Sequence[Finding],
) -> None:
    out = console()
    out.print(table_of_parts(about))
    if enlarged:
        out.print(table_of_views(enlarged))
    if speeds:
        out.print(table_of_speeds(speeds))
    for finding in findings:
        out.print(f"{finding.level:<8} {finding.text}", markup=False, highlight=False, soft_wrap=True)
    if not findings:
        out.print("nothing to mend")
