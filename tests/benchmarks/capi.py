"""CAPI, MAE and iBOT on small data at equal student tokens: encoders of one size, each for as many steps as the same number of
tokens that its student encodes allows; kNN, linear and attentive probes and the dense score beside the untrained network.

    python -m tests.benchmarks.capi digits --out runs/capi
    python -m tests.benchmarks.capi cifar10 --path TRAIN.parquet --val_path TEST.parquet --methods capi --seeds 0

Rows that are there already are not run again, so that any of them can be added or repeated by itself.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssd.weights.checkpoint import read_checkpoint
from tests.benchmarks.family import MASKS, mean_and_spread, ssd

SHOWN = {
    "knn_centred/k20/top1": ("kNN", "knn"),
    "linear/top1": ("linear", "linear"),
    "attentive/top1": ("attentive", None),
    "dense/correspondence": ("dense", "dense"),
}
"""Name of a number -> its column, and what it is called among the baselines."""
CLASSES = {"capi": "CAPI", "mae": "MAE", "ibot": "IBOT"}

SIZES: dict[str, dict[str, Any]] = {
    "digits": {
        "network": {"patch_size": 2, "embed_dim": 96, "depth": 4, "num_heads": 3},
        "side": 16,
        "tokens": 860_000,
        "data": ["--data", "Digits"],
        "views": {"flip": 0.0, "rotate": 15.0, "shear": 0.2},
        "scale": {"capi": [0.6, 1.0], "mae": [0.4, 1.0]},
        "dino": {"global_scale": [0.4, 1.0], "jitter": [0.6, 0.6, 0.0, 0.0], "grey_prob": 0.0},
    },
    "cifar10": {
        "network": {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
        "side": 32,
        "tokens": 20_000_000,
        "data": ["--data", "Images"],
        "views": {},
        "scale": {"capi": [0.6, 1.0], "mae": [0.2, 1.0]},
        "dino": {"global_scale": [0.25, 1.0]},
    },
}
REGISTERS = 4


def tokens_of_a_sample(method: str, size: dict[str, Any]) -> int:
    """That the student encodes, of all views."""
    patches = (size["side"] // size["network"]["patch_size"]) ** 2
    return {"capi": patches - int(patches * 0.65) + REGISTERS, "mae": patches // 4, "ibot": 2 * patches}[method]


def config(method: str, size: dict[str, Any], steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    network, side = size["network"], size["side"]
    lr = arguments.lr[method]
    if method == "capi":
        network = {"class_path": "RotaryViT", "init_args": network | {"num_registers": REGISTERS, "predictor_depth": 2}}
    else:
        own = network | {"class_token": False, "num_reg_tokens": 0, "init_values": None}
        named = {"name": "vit_small_patch16_dinov3_qkvb", "img_size": side, "arguments": own}
        network = {"class_path": "ViT", "init_args": named}
    settings: dict[str, Any] = {"backbone": network, "steps": steps, "lr_rule": "none"}
    if method != "ibot":
        views = {"size": side, "scale": size["scale"][method], "evaluation_crop": 1.0}
        settings["views"] = {"class_path": "ssd.views.recipes.CropViews", "init_args": views | size["views"]}
    if method == "capi":
        curve = {"end": 0.0, "warmup": 0.1, "truncate": 0.8}
        settings |= {
            "predicted": 0.25,
            "num_prototypes": arguments.clusters,
            "positionwise": arguments.positionwise,
            "momentum": cosine(start=arguments.momentum, end=1.0, warmup=0.1, warmup_start=1.0, truncate=0.8),
            "clustering_lr": cosine(start=arguments.clustering_lr, **curve),
            "lr": cosine(start=lr, **curve),
        }
    elif method == "mae":
        settings |= {"decoder_dim": network["init_args"]["arguments"]["embed_dim"], "decoder_depth": 2}
        settings |= {"decoder_heads": network["init_args"]["arguments"]["num_heads"]}
        settings |= {"lr": cosine(start=lr, end=0.01 * lr, warmup=0.1)}
    else:
        none = {"local_count": 0, "blur_prob": [0.0] * 3, "solarize_prob": [0.0] * 3, "evaluation_crop": 1.0}
        views = {"global_size": side} | none | size["views"] | size["dino"]
        settings |= {
            "views": {"class_path": "DINOViews", "init_args": views},
            "masks": {"class_path": "BlockMasks", "init_args": MASKS},
            "num_prototypes": 256,
            "target_rule": "sinkhorn",
            "teacher_temperature": 0.02,
            "patch_teacher_temperature": 0.04,
            "shared_head": False,
            "ibot_weight": 0.3,
            "head_hidden_dim": 512,
            "head_bottleneck_dim": 64,
            "head_batch_norm": True,
            "momentum": cosine(start=0.95, end=1.0),
            "lr": cosine(start=lr, end=0.01 * lr, warmup=0.1),
            "weight_decay": 0.02,
            "freeze_last_layer": 0.0,
        }
    return {"model": {"class_path": CLASSES[method], "init_args": settings}}


def cosine(**values: float) -> dict[str, Any]:
    return {"class_path": "Cosine", "init_args": values}


def row(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and probes one run, or reads what an earlier call has found."""
    folder = Path(arguments.out, arguments.data, f"{method}-{seed}")
    result, size = folder / "probe.json", SIZES[arguments.data]
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        steps = (arguments.tokens or size["tokens"]) // (arguments.batch * tokens_of_a_sample(method, size))
        (folder / "method.yaml").write_text(json.dumps(config(method, size, steps, arguments)))
        given = {"path": arguments.path, "val_path": arguments.val_path}
        data = [*size["data"], *(word for key, value in given.items() if value for word in (f"--data.{key}", value))]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--trainer.devices", "1"]
        started = time.process_time()
        ssd(
            *("fit", "--config", str(folder / "method.yaml"), *data, "--data.batch_size", str(arguments.batch)),
            *("--data.num_workers", str(arguments.workers), "--trainer.accelerator", arguments.accelerator, *quiet),
            *("--trainer.precision", arguments.precision, "--trainer.log_every_n_steps", "10"),
            *("--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)),
        )
        seconds = time.process_time() - started
        last = folder / "checkpoints" / "last.ckpt"
        if read_checkpoint(last)["state_dict"]["_extra_state"]["step"] < steps:
            raise SystemExit(f"{folder} was stopped before its end. Remove it to run it again.")
        measures = ["knn", "linear", "attentive", "dense"]
        ssd(
            *("probe", str(last), "--measures", *measures, "--baselines", "--cache", "none"),
            *("--seed", str(seed), "--json", str(result)),
        )
        found = json.loads(result.read_text()) | {"seconds": seconds, "steps": steps}
        if method == "capi":
            other = folder / "predicted.json"
            ssd(
                *("probe", str(last), "--measures", "knn", "linear", "--output", "predicted", "--cache", "none"),
                *("--seed", str(seed), "--json", str(other)),
            )
            found["predicted"] = json.loads(other.read_text())["numbers"]
        result.write_text(json.dumps(found))
    return json.loads(result.read_text())


def shown(runs: list[list[dict[str, Any]]]) -> list[str]:
    values = [{number["name"]: number["value"] for number in numbers} for numbers in runs]
    return [mean_and_spread([100 * run[name] for run in values]) if name in values[0] else "" for name in SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(SIZES))
    parser.add_argument("--path", help="training data of cifar10")
    parser.add_argument("--val_path", help="held-out data of cifar10")
    parser.add_argument("--methods", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, help="that a student encodes, instead of the size's own number")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=512)
    parser.add_argument("--momentum", type=float, default=0.98, help="of CAPI's teacher")
    parser.add_argument("--clustering_lr", type=float, default=1e-2)
    parser.add_argument("--positionwise", action="store_true")
    for method in CLASSES:
        parser.add_argument(f"--{method}_lr", type=float, default=2e-3)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--workers", type=int, default=0, help="processes that load")
    parser.add_argument("--out", default="runs/capi")
    arguments = parser.parse_args()
    arguments.lr = {method: getattr(arguments, f"{method}_lr") for method in CLASSES}
    for name in ("path", "val_path", "out"):
        if getattr(arguments, name):
            setattr(arguments, name, os.path.abspath(getattr(arguments, name)))

    found = {method: [row(method, seed, arguments) for seed in arguments.seeds] for method in arguments.methods}
    title = f"{arguments.data}, %, mean and spread over seeds {arguments.seeds}"
    table = Table("features", *(column for column, _ in SHOWN.values()), "steps", "processor s", title=title)
    first = next(iter(found.values()))
    for kind in ("pixels", "untrained"):
        numbers = [
            [
                {"name": name, "value": run["baselines"][kind][called]["value"]}
                for name, (_, called) in SHOWN.items()
                if called
            ]
            for run in first
        ]
        table.add_row(kind, *shown(numbers))
    for method, runs in found.items():
        seconds = f"{statistics.mean(run['seconds'] for run in runs):.0f}"
        table.add_row(method, *shown([run["numbers"] for run in runs]), str(runs[0]["steps"]), seconds)
        if "predicted" in runs[0]:
            table.add_row(f"{method}, pooled by its predictor", *shown([run["predicted"] for run in runs]))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
