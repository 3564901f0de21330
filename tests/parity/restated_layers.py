"""data2vec and data2vec 2.0 in float64, from their papers' equations: normalisations channel by channel, convolutions place by
place, losses token by token, and twenty steps of each."""

import math
import random

import numpy as np
import torch

from ssd.parity.inputs import equal_masks, masks
from ssd.parity.mask_statistics import statistics
from tests.parity.restated_masked import EPS, PLACES, cut, normed, rate, smooth, table_of
from tests.parity.restated_masks import CROPS
from tests.parity.restated_networks import PATCH, WIDTH, block, block_shapes, gelu, layer_norm, parameters, part
from tests.parity.restated_parts import given, leaf, with_gradients
from tests.parity.restated_trajectories import SAMPLES, STEPS, Learner, views

DEPTH, TOP, MASKS = 3, 2, 3

# ---------------------------------------------------------------------- normalisation


def at_zero(values, dim):
    """At mean 0 and variance 1 over one dimension; the biased variance, of which 1e-5 more."""
    apart = values - values.mean(dim, keepdim=True)
    return apart / (apart.square().mean(dim, keepdim=True) + 1e-5).sqrt()


def over_channels(tokens):
    """(..., D): each token by itself."""
    return at_zero(tokens, -1)


def over_tokens(sample):
    """(N, D): each channel by itself."""
    return at_zero(sample, 0)


def normalised():
    layers = [size * given(f"layer {size}", 2, 5, 7) + 1 for size in (1, 10)]
    layers[0][..., 0] = 3.0
    by_tokens = [sum(over_tokens(layer[b]) for layer in layers) / 2 for b in range(2)]
    return {
        "layer normed": sum(over_channels(layer) for layer in layers) / 2,
        "instance normed": torch.stack(by_tokens),
        # three frames of the first sound, five of the second
        "of sound alone": torch.cat([over_tokens(layers[0][0, :3]), over_tokens(layers[0][1])]),
    }


# ---------------------------------------------------------------------- decoder


