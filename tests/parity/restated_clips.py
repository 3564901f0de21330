"""DISCOVR in float64, from its paper's equations: tokens paired by hand, assignments row by row, and twenty steps."""

import math

import torch
from torch.nn import functional as F

from ssd.parity.inputs import equal_masks, pictures
from tests.parity.restated_frozen import behind_norm, ends, entered
from tests.parity.restated_masked import EPS, decoded, decoder_shapes, encoder_shapes, rate, table_of
from tests.parity.restated_networks import block, block_shapes, head, head_shapes, parameters, part
from tests.parity.restated_parts import given
from tests.parity.restated_trajectories import PER_EPOCH, SAMPLES, STEPS, Learner, entropy_of, zeros

FRAMES, MASKS, CLUSTERS, WIDE, NARROW = 4, 2, 12, 24, 32

# ---------------------------------------------------------------------- parts


def balanced(scores, rounds):
    """E = exp(s / .05), prototypes by tokens, over its sum; then in turn each prototype's row over its sum and K, each
    token's column over its sum and their number; at last columns that sum to 1."""
    e = torch.exp(scores.T / 0.05)
    e = e / e.sum()
    for _ in range(rounds):
        e = torch.stack([row / row.sum() / len(e) for row in e])
        e = torch.stack([column / column.sum() / e.shape[1] for column in e.T], 1)
    return (e / e.sum(0)).T


def over_patches(f):
    """(N, D): each channel less its mean, over its deviation by N - 1 and 1e-6."""
    mean = f.mean(0)
    return (f - mean) / (((f - mean).square().sum(0) / (len(f) - 1)).sqrt() + 1e-6)


def assignments():
    high = math.e / (1 + math.e)
    one = [[0.637890, 0.362110], [0.192510, 0.807490]]
    features, two = 3 * given("frame patches", 2, 5, 7) + 1, torch.tensor([[1.0, 0.0], [0.9, 0.0]]).double()
    by_hand = balanced(two, 1)
    assert (by_hand - torch.tensor(one).double()).abs().max() < 1e-6
    return {
        "ten rounds": balanced(given("scores", 9, 5), 10),
        "one round by hand": by_hand,
        "ten rounds by hand": torch.tensor([[high, 1 - high], [1 - high, high]], dtype=torch.float64),
        "standardised over patches": torch.stack([over_patches(f) for f in features]),
    }


# ---------------------------------------------------------------------- networks


def clip_shapes():
    shapes = {"cls_token": (1, 1, WIDE), "norm.weight": (WIDE,), "norm.bias": (WIDE,)}
    shapes |= {"patch_embed.proj.weight": (WIDE, 3, 2, 8, 8), "patch_embed.proj.bias": (WIDE,)}
    for number in range(2):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block_shapes(WIDE).items()}
    return {f"backbone.model.{name}": shape for name, shape in shapes.items()}


def teacher_shapes():
    shapes = clip_shapes() | head_shapes("head.", WIDE, 16, 8, 32, "norm")
    shapes |= encoder_shapes("image_backbone.model.", NARROW, 2)
    return shapes | head_shapes("image_head.", NARROW, 16, 8, 32, "norm")


def student_shapes():
    return teacher_shapes() | decoder_shapes(WIDE, 16, NARROW, bias=False) | {"clusters.weight": (CLUSTERS, NARROW)}


def through_blocks(w, x):
    for number in range(2):
        x = block(part(w, f"blocks.{number}."), x, 2, EPS)
    return behind_norm(w, x)


def chosen(tokens, shown):
    """The class token and the patches that are shown, (B, 1 + n, D)."""
    return torch.stack([tokens[b, [0] + [1 + n for n in seen]] for b, seen in enumerate(shown)])


def of_clips(p, clips, shown=None):
    """Tokens behind the last norm; tubes of two frames by 8 x 8 px, times first, then rows, then columns."""
    w, tubes = part(p, "backbone.model."), []
    for t in range(0, FRAMES, 2):
        for i in range(0, 32, 8):
            for j in range(0, 32, 8):
                tubes.append(clips[:, :, t : t + 2, i : i + 8, j : j + 8].flatten(1))
    tokens = torch.stack(tubes, 1) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    tokens = torch.cat([w["cls_token"].expand(len(clips), -1, -1), tokens + table_of((2, 4, 4), WIDE)], 1)
    return through_blocks(w, tokens if shown is None else chosen(tokens, shown))


