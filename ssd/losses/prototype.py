"""Cross-entropy between assignments to prototypes: DINO's views, and later patches and clusters.

Given as Scores, the student's logits are never held all at once: with K = 65,536 they and what autograd keeps of them
are the largest tensors of a step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd.batch import Scores
from ssd.precision import product_dtype, sum_dtype

LOGITS_AT_A_TIME = {"cpu": 2**20, "cuda": 2**22}
"""How many logits of Scores a loss holds where no chunk is named: what stays in a processor's cache, and what keeps a
GPU busy for longer than its launch takes."""
SMALLEST_CHUNK = 256
"""Prototypes below which products are slow; so many logits are about as large as the features they come from."""


def cross_view_cross_entropy(
    student: Scores | Tensor, target: Tensor, temperature: float, *, skip_same_view: bool, chunk: int | None = None
) -> Tensor:
    """Cross-entropy of every student view against every target view, averaged over the pairs.

    Student scores or logits (S, B, K) and probabilities (V, B, K) -> (B,), in nats. The first V student
    views are the target's own; `skip_same_view` leaves those V pairs out. Caron et al. 2021, eq. 3.
    Of scores, logits with `chunk` prototypes are held at a time. Targets get no gradient.

    A target row sums to 1, so the pairs of student view s cost n_s logsumexp(z_s) - sum_v <q_v, z_s>:
    the log-normaliser of a view is computed once however many targets it meets.
    """
    if isinstance(student, Scores):
        return chunked_cross_entropy(student, target, temperature, skip_same_view, chunk)
    views = len(student)
    wanted = sum_of_met(target, views, skip_same_view)
    counts = pair_counts(views, len(target), skip_same_view)
    loss = torch.zeros_like(target[0, :, 0])
    for view, count in enumerate(counts):
        logits = student[view].float() / temperature
        loss = loss + count * torch.logsumexp(logits, dim=-1) - (wanted[view] * logits).sum(-1)
    return loss / sum(counts)


def token_cross_entropy(
    student: Scores | Tensor, target: Tensor, temperature: float, *, chunk: int | None = None
) -> Tensor:
    """Cross-entropy of each token's assignment against the target of the same token.

    Student scores or logits (U, K) and probabilities (U, K) -> (U,), in nats. Zhou et al. 2022, eq. 2. Of scores,
    logits with `chunk` prototypes are held at a time. Targets get no gradient.
    """
    if isinstance(student, Scores):
        # one view of the tokens on each side, and the only pair is theirs
        views = Scores(student.features[None], student.prototypes)
        return chunked_cross_entropy(views, target[None], temperature, False, chunk)
    logits = student.float() / temperature
    return torch.logsumexp(logits, dim=-1) - (target * logits).sum(-1)


def entropy(probs: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, in nats; ln K where all prototypes are alike. (..., K) -> (...)"""
    return torch.special.entr(probs).sum(-1)


def pair_counts(student_views: int, target_views: int, skip_same_view: bool) -> list[int]:
    """With how many target views each student view is compared."""
    return [target_views - (skip_same_view and view < target_views) for view in range(student_views)]


def sum_of_met(rows: Tensor, views: int, skip_same_view: bool) -> Tensor:
    """For each of one side's `views` the sum of the other side's rows that it is compared with.

    (n, ...) -> (views, ...). The same for either side, for a pair belongs to both.
    """
    met = rows.sum(0).expand(views, *rows.shape[1:])
    if not skip_same_view:
        return met
    own = min(len(rows), views)
    return torch.cat([met[:own] - rows[:own], met[own:]])


# ---------------------------------------------------------------------- without the logits


