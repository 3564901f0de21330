"""What a verb prints and writes when it is done."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ssd.callbacks.throughput import counted
from ssd.distributed import gather_objects, rank
from ssd.errors import UserError
from ssd.evaluation.protocol import Number
from ssd.evaluation.suite import table

PLAIN_WIDTH = 120
WAITING_TOO_LONG = 0.25  # of a run's time


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough for a protocol in one line where there is none."""
    out = Console()
    return out if out.is_terminal else Console(width=PLAIN_WIDTH)


def print_numbers(out: Console, numbers: Sequence[Number], heading: str) -> None:
    """A table below its heading, which is not broken at the table's width."""
    out.print(heading, markup=False, highlight=False, soft_wrap=True)
    out.print(table(numbers))


def print_facts(out: Console, facts: dict[str, str]) -> None:
    """One line a fact, never broken, so that paths and commands can be copied."""
    width = max(map(len, facts))
    for name, text in facts.items():
        out.print(f"{name:<{width}}  {text}", markup=False, highlight=False, soft_wrap=True)


def check_json(file: str | Path | None) -> None:
    check_writable("--json", file)


def check_writable(option: str, file: str | Path | None) -> None:
    """Raises UserError where an option's file could not be written in the end, before anything is spent."""
    if file is None:
        return
    path = Path(file)
    try:
        there = path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {file} cannot be written ({error.strerror}). Give the name of a file.") from None


def write_json(file: str | Path | None, content: Any) -> None:
    """Writes numbers for programs, where a file was asked for."""
    if file is not None and rank() == 0:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


def number_rows(numbers: Sequence[Number]) -> list[dict[str, Any]]:
    return [vars(number) for number in numbers]


def evaluation_summary(numbers: Sequence[Number], heading: str, json_file: str | None) -> None:
    if rank() == 0:
        print_numbers(console(), numbers, heading)
    write_json(json_file, {"numbers": number_rows(numbers)})


def fit_summary(
    trainer: Any, module: Any, *, evaluation: Any, checkpoints: Any, throughput: Any, doctor: Any, json_file: str | None
) -> None:
    """What was learned, how fast, what is wrong, where it lies and how to load it; the same as JSON, as `summary.json` in
    the run's folder and where a file is named."""
    finished = module.step >= module.total_steps
    last, best = checkpoints.last_model_path or str(trainer.ckpt_path or ""), checkpoints.best_model_path
    if best and not os.path.exists(best):
        # the run's folder was moved since
        best = os.path.join(os.path.dirname(last), os.path.basename(best))
    content = {
        "finished": finished,
        "steps": module.step,
        "skipped_steps": module.skipped_steps,
        "images_per_second": throughput.images_per_second,
        "waiting_share": throughput.waiting_share,
        "numbers": number_rows(evaluation.numbers),
        "evaluated_step": evaluation.step,
        "last": last,
        "best": best,
        "also": {Path(path).stem: path for path in checkpoints.kept()},
        "folder": str(trainer.default_root_dir),
        "findings": [finding.row() for finding in doctor.findings],
    }
    write_json(Path(trainer.default_root_dir, "summary.json"), content)
    write_json(json_file, content)
    if rank() != 0:
        return
    out = console()
    if evaluation.numbers:
        print_numbers(out, evaluation.numbers, f"{type(module).__name__}, step {evaluation.step}")
    facts = {"steps": f"{module.step} of {module.total_steps}, {module.skipped_steps} skipped"}
    if throughput.images_per_second is not None:
        waiting = throughput.waiting_share
        samples = counted(getattr(trainer, "datamodule", None))
        facts["speed"] = f"{throughput.images_per_second:,.0f} {samples}/s, {waiting:.0%} of the time waiting for data"
        if waiting > WAITING_TOO_LONG:
            facts["speed"] += ": try more data.num_workers"
    if doctor.enabled:
        first, *more = [f"{finding.text()} (step {finding.step})" for finding in doctor.findings] or ["nothing found"]
        facts["doctor"] = first
        facts |= {f"doctor, {number}": text for number, text in enumerate(more, start=2)}
    if last:
        facts["last checkpoint"] = shown(last)
    if best:
        facts["best checkpoint"] = f"{shown(best)}  ({checkpoints.best_monitor} {checkpoints.best_value:.4f})"
    for path, (monitor, value) in checkpoints.kept().items():
        facts[f"{Path(path).stem.replace('_', ' ')} checkpoint"] = f"{shown(path)}  ({monitor} {value:.4f})"
    if finished:
        export = shown(os.path.join(trainer.default_root_dir, "export"))
        facts["read about it with"] = f"ssd report {shown(str(trainer.default_root_dir))}"
        to = module.evaluated_backbone.exported_as
        facts["load it with"] = f"ssd export {shown(best or last)} --to {to} --out {export}"
    elif last:
        facts["go on with"] = f"ssd fit --ckpt_path {shown(last)}"
    print_facts(out, facts)


def shown(path: str) -> str:
    """As it can be typed here: relative where it lies below the current folder, quoted where it must be."""
    relative = os.path.relpath(path)
    return shlex.quote(path if relative.startswith("..") else relative)


def write_predictions(predictions: Sequence[dict[str, Any]], folder: str | Path, json_file: str | None) -> None:
    """All ranks' embeddings as one NumPy file, in the order of their places in the data, each once."""
    mine = {name: np.concatenate([part[name].cpu().numpy() for part in predictions]) for name in predictions[0]}
    parts = gather_objects(mine)
    if rank() != 0:
        return
    whole: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in mine}
    _, first = np.unique(whole["index"], return_index=True)
    whole = {name: values[first] for name, values in whole.items()}
    path = Path(folder, "predictions.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **whole)
    samples, width = whole["features"].shape
    write_json(json_file, {"file": str(path), "samples": samples, "width": width})
    facts = {
        "embeddings": f"{samples} x {width}, with labels (-1 for none) and places in the data",
        "load them with": f"numpy.load({shown(str(path))!r})",
    }
    print_facts(console(), facts)
