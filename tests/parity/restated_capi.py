"""CAPI in float64, from its paper's equations: rotations as complex numbers, assignments place by place, and twenty steps of
both networks that learn."""

import math

import torch
from torch.nn import functional as F

from ssd.parity.inputs import equal_masks
from tests.parity.restated_masked import PLACES, cut
from tests.parity.restated_networks import gelu, parameters, part
from tests.parity.restated_parts import given, sinkhorn_knopp
from tests.parity.restated_trajectories import PER_EPOCH, SAMPLES, STEPS, Learner, views

WIDTH, PREDICTOR, CLUSTERS, HEAD, REGISTERS = 24, 36, 20, 12, 8

# ---------------------------------------------------------------------- parts


def block_shapes(width, context):
    return {
        "norm1.weight": (width,),
        "attn.q_proj.weight": (width, width),
        "attn.k_proj.weight": (width, context),
        "attn.v_proj.weight": (width, context),
        "attn.proj.weight": (width, width),
        "norm2.weight": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc2.weight": (width, 4 * width),
    }


def backbone_shapes():
    shapes = {"registers": (1, REGISTERS, WIDTH), "predictor.mask_token": (1, PREDICTOR)}
    shapes |= {"patch_embed.weight": (WIDTH, 3, 8, 8), "patch_embed.bias": (WIDTH,)}
    for number in range(2):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block_shapes(WIDTH, WIDTH).items()}
        inner = block_shapes(PREDICTOR, WIDTH)
        shapes |= {f"predictor.blocks.{number}.{name}": shape for name, shape in inner.items()}
    return {f"backbone.model.{name}": shape for name, shape in shapes.items()}


def student_shapes():
    head = {"head.last_layer.weight_v": (CLUSTERS, PREDICTOR), "head.last_layer.weight_g": (CLUSTERS, 1)}
    return backbone_shapes() | head


def shares(name):
    """Of decay and of the learning rate."""
    decay = 0.0 if name.endswith("bias") else 0.1 if "norm" in name else 1.0
    return decay, 0.2 if "patch_embed" in name else 1.0


def groups():
    return {name: torch.tensor(shares(name), dtype=torch.float64) for name in student_shapes()}


def truncated(peak, end, i, rise, steps, start=0.0):
    """A line from `start` to the peak, both ends included, then .8 of half a cosine."""
    if i < rise:
        return start + (peak - start) * i / (rise - 1)
    return end + 0.5 * (peak - end) * (1 + math.cos(0.8 * math.pi * (i - rise) / (steps - rise)))


