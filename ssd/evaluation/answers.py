"""The comparison's probes, sample by sample: which test samples frozen features answer rightly, not only how many."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd.evaluation.few_labels import few_label_correct
from ssd.evaluation.intervals import Interval, accuracy_interval, difference_interval
from ssd.evaluation.knn import knn_predict
from ssd.evaluation.splits import labels_per_class
from ssd.evaluation.suite import TEMPERATURE, knn_protocol

NEIGHBOURS = 20
SHARES = {"linear_1pct": 0.01, "linear_10pct": 0.1}


@dataclass(frozen=True)
class Answers:
    """What one start answers to one question.

    Args:
        correct: (R, Q) bool, of each test sample in each repetition (draw of labels, random weights).
        protocol: how it was asked, with its version.
    """

    correct: Tensor
    protocol: str

    def on(self, kept: Tensor) -> "Answers":
        """On the test samples that are kept, (Q,) bool, alone."""
        return Answers(self.correct[:, kept], self.protocol)


def probe_answers(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, draws: int = 20, seed: int = 0
) -> dict[str, Answers]:
    """The four numbers of `few_label_report`, as answers. (N, D), (N,), (Q, D), (Q,)

    Raises UserError where a label is missing or a feature is not finite.
    """
    k = min(NEIGHBOURS, len(train))
    near = knn_predict(train, train_labels, test, (k,), TEMPERATURE, center=True)[k]
    found = {"knn": Answers((near == test_labels)[None], knn_protocol(k, center=True))}
    labelled = (train, train_labels, test, test_labels)
    for name, share in SHARES.items():
        per_class = labels_per_class(train_labels, share)
        correct = few_label_correct(*labelled, per_class, draws, seed)
        repeated = f", {draws} draws" if draws > 1 else ""
        found[name] = Answers(correct, f"logistic-v1 l2=1, {per_class} per class{repeated}")
    everything = int(train_labels.bincount().max())
    found["linear"] = Answers(few_label_correct(*labelled, everything, 1, seed), "logistic-v1 l2=1, all labels")
    return found


def over_initialisations(found: Sequence[dict[str, Answers]]) -> dict[str, Answers]:
    """One row for several random initialisations of a network.

    Where labels are drawn again and again, the draws are shared out over the initialisations in turn, so that they stay
    the draws that the other rows are asked; elsewhere each initialisation is a repetition.
    """
    joined = {}
    for name, first in found[0].items():
        tables = [answers[name].correct for answers in found]
        if len(first.correct) == 1:
            correct = torch.cat(tables)
        else:
            correct = torch.stack([tables[draw % len(tables)][draw] for draw in range(len(first.correct))])
        joined[name] = Answers(correct, first.protocol)
    return joined


@dataclass(frozen=True)
class Cell:
    """One start on one question.

    Args:
        accuracy: its share of right answers.
        gain: over the baseline; None for the baseline itself.
        best: better than every other row, each time beyond chance.
    """

    accuracy: Interval
    gain: Interval | None
    best: bool


def compared(rows: dict[str, dict[str, Answers]], baseline: str, seed: int = 0) -> dict[str, dict[str, Cell]]:
    """Row -> question -> cell, from row -> question -> answers of the same test samples; rows may lack questions."""
    cells: dict[str, dict[str, Cell]] = {}
    for name, row in rows.items():
        cells[name] = {}
        for question, answers in row.items():
            against = {
                other: difference_interval(answers.correct, asked[question].correct, seed)
                for other, asked in rows.items()
                if other != name and question in asked
            }
            best = bool(against) and all(gain.low > 0 for gain in against.values())
            cells[name][question] = Cell(accuracy_interval(answers.correct, seed), against.get(baseline), best)
    return cells
