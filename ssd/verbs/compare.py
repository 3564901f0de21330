"""`ssd compare A B ... --data ...`: several networks on the same probes, and whether they differ beyond chance."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ssd.cores import available_cores
from ssd.errors import UserError
from ssd.evaluation.answers import Answers, Cell, compared, over_initialisations, probe_answers
from ssd.evaluation.features import Features, extract, name_without_a_network, without_a_network
from ssd.evaluation.finetune import Recipe
from ssd.evaluation.protocol import chance_level
from ssd.record import describe
from ssd.summary import check_json, console, print_facts, write_json
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.check_data import count
from ssd.verbs.duplicates import Duplicates, find_duplicates
from ssd.verbs.export import data_named
from ssd.verbs.extraction import add_extraction, check_device
from ssd.verbs.finetune import SHARES, share_of_labels
from ssd.verbs.loading import load_data, of_pictures
from ssd.verbs.starts import NETWORK, RANDOM, Start, load_start
from ssd.verbs.study import Study
from ssd.verbs.supervised import supervised_views

SAMPLES = ("pixels", "log-mel")
"""Names of the samples themselves: of pictures and clips, and of sounds."""


def run(argv: list[str]) -> int:
    own, chosen = split_data(argv)
    arguments = options().parse_args(own)
    check_json(arguments.json)
    check_device(arguments.device)
    starts = load_starts(arguments.starts)
    baseline = arguments.baseline or arguments.starts[0]
    if baseline not in starts:
        raise UserError(f"--baseline {baseline} is none of what is compared: {', '.join(starts)}.")
    first = next(start for start in starts.values() if start is not None)
    stored = next((s.about["data"] for s in starts.values() if s is not None and s.about.get("data")), None)

    asking = Asking(chosen, stored, arguments)
    rows: dict[str, dict[str, Answers]] = {}
    for name, start in starts.items():
        rows[name] = asking.answers(name, start or first, alone=start is None)
    data = asking.data(first)
    duplicates = None
    if not arguments.skip_duplicates and of_pictures(data):
        known = {name: start.about for name, start in starts.items() if start is not None and start.weights is not None}
        duplicates = find_duplicates(data, known, arguments.workers)

    cells = compared(rows, baseline, arguments.seed)
    content: dict[str, Any] = {
        "data": data_named(data.record()),
        "training": len(data.labelled_parts()[0]),
        "test": len(asking.truth),
        "chance": chance_level(asking.truth),
        "baseline": baseline,
        "rows": as_json(cells, rows),
    }
    out = console()
    out.print(table(cells, f"{content['data']}: top-1 on {content['test']:,} test samples, %"))
    out.print(
        f"second line: 95 % interval; third: gain over {baseline} with its own, ~ where it may be chance\n"
        "*: better than every other row beyond chance",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    print_facts(out, {**protocols_of(rows), "chance": f"{100 * content['chance']:.1f} %, the commonest class"})
    if duplicates is not None:
        content["duplicates"] = {"counts": duplicates.counts, "texts": duplicates.texts}
        without = tell_duplicates(out, duplicates, rows, asking, baseline, arguments.seed)
        if without is not None:
            content["without_duplicates"] = without
    write_json(arguments.json, content)
    return 0


def options() -> Parser:
    parser = Parser(
        prog="ssd compare",
        description="Asks several starts the same probes on frozen features (kNN, logistic regression on 1 %, 10 % and all "
        "labels), and, with --finetune, trains them on labels. Every number has a 95 % interval, and so has its difference "
        "to the baseline, sample by sample. Test pictures that a network has seen before are counted, and the numbers given "
        "without them.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit; "
        "without it the data of the first checkpoint is used.",
    )
    parser.add_argument(
        "starts",
        nargs="+",
        metavar="START",
        help=f"{NETWORK}; random = the first network with random weights; pixels or, of sounds, log-mel = the samples "
        "themselves",
    )
    parser.add_argument("--baseline", metavar="START", help="what the others are compared with; default: the first")
    parser.add_argument(
        "--draws", type=at_least_one, default=20, help="of few labels, for frozen features; default: 20"
    )
    parser.add_argument(
        "--seeds", type=at_least_one, default=3, help="random weights, and trainings of --finetune; default: 3"
    )
    parser.add_argument("--seed", type=int, default=0, help="of draws, random weights and intervals; default: 0")
    parser.add_argument(
        "--finetune",
        nargs="*",
        type=share_of_labels,
        metavar="SHARE",
        help="also train on these shares of the labels, as ssd finetune does with its defaults; alone: 0.01 0.1 1.0",
    )
    parser.add_argument("--epochs", type=at_least_one, help="of --finetune; default: as ssd finetune")
    parser.add_argument(
        "--skip-duplicates",
        action="store_true",
        help="do not look for test pictures seen before; clips and sounds are not looked through",
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=max(0, available_cores() - 1),
        help="processes that look for them; default: cores less one",
    )
    add_extraction(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    return parser


def load_starts(names: list[str]) -> dict[str, Start | None]:
    """Name -> start, None for the samples themselves. Raises UserError for one that is given twice, or without a network."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"{', '.join(twice)} is given more than once. Give each start once.")
    networks = {name: load_start(name) for name in names if name not in (*SAMPLES, RANDOM)}
    if not networks:
        raise UserError(
            f"{' and '.join(names)} alone say nothing of size and channels. Give a network too: a checkpoint, an exported "
            "folder, timm:NAME or random:NETWORK."
        )
    first = next(iter(networks.values()))
    return {
        name: None if name in SAMPLES else first.untrained(RANDOM) if name == RANDOM else networks[name]
        for name in names
    }


