"""UnFuSeD in float64, from its paper's equations: sounds one by one up to their own ends, spectra by sums of waves, and twenty
steps of its network."""

import math

import torch

from ssd.parity.inputs import LABELS, SOUND_LENGTHS, blobs, numbers, shares
from tests.parity.restated_networks import parameters, part
from tests.parity.restated_parts import cubic, leaf, with_gradients
from tests.parity.restated_trajectories import STEPS, Learner

BANDS, CHANNELS, WIDTH, CLASSES = 8, 4, 12, 5

# ---------------------------------------------------------------------- parts


def log_shares(logits):
    return logits - logits.exp().sum().log()


def terms_of(logits, labels, detached):
    """Logits (B, 1 + J, K), the classifier's first; a label of -1 is none."""
    terms = dict.fromkeys(("label", "block_label", "kl", "cosine"), torch.zeros(()).double())
    for (deep, *blocks), label in zip(logits, labels):
        guide = deep.detach() if detached else deep
        q = log_shares(guide)
        if label >= 0:
            terms["label"] = terms["label"] - log_shares(deep)[label]
        for block in blocks:
            p = log_shares(block)
            if label >= 0:
                terms["block_label"] = terms["block_label"] - p[label]
            terms["kl"] = terms["kl"] + (q.exp() * (q - p)).sum()
            lengths = (guide.square().sum() * block.square().sum()).sqrt()
            terms["cosine"] = terms["cosine"] + 2 - 2 * (guide * block).sum() / lengths.clamp_min(1e-8)
    return {name: term / len(labels) for name, term in terms.items()}


def total(terms, block_label=0.7, kl=0.3, cosine=0.003):
    return terms["label"] + block_label * terms["block_label"] + kl * terms["kl"] + cosine * terms["cosine"]


def losses():
    high = 1 / (1 + math.exp(-2.0))
    other = 1 - high
    by_hand = {"label": -math.log(high), "block_label": 3 * math.log(2), "cosine": 6.0}  # logits of 0 have no direction
    by_hand["kl"] = 3 * (high * math.log(2 * high) + other * math.log(2 * other))
    assert abs(total({**by_hand, "cosine": 0.0}) - 0.126928 - 0.7 * 3 * 0.693147 - 0.3 * 3 * 0.327813) < 3e-6
    assert abs(total({**by_hand, "cosine": 0.0}) - 1.877569) < 3e-6
    values = {
        f"by hand, {name}": torch.tensor(value).double() for name, value in {**by_hand, "total": total(by_hand)}.items()
    }
    for detached, name in ((True, "detached"), (False, "not detached")):
        logits = (2 * numbers("logits of blocks", 5, 4, 7)).double().requires_grad_()
        terms = terms_of(logits, (3, 0, -1, 6, 3), detached)
        terms["total"] = total(terms)
        (gradient,) = torch.autograd.grad(terms["total"], logits)
        values |= {f"{name}, {term}": value for term, value in terms.items()} | {f"gradient, {name}": gradient}
    return values


def main_directions(covariance, count):
    """The directions of most variance one after the other, by powers of what is left of the covariance."""
    found = []
    for _ in range(count):
        v = torch.ones(len(covariance)).double()
        for _ in range(2000):
            v = covariance @ v
            v = v / v.norm()
        variance = float(v @ covariance @ v)
        found.append((variance, v))
        covariance = covariance - variance * torch.outer(v, v)
    return found


def clusters():
    """k-means from the first sample of each heap, in twenty rounds."""
    features, others = blobs("features", 30).double(), blobs("other features", 9).double()
    mean = features.mean(0)
    covariance = sum(torch.outer(x - mean, x - mean) for x in features) / 29
    directions = main_directions(covariance, 2)

    def point(x):
        whitened = torch.stack([(x - mean) @ v / math.sqrt(variance) for variance, v in directions])
        return whitened / whitened.norm()

    def nearest(x, centres):
        distances = [float((x - centre).square().sum()) for centre in centres]
        return distances.index(min(distances))

    points = [point(x) for x in features]
    centres = points[:3]
    for _ in range(20):
        labels = [nearest(x, centres) for x in points]
        centres = [torch.stack([x for x, k in zip(points, labels) if k == number]).mean(0) for number in range(3)]
    assert labels == list(range(3)) * 10
    of_each = torch.stack([centres[k] for k in labels])
    new = [nearest(point(x), centres) for x in others]
    return {
        "mean": mean,
        "whitening": sum(torch.outer(v, v) / variance for variance, v in directions),
        "sizes": torch.tensor(sorted(labels.count(k) for k in range(3))),
        "centres": of_each @ of_each.T,
        "together": torch.tensor([[a == b for b in labels] for a in labels]),
        "others with them": torch.tensor([[a == b for b in labels] for a in new]),
    }


