"""Masked distillation on small data: MAE, dBOT after each of its stages, DMAE and plain regression of its features, one network,
the same views and number of steps; kNN, linear probes and dense score beside raw pixels and the untrained network.

    python -m tests.benchmarks.masked_distillation digits --out runs/masked_distillation
    python -m tests.benchmarks.masked_distillation cifar10 --path TRAIN.parquet --val_path TEST.parquet --seeds 0

Runs that are there already are not made again, so that any row can be added or repeated by itself. With `--further PATH` a MAE of
the photographs there goes on on the digits, with and without self-distillation, and what comes of it is fine-tuned.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from ssd.backbones.vit import ViT
from ssd.cli import main as ssd_main
from ssd.evaluation.dense import dense_number, pixel_patches
from ssd.evaluation.features import Features, extract, pixels
from ssd.evaluation.outputs import output_of
from ssd.evaluation.spectrum import rankme
from ssd.evaluation.suite import few_label_report, knn_number
from ssd.memory import keep_freed_memory
from ssd.verbs.loading import load_data
from ssd.weights.checkpoint import read_checkpoint

SHOWN = {
    "knn": "kNN",
    "linear_1pct": "linear, 1 %",
    "linear_10pct": "linear, 10 %",
    "linear": "linear, all",
}

PARTS = 5

SIZES: dict[str, dict[str, Any]] = {
    "digits": {
        "network": {"img_size": 16, "arguments": {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 2}},
        "decoder": {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 2},
        "views": {
            "size": 16,
            "scale": [0.4, 1.0],
            "flip": 0.0,
            "rotate": 15.0,
            "shear": 0.2,
            "evaluation_crop": 1.0,
        },
        "steps": 500,
        "precision": "32-true",
        "data": ["--data", "Digits"],
    },
    "cifar10": {
        "network": {"img_size": 32, "arguments": {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}},
        "decoder": {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3},
        "views": {"size": 32, "evaluation_crop": 1.0},
        "steps": 1000,
        "precision": "bf16-mixed",
        "data": ["--data", "Images"],
    },
}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        length: in runs of MAE.
        teachers: setting -> the run whose network teaches, frozen.
        begins: run whose student, with its decoder, is gone on with.
        photographs: learn from those of `--further`, at the size's own grey pixels.
        pictures: of a step, as a share of the others'; the rest is for several masks of each.
        network: settings of the backbone beside the size's.
        decoder: whether it is MAE's.
        two_views: of each picture, by the same crops and a little brightness and contrast.
        parts: of the run, after each of which the student is kept.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    length: float = 1
    teachers: dict[str, str] = field(default_factory=dict)
    begins: str | None = None
    photographs: bool = False
    pictures: float = 1
    network: dict[str, Any] = field(default_factory=dict)
    decoder: bool = True
    two_views: bool = False
    parts: int = 1


def hidden(ratio: float | None = None, keep: int | None = None) -> dict[str, Any]:
    settings = {"ratio": ratio} if keep is None else {"keep": keep}
    return {"class_path": "RandomMasks", "init_args": settings}


def disjoint() -> dict[str, Any]:
    return {"class_path": "DisjointMasks", "init_args": {"ratio": 0.6, "cell": 1}}


RUNS = {
    "mae": Run("MAE"),
    "dbot": Run("DBOT", {"stages": [1, 1, 1], "decoder_drop_path_rate": 0.0}, length=3),
    "dbot_short": Run("DBOT", {"stages": [1, 1, 1], "decoder_drop_path_rate": 0.0}),
    "long_mae": Run("MAE", length=2),
    "dmae_16": Run("DMAE", {"masks": hidden(keep=16)}, teachers={"teacher": "long_mae"}),
    "dmae_10": Run("DMAE", {"masks": hidden(keep=10)}, teachers={"teacher": "long_mae"}),
    "dmae_4": Run("DMAE", {"masks": hidden(keep=4)}, teachers={"teacher": "long_mae"}),
    "features": Run("DMAE", {"masks": hidden(ratio=0.0), "pixel_weight": 0.0}, teachers={"teacher": "long_mae"}),
}
GOES_ON: dict[str, Any] = {
    "views": {"class_path": "PlainViews", "init_args": {"size": 16}},
    "lr": {"class_path": "Linear", "init_args": {"start": 5e-4, "end": 0.0, "reaches_end": False}},
}
RUNS |= {
    "photographs": Run(
        "MAE", {"views": {"class_path": "CropViews", "init_args": {"size": 16}}}, length=2, photographs=True
    ),
    "further": Run("FurtherPretraining", GOES_ON | {"stages": [1]}, length=0.6, begins="photographs"),
    "self_distilled": Run("FurtherPretraining", GOES_ON | {"stages": [1, 1]}, length=1.2, begins="photographs"),
}
RUNS["data2vec2"] = Run(
    "Data2Vec2",
    {
        "num_masks": 4,
        "top_blocks": 3,
        "momentum": {"class_path": "Linear", "init_args": {"start": 0.97, "end": 0.999, "until": 0.3}},
        "decoder_dim": 64,
        "decoder_depth": 3,
    },
    pictures=0.25,
    network={"post_norm": True},
    decoder=False,
)
LEAP: dict[str, Any] = {"patience": 0.08, "optimizer": "AdamW", "weight_decay": 0.05, "mixup": False}
RUNS |= {
    match: Run("LEAP", LEAP | settings, teachers={"teacher": "long_mae"}, decoder=False, parts=PARTS)
    for match, settings in {"leap": {}, "leap_last": {"match": "last"}}.items()
}
DINO: dict[str, Any] = {
    "num_prototypes": 256,
    "teacher_temperature": 0.02,
    "head_hidden_dim": 512,
    "head_bottleneck_dim": 64,
    "head_batch_norm": True,
    "freeze_last_layer": 0.0,
    "target_rule": "sinkhorn",
    "momentum": {"class_path": "Cosine", "init_args": {"start": 0.95, "end": 1.0}},
}
TWO = {"relation_teacher": "long_mae", "feature_teacher": "dino"}
RUNS |= {
    "dmjd": Run("DMJD", {"target": "pixels", "masks": disjoint(), "predictor_dim": 64}, pictures=0.5),
    "dino": Run("DINO", DINO, length=2, decoder=False, two_views=True),
    "hybrid": Run("HybridDistillation", {"drop_ratio": 0.2}, teachers=TWO, decoder=False),
    **{
        f"hybrid_{kind}": Run(
            "HybridDistillation",
            {"drop_ratio": 0.2, f"{other}_weight": 0.0},
            teachers={f"{kind}_teacher": TWO[f"{kind}_teacher"]},
            decoder=False,
        )
        for kind, other in (("relation", "feature"), ("feature", "relation"))
    },
}
ROWS = {
    "mae": ("mae", "last.ckpt#student"),
    "dbot_0": ("dbot", "stage-0.safetensors"),
    "dbot_1": ("dbot", "stage-1.safetensors"),
    "dbot_2": ("dbot", "last.ckpt#student"),
    "dbot_short": ("dbot_short", "last.ckpt#student"),
    "long_mae": ("long_mae", "last.ckpt#student"),
    "dmae_16": ("dmae_16", "last.ckpt#student"),
    "dmae_10": ("dmae_10", "last.ckpt#student"),
    "dmae_4": ("dmae_4", "last.ckpt#student"),
    "features": ("features", "last.ckpt#student"),
    "data2vec2": ("data2vec2", "last.ckpt#teacher"),
    "leap": ("leap", "last.ckpt#student"),
    "leap_last": ("leap_last", "last.ckpt#student"),
    "dmjd": ("dmjd", "last.ckpt#student"),
    "dino": ("dino", "last.ckpt#teacher"),
    "hybrid_relation": ("hybrid_relation", "last.ckpt#student"),
    "hybrid_feature": ("hybrid_feature", "last.ckpt#student"),
    "hybrid": ("hybrid", "last.ckpt#student"),
}
"""Row -> the run and the network that it shows: the student of a stage is the teacher of the next."""
COURSES = {
    f"{run}_{part}": (run, f"part-{part}.safetensors") for run in ("leap", "leap_last") for part in range(1, PARTS)
}
"""Rows on the way, for what is reached in how many steps."""
FINE_TUNED = {
    "random weights": "random:photographs",
    "MAE of photographs": "photographs",
    "further pretraining": "further",
    "with self-distillation": "self_distilled",
}


class Kept(pl.Callback):
    """Keeps backbones among the checkpoints: of each stage's student but the last's, `stage-0.safetensors` and so on, and of
    the student after each of so many equal `parts` of the run but the last, `part-1.safetensors` and so on."""

    def __init__(self, parts: int = 1):
        self.parts = parts

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        folder, step = Path(trainer.default_root_dir, "checkpoints"), module.step
        folder.mkdir(exist_ok=True)
        begins = module.stage_begins()
        if step in begins[1:]:
            # the student has become the teacher by now
            state = module.teacher.network.model.state_dict()
            save_file(state, folder / f"stage-{begins.index(step) - 1}.safetensors")
        ends = [round(number * module.total_steps / self.parts) for number in range(1, self.parts)]
        if step in ends:
            state = module.student.backbone.model.state_dict()
            save_file(state, folder / f"part-{ends.index(step) + 1}.safetensors")


def network(size: dict[str, Any], name: str, weights: str | None = None) -> dict[str, Any]:
    """Settings of the backbone of a run."""
    settings = {"name": "vit_tiny_patch16_224", "fixed_positions": True, **size["network"], **RUNS[name].network}
    return settings if weights is None else settings | {"weights": weights}


def checkpoint(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out, arguments.data, f"{name}-{seed}", "checkpoints")


def config(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    run, size = RUNS[name], SIZES[arguments.data]
    settings = {
        "backbone": {"class_path": "ViT", "init_args": network(size, name)},
        "views": {"class_path": "CropViews", "init_args": size["views"]},
        "lr": {"class_path": "Cosine", "init_args": {"start": arguments.lr, "end": 0.01 * arguments.lr, "warmup": 0.1}},
        "lr_rule": "none",
        "steps": round(run.length * (arguments.steps or size["steps"])),
        **(size["decoder"] if run.decoder else {}),
        **run.settings,
    }
    for setting, teacher in run.teachers.items():
        weights = str(checkpoint(teacher, seed, arguments) / "last.ckpt")
        settings[setting] = {"class_path": "ViT", "init_args": network(size, teacher, weights)}
    if run.begins is not None:
        settings["pretrained"] = str(checkpoint(run.begins, seed, arguments) / "last.ckpt")
    if run.two_views:
        crop = size["views"]
        settings["views"] = {"class_path": "DINOViews", "init_args": two_views(crop)}
    kept = {"class_path": "tests.benchmarks.masked_distillation.Kept", "init_args": {"parts": run.parts}}
    model = {"class_path": run.method, "init_args": settings | arguments.set}
    return {"model": model, "trainer": {"callbacks": [kept]}}


def two_views(crop: dict[str, Any]) -> dict[str, Any]:
    """DINO's recipe with the crops of the others."""
    colours = {"jitter": [0.6, 0.6, 0.0, 0.0], "grey_prob": 0.0, "blur_prob": [0.0] * 3, "solarize_prob": [0.0] * 3}
    renamed = {"size": "global_size", "scale": "global_scale"}
    return {renamed.get(name, name): value for name, value in crop.items()} | {"local_count": 0, **colours}


