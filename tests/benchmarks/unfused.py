"""UnFuSeD on the Free Spoken Digit Dataset: a labeller pretrained by DinoSR, or a random one, labels recordings 5 and up of five
speakers; a fresh network learns these labels; then kNN and linear probes on recordings 0 to 4 (the customary split) and on the
sixth speaker, beside statistics of the log-mel spectrogram, the labellers and the untrained network.

    python -m tests.benchmarks.unfused FOLDER --out runs/unfused --seeds 0 1

Runs that are there already are not run again.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules.sound import Sound
from ssd.data.manifest import read_manifest
from ssd.evaluation.features import extract, log_mel_statistics
from ssd.evaluation.outputs import output_of
from ssd.evaluation.suite import few_label_report
from ssd.record import build
from ssd.verbs.loading import load_module
from tests.benchmarks.speech import COLUMNS, HELD_OUT, LABELS, SPEAKER, mean_and_spread, ssd

LABELLERS = ("DinoSR", "random")


def trained(folder: Path, config: str, steps: int, seed: int, path: str, *more: str) -> Path:
    """The checkpoint of a run, which is trained unless it has ended; its processor time lies beside it then."""
    if not (folder / "seconds.json").exists():
        started = time.process_time()
        ssd(
            *("fit", "--config", config, "--config", "data/fsdd", "--data.path", path),
            *("--data.held_out_pattern", HELD_OUT, "--model.steps", str(steps), *more),
            *("--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
            *("--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"),
            *("--trainer.default_root_dir", str(folder), "--seed_everything", str(seed)),
        )
        (folder / "seconds.json").write_text(json.dumps(time.process_time() - started))
    return folder / "checkpoints" / "last.ckpt"


def run(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and judges, or reads what an earlier call has found."""
    out = Path(arguments.out)
    result = out / f"seed-{seed}.json"
    if result.exists():
        return json.loads(result.read_text())
    dinosr = trained(out / f"dinosr-{seed}", "method/dinosr_small", arguments.labeller_steps, seed, arguments.path)
    own = {"DinoSR": ("--model.labeller.weights", str(dinosr)), "random": ("--model.random_labeller", "true")}
    files = {
        name: trained(
            *(out / f"unfused-{name.lower()}-{seed}", "method/unfused_small", arguments.steps, seed, arguments.path),
            *("--data.batch_seconds", "null", *own[name]),
        )
        for name in LABELLERS
    }
    found = judged(dinosr, files, seed, arguments.path, arguments.draws)
    result.write_text(json.dumps(found, indent=1))
    return found


def judged(dinosr: Path, files: dict[str, Path], seed: int, path: str, draws: int) -> dict[str, Any]:
    modules = {name: load_module(file) for name, file in files.items()}
    module, about = modules["DinoSR"]
    torch.manual_seed(seed)
    fresh = build(about["method"]).eval()
    labeller = load_module(dinosr)[0].student.backbone.eval()
    data = Sound(path, label_pattern=LABELS, val_share=0, num_workers=0)
    data.prepare(module.views)
    names = [os.path.basename(data.everything.describe(index)) for index in range(len(data.everything))]
    customary = torch.tensor([re.search("_[0-4][.]wav$", name) is not None for name in names])
    stranger = torch.tensor([f"_{SPEAKER}_" in name for name in names])

    def everything() -> Iterable[Mapping[str, Tensor]]:
        return data.look_at(data.everything)

    sets = {"log-mel": log_mel_statistics(everything(), module.views.rate_hz)}
    sets["labeller, DinoSR"] = extract(lambda sounds: output_of(labeller, sounds, "last4_mean_patch"), everything())
    sets["untrained"] = extract(lambda sounds: fresh.student.backbone(sounds).pooled(), everything())
    for name, (taught, _) in modules.items():
        backbone = taught.student.backbone
        sets[f"UnFuSeD, labels of {name}"] = extract(lambda sounds, net=backbone: net(sounds).pooled(), everything())
    labels, scores = sets["log-mel"].labels, {}
    for split, bank, queries in (
        ("recordings 0 to 4", ~customary, customary),
        ("a speaker never heard", ~stranger & ~customary, stranger),
    ):
        rows = {name: (found.features[bank], found.features[queries]) for name, found in sets.items()}
        report = few_label_report(rows, labels[bank], labels[queries], draws=draws, seed=seed)
        scores[split] = {name: {key: number.value for key, number in row.items()} for name, row in report.items()}
    seconds = {name: json.loads((file.parents[1] / "seconds.json").read_text()) for name, file in files.items()}
    return {"scores": scores, "seconds": seconds, "shared": {name: shared(files[name]) for name in LABELLERS}}


def shared(file: Path) -> dict[str, float]:
    """Of a run's labels with digits and with speakers: normalised mutual information."""
    from sklearn.metrics import normalized_mutual_info_score

    manifest = read_manifest(file.parents[1] / "pseudo_labels.csv")
    digits, speakers = zip(*(os.path.basename(name).split("_")[:2] for name in manifest.names), strict=True)
    return {
        kind: float(normalized_mutual_info_score(names, manifest.labels))
        for kind, names in (("digit", digits), ("speaker", speakers))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder of the data set's recordings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--labeller-steps", type=int, default=300)
    parser.add_argument("--draws", type=int, default=5, help="of the labelled set of few-label probes")
    parser.add_argument("--out", default="runs/unfused")
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
    for name in LABELLERS:
        of_labels = ", ".join(
            f"with the {kind} {mean_and_spread([one['shared'][name][kind] for one in found], 1, 2)}"
            for kind in ("digit", "speaker")
        )
        seconds = mean_and_spread([one["seconds"][name] for one in found], 1, 0)
        out.print(f"labels of {name}: mutual information {of_labels} of 1; {seconds} s of processor time a run")


if __name__ == "__main__":
    main()
