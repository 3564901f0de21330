"""PCD in float64, from its paper's equations: heads place by place, bilinear values by hand, a queue that is a list, and twenty
steps of each pairing."""

import math

import torch

from ssd.parity.inputs import BOXES, numbers
from tests.parity.restated_frozen import behind_norm, ends, still, with_fixed_positions
from tests.parity.restated_masked import encoder_shapes, rate, table_of
from tests.parity.restated_networks import WIDTH, layer_norm, parameters, part
from tests.parity.restated_parts import given, leaf, with_gradients
from tests.parity.restated_trajectories import SAMPLES, STEPS, LARSLearner, views

# ---------------------------------------------------------------------- parts


def statistics(number, width):
    return numbers(f"mean {number}", width).double(), 1 + numbers(f"variance {number}", width).double() / 2


def projected(p, x, widths, rectified):
    """(..., C) through linear layers, each normalised by kept statistics, `rectified` between them."""
    for number in range(len(widths) - 1):
        x = x @ p[f"{3 * number}.weight"].flatten(1).T
        mean, variance = statistics(number, widths[number + 1])
        x = (x - mean) / (variance + 1e-5).sqrt()
        if number < len(widths) - 2:
            x = rectified(x * p[f"{3 * number + 1}.weight"] + p[f"{3 * number + 1}.bias"])
    return x


def head_shapes(widths, kernel=()):
    shapes = {}
    for number in range(len(widths) - 1):
        shapes[f"{3 * number}.weight"] = (widths[number + 1], widths[number], *kernel)
        if number < len(widths) - 2:
            shapes |= {f"{3 * number + 1}.weight": (widths[1],), f"{3 * number + 1}.bias": (widths[1],)}
    return shapes


def all_or_nothing(x):
    """(B, places, C): a channel's places stay as they are where their sum is above 0, else all are 0."""
    return torch.where(x.sum(1, keepdim=True) > 0, x, 0.0)


def adaptor():
    """The pooled answer is the answer to the pooled map."""
    p, maps = parameters(head_shapes((6, 9, 5))), given("maps", 3, 6, 4, 2)
    answer = projected(p, maps.flatten(2).transpose(1, 2), (6, 9, 5), all_or_nothing)
    pooled = projected(p, maps.mean((2, 3)), (6, 9, 5), lambda x: x.clamp(min=0))
    as_maps = answer.transpose(1, 2).reshape(3, 5, 4, 2)
    assert (answer.mean(1) - pooled).abs().max() < 1e-12
    return {"maps": as_maps, "pooled": pooled, "of pooled": pooled}


def attended(p, maps, heads=2):
    """(B, D, h, w): normalised, fixed positions, attention over places, added to what came in."""
    count, width, rows, columns = maps.shape
    tokens = maps.flatten(2).transpose(1, 2)
    x = layer_norm(tokens, p["norm.weight"], p["norm.bias"], 1e-5) + table_of((rows, columns), width)
    q, k, v = (x @ p["attention.qkv.weight"].T + p["attention.qkv.bias"]).chunk(3, -1)
    each, parts = width // heads, []
    for head in range(heads):
        mine = slice(head * each, (head + 1) * each)
        parts.append(torch.softmax(q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(each), -1) @ v[..., mine])
    tokens = tokens + torch.cat(parts, -1) @ p["attention.proj.weight"].T + p["attention.proj.bias"]
    return tokens.transpose(1, 2).reshape(count, width, rows, columns)


