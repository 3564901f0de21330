"""Masked regression in float64: its targets, distances, positions, decoder, and twenty steps of each of its methods, with loops
over samples and places."""

import math

import torch

from ssd.parity.inputs import equal_masks, numbers, pictures
from ssd.parity.mask_statistics import statistics
from tests.parity.restated_networks import PATCH, WIDTH, block, block_shapes, layer_norm, parameters, part
from tests.parity.restated_parts import given, leaf, with_gradients
from tests.parity.restated_trajectories import SAMPLES, STEPS, Learner, fall, views

EPS = 1e-6
HIDDEN, SHOWN, PLACES = 12, 4, 16

# ---------------------------------------------------------------------- parts


def standardised(t):
    """dBOT: by the variance of n - 1."""
    mean = t.mean(-1, keepdim=True)
    variance = (t - mean).square().sum(-1, keepdim=True) / (t.shape[-1] - 1)
    return (t - mean) / torch.sqrt(variance + EPS)


def unit(t):
    return t / t.square().sum(-1, keepdim=True).sqrt()


def features():
    values = (3 * numbers("features", 2, 5, 7) + 1).double()
    return {"standardised": standardised(values), "unit length": unit(values)}


def cut(x, patch=PATCH):
    """(B, C, H, W) -> (B, N, p p C), pixel by pixel: rows, columns, channels, the last one fastest."""
    channels, height, width = x.shape[1:]
    patches = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            pixels = [x[:, c, top + i, left + j] for i in range(patch) for j in range(patch) for c in range(channels)]
            patches.append(torch.stack(pixels, 1))
    return torch.stack(patches, 1)


def pixels():
    x = pictures("global", 0, 2, 3, 3, 16, 24).double()
    raw = torch.stack([cut(view) for view in x])
    return {"as they are": raw, "normalised": standardised(raw)}


def smooth(e):
    """Quadratic below 2 and linear above."""
    return torch.where(e.abs() < 2, e.square() / 4, e.abs() - 1)


def distances():
    target, values = (3 * numbers("target features", 2, 5, 7)).double(), {}
    for name, cost in (("squared", torch.square), ("absolute", torch.abs), ("smooth", smooth)):
        predicted = leaf("predicted features", 2, 5, 7)
        values |= with_gradients(name, cost(predicted - target).mean(-1), predicted=predicted)
    return values


def over_hidden():
    errors, hidden = given("errors", 1, 8, 16)[0], equal_masks(0)[0]
    total = sum(errors[b, n] for b in range(8) for n in range(16) if hidden[b, n])
    return {"mean": (total / (HIDDEN * 16))[None]}


def place(coordinates, dim):
    """Of one token: columns first, of each coordinate the sines, then the cosines."""
    each = dim // (2 * len(coordinates))
    rates = [10_000 ** (-i / each) for i in range(each)]
    row = []
    for x in reversed(coordinates):
        row += [math.sin(x * rate) for rate in rates] + [math.cos(x * rate) for rate in rates]
    return row + [0.0] * (dim - len(row))


def table_of(grid, dim):
    places = [()]
    for size in grid:
        places = [(*before, here) for before in places for here in range(size)]
    return torch.tensor([place(coordinates, dim) for coordinates in places], dtype=torch.float64)


def positions():
    grids = {"2x3, 24": ((2, 3), 24), "3x2, 10": ((3, 2), 10), "2x2x3, 12": ((2, 2, 3), 12), "5, 6": ((5,), 6)}
    return {name: table_of(grid, dim) for name, (grid, dim) in grids.items()}


