"""DINO, iBOT, DINOv2, DINOv3 and DINOv3's Gram stage on small data: one backbone, the same views and number of steps, so the
same student tokens; kNN, linear and dense score of the teacher beside raw pixels and the untrained network.

    python -m tests.benchmarks.family digits --out runs/family
    python -m tests.benchmarks.family cifar10 --path TRAIN.parquet --val_path TEST.parquet --methods dino ibot --seeds 0

Rows that are there already are not run again, so that any of them can be added or repeated by itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

METHODS = ("dino", "ibot", "dinov2", "dinov3", "dinov3_gram")
SHOWN = {
    "knn_centred/k20/top1": "kNN",
    "logistic_10pct/top1": "linear, 10 %",
    "ridge/top1": "linear",
    "dense/correspondence": "dense",
}

SIZES = {
    "digits": {
        "backbone": {"img_size": 16, "arguments": {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}},
        "views": {
            "global_size": 16,
            "global_scale": [0.4, 1.0],
            "local_count": 0,  # two patches a side tell nothing
            "flip": 0.0,
            "rotate": 15.0,
            "shear": 0.2,
            "jitter": [0.6, 0.6, 0.0, 0.0],
            "grey_prob": 0.0,
            "blur_prob": [0.0, 0.0, 0.0],
            "solarize_prob": [0.0, 0.0, 0.0],
            "evaluation_crop": 1.0,
        },
        "num_prototypes": 1024,
        "gram_size": 32,
        "steps": 1000,
        "data": ["--data", "Digits"],
    },
    "cifar10": {
        "backbone": {"img_size": 32, "arguments": {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}},
        "views": {
            "global_size": 32,
            "global_scale": [0.25, 1.0],
            "local_count": 2,
            "local_size": 16,
            "local_scale": [0.1, 0.4],
            "blur_prob": [0.0, 0.0, 0.0],
            "solarize_prob": [0.0, 0.0, 0.0],
            "evaluation_crop": 1.0,
        },
        "num_prototypes": 1024,
        "gram_size": 64,
        "steps": 2000,
        "data": ["--data", "Images"],
    },
}
SHARED = {
    "teacher_temperature": 0.04,
    "head_hidden_dim": 512,
    "head_bottleneck_dim": 64,
    "lr_rule": "none",
    "freeze_last_layer": 0.0,
    "weight_decay": 0.04,
    "clip": {"class_path": "ssd.optim.Clip", "init_args": {"max_norm": 3.0, "over": "tensor"}},
}
OWN: dict[str, dict[str, Any]] = {
    "dino": {"target_rule": "sinkhorn"},
    "ibot": {"target_rule": "sinkhorn", "patch_teacher_temperature": 0.04},
    "dinov2": {"target_rule": "sinkhorn", "koleo_group": 32, "layer_decay": 1.0, "patch_embed_lr_scale": 1.0},
    "dinov3": {"koleo_group": 32, "layer_decay": 1.0, "patch_embed_lr_scale": 1.0, "patch_head_bottleneck_dim": 64},
}
CLASSES = {"dino": "DINO", "ibot": "IBOT", "dinov2": "DINOv2", "dinov3": "DINOv3"}


def config(method: str, size: dict[str, Any], steps: int, lr: float, start: Path | None) -> dict[str, Any]:
    """Of one run: the Gram stage is a fifth as long as what it starts from."""
    base = method.removesuffix("_gram")
    name = "vit_small_patch16_dinov3_qkvb" if base == "dinov3" else "vit_tiny_patch16_224"
    # mean of patches instead of a class token, which says nothing of the picture at first
    arguments = size["backbone"]["arguments"] | {"class_token": False}
    arguments |= {"num_reg_tokens": 0, "init_values": None} if base == "dinov3" else {"weight_init": "jax"}
    views = dict(size["views"])
    settings: dict[str, Any] = {
        "backbone": {
            "class_path": "ViT",
            "init_args": {"name": name, "img_size": size["backbone"]["img_size"], "arguments": arguments},
        },
        "num_prototypes": size["num_prototypes"],
        "momentum": {"class_path": "Cosine", "init_args": {"start": 0.95, "end": 1.0}},
        "lr": {"class_path": "Cosine", "init_args": {"start": lr, "end": 0.01 * lr, "warmup": 0.1}},
        "steps": steps,
        **SHARED,
        **OWN[base],
    }
    if base == "dinov3":
        settings["num_patch_prototypes"] = size["num_prototypes"]
    if start is not None:
        views["gram_size"] = size["gram_size"]
        settings |= {"start_from": str(start), "gram_anchor": "start", "gram_weight": 2.0, "dino_local_weight": 0.5}
        settings |= {"steps": steps // 5, "momentum": 0.999, "lr": 0.1 * lr}
    settings["views"] = {"class_path": "DINOViews", "init_args": views}
    return {"model": {"class_path": CLASSES[base], "init_args": settings}}


def ssd(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ssd", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ssd {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def row(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and probes one run, or reads what an earlier call has found."""
    folder = Path(arguments.out, arguments.data, f"{method}-{seed}")
    result = folder / "probe.json"
    if not result.exists():
        size = SIZES[arguments.data]
        start = None
        if method.endswith("_gram"):
            row(method.removesuffix("_gram"), seed, arguments)
            start = folder.with_name(f"{method.removesuffix('_gram')}-{seed}") / "checkpoints" / "last.ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        steps = arguments.steps or size["steps"]
        (folder / "method.yaml").write_text(json.dumps(config(method, size, steps, arguments.lr, start)))
        given = {"path": arguments.path, "val_path": arguments.val_path}
        data = [*size["data"], *(word for key, value in given.items() if value for word in (f"--data.{key}", value))]
        accelerator = ["--trainer.accelerator", arguments.accelerator, "--trainer.precision", "bf16-mixed"]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--trainer.devices", "1"]
        started = time.time()
        ssd(
            "fit",
            "--config",
            str(folder / "method.yaml"),
            *data,
            "--data.batch_size",
            str(arguments.batch),
            *accelerator,
            *quiet,
            "--seed_everything",
            str(seed),
            "--trainer.default_root_dir",
            str(folder),
        )
        seconds = time.time() - started
        ssd(
            "probe",
            str(folder / "checkpoints" / "last.ckpt"),
            "--measures",
            "knn",
            "ridge",
            "few_labels",
            "spectrum",
            "dense",
            "--baselines",
            "--draws",
            "5",
            "--seed",
            str(seed),
            "--json",
            str(result),
        )
        found = json.loads(result.read_text())
        result.write_text(json.dumps(found | {"seconds": seconds, "steps": steps, "lr": arguments.lr}))
    return json.loads(result.read_text())


