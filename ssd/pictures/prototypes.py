"""What prototypes stand for: the samples, or the patches, that score highest for each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssd.batch import Scores, Tokens
from ssd.errors import UserError
from ssd.evaluation.knn import SCORES_AT_ONCE
from ssd.heads import Branch
from ssd.patch_heads import PatchBranch
from ssd.pictures.layout import Cell, table

AROUND = 3  # patches, rows and columns, of which the one that is meant is shown
OUTLINE = np.array([255, 200, 0], np.uint8)


class Shown(NamedTuple):
    """Of some prototypes: their numbers (P,), the share of rows that each is the best of (P,), and their best rows (P, k)."""

    numbers: Tensor
    shares: Tensor
    rows: Tensor


def answers_of(network: nn.Module, tokens: Tokens) -> tuple[Scores, str]:
    """What a network's head says of tokens, row by row, and what a row is: "patches" where it has prototypes for them, else
    "samples". Of nested heads the widest. Raises UserError for a network without prototypes.
    """
    patches = tokens.patches.flatten(0, 1)
    answers: Any = None
    if isinstance(network, PatchBranch):
        own = network.patch_head
        answers = network.head(tokens.pooled()[None], patches)[1] if own is None else own(patches)
    elif isinstance(network, Branch):
        answers = network.head(tokens.pooled())
    if isinstance(answers, list):
        answers = answers[-1]
    if not isinstance(answers, Scores):
        raise UserError("the method has no prototypes to show. Ask for neighbours, which every network has.")
    return answers, "patches" if isinstance(network, PatchBranch) else "samples"


def most_used(scores: Scores, prototypes: int, count: int, together: int = 1) -> Shown:
    """The prototypes that most rows of features (N, d) score highest for, and the rows that score highest for them.

    A row counts for its best prototype alone, so that prototypes which lie close together do not show the same rows. Of
    `together` neighbouring rows, the patches of one picture, a prototype shows one. Where fewer rows are left for it than
    asked for, the rest are -1.
    """
    rows = max(1, SCORES_AT_ONCE // len(scores.prototypes))
    best = torch.cat([(part @ scores.prototypes.T).argmax(1) for part in scores.features.split(rows)])
    used = best.bincount(minlength=len(scores.prototypes))
    numbers = used.argsort(descending=True, stable=True)[: min(prototypes, int((used > 0).sum()))]
    values = (scores.features @ scores.prototypes[numbers].T).float()
    values = torch.where(best[:, None] == numbers, values, float("-inf")).T.unflatten(1, (-1, together))
    of_samples, place = values.max(2)  # (P, N / together)
    highest, samples = of_samples.topk(min(count, of_samples.shape[1]), dim=1)
    found = samples * together + place.gather(1, samples)
    return Shown(numbers, used[numbers] / len(best), torch.where(highest.isfinite(), found, -1))


def prototype_sheet(shown: Shown, pictures: Sequence[Sequence[np.ndarray]], what: str, cell: int = 80) -> Image.Image:
    """One row a prototype: pictures (h, w, 3) uint8 of its best rows; `what` is what rows are, in the plural."""
    rows = [[Cell(picture) for picture in found] for found in pictures]
    titles = [
        f"prototype {number}: best of {100 * share:.1f} % of the {what}"
        for number, share in zip(shown.numbers.tolist(), shown.shares.tolist(), strict=True)
    ]
    return table(rows, titles=titles, cell=cell)


def patch_in_place(picture: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8 -> the patch of this number, counted by rows, outlined among those around it."""
    sides = [picture.shape[axis] / grid[axis] for axis in (0, 1)]
    large = max(1, round(24 / min(sides)))  # pixels for one, so that an outline hides nothing
    spans, edges = [], []
    for place, count, side in zip(divmod(patch, grid[1]), grid, sides, strict=True):
        width = min(AROUND, count)
        first = min(max(0, place - width // 2), count - width)
        spans.append(slice(round(first * side), round((first + width) * side)))
        edges.append((round((place - first) * side * large), round((place - first + 1) * side * large) - 1))
    cut = picture[spans[0], spans[1]].repeat(large, 0).repeat(large, 1)
    (top, bottom), (left, right) = edges
    cut[[top, bottom], left : right + 1] = OUTLINE
    cut[top : bottom + 1, [left, right]] = OUTLINE
    return cut