class Asking:
    """Asks every start the same questions on the same samples.

    Args:
        chosen: what was typed of the data.
        stored: record of the data that is used where none is typed.
    """

    def __init__(self, chosen: list[str], stored: dict[str, Any] | None, arguments: Any):
        self.chosen, self.stored, self.arguments = chosen, stored, arguments
        self.truth: Tensor
        self.asked: Tensor | None = None
        self.bank_labels: Tensor

    def data(self, start: Start, **views: Any) -> Any:
        return load_data(self.chosen, start.about | {"data": self.stored} | views, "compare")

    def answers(self, name: str, start: Start, alone: bool) -> dict[str, Answers]:
        data, arguments = self.data(start), self.arguments
        data.labelled_parts()
        loaders = data.test_dataloader()
        if alone:
            told = name_without_a_network(data.views)
            if name != told:
                raise UserError(f"'{name}' is not what {type(data).__name__} has. Use {told}: the samples themselves.")
            return self.probed(name, *(without_a_network(loader, data.views) for loader in loaders))
        found = []
        for number in range(1 if start.weights is not None else arguments.seeds):
            backbone = start.backbone(arguments.seed + number).to(arguments.device)
            progress = f"{name} features" if sys.stderr.isatty() and sys.stdout.isatty() else None
            features = [
                extract(
                    lambda samples: backbone(samples).pooled(),  # noqa: B023
                    loader,
                    device=arguments.device,
                    precision=arguments.precision,
                    progress=progress,
                )
                for loader in loaders
            ]
            found.append(self.probed(name, *features))
        return over_initialisations(found) | self.fine_tuned(start)

    def probed(self, name: str, bank: Features, queries: Features) -> dict[str, Answers]:
        """Raises UserError where these are not the samples that the starts before were asked."""
        if self.asked is None:
            self.asked, self.truth, self.bank_labels = queries.index, queries.labels, bank.labels
        if not (torch.equal(queries.index, self.asked) and torch.equal(bank.labels, self.bank_labels)):
            raise UserError(
                f"{name} could read other samples than the starts before it. Mend the data: ssd check-data."
            )
        return probe_answers(
            bank.features, bank.labels, queries.features, queries.labels, self.arguments.draws, self.arguments.seed
        )

    def fine_tuned(self, start: Start) -> dict[str, Answers]:
        arguments = self.arguments
        if arguments.finetune is None:
            return {}
        views = describe(supervised_views(start.about))
        device = arguments.device
        precision = "32-true" if torch.device(device).type == "cpu" else "bf16-mixed"
        recipe = Recipe(epochs=arguments.epochs, precision=precision)
        study = Study(self.data(start, views=views), recipe, device, None, "compare")
        found = {}
        for share in sorted(set(arguments.finetune or SHARES)):
            result = study.result(start, start.name, share, arguments.seeds, arguments.seed)
            found[f"finetune_{100 * share:g}pct"] = Answers(result.correct, result.protocol)
        return found


# ---------------------------------------------------------------------- telling


def protocols_of(rows: Mapping[str, Mapping[str, Answers]]) -> dict[str, str]:
    """Question -> how it was asked, of which there is more than one way where starts are trained differently."""
    found: dict[str, list[str]] = {}
    for row in rows.values():
        for question, answers in row.items():
            ways = found.setdefault(question, [])
            if answers.protocol not in ways:
                ways.append(answers.protocol)
    return {question: "; ".join(ways) for question, ways in found.items()}


def table(cells: Mapping[str, Mapping[str, Cell]], title: str) -> Table:
    """In percent, with intervals; under each number its difference to the baseline."""
    questions = list(dict.fromkeys(question for row in cells.values() for question in row))
    drawn = Table(title=title, show_lines=True)
    drawn.add_column("start", overflow="fold")
    for question in questions:
        drawn.add_column(question, justify="right", no_wrap=True)
    for name, row in cells.items():
        drawn.add_row(name, *(told(row[question]) if question in row else "" for question in questions))
    return drawn


def told(cell: Cell) -> str:
    accuracy, gain = cell.accuracy, cell.gain
    lines = [
        f"{'* ' if cell.best else ''}{100 * accuracy.value:.1f}",
        f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}",
    ]
    if gain is not None:
        unsure = "" if gain.beyond_chance else "~ "
        lines.append(f"{unsure}{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})")
    return "\n".join(lines)


def as_json(cells: Mapping[str, Mapping[str, Cell]], rows: Any) -> dict[str, Any]:
    return {
        name: {
            question: {
                **vars(cell.accuracy),
                "protocol": rows[name][question].protocol,
                "repetitions": len(rows[name][question].correct),
                "gain": None if cell.gain is None else asdict(cell.gain) | {"beyond_chance": cell.gain.beyond_chance},
                "best": cell.best,
            }
            for question, cell in row.items()
        }
        for name, row in cells.items()
    }


def tell_duplicates(
    out: Any, found: Duplicates, rows: dict[str, dict[str, Answers]], asking: Asking, baseline: str, seed: int
) -> dict[str, Any] | None:
    """Says what was found, and the numbers without it; these as JSON, None where nothing has to be left out."""
    for text in found.texts:
        out.print(f"duplicates  {text}", markup=False, highlight=False, soft_wrap=True)
    assert asking.asked is not None, "asked by now"
    kept = ~torch.from_numpy(found.seen)[asking.asked]
    if kept.all():
        return None
    if not kept.any():
        out.print("duplicates  no test picture is left without them, so that no number here tells of new pictures")
        return None
    left = {name: {question: answers.on(kept) for question, answers in row.items()} for name, row in rows.items()}
    cells = compared(left, baseline, seed)
    title = f"the same without them: {int(kept.sum()):,} test samples"
    out.print(table(cells, title))
    return {"test": int(kept.sum()), "rows": as_json(cells, left)}
