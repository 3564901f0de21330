"""The tables that end a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssd.distributed import rank
from ssd.evaluation.protocol import Number
from ssd.evaluation.suite import table


def write_json(file: str | Path | None, content: Any) -> None:
    """Writes numbers for programs, where a file was asked for."""
    if file is not None and rank() == 0:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


def number_rows(numbers: Sequence[Number]) -> list[dict[str, Any]]:
    return [vars(number) for number in numbers]


def evaluation_summary(numbers: Sequence[Number], json_file: str | None) -> None:
    if rank() == 0:
        Console().print(table(numbers, title="evaluation"))
    write_json(json_file, {"numbers": number_rows(numbers)})


def fit_summary(
    trainer: Any,
    module: Any,
    *,
    numbers: Sequence[Number],
    checkpoints: Any,
    throughput: Any,
    finished: bool,
    json_file: str | None,
) -> None:
    """What was learned, how fast, where it lies and how to load it; the same as JSON where a file is named."""
    last, best = checkpoints.last_model_path, checkpoints.best_model_path
    content = {
        "finished": finished,
        "steps": module.step,
        "skipped_steps": module.skipped_steps,
        "images_per_second": throughput.images_per_second,
        "numbers": number_rows(numbers),
        "last": last,
        "best": best,
        "folder": str(trainer.default_root_dir),
    }
    write_json(json_file, content)
    if rank() != 0:
        return
    console = Console()
    if numbers and finished:
        console.print(table(numbers, title=f"{type(module).__name__}, step {module.step}"))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("steps", f"{module.step} of {module.total_steps}, {module.skipped_steps} skipped")
    if throughput.images_per_second is not None:
        facts.add_row("speed", f"{throughput.images_per_second:,.0f} images/s")
    facts.add_row("last checkpoint", last)
    if best:
        facts.add_row("best checkpoint", f"{best}  ({checkpoints.best_monitor} {checkpoints.best_value:.4f})")
    if finished:
        facts.add_row("load it with", f"ssd export {best or last} --to timm --out {trainer.default_root_dir}/export")
    else:
        facts.add_row("go on with", f"ssd fit --ckpt_path {last}")
    console.print(facts, soft_wrap=True)
