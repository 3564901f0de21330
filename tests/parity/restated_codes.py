"""DinoSR and SpidR in float64, from their papers' equations: each sound alone and unpadded, codes one by one; twenty steps."""

import math
import random

import numpy as np
import torch
from torch.nn import functional as F

from ssd.parity.inputs import SOUND_LENGTHS, distribution, hidden_frames, numbers
from ssd.parity.mask_statistics import span_statistics
from tests.parity.restated_layers import over_channels, over_tokens
from tests.parity.restated_networks import gelu, layer_norm, parameters, part
from tests.parity.restated_parts import given
from tests.parity.restated_trajectories import STEPS, Learner

WIDTH, DEPTH, CHANNELS, CODES = 32, 3, 6, 20

# ---------------------------------------------------------------------- parts


class Codebook:
    """Codes with a sum and a count each."""

    def __init__(self, sums):
        self.sums, self.counts = sums.clone(), torch.ones(len(sums)).double()

    def nearest(self, frame):
        distances = (frame - self.sums / self.counts[:, None]).square().sum(1).tolist()
        return distances.index(min(distances))

    def learn(self, frames, codes):
        for code in set(codes):
            mine = [frame for frame, own in zip(frames, codes) if own == code]
            self.sums[code] = 0.9 * self.sums[code] + 0.1 * sum(mine)
            self.counts[code] = 0.9 * self.counts[code] + 0.1 * len(mine)


def codebooks():
    books, values = [Codebook(sums) for sums in given("codes", 2, 5, 3)], {}
    for step in range(3):
        frames = given(f"frames {step}", 2, 11, 3)[:, :8]
        codes = [[book.nearest(frame) for frame in each] for book, each in zip(books, frames)]
        for book, each, own in zip(books, frames, codes):
            book.learn(each, own)
        values |= {f"codes {step}": torch.tensor(codes), f"sums {step}": torch.stack([b.sums for b in books])}
        values[f"counts {step}"] = torch.stack([b.counts for b in books])
    shares = distribution("shares", 3, 6).double()
    values["perplexity"] = 2 ** -(shares * torch.log2(shares)).sum(-1)
    once = [2.1, 10, 1.1, 1, 2.1 / 1.1, 10]
    # both are of the first code: n = 2 - .9^100, s = 3 - .9^100
    left = 0.9**100
    many = [2 - left, 1, (3 - left) / (2 - left), 10]
    by_hand = {"once": once, "a hundred times": many}
    return values | {name: torch.tensor(each, dtype=torch.float64) for name, each in by_hand.items()}


def three_stages(i, steps, peak, rise, hold):
    """From a hundredth to the peak in a line, there for a while, and back exponentially."""
    if i < rise:
        return peak * (0.01 + 0.99 * i / rise)
    if i < rise + hold:
        return peak
    return peak * 0.01 ** ((i - rise - hold) / (steps - rise - hold))


