"""Cross-entropy between assignments to prototypes: DINO's views, and later patches and clusters.

Given as Scores, the student's logits are never held all at once: with K = 65,536 they and what autograd keeps of them
are the largest tensors of a step.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd.batch import Scores

LOGITS_AT_A_TIME = 2**23
"""How many logits of Scores a loss holds where no chunk is named: 32 MiB in float32."""


def cross_view_cross_entropy(
    student: Scores | Tensor, target: Tensor, temperature: float, *, skip_same_view: bool, chunk: int | None = None
) -> Tensor:
    """Cross-entropy of every student view against every target view, averaged over the pairs.

    Student scores or logits (S, B, K) and probabilities (V, B, K) -> (B,), in nats. The first V student
    views are the target's own; `skip_same_view` leaves those V pairs out. Caron et al. 2021, eq. 3.
    Of scores, no more than `chunk` rows' logits are held at a time. Targets get no gradient.

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

    Student scores or logits (U, K) and probabilities (U, K) -> (U,), in nats. Zhou et al. 2022, eq. 2. Of scores, no
    more than `chunk` tokens' logits are held at a time. Targets get no gradient.
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
        chunk = max(1, LOGITS_AT_A_TIME // len(prototypes))
    learns = torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad)
    dtype = product_dtype(features)
    return ChunkedCrossEntropy.apply(features, prototypes, target, temperature, skip_same_view, chunk, dtype, learns)


def product_dtype(features: Tensor) -> torch.dtype:
    """What autocast would multiply in, except float16, where a probability of 1 / K has lost most of its digits."""
    dtype, kind = features.dtype, features.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return torch.float32 if dtype == torch.float16 else dtype


class ChunkedCrossEntropy(torch.autograd.Function):
    """Features (S, B, d), prototypes (K, d), targets (V, B, K) -> (B,), with the logits of one chunk of rows at a time.

    With x the features over the temperature, w the prototypes, z = x w^T, P pairs in all and n_s of student view s:

        loss = 1/P sum_s (n_s logsumexp(z_s) - sum_v <q_v, z_s>)        v over the targets that s is compared with
        dloss/dx_s = 1/P (n_s softmax(z_s) w - sum_v q_v w)
        dloss/dw = 1/P (sum_s n_s softmax(z_s)^T x_s - sum_v q_v^T sum_s x_s)

    <q, z> is <q w, x>: a target meets the prototypes once, in d numbers, where each of its pairs would in K.

    Gradients are made beside the loss, of the same softmax and for an upstream gradient of 1. That of a sum over samples
    is one number for all of them, with which they are then multiplied. For any other, and for a second backward pass,
    the logits are made again and their rows weighted.
    """

    @staticmethod
    def forward(ctx, features, prototypes, target, temperature, skip_same_view, chunk, dtype, learns):
        rows = (features / temperature).to(dtype)  # (S, B, d)
        weight = prototypes.to(dtype)
        upstream = rows.new_ones(rows.shape[1], dtype=exact(dtype)) if learns else None
        with torch.autocast(rows.device.type, enabled=False):
            loss, ctx.gradients = compare(rows, weight, target, skip_same_view, chunk, upstream)
        ctx.save_for_backward(rows, weight, target)
        ctx.settings = temperature, skip_same_view, chunk
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        rows, weight, target = ctx.saved_tensors
        temperature, skip_same_view, chunk = ctx.settings
        gradients, ctx.gradients = ctx.gradients, None
        with torch.autocast(rows.device.type, enabled=False):
            if gradients is not None and (len(upstream) == 1 or upstream.stride(0) == 0):
                # one number for all samples, which a stride of 0 says without a look at the values
                for gradient in gradients:
                    gradient.mul_(upstream[0])
            else:
                _, gradients = compare(rows, weight, target, skip_same_view, chunk, upstream)
        of_rows, of_weight = gradients
        return of_rows.div_(temperature), of_weight, *[None] * 6


def exact(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums of products of this dtype are in."""
    return torch.promote_types(dtype, torch.float32)


def compare(
    rows: Tensor, weight: Tensor, target: Tensor, skip_same_view: bool, chunk: int, upstream: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The loss (B,) of features over the temperature (S, B, d), and with upstream (B,) its gradients, as
    `ChunkedCrossEntropy` writes them, to rows and weight."""
    views, met_views, dtype = len(rows), len(target), exact(rows.dtype)
    pairs = sum(pair_counts(views, met_views, skip_same_view))
    counts = sum_of_met(rows.new_ones(met_views, 1, dtype=dtype), views, skip_same_view)  # (S, 1)
    pulled = torch.cat([part.to(rows.dtype) @ weight for part in target.flatten(0, 1).split(chunk)])
    pulled = sum_of_met(pulled.to(dtype).unflatten(0, target.shape[:2]), views, skip_same_view)  # (S, B, d)

    share = None if upstream is None else upstream / pairs  # (B,)
    row_weight = None if share is None else (counts * share).flatten()
    log_normalisers, gradients = normalisers(rows.flatten(0, 1), weight, chunk, row_weight)
    costs = counts * log_normalisers.unflatten(0, rows.shape[:2]) - (rows * pulled).sum(-1)  # (S, B)
    loss = costs.sum(0) / pairs
    if share is None or gradients is None:
        return loss, None

    of_rows, of_weight = gradients
    of_rows = of_rows.unflatten(0, rows.shape[:2]).addcmul_(pulled, share[:, None], value=-1)
    pushing = sum_of_met(rows * share[:, None], met_views, skip_same_view)  # (V, B, d)
    for part, push in zip(target.flatten(0, 1).split(chunk), pushing.flatten(0, 1).split(chunk)):
        add_product(of_weight, part.to(rows.dtype).T, -push.to(rows.dtype))
    return loss, (of_rows, of_weight)


def normalisers(
    rows: Tensor, weight: Tensor, chunk: int, row_weight: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """logsumexp of each row of rows weight^T, and where rows are weighted the gradients of its weighted sum.

    (R, d), (K, d) -> (R,), (R, d), (K, d).
    """
    if row_weight is None:
        return torch.cat([normalise(part, weight)[0] for part in rows.split(chunk)]), None
    of_weight = torch.zeros_like(weight, dtype=exact(weight.dtype))
    found, of_rows = [], []
    for part, share in zip(rows.split(chunk), row_weight[:, None].split(chunk)):
        log_normaliser, probs = normalise(part, weight)
        found.append(log_normaliser)
        of_rows.append((probs @ weight).to(of_weight.dtype) * share)
        add_product(of_weight, probs.T, (part * share).to(part.dtype))
        del probs  # before the next are made
    return torch.cat(found), (torch.cat(of_rows), of_weight)


def normalise(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp and softmax of rows weight^T, the latter in the dtype of its next product. (R,), (R, K)"""
    logits = (rows @ weight.T).to(exact(rows.dtype))
    highest = logits.amax(1)
    probs = torch.softmax(logits, 1, out=logits)
    # the likeliest prototype's probability is 1 over the sum of exponentials, which softmax keeps to itself
    return highest - probs.amax(1).log(), probs.to(rows.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, whatever dtype total keeps."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
