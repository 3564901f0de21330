"""DISCOVR on small sets of short clips: what its features of clips tell of their classes beside those of single frames,
averaged, of networks that have not learned, and of pixels; with the clusters that both branches share, and without.

    python -m tests.benchmarks.clips FOLDER --out runs/clips --seeds 0 1
    python -m tests.benchmarks.clips shapes --out runs/shapes --flip 0 --fps 12

"shapes" stands for those that `ssd quickstart --config quickstart-video` makes, 40 of each motion.

FOLDER has a folder of clips for each class. Clips of one scene (of one size, whose median frames agree) stay together in one of
two halves. A network learns from one half, without labels; probes learn from that half's labels and are asked about the other,
whose scenes they have not seen. Then the halves change places, so each clip is asked about once. Rows that are there already are
not run again.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ssd.cli import main as ssd_main
from ssd.data.clips import Clip
from ssd.data.groups import held_groups
from ssd.data.moving_shapes import write_moving_shapes
from ssd.evaluation.features import Features, extract
from ssd.evaluation.suite import monitor
from ssd.record import build
from ssd.verbs.loading import load_data, load_module
from ssd.weights.checkpoint import read_checkpoint

ARMS = {"with": 1.0, "without": 0.0}
"""Weight of the term that lets the two branches agree on clusters."""
ALIKE = 0.8  # correlation of median frames from which clips are of one scene
LOOKED_AT = 5  # frames of a clip that its median is taken of

NETWORK = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "arguments": {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3},
}
VIEWS = {
    "global_count": 1,
    "global_size": 32,
    "global_frames": 8,
    "local_count": 0,
    "jitter_prob": 0.0,
    "grey_prob": 0.0,
    "blur_prob": [0.0, 0.0],
    "evaluation_crop": 1.0,
}


def config(arm: str, steps: int, flip: float, fps: float) -> dict[str, Any]:
    """`method/discovr_small` with clips of eight frames of 32 px."""
    settings = {
        "backbone": {"class_path": "VideoViT", "init_args": NETWORK},
        "image_backbone": {"class_path": "ViT", "init_args": NETWORK | {"fixed_positions": True}},
        "views": {"class_path": "ClipViews", "init_args": VIEWS | {"flip": flip, "global_fps": fps}},
        "image_frame_step": 2,
        "scd_weight": ARMS[arm],
        "steps": steps,
    }
    return {"model": {"class_path": "DISCOVR", "init_args": settings}}


def ssd(*words: str) -> None:
    """A command of ours, here: a process for each would spend its time on imports."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = ssd_main(list(words))
    if status:
        raise SystemExit(f"ssd {' '.join(words)}\n{said.getvalue()[-4000:]}")


# ---------------------------------------------------------------------- scenes


