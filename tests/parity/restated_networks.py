"""Vision transformers and heads as functions of a table of weights, in plain matrix products and float64."""

import math

import torch
from torch.nn import functional as F

from ssd.parity.inputs import weights

WIDTH, HEADS, DEPTH, PATCH, HIDDEN = 24, 2, 2, 8, 16


def parameters(shapes, prefix=""):
    return {name: weights(prefix + name, *shape).double().requires_grad_() for name, shape in shapes.items()}


LEVELS = (WIDTH // 4, WIDTH // 2, WIDTH)


def head_shapes(prefix, width, hidden, bottleneck, prototypes, last):
    """`last` is "norm" for directions with gains, "plain" for rows as they are."""
    shapes = {}
    for place, (inwards, outwards) in enumerate(((width, hidden), (hidden, hidden), (hidden, bottleneck))):
        shapes[f"{prefix}mlp.{2 * place}.weight"] = (outwards, inwards)
        shapes[f"{prefix}mlp.{2 * place}.bias"] = (outwards,)
    if last == "norm":
        return shapes | {
            f"{prefix}last_layer.weight_v": (prototypes, bottleneck),
            f"{prefix}last_layer.weight_g": (prototypes, 1),
        }
    return shapes | {f"{prefix}last_layer.weight": (prototypes, bottleneck)}


def block_shapes(width):
    block = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,)}
    block |= {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)}
    block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    block |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
    return block | {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}


def backbone_shapes(registers=0, scales=None, rotary=False, prefix="backbone.model."):
    """`scales` is how the factors of residual branches 1 and 2 are called, with {} for the number."""
    shapes = {"cls_token": (1, 1, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    if registers:
        shapes["reg_token"] = (1, registers, WIDTH)
    if not rotary:
        shapes["pos_embed"] = (1, 16 + 1 + registers, WIDTH)
    for number in range(DEPTH):
        block = block_shapes(WIDTH)
        if rotary:
            del block["attn.qkv.bias"]
        if scales is not None:
            block |= {scales.format(1): (WIDTH,), scales.format(2): (WIDTH,)}
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return {prefix + name: shape for name, shape in shapes.items()}


def network_shapes(heads, registers=0, scales=None, rotary=False):
    """Everything that a student has, by the kind of its heads."""
    shapes = backbone_shapes(registers, scales, rotary)
    kind = "plain" if rotary else "norm"
    if heads == "pictures alone":
        return shapes | head_shapes("head.", WIDTH, HIDDEN, 8, 32, kind)
    shapes["mask_token"] = (1, WIDTH)
    if heads == "shared head":
        return shapes | head_shapes("head.head.", WIDTH, HIDDEN, 8, 32, kind)
    if heads == "shared head, own prototypes":
        own = {"head.patch_last_layer.weight_v": (32, 8), "head.patch_last_layer.weight_g": (32, 1)}
        return shapes | head_shapes("head.head.", WIDTH, HIDDEN, 8, 32, kind) | own
    if heads == "nested heads":
        for level, width in enumerate(LEVELS):
            prototypes = 32 * width // WIDTH
            shapes |= head_shapes(f"head.heads.{level}.", width, HIDDEN, 8, prototypes, kind)
            shapes |= head_shapes(f"patch_head.heads.{level}.", width, HIDDEN, 6, prototypes, kind)
        return shapes
    shapes |= head_shapes("head.", WIDTH, HIDDEN, 8, 32, kind)
    return shapes | head_shapes("patch_head.", WIDTH, HIDDEN, 6, 24, kind)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def head(p, prefix, x, last=None):
    """Logits. `last` names other prototypes than the head's own."""
    for place in (0, 2, 4):
        x = x @ p[f"{prefix}mlp.{place}.weight"].T + p[f"{prefix}mlp.{place}.bias"]
        x = gelu(x) if place < 4 else x
    x = x / x.norm(dim=-1, keepdim=True)
    last = f"{prefix}last_layer." if last is None else last
    if f"{last}weight" in p:
        return x @ p[f"{last}weight"].T
    directions = p[f"{last}weight_v"]
    return x @ (p[f"{last}weight_g"] * directions / directions.norm(dim=1, keepdim=True)).T


def positions(table, prefix, side):
    """Learned positions, those of the patches brought to another grid by bicubic filtering."""
    first, grid = table[:, :prefix], table[:, prefix:]
    if side == 4:
        return table
    grid = grid.view(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)], 1)


def rotated(x, side):
    """(B, heads, N, 12): periods 100^(2 j / 6) of rows, then of columns, twice; second half against first."""
    centres = (torch.arange(side).double() + 0.5) / side * 2 - 1
    periods = 100.0 ** (2 * torch.arange(3).double() / 6)
    turns = 2 * math.pi * centres[:, None] / periods
    angle = torch.stack([torch.cat([turns[i], turns[j]]) for i in range(side) for j in range(side)]).repeat(1, 2)
    return x * angle.cos() + torch.cat([-x[..., 6:], x[..., :6]], -1) * angle.sin()


def part(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def block(b, x, heads, eps, turned=None):
    """(B, N, D) through one block of weights `b`; `turned` is what positions do to queries and keys (B, heads, N, d)."""
    count, _, width = x.shape
    scales = [b.get(f"ls{i}.gamma", b.get(f"gamma_{i}", 1.0)) for i in (1, 2)]
    y = layer_norm(x, b["norm1.weight"], b["norm1.bias"], eps)
    q, k, v = (y @ b["attn.qkv.weight"].T + b.get("attn.qkv.bias", 0.0)).chunk(3, -1)
    q, k, v = (t.view(count, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    if turned is not None:
        q, k = turned(q), turned(k)
    attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // heads), -1)
    y = (attention @ v).transpose(1, 2).reshape(count, -1, width)
    x = x + scales[0] * (y @ b["attn.proj.weight"].T + b["attn.proj.bias"])
    y = layer_norm(x, b["norm2.weight"], b["norm2.bias"], eps)
    y = gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return x + scales[1] * y


def backbone(p, x, masked=None, token=None, rotary=False, norm=None, prefix="backbone.model."):
    """(B, 3, H, W), masked (B, N) bool -> class tokens (B, D) and patches (B, N, D), behind the final norm."""
    w = part(p, prefix)
    count, side, eps = len(x), x.shape[-1] // PATCH, 1e-5 if rotary else 1e-6
    x = x.view(count, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(count, side * side, -1)
    x = x @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    if masked is not None:
        x = torch.where(masked[..., None], token, x)
    first = torch.cat([w["cls_token"]] + ([w["reg_token"]] if "reg_token" in w else []), 1)
    before = first.shape[1]
    x = torch.cat([first.expand(count, -1, -1), x], 1)
    if not rotary:
        x = x + positions(w["pos_embed"], before, side)
    turned = (lambda t: torch.cat([t[:, :, :before], rotated(t[:, :, before:], side)], 2)) if rotary else None
    for number in range(DEPTH):
        x = block(part(w, f"blocks.{number}."), x, HEADS, eps, turned)
    weight, bias = (w["norm.weight"], w["norm.bias"]) if norm is None else norm
    x = layer_norm(x, weight, bias, eps)
    return x[:, 0], x[:, before:]