def of_frame(p, frame, shown=None):
    w = part(p, "image_backbone.model.")
    if shown is None:
        return behind_norm(w, ends(w, frame)[-1])
    return through_blocks(w, chosen(entered(w, frame), shown))


def shown_of(step, shown=4, times=1):
    rows = equal_masks(step, shown=shown)[0].tolist()
    return [[16 * t + n for t in range(times) for n in range(16) if not row[n]] for row in rows]


# ---------------------------------------------------------------------- twenty steps


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def discovr():
    return clips_and_frames(judged=(0, 1, 2, 3), hard=False, from_both=True)


def discovr_released():
    return clips_and_frames(judged=(0, 3), hard=True, from_both=False)


def clips_and_frames(judged, hard, from_both):
    student = parameters(student_shapes())
    teacher = {name: student[name].detach().clone() for name in teacher_shapes()}
    start = {name: p.clone() for name, p in teacher.items()}
    restore(student)
    gains = ("head.last_layer.weight_g", "image_head.last_layer.weight_g")
    learner = Learner(student, "masked", decay=0.05, untrained=gains)
    center, image_center = zeros(32), zeros(32)
    for i in range(STEPS):
        restore(student)  # before use, at every step
        temperature = 0.04 if i < PER_EPOCH else 0.07
        clips = pictures("clips", i, 1, SAMPLES, 3, FRAMES, 32, 32)[0].double()
        prototypes = student["clusters.weight"]

        told = head(teacher, "head.", of_clips(teacher, clips)[:, 0])
        p = torch.softmax((told - center) / temperature, -1)
        costs = []
        for m in range(1, 1 + MASKS):  # the first mask is the decoder's
            seen = of_clips(student, clips, shown_of(i + 3 * m, times=2))[:, 0]
            costs.append(entropy_of(p, head(student, "head.", seen)).mean())
        video = sum(costs) / MASKS

        frames = {f: of_frame(teacher, clips[:, :, f]) for f in sorted({*judged, 0, 2})}
        of_heads = [head(teacher, "image_head.", frames[f][:, 0]) for f in judged]
        costs = []
        for number, f in enumerate(judged):
            p = torch.softmax((of_heads[number] - image_center) / temperature, -1)
            for m in range(MASKS):
                seen = of_frame(student, clips[:, :, f], shown_of(i + 5 * m + number + 1, shown=5))[:, 0]
                costs.append(entropy_of(p, head(student, "image_head.", seen)).mean())
        image = sum(costs) / len(costs)

        shown = shown_of(i, times=2)
        seen = of_clips(student, clips, shown)[:, 1:]
        z_clip = unit(decoded(part(student, "decoder."), seen, shown, (2, 4, 4))).flatten(0, 1)
        # a tube's first frame, at the tube's own place
        paired = [torch.cat([over_patches(frames[f][b, 1:]) for f in (0, 2)]) for b in range(SAMPLES)]
        z_frame = unit(torch.cat(paired))
        q_clip, q_frame = (balanced((z @ prototypes.T).detach(), 10) for z in (z_clip, z_frame))
        if hard:
            q_clip, q_frame = (F.one_hot(q.argmax(1), CLUSTERS).double() for q in (q_clip, q_frame))
        by_frames = prototypes if from_both else prototypes.detach()
        scd = entropy_of(q_frame, z_clip @ prototypes.T).mean() + entropy_of(q_clip, z_frame @ by_frames.T).mean()

        terms = {"video": video, "image": image, "scd": scd}
        learner.learn(i, video + 0.5 * image + 2 * scd, terms, rate(i, STEPS))
        center = 0.8 * center + 0.2 * told.mean(0)
        image_center = 0.8 * image_center + 0.2 * torch.cat(of_heads).mean(0)
        learner.average(i, teacher, 0.9)
    restore(student)
    fixed = {"image_backbone.model.pos_embed": torch.zeros(1, 17, NARROW).double()}
    return learner.outputs(teacher | fixed, start | fixed, center=center, image_center=image_center)


def restore(student):
    with torch.no_grad():
        student["clusters.weight"].copy_(unit(student["clusters.weight"]))
