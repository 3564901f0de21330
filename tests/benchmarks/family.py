"""DINO, iBOT, DINOv2, DINOv3 and DINOv3's Gram stage on small data: one backbone, the same views and number of steps, so the
same student tokens; kNN, linear probes and dense score of the teacher beside raw pixels and the untrained network.

    python -m tests.benchmarks.family digits --out runs/family
    python -m tests.benchmarks.family cifar10 --path TRAIN.parquet --val_path TEST.parquet --methods dino ibot --seeds 0

Rows that are there already are not run again, so that any of them can be added or repeated by itself.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssd.cli import main as ssd_main
from ssd.weights.checkpoint import read_checkpoint

METHODS = ("dino", "ibot", "dinov2", "dinov3", "dinov3_gram")
SHOWN = {
    "knn": "kNN",
    "linear_1pct": "linear, 1 %",
    "linear_10pct": "linear, 10 %",
    "linear": "linear, all",
    "dense": "dense",
}

SIZES = {
    "digits": {
        "backbone": {"img_size": 16, "arguments": {"embed_dim": 96, "num_heads": 3}},
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
        "gram_size": 32,
        "steps": 1000,
        "data": ["--data", "Digits"],
    },
    "cifar10": {
        "backbone": {"img_size": 32, "arguments": {"embed_dim": 128, "num_heads": 4}},
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
        "gram_size": 64,
        "steps": 10000,
        "data": ["--data", "Images"],
    },
}
SHARED = {
    "num_prototypes": 256,
    "teacher_temperature": 0.02,
    "head_hidden_dim": 512,
    "head_bottleneck_dim": 64,
    "head_batch_norm": True,
    "lr_rule": "none",
    "freeze_last_layer": 0.0,
    "weight_decay": 0.02,
    "clip": {"class_path": "ssd.optim.Clip", "init_args": {"max_norm": 3.0, "over": "tensor"}},
}
# few and small: a patch is a sixteenth of a digit, and the pooled mean counts masked patches too
MASKS = {"ratio": [0.1, 0.3], "share": 0.25, "smallest": 1}
OWN: dict[str, dict[str, Any]] = {
    "dino": {"target_rule": "sinkhorn"},
    # prototypes of their own, softer targets and a smaller weight for patches
    "ibot": {
        "masks": {"class_path": "BlockMasks", "init_args": MASKS},
        "target_rule": "sinkhorn",
        "patch_teacher_temperature": 0.04,
        "shared_head": False,
        "ibot_weight": 0.3,
    },
    "dinov2": {
        "masks": {"class_path": "BlockMasks", "init_args": MASKS | {"even": True}},
        "target_rule": "sinkhorn",
        "shared_head": False,
        "patch_head_bottleneck_dim": 64,
        "koleo_group": 32,
        "layer_decay": 1.0,
        "patch_embed_lr_scale": 1.0,
    },
    "dinov3": {
        "masks": {"class_path": "BlockMasks", "init_args": MASKS | {"even": True, "filled": True}},
        "num_patch_prototypes": SHARED["num_prototypes"],
        "patch_head_bottleneck_dim": 64,
        "koleo_group": 32,
        "layer_decay": 1.0,
        "patch_embed_lr_scale": 1.0,
    },
}
CLASSES = {"dino": "DINO", "ibot": "IBOT", "dinov2": "DINOv2", "dinov3": "DINOv3"}
# rotary positions and no class token, which says nothing of the picture at first: the mean of patches
NETWORK = {"patch_size": 4, "depth": 4, "class_token": False, "num_reg_tokens": 0, "init_values": None}


def config(method: str, size: dict[str, Any], steps: int, lr: float, start: Path | None) -> dict[str, Any]:
    """Of one run: the Gram stage is a fifth as long as what it starts from."""
    base = method.removesuffix("_gram")
    views = dict(size["views"])
    network = {
        "name": "vit_small_patch16_dinov3_qkvb",
        "img_size": size["backbone"]["img_size"],
        "stem": "conv",
        "arguments": NETWORK | size["backbone"]["arguments"],
    }
    settings: dict[str, Any] = {
        "backbone": {"class_path": "ViT", "init_args": network},
        "momentum": {"class_path": "Cosine", "init_args": {"start": 0.95, "end": 1.0}},
        "lr": {"class_path": "Cosine", "init_args": {"start": lr, "end": 0.01 * lr, "warmup": 0.1}},
        "steps": steps,
        **SHARED,
        **OWN[base],
    }
    if start is not None:
        views["gram_size"] = size["gram_size"]
        settings |= {"start_from": str(start), "gram_anchor": "start", "gram_weight": 2.0, "dino_local_weight": 0.5}
        settings |= {"steps": steps // 5, "momentum": 0.999, "lr": 0.1 * lr}
    settings["views"] = {"class_path": "DINOViews", "init_args": views}
    return {"model": {"class_path": CLASSES[base], "init_args": settings}}


def ssd(*words: str) -> None:
    """A command of ours, here: a process for each would spend more time on imports than some do on training."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = ssd_main(list(words))
    if status:
        raise SystemExit(f"ssd {' '.join(words)}\n{said.getvalue()[-4000:]}")


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
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--trainer.devices", "1"]
        started = time.process_time()
        ssd(
            *("fit", "--config", str(folder / "method.yaml"), *data, "--data.batch_size", str(arguments.batch)),
            *("--data.num_workers", str(arguments.workers)),
            *("--trainer.accelerator", arguments.accelerator, "--trainer.precision", "bf16-mixed", *quiet),
            *("--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)),
        )
        seconds = time.process_time() - started
        last = folder / "checkpoints" / "last.ckpt"
        if read_checkpoint(last)["state_dict"]["_extra_state"]["step"] < steps // (5 if start else 1):
            raise SystemExit(f"{folder} was stopped before its end. Remove it to run it again.")
        ssd(
            *("probe", str(last), "--measures", "spectrum", "dense", "--baselines"),
            *("--draws", "20", "--seed", str(seed), "--json", str(result)),
        )
        found = json.loads(result.read_text())
        result.write_text(json.dumps(found | {"seconds": seconds, "steps": steps, "lr": arguments.lr}))
    return json.loads(result.read_text())


def mean_and_spread(found: list[float]) -> str:
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(SIZES))
    parser.add_argument("--path", help="training data of cifar10")
    parser.add_argument("--val_path", help="held-out data of cifar10")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the size's own number")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that load")
    parser.add_argument("--out", default="runs/family")
    arguments = parser.parse_args()
    for name in ("path", "val_path", "out"):
        if getattr(arguments, name):
            setattr(arguments, name, os.path.abspath(getattr(arguments, name)))

    found = {method: [row(method, seed, arguments) for seed in arguments.seeds] for method in arguments.methods}
    title = f"{arguments.data}, %, mean and spread over seeds {arguments.seeds}"
    table = Table("features", *SHOWN.values(), "rank", "steps", "processor s", title=title)
    first = next(iter(found.values()))
    rows = {"pixels": ("pixels", first), "untrained": ("untrained", first)}
    rows |= {method: ("pretrained", runs) for method, runs in found.items()}
    for name, (kind, runs) in rows.items():
        columns = [mean_and_spread([100 * run["baselines"][kind][shown]["value"] for run in runs]) for shown in SHOWN]
        if kind == "pretrained":
            ranks = [
                number["value"] for run in runs for number in run["numbers"] if number["name"] == "spectrum/rankme"
            ]
            columns += [f"{statistics.mean(ranks):.0f}", str(runs[0]["steps"])]
            columns += [f"{statistics.mean(run['seconds'] for run in runs):.0f}"]
        table.add_row(name, *columns)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
