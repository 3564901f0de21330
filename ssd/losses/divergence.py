"""How far apart two assignments to prototypes are, where cross-entropies would round the difference away."""

import torch
from torch import Tensor

from ssd.batch import Scores


def divergence(student: Scores | Tensor, target_log_probs: Tensor, temperature: float) -> Tensor:
    """KL(q | p), in nats: of student scores or logits (V, B, K) from log probabilities (V, B, K), view by view.

    -> (V, B). Its gradient is that of the cross-entropy of the same targets, which it differs from by their
    entropy (Sarnthein et al. 2023, section 3). One view's logits are held at a time.
    """
    rows = []
    for view, target in enumerate(target_log_probs):
        logits = student[view].logits() if isinstance(student, Scores) else student[view]
        difference = target - torch.log_softmax(logits.to(target.dtype) / temperature, dim=-1)
        rows.append((target.exp() * difference).sum(-1))
    return torch.stack(rows)


def drawn_divergence(student: Scores | Tensor, classes: Tensor, entropy: Tensor, temperature: float) -> Tensor:
    """An unbiased estimate of `divergence` from classes that were drawn by the target's probabilities, and so of its gradient.

    Scores or logits (V, B, K), classes (V, B, draws), the targets' entropy (V, B), nats -> (V, B): minus the mean log probability
    of what was drawn, less the entropy. May be below 0. Anshumann et al. 2025, section 3, with even weights.
    """
    rows = []
    for view, drawn in enumerate(classes):
        logits = student[view].logits() if isinstance(student, Scores) else student[view]
        log_probs = torch.log_softmax(logits.to(entropy.dtype) / temperature, dim=-1)
        rows.append(-log_probs.gather(-1, drawn).mean(-1) - entropy[view])
    return torch.stack(rows)
