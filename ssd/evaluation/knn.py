"""Weighted k-nearest-neighbour classification by cosine similarity, exact, in chunks of queries.

The protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
CVPR 2018, section 3.4, which DINO and its successors report: each of the k nearest training
samples votes for its class with weight exp(similarity / temperature).
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.protocol import check_finite, check_labels, count_classes, top1

SCORES_AT_ONCE = 2**24
"""Similarities held at a time, unless a chunk is given: 64 MiB."""


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    center: bool = False,
    chunk: int | None = None,
    search: str = "float32",
) -> dict[int, Tensor]:
    """The class of each query for each k. (N, D), (N,) and (Q, D) -> {k: (Q,) int64}.

    `center` subtracts the bank's mean from both before they are brought to unit length. A k above N
    uses all N neighbours, with a warning. `chunk` is the number of queries compared at a time, which
    changes memory but no result. `search="bfloat16"` finds candidates with a product in bfloat16 and
    compares them in float32; queries whose neighbours that does not prove are searched in float32, so
    that the neighbours are the same either way. Ties between votes go to the lower class.
    """
    check_labels("k-NN", bank=bank_labels)
    check_finite(bank=bank, query=queries)
    if not k or min(k) < 1:
        raise UserError(f"k = {list(k)} names no number of neighbours; give one or more, each at least 1.")
    if temperature <= 0:
        raise UserError(f"temperature = {temperature} of k-NN must be above 0; the usual value is 0.07.")
    if search not in ("float32", "bfloat16"):
        raise UserError(f"search = '{search}' is unknown; choose float32 or bfloat16.")
    if max(k) > len(bank):
        warnings.warn(f"the bank has {len(bank)} samples: k = {max(k)} of k-NN uses all of them.", stacklevel=2)
    num_classes = num_classes or count_classes(bank_labels)
    bank, queries = unit_vectors(bank, queries, center)
    neighbours = min(max(k), len(bank))
    chunk = chunk or max(1, SCORES_AT_ONCE // len(bank))
    find = in_float32 if search == "float32" else InBfloat16(bank)
    predictions: dict[int, list[Tensor]] = {number: [] for number in k}
    for part in queries.split(chunk):
        similarity, index = find(part, bank, neighbours)  # (q, k), nearest first
        nearest = similarity[:, :1]
        weight = ((similarity - nearest).double() / temperature).exp()  # the largest is 1: no overflow
        votes = weight.new_zeros(len(part), num_classes)
        counted = 0
        for number in sorted(set(k)):
            votes.scatter_add_(1, bank_labels[index[:, counted:number]], weight[:, counted:number])
            counted = min(number, neighbours)
            predictions[number].append(votes.argmax(1))
    return {number: torch.cat(parts) for number, parts in predictions.items()}


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: Sequence[int] = (10, 20, 100, 200),
    num_classes: int | None = None,
    **settings,
) -> dict[int, float]:
    """Share of queries whose class is predicted, in [0, 1], for each k; `settings` are those of `knn_predict`."""
    check_labels("k-NN", bank=bank_labels, query=query_labels)
    num_classes = num_classes or count_classes(bank_labels, query_labels)
    predictions = knn_predict(bank, bank_labels, queries, k, num_classes=num_classes, **settings)
    return {number: top1(predicted, query_labels, num_classes) for number, predicted in predictions.items()}


def unit_vectors(bank: Tensor, queries: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Both at unit length in float32, after the bank's mean is taken off where `center`."""
    bank, queries = bank.float(), queries.float()
    if center:
        mean = bank.mean(0)
        bank, queries = bank - mean, queries - mean
    return F.normalize(bank, dim=1), F.normalize(queries, dim=1)


def in_float32(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarity and index of the `count` nearest bank vectors, nearest first. (q, D), (N, D) -> (q, count) twice."""
    similarity, index = (queries @ bank.T).topk(count, dim=1)
    return similarity, index


class InBfloat16:
    """The same neighbours as `in_float32`, from a product in bfloat16.

    A product of unit vectors changes by at most the lengths of what rounding removes from them
    (Cauchy-Schwarz). So where the exact similarity of the last neighbour kept exceeds the rounded
    similarity of the last candidate by more than that, nothing outside the candidates can be nearer.
    """

    def __init__(self, bank: Tensor):
        self.rounded = bank.bfloat16()
        self.removed = (self.rounded.float() - bank).norm(dim=1).max()

    def __call__(self, queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
        candidates = min(len(bank), count + 12 + count // 4)
        rounded = queries.bfloat16()
        coarse, index = (rounded @ self.rounded.T).topk(candidates, dim=1, sorted=False)
        exact = torch.bmm(bank[index], queries[:, :, None]).squeeze(2)  # (q, candidates)
        similarity, order = exact.topk(count, dim=1)
        index = index.gather(1, order)
        if candidates < len(bank):
            last = coarse.float().amin(1)
            removed = (rounded.float() - queries).norm(dim=1)
            error = removed + (1 + removed) * self.removed + 2**-8 * last.abs() + 1e-5
            unproven = (similarity[:, -1] < last + error).nonzero().squeeze(1)
            if len(unproven):
                similarity[unproven], index[unproven] = in_float32(queries[unproven], bank, count)
        return similarity, index
