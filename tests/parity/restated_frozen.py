"""LEAP and hybrid distillation in float64, from their papers' equations: likeness by kernels, relations head by head, tokens
dropped one by one, and twenty steps of each."""

import math

import torch
from torch.nn import functional as F

from tests.parity.restated_layers import over_channels
from tests.parity.restated_masked import EPS, PLACES, cut, encoder_shapes, rate, smooth, table_of
from tests.parity.restated_networks import WIDTH, block, gelu, layer_norm, parameters, part
from tests.parity.restated_parts import M, finalised, given, key, leaf, with_gradients
from tests.parity.restated_trajectories import SAMPLES, STEPS, LARSLearner, Learner, fall, views

GOLDEN = 0x9E3779B97F4A7C15

# ---------------------------------------------------------------------- parts


def hsic(k, m):
    """Song et al. 2012, eq. 5, of kernels with nothing on their diagonals."""
    n = len(k)
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    ones = torch.ones(n, dtype=torch.float64)
    apart = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return ((k * m).sum() + apart - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def cka(x, y, unbiased=True):
    """By kernels of all pairs of rows; plain, of centred features, |X^T Y|^2 / (|X^T X| |Y^T Y|)."""
    if unbiased:
        k, m = x @ x.T, y @ y.T
        return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def likeness():
    x, y = given("student rows", 24, 5), given("teacher rows", 24, 7) + 1
    y[:, :5] += x
    other = given("other rows", 24, 7)
    return {"unbiased": cka(x, y)[None], "plain": cka(x, y, False)[None], "unrelated": cka(x, other)[None]}


def courses():
    """By hand: at .8 and above the next of six blocks, from the second on; the mean begins at 0 with each block."""
    single = [2, 2, 3, 4, 4, 4, 4, 4, 4, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    # smoothed: .12, .348, .6792, .81168 -> 3; .24, .276; .1704, .63816, .795264, .9121 -> 4; .12; .228, .6852, .86808 -> 5;
    # .594, .8316 -> 6
    smoothed = [2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 6]
    # as above until 3, then a block each four steps: .24, .276 -> 4; .06, .594, .7776 -> 5; .594, .3576, .32304 -> 6
    limited = [2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6]
    found = {"each by itself": single, "smoothed": smoothed, "limited": limited}
    return {name: torch.tensor(blocks) for name, blocks in found.items()}


def mixtures():
    x, rows = given("pictures", 2, 6, 3), []
    for b in range(6):
        before = b - 1 if b % 3 else b + 2  # the first of three is mixed with the last
        rows.append(0.3 * x[:, b] + 0.7 * x[:, before])
    return {"mixed": torch.stack(rows, 1)}


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def kept(patches, keep):
    """Of one picture's patches the places that stay: those at even places which are most like one at an odd place go."""
    odd = range(1, len(patches), 2)
    score = {n: max(cosine(patches[n], patches[m]) for m in odd) for n in range(0, len(patches), 2)}
    gone = sorted(score, key=score.get, reverse=True)[: len(patches) - keep]
    return [n for n in range(len(patches)) if n not in gone]


def redundancy():
    alike, patches = torch.eye(3).double()[[0, 0, 1, 2]], given("patches", 2, 11, 4)
    return {
        "of 10, 6": torch.tensor([kept(each[:10], 6) for each in patches]),
        "of 11, 8": torch.tensor([kept(each, 8) for each in patches]),
        "of two alike": torch.tensor([kept(alike, 3)]),
    }


def relation(tokens, kind, heads):
    """Softmax rows (heads, n, n) of {"q", "k", "v"} -> (n, D), cut into heads side by side."""
    first, second = tokens[kind[0]], tokens[kind[1]]
    width = first.shape[1] // heads
    rows = []
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        rows.append(torch.softmax(first[:, mine] @ second[:, mine].T / math.sqrt(width), -1))
    return torch.stack(rows)


def relations():
    values, teacher = {}, given("teacher qkv", 3, 2, 3, 5, 6)
    for kind in ("qk", "kk", "vv"):
        student, rows = leaf("student qkv", 3, 2, 2, 4, 6), []
        for b in range(2):
            # heads side by side: (heads, n, d) -> (n, heads d); the teacher's third token was dropped
            mine = {name: student[i, b].transpose(0, 1).flatten(1) for i, name in enumerate("qkv")}
            theirs = {name: teacher[i, b].transpose(0, 1).flatten(1)[[0, 1, 3, 4]] for i, name in enumerate("qkv")}
            p, q = relation(theirs, kind, 3), relation(mine, kind, 3)
            rows.append((p * torch.log(p / q)).sum(-1))
        values |= with_gradients(kind, torch.stack(rows), student=student)
    return values


# ---------------------------------------------------------------------- networks


def entered(w, x):
    """What enters the first block, (B, 1 + N, D), of square patches of any size."""
    kernel = w["patch_embed.proj.weight"]
    tokens = cut(x, kernel.shape[2]) @ kernel.permute(0, 2, 3, 1).flatten(1).T + w["patch_embed.proj.bias"]
    side, width = math.isqrt(tokens.shape[1]), tokens.shape[2]
    return torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens + table_of((side, side), width)], 1)


