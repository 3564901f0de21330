"""The equations of every part once more, in float64 and plain loops, from the papers and published recipes.

Nothing here calls what it restates: of `ssd` only the inputs are used, which both sides are given.
"""

import math

import torch

from ssd.parity.inputs import distribution, numbers
from tests.parity.restated_networks import head, head_shapes, network_shapes, parameters


def given(name, *shape):
    return numbers(name, *shape).double()


def leaf(name, *shape):
    return given(name, *shape).requires_grad_()


def with_gradients(name, rows, **leaves):
    """`rows` is the loss of each sample; what is derived is their sum under the weights of the comparison."""
    loss = torch.stack([row for row in rows]) if isinstance(rows, list) else rows
    pulled = (loss * given(f"pull of {name}", *loss.shape)).sum()
    gradients = torch.autograd.grad(pulled, list(leaves.values()))
    return {name: loss} | {f"gradient of {name}, {leaf}": g for leaf, g in zip(leaves, gradients)}


def softmax(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


# ---------------------------------------------------------------------- random numbers

M = 2**64


def finalised(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % M
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % M
    return z ^ (z >> 31)


def key(*place):
    """Each part is mixed in, then the word goes through SplitMix64's step."""
    state = 0
    for part in place:
        state = (state ^ part % M) * 0xBF58476D1CE4E5B9 % M
        state = finalised((state + 0x9E3779B97F4A7C15) % M)
    return state


def random_numbers():
    start = key(7, 1, 2)
    drawn = [finalised((start + n * 0x9E3779B97F4A7C15) % M) >> 11 for n in range(1, 5)]
    pieces = {name: [] for name in ("uniforms", "key")}
    for name, number in [("uniforms", bits) for bits in drawn] + [("key", key(3, -2))]:
        # 16 bits at a time
        pieces[name] += [number // 2**48, number // 2**32 % 2**16, number // 2**16 % 2**16, number % 2**16]
    return {name: torch.tensor(numbers) for name, numbers in pieces.items()}


# ---------------------------------------------------------------------- losses


def cross_entropy(q, logits, temperature):
    return -(q * torch.log(softmax(logits / temperature))).sum()


def over_views(logits, targets, skip):
    """DINO, eq. 3: the mean over pairs (target view, student view)."""
    rows = []
    for b in range(3):
        pairs = [
            cross_entropy(targets[t, b], logits[s, b], 0.1) for t in range(2) for s in range(4) if not (skip and s == t)
        ]
        assert len(pairs) == (6 if skip else 8)
        rows.append(sum(pairs) / len(pairs))
    return rows


def cross_entropy_of_views():
    logits, targets = leaf("student logits", 4, 3, 7), distribution("targets", 2, 3, 7).double()
    values = {}
    for skip, name in ((True, "other views"), (False, "all views")):
        values |= with_gradients(name, over_views(logits, targets, skip), logits=logits)
    features, prototypes = leaf("student features", 4, 3, 5), leaf("prototypes", 7, 5)
    rows = over_views(features @ prototypes.T, targets, True)
    return values | with_gradients("scores", rows, features=features, prototypes=prototypes)


def cross_entropy_of_tokens():
    logits, targets = leaf("student logits", 5, 7), distribution("targets", 5, 7).double()
    return with_gradients("tokens", [cross_entropy(targets[n], logits[n], 0.1) for n in range(5)], logits=logits)


def divergences():
    logits, teacher = leaf("student logits", 2, 3, 7), given("teacher logits", 2, 3, 7)
    rows = []
    for v in range(2):
        for b in range(3):
            q, p = softmax(teacher[v, b] / 0.5), softmax(logits[v, b] / 0.7)
            rows.append((q * torch.log(q / p)).sum())
    return with_gradients("divergence", torch.stack(rows).view(2, 3), logits=logits)


def entropies():
    rows = distribution("targets", 2, 3, 7).double().view(6, 7)
    return {"entropy": torch.stack([-sum(p * math.log(p) for p in row) for row in rows])}


def koleo(features, group):
    """-ln(|x - nearest + eps| + eps), nearest by cosine among the other samples of the group."""
    rows = []
    x = features / features.norm(dim=-1, keepdim=True)
    for v in range(features.shape[0]):
        for b in range(features.shape[1]):
            first = b // group * group
            others = [j for j in range(first, first + group) if j != b]
            nearest = max(others, key=lambda j: float((x[v, b] @ x[v, j]).detach()))
            rows.append(-torch.log((x[v, b] - x[v, nearest] + 1e-8).norm() + 1e-8))
    return torch.stack(rows).view(features.shape[:2])


def koleo_of_groups():
    values = {}
    for group in (3, 6):
        features = leaf("features", 2, 6, 5)
        values |= with_gradients(f"groups of {group}", koleo(features, group), features=features)
    return values


def gram():
    student, teacher = leaf("student patches", 2, 6, 5), given("teacher patches", 2, 6, 4)

    def cosine(x, i, j):
        return (x[i] * x[j]).sum() / (x[i].norm() * x[j].norm())

    rows = []
    for n in range(2):
        gaps = [
            (cosine(student[n], i, j) - cosine(teacher[n], i, j)) ** 2 for i in range(6) for j in range(6) if i != j
        ]
        rows.append(sum(gaps) / 36)  # every patch is like itself
    return with_gradients("gram", rows, student=student)


def cubic(t):
    """Keys' kernel with a = -3/4."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def bicubic(grid, height, width):
    """(h, w, D) at the centres of another grid's cells, borders repeated, without antialiasing."""
    rows, columns, dim = grid.shape
    out = torch.zeros(height, width, dim, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * rows / height - 0.5, (j + 0.5) * columns / width - 0.5
            for r in range(math.floor(y) - 1, math.floor(y) + 3):
                for c in range(math.floor(x) - 1, math.floor(x) + 3):
                    seen = grid[min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)]
                    out[i, j] += cubic(y - r) * cubic(x - c) * seen
    return out


def resized():
    grid = given("patches", 1, 48, 2).view(6, 8, 2)
    return {"smaller": bicubic(grid, 3, 4), "larger": bicubic(grid, 9, 8)}


# ---------------------------------------------------------------------- targets


def centring():
    center, values = torch.zeros(7, dtype=torch.float64), {}
    for number in range(2):
        logits = given(f"teacher logits {number}", 2, 3, 7).view(6, 7)
        values[f"targets {number}"] = torch.stack([softmax((row - center) / 0.2) for row in logits])
        center = 0.9 * center + 0.1 * sum(logits) / 6
        values[f"centre {number}"] = center
    logits = given("teacher features", 4, 5) @ given("prototypes", 7, 5).T
    return values | {"centre of scores": 0.9 * center + 0.1 * (logits[0] + logits[2] + logits[3]) / 3}


def sinkhorn_knopp(logits, temperature):
    """Three rounds: each prototype's column by its sum, then each sample's row by its sum."""
    q = torch.exp(logits / temperature)
    for _ in range(3):
        for k in range(q.shape[1]):
            q[:, k] /= q[:, k].sum().clone()
        for n in range(q.shape[0]):
            q[n] /= q[n].sum().clone()
    return q


def sinkhorn():
    return {"targets": sinkhorn_knopp(given("teacher logits", 2, 3, 5).view(6, 5), 0.2)}


def padded_sinkhorn():
    """As if the padding were not there, and it uniform."""
    real = [0, 1, 3, 4, 6, 7]
    targets = torch.full((8, 5), 1 / 5, dtype=torch.float64)
    targets[real] = sinkhorn_knopp(given("teacher logits", 8, 5)[real], 0.2)
    return {"targets": targets}


# ---------------------------------------------------------------------- heads


def head_with_weight_norm():
    return answers(head_shapes("", 6, 8, 4, 9, "norm"))


def plain_head():
    return answers(head_shapes("", 6, 8, 4, 9, "plain"))


def answers(shapes):
    p, features = parameters(shapes), leaf("features", 2, 3, 6)
    return with_gradients("logits", head(p, "", features), features=features, **p)


def patch_head():
    values = {}
    for name, own in (("shared, ", False), ("own, ", True)):
        shapes = head_shapes("head.", 6, 8, 4, 9, "norm")
        if own:
            shapes |= {"patch_last_layer.weight_v": (9, 4), "patch_last_layer.weight_g": (9, 1)}
        p, features = parameters(shapes), leaf("features", 9, 6)
        of_patches = head(p, "head.", features[4:], last="patch_last_layer." if own else None)
        logits = torch.cat([head(p, "head.", features[:4]), of_patches])
        values |= with_gradients(f"{name}logits", logits, features=features, **p)
    return values


# ---------------------------------------------------------------------- schedules


def ramp(start, end, ticks):
    """linspace over so many ticks, both ends included."""
    return [start + (end - start) * i / (ticks - 1) for i in range(ticks)]


def fall(start, end, ticks):
    """Half a cosine whose end is not reached."""
    return [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / ticks)) for i in range(ticks)]


def whole_fall(start, end, ticks):
    """Half a cosine whose end is its last tick."""
    return [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / (ticks - 1))) for i in range(ticks)]


