"""Trainings on labels that are repeated over draws and seeds: what each gave, kept where a stop does no harm."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ssd.data.sampler import Chosen, EpochSampler
from ssd.data.sources import Subset
from ssd.errors import UserError
from ssd.evaluation.finetune import FineTuned, Labelled, Recipe, finetune, predict
from ssd.evaluation.protocol import chance_level
from ssd.evaluation.splits import balanced_draws, labels_per_class
from ssd.record import describe, differences
from ssd.summary import write_json
from ssd.verbs.export import LOOKS, data_named
from ssd.verbs.starts import Start
from ssd.views.view import WHOLE_SOUND
from ssd.weights.classifier import export_classifier

SAVE_EVERY_S = 20.0
UNREADABLE = -1


class Place(NamedTuple):
    """One training among those of a study."""

    start: str
    share: float
    seed: int

    def __str__(self) -> str:
        return f"{self.start}, {100 * self.share:g} % of the labels, seed {self.seed}"

    @property
    def file(self) -> str:
        return f"{self.start}-{100 * self.share:g}pct-seed{self.seed}"


@dataclass
class Outcome:
    """What one training gave.

    Args:
        predictions: class of each sample of the held-out part, -1 where it cannot be read.
        epoch: whose weights answered.
        curve: loss, and accuracy on held-out labels, of each epoch.
        seconds: that its last go took.
    """

    seed: int
    predictions: list[int]
    epoch: int
    curve: list[dict[str, float]]
    protocol: str
    seconds: float

    def content(self, without: Sequence[str] = ()) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in without}


@dataclass
class Result:
    """The repetitions of one start on one share of the labels.

    Args:
        correct: (seeds, Q) whether each test sample that can be read was answered rightly.
        asked: (Q,) which samples of the held-out part these are.
        labels: how many were trained on or chosen by.
        per_class: of each class, None = all there are.
    """

    correct: Tensor
    asked: Tensor
    labels: int
    per_class: int | None
    outcomes: list[Outcome]

    @property
    def protocol(self) -> str:
        return "; ".join(dict.fromkeys(outcome.protocol for outcome in self.outcomes))


class Study:
    """Fine-tunings on one data set, all judged on its held-out part.

    Args:
        data: a datamodule, prepared with the views of the training.
        out: folder for the network that is kept and for what is done; null = none.
        verb: that asks, for messages.

    Raises UserError for data without labels, of one class, or whose test labels are of no class that is trained on.
    """

    def __init__(self, data: Any, recipe: Recipe, device: str, out: str | None, verb: str):
        self.bank, self.queries = data.labelled_parts()
        self.labels, self.truth = (torch.from_numpy(np.asarray(part.labels)) for part in (self.bank, self.queries))
        seen = self.labels.unique()
        names = data.classes
        if len(seen) < 2:
            which = names[int(seen[0])] if names else int(seen[0])
            raise UserError(
                f"all {len(self.labels)} labelled training samples are of one class, '{which}'. ssd {verb} needs two classes "
                "or more: give other data, or other labels."
            )
        self.data, self.recipe, self.device = data, recipe, device
        self.folder = None if out is None else Path(out)
        self.kept: Place | None = None
        if device != "cpu" and getattr(data, "photometry", None) == "auto":
            data.photometry = "device"
        samples = data.views_of(self.bank)

        def views(rows: np.ndarray, batch_size: int, seed: int, steps_done: Callable[[], int]) -> Any:
            samples.seed, samples.draws = seed, Chosen(len(self.bank), rows)
            order = EpochSampler(len(self.bank), batch_size, seed=seed, steps_done=steps_done, draws=samples.draws)
            return data.loader_in_order(samples, order)

        self.labelled = Labelled(
            self.labels,
            data.num_classes,
            views,
            looks=lambda rows: data.look_at(Subset(self.bank, rows)),
            finish=lambda batch: data.on_after_batch_transfer(batch, 0),
        )

    def facts(self) -> dict[str, Any]:
        return {
            "data": data_named(self.data.record()),
            "training": len(self.labels),
            "test": len(self.truth),
            "classes": self.data.num_classes,
            "chance": chance_level(self.truth),
        }

    # ------------------------------------------------------------------ the folder

    def open_folder(self, start: Start, kept: Place) -> None:
        """Settles which trained network is kept. Raises UserError where the folder holds trainings by other settings."""
        if self.folder is None:
            return
        self.kept = kept
        file = self.folder / "settings.json"
        settings = {
            "network": start.fingerprint(),
            "data": [self.bank.fingerprint(), self.queries.fingerprint()],
            "views": repr(self.data.views),
            "training": asdict(self.recipe),
        }
        if file.is_file():
            changed = differences(json.loads(file.read_text()), settings)
            if changed:
                raise UserError(
                    f"--out {self.folder} holds trainings with other settings ({', '.join(changed)}). Give the same settings "
                    "to go on, or another folder."
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--out {self.folder} exists and holds no trainings. Give a new folder.")
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        write_json(file, settings)

    def done(self, place: Place) -> Outcome | None:
        """What was found in an earlier go, None where it is to be trained."""
        if self.folder is None:
            return None
        file = self.folder / "runs" / f"{place.file}.json"
        if not file.is_file() or (place == self.kept and self.exported() != str(place)):
            return None
        return Outcome(**json.loads(file.read_text()))

    def exported(self) -> str | None:
        """Which training the model in the folder is of."""
        assert self.folder is not None
        file = self.folder / "model" / "export.json"
        return json.loads(file.read_text())["training"] if file.is_file() else None

    # ------------------------------------------------------------------ the trainings

    def result(self, start: Start, name: str, share: float, seeds: int, first_seed: int = 0) -> Result:
        """Trains `start` so many times on a share of the labels, each time on another draw."""
        per_class = None if share == 1 else labels_per_class(self.labels, share)
        if per_class is None:
            draws = [np.arange(len(self.labels))] * seeds
        else:
            drawn = balanced_draws(self.labels, per_class, first_seed + seeds, 0)
            draws = [np.sort(rows.numpy()) for rows in drawn[first_seed:]]
        outcomes = []
        for number, rows in enumerate(draws):
            place = Place(name, share, first_seed + number)
            outcomes.append(self.done(place) or self.train(start, place, rows))
        predictions = torch.tensor([outcome.predictions for outcome in outcomes])
        asked = predictions[0] != UNREADABLE
        correct = (predictions == self.truth)[:, asked]
        return Result(correct, asked.nonzero()[:, 0], len(draws[0]), per_class, outcomes)

    def train(self, start: Start, place: Place, rows: np.ndarray) -> Outcome:
        begun = time.monotonic()
        saved = None if self.folder is None else self.folder / "runs" / f"{place.file}.unfinished"
        clock = Clock(SAVE_EVERY_S)
        recipe = self.recipe.settled(learned=start.weights is not None)
        with Shown(str(place), recipe.length(len(rows))[0]) as shows:
            found = finetune(
                lambda drop_path: start.backbone(place.seed, drop_path),
                self.labelled,
                rows,
                recipe,
                place.seed,
                self.device,
                after_epoch=shows,
                saved=saved,
                save=clock.rings,
            )
        network = found.network.to(self.device)
        answers, labels, index = predict(network, self.data.look_at(self.queries), self.device, self.recipe.precision)
        predictions = torch.full_like(self.truth, UNREADABLE)
        predictions[index] = answers
        seconds = time.monotonic() - begun
        outcome = Outcome(place.seed, predictions.tolist(), found.epoch, found.curve, found.protocol, seconds)
        top1 = float((answers == labels).double().mean())
        said = f"{place}: top-1 {top1:.1%}, epoch {found.epoch} of {len(found.curve)}, {seconds:.0f} s"
        print(said, file=sys.stderr, flush=True)
        if saved is not None:
            assert self.folder is not None
            if place == self.kept:
                self.export(found, place, top1)
            write_json(self.folder / "runs" / f"{place.file}.json", outcome.content())
            saved.unlink(missing_ok=True)
        return outcome

    def export(self, found: FineTuned, place: Place, top1: float) -> None:
        assert self.folder is not None
        views = self.data.views
        state = self.data.describe_state()
        export_classifier(
            found.network.cpu(),
            self.folder / "model",
            lengths=views.evaluation_lengths or WHOLE_SOUND,
            mean=state.get("mean"),
            std=state.get("std"),
            crop=getattr(views, "evaluation_crop", 1.0),
            classes=self.data.classes,
            looks={"views": describe(views)} | {key: state[key] for key in LOOKS if key in state},
            card={
                "training": str(place),
                "protocol": found.protocol,
                "data": self.facts()["data"],
                "test top-1": f"{top1:.4f}, chance {self.facts()['chance']:.4f}",
            },
        )


class Clock:
    """Says once every so many seconds that they have passed."""

    def __init__(self, every_s: float):
        self.every_s = every_s
        self.last = time.monotonic()

    def rings(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.every_s:
            return False
        self.last = now
        return True


class Shown:
    """One line on stderr for a training: a bar while it runs where that is a terminal, and what came of it."""

    def __init__(self, name: str, epochs: int):
        self.name, self.epochs = name, epochs
        self.progress: Progress | None = None

    def __enter__(self) -> "Shown":
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(
                *columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True), transient=True
            )
            self.task = self.progress.add_task(self.name, total=self.epochs, numbers="")
            self.progress.start()
        return self

    def __call__(self, row: dict[str, float]) -> None:
        if self.progress is not None:
            numbers = f"loss {row['loss']:.3f}"
            if "held_out_top1" in row:
                numbers += f"  held out {row['held_out_top1']:.1%}"
            self.progress.update(self.task, completed=row["epoch"], numbers=numbers)

    def __exit__(self, *error: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
