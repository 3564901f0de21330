"""Cross-entropy between assignments to prototypes: DINO's views, and later patches and clusters."""

import torch
from torch import Tensor

from ssd.batch import Scores


def cross_view_cross_entropy(
    student: Scores | Tensor, target: Tensor, temperature: float, *, skip_same_view: bool
) -> Tensor:
    """Cross-entropy of every student view against every target view, averaged over the pairs.

    Student scores or logits (S, B, K) and probabilities (V, B, K) -> (B,), in nats. The first V student
    views are the target's own; `skip_same_view` leaves those V pairs out. Caron et al. 2021, eq. 3.

    A target row sums to 1, so the pairs of student view s cost n_s logsumexp(z_s) - sum_v <q_v, z_s>:
    the log-normaliser of a view is computed once however many targets it meets, and only one view's
    logits are held in float32 at a time.
    """
    student_views, target_views = len(student.features if isinstance(student, Scores) else student), len(target)
    everything = target.sum(0)
    loss = torch.zeros_like(target[0, :, 0])
    for view in range(student_views):
        logits = (student[view].logits() if isinstance(student, Scores) else student[view]).float() / temperature
        same = skip_same_view and view < target_views
        wanted = everything - target[view] if same else everything
        count = target_views - 1 if same else target_views
        loss = loss + count * torch.logsumexp(logits, dim=-1) - (wanted * logits).sum(-1)
    pairs = student_views * target_views - (min(student_views, target_views) if skip_same_view else 0)
    return loss / pairs


def token_cross_entropy(student: Scores | Tensor, target: Tensor, temperature: float, *, chunk: int = 8192) -> Tensor:
    """Cross-entropy of each token's assignment against the target of the same token.

    Student scores or logits (U, K) and probabilities (U, K) -> (U,), in nats. Zhou et al. 2022, eq. 2. No more than
    `chunk` tokens' logits are held in float32 at a time.
    """
    losses = []
    for first in range(0, len(target), chunk):
        rows = slice(first, first + chunk)
        logits = (student[rows].logits() if isinstance(student, Scores) else student[rows]).float() / temperature
        losses.append(torch.logsumexp(logits, dim=-1) - (target[rows] * logits).sum(-1))
    return torch.cat(losses)


def entropy(probs: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, in nats; ln K where all prototypes are alike. (..., K) -> (...)"""
    return torch.special.entr(probs).sum(-1)