def stairs(values):
    return [value for value in values for _ in range(4)]


def curves(**values):
    assert all(len(curve) == 20 for curve in values.values())
    return {name.replace("_", " "): torch.tensor(curve, dtype=torch.float64) for name, curve in values.items()}


def linear_schedules():
    return curves(
        share_of_the_steps=ramp(0.04, 0.07, 6) + [0.07] * 14,
        steps=ramp(0.04, 0.07, 8) + [0.07] * 12,
        epochs_as_stairs=stairs([*ramp(0.04, 0.07, 3), 0.07, 0.07]),
        share_of_the_epochs=stairs([*ramp(0.04, 0.07, 3), 0.07, 0.07]),
        after_a_wait=[0.0] * 8 + ramp(0.0, 2.0, 6) + [2.0] * 6,
    )


def cosine_schedules():
    values = curves(
        no_warm_up=fall(0.996, 1.0, 20),
        warm_up=ramp(0.0, 1.0, 4) + fall(1.0, 0.1, 16),
        warm_up_from_above_0=ramp(0.2, 1.0, 5) + fall(1.0, 0.1, 15),
        reaches_its_end=[0.0, 0.25, 0.5, 0.75, *whole_fall(1.0, 0.1, 16)],
        reaches_its_end_without_warm_up=whole_fall(1.0, 0.0, 20),
        stairs=stairs([0.0, *fall(1.0, 0.1, 4)]),
        stairs_with_a_longer_warm_up=stairs([0.0, 1.0, *fall(1.0, 0.1, 3)]),
        after_a_wait=[0.0] * 10 + fall(0.0, 2.0, 10),
    )
    return {name.replace("warm up", "warm-up"): curve for name, curve in values.items()}


