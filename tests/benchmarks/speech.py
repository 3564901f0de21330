"""DinoSR on the Free Spoken Digit Dataset: pretrained on recordings 5 and up of five speakers, then kNN and linear probes on
recordings 0 to 4 (the customary split) and on the sixth speaker, whom nothing but the probes of the first has heard; beside
statistics of the log-mel spectrogram and the untrained network. What the codes say of the digit, beside k-means of as many
clusters on log-mel frames.

    python -m tests.benchmarks.speech FOLDER --out runs/speech --seeds 0 1 2

Runs that are there already are not run again.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from datamodules.sound import Sound
from ssd.batch import Padded
from ssd.cli import main as ssd_main
from ssd.evaluation.features import Features, embedded, extract, log_mel_statistics
from ssd.evaluation.outputs import output_of
from ssd.evaluation.suite import few_label_report
from ssd.normalisers import instance_normed
from ssd.record import build
from ssd.spectrogram import log_mel_inside, mel_filters, window_and_hop
from ssd.verbs.loading import load_module

SPEAKER = "theo"
LABELS = "(?P<label>[0-9])_[a-z]+_[0-9]+[.]wav$"
HELD_OUT = f"_[0-4][.]wav$|_{SPEAKER}_"
OUTPUTS = ("mean_patch", "last4_mean_patch")
COLUMNS = {"knn": "kNN", "linear": "linear, all", "linear_10pct": "linear, 10 %", "linear_1pct": "linear, 1 %"}


def ssd(*words: str) -> None:
    """A command of ours, here."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = ssd_main(list(words))
    if status:
        raise SystemExit(f"ssd {' '.join(words)}\n{said.getvalue()[-4000:]}")


