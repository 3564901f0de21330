"""What a run has left in its folder, as far as it can be read.

Nothing that is missing or broken stops the reading: it is said in `problems`, which the page shows.
"""

import csv
import json
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssd.errors import UserError
from ssd.facts import read_facts
from ssd.weights.checkpoint import read_checkpoint

QUIET_S = 15 * 60  # without a sign of life a run is taken for stopped
MOST_PICTURES = 8  # of one kind, spread over the run
LEAST_FILES = ("config.yaml", "run.json", "summary.json", "csv", "checkpoints", "tensorboard")

Series = dict[int, float]  # step -> value


@dataclass
class Result:
    """One number of an evaluation; `chance` and `spread` where they are known."""

    name: str
    value: float
    protocol: str = ""
    chance: float | None = None
    spread: float | None = None


@dataclass
class Picture:
    step: int | None
    data: bytes  # PNG


@dataclass
class Run:
    """One run, as its folder tells it.

    Args:
        numbers: of the last evaluation.
        probes: file that `ssd probe --json` wrote -> its numbers.
        baselines: row ("pixels" or "log-mel", "untrained", "pretrained") -> measure -> result, of the same probe.
        pictures: kind -> pictures in the order of steps.
        total: steps of the whole run, None where nothing tells.
        seconds: of training, over all sessions; None where nothing tells.
        ended: whether the run said itself that its last session was over.
        last_sign_s: how long ago a file of the run was written.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    numbers: list[Result] = field(default_factory=list)
    probes: dict[str, list[Result]] = field(default_factory=dict)
    baselines: dict[str, dict[str, Result]] = field(default_factory=dict)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: dict[str, Path] = field(default_factory=dict)
    export: Path | None = None
    step: int = 0
    total: int | None = None
    seconds: float | None = None
    last_sign_s: float = math.inf
    ended: bool = False
    error: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.total is not None and self.step >= self.total

    @property
    def state(self) -> str:
        """ "finished", "going", or "stopped"."""
        if self.finished:
            return "finished"
        return "going" if self.last_sign_s < QUIET_S and not self.ended else "stopped"


def read_run(path: str | Path) -> Run:
    """The run in a folder, or of a checkpoint in its folder. Raises UserError where there is none."""
    folder = Path(path)
    if folder.is_file() and folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if not folder.is_dir():
        raise UserError(f"{path} is no folder of a run. Give the folder that ssd fit wrote, such as runs/NAME.")
    if not any((folder / name).exists() for name in LEAST_FILES):
        raise UserError(
            f"{path} holds nothing that a run leaves ({', '.join(LEAST_FILES)}). Give the folder that ssd fit wrote."
        )
    run = Run(folder, folder.resolve().name, facts=read_facts(folder))
    if (folder / "run.json").exists() and not run.facts:
        run.problems.append("run.json cannot be read: data and machine are told as far as other files know them.")
    read_config(run)
    read_metrics(run)
    read_events(run)
    read_summaries(run)
    read_checkpoints(run)
    settle(run)
    return run


def read_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    try:
        run.config_text = path.read_text()
        found = yaml.safe_load(run.config_text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        run.problems.append(f"config.yaml cannot be read ({reason(error)}): no settings are shown.")
        return
    if isinstance(found, dict):
        run.config = found
    else:
        run.problems.append("config.yaml holds no settings.")


def read_metrics(run: Run) -> None:
    """The CSV logs of all sessions; where a run went on from an earlier step, its later session counts."""
    files = sorted(run.folder.glob("csv/version_*/metrics.csv"), key=lambda file: number_in(file.parent.name))
    broken = 0
    for file in files:
        try:
            with open(file, newline="", errors="replace") as lines:
                rows = list(csv.DictReader(line.replace("\0", "") for line in lines))
        except (OSError, csv.Error) as error:
            run.problems.append(f"{file.relative_to(run.folder)} cannot be read ({reason(error)}).")
            continue
        session: dict[str, Series] = {}
        for row in rows:
            try:
                step = int(row["step"])
                values = {name: float(text) for name, text in row.items() if name not in ("step", "epoch") and text}
            except (KeyError, TypeError, ValueError):
                broken += 1
                continue
            for name, value in values.items():
                session.setdefault(name, {})[step] = value
        first = min((step for series in session.values() for step in series), default=0)
        for name in {*run.series, *session}:
            kept = {step: value for step, value in run.series.get(name, {}).items() if step < first}
            run.series[name] = kept | session.get(name, {})
    if broken:
        run.problems.append(f"{broken} lines of metrics.csv are broken and left out.")
    if not run.series:
        run.problems.append("there are no logged numbers (csv/version_*/metrics.csv): no curves are shown.")


def read_events(run: Run) -> None:
    """Pictures of TensorBoard's log, and PNG files that lie in the folder."""
    if any(run.folder.glob("tensorboard/**/events.out.tfevents.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        try:
            events = EventAccumulator(
                str(run.folder / "tensorboard"),
                size_guidance={"images": 0, "scalars": 1, "tensors": 1, "histograms": 1, "audio": 1},
            )
            events.Reload()
            for tag in events.Tags()["images"]:
                found = {event.step: Picture(event.step, event.encoded_image_string) for event in events.Images(tag)}
                run.pictures[tag.removeprefix("pictures/")] = spread_out([found[step] for step in sorted(found)])
        except Exception as error:  # whatever a broken log makes the library raise is one sentence here
            run.problems.append(f"TensorBoard's log cannot be read ({reason(error)}): its pictures are not shown.")
    for file in sorted(run.folder.glob("*.png")):
        data = file.read_bytes()
        # the page draws its own curves
        if file.name != "curve.png" and data.startswith(b"\x89PNG"):
            run.pictures[file.stem] = [Picture(None, data)]


def spread_out(pictures: list[Picture]) -> list[Picture]:
    """At most `MOST_PICTURES`, the first and the last among them."""
    if len(pictures) <= MOST_PICTURES:
        return pictures
    last = len(pictures) - 1
    return [pictures[round(place * last / (MOST_PICTURES - 1))] for place in range(MOST_PICTURES)]


def read_summaries(run: Run) -> None:
    """summary.json, and what `ssd probe --json` wrote into the folder."""
    for file in sorted(run.folder.glob("*.json")):
        if file.name == "run.json":
            continue
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            run.problems.append(f"{file.name} cannot be read ({reason(error)}).")
            continue
        if not isinstance(content, dict):
            continue
        found = results(content.get("numbers"))
        if file.name == "summary.json":
            run.numbers = found
        elif found:
            run.probes[file.name] = found
        run.baselines = run.baselines or baseline_rows(content)
        if isinstance(content.get("findings"), list):
            run.findings += [finding for finding in content["findings"] if isinstance(finding, dict)]
        if file.name == "summary.json":
            run.about |= {key: content[key] for key in ("seconds", "steps", "finished", "export") if key in content}


def results(found: Any) -> list[Result]:
    """Numbers as verbs write them; what is none is left out."""
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
    return [result for row in rows if (result := one_result(str(row.get("name")), row)) is not None]


def one_result(name: str, row: Mapping[str, Any]) -> Result | None:
    value = as_number(row.get("value"))
    if value is None:
        return None
    return Result(
        name, value, str(row.get("protocol") or ""), as_number(row.get("chance")), as_number(row.get("spread"))
    )


def baseline_rows(content: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """Rows of the same probe, as `ssd probe --baselines` writes them or as the quickstart does."""
    found = content.get("baselines")
    rows = (
        found
        if isinstance(found, Mapping)
        else {name: content.get(name) for name in ("pixels", "log-mel", "untrained", "pretrained")}
    )
    protocols, spreads = content.get("protocols") or {}, content.get("spread") or {}
    table: dict[str, dict[str, Result]] = {}
    for name, row in rows.items():
        for measure, given in row.items() if isinstance(row, Mapping) else ():
            if not isinstance(given, Mapping):
                spread = (spreads.get(name) or {}).get(measure) if isinstance(spreads, Mapping) else None
                given = {"value": given, "protocol": protocols.get(measure), "spread": spread}
            result = one_result(measure, given)
            if result is not None:
                table.setdefault(name, {})[measure] = result
    return table


def read_checkpoints(run: Run) -> None:
    folder = run.folder / "checkpoints"
    run.checkpoints = {file.stem: file for file in sorted(folder.glob("*.ckpt"))}
    if not run.checkpoints:
        run.problems.append("there is no checkpoint yet." if run.series else "there is no checkpoint.")
        return
    path = run.checkpoints.get("last") or next(iter(run.checkpoints.values()))
    try:
        contents = read_checkpoint(path, mmap=True)
        counts = contents["state_dict"]["_extra_state"]
        run.step, run.total = int(counts["step"]), int(counts["total_steps"]) or None
        run.about = {**contents["ssd"], **run.about}
    except (UserError, KeyError, TypeError, ValueError) as error:
        run.problems.append(f"checkpoints/{path.name} cannot be read ({reason(error)})")


def settle(run: Run) -> None:
    """What several files tell together: how far the run is, how long it took, where its export lies."""
    sessions = run.facts.get("sessions")
    sessions = [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []
    steps = [as_number(session.get("step")) for session in sessions]
    logged = [max(series) + 1 for name, series in run.series.items() if series and name.startswith("train/")]
    run.step = int(max([run.step, *(step for step in steps if step is not None), *logged]))
    run.total = run.total or whole(run.facts.get("total_steps"))
    if run.about.get("finished") is True:
        run.total = run.total or run.step
    taken = [as_number(session.get("seconds")) for session in sessions]
    known = [seconds for seconds in taken if seconds is not None]
    run.seconds = sum(known) if known else as_number(run.about.get("seconds"))
    if sessions:
        run.ended = sessions[-1].get("ended") is True
        error = sessions[-1].get("error")
        run.error = error if isinstance(error, str) else None
    run.numbers = run.numbers or results(run.facts.get("numbers"))
    if not run.numbers:
        last = {name: series[max(series)] for name, series in run.series.items() if name.startswith("val/") and series}
        run.numbers = [Result(name.removeprefix("val/"), value) for name, value in last.items()]
    export = run.folder / "export"
    run.export = export if export.is_dir() else None
    files = [*run.checkpoints.values(), *run.folder.glob("csv/*/metrics.csv"), run.folder / "run.json"]
    files += run.folder.glob("tensorboard/events.*")
    written = [file.stat().st_mtime for file in files if file.exists()]
    run.last_sign_s = max(0.0, time.time() - max(written)) if written else math.inf


# ---------------------------------------------------------------------- settings of several runs


def flattened(config: Any, name: str = "") -> dict[str, Any]:
    """Dotted names of settings, without `init_args`, and what they are."""
    if not isinstance(config, Mapping) or not config:
        return {name: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        key = "" if key == "init_args" else str(key)
        found |= flattened(value, ".".join(part for part in (name, key) if part))
    return found


PLACES = ("trainer.default_root_dir", "ckpt_path", "json")
SEEDS = ("seed_everything", "data.seed")


def setting_differences(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, without where runs lie; None where a run has none."""
    flat = [flattened(run.config) if run.config else {} for run in runs]
    names = [name for name in dict.fromkeys(name for config in flat for name in config) if name not in PLACES]
    rows = {name: [config.get(name) for config in flat] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def seeds_of_one(runs: list[Run]) -> bool:
    """Whether runs differ in their seed and in nothing else."""
    return all(run.config for run in runs) and set(setting_differences(runs)) <= set(SEEDS)


def reason(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__


def as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole(value: Any) -> int | None:
    number = as_number(value)
    return int(number) if number else None


def number_in(name: str) -> int:
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else 0
