"""A ViT's pass over views of several sizes with their tokens in one row, to be measured beside one pass for each size."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.backbones.vit import ViT


def packed_pass(backbone: ViT, pictures: Sequence[Tensor]) -> Tensor:
    """Class tokens of pictures (B_i, 3, H_i, W_i) of each size -> (sum B_i, D), as `backbone` gives them.

    Norms, linear layers and residual sums see all tokens at once, attention the views of one size after the other. For
    networks of learned positions with a class token, without drop path.
    """
    backbone.use_fitting_attention(pictures[0])
    model: Any = backbone.model
    sequences = [backbone.embed(x, None, None, None)[1] for x in pictures]
    shapes = [sequence.shape[:2] for sequence in sequences]
    lengths = [shape.numel() for shape in shapes]
    tokens = torch.cat([sequence.flatten(0, 1) for sequence in sequences])  # (T, D)
    for block in model.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(tokens)).split(lengths)
        mixed = torch.cat([attend(attention, part.unflatten(0, shape)) for part, shape in zip(qkv, shapes)])
        tokens = tokens + block.ls1(attention.proj(mixed))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    tokens = model.norm(tokens)
    return torch.cat([part.unflatten(0, shape)[:, 0] for part, shape in zip(tokens.split(lengths), shapes)])


def attend(attention: Any, qkv: Tensor) -> Tensor:
    """(B, N, 3 D) -> (B N, D), by the kernel that the backbone has chosen."""
    queries, keys, values = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if attention.fused_attn:
        mixed = F.scaled_dot_product_attention(queries, keys, values)
    else:
        mixed = (queries * attention.scale @ keys.transpose(-2, -1)).softmax(-1) @ values
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)
