"""`ssd plan --config ... --data ...`: what a run comes to and what it will take, before anything is spent."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ssd.cli import command_class, run_lightning
from ssd.errors import UserError
from ssd.planning.cost import SHARE_USED, Cost, Proposal, cost_of, memory_line, proposals
from ssd.planning.facts import Curve, Facts, facts_of, half_life
from ssd.planning.rules import Warned, warned
from ssd.planning.trials import Measured, Trials
from ssd.summary import check_json, check_writable, console, print_facts, write_json
from ssd.verbs.arguments import Parser, checkpoint_typed, go_on, stored_config

TOO_LONG_S = 120
"""A step that would take longer is not taken to verify a proposal."""
STEPS_OF_ALL_SIZES = 20
"""Are measured where each step has views of another size."""


def run(argv: list[str]) -> int:
    arguments, words = options().parse_known_args(argv)
    check_json(arguments.json)
    check_writable("--picture", arguments.picture)
    if arguments.picture is not None and Path(arguments.picture).suffix.lower() != ".png":
        raise UserError(f"--picture {arguments.picture} is no PNG. Give a name that ends in .png.")
    with tempfile.TemporaryDirectory(prefix="ssd-plan-") as folder:
        words = with_stored_config(words, Path(folder))
        return plan(words, arguments, Path(folder))


def plan(words: list[str], arguments: argparse.Namespace, folder: Path) -> int:
    out = console()
    run = resolve(words, folder)
    facts, found = run.facts, list(warned(run.facts))
    content: dict[str, Any] = {"run": facts.row(), "warnings": [warning.row() for warning in found]}
    heading = f"{facts.method} on {facts.samples:,} samples ({facts.data})"
    out.print(heading, markup=False, highlight=False, soft_wrap=True)
    print_facts(out, described(facts))
    if arguments.picture is not None:
        from ssd.planning.picture import draw_schedules

        draw_schedules(facts, arguments.picture)
        print_facts(out, {"picture": arguments.picture})
    if arguments.measure and run.accelerator is None:
        print_facts(out, {"cost": "not measured: the run wants a GPU and there is none here. Plan where it will run"})
    elif arguments.measure:
        content |= measure(run, words, arguments.memory, out)
    print_warnings(out, found)
    write_json(arguments.json, content)
    return 0


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd plan",
        usage="ssd plan [settings of ssd fit] [--memory GIB] [--picture FILE] [--no-measure] [--json FILE]",
        description="Says what a run comes to before anything is spent. It takes what ssd fit takes (--config, --data, "
        "--model.KEY, --trainer.KEY, ...) and prints steps and epochs, learning rates after their rule, warm-ups, how long "
        "the teacher's average remembers, tokens and parameters; then hours, memory and disk, from a few steps that are "
        "really taken on the run's data and device in a process of their own, without touching the run's folder; and which "
        "settings leave the range they are known to work in, why, and what to set.",
        epilog="For instance: ssd plan --config method/dino_small --data FOLDER --memory 24. ssd fit --help lists the "
        "settings of a run.",
    )
    parser.add_argument(
        "--memory",
        type=gib_of,
        metavar="GIB",
        help="also propose batches that fit so many GiB (or `device`: what this one has), by steps of two batches",
    )
    parser.add_argument("--picture", metavar="FILE", help="also draw the schedules over the run, as PNG")
    parser.add_argument(
        "--no-measure", dest="measure", action="store_false", help="take no steps: say nothing of the cost"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    return parser


def gib_of(text: str) -> float | str:
    if text == "device":
        return text
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not gib > 0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of GiB above 0 nor `device`")
    return gib


def with_stored_config(words: list[str], folder: Path) -> list[str]:
    """The words of a run, that of a checkpoint as its config in a file: a plan is of the whole run, and reads no weights."""
    words = go_on(words)
    checkpoint = checkpoint_typed(words)
    if checkpoint is None:
        return words
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(stored_config("fit", checkpoint)))
    kept: list[str] = []
    iterator = iter(words)
    for word in iterator:
        option, equals, _ = word.partition("=")
        if option != "--ckpt_path":
            kept.append(word)
        elif not equals:
            next(iterator)
    return ["--config", str(file), *kept]


# ---------------------------------------------------------------------- the run that is meant


@dataclass
class Run:
    """What the settings come to, and those that cost follows from.

    Args:
        accelerator: where it would run, "gpu" or "cpu"; None where that is a GPU and there is none.
        can_slice: whether a batch may pass in slices.
    """

    facts: Facts
    trainer: Any
    checkpoints: Any
    evaluation: Any
    accelerator: str | None
    can_slice: bool


def resolve(words: list[str], folder: Path) -> Run:
    """Builds method and data as `ssd fit` would, but for one process on the CPU, and looks at them."""
    found: list[Run] = []
    fitting: Any = command_class()

    class Planned(fitting):
        """Instead of a fit."""

        def __init__(self, verb: str, argv: list[str]):
            super().__init__("fit", [*argv, "--trainer.default_root_dir", str(folder)])

        def before_instantiate_classes(self) -> None:
            self.asked = self.settings.trainer.clone()
            super().before_instantiate_classes()
            here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
            for name, value in {**here, "logger": False, "callbacks": None, "plugins": None}.items():
                self.settings.trainer[name] = value

        def fit(self, **settings: Any) -> None:
            asked, module, data = self.asked, self.model, self.datamodule
            if module.steps is None and asked.max_epochs in (None, -1):
                raise UserError("the run has no length. Set trainer.max_epochs, or steps in the method.")
            data.trainer = self.trainer
            data.prepare(module.views, module.mask_plans())
            accelerator, processes = place_of(asked)
            facts = facts_of(
                module,
                data,
                processes=processes,
                max_epochs=asked.max_epochs,
                precision=str(asked.precision or "32-true"),
            )
            can_slice = module.ghost_norm or not facts.normalised_by_batch
            found.append(
                Run(
                    facts,
                    asked,
                    self.settings.checkpoints.clone(),
                    self.settings.evaluation.clone(),
                    accelerator,
                    can_slice,
                )
            )

        def after_fit(self) -> None:
            """Nothing was learned."""

    run_lightning("plan", words, lambda: Planned)
    return found[0]


def place_of(trainer: Any) -> tuple[str | None, int]:
    """The accelerator of a run, as of `Run`, and its processes on all machines."""
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and here > 0)
    devices = trainer.devices
    if isinstance(devices, str) and devices != "auto":
        devices = (
            int(devices) if devices.strip("-").isdigit() else [part for part in devices.split(",") if part.strip()]
        )
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", -1):
        devices = max(here, 1) if on_gpu else 1
    accelerator = "cpu" if not on_gpu else "gpu" if here else None
    return accelerator, int(devices) * int(trainer.num_nodes)


# ---------------------------------------------------------------------- what it takes


def measure(run: Run, words: list[str], memory: float | str | None, out: Console) -> dict[str, Any]:
    """Takes steps of the run, prints what the whole of it will take, and proposes batches where a memory is given."""
    assert run.accelerator is not None
    trials, facts = Trials(words, run.accelerator), run.facts
    with said(out, f"measuring steps of {facts.batch} on the {run.accelerator}"):
        varied = {"steps": STEPS_OF_ALL_SIZES} if facts.sizes_change else {}
        measured = trials.take(facts.batch, facts.micro_batches, **varied)
    content: dict[str, Any] = {"measured": None, "cost": None}
    if measured is None:
        print_facts(out, {"memory": f"does not suffice for a batch of {facts.batch} on the {run.accelerator}"})
    else:
        cost = cost_of(facts, measured, run.trainer, run.checkpoints, run.evaluation.times)
        out.print()
        print_facts(out, priced(facts, measured, cost, run.accelerator))
        content = {"measured": vars(measured), "cost": cost.row()}
    if memory is not None:
        gib = device_gib(run.accelerator) if memory == "device" else float(memory)
        found = proposed(run, trials, measured, gib, out)
        print_proposals(out, found, gib, facts)
        content["proposals"] = [proposal.row() for proposal in found]
    return content


def proposed(run: Run, trials: Trials, first: Measured | None, gib: float, out: Console) -> list[Proposal]:
    """Batches that fit, by a line through two batches (and two numbers of slices), each verified by a step."""
    facts = run.facts
    unit = (facts.koleo_group or 1) * facts.micro_batches
    taken = [] if first is None else [first]
    batch = facts.batch
    while len(taken) < 2 and batch > unit:
        batch = max(batch // 2 // unit * unit, unit)
        with said(out, f"measuring steps of {batch}"):
            trial = trials.take(batch, facts.micro_batches, warmup=1, steps=2, seconds=0.0)
        taken += [] if trial is None else [trial]
    if len(taken) == 1:
        with said(out, f"measuring steps of {2 * batch}"):
            trial = trials.take(2 * batch, facts.micro_batches, warmup=1, steps=2, seconds=0.0)
        taken += [] if trial is None else [trial]
    if len(taken) < 2 or taken[0].gib is None:
        raise UserError(
            f"memory could not be measured for two batches ({', '.join(str(trial.batch) for trial in taken) or 'none'} "
            "could). Use a smaller data.batch_size to plan from; memory is measured on Linux and on GPUs."
        )
    of_most = taken[0]
    slices = 2 * of_most.micro_batches
    if run.can_slice and of_most.batch % (slices * (facts.koleo_group or 1)) == 0:
        with said(out, f"measuring steps of {of_most.batch} in {slices} slices"):
            trial = trials.take(of_most.batch, slices, warmup=1, steps=2, seconds=0.0)
        taken += [] if trial is None else [trial]
    line = memory_line(taken)
    found = []
    for proposal in proposals(line, facts, gib, run.can_slice):
        known = [trial for trial in taken if same(trial, proposal)]
        step_s = of_most.step_s * proposal.batch / of_most.batch
        if not known and step_s < TOO_LONG_S:
            with said(out, f"verifying a batch of {proposal.batch}"):
                trial = trials.take(proposal.batch, proposal.micro_batches, warmup=1, steps=1, seconds=0.0)
            known = [] if trial is None else [trial]
        found.append(replace(proposal, measured_gib=known[0].needed_gib) if known else proposal)
    return found


def same(trial: Measured, proposal: Proposal) -> bool:
    return (trial.batch, trial.micro_batches) == (proposal.batch, proposal.micro_batches)


def device_gib(accelerator: str) -> float:
    """What the GPU has, or what the machine could give to one process more."""
    import torch

    if accelerator == "gpu":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


@contextmanager
def said(out: Console, what: str) -> Iterator[None]:
    """A spinner while something is measured, on a terminal."""
    if not out.is_terminal:
        yield
        return
    with out.status(what):
        yield


# ---------------------------------------------------------------------- in words


def described(facts: Facts) -> dict[str, str]:
    """What the settings come to, a line each."""
    step, curves = facts.step_batch, facts.curves
    slices = (
        "" if facts.micro_batches == 1 else f", in {facts.micro_batches} slices of {facts.batch // facts.micro_batches}"
    )
    shared = "" if facts.processes == 1 else f": {facts.batch} on each of {facts.processes} processes"
    lines = {
        "length": f"{facts.steps:,} steps = {rounded(facts.epochs)} epochs of {facts.steps_per_epoch:,} steps; "
        f"{facts.samples_seen:,} samples seen, each {rounded(facts.samples_seen / facts.samples)} times",
        "batch": f"{step:,} samples a step{shared}{slices}",
        "lr": f"{moved(curves['lr'], facts)}; rule {facts.lr_rule}",
    }
    lowest, highest = (pick(facts.lr_scales, key=lambda name: facts.lr_scales[name]) for pick in (min, max))
    if facts.lr_scales[lowest] < facts.lr_scales[highest]:
        peak = curves["lr"].highest
        lines["lr of groups"] = (
            f"from {peak * facts.lr_scales[lowest]:.3g} ({lowest}) to {peak * facts.lr_scales[highest]:.3g} ({highest}) at "
            "the peak"
        )
    lines["last layer"] = "learns from the first step"
    if facts.frozen_steps:
        lines["last layer"] = f"stays as drawn for {length(facts.frozen_steps, facts)}"
    for name, curve in curves.items():
        if name != "lr":
            lines[name.replace("_", " ")] = moved(curve, facts)
    if "momentum" in curves:
        momentum = curves["momentum"]
        middle = momentum.values[len(momentum.values) // 2]
        lines["teacher"] = (
            f"half of it is newer than {length(half_life(momentum.lowest), facts)} at its quickest, than "
            f"{length(half_life(middle), facts)} half-way"
        )
    for kind, view in facts.views.items():
        grid = " x ".join(map(str, view.grid))
        lines[f"{kind} views"] = (
            f"{view.count} of {view.size} px, {grid} patches; crops of {spread(view.scale)} of a picture"
        )
    for kind, masks in facts.masked.items():
        each = "" if masks.per_view == 1 else f"{masks.per_view} of each view; "
        lines[f"{kind} masks"] = (
            f"{each}{masks.fewest} to {masks.most} of {masks.tokens} patches, {masks.whole:.0%} of the crops whole; "
            f"{facts.masked_tokens():,.0f} patches a step"
        )
    if facts.views:
        lines["tokens a step" if facts.patches_px else "places a step"] = (
            f"student {facts.tokens('student'):,}, teacher {facts.tokens('teacher'):,}"
        )
    if facts.prototypes:
        lines["prototypes"] = ", ".join(f"{count:,} ({name})" for name, count in facts.prototypes.items())
    parts = facts.parameters
    lines["parameters"] = (
        f"student {millions(parts['student'])} (backbone {millions(parts['backbone'])}, heads {millions(parts['head'])}), "
        f"{millions(facts.trainable)} trained; teacher {millions(parts['teacher'])}"
    )
    return lines


def moved(curve: Curve, facts: Facts) -> str:
    """A setting over the run, in words."""
    if curve.lowest == curve.highest:
        return f"{curve.start:.3g}"
    if 0 < curve.rise < facts.steps and curve.start < curve.highest:
        rise = f"{curve.start:.3g} to {curve.highest:.3g} over {length(curve.rise, facts)}"
        return rise if curve.end == curve.highest else f"{rise}, then to {curve.end:.3g}"
    return f"{curve.start:.3g} to {curve.end:.3g}"


def length(steps: float, facts: Facts) -> str:
    if steps == float("inf"):
        return "any number of steps"
    return f"{steps:,.{0 if steps >= 10 else 1}f} steps ({rounded(steps / facts.steps_per_epoch)} epochs)"


def rounded(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def spread(scale: tuple[float, float]) -> str:
    return f"{100 * scale[0]:g} to {100 * scale[1]:g} %"


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else f"{count:,}"


def priced(facts: Facts, measured: Measured, cost: Cost, accelerator: str) -> dict[str, str]:
    """Time, memory and disk, a line each."""
    parts = [f"{facts.steps:,} steps of {1000 * measured.step_s:,.0f} ms"]
    if cost.evaluations:
        parts.append(f"{cost.evaluations:,} evaluations of {cost.evaluation_s:.2g} s")
    parts.append(f"up to {cost.checkpoints:,} checkpoints of {cost.checkpoint_s:.2g} s")
    parts.append(f"{cost.start_s:.0f} s to start")
    lines = {"time": f"{duration(cost.seconds)}: {', '.join(parts)} ({measured.steps} steps measured)"}
    if cost.gib is None:
        lines["memory"] = "not measured, which needs Linux or a GPU"
    elif accelerator == "gpu":
        lines["memory"] = f"{cost.gib:.2f} GiB of the {device_gib(accelerator):.1f} GiB of the GPU"
    else:
        assert measured.imports_gib is not None
        lines["memory"] = (
            f"{cost.gib:.2f} GiB, {measured.imports_gib:.2f} of them for Python and libraries; "
            f"{device_gib(accelerator):.1f} GiB are free. Loader processes are not counted"
        )
    lines["disk"] = f"{1024 * cost.disk_gib:,.0f} MiB for checkpoints, the last and the best ones"
    if facts.processes > 1:
        lines["processes"] = f"measured on one of {facts.processes}; what they tell each other takes more time"
    return lines


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def print_warnings(out: Console, found: list[Warned]) -> None:
    """What leaves the known range, why, and what to set."""
    if not found:
        print_facts(out, {"\nsettings": "all within the ranges that are known to work"})
        return
    for warning in found:
        out.print(f"\n{warning.setting}: {warning.what}", markup=False, highlight=False, soft_wrap=True)
        rest = {"  why": warning.why, "  set": warning.mend, "  from": warning.source}
        print_facts(out, rest)


def print_proposals(out: Console, found: list[Proposal], gib: float, facts: Facts) -> None:
    table = Table("what", title=f"fits {gib:.3g} GiB, {1 - SHARE_USED:.0%} of it left free")
    for column in ("data.batch_size", "micro_batches", "GiB predicted", "GiB measured"):
        table.add_column(column, justify="right")
    for proposal in found:
        seen = "" if proposal.measured_gib is None else f"{proposal.measured_gib:.2f}"
        row = (f"{proposal.batch:,}", f"{proposal.micro_batches}", f"{proposal.predicted_gib:.2f}", seen)
        table.add_row(proposal.what, *row)
    if found:
        out.print(table)
    else:
        print_facts(
            out,
            {"batches": f"none fits {gib:.3g} GiB. Use a smaller network, smaller views or activation_checkpointing"},
        )
    if not any(proposal.what == "the batch that was asked for" for proposal in found):
        sliced = "however it is sliced" if not facts.normalised_by_batch else "and batch normalisation allows no slices"
        print_facts(out, {"batch": f"{facts.batch} does not fit, {sliced}"})
