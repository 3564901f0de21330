"""What a run was made of: data, machine, how to load the result, all settings."""

import json
from collections.abc import Iterable, Sequence
from html import escape

from ssd.report import words
from ssd.report.reading import Run, flattened

MOST_CLASSES = 40  # named in a data card


def cards(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        named = f"<h2>{escape(run.name)}</h2>" if len(runs) > 1 else ""
        columns = [
            facts("Data", data_facts(run)),
            facts("Run", run_facts(run)),
            facts("Machine and versions", machine_facts(run)),
        ]
        body = "".join(f"<div>{column}</div>" for column in columns if column)
        parts.append(f'{named or "<h2>What it was made of</h2>"}<div class="columns">{body}</div>{loading(run)}')
    return "".join(parts)


def facts(heading: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows.items()
    )
    return f"<h3>{heading}</h3><table>{body}</table>"


def data_facts(run: Run) -> dict[str, str]:
    known = run.facts.get("data")
    card = {**run.about, **(known if isinstance(known, dict) else {})}
    rows = {"name": words.data_of(run)}
    if card.get("path"):
        rows["path"] = str(card["path"])
    counts = card.get("samples")
    if isinstance(counts, dict):
        rows["samples"] = ", ".join(f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int))
    if isinstance(card.get("num_classes"), int):
        named = card.get("classes")
        some = [str(name) for name in named[:MOST_CLASSES]] if isinstance(named, list) else []
        more = ", ..." if isinstance(named, list) and len(named) > len(some) else ""
        count = f"{card['num_classes']} (for evaluation alone)" if card["num_classes"] else "no labels"
        rows["classes"] = f"{count}: {', '.join(some)}{more}" if some else count
    if card.get("channels") is not None:
        rows["channels"] = str(card["channels"])
    for name in ("mean", "std"):
        if isinstance(card.get(name), list | tuple):
            rows[name] = ", ".join(f"{value:.4f}" for value in card[name] if isinstance(value, int | float))
    for name in ("value_range", "sampling", "batch_size", "seed", "fingerprint"):
        if card.get(name) is not None:
            rows[name.replace("_", " ")] = str(card[name])
    return rows


def run_facts(run: Run) -> dict[str, str]:
    rows = {"method": words.method_of(run)}
    network = words.backbone_of(run)
    if network:
        rows["backbone"] = network
    rows["steps"] = f"{run.step:,}" if run.total is None else f"{run.step:,} of {run.total:,}"
    if run.seconds:
        rows["time"] = words.duration(run.seconds)
    sessions = run.facts.get("sessions")
    starts = (
        [str(one.get("started")) for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []
    )
    if starts:
        rows["started"] = ", and again ".join(
            start.replace("T", " ").removesuffix("+00:00") + " UTC" for start in starts
        )
    skipped = run.series.get("train/health/skipped_steps")
    if skipped:
        rows["skipped steps"] = f"{skipped[max(skipped)]:.0f}"
    speed = run.series.get("train/speed/images_per_s")
    if speed:
        rows["speed"] = f"{speed[max(speed)]:,.0f} images/s"
    return rows


def machine_facts(run: Run) -> dict[str, str]:
    known = run.facts.get("environment")
    if isinstance(known, dict):
        return {name.replace("_", " "): str(value) for name, value in known.items() if value is not None}
    return {"ssd": str(run.about["version"])} if run.about.get("version") else {}


def loading(run: Run) -> str:
    """Where its checkpoints and exports are, and the commands that use them."""
    lines = []
    best = run.checkpoints.get("best") or run.checkpoints.get("last")
    if run.export is not None:
        where = json.dumps(f"local-dir:{run.export}")
        lines += [
            "# in Python, with timm alone",
            "import timm",
            f"model = timm.create_model({where}, pretrained=True)",
            "",
        ]
    if best is not None:
        lines += [
            "# take the backbone elsewhere",
            f"ssd export {best} --to {export_format(run)} --out {run.folder / 'export'}",
        ]
        lines += ["# judge it again", f"ssd probe {best} --baselines"]
    last = run.checkpoints.get("last")
    if last is not None and not run.finished:
        lines += ["# go on", f"ssd fit --ckpt_path {last}"]
    if not lines:
        return ""
    return f"<h3>How to load it</h3><pre>{escape(chr(10).join(lines))}</pre>"


def export_format(run: Run) -> str:
    """What the run says of its backbone; timm's for runs that say nothing."""
    backbone = run.facts.get("backbone")
    return str(backbone.get("export", "timm")) if isinstance(backbone, dict) else "timm"


def configs(runs: Iterable[Run]) -> str:
    parts = [
        f"<details><summary>All settings of {escape(run.name)} ({len(flattened(run.config)):,})</summary>"
        f"<pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    ]
    return "".join(parts)