def decoder_shapes(inwards, width, outwards, depth=1, prefix="decoder.", bias=True):
    """`bias` is that of the layer in front."""
    shapes = {"mask_token": (1, 1, width), "embed.weight": (width, inwards)}
    shapes |= {"embed.bias": (width,)} if bias else {}
    for number in range(depth):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block_shapes(width).items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (outwards, width), "head.bias": (outwards,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def decoded(w, patches, shown, grid, cls=None):
    """Predictions for all places, and of the class token before them where there is one."""
    width, rows = len(w["embed.weight"]), []
    fixed, bias = table_of(grid, width), w.get("embed.bias", 0.0)
    for b, seen in enumerate(shown):
        row = [] if cls is None else [w["embed.weight"] @ cls[b] + bias]
        for n in range(len(fixed)):
            here = seen.index(n) if n in seen else None
            token = w["mask_token"][0, 0] if here is None else w["embed.weight"] @ patches[b, here] + bias
            row.append(token + fixed[n])
        rows.append(torch.stack(row))
    x, number = torch.stack(rows), 0
    while f"blocks.{number}.norm1.weight" in w:
        x = block(part(w, f"blocks.{number}."), x, 2, EPS)
        number += 1
    x = layer_norm(x, w["norm.weight"], w["norm.bias"], EPS)
    return x @ w["head.weight"].T + w["head.bias"]


def decoder():
    values = {}
    for cls, name in ((given("class tokens", 2, 6), "with class token, "), (None, "")):
        p, patches = parameters(decoder_shapes(6, 8, 5, depth=2, prefix="")), leaf("visible patches", 2, 3, 6)
        answer = decoded(p, patches, [[0, 2, 5], [1, 3, 4]], (2, 3), cls)
        values |= with_gradients(f"{name}predictions", answer, shown=patches, **p)
    return values


def random_masks():
    """147 of 196 places, every one as likely: what each statistic is, by counting."""
    share = 147 / 196
    both = share * 146 / 195
    values = {
        "masked crops": 1.0,
        "mean ratio": share,
        "deviation of ratio": 0.0,
        "neighbours": both / (2 * share - both),
        "on the border": share,
        "in the middle": share,
    }
    assert values.keys() == statistics(torch.ones(2, 4, 4, dtype=torch.bool).numpy()).keys()
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def visible_counts():
    """MAE, dBOT and DMAE: int(N (1 - ratio)), or the number asked for."""
    counts = {"196, 0.75": 49, "196, 0.95": 9, "196, 0.98": 3, "196, keep 10": 10, "196, keep 4": 4, "64, 0.75": 16}
    return {name: torch.tensor([count, count]) for name, count in counts.items()}


# ---------------------------------------------------------------------- networks


def encoder_shapes(prefix="backbone.model.", width=WIDTH, depth=2):
    shapes = {"cls_token": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,)}
    for number in range(depth):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block_shapes(width).items()}
    return {prefix + name: shape for name, shape in shapes.items()}


def states(p, x, shown=None, prefix="backbone.model.", blocks=2):
    """What leaves the embedding and each block, (B, 1 + n, D), of all places or of those that are shown."""
    w = part(p, prefix)
    width = w["cls_token"].shape[2]
    # a patch as the convolution sees it: channels, rows, columns
    kernel = w["patch_embed.proj.weight"].permute(0, 2, 3, 1).reshape(width, -1)
    tokens = cut(x) @ kernel.T + w["patch_embed.proj.bias"] + table_of((4, 4), width)
    if shown is not None:
        tokens = torch.stack([tokens[b, seen] for b, seen in enumerate(shown)])
    found = [torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens], 1)]  # its position is 0
    for number in range(blocks):
        found.append(block(part(w, f"blocks.{number}."), found[-1], 2, EPS))
    return found


def normed(p, state, prefix="backbone.model."):
    return layer_norm(state, p[f"{prefix}norm.weight"], p[f"{prefix}norm.bias"], EPS)


def predicted(p, x, shown):
    """Predictions for the class token and all places, from the places shown; and the encoder's states."""
    found = states(p, x, shown)
    last = normed(p, found[-1])
    return decoded(part(p, "decoder."), last[:, 1:], shown, (4, 4), last[:, 0]), found


def student_shapes(outwards):
    return encoder_shapes() | decoder_shapes(WIDTH, 16, outwards)


def shown_places(i):
    return [[n for n in range(PLACES) if not row[n]] for row in equal_masks(i)[0].tolist()]


def painted(prediction, target, shown):
    """The mean over hidden patches of the mean squared error of their pixels."""
    total = 0
    for b, seen in enumerate(shown):
        for n in range(PLACES):
            if n not in seen:
                total = total + (prediction[b, 1 + n] - target[b, n]).square().mean()
    return total / (HIDDEN * SAMPLES)


def frozen(p, prefix="backbone."):
    return {name.removeprefix(prefix): w.detach().clone() for name, w in p.items() if name.startswith(prefix)}


def with_positions(teacher):
    """They are the teacher's too, and never move."""
    return teacher | {"model.pos_embed": torch.zeros(1, 1 + PLACES, teacher["model.cls_token"].shape[2]).double()}


def rate(i, steps):
    """Five steps of linear rise, both ends included, then half a cosine to 0; the peak is for 16 samples a step."""
    peak = 2e-3 * SAMPLES / 16
    return peak * i / 4 if i < 5 else fall(peak, 0.0, i - 5, steps - 5)