def values(found: dict[str, Any]) -> dict[str, float]:
    return {number["name"]: number["value"] for number in found["numbers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(SIZES))
    parser.add_argument("--path", help="training data of cifar10")
    parser.add_argument("--val_path", help="held-out data of cifar10")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the size's own number")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", default="runs/family")
    arguments = parser.parse_args()
    for name in ("path", "val_path", "out"):
        if getattr(arguments, name):
            setattr(arguments, name, os.path.abspath(getattr(arguments, name)))

    table = Table(
        "features",
        *SHOWN.values(),
        "rank",
        "steps",
        "s",
        title=f"{arguments.data}, %, mean and spread over seeds {arguments.seeds}",
    )
    console = Console(width=110)
    for method in arguments.methods:
        found = [row(method, seed, arguments) for seed in arguments.seeds]
        columns = []
        for name in SHOWN:
            of_seeds = [100 * values(one)[name] for one in found if name in values(one)]
            spread = f" ± {statistics.stdev(of_seeds):.1f}" if len(of_seeds) > 1 else ""
            columns.append(f"{statistics.mean(of_seeds):.1f}{spread}" if of_seeds else "")
        rank = statistics.mean(values(one)["spectrum/rankme"] for one in found)
        seconds = statistics.mean(one["seconds"] for one in found)
        table.add_row(method, *columns, f"{rank:.0f}", str(found[0]["steps"]), f"{seconds:.0f}")
        base = found[0].get("baselines", {})
        console.print(
            method, columns, {name: {k: round(100 * n["value"], 1) for k, n in r.items()} for name, r in base.items()}
        )
    console.print(table)


if __name__ == "__main__":
    main()