# ---------------------------------------------------------------------- optimisers


def groups(rule):
    """Names of a ViT with registers and scales, and of a head whose patches have prototypes of their own."""
    shapes = network_shapes("shared head, own prototypes", registers=2, scales="ls{}.gamma")
    table = {}
    for name, shape in shapes.items():
        depth = None
        if name.startswith("backbone.model.blocks."):
            depth = int(name.split(".")[3]) + 1
        elif name.startswith("backbone.model.norm."):
            depth = 3
        elif name == "mask_token" or name.startswith("backbone."):
            depth = 0
        if rule == "dino":
            decays, scale = not name.endswith(".bias") and len(shape) > 1, 1.0
        else:
            decays = not name.endswith(".bias") and "norm" not in name and "gamma" not in name
            scale = 1.0 if depth is None else 0.9 ** (3 - depth)
            scale *= 0.2 if "patch_embed" in name else 1.0
        table[name] = torch.tensor([decays, scale, "last_layer" in name], dtype=torch.float64)
    return table


def groups_of_dino():
    return groups("dino")


def groups_of_dinov2():
    return groups("dinov2")


def rates_of_batches():
    """DINO: 5e-4 batch / 256; DINOv2: 4e-3 sqrt(batch / 1024), with peaks .0056569 and 4e-4; floors stay."""
    rates = [[2e-3] * 2, [4e-3 * math.sqrt(2)] * 2, [4e-4] * 2, [1e-3] * 2, [2e-3, 1e-6], [4e-3 * math.sqrt(2), 1e-6]]
    return {"thousandths": 1000 * torch.tensor(rates, dtype=torch.float64)}


def clipping():
    gradients = [(number + 1) * given(f"gradient {number}", 3, 2) for number in range(4)]
    together = {"tensor": [[0], [1], [2], [3]], "module": [[0, 1], [2], [3]], "all": [[0, 1, 2, 3]]}
    values = {}
    for over, parts in together.items():
        clipped = [None] * 4
        for part in parts:
            norm = math.sqrt(sum(float(gradients[number].square().sum()) for number in part))
            for number in part:
                clipped[number] = gradients[number] * min(1.0, 2.5 / (norm + 1e-6))
        values[over] = torch.stack(clipped)
    return values


def optimisers():
    values = {}
    for rule in ("AdamW", "SGD", "LARS"):
        for name, shape, decay in (("matrix", (3, 2), 0.3), ("vector", (4,), 0.0), ("faint vector", (4,), 0.0)):
            w, first, second = given(name, *shape), torch.zeros(shape).double(), torch.zeros(shape).double()
            for step in range(3):
                g = given(f"gradient of the {name} {step}", *shape) * (1e-7 if name == "faint vector" else 1.0)
                if rule == "AdamW":
                    first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
                    w = w - 0.1 * decay * w
                    w = w - 0.1 * (first / (1 - 0.9 ** (step + 1))) / (
                        (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                    )
                elif rule == "SGD":
                    # the first buffer is the gradient itself, which 0.9 * 0 + g is too
                    first = 0.9 * first + g + decay * w
                    w = w - 0.1 * first
                else:
                    g = g + decay * w
                    if len(shape) > 1:
                        g = g * 0.1 * w.norm() / g.norm()
                    first = 0.9 * first + g
                    w = w - 0.1 * first
            values[f"{rule}, {name}"] = w
    return values


def teacher_average():
    shapes = {"weight": (4, 3), "bias": (4,)}
    teacher = {name: p.detach() for name, p in parameters(shapes).items()}
    for update, momentum in enumerate((0.9, 0.5, 0.99)):
        student = parameters(shapes, f"update {update} ")
        teacher = {name: momentum * teacher[name] + (1 - momentum) * student[name].detach() for name in shapes}
    return {f"teacher {name}": values for name, values in teacher.items()}