def attention_shapes(width, prefix):
    shapes = {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"attention.qkv.weight": (3 * width, width), "attention.qkv.bias": (3 * width,)}
    shapes |= {"attention.proj.weight": (width, width), "attention.proj.bias": (width,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def pixel_head(p, maps, norm):
    """Wide, narrow, wide, narrow, at every place; each normalised over all places of all pictures, the wide ones with gain,
    bias and ReLU."""
    count, _, rows, columns = maps.shape
    x, place = maps.permute(0, 2, 3, 1).flatten(0, 2), 0
    for number in range(4):
        x = x @ p[f"{place}.weight"].flatten(1).T
        if norm:
            mean = x.mean(0)
            x = (x - mean) / ((x - mean).square().mean(0) + 1e-5).sqrt()
        else:
            x = x + p[f"{place}.bias"]
        if norm and number % 2 == 0:
            x = x * p[f"{place + 1}.weight"] + p[f"{place + 1}.bias"]
        place += 2 if norm else 1
        if number % 2 == 0:
            x, place = x.clamp(min=0), place + 1
    return x.unflatten(0, (count, rows, columns)).permute(0, 3, 1, 2)


def pixel_head_shapes(inwards, hidden, outwards, norm, prefix):
    shapes, widths, place = {}, (inwards, hidden, outwards, hidden, outwards), 0
    for number in range(4):
        shapes[f"{prefix}{place}.weight"] = (widths[number + 1], widths[number], 1, 1)
        if not norm:
            shapes[f"{prefix}{place}.bias"] = (widths[number + 1],)
        elif number % 2 == 0:
            for name in ("weight", "bias"):
                shapes[f"{prefix}{place + 1}.{name}"] = (hidden,)
        place += (2 if norm else 1) + (number % 2 == 0)
    return shapes


def pixel_heads():
    values = {}
    for norm, name in ((True, "normalised, "), (False, "")):
        p = parameters(attention_shapes(8, "0.") | pixel_head_shapes(8, 6, 5, norm, "1."))
        maps = leaf("maps", 3, 8, 2, 3)
        answer = pixel_head(part(p, "1."), attended(part(p, "0."), maps), norm)
        values |= with_gradients(f"{name}answer", answer, maps=maps, **p)
    return values


def contrasted(x, y, negatives):
    """-ln of the target's share, at a temperature of .2."""
    if not len(negatives):
        return 0.0 * (x * y).sum()
    own, others = torch.exp(x @ y / 0.2), torch.exp(negatives @ x / 0.2).sum()
    return -torch.log(own / (own + others))


def contrast():
    student, target, negatives = leaf("places", 6, 4), given("targets", 6, 4), given("negatives", 7, 4)
    rows = [contrasted(student[n], target[n], negatives[[0, 1, 3, 4, 6]]) for n in range(6)]
    every = torch.stack([contrasted(target[n], target[n], negatives) for n in range(6)])
    return with_gradients("some", rows, student=student) | {"all": every}


def queue():
    kept, there, place, values = torch.zeros(7, 2).double(), [False] * 7, 0, {}
    for number in range(4):
        for vector in given(f"vectors {number}", 3, 2):
            kept[place % 7], there[place % 7] = vector, True
            place += 1
        values |= {f"behind {number}": kept.clone(), f"there behind {number}": torch.tensor(there)}
    return values


def common(one, other, rows, columns):
    """Places of a grid in what two boxes share, in shares of either's width and height; None for less than a tenth of the
    smaller one."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[0] + one[2], other[0] + other[2]), min(one[1] + one[3], other[1] + other[3])
    area = max(right - left, 0) * max(bottom - top, 0)
    if area < 0.1 * min(one[2] * one[3], other[2] * other[3]):
        return None
    found = ([], [])
    for i in range(rows):
        for j in range(columns):
            x, y = left + (right - left) * (j + 0.5) / columns, top + (bottom - top) * (i + 0.5) / rows
            for box, places in zip((one, other), found):
                across = (x - box[0]) / box[2]
                places.append((1 - across if box[4] else across, (y - box[1]) / box[3]))
    return found


def bilinear(maps, across, down):
    """(C, h, w) at shares of its width and height; beyond the middles of the outermost places it is theirs."""
    _, height, width = maps.shape
    x, y = min(max(across * width - 0.5, 0.0), width - 1.0), min(max(down * height - 0.5, 0.0), height - 1.0)
    j, i = min(int(x), max(width - 2, 0)), min(int(y), max(height - 2, 0))
    a, b = x - j, y - i
    upper = (1 - a) * maps[:, i, j] + a * maps[:, i, j + 1]
    lower = (1 - a) * maps[:, i + 1, j] + a * maps[:, i + 1, j + 1]
    return (1 - b) * upper + b * lower


def shared():
    maps, mine, theirs, enough, values = given("maps", 8, 3, 4, 5), [], [], [], []
    for b, (one, other) in enumerate(BOXES):
        found = common(one, other, 3, 2)
        enough.append(found is not None)
        if found is not None:
            mine.append(torch.tensor(found[0]).double().view(3, 2, 2) * 2 - 1)
            theirs.append(torch.tensor(found[1]).double().view(3, 2, 2) * 2 - 1)
            values.append(torch.stack([bilinear(maps[b], *place) for place in found[1]], 1).view(3, 3, 2))
    return {
        "places of one": torch.stack(mine),
        "places of the other": torch.stack(theirs),
        "enough in common": torch.tensor(enough),
        "values": torch.stack(values),
    }


# ---------------------------------------------------------------------- twenty steps


def unit(x, dim):
    return x / x.norm(dim=dim, keepdim=True)


def map_of(w, x, heads=2):
    patches = behind_norm(w, ends(w, x, heads)[-1])[:, 1:]
    side = math.isqrt(patches.shape[1])
    return patches.transpose(1, 2).unflatten(2, (side, side))


def pooled(maps):
    """8 x 8 places to 4 x 4, each the mean of four."""
    return (maps[..., ::2, ::2] + maps[..., 1::2, ::2] + maps[..., ::2, 1::2] + maps[..., 1::2, 1::2]) / 4


def pcd():
    return drawn_together("same", 1, projector=True)


def pcd_boxes():
    return drawn_together("boxes", 2, norm=False)


def pcd_index():
    return drawn_together("index", 2, attention=False)


def teacher_shapes(projector):
    shapes = encoder_shapes("backbone.model.", 32, 2)
    shapes["backbone.model.patch_embed.proj.weight"] = (32, 3, 4, 4)
    if projector:
        shapes |= {f"head.{name}": shape for name, shape in head_shapes((32, 20, 6), (1, 1)).items()}
    return shapes


def drawn_together(pairing, count, projector=False, attention=True, norm=True):
    width = 6 if projector else 32
    shapes = encoder_shapes() | pixel_head_shapes(WIDTH, 12, width, norm, "head.")
    student = parameters(shapes | (attention_shapes(WIDTH, "attention.") if attention else {}))
    teacher = still(teacher_shapes(projector))
    learner, kept, place = LARSLearner(student, "masked", decay=0.1), torch.zeros(20, width).double(), 0
    for i in range(STEPS):
        seen, told = views("global", i, 32, number=count), []
        boxes = BOXES[-(i % 8) :] + BOXES[: -(i % 8)] if i % 8 else BOXES
        for x in seen:
            maps = map_of(part(teacher, "backbone.model."), x)
            if projector:
                rows = projected(part(teacher, "head."), maps.flatten(2).transpose(1, 2), (32, 20, 6), all_or_nothing)
                maps = rows.transpose(1, 2).unflatten(2, (8, 8))
            told.append(maps)
        said = []
        for x in seen:  # by itself, so that batch normalisation sees one view
            maps = map_of(part(student, "backbone.model."), x)
            maps = attended(part(student, "attention."), maps) if attention else maps
            said.append(pixel_head(part(student, "head."), maps, norm))
        said = torch.stack(said)
        negatives, losses = kept[: min(place, 20)], []
        for v in range(count):
            for b in range(SAMPLES):
                other = v if pairing == "same" else 1 - v
                if pairing == "boxes":
                    found = common(boxes[b][v], boxes[b][other], 4, 4)
                    if found is None:
                        continue
                    mine = torch.stack([bilinear(said[v, b], *at) for at in found[0]], 1)
                    theirs = torch.stack([bilinear(told[other][b], *at) for at in found[1]], 1)
                else:
                    mine, theirs = said[v, b].flatten(1), pooled(told[other][b]).flatten(1)
                pairs = zip(unit(mine, 0).T, unit(theirs, 0).T)
                losses.append(sum(contrasted(x, y, negatives) for x, y in pairs) / 16)
        loss = sum(losses) / len(losses)
        learner.learn(i, loss, {"pixels": loss}, 250 * rate(i, STEPS))
        for key in unit(told[0].mean((2, 3)), 1):  # of the first views
            kept[place % 20] = key
            place += 1
    fixed = with_fixed_positions(teacher, "backbone.model.")
    fixed = fixed | {"backbone.model.pos_embed": torch.zeros(1, 65, 32).double()}
    return learner.outputs(fixed, fixed, queue=kept)
