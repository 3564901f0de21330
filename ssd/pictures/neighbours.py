"""Samples beside those that a network takes for most alike."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ssd.evaluation.knn import in_float32, unit_vectors
from ssd.pictures.layout import Cell, Colour, table

SAME, OTHER, UNKNOWN = (30, 160, 80), (220, 60, 50), (190, 190, 190)


def nearest(queries: Tensor, bank: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Similarity and row in the bank of the most similar samples, nearest first. (Q, D), (N, D) -> (Q, count) twice.

    By cosine, the bank's mean taken off both, as the kNN of an evaluation. `own` (Q,) is the row that holds the query
    itself, which is no neighbour; -1 where none does.
    """
    bank, queries = unit_vectors(bank, queries, center=True)
    count = min(count, len(bank) - (own is not None))
    similarity, rows = in_float32(queries, bank, count + (own is not None))
    if own is None:
        return similarity, rows
    keep = rows != own[:, None]
    # where the query is not among its neighbours, the last one goes
    keep[keep.all(1), -1] = False
    return similarity[keep].reshape(len(rows), -1), rows[keep].reshape(len(rows), -1)


def neighbour_sheet(
    queries: Sequence[np.ndarray],
    neighbours: Sequence[Sequence[np.ndarray]],
    similarity: Tensor,
    query_labels: Sequence[int],
    labels: Sequence[Sequence[int]],
    classes: Sequence[str] | None = None,
    cell: int = 80,
) -> Image.Image:
    """One row a query: itself, then its neighbours, framed in green where they have its class and in red where not.

    Pictures are arrays (h, w, 3) uint8, similarity (Q, k), labels -1 for none; `classes` names them.
    """
    rows = []
    for query, found, near, label, of_found in zip(
        queries, neighbours, similarity.tolist(), query_labels, labels, strict=True
    ):
        row = [Cell(query, named(label, classes))]
        for picture, value, other in zip(found, near, of_found, strict=True):
            row.append(Cell(picture, f"{value:.2f} {named(other, classes)}", agreement(label, other)))
        rows.append(row)
    headings = ["query", *(f"{number + 1}" for number in range(similarity.shape[1]))]
    return table(rows, headings, cell=cell)


def agreement(label: int, other: int) -> Colour:
    if label < 0 or other < 0:
        return UNKNOWN
    return SAME if label == other else OTHER


def named(label: int, classes: Sequence[str] | None) -> str:
    if label < 0:
        return ""
    return str(label) if classes is None else classes[label]