def ends(w, x, heads=2):
    """What leaves each block."""
    found, number = [entered(w, x)], 0
    while f"blocks.{number}.norm1.weight" in w:
        found.append(block(part(w, f"blocks.{number}."), found[-1], heads, EPS))
        number += 1
    return found[1:]


def behind_norm(w, state):
    return layer_norm(state, w["norm.weight"], w["norm.bias"], EPS)


def still(shapes):
    return {name: p.detach() for name, p in parameters(shapes).items()}


def with_fixed_positions(table, *prefixes):
    more = {}
    for prefix in prefixes:
        width = table[f"{prefix}cls_token"].shape[2]
        more[f"{prefix}pos_embed"] = torch.zeros(1, 1 + PLACES, width).double()
    return table | more


# ---------------------------------------------------------------------- LEAP


def share_of_step(i):
    """The first number in [0, 1) of the generator at (0, i, -11)."""
    return (finalised((key(0, i, -11) + GOLDEN) % M) >> 11) / 2**53


def mixture(x, i):
    share = share_of_step(i)
    before = [b - 1 if b % 4 else b + 3 for b in range(SAMPLES)]
    return share * x + (1 - share) * x[before]


def peak_of(i):
    """Five steps of linear rise, then half a cosine to .004; the peak is 4 for 32 samples and goes with their root."""
    peak = 4.0 * math.sqrt(SAMPLES / 32)
    return peak * i / 4 if i < 5 else fall(peak, 4e-3, i - 5, STEPS - 5)


def projected(student, number, tokens):
    name = f"projectors.{number}.0."
    return tokens @ student[f"{name}weight"].T + student[f"{name}bias"]


def leap_shapes(projectors):
    shapes = encoder_shapes()
    for number in range(projectors):
        shapes |= {f"projectors.{number}.0.weight": (32, WIDTH), f"projectors.{number}.0.bias": (32,)}
    return shapes


