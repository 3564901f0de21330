"""Losses that tell one target from many others."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd.losses.prototype import LOGITS_AT_A_TIME
from ssd.precision import product_dtype


def queue_contrast(
    student: Tensor,
    target: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-ln of the share that the target has among itself and the negatives, by similarity over the temperature.

    (n, d), (n, d) and (K, d), all of unit length -> (n,), in nats. Only negatives that are `valid` (K,) count. The logits of
    `chunk` rows are held at a time, and none are kept for the backward pass. Targets and negatives get no gradient.
    van den Oord et al. 2018, arXiv 1807.03748, with the negatives of He et al. 2020.
    """
    if chunk is None:
        chunk = max(1, LOGITS_AT_A_TIME.get(student.device.type, 2**22) // len(negatives))
    bias = None if valid is None else torch.zeros_like(valid, dtype=torch.float32).masked_fill_(~valid, -torch.inf)
    return QueueContrast.apply(student, target, negatives, bias, temperature, chunk, product_dtype(student))


class QueueContrast(torch.autograd.Function):
    """With x a row of the student, y its target, n_k the negatives, t the temperature and Z the sum of all exponentials:

        loss = ln Z - x y / t
        dx = (sum_k exp(x n_k / t) n_k / Z + exp(x y / t) y / Z - y) / t

    A gradient is d numbers, so it is made beside the loss while its row's logits are there.
    """

    @staticmethod
    def forward(ctx, student, target, negatives, bias, temperature, chunk, dtype):
        losses, gradients = [], []
        columns = negatives.to(dtype)
        with torch.autocast(student.device.type, enabled=False):
            for x, y in zip(student.split(chunk), target.split(chunk), strict=True):
                x, y = x.float(), y.float()
                positive = (x * y).sum(-1) / temperature
                logits = (x.to(dtype) @ columns.T).float().div_(temperature)
                if bias is not None:
                    logits.add_(bias)
                normaliser = torch.logaddexp(logits.logsumexp(-1), positive)
                losses.append(normaliser - positive)
                shares = logits.sub_(normaliser[:, None]).exp_().to(dtype)
                pull = torch.expm1(positive - normaliser)[:, None] * y  # share of the target less 1
                gradients.append(((shares @ columns).float() + pull) / temperature)
        ctx.save_for_backward(torch.cat(gradients).to(student.dtype))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), *[None] * 6