def convolved(x, weight, bias):
    """(B, h, w, C) -> (B, h, w, D): each place sees its neighbours, 0 beyond the border; groups of channels see their own."""
    batch, height, width, channels = x.shape
    out_width, per_group, kernel, _ = weight.shape
    groups, reach = channels // per_group, kernel // 2
    wide = x.new_zeros(batch, height + 2 * reach, width + 2 * reach, channels)
    wide[:, reach : reach + height, reach : reach + width] = x
    outputs = []
    for g in range(groups):
        mine = slice(g * per_group, (g + 1) * per_group)
        kernels, total = weight[g * out_width // groups : (g + 1) * out_width // groups], 0
        for di in range(kernel):
            for dj in range(kernel):
                total = total + wide[:, di : di + height, dj : dj + width, mine] @ kernels[:, :, di, dj].T
        outputs.append(total)
    return torch.cat(outputs, -1) + bias


def decoded(w, patches, shown, grid):
    """0 where nothing is shown, then convolution, normalisation of each place, GELU, and what went in where it is as wide."""
    whole = []
    for b, seen in enumerate(shown):
        empty = torch.zeros_like(patches[b, 0])
        whole.append(torch.stack([patches[b, seen.index(n)] if n in seen else empty for n in range(math.prod(grid))]))
    x, number = torch.stack(whole).unflatten(1, grid), 0
    while f"layers.{number}.weight" in w:
        y = gelu(over_channels(convolved(x, w[f"layers.{number}.weight"], w[f"layers.{number}.bias"])))
        x = x + y if x.shape == y.shape else y
        number += 1
    return x.flatten(1, 2) @ w["head.weight"].T + w["head.bias"]


def decoder_shapes(inwards, width, outwards, depth, groups, prefix=""):
    shapes = {}
    for number in range(depth):
        before = inwards if number == 0 else width
        shapes[f"{prefix}layers.{number}.weight"] = (width, before // groups, 3, 3)
        shapes[f"{prefix}layers.{number}.bias"] = (width,)
    return shapes | {f"{prefix}head.weight": (outwards, width), f"{prefix}head.bias": (outwards,)}


def conv_decoder():
    p, patches = parameters(decoder_shapes(6, 8, 5, 2, 2)), leaf("visible patches", 2, 3, 6)
    answer = decoded(p, patches, [[0, 2, 5], [1, 3, 4]], (2, 3))
    return with_gradients("predictions", answer, shown=patches, **p)


# ---------------------------------------------------------------------- masks


def squares():
    """Of 196 places 39 are shown: five squares of 3 x 3 around places drawn with replacement, cut at the border, of which
    single ones go, or to which single ones come, until the number is right."""
    rng, found = random.Random(4), []
    for _ in range(CROPS):
        shown = set()
        for _ in range(int(196 * (0.2 + 0.07) / 9)):
            i, j = rng.randrange(14), rng.randrange(14)
            near = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            shown |= {(r, c) for r, c in near if 0 <= r < 14 and 0 <= c < 14}
        others = [(r, c) for r in range(14) for c in range(14) if (r, c) not in shown]
        if len(shown) > 39:
            shown = set(rng.sample(sorted(shown), 39))
        shown |= set(rng.sample(others, max(0, 39 - len(shown))))
        mask = np.ones((14, 14), dtype=bool)
        for r, c in shown:
            mask[r, c] = False
        found.append(mask)
    return statistics(np.stack(found))


def visible_counts():
    """data2vec 2.0: int(L keep)."""
    return {name: torch.tensor([n, n]) for name, n in {"B": 39, "L": 49, "H": 64, "small": 12}.items()}


# ---------------------------------------------------------------------- data2vec


def first_shapes():
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + PLACES, WIDTH)}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for number in range(DEPTH):
        each = block_shapes(WIDTH) | {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in each.items()}
    shapes = {f"backbone.model.{name}": shape for name, shape in shapes.items()}
    return shapes | {"mask_token": (1, WIDTH), "head.weight": (WIDTH, WIDTH), "head.bias": (WIDTH,)}


def embedded(w, x):
    kernel = w["patch_embed.proj.weight"].permute(0, 2, 3, 1).reshape(WIDTH, -1)
    return cut(x) @ kernel.T + w["patch_embed.proj.bias"]


def learned_states(p, x, masked=None):
    """What leaves each block, (B, 1 + N, D); the mask's token stands in for the embedding of what is hidden."""
    w = part(p, "backbone.model.")
    tokens = embedded(w, x)
    if masked is not None:
        tokens = torch.where(masked[..., None], p["mask_token"], tokens)
    state, found = torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens], 1) + w["pos_embed"], []
    for number in range(DEPTH):
        state = block(part(w, f"blocks.{number}."), state, 2, EPS)
        found.append(state)
    return found


def of_backbone(table):
    return {name: p.detach().clone() for name, p in table.items() if name.startswith("backbone.")}


def data2vec():
    """Targets are the ends of the last blocks, each normalised before the mean and the mean again; the teacher sees all."""
    student = parameters(first_shapes())
    teacher, start = of_backbone(student), of_backbone(student)
    learner = Learner(student, "masked", clip=0.7, decay=0.05, second=0.999)
    for i in range(STEPS):
        (x,), masked = views("global", i, 32, number=1), masks(i)[0]
        ends = [over_channels(state[:, 1:]) for state in learned_states(teacher, x)[-TOP:]]
        target = over_channels(sum(ends) / TOP)
        said = normed(student, learned_states(student, x, masked)[-1])[:, 1:]
        predicted = said @ student["head.weight"].T + student["head.bias"]
        errors = [
            smooth(predicted[b, n] - target[b, n]).mean() for b in range(SAMPLES) for n in range(PLACES) if masked[b, n]
        ]
        loss = sum(errors) / len(errors)
        learner.learn(i, loss, {"features": loss}, rate(i, STEPS))
        learner.average(i, teacher, 0.9)
    return learner.outputs(teacher, start)


