"""How the tokens of a picture relate to each other inside an attention, and how far two networks differ in that.

Of queries, keys and values as `ViT` taps them ("block3.qkv"). Pure functions; distributions and divergences in float32.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.errors import UserError

KINDS = {"qk": (0, 1), "kk": (1, 1), "vv": (2, 2)}
"""What is compared with what: queries with keys, which is the attention itself, keys with keys, values with values."""


def compared(qkv: Tensor, kind: str, num_heads: int) -> Tensor:
    """What a relation of this kind multiplies, in `num_heads` heads: (3, B, h, n, d) -> (2, B, num_heads, n, d').

    Where the numbers differ, heads are put side by side and cut anew (Wang et al. 2021, MiniLMv2, section 3.1). Raises
    UserError for a kind that is none of `KINDS`, or heads that do not divide the width.
    """
    if kind not in KINDS:
        raise UserError(f"relation: '{kind}' is unknown. Choose one of {', '.join(KINDS)}.")
    width = qkv.shape[2] * qkv.shape[4]
    if width % num_heads:
        raise UserError(f"relation_heads: {num_heads} do not divide a width of {width}. Use a divisor.")
    pair = qkv[list(KINDS[kind])]
    if qkv.shape[2] == num_heads:
        return pair
    return pair.transpose(2, 3).flatten(3).unflatten(3, (num_heads, -1)).transpose(2, 3)


def relation_logits(pair: Tensor) -> Tensor:
    """Dot products over the root of their dimensions: (2, B, h, n, d) -> (B, h, n, n). Vaswani et al. 2017, eq. 1"""
    first, second = pair.float()
    with torch.autocast(pair.device.type, enabled=False):
        return first @ second.mT / math.sqrt(pair.shape[-1])


def relation_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher | student), in nats, of each token's relations: logits (..., n, n) -> (..., n).

    Tokens that were dropped are taken out of the teacher's rows and columns before this, so that what is left of its
    relations sums to 1.
    """
    log_probs, target = torch.log_softmax(student.float(), dim=-1), torch.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1)