def mixed(sounds, rows, group):
    """log((1 - share) e^x + share e^z), z being the one before in a ring of neighbours, which is silent behind its end."""
    answers = []
    for b, (x, share) in enumerate(zip(sounds, rows)):
        first = b // group * group
        z = sounds[first + (b - first - 1) % group]
        power = (1 - share) * x.exp()
        both = min(len(x), len(z))
        power[:both] = power[:both] + share * z[:both].exp()
        answers.append(power.log())
    return answers


def cropped(x, scales, places):
    """(T, F): a part of a canvas of 1.5 T, in whose middle the sound is, its mean around it; at as many places as before."""
    length, bands = x.shape
    canvas = math.floor(1.5 * length)
    high = min(max(math.floor(bands * scales[0]), 1), bands)
    wide = min(max(math.floor(length * scales[1]), 1), canvas)
    top = math.floor(places[0] * (bands - high + 1))
    left = math.floor(places[1] * (canvas - wide + 1)) - math.floor((canvas - length) / 2)
    along_time = weights_at([left + t * (wide - 1) / max(length - 1, 1) for t in range(length)], length, repeat=False)
    along_bands = weights_at([top + f * (high - 1) / max(bands - 1, 1) for f in range(bands)], bands, repeat=True)
    return x.mean() + along_time @ (x - x.mean()) @ along_bands.T


def weights_at(positions, size, repeat):
    """What each of `size` numbers counts for at each position, by cubic filtering; beyond both ends the last ones are repeated
    or there is 0."""
    table = torch.zeros(len(positions), size).double()
    for row, position in enumerate(positions):
        for n in range(math.floor(position) - 1, math.floor(position) + 3):
            if repeat or 0 <= n < size:
                table[row, min(max(n, 0), size - 1)] += cubic(position - n)
    return table


def spectra():
    values, drawn = 3 * numbers("levels of sounds", 4, 13, 8).double(), shares(4).double()
    sounds = [each[:count] for each, count in zip(values, (13, 6, 9, 1))]
    scales, places = (0.6 + 0.9 * drawn[:, 1:3]).tolist(), drawn[:, 3:].tolist()
    crops = [cropped(*each) for each in zip(sounds, scales, places)]
    return {"mixed": together(mixed(sounds, 0.4 * drawn[:, 0], 4), 13), "cropped": together(crops, 13)}


def together(sounds, length):
    """(B, length, ...) with 0 behind each sound's end."""
    return torch.stack([torch.cat([x, torch.zeros(length - len(x), *x.shape[1:]).double()]) for x in sounds])


# ---------------------------------------------------------------------- network


def triangles():
    """(bands, 33): evenly spaced in mel from 60 to 487.5 Hz, each of sum 1; a band between two frequencies takes the nearest."""
    mel = lambda hz: 2595 * math.log10(1 + hz / 700)
    low, high = mel(60), mel(487.5)
    edges = [700 * (10 ** ((low + (high - low) * n / (BANDS + 1)) / 2595) - 1) for n in range(BANDS + 2)]
    rows = []
    for left, middle, right in zip(edges, edges[1:], edges[2:]):
        hz = [500 * k / 32 for k in range(33)]
        row = [max(0.0, min((f - left) / (middle - left), (right - f) / (right - middle))) for f in hz]
        if sum(row) == 0:
            row[min(range(33), key=lambda k: abs(hz[k] - middle))] = 1.0
        rows.append([value / sum(row) for value in row])
    return torch.tensor(rows).double()


def levels(sound):
    """(S,) -> (S // 10 + 1, bands): powers of 64 samples around every tenth, under a raised cosine."""
    silence = torch.zeros(32).double()
    wide, n = torch.cat([silence, sound, silence]), torch.arange(64).double()
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / 64)
    turns = 2 * math.pi * torch.arange(33).double()[:, None] * n / 64
    frames = torch.stack([wide[first : first + 64] * window for first in range(0, len(sound) + 1, 10)])
    power = (frames @ turns.cos().T).square() + (frames @ turns.sin().T).square()
    return (power @ triangles().T + 1e-7).log()