def ssd(*words: str) -> None:
    """A command of ours, here: a process for each would spend more time on imports than some do on training."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = ssd_main(list(words))
    if status:
        raise SystemExit(f"ssd {' '.join(words)}\n{said.getvalue()[-4000:]}")


def trained(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Makes a run and those it stands on, where they are not there; what it cost."""
    run, folder = RUNS[name], checkpoint(name, seed, arguments).parent
    cost = folder / "cost.json"
    for before in (*run.teachers.values(), *([] if run.begins is None else [run.begins])):
        trained(before, seed, arguments)
    if not cost.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = config(name, seed, arguments)
        (folder / "method.yaml").write_text(json.dumps(made))
        given = {"path": arguments.path, "val_path": arguments.val_path}
        data = [word for key, value in given.items() if value for word in (f"--data.{key}", value)]
        data = [*SIZES[arguments.data]["data"], *data]
        if run.photographs:
            data = ["--data", "Images", "--data.path", arguments.further, "--data.channels", "1"]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--trainer.devices", "1"]
        batch = round(run.pictures * arguments.batch)
        started, began = time.process_time(), time.perf_counter()
        ssd(
            *("fit", "--config", str(folder / "method.yaml"), *data),
            *("--data.batch_size", str(batch), "--data.num_workers", str(arguments.workers)),
            *("--trainer.accelerator", arguments.accelerator, "--trainer.precision", arguments.precision, *quiet),
            *("--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)),
        )
        spent = {"processor_s": time.process_time() - started, "wall_s": time.perf_counter() - began}
        steps = made["model"]["init_args"]["steps"]
        if read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]["_extra_state"]["step"] < steps:
            raise SystemExit(f"{folder} was stopped before its end. Remove it to run it again.")
        cost.write_text(json.dumps(spent | {"steps": steps, "pictures": steps * batch}))
    return json.loads(cost.read_text())