def run(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and judges one run, or reads what an earlier call has found."""
    folder = Path(arguments.out, f"seed-{seed}")
    result = folder / "speech.json"
    if not result.exists():
        started = time.process_time()
        ssd(
            *("fit", "--config", "method/dinosr_small", "--config", "data/fsdd", "--data.path", arguments.path),
            *("--data.held_out_pattern", HELD_OUT, "--model.steps", str(arguments.steps)),
            *("--data.num_workers", "0", "--trainer.accelerator", arguments.accelerator, "--trainer.devices", "1"),
            *("--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"),
            *("--trainer.default_root_dir", str(folder), "--seed_everything", str(seed)),
        )
        seconds = time.process_time() - started
        result.write_text(
            json.dumps(judged(folder, seed, arguments.path, arguments.draws) | {"seconds": seconds}, indent=1)
        )
    return json.loads(result.read_text())


def judged(folder: Path, seed: int, path: str, draws: int) -> dict[str, Any]:
    module, about = load_module(folder / "checkpoints" / "last.ckpt")
    torch.manual_seed(seed)
    fresh = build(about["method"]).eval()
    data = Sound(path, label_pattern=LABELS, val_share=0, num_workers=0)
    data.prepare(module.views)
    names = [os.path.basename(data.everything.describe(index)) for index in range(len(data.everything))]
    customary = torch.tensor([re.search("_[0-4][.]wav$", name) is not None for name in names])
    stranger = torch.tensor([f"_{SPEAKER}_" in name for name in names])

    def everything() -> Iterable[Mapping[str, Tensor]]:
        return data.look_at(data.everything)

    sets: dict[str, Features] = {"log-mel": log_mel_statistics(everything(), module.views.rate_hz)}
    for name, method in (("untrained", fresh), ("DinoSR", module)):
        for output in OUTPUTS:
            backbone = method.student.backbone.eval()
            sets[f"{name}, {output}"] = extract(
                lambda sounds, network=backbone, wanted=output: output_of(network, sounds, wanted), everything()
            )
    labels = sets["log-mel"].labels
    scores = {}
    for split, bank, queries in (
        ("recordings 0 to 4", ~customary, customary),
        ("a speaker never heard", ~stranger & ~customary, stranger),
    ):
        rows = {name: (found.features[bank], found.features[queries]) for name, found in sets.items()}
        report = few_label_report(rows, labels[bank], labels[queries], draws=draws, seed=seed)
        scores[split] = {name: {key: number.value for key, number in row.items()} for name, row in report.items()}
    frames = frames_of(everything(), module, fresh)
    return {
        "scores": scores,
        "information": information(frames, labels, customary | stranger, module.codebooks.counts.shape[1], seed),
        "usage": usage(folder),
    }


def frames_of(loader: Iterable[Mapping[str, Tensor]], module: Any, fresh: Any) -> dict[str, list[Tensor]]:
    """Of each sound its frames: log-mel levels (T, MELS), and codes (T,) of each codebook, trained and untrained."""
    rate_hz = module.views.rate_hz
    size, hop = window_and_hop(rate_hz)
    filters = mel_filters(size, rate_hz)
    found: dict[str, list[Tensor]] = {}

    def look(sounds: Padded) -> dict[str, tuple[Tensor, Tensor]]:
        answers = {}
        for name, method in (("DinoSR", module), ("untrained", fresh)):
            tokens, valid = method.student(sounds)
            _, taps = method.teacher(tokens, valid, method.taps)
            features = torch.stack([instance_normed(taps[tap], valid=valid) for tap in method.taps])
            codes = method.codebooks(features.flatten(1, 2)).unflatten(1, valid.shape)
            for tap, table in zip(method.taps, codes):
                answers[f"{name}, {tap.removesuffix('.mlp')}"] = (table, valid)
        # every second window: a frame each 20 ms, as the network's
        levels = log_mel_inside(sounds.samples, filters, size, hop)[:, ::2]
        answers["log-mel"] = (levels[:, : valid.shape[1]], valid)
        return answers

    for answers, _ in embedded(look, loader):
        for name, (table, valid) in answers.items():
            found.setdefault(name, []).extend(row[: int(real.sum())] for row, real in zip(table, valid))
    return found


def information(
    frames: dict[str, list[Tensor]], labels: Tensor, held_out: Tensor, codes: int, seed: int
) -> dict[str, float]:
    """Mutual information of a frame's code and its recording's digit on held-out recordings, nats."""
    levels = frames.pop("log-mel")
    levels = [(row - row.mean(0)) / (row.std(0, correction=0) + 1e-3) for row in levels]
    heard = torch.cat([row for row, held in zip(levels, held_out) if not held])
    means = MiniBatchKMeans(codes, batch_size=4096, n_init=3, random_state=seed).fit(heard.numpy())
    tables = frames | {"k-means on log-mel": [torch.from_numpy(means.predict(row.numpy())).long() for row in levels]}
    return {
        name: mutual_information(
            torch.cat([row for row, held in zip(table, held_out) if held]),
            torch.cat([label.expand(len(row)) for row, label, held in zip(table, labels, held_out) if held]),
        )
        for name, table in tables.items()
    }


def mutual_information(codes: Tensor, labels: Tensor) -> float:
    """Of two columns of whole numbers, nats, from their counts."""
    joint = torch.zeros(int(codes.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    joint.index_put_((codes, labels), torch.ones(len(codes), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()

    def entropy(shares: Tensor) -> float:
        return float(torch.special.entr(shares).sum())

    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)


def usage(folder: Path) -> list[dict[str, float]]:
    """Loss and mean perplexity of the codebooks over the run."""
    rows = []
    for log in sorted(folder.glob("csv/version_*/metrics.csv")):
        with open(log, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("train/codebooks/perplexity"):
                    names = {"loss": "train/loss/total", "perplexity": "train/codebooks/perplexity"}
                    rows.append({key: float(row[name]) for key, name in names.items()} | {"step": float(row["step"])})
    return rows


def mean_and_spread(found: list[float], scale: float = 100, digits: int = 1) -> str:
    spread = f" ± {scale * statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{scale * statistics.mean(found):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder of the data set's recordings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=5, help="of the labelled set of few-label probes")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", default="runs/speech")
    arguments = parser.parse_args()
    arguments.path, arguments.out = os.path.abspath(arguments.path), os.path.abspath(arguments.out)

    found = [run(seed, arguments) for seed in arguments.seeds]
    out = Console(width=130)
    for split, rows in found[0]["scores"].items():
        table = Table("features", *COLUMNS.values(), title=f"{split}, %, mean and spread over seeds {arguments.seeds}")
        for name in rows:
            table.add_row(
                name, *(mean_and_spread([one["scores"][split][name][key] for one in found]) for key in COLUMNS)
            )
        out.print(table)
    table = Table("codes", "information on the digit, nats", title="held-out frames; ln 10 = 2.303 would be all")
    for name in found[0]["information"]:
        table.add_row(name, mean_and_spread([one["information"][name] for one in found], scale=1, digits=3))
    out.print(table)
    steps = found[0]["usage"]
    for row in steps[:: max(1, len(steps) // 10)]:
        out.print(f"step {row['step']:.0f}: loss {row['loss']:.3f}, perplexity {row['perplexity']:.1f}")
    out.print(f"{statistics.mean(one['seconds'] for one in found):.0f} s of processor time a run")


if __name__ == "__main__":
    main()