def normalised(x, weight, bias):
    """Over all but the last dimension."""
    mean = x.flatten(0, -2).mean(0)
    variance = (x - mean).flatten(0, -2).square().mean(0)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def convolved(x, kernel, bias):
    """(B, T, F, C), 0 around it, with a kernel (O, C, 3, 3)."""
    wide = torch.zeros(len(x), x.shape[1] + 2, x.shape[2] + 2, x.shape[3]).double()
    wide[:, 1:-1, 1:-1] = x
    total = bias
    for i in range(3):
        for j in range(3):
            total = total + wide[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[:, :, i, j].T
    return total


def head_shapes(inwards, classes, norm, prefix=""):
    """Three linear layers, the first two with ReLU behind them, normalised before it or not."""
    shapes = {}
    for place, width in zip((0, 3, 6) if norm else (0, 2, 4), (inwards, classes, classes)):
        shapes |= {f"{prefix}{place}.weight": (classes, width), f"{prefix}{place}.bias": (classes,)}
    for place in (1, 4) if norm else ():
        shapes |= {f"{prefix}{place}.weight": (classes,), f"{prefix}{place}.bias": (classes,)}
    return shapes


def headed(w, y, norm):
    for place in (0, 3) if norm else (0, 2):
        y = linear(w, str(place), y)
        y = normalised(y, w[f"{place + 1}.weight"], w[f"{place + 1}.bias"]) if norm else y
        y = y.clamp(min=0)
    return linear(w, "6" if norm else "4", y)


def heads():
    values = {}
    for norm, name in ((True, "normalised, "), (False, "")):
        names = [f"{place}.{kind}" for place in ((0, 1, 3, 4, 6) if norm else (0, 2, 4)) for kind in ("weight", "bias")]
        shapes = head_shapes(6, 4, norm)
        p, blocks = parameters({each: shapes[each] for each in names}), leaf("pooled blocks", 9, 6)
        values |= with_gradients(f"{name}logits", headed(p, blocks, norm), blocks=blocks, **p)
    return values


def student_shapes(taught):
    shapes, before = {}, 1
    for number in range(3):
        shapes[f"backbone.model.blocks.{number}.conv.weight"] = (CHANNELS, before, 3, 3)
        for name in ("conv.bias", "norm.weight", "norm.bias"):
            shapes[f"backbone.model.blocks.{number}.{name}"] = (CHANNELS,)
        before = CHANNELS
    sizes = {"backbone.model.mlp.0": (WIDTH, CHANNELS), "backbone.model.mlp.3": (WIDTH, WIDTH)}
    sizes["classifier"] = (CLASSES, WIDTH)
    for j, block in enumerate(taught):
        shapes |= head_shapes(CHANNELS * (BANDS >> block), CLASSES, False, f"heads.{j}.")
    for name, size in sizes.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def said(p, sounds, taught):
    """Logits (B, 1 + J, K) of levels up to each sound's end."""
    counts = [len(x) for x in sounds]
    x, pooled = together(sounds, max(counts))[..., None], {}
    for number in range(1, 4):
        w = part(p, f"backbone.model.blocks.{number - 1}.")
        x = convolved(x, w["conv.weight"], w["conv.bias"])
        x = normalised(x, w["norm.weight"], w["norm.bias"]).clamp(min=0)
        rows, columns = x.shape[1] // 2 * 2, x.shape[2]
        fours = [x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)]
        x, counts = torch.stack(fours).amax(0), [max(1, count // 2) for count in counts]
        x = together([each[:count] for each, count in zip(x, counts)], x.shape[1])
        pooled[number] = x.flatten(2)
    deep, blocks = [], {number: [] for number in taught}
    for b, moments in enumerate(counts):
        tokens = linear(p, "backbone.model.mlp.0", pooled[3][b, :moments]).clamp(min=0)
        tokens = linear(p, "backbone.model.mlp.3", tokens).clamp(min=0)
        deep.append(tokens.amax(0) + tokens.mean(0))
        for number in taught:  # of the windows that whole tokens are made of
            blocks[number].append(pooled[number][b, : moments * 2 ** (3 - number)].mean(0))
    logits = [linear(p, "classifier", torch.stack(deep))]
    for j, number in enumerate(taught):
        logits.append(headed(part(p, f"heads.{j}."), torch.stack(blocks[number]), norm=False))
    return torch.stack(logits, 1)


# ---------------------------------------------------------------------- twenty steps


class StepLearner(Learner):
    """Gradient descent with a velocity; all weights decay alike, as part of the gradient."""

    def move(self, name, p, gradient, lr, decay):
        velocity = 0.9 * self.moments[name][0] + gradient + 0.01 * p
        self.moments[name] = velocity, velocity, 0
        p.sub_(0.05 * velocity)


def unfused():
    return labelled(taught=(1, 2, 3), detached=True)


def unfused_published():
    return labelled(taught=(1, 3), detached=False)


def labelled(taught, detached):
    student = parameters(student_shapes(taught))
    learner = StepLearner(student, "none")
    for i in range(STEPS):
        heard = numbers(f"sounds {i}", len(SOUND_LENGTHS), max(SOUND_LENGTHS)).double() * math.sqrt(3)
        sounds = [levels(sound[:length]) for sound, length in zip(heard, SOUND_LENGTHS)]
        drawn = shares(len(sounds), i).double()
        sounds = mixed(sounds, 0.4 * drawn[:, 0], 4)
        scales, places = (0.6 + 0.9 * drawn[:, 1:3]).tolist(), drawn[:, 3:].tolist()
        sounds = [cropped(*each) for each in zip(sounds, scales, places)]
        terms = terms_of(said(student, sounds, taught), LABELS, detached)
        learner.learn(i, total(terms, kl=1.5, cosine=0.5), terms, None)
    return learner.outputs({}, {})