# ---------------------------------------------------------------------- data2vec 2.0


def second_shapes():
    shapes = {"cls_token": (1, 1, WIDTH), "norm_pre.weight": (WIDTH,), "norm_pre.bias": (WIDTH,)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for number in range(DEPTH):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block_shapes(WIDTH).items()}
    shapes = {f"backbone.model.{name}": shape for name, shape in shapes.items()}
    return shapes | decoder_shapes(WIDTH, 16, WIDTH, 3, 4, prefix="decoder.")


def post_norm_block(b, x):
    """x <- LN(x + attention(x)), then x <- LN(x + mlp(x)); and mlp(x) by itself."""
    width = x.shape[2] // 2
    q, k, v = (x @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, -1)
    heads = []
    for head in range(2):
        mine = slice(head * width, (head + 1) * width)
        shares = torch.softmax(q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(width), -1)
        heads.append(shares @ v[..., mine])
    y = torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
    x = layer_norm(x + y, b["norm1.weight"], b["norm1.bias"], EPS)
    mlp = gelu(x @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return layer_norm(x + mlp, b["norm2.weight"], b["norm2.bias"], EPS), mlp


def post_norm_states(p, x, shown=None):
    """The last block's end and each block's MLP; the class token has no position, and the embedding is normalised."""
    w = part(p, "backbone.model.")
    tokens = embedded(w, x) + table_of((4, 4), WIDTH)
    if shown is not None:
        tokens = torch.stack([tokens[b, seen] for b, seen in enumerate(shown)])
    state = torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens], 1)
    state, found = layer_norm(state, w["norm_pre.weight"], w["norm_pre.bias"], EPS), []
    for number in range(DEPTH):
        state, mlp = post_norm_block(part(w, f"blocks.{number}."), state)
        found.append(mlp)
    return state, found


def data2vec2():
    return of_many_masks("mean", 0.5)


def data2vec2_published_sum():
    return of_many_masks("sum", 0.02)


def of_many_masks(rule, cls_weight):
    """The published class term is a sum over pictures and masks; then the teacher's embedding here is the student's own."""
    student = parameters(second_shapes())
    teacher, start = of_backbone(student), of_backbone(student)
    learner = Learner(student, "masked", clip=9.0, decay=0.05)
    for i in range(STEPS):
        (x,) = views("global", i, 32, number=1)
        mlps = post_norm_states(teacher, x)[1][-TOP:]
        means = [sum(over_tokens(mlp[b, 1:]) for mlp in mlps) / TOP for b in range(SAMPLES)]
        target = over_channels(torch.stack(means))  # one for all masks
        hidden, cls = [], []
        for number in range(MASKS):
            rows = equal_masks(i + 7 * number)[0].tolist()
            shown = [[n for n in range(PLACES) if not row[n]] for row in rows]
            state, _ = post_norm_states(student, x, shown)
            answer = decoded(part(student, "decoder."), state[:, 1:], shown, (4, 4))
            for b, seen in enumerate(shown):
                away = [n for n in range(PLACES) if n not in seen]
                hidden += (answer[b, away] - target[b, away]).square().sum(1) / math.sqrt(WIDTH)
                cls.append((state[b, 0] - target[b].mean(0)).square().sum() / math.sqrt(WIDTH))
        told = sum(cls) / (len(cls) if rule == "mean" else 1)
        terms = {"features": torch.stack(hidden).mean(), "cls": told}
        learner.learn(i, terms["features"] + cls_weight * terms["cls"], terms, rate(i, STEPS))
        learner.average(i, teacher, 0.9 + 0.09 * i / 10 if i < 10 else 0.99)
        if rule == "sum":
            for name in teacher:
                if "patch_embed" in name:
                    teacher[name] = student[name].detach().clone()
    fixed = {"backbone.model.pos_embed": torch.zeros(1, 1 + PLACES, WIDTH).double()}
    return learner.outputs(teacher | fixed, start | fixed)
