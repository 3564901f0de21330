"""Gradients of what is trained: by name, by length, and which of them are no numbers."""

import torch
from torch import Tensor, nn

from ssd.distributed import is_sharded, own_part, sum_over_ranks
from ssd.optim import Optimized

BESIDE_BACKBONE = ("mask_token", "local_norm")  # what a network holds for its backbone, so that exports stay plain


def part_of(name: str) -> str:
    """Which of a network's parts a parameter belongs to: backbone, or one of the heads."""
    part = name.partition(".")[0]
    return "backbone" if part in BESIDE_BACKBONE else part


def not_finite_gradients(plans: list[Optimized], norms: list[Tensor]) -> tuple[str, ...]:
    """Names of the parameters whose gradients are not finite, in the order in which they are computed from the loss."""
    found = []
    for plan, plan_norms in zip(plans, norms, strict=True):
        names, _ = trained_gradients(plan.module)
        found += [name for name, finite in zip(names, plan_norms.isfinite().tolist(), strict=True) if not finite]
    return tuple(reversed(found))


def trained_gradients(module: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and gradients of the parameters that have one; of sharded ones what this rank holds."""
    pairs = [(name, own_part(p.grad)) for name, p in module.named_parameters() if p.grad is not None]
    return [name for name, _ in pairs], [gradient for _, gradient in pairs]


def gradient_norms(module: nn.Module) -> Tensor:
    """(P,) L2 norm of each gradient, in the order of `trained_gradients`; of the whole where it is sharded."""
    _, gradients = trained_gradients(module)
    norms = torch.stack(torch._foreach_norm(gradients))
    sharded = [is_sharded(p.grad) for p in module.parameters() if p.grad is not None]
    if not any(sharded):
        return norms
    if not all(sharded):
        raise ValueError("a network is sharded as a whole or not at all")
    return sum_over_ranks(norms.square()).sqrt()
