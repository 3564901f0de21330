"""Which classes a probe takes for which: accuracy class by class, the pairs confused most, and all pairs as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ssd.evaluation.protocol import count_classes

MOST_NAMED = 50
"""Classes whose names can be read beside the picture."""
MOST_COUNTED = 20
"""Classes whose cells have room for a number."""


def confusion(predictions: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """How many samples of class i were taken for class j. (N,), (N,) -> (C, C) int64"""
    num_classes = num_classes or count_classes(predictions, labels)
    return multiclass_confusion_matrix(predictions, labels, num_classes, validate_args=False)


def class_accuracies(matrix: Tensor) -> Tensor:
    """Share of each class's samples that are right, NaN for a class without samples. (C, C) -> (C,) float64"""
    return matrix.diagonal().double() / matrix.sum(1)


def most_confused(matrix: Tensor, classes: Sequence[str] | None = None, count: int = 5) -> list[str]:
    """The pairs confused most, as "cat taken for dog: 17.3% (173 of 1000)", by their share of the true class.

    Pairs that were never confused are left out; of equal shares the lower classes come first.
    """
    names = class_names(matrix, classes)
    sizes = matrix.sum(1)
    shares = matrix.double() / sizes.clamp_min(1)[:, None]
    shares.fill_diagonal_(0)
    said = []
    for place in shares.flatten().sort(descending=True, stable=True).indices[:count].tolist():
        truth, taken = divmod(place, len(matrix))
        wrong = int(matrix[truth, taken]) if truth != taken else 0
        if wrong:
            share = 100 * float(shares[truth, taken])
            said.append(f"{names[truth]} taken for {names[taken]}: {share:.1f}% ({wrong} of {int(sizes[truth])})")
    return said


def confusion_picture(matrix: Tensor, classes: Sequence[str] | None = None, title: str | None = None) -> Image.Image:
    """Shares of each true class (rows) by what it was taken for (columns); a class without samples is left blank.

    Names stand beside up to 50 classes, percentages in the cells of up to 20.
    """
    number = len(matrix)
    names = class_names(matrix, classes)
    sizes = matrix.sum(1)
    shares = (matrix.double() / sizes[:, None]).cpu().numpy()  # NaN, which is blank, where there are no samples
    side = min(3 + 0.42 * number, 12)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    # colours by the root of the share: what is rare among the wrong would be white beside what is right
    drawn = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    if title is not None:
        axes.set_title(title)
    if number <= MOST_NAMED:
        size = 9 if number <= MOST_COUNTED else 6
        axes.set_xticks(range(number), names, rotation=90, fontsize=size)
        axes.set_yticks(range(number), names, fontsize=size)
    if number <= MOST_COUNTED:
        write_shares(axes, shares)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the class")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def write_shares(axes: Any, shares: Any) -> None:
    """Percentages into the cells, where they round to something."""
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            if share >= 0.005:
                colour = "white" if share > 0.35 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def class_names(matrix: Tensor, classes: Sequence[str] | None) -> Sequence[str]:
    """Of every row: those given, or else the numbers."""
    return [str(number) for number in range(len(matrix))] if classes is None else classes