def leap():
    """Ten patches of each picture, others in each step, measured in every second one."""

    def ten(tokens, i):
        return tokens[:, [(n * PLACES // 10 + i) % PLACES for n in range(10)]].flatten(0, 1)

    def measured(said, told, i):
        return cka(ten(said, i), ten(told, i))

    return one_block_after_the_other(measured, every=2, threshold=0.3, smoothing=1.0, limit=3)


def leap_published_likeness():
    def measured(said, told, i):
        return cka(said.flatten(0, 1), told.flatten(0, 1), unbiased=False)

    return one_block_after_the_other(measured, every=1, threshold=0.4, smoothing=0.5, limit=10, norm=False, first=1)


def one_block_after_the_other(measured, every, threshold, smoothing, limit, norm=True, first=None):
    student, teacher = parameters(leap_shapes(1)), still(encoder_shapes("backbone.model.", 32, 4))
    mine, theirs = "backbone.model.", part(teacher, "backbone.model.")
    learner = LARSLearner(student, "masked", clip=0.8, decay=0.1)
    target, since, mean = first, 0, 0.0
    for i in range(STEPS):
        (x,) = views("global", i, 32, number=1)
        x = mixture(x, i)
        w = part(student, mine)
        said = projected(student, 0, behind_norm(w, ends(w, x)[-1]))
        told = [behind_norm(theirs, state) if norm else state for state in ends(theirs, x)]
        if target is None:
            found = [measured(said.detach()[:, 1:], state[:, 1:], i) for state in told]
            target = 1 + max(range(4), key=lambda number: float(found[number]))
        error = (said - told[target - 1]).square()
        terms = {"patches": error[:, 1:].mean(), "cls": error[:, 0].mean()}
        like = float(measured(said.detach()[:, 1:], told[target - 1][:, 1:], i)) if i % every == 0 else 0.0
        if i % every == 0:
            mean = (1 - smoothing) * mean + smoothing * like
        passed = i % every == 0 and mean >= threshold
        if target < 4 and (passed or i + 1 - since >= limit):
            target, since, mean = target + 1, i + 1, 0.0
        watched = {"block": target, "cka": like}
        learner.learn(i, terms["patches"] + 0.5 * terms["cls"], terms | watched, peak_of(i))
    fixed = with_fixed_positions(teacher, mine)
    return learner.outputs(fixed, fixed)


def leap_all_blocks():
    """The first of two blocks with the second of four, the second with the fourth, each by a projector of its own."""
    student, teacher = parameters(leap_shapes(2)), still(encoder_shapes("backbone.model.", 32, 4))
    learner = LARSLearner(student, "masked", clip=0.8, decay=0.1)
    for i in range(STEPS):
        (x,) = views("global", i, 32, number=1)
        w, theirs, errors = part(student, "backbone.model."), part(teacher, "backbone.model."), []
        mine, told = ends(w, x), ends(theirs, x)
        for number in range(2):
            said = projected(student, number, behind_norm(w, mine[number]))
            errors.append((said - behind_norm(theirs, told[2 * number + 1])).square())
        terms = {
            "patches": sum(error[:, 1:].mean() for error in errors) / 2,
            "cls": sum(error[:, 0].mean() for error in errors) / 2,
        }
        learner.learn(i, terms["patches"] + 0.5 * terms["cls"], terms, peak_of(i))
    fixed = with_fixed_positions(teacher, "backbone.model.")
    return learner.outputs(fixed, fixed)


# ---------------------------------------------------------------------- hybrid distillation


def queries_keys_values(w, number, tokens):
    """{"q", "k", "v"} -> (n, D) of one picture's tokens as they enter a block, counted from 1."""
    b = part(w, f"blocks.{number - 1}.")
    y = layer_norm(tokens, b["norm1.weight"], b["norm1.bias"], EPS)
    return dict(zip("qkv", (y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, -1)))


def dropping(w, tokens, drops):
    """One picture (1 + N, D) through the student: what enters each block with the places of its patches, and its end.

    `drops` is the number of the block before -> how many patches stay.
    """
    number, at, entering = 0, list(range(PLACES)), {}
    while f"blocks.{number}.norm1.weight" in w:
        if number in drops:
            stay = kept(tokens[1:].detach(), drops[number])
            tokens, at = tokens[[0] + [1 + n for n in stay]], [at[n] for n in stay]
        number += 1
        entering[number] = tokens, at
        tokens = block(part(w, f"blocks.{number - 1}."), tokens[None], 2, EPS)[0]
    return entering, behind_norm(w, tokens), at


def hybrid():
    """Blocks 1 and 2 of three relate as 1 and 3 of four do, in four heads; of 16 patches 12, 9 and 7 stay."""
    projector = {"projector.0.weight": (16, WIDTH), "projector.0.bias": (16,)}
    relating = encoder_shapes("relations.backbone.model.", 32, 4)
    describing = encoder_shapes("features.backbone.model.", 16, 2)
    describing["features.backbone.model.patch_embed.proj.weight"] = (16, 3, 4, 4)

    def as_it_knows_them(x):
        """Levels from 0 to 1, less the mean of ImageNet over its deviation, at 16 px."""
        channels = []
        for c in range(3):
            level = x[:, c] * (0.2, 0.25, 0.3)[c] + (0.5, 0.4, 0.3)[c]
            channels.append((level - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c])
        return F.interpolate(torch.stack(channels, 1), size=(16, 16), mode="bicubic", antialias=True)

    pairs, drops = {1: 1, 2: 3}, {0: 12, 1: 9, 2: 7}
    settings = {"kind": "qk", "heads": 4, "weight": 2.0, "cost": smooth, "teacher_heads": 4}
    return two_teachers(projector, relating, describing, as_it_knows_them, pairs, drops, **settings)


def hybrid_values():
    """Block 3 relates its values as block 2 of the teacher does, in three heads; eight patches stay behind block 1."""
    projector = {"projector.0.weight": (10, WIDTH), "projector.0.bias": (10,)}
    projector |= {"projector.2.weight": (WIDTH, 10), "projector.2.bias": (WIDTH,)}
    relating, describing = encoder_shapes("relations.backbone.model."), encoder_shapes("features.backbone.model.")
    settings = {"kind": "vv", "heads": 3, "weight": 1.0, "cost": torch.square, "teacher_heads": 2}
    return two_teachers(projector, relating, describing, lambda x: x, {3: 2}, {1: 8}, **settings)


def two_teachers(projector, relating, describing, seen, pairs, drops, kind, heads, weight, cost, teacher_heads):
    student = parameters(encoder_shapes(depth=3) | projector)
    teacher = still(relating | describing)
    one, other = part(teacher, "relations.backbone.model."), part(teacher, "features.backbone.model.")
    learner = Learner(student, "masked", clip=1.3, decay=0.05)
    for i in range(STEPS):
        (x,) = views("global", i, 32, number=1)
        w = part(student, "backbone.model.")
        embedded = entered(w, x)
        inner = [entered(one, x), *ends(one, x, teacher_heads)]
        last = over_channels(ends(other, seen(x))[-1])  # before the final norm
        apart, away = [], []
        for b in range(SAMPLES):
            entering, said, at = dropping(w, embedded[b], drops)
            for mine, theirs in pairs.items():
                tokens, places = entering[mine]
                q = relation(queries_keys_values(w, mine, tokens), kind, heads)
                rows = [0] + [1 + n for n in places]
                told = queries_keys_values(one, theirs, inner[theirs - 1][b])
                p = relation({name: each[rows] for name, each in told.items()}, kind, heads)
                apart.append((p * torch.log(p / q)).sum(-1).mean())
            said = said @ student["projector.0.weight"].T + student["projector.0.bias"]
            if "projector.2.weight" in student:
                said = gelu(said) @ student["projector.2.weight"].T + student["projector.2.bias"]
            away.append(cost(said - last[b, [0] + [1 + n for n in at]]).mean())
        terms = {"relation": sum(apart) / len(apart), "feature": sum(away) / len(away)}
        learner.learn(i, weight * terms["relation"] + terms["feature"], terms, rate(i, STEPS))
    fixed = with_fixed_positions(teacher, "relations.backbone.model.", "features.backbone.model.")
    return learner.outputs(fixed, fixed)