def median_frame(file: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Size of a clip's frames, and their median, grey, 32 x 24, at mean 0 and length 1."""
    with open(file, "rb") as opened, Clip(opened, None) as clip:
        places = np.unique(np.linspace(0, len(clip.timeline) - 1, LOOKED_AT).astype(int))
        frames = clip.frames(places, None, 1)
    small = [np.asarray(Image.fromarray(frame[..., 0]).resize((32, 24)), dtype=float) for frame in frames]
    median = np.median(small, axis=0).ravel()
    median -= median.mean()
    return frames.shape[1:], median / max(float(np.linalg.norm(median)), 1e-9)


def scenes(files: list[Path]) -> np.ndarray:
    """(N,) number of each clip's scene: clips that are alike, or alike to one that is, are of one."""
    looks = [median_frame(file) for file in files]
    scene = np.arange(len(files))
    for later, (size, median) in enumerate(looks):
        for earlier in range(later):
            if size == looks[earlier][0] and float(median @ looks[earlier][1]) > ALIKE:
                scene[scene == scene[later]] = scene[earlier]
    return np.unique(scene, return_inverse=True)[1]


def halves(folder: Path, out: Path) -> tuple[list[Path], int]:
    """Two folders of links to the clips, class by class, and how many scenes they are of."""
    files = sorted(file for file in folder.glob("*/*") if file.suffix == ".mp4")
    if not files:
        raise SystemExit(f"{folder} has no folders of .mp4 files.")
    scene = scenes(files)
    classes = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    held = held_groups(scene, int(scene.max()) + 1, classes, 0.5)[scene]
    made = [out / "half0", out / "half1"]
    for file, half in zip(files, held.astype(int)):
        place = made[half] / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(file)
    return made, int(scene.max()) + 1


# ---------------------------------------------------------------------- features


def of_frames(network: Any) -> Callable[[Tensor], Tensor]:
    """Clips (B, C, T, H, W) -> the mean over frames of a picture network's features (B, D)."""

    def embed(clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2)
        return network(frames.flatten(0, 1)).pooled().unflatten(0, frames.shape[:2]).mean(1)

    return embed


def features_of(module: Any, data: Any, seed: int) -> dict[str, Features]:
    """Features of all clips of a folder by the name of what they are of."""
    torch.manual_seed(seed)
    fresh = build(module.record()).eval()
    teacher, student = module.teacher.network, module.student
    looks: dict[str, Callable[[Tensor], Tensor]] = {
        "clips": lambda clips: teacher.backbone(clips).pooled(),
        "clips, student": lambda clips: student.backbone(clips).pooled(),
        "frames": of_frames(teacher.image_backbone),
        "untrained clips": lambda clips: fresh.student.backbone(clips).pooled(),
        "untrained frames": of_frames(fresh.student.image_backbone),
        "pixels": lambda clips: clips.mean(2).flatten(1),
    }
    widths: list[int] = []

    def all_of_them(clips: Tensor) -> Tensor:  # clips are decoded once
        parts = [look(clips) for look in looks.values()]
        widths[:] = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    whole = extract(all_of_them, data.look_at(data.everything))
    return {name: whole._replace(features=part) for name, part in zip(looks, whole.features.split(widths, dim=1))}


def row(arm: str, seed: int, arguments: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    """Share of right answers over both halves, by what features are of, or what an earlier call has found."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    seconds = 0.0
    for half, folder in enumerate(folders):
        run = Path(arguments.out, f"{arm}-{seed}-{half}")
        result = run / "probe.json"
        if not result.exists():
            run.mkdir(parents=True, exist_ok=True)
            (run / "method.yaml").write_text(json.dumps(config(arm, arguments.steps, arguments.flip, arguments.fps)))
            started = time.process_time()
            ssd(
                *("fit", "--config", "method/discovr_small", "--config", str(run / "method.yaml")),
                *("--data", str(folder), "--data.val_share", "0", "--data.num_workers", "0", "--data.batch_size", "16"),
                *("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0", "--trainer.devices", "1"),
                *("--seed_everything", str(seed), "--trainer.default_root_dir", str(run)),
            )
            last = run / "checkpoints" / "last.ckpt"
            if read_checkpoint(last)["state_dict"]["_extra_state"]["step"] < arguments.steps:
                raise SystemExit(f"{run} was stopped before its end. Remove it to run it again.")
            used = time.process_time() - started
            module, about = load_module(last)
            numbers = {}
            looked = [
                features_of(module, load_data(["--data", str(place)], about, "probe"), seed)
                for place in (folder, folders[1 - half])
            ]
            for name, bank in looked[0].items():
                queries = looked[1][name]
                values = {
                    n.name: n.value for n in monitor(bank.features, bank.labels, queries.features, queries.labels)
                }
                numbers[name] = (values["knn/top1"], values["linear/top1"], len(queries.labels))
            result.write_text(json.dumps({"numbers": numbers, "seconds": used}))
        content = json.loads(result.read_text())
        seconds += content["seconds"]
        for name, value in content["numbers"].items():
            found.setdefault(name, []).append(tuple(value))
    total = {name: sum(count for *_, count in parts) for name, parts in found.items()}
    knn = {name: sum(k * count for k, _, count in parts) / total[name] for name, parts in found.items()}
    linear = {name: sum(right * count for _, right, count in parts) / total[name] for name, parts in found.items()}
    return {"knn": knn, "linear": linear, "seconds": seconds, "clips": max(total.values())}


def mean_and_spread(found: list[float]) -> str:
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--flip", type=float, default=0.5, help="0 where a mirrored clip is of another class")
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second, of which eight are seen")
    parser.add_argument("--out", default="runs/clips")
    arguments = parser.parse_args()
    arguments.out = os.path.abspath(arguments.out)

    if arguments.folder == Path("shapes"):
        arguments.folder = Path(arguments.out, "shapes")
        write_moving_shapes(arguments.folder, 40, seed=0)
    folders, number = halves(arguments.folder.resolve(), Path(arguments.out))
    found = {arm: [row(arm, seed, arguments, folders) for seed in arguments.seeds] for arm in arguments.arms}
    clips = max(run["clips"] for runs in found.values() for run in runs)
    title = f"{clips} clips of {number} scenes, %, mean and spread over seeds {arguments.seeds}"
    table = Table("features", "kNN", "linear", title=title)
    for arm, runs in found.items():
        for name in runs[0]["knn"]:
            learned = name in ("clips", "clips, student", "frames")
            if not learned and arm != arguments.arms[0]:
                continue
            shown = f"{name}, {arm} SCD" if learned else name
            columns = [mean_and_spread([100 * run[probe][name] for run in runs]) for probe in ("knn", "linear")]
            table.add_row(shown, *columns)
    Console(width=110).print(table)
    seconds = [run["seconds"] / len(folders) for runs in found.values() for run in runs]
    print(f"{arguments.steps} steps a run, {statistics.mean(seconds):.0f} processor seconds")


if __name__ == "__main__":
    main()