# ---------------------------------------------------------------------- numbers


class Judge:
    """The data of a run, and what networks and raw pixels are worth on it.

    With `on` "train" a third of the training samples is asked of the others, so that settings can be chosen without a look
    at the held-out ones.
    """

    def __init__(self, about: dict[str, Any], arguments: argparse.Namespace):
        self.data = load_data([], about, "probe")
        self.on, self.precision, self.most = arguments.on, arguments.precision, arguments.most
        self.patch = SIZES[arguments.data]["network"]["arguments"]["patch_size"]

    def numbers(self, embed: Any, seed: int) -> dict[str, dict[str, float]]:
        """Output -> the numbers of `SHOWN` in %, "rank" and "dense"; of raw pixels where there is no network."""
        output = "pixels" if embed is None else "mean_patch"
        features = self.features(embed)
        bank, queries = features[output]
        report = few_label_report(
            {output: (bank.features, queries.features)}, bank.labels, queries.labels, draws=20, seed=seed
        )[output]
        found = {output: {name: 100 * report[name].value for name in SHOWN} | {"rank": rankme(bank.features)}}
        loader = self.data.test_dataloader()[0 if self.on == "train" else -1]
        dense = dense_number(embed or (lambda x: pixel_patches(x, self.patch)), loader)
        assert dense is not None, "all these networks answer a map"
        found[output]["dense"] = 100 * dense.value
        if embed is not None:
            bank, queries = features["cls"]
            labelled = (bank.features, bank.labels, queries.features, queries.labels)
            found["cls"] = {"knn": 100 * knn_number(*labelled).value}
        return found

    def features(self, network: Any) -> dict[str, tuple[Features, Features]]:
        """Output -> that of the samples which are compared with, and of those which are asked."""
        loaders = self.data.test_dataloader()[: 1 if self.on == "train" else 2]
        parts = [self.first(loader) for loader in loaders]
        if network is None:
            found = {"pixels": [pixels(part) for part in parts]}
        else:
            outputs = ("mean_patch", "cls")
            embed = lambda samples: torch.cat([output_of(network, samples, name) for name in outputs], 1)
            both = [extract(embed, part, precision=self.precision) for part in parts]
            halves = [each.features.chunk(2, 1) for each in both]
            found = {
                name: [each._replace(features=half[place]) for each, half in zip(both, halves)]
                for place, name in enumerate(outputs)
            }
        if self.on == "train":
            asked = torch.arange(len(next(iter(found.values()))[0].labels)) % 3 == 2
            return {
                name: (Features(*(p[~asked] for p in part)), Features(*(p[asked] for p in part)))
                for name, (part,) in found.items()
            }
        return {name: (part[0], part[1]) for name, part in found.items()}

    def first(self, loader: Any) -> Iterator[Any]:
        """Batches of a loader until there are as many samples as may be compared with."""
        seen = 0
        for batch in loader:
            if seen >= self.most:
                return
            seen += len(batch["index"])
            yield batch