def schedules():
    steps = (0, 6_000, 12_000, 100_000, 200_000, 300_000, 399_999)
    line = [0.9999 - 0.0009 * (1 - j / 30_000) for j in (0, 15_000, 29_999)] + [0.9999, 0.9999]
    nearer = [1 - 0.001 * math.exp(-j / 20_000) for j in (0, 20_000, 100_000, 184_000)] + [1.0]
    found = {
        "stages": [three_stages(i, 20, 1.0, 4, 6) for i in range(20)],
        "rate": [1000 * three_stages(i, 400_000, 5e-4, 12_000, 188_000) for i in steps],
        "to .9999": line,
        "to 1": nearer,
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def spans():
    """Of 200 frames .8 200 / 10 spans or one more begin at different frames, the last of them ten and one before the end;
    then single frames are shown until all of a batch hide as many."""
    rng, found = random.Random(6), []
    for _ in range(375):
        batch = []
        for _ in range(64):
            row = [False] * 200
            for first in rng.sample(range(190), max(1, math.floor(0.8 * 200 / 10 + rng.random()))):
                row[first : first + 10] = [True] * 10
            batch.append(row)
        fewest = min(map(sum, batch))
        for row in batch:
            places = [n for n in range(200) if row[n]]
            for n in rng.sample(places, len(places) - fewest):
                row[n] = False
        found += batch
    return span_statistics(np.array(found))


# ---------------------------------------------------------------------- networks


def transformer_shapes(prefix=""):
    shapes = {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    for number in range(5):
        shapes |= {f"positions.convs.{number}.weight": (WIDTH, 2, 19), f"positions.convs.{number}.bias": (WIDTH,)}
    for number in range(DEPTH):
        each = {f"{norm}.{kind}": (WIDTH,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        each |= {"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,)}
        each |= {"attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,)}
        each |= {"mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,)}
        each |= {"mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,)}
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in each.items()}
    return {prefix + name: shape for name, shape in shapes.items()}


FRONT, BODY = "backbone.model.front.", "backbone.model.transformer."


def student_shapes():
    shapes = {"convs.0.weight": (CHANNELS, 1, 10), "convs.1.weight": (CHANNELS, CHANNELS, 3)}
    for name in ("norms.0", "norms.1", "norm"):
        shapes |= {f"{name}.weight": (CHANNELS,), f"{name}.bias": (CHANNELS,)}
    shapes |= {"project.weight": (WIDTH, CHANNELS), "project.bias": (WIDTH,)}
    heads = {"mask_token": (1, WIDTH)}
    for number in range(2):
        heads |= {f"heads.{number}.weight": (CODES, WIDTH), f"heads.{number}.bias": (CODES,)}
    return {FRONT + name: shape for name, shape in shapes.items()} | transformer_shapes(BODY) | heads


def normed(w, name, x):
    return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def frames_from(w, sound):
    """(S,) -> (T, D): windows of ten every five, of three every two; each normalised over channels, GELU."""
    x = sound[:, None]
    for number, (window, stride) in enumerate(((10, 5), (3, 2))):
        firsts = range(0, len(x) - window + 1, stride)
        windows = torch.stack([x[first : first + window] for first in firsts])
        x = torch.einsum("twc,ocw->to", windows, w[f"convs.{number}.weight"])
        x = gelu(normed(w, f"norms.{number}", x))
    return normed(w, "norm", x) @ w["project.weight"].T + w["project.bias"]


def positions(w, x):
    """Five convolutions over 19 frames in groups of two channels; 0 lies beyond both ends."""
    for number in range(5):
        wide = torch.cat([torch.zeros(9, WIDTH).double(), x, torch.zeros(9, WIDTH).double()])
        windows = torch.stack([wide[n : n + 19] for n in range(len(x))]).unflatten(2, (16, 2))
        kernel = w[f"positions.convs.{number}.weight"].unflatten(0, (16, 2))
        x = torch.einsum("tkgi,goik->tgo", windows, kernel).flatten(1) + w[f"positions.convs.{number}.bias"]
        x = gelu(over_channels(x))
    return x


def transformed(w, x):
    """(T, D) -> the last block's end and each block's MLP, which is added before its second norm."""
    x, mlps = normed(w, "norm", x + positions(w, x)), []
    for number in range(DEPTH):
        b, heads = part(w, f"blocks.{number}."), []
        q, k, v = (x @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, -1)
        for mine in (slice(0, 16), slice(16, 32)):
            heads.append(torch.softmax(q[:, mine] @ k[:, mine].T / 4, -1) @ v[:, mine])
        x = normed(b, "norm1", x + torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        mlp = gelu(x @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        x = normed(b, "norm2", x + mlp)
        mlps.append(mlp)
    return x, mlps


# ---------------------------------------------------------------------- twenty steps


class SpeechLearner(Learner):
    """All weights decay alike."""

    eps = 1e-6

    def rates(self, i, name, p, peak):
        return peak, self.decay


def dinosr():
    line = lambda j: 0.99 - 0.09 * (1 - j / 8) if j < 8 else 0.99
    return named_by_codes(line, frozen_from=15, second=0.98, clip=None, by_block=False)


def spidr():
    """1 - .1 exp(-j / 4) is 1 where it is within .0015 of it: from count 17 on, which step 16 ends at."""
    nearer = lambda j: 1 - 0.1 * math.exp(-j / 4)
    assert 1 - nearer(16) > 0.0015 > 1 - nearer(17)
    return named_by_codes(nearer, frozen_from=16, second=0.95, clip=1.4, by_block=True)


def named_by_codes(momentum, frozen_from, second, clip, by_block):
    student, teacher = parameters(student_shapes()), parameters(transformer_shapes())
    teacher = {name: p.detach() for name, p in teacher.items()}
    start = {name: p.clone() for name, p in teacher.items()}
    never = ("norm2.weight", "norm2.bias") if by_block else ()
    never = tuple(f"{BODY}blocks.{DEPTH - 1}.{name}" for name in never)  # of which no MLP knows
    learner = SpeechLearner(student, "masked", clip=clip, decay=0.01, second=second, untrained=never)
    books = [Codebook(sums) for sums in given("codes", 2, CODES, WIDTH)]
    front = tuple(name for name in student if name.startswith(FRONT))
    for i in range(STEPS):
        sounds = numbers(f"sounds {i}", len(SOUND_LENGTHS), max(SOUND_LENGTHS)).double() * math.sqrt(3)
        frames, costs, targets = [], [], [[], []]
        w, body = part(student, FRONT), part(student, BODY)
        for row, length in enumerate(SOUND_LENGTHS):
            frames = frames_from(w, sounds[row, :length])
            away = torch.tensor(hidden_frames(i)[row, : len(frames)])
            with torch.no_grad():
                told = [over_tokens(mlp) for mlp in transformed(teacher, frames)[1][-2:]]
            end, mlps = transformed(body, torch.where(away[:, None], student["mask_token"], frames))
            for k in range(2):
                targets[k] += list(told[k][away])
                seen = (mlps[1 + k] if by_block else end)[away]
                shares = F.log_softmax(seen @ student[f"heads.{k}.weight"].T + student[f"heads.{k}.bias"], 1)
                codes = [books[k].nearest(frame) for frame in told[k][away]]
                costs += [-shares[n, code] for n, code in enumerate(codes)]
        loss = torch.stack(costs).mean()
        still = i >= frozen_from
        learner.untrained = never + front if still else never
        learner.learn(i, loss, {"codes": loss}, three_stages(i, STEPS, 2e-3, 4, 6))
        for book, own in zip(books, targets):
            book.learn(own, [book.nearest(frame) for frame in own])
        if not still:
            with torch.no_grad():
                for name, t in teacher.items():
                    m = 0.0 if name.startswith("positions.") else momentum(i + 1)
                    t.mul_(m).add_(student[BODY + name], alpha=1 - m)
    learner.untrained = never
    memory = {"sums": torch.stack([b.sums for b in books]), "counts": torch.stack([b.counts for b in books])}
    return learner.outputs(teacher, start, **memory)