def schedules():
    found = {
        "rate": [truncated(1e-3, 0.0, i, 4, 20) for i in range(20)],
        "momentum": [truncated(0.999, 1.0, i, 4, 20, start=1.0) for i in range(20)],
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def assignments():
    """128 more for one prototype change nothing: its column is divided by its sum."""
    logits, values = given("teacher logits", 2, 3, 5, 4), {}
    coarse = (256 * logits).round() / 256
    for name, scores, temperature in (("of places", logits, 0.06), ("far off", coarse, 1.0)):
        values[name] = torch.zeros_like(logits)
        for place in range(5):
            values[name][:, :, place] = sinkhorn_knopp(scores[:, :, place].flatten(0, 1), temperature).view(2, 3, 4)
    return values


# ---------------------------------------------------------------------- networks


def normed(x, gain=1.0):
    """Over the root of the mean square."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def coordinates(place):
    """Row and column of one of 4 x 4 places, from 0 to 1."""
    return place // 4 / 3, place % 4 / 3


def on_border(places):
    """Eight registers around the rectangle that holds the places."""
    rows, columns = zip(*(coordinates(place) for place in places))
    around = [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]
    low, left, high, wide = min(rows), min(columns), max(rows) - min(rows), max(columns) - min(columns)
    return [(low + r * high, left + c * wide) for r, c in around]


def rotated(x, where):
    """One head (n, 12) of tokens at (row, column): three pairs of channels turn by the row, three by the column."""
    frequencies = torch.tensor([7.0, 0.07, 7e-4]).double()
    halves = []
    for axis in range(2):
        half = x[:, 6 * axis : 6 * axis + 6]
        angle = 2 * math.pi * torch.tensor([place[axis] for place in where]).double()[:, None] * frequencies
        turned = torch.complex(half[:, :3], half[:, 3:]) * torch.complex(angle.cos(), angle.sin())
        halves += [turned.real, turned.imag]
    return torch.cat(halves, 1)


def block(b, x, where, context=None, context_where=None):
    """One sample's tokens (n, D), which attend to each other or to a context as it is."""
    y = normed(x, b["norm1.weight"])
    source, source_where = (y, where) if context is None else (context, context_where)
    q, k, v = (t @ b[f"attn.{n}_proj.weight"].T for t, n in ((y, "q"), (source, "k"), (source, "v")))
    parts = []
    for head in range(x.shape[1] // HEAD):
        mine = slice(head * HEAD, (head + 1) * HEAD)
        turned_q, turned_k = rotated(q[:, mine], where), rotated(k[:, mine], source_where)
        parts.append(torch.softmax(turned_q @ turned_k.T / math.sqrt(HEAD), -1) @ v[:, mine])
    x = x + torch.cat(parts, 1) @ b["attn.proj.weight"].T
    return x + gelu(normed(x, b["norm2.weight"]) @ b["mlp.fc1.weight"].T) @ b["mlp.fc2.weight"].T


def encoded(w, tokens, places):
    """Registers and patches of one sample at `places`, behind the last norm, and where they lie."""
    x, where = torch.cat([w["registers"][0], tokens]), on_border(places) + [coordinates(n) for n in places]
    for number in range(2):
        x = block(part(w, f"blocks.{number}."), x, where)
    return normed(x), where


def embedded(w, x):
    return cut(x) @ w["patch_embed.weight"].permute(0, 2, 3, 1).flatten(1).T + w["patch_embed.bias"]


def predicted(w, context, where, asked):
    """From the mask's token at each place that is asked for; they look at the context alone, none at another."""
    x, at = w["predictor.mask_token"].expand(len(asked), -1), [coordinates(place) for place in asked]
    for number in range(2):
        x = block(part(w, f"predictor.blocks.{number}."), x, at, context, where)
    return normed(x)


# ---------------------------------------------------------------------- twenty steps


class CAPILearner(Learner):
    def rates(self, i, name, p, peak):
        decay, scale = shares(name)
        return peak * scale, self.decay * decay


class AllDecay(Learner):
    def rates(self, i, name, p, peak):
        return peak, self.decay


def capi():
    return with_clusters(positionwise=True)


def capi_joint():
    return with_clusters(positionwise=False)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def with_clusters(positionwise):
    student = parameters(student_shapes())
    clusters = parameters({"weight": (CLUSTERS, WIDTH), "bias": (CLUSTERS,)})
    teacher = {name: p.detach().clone() for name, p in student.items() if name.startswith("backbone.")}
    start = {name: p.clone() for name, p in teacher.items()}
    learner = CAPILearner(student, "masked", decay=0.1)
    finder = AllDecay(clusters, "masked", decay=0.01)
    for i in range(STEPS):
        (x,), hidden = views("global", i, 32, number=1), equal_masks(i)[0].tolist()
        w = part(teacher, "backbone.model.")
        tokens = embedded(w, x)
        told = torch.stack([unit(encoded(w, sample, range(PLACES))[0][REGISTERS:]) for sample in tokens])
        scores = told @ clusters["weight"].T + clusters["bias"]
        fixed = scores.detach()
        if positionwise:
            q = torch.stack([sinkhorn_knopp(fixed[:, n], 0.06) for n in range(PLACES)], 1)
        else:
            q = sinkhorn_knopp(fixed.flatten(0, 1), 0.06).view(fixed.shape)
        clustering = -(q * F.log_softmax(scores / 0.12, -1)).sum(-1).mean()

        w, costs = part(student, "backbone.model."), []
        tokens = embedded(w, x)
        v, g = student["head.last_layer.weight_v"], student["head.last_layer.weight_g"]
        for b in range(SAMPLES):
            shown = [n for n in range(PLACES) if not hidden[b][n]]
            away = [n for n in range(PLACES) if hidden[b][n]]
            asked = [away[n] for n in sorted((i + 5 * number) % 12 for number in range(3))]
            answers = predicted(w, *encoded(w, tokens[b, shown], shown), asked)
            logits = unit(answers) @ (g * unit(v)).T
            costs += list(-(q[b, asked] * F.log_softmax(logits / 0.12, -1)).sum(-1))
        loss = torch.stack(costs).mean()
        learner.learn(i, loss, {"predicted": loss}, truncated(2e-3, 0.0, i, PER_EPOCH, STEPS))
        finder.learn(i, clustering, {"clustering": clustering}, truncated(1e-3, 0.0, i, PER_EPOCH, STEPS))
        learner.average(i, teacher, truncated(0.9, 1.0, i, PER_EPOCH, STEPS, start=1.0))
    values = finder.outputs({}, {})
    norms = torch.stack([values.pop("gradient norm"), torch.tensor(learner.curves.pop("gradient norm")).double()])
    values = {name.replace("student ", "clusters "): value for name, value in values.items()}
    return learner.outputs(teacher, start) | values | {"gradient norm": norms.norm(dim=0)}