def judged(row: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a row, those of an earlier call where they are there; with "cost" of rows that are trained."""
    run, file = (ROWS | COURSES).get(row, ("mae", ""))
    cost = trained(run, seed, arguments)
    folder = checkpoint(run, seed, arguments)
    place = folder.parent / f"{row}-{arguments.on}.json"
    if not place.exists():
        about = read_checkpoint(folder / "last.ckpt")["ssd"]
        judge = Judge(about, arguments)
        embed = None
        if row != "pixels":
            torch.manual_seed(seed)
            weights = f"{folder / file}" if file else None
            embed = ViT(**network(SIZES[arguments.data], run, weights), in_chans=about["channels"]).eval()
        found = {"numbers": judge.numbers(embed, seed)} | ({"cost": cost} if row in ROWS else {})
        place.write_text(json.dumps(found))
    return json.loads(place.read_text())


def fine_tuned(start: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `ssd finetune` finds on a tenth of the digits' labels and on all."""
    name = start.removeprefix("random:")
    trained(name, seed, arguments)
    folder = checkpoint(name, seed, arguments)
    place = folder.parent / f"{'random' if start != name else 'finetuned'}.json"
    if not place.exists():
        file = f"{'random:' if start != name else ''}{folder / 'last.ckpt'}"
        ssd(
            *("finetune", file, "--data", "Digits", "--flip", "0", "--crop", "0.5", "--shares", "0.01", "0.1"),
            *("--seeds", "1", "--seed", str(seed), "--json", str(place)),
        )
    return json.loads(place.read_text())


def print_fine_tuned(arguments: argparse.Namespace) -> None:
    title = f"digits, fine-tuned, %, mean and spread over seeds {arguments.seeds}"
    table = Table("start", "1 % of the labels", "10 %", title=title)
    for name, start in FINE_TUNED.items():
        found = [fine_tuned(start, seed, arguments)["rows"] for seed in arguments.seeds]
        table.add_row(name, *(mean_and_spread([100 * rows[at]["value"] for rows in found]) for at in range(2)))
    Console(width=150).print(table)


def mean_and_spread(found: list[float]) -> str:
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(SIZES))
    parser.add_argument("--path", help="training data of cifar10")
    parser.add_argument("--val_path", help="held-out data of cifar10")
    parser.add_argument("--further", metavar="PATH", help="photographs, for further pretraining on the digits alone")
    parser.add_argument("--rows", nargs="+", default=["pixels", "untrained", *ROWS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--on", choices=("held-out", "train"), default="held-out", help="what is asked")
    parser.add_argument("--steps", type=int, help="of MAE, instead of the size's own number")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--most", type=int, default=10_000, help="samples of each set that probes see, about")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--set", type=json.loads, default={}, help="further settings of every method, JSON")
    parser.add_argument("--precision", help="instead of the size's own, which was the faster one on a CPU")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that load")
    parser.add_argument("--out", default="runs/masked_distillation")
    arguments = parser.parse_args()
    for name in ("path", "val_path", "further", "out"):
        if getattr(arguments, name):
            setattr(arguments, name, os.path.abspath(getattr(arguments, name)))

    arguments.precision = arguments.precision or SIZES[arguments.data]["precision"]
    keep_freed_memory()
    if arguments.further:
        if arguments.data != "digits":
            parser.error("--further is about the digits")
        print_fine_tuned(arguments)
        return
    title = f"{arguments.data}, %, mean and spread over seeds {arguments.seeds}"
    table = Table("features", *SHOWN.values(), "dense", "rank", "kNN, class token", "steps", "processor s", title=title)
    for row in arguments.rows:
        found = [judged(row, seed, arguments) for seed in arguments.seeds]
        first = [next(iter(each["numbers"].values())) for each in found]
        cells = [mean_and_spread([each[name] for each in first]) for name in (*SHOWN, "dense")]
        cells.append(f"{statistics.mean(each['rank'] for each in first):.0f}")
        token = [each["numbers"]["cls"]["knn"] for each in found if "cls" in each["numbers"]]
        cells.append(mean_and_spread(token) if token else "")
        if "cost" in found[0]:
            cells += [str(found[0]["cost"]["steps"]), f"{statistics.mean(e['cost']['processor_s'] for e in found):.0f}"]
        table.add_row(row, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