def chunked_cross_entropy(
    scores: Scores, target: Tensor, temperature: float, skip_same_view: bool, chunk: int | None
) -> Tensor:
    """`cross_view_cross_entropy` of Scores with features (S, B, d)."""
    features, prototypes = scores.features, scores.prototypes
    if chunk is None:
        wanted = LOGITS_AT_A_TIME.get(features.device.type, 2**22)
        chunk = max(SMALLEST_CHUNK, wanted // max(1, features.shape[:2].numel()))
    return ChunkedCrossEntropy.apply(
        features, prototypes, target, temperature, skip_same_view, chunk, product_dtype(features)
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Features (S, B, d), prototypes (K, d), targets (V, B, K) -> (B,), with the logits of a chunk of prototypes at a time.

    With x the features over the temperature, w the prototypes, z = x w^T, P pairs in all, n_s of them of student view s,
    and g the upstream gradient of a sample:

        loss = 1/P sum_s (n_s logsumexp(z_s) - sum_v <q_v, z_s>)         v over the targets that s is compared with
        dx_s = g/P (n_s softmax(z_s) w - sum_v q_v w)
        dw = sum_b g/P (sum_s n_s softmax(z_s)^T x_s - sum_v q_v^T sum_s x_s)

    <q, z> is <q w, x>: a target meets the prototypes once, in d numbers, where each of its pairs would in K. The forward
    pass keeps logsumexp; the backward pass makes the logits again. That is one product in five, for which nothing
    that is K wide is kept and each prototype's gradient is written once, with any upstream gradient.
    """

    @staticmethod
    def forward(ctx, features, prototypes, target, temperature, skip_same_view, chunk, dtype):
        views, target_views = len(features), len(target)
        pairs = sum(pair_counts(views, target_views, skip_same_view))
        rows = (features / temperature).to(dtype)  # (S, B, d)
        weight, target_rows = prototypes.to(dtype), target.flatten(0, 1)
        log_normalisers = []
        pulled = rows.new_zeros(*target.shape[:2], rows.shape[2], dtype=sum_dtype(dtype))
        with torch.autocast(rows.device.type, enabled=False):
            for place, logits, _ in logits_in_turn(rows.flatten(0, 1), weight, chunk):
                highest = logits.amax(1)
                log_normalisers.append(logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest))
                pulled.flatten(0, 1).add_(target_rows[:, place].to(dtype) @ weight[place])
            log_normaliser = torch.stack(log_normalisers).logsumexp(0).unflatten(0, rows.shape[:2])  # (S, B)
            pull = sum_of_met(pulled, views, skip_same_view)  # (S, B, d)
            counts = sum_of_met(log_normaliser.new_ones(target_views, 1), views, skip_same_view)  # (S, 1)
            loss = (counts * log_normaliser - (rows * pull).sum(-1)).sum(0) / pairs
        ctx.save_for_backward(rows, weight, target, log_normaliser, pull, counts / pairs)
        ctx.settings = temperature, skip_same_view, chunk, pairs
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        rows, weight, target, log_normaliser, pull, shares = ctx.saved_tensors
        temperature, skip_same_view, chunk, pairs = ctx.settings
        dtype, target_rows = rows.dtype, target.flatten(0, 1)
        of_rows, of_weight = torch.zeros_like(pull), torch.empty_like(weight)
        with torch.autocast(rows.device.type, enabled=False):
            pushing = (rows * (upstream * shares)[..., None]).to(dtype).flatten(0, 1)  # (S B, d)
            met = sum_of_met(rows * (upstream / -pairs)[:, None], len(target), skip_same_view)
            pulling = met.to(dtype).flatten(0, 1)  # (V B, d)
            for place, logits, room in logits_in_turn(rows.flatten(0, 1), weight, chunk):
                probs = room.copy_(logits.sub_(log_normaliser.flatten()[:, None]).exp_())
                of_rows.flatten(0, 1).add_(probs @ weight[place])
                torch.mm(probs.T, pushing, out=of_weight[place])
                of_weight[place].addmm_(target_rows[:, place].to(dtype).T, pulling)
            of_rows = (
                of_rows.mul_(shares[..., None]).sub_(pull, alpha=1 / pairs).mul_((upstream / temperature)[:, None])
            )
        return of_rows, of_weight, *[None] * 5


def logits_in_turn(rows: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """rows (R, d) times a chunk of weight (K, d) after the other: where in K it lies, its logits (R, chunk) for sums, and
    room for as many numbers in the dtype of products. Both are written over by the next chunk: memory that is taken
    anew for each chunk costs more than what is computed in it."""
    products = rows.new_empty(len(rows) * min(chunk, len(weight)))
    sums = products.to(sum_dtype(rows.dtype))
    for first in range(0, len(weight), chunk):
        part = weight[first : first + chunk]
        count = len(rows) * len(part)
        room, logits = (space[:count].view(len(rows), len(part)) for space in (products, sums))
        torch.mm(rows, part.T, out=room)
        yield slice(first, first + chunk), logits.copy_(room), room
