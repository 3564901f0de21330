"""Folders as runs leave them, written by hand."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

CONFIG = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 3, "default_root_dir": "somewhere"},
    "model": {
        "class_path": "lightning_modules.dino.DINO",
        "init_args": {
            "backbone": {"class_path": "ssd.backbones.convnet.ConvNet", "init_args": {"name": "resnet18"}},
            "num_prototypes": 32,
        },
    },
    "data": {"class_path": "datamodules.digits.Digits", "init_args": {"seed": 0}},
}
NUMBERS = [
    {"name": "knn/top1", "value": 0.9, "protocol": "knn-v1 k=20", "chance": 0.104, "spread": None},
    {"name": "spectrum/rankme", "value": 31.25, "protocol": "rankme-v1", "chance": None, "spread": None},
]
BASELINES = {
    row: {"linear_1pct": {"name": "few", "value": value, "protocol": "logistic-v1", "spread": 0.02}}
    for row, value in (("pixels", 0.6), ("untrained", 0.4), ("pretrained", 0.85))
}


def rows_of(values: list[float], every: int = 10) -> list[dict[str, Any]]:
    return [
        {"epoch": 0, "step": every * (n + 1) - 1, "train/loss/total": v, "val/knn/top1": ""}
        for n, v in enumerate(values)
    ]


def facts(**more: Any) -> dict[str, Any]:
    return {
        "method": "DINO",
        "total_steps": 30,
        "backbone": {"class": "ConvNet", "name": "resnet18", "parameters": 1_232_656},
        "data": {
            "name": "Digits",
            "samples": {"training": 1297, "held-out": 500},
            "num_classes": 2,
            "classes": ["<b>one</b>", "two"],
            "channels": 1,
            "mean": [0.3],
            "std": [0.37],
            "fingerprint": "abc123",
        },
        "environment": {"ssd": "0.1.0", "commit": "0123456789ab", "torch": torch.__version__, "device": "1 x CPU"},
        "sessions": [
            {"started": "2026-01-02T03:04:05+00:00", "from_step": 0, "step": 30, "seconds": 125.0, "ended": True}
        ],
        **more,
    }


def write_run(
    folder: Path,
    values: list[float] = [3.0, 2.0, 1.5],  # noqa: B006 (read alone)
    *,
    config: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    pictures: dict[str, list[int]] | None = None,
) -> Path:
    """A run of 30 steps; each argument is what one of its files holds, and an empty one leaves the file out."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is None or config:
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config))
    if run is None or run:
        (folder / "run.json").write_text(json.dumps(facts() if run is None else run))
    if summary is None or summary:
        content = {"numbers": NUMBERS, "baselines": BASELINES} if summary is None else summary
        (folder / "summary.json").write_text(json.dumps(content))
    if values:
        write_metrics(folder / "csv" / "version_0", rows_of(values))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for kind, steps in (pictures or {}).items():
            for step in steps:
                writer.add_image(f"pictures/{kind}", torch.full((3, 8, 8), step / 100), step)
    return folder


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def png(colour: str = "red", side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()