# ---------------------------------------------------------------------- methods


def mae():
    student = parameters(student_shapes(3 * PATCH**2))
    learner = Learner(student, "masked", decay=0.05)
    for i in range(STEPS):
        (x,), shown = views("global", i, 32, number=1), shown_places(i)
        loss = painted(predicted(student, x, shown)[0], standardised(cut(x)), shown)
        learner.learn(i, loss, {"pixels": loss}, rate(i, STEPS))
    return learner.outputs({}, {})


def dbot():
    """dBOT: the target is raw, behind the teacher's first block in stage 0 and behind its last in stage 1, where the
    teacher is stage 0's student and the student, its moments and the schedule begin anew."""
    student = parameters(student_shapes(WIDTH))
    teacher = {name: w.detach() for name, w in parameters(encoder_shapes("model.")).items()}
    learner, start, blocks = Learner(student, "masked", clip=0.75, decay=0.05), with_positions(teacher), 1
    for i in range(STEPS):
        if i == 8:
            teacher, blocks = frozen(student), 2
            with torch.no_grad():
                for name, w in parameters(student_shapes(WIDTH), "fresh ").items():
                    student[name].copy_(w)
            learner.forget()
        (x,), shown = views("global", i, 32, number=1), shown_places(i)
        target = standardised(states(teacher, x, prefix="model.", blocks=blocks)[-1])
        prediction, total = predicted(student, x, shown)[0], 0
        for b, seen in enumerate(shown):
            for n in range(1 + PLACES):
                if n - 1 not in seen:  # the class token, at 0, counts too
                    total = total + smooth(prediction[b, n] - target[b, n]).mean()
        loss = total / ((HIDDEN + 1) * SAMPLES)
        learner.learn(i, loss, {"features": loss}, rate(i, 8) if i < 8 else rate(i - 8, 12))
    return learner.outputs(with_positions(teacher), start)


def dmae():
    """DMAE: both see the same places; the teacher's third block of four, the student's first of two."""
    projector = {"projectors.block1.0.weight": (32, WIDTH), "projectors.block1.0.bias": (32,)}
    student = parameters(student_shapes(3 * PATCH**2) | projector)
    teacher = {name: w.detach() for name, w in parameters(encoder_shapes("model.", 32, 4)).items()}
    learner = Learner(student, "masked", decay=0.05)
    for i in range(STEPS):
        (x,), shown = views("global", i, 32, number=1), shown_places(i)
        target = unit(states(teacher, x, shown, prefix="model.", blocks=3)[3])
        prediction, found = predicted(student, x, shown)
        seen = found[1] @ student["projectors.block1.0.weight"].T + student["projectors.block1.0.bias"]
        pixel, feature = painted(prediction, cut(x), shown), (target - unit(seen)).abs().mean()
        learner.learn(i, pixel + 2.0 * feature, {"pixel": pixel, "feature": feature}, rate(i, STEPS))
    return learner.outputs(with_positions(teacher), with_positions(teacher))


def further_pretraining():
    """Further pretraining: the class token behind the final norm, summed over dimensions; stage 1 begins where stage 0
    began, and the rate falls in a line to 0 in each."""
    student = parameters(student_shapes(3 * PATCH**2))
    teacher = {name: w.detach() for name, w in parameters(encoder_shapes("model.")).items()}
    learner, start = Learner(student, "masked", decay=0.01), with_positions(teacher)
    for i in range(STEPS):
        if i == 8:
            teacher = frozen(student)
            with torch.no_grad():
                for name, w in learner.start.items():
                    student[name].copy_(w)
            learner.forget()
        (x,), shown = views("global", i, 32, number=1), shown_places(i)
        pixel = painted(predicted(student, x, shown)[0], standardised(cut(x)), shown)
        terms, loss = {"pixels": pixel}, pixel
        if i >= 8:
            told = normed(teacher, states(teacher, x, prefix="model.")[-1], "model.")[:, 0]
            said = normed(student, states(student, x)[-1])[:, 0]
            terms["distillation"] = (said - told).square().sum(1).mean()
            loss = pixel + 0.5 * terms["distillation"]
        learner.learn(i, loss, terms, 1e-3 * (1 - i / 8) if i < 8 else 1e-3 * (1 - (i - 8) / 12))
    return learner.outputs(with_positions(teacher), start)
