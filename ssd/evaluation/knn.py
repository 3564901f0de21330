"""Weighted k-nearest-neighbour classification by cosine similarity, exact, in chunks of queries.

The protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
CVPR 2018, section 3.4, which DINO and its successors report: each of the k nearest training
samples votes for its class with weight exp(similarity / temperature).
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.protocol import check_finite, check_labels, count_classes, top1

SCORES_AT_ONCE = 2**24
"""Similarities held at a time, unless a chunk is given: 64 MiB. A chunk has at least `FEWEST_QUERIES`."""
FEWEST_QUERIES = 32
SEARCHES = ("auto", "float32", "bfloat16")
GROUP = 4
"""Columns of which the largest similarity is looked at first."""


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    center: bool = False,
    chunk: int | None = None,
    search: str = "auto",
) -> dict[int, Tensor]:
    """The class of each query for each k. (N, D), (N,) and (Q, D) -> {k: (Q,) int64}.

    `center` subtracts the bank's mean from both before they are brought to unit length. A k above N
    uses all N neighbours, with a warning. `chunk` is the number of queries compared at a time, which
    changes memory but no result. `search="bfloat16"` finds candidates with a product in bfloat16 and
    compares them in float32; queries whose neighbours that does not prove are searched in float32, so
    that the neighbours are the same either way. "auto" takes the faster, see `faster_search`. Ties between
    votes go to the lower class.
    """
    check_labels("k-NN", bank=bank_labels)
    check_finite(bank=bank, query=queries)
    if not k or min(k) < 1:
        raise UserError(f"k = {list(k)} names no number of neighbours; give one or more, each at least 1.")
    if temperature <= 0:
        raise UserError(f"temperature = {temperature} of k-NN must be above 0; the usual value is 0.07.")
    if search not in SEARCHES:
        raise UserError(f"search = '{search}' is unknown; choose one of {', '.join(SEARCHES)}.")
    if max(k) > len(bank):
        warnings.warn(f"the bank has {len(bank)} samples: k = {max(k)} of k-NN uses all of them.", stacklevel=2)
    num_classes = num_classes or count_classes(bank_labels)
    bank, queries = unit_vectors(bank, queries, center)
    neighbours = min(max(k), len(bank))
    chunk = chunk or max(FEWEST_QUERIES, SCORES_AT_ONCE // len(bank))
    if search == "auto":
        search = faster_search(bank, len(queries), neighbours)
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


def faster_search(bank: Tensor, queries: int, count: int) -> str:
    """ "bfloat16" where the processor multiplies in it and the bank is large beside the candidates, else "float32".

    With AMX the search in bfloat16 takes 0.6 of the time of the one in float32 in a bank of 50,000, and as long in one
    of 5,000. A GPU searches in float32, where finding the neighbours costs more than the product.
    """
    worth_it = len(bank) >= max(8192, 32 * count) and queries >= FEWEST_QUERIES
    return "bfloat16" if bank.device.type == "cpu" and worth_it and multiplies_bfloat16() else "float32"


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without them the product is slower than in float32."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not say
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def in_float32(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarity and index of the `count` nearest bank vectors, nearest first. (q, D), (N, D) -> (q, count) twice."""
    similarity, index = largest(queries @ bank.T, count)
    similarity, order = similarity.sort(dim=1, descending=True)
    return similarity, index.gather(1, order)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places, in no order. (q, N) -> (q, count) twice.

    The largest are in those groups of columns that have the largest maxima, so that only these are sorted: on a
    CPU that takes a third of the time of sorting whole rows.
    """
    width = scores.shape[1] // GROUP  # of the groups i, i + width, i + 2 width, ..., the rest is looked at whole
    if scores.device.type != "cpu" or width < 2 * count:
        return scores.topk(count, dim=1, sorted=False)
    maxima = scores[:, : width * GROUP].unflatten(1, (GROUP, width)).amax(1)
    groups = largest(maxima, count)[1]  # (q, count)
    first = torch.arange(0, width * GROUP, width, device=scores.device)
    places = (groups[:, None] + first[:, None]).flatten(1)
    if width * GROUP < scores.shape[1]:
        rest = torch.arange(width * GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
        places = torch.cat([places, rest], dim=1)
    values, chosen = scores.gather(1, places).topk(count, dim=1, sorted=False)
    return values, places.gather(1, chosen)


class InBfloat16:
    """The same neighbours as `in_float32`, from a product in bfloat16.

    Candidates are found by the product of the query with what tells the bank's vectors from their mean, which ranks
    them as the similarity does and is rounded less. Rounding changes it by at most the lengths of what it removes
    (Cauchy-Schwarz). So where the exact similarity of the last neighbour kept exceeds that of the last
    candidate by more than that, nothing outside the candidates can be nearer.
    """

    def __init__(self, bank: Tensor):
        self.mean = bank.mean(0)
        rest = bank - self.mean
        rounded = rest.bfloat16()
        self.rounded = rounded.T.contiguous()  # (D, N): the faster layout
        self.reach = largest_norm(rest)
        self.removed = largest_norm(rest.sub_(rounded))
        self.scores = self.rounded.new_empty(0, len(bank))
        self.asked = self.repeated = 0

    def __call__(self, queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self.repeated > self.asked // 4:  # so close together that rounding hides who is nearer
            return in_float32(queries, bank, count)
        candidates = min(len(bank), count + 12 + count // 4)
        rounded = queries.bfloat16()
        if len(self.scores) < len(queries):  # one for all chunks: fresh memory costs as much as the product
            self.scores = self.rounded.new_empty(len(queries), len(bank))
        scores = torch.mm(rounded, self.rounded, out=self.scores[: len(queries)])
        coarse, index = largest(scores, candidates)
        exact = products(queries, bank, index)  # (q, candidates)
        similarity, order = exact.topk(count, dim=1)
        index = index.gather(1, order)
        if candidates < len(bank):
            last = coarse.amin(1).float()
            removed = (queries - rounded).norm(dim=1)
            half_place = 2**-9 * 2.0 ** last.frexp().exponent  # of bfloat16's 8 bits
            # of both roundings, of the product's, and of sums in float32
            error = removed * (self.reach + self.removed) + self.removed + half_place + 1e-5
            unproven = (similarity[:, -1] < queries @ self.mean + last + error).nonzero().squeeze(1)
            self.asked += len(queries)
            self.repeated += len(unproven)
            if len(unproven):
                similarity[unproven], index[unproven] = in_float32(queries[unproven], bank, count)
        return similarity, index


def largest_norm(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1).max()


def products(queries: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Products of each query with its own choice of bank vectors. (q, D), (N, D), (q, k) -> (q, k)"""
    if queries.device.type != "cpu":
        return torch.bmm(bank[index], queries[:, :, None]).squeeze(2)
    # on a CPU the chosen vectors are read where they lie, which takes a seventh of the time of collecting them
    rows = torch.arange(0, index.numel() + 1, index.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        places = torch.sparse_csr_tensor(
            rows, index.flatten(), torch.zeros(index.numel()), (len(queries), len(bank)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(places, queries, bank.T, beta=0).values().unflatten(0, index.shape)
