"""Twenty steps of each method in float64: the published recipes with loops over crops, pairs and neighbours."""

import math

import torch
from torch.nn import functional as F

from ssd.parity.inputs import masks, pictures, without_key_bias
from tests.parity.restated_networks import LEVELS, WIDTH, backbone, backbone_shapes, head, network_shapes, parameters
from tests.parity.restated_parts import bicubic, koleo, sinkhorn_knopp

STEPS, PER_EPOCH, SAMPLES = 20, 5, 8


def entropy_of(q, logits):
    """Mean over rows of the cross-entropy at the student's temperature of .1."""
    return -(q * F.log_softmax(logits / 0.1, dim=-1)).sum(-1)


def views(kind, step, size, number=2):
    return pictures(kind, step, number, SAMPLES, 3, size, size).double()


def fall(start, end, i, ticks):
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / ticks))


def warmed(peak, i):
    """Four steps of linear rise, both ends included, then half a cosine to 1e-6."""
    return peak * i / 3 if i < 4 else fall(peak, 1e-6, i - 4, STEPS - 4)


# ---------------------------------------------------------------------- optimiser and teacher


class Learner:
    """AdamW by hand over a table of weights, by one of three families of rules; and the teacher's average.

    By the rules "masked" the rate is what `learn` is given, and `decay` that of all but biases and vectors.
    `second` is the share of old squares that is kept.
    """

    eps = 1e-8

    def __init__(self, student, rules, clip=None, untrained=(), decay=None, second=None):
        self.student, self.rules, self.clip, self.untrained = student, rules, clip, untrained
        self.decay, self.second = decay, second or (0.95 if rules == "masked" else 0.999)
        self.forget()
        self.start = {name: p.detach().clone() for name, p in student.items()}
        self.curves = {}

    def forget(self):
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p), 0) for n, p in self.student.items()}

    def trained(self):
        return {name: p for name, p in self.student.items() if name not in self.untrained}

    def learn(self, i, loss, terms, peak):
        trained = self.trained()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found)}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        for name, value in (terms | {"gradient norm": norm}).items():
            self.curves.setdefault(name, []).append(float(torch.as_tensor(value).detach()))
        clipped, frozen = self.clipped(gradients), i < PER_EPOCH
        with torch.no_grad():
            for name, p in trained.items():
                last = "last_layer" in name
                if self.rules == "dino" and frozen and last:
                    continue  # the optimiser does not see it
                lr, decay = self.rates(i, name, p, peak)
                if self.rules == "dinov2" and frozen and last:
                    lr = 0.0  # it gathers moments alone
                self.move(name, p, clipped[name], lr, decay)

    def move(self, name, p, gradient, lr, decay):
        first, second, count = self.moments[name]
        first = 0.9 * first + 0.1 * gradient
        second = self.second * second + (1 - self.second) * gradient**2
        self.moments[name] = first, second, count + 1
        p.mul_(1 - lr * decay)
        root = (second / (1 - self.second ** (count + 1))).sqrt() + self.eps
        p.sub_(lr * (first / (1 - 0.9 ** (count + 1))) / root)

    def clipped(self, gradients):
        if self.clip is None:
            return gradients
        parts = {name: name for name in gradients}  # each tensor by itself
        if self.rules == "dinov2":
            parts = {n: "head" if n.startswith("head.") else "patch" if n[:6] == "patch_" else "net" for n in gradients}
        if self.rules == "masked":
            parts = dict.fromkeys(gradients, "all")
        norms = {}
        for name, part in parts.items():
            norms[part] = norms.get(part, 0.0) + float(gradients[name].square().sum())
        return {n: g * min(1.0, self.clip / (math.sqrt(norms[parts[n]]) + 1e-6)) for n, g in gradients.items()}

    def rates(self, i, name, p, peak):
        if self.rules == "none":
            return 1e-3, 0.0
        if self.rules == "masked":
            return peak, 0.0 if name.endswith(".bias") or p.ndim == 1 else self.decay
        lr, decay = warmed(peak, i), fall(0.04, 0.4, i, STEPS)
        if self.rules == "dino":
            return lr, 0.0 if name.endswith(".bias") or p.ndim == 1 else decay
        depth = None
        if ".blocks." in name:
            depth = int(name.split(".")[3]) + 1
        elif name == "mask_token" or (name.startswith("backbone.") and "model.norm" not in name):
            depth = 0
        if depth is not None:
            lr *= 0.9 ** (3 - depth)
        if "patch_embed" in name:
            lr *= 0.2
        return lr, 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else decay

    def average(self, i, teacher, momentum=None):
        if momentum is None:
            momentum = 1 - (1 - 0.9) * 0.5 * (1 + math.cos(math.pi * i / STEPS))
        with torch.no_grad():
            for name, t in teacher.items():
                t.mul_(momentum).add_(self.student[name], alpha=1 - momentum)

    def outputs(self, teacher, teacher_start, **more):
        values = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in self.curves.items()} | more
        for name, p in self.trained().items():
            values[f"student {name}"] = without_key_bias(name, (p - self.start[name]).detach())
        for name, p in teacher.items():
            values[f"teacher {name}"] = without_key_bias(name, (p - teacher_start[name]).detach())
        return values


class LARSLearner(Learner):
    """LARS by hand: matrices and kernels move by a share of their own length, vectors by the gradient as it is."""

    trust = 1e-3

    def move(self, name, p, gradient, lr, decay):
        velocity = self.moments[name][0]
        if p.ndim > 1:
            gradient = gradient + decay * p
            gradient = self.trust * p.norm() / gradient.norm() * gradient
        velocity = 0.9 * velocity + gradient
        self.moments[name] = velocity, velocity, 0
        p.sub_(lr * velocity)


def without_token(table):
    return {name: p.detach().clone() for name, p in table.items() if name != "mask_token"}


def zeros(count):
    return torch.zeros(count, dtype=torch.float64)


# ---------------------------------------------------------------------- methods


def dino():
    """DINO: temperature by epoch .04, .07, then .07; the prototypes are frozen in epoch 0."""
    student = parameters(network_shapes("pictures alone"))
    teacher, learner = without_token(student), Learner(student, "dino", clip=0.5)
    start, center = without_token(teacher), zeros(32)
    for i in range(STEPS):
        temperature = 0.04 if i < PER_EPOCH else 0.07
        globals_, locals_ = views("global", i, 32), views("local", i, 16)
        told = [head(teacher, "head.", backbone(teacher, x)[0]) for x in globals_]
        seen = [head(student, "head.", backbone(student, x)[0]) for x in [*globals_, *locals_]]
        pairs = [
            entropy_of(torch.softmax((told[t] - center) / temperature, -1), seen[s]).mean()
            for t in range(2)
            for s in range(4)
            if s != t
        ]
        loss = sum(pairs) / 6
        learner.learn(i, loss, {"dino": loss}, peak=2e-3 * SAMPLES / 16)
        center = 0.9 * center + 0.1 * torch.cat(told).mean(0)
        learner.average(i, teacher)
    return learner.outputs(teacher, start, center=center)


def ibot():
    """iBOT: masks begin in epoch 1, and so does the warm-up of the patches' temperature; prototypes of patches are
    their own; the patches' centre is the mean over all of them."""
    student = parameters(network_shapes("shared head, own prototypes"))
    teacher, learner = without_token(student), Learner(student, "dino", clip=3.0)
    start, center, patch_center = without_token(teacher), zeros(32), zeros(32)
    own = "head.patch_last_layer."
    for i in range(STEPS):
        temperature, patch_temperature = [(0.04, 0.04), (0.07, 0.04), (0.07, 0.07), (0.07, 0.07)][i // PER_EPOCH]
        masked = masks(i) if i >= PER_EPOCH else torch.zeros(2, SAMPLES, 16, dtype=torch.bool)
        globals_, locals_ = views("global", i, 32), views("local", i, 16)
        told, told_patches, seen, seen_patches = [], [], [], []
        for v, x in enumerate(globals_):
            cls, patches = backbone(teacher, x)
            told.append(head(teacher, "head.head.", cls))
            told_patches.append(head(teacher, "head.head.", patches, own))
            cls, patches = backbone(student, x, masked[v], student["mask_token"])
            seen.append(head(student, "head.head.", cls))
            seen_patches.append(head(student, "head.head.", patches, own))
        seen += [head(student, "head.head.", backbone(student, x)[0]) for x in locals_]
        dino_loss, ibot_loss = 0, 0
        for t in range(2):
            q = torch.softmax((told[t] - center) / temperature, -1)
            for s in range(4):
                dino_loss = dino_loss + (entropy_of(q, seen[s]).mean() / 6 if s != t else 0)
            q = torch.softmax((told_patches[t] - patch_center) / patch_temperature, -1)
            cost = entropy_of(q, seen_patches[t])
            for b in range(SAMPLES):
                hidden = masked[t, b].double()
                ibot_loss = ibot_loss + (hidden * cost[b]).sum() / max(1, int(hidden.sum())) / SAMPLES / 2
        loss = dino_loss + 2.0 * ibot_loss
        learner.learn(i, loss, {"dino": dino_loss, "ibot": ibot_loss}, peak=2e-3 * SAMPLES / 16)
        center = 0.9 * center + 0.1 * torch.cat(told).mean(0)
        patch_center = 0.9 * patch_center + 0.1 * torch.cat(told_patches).mean((0, 1))
        learner.average(i, teacher)
    return learner.outputs(teacher, start, center=center, patch_center=patch_center)


def masked_crops(q, logits, masked):
    """Per crop the mean over its hidden patches, 0 without any; summed over crops and divided by all of them."""
    cost, total, first = entropy_of(q, logits), 0, 0
    for b in range(SAMPLES):
        count = int(masked[b].sum())
        if count:
            total = total + cost[first : first + count].mean() / SAMPLES
        first += count
    return total


def dinov2_centring():
    return dinov2("shared head", "head.head.", "head.head.", sinkhorn=False, clip=12.0)


def dinov2_sinkhorn():
    return dinov2("heads of their own", "head.", "patch_head.", sinkhorn=True, clip=5.0)


def dinov2(heads, cls_head, patch_head, sinkhorn, clip):
    """DINOv2: temperature by step over half of the run; patches' targets and centre are of masked ones alone."""
    student = parameters(network_shapes(heads, registers=2, scales="ls{}.gamma"))
    teacher, learner = without_token(student), Learner(student, "dinov2", clip)
    start, center, patch_center = without_token(teacher), zeros(32), zeros(32)
    for i in range(STEPS):
        temperature, masked = 0.04 + 0.03 * min(i / 9, 1.0), masks(i)
        globals_, locals_ = views("global", i, 32), views("local", i, 16)
        told, hidden, seen, seen_hidden, spread = [], [], [], [], 0
        for v, x in enumerate(globals_):
            cls, patches = backbone(teacher, x)
            told.append(head(teacher, cls_head, cls))
            hidden.append(head(teacher, patch_head, patches[masked[v]]))
            cls, patches = backbone(student, x, masked[v], student["mask_token"])
            seen.append(head(student, cls_head, cls))
            seen_hidden.append(head(student, patch_head, patches[masked[v]]))
            spread = spread + koleo(cls[None], 4).mean()
        seen += [head(student, cls_head, backbone(student, x)[0]) for x in locals_]
        if sinkhorn:
            q = sinkhorn_knopp(torch.cat(told), temperature).chunk(2)
            q_hidden = sinkhorn_knopp(torch.cat(hidden), temperature).split([len(rows) for rows in hidden])
        else:
            q = [torch.softmax((t - center) / temperature, -1) for t in told]
            q_hidden = [torch.softmax((t - patch_center) / temperature, -1) for t in hidden]
        pairs = [entropy_of(q[t], seen[s]).mean() for t in range(2) for s in range(4) if s != t]
        dino_loss = sum(pairs) / (2 + 2 * 2)
        ibot_loss = sum(masked_crops(q_hidden[v], seen_hidden[v], masked[v]) for v in range(2)) / 2
        loss = dino_loss + ibot_loss + 0.1 * spread
        terms = {"dino": dino_loss, "ibot": ibot_loss, "koleo": spread}
        learner.learn(i, loss, terms, peak=2e-3 * math.sqrt(SAMPLES / 32))
        if not sinkhorn:
            center = 0.9 * center + 0.1 * torch.cat(told).mean(0)
            patch_center = 0.9 * patch_center + 0.1 * torch.cat(hidden).mean(0)
        learner.average(i, teacher)
    more = {} if sinkhorn else {"center": center, "patch_center": patch_center}
    return learner.outputs(teacher, start, **more)


def franca():
    """Franca, the paper's form: three levels see the first 6, 12 and 24 dimensions, are assigned apart and summed."""
    student = parameters(network_shapes("nested heads", registers=2, scales="ls{}.gamma"))
    teacher, learner = without_token(student), Learner(student, "dinov2", clip=12.0)
    start = without_token(teacher)
    for i in range(STEPS):
        temperature, masked = 0.04 + 0.03 * min(i / 9, 1.0), masks(i)
        globals_, locals_ = views("global", i, 32), views("local", i, 16)
        told = [backbone(teacher, x) for x in globals_]
        seen = [backbone(student, x, masked[v], student["mask_token"]) for v, x in enumerate(globals_)]
        all_seen = [cls for cls, _ in seen] + [backbone(student, x)[0] for x in locals_]
        dino_loss, ibot_loss = 0, 0
        for level, width in enumerate(LEVELS):
            of_cls, of_patch = f"head.heads.{level}.", f"patch_head.heads.{level}."
            q = [head(teacher, of_cls, cls[:, :width]) for cls, _ in told]
            q = sinkhorn_knopp(torch.cat(q), temperature).chunk(2)
            logits = [head(student, of_cls, cls[:, :width]) for cls in all_seen]
            pairs = [entropy_of(q[t], logits[s]).mean() for t in range(2) for s in range(4) if s != t]
            dino_loss = dino_loss + sum(pairs) / 6
            hidden = [head(teacher, of_patch, told[v][1][masked[v]][:, :width]) for v in range(2)]
            q = sinkhorn_knopp(torch.cat(hidden), temperature).split([len(rows) for rows in hidden])
            logits = [head(student, of_patch, seen[v][1][masked[v]][:, :width]) for v in range(2)]
            ibot_loss = ibot_loss + sum(masked_crops(q[v], logits[v], masked[v]) for v in range(2)) / 2
        spread = sum(koleo(cls[None], 4).mean() for cls, _ in seen)
        loss = dino_loss + ibot_loss + 0.1 * spread
        terms = {"dino": dino_loss, "ibot": ibot_loss, "koleo": spread}
        learner.learn(i, loss, terms, peak=2e-3 * math.sqrt(SAMPLES / 32))
        learner.average(i, teacher)
    return learner.outputs(teacher, start)


def dinov3():
    """DINOv3: Sinkhorn, plain prototypes, rotary positions, a norm of their own for local views, and a Gram teacher
    that becomes the teacher after steps 9 and 12, the first two multiples of 3 from step 8 on."""
    shapes = network_shapes("heads of their own", registers=2, scales="gamma_{}", rotary=True)
    student = parameters(shapes | {"local_norm.weight": (WIDTH,), "local_norm.bias": (WIDTH,)})
    teacher, learner = without_token(student), Learner(student, "dinov2", clip=5.0)
    start = without_token(teacher)
    anchor = parameters(backbone_shapes(2, "gamma_{}", True, prefix="model."), "gram ")
    anchor = {f"backbone.{name}": p.detach() for name, p in anchor.items()}
    for i in range(STEPS):
        temperature, masked = 0.04 + 0.03 * min(i / 9, 1.0), masks(i)
        globals_, locals_, plain = views("global", i, 32), views("local", i, 16), views("gram", i, 64)
        told, hidden, seen, seen_hidden, spread, gram = [], [], [], [], 0, 0
        for v, x in enumerate(globals_):
            cls, patches = backbone(teacher, x, rotary=True)
            told.append(head(teacher, "head.", cls))
            hidden.append(head(teacher, "patch_head.", patches[masked[v]]))
            cls, patches = backbone(student, x, masked[v], student["mask_token"], rotary=True)
            seen.append(head(student, "head.", cls))
            seen_hidden.append(head(student, "patch_head.", patches[masked[v]]))
            spread = spread + koleo(cls[None], 4).mean()
            wide = backbone(anchor, plain[v], rotary=True)[1]
            # all pictures at once: the crop is one more axis of the features
            small = bicubic(wide.view(SAMPLES, 8, 8, WIDTH).permute(1, 2, 0, 3).reshape(8, 8, -1), 4, 4)
            small = small.view(16, SAMPLES, WIDTH).transpose(0, 1)
            s = patches / patches.norm(dim=-1, keepdim=True)
            t = small / small.norm(dim=-1, keepdim=True)
            gram = gram + (s @ s.transpose(1, 2) - t @ t.transpose(1, 2)).square().mean() / 2
        own = student["local_norm.weight"], student["local_norm.bias"]
        locally = [head(student, "head.", backbone(student, x, rotary=True, norm=own)[0]) for x in locals_]
        q = sinkhorn_knopp(torch.cat(told), temperature).chunk(2)
        q_hidden = sinkhorn_knopp(torch.cat(hidden), temperature).split([len(rows) for rows in hidden])
        across = (entropy_of(q[0], seen[1]).mean() + entropy_of(q[1], seen[0]).mean()) / 6
        local = sum(entropy_of(q[t], logits).mean() for t in range(2) for logits in locally) / 6
        ibot_loss = sum(masked_crops(q_hidden[v], seen_hidden[v], masked[v]) for v in range(2)) / 2
        loss = across + 0.5 * local + ibot_loss + 0.1 * spread + 1.5 * gram
        terms = {"dino_global": across, "dino_local": local, "ibot": ibot_loss, "koleo": spread, "gram": gram}
        learner.learn(i, loss, terms, peak=2e-3 * math.sqrt(SAMPLES / 32))
        learner.average(i, teacher)
        if i + 1 in (9, 12):
            anchor = {name: p.clone() for name, p in teacher.items() if name.startswith("backbone.")}
    return learner.outputs(teacher, start)


def random_teacher():
    """Random teacher: the student starts between two draws, and the divergence from the teacher is minimised."""
    shapes, norm = network_shapes("pictures alone"), math.sqrt(0.7**2 + 0.3**2)
    teacher, other = parameters(shapes), parameters(shapes, "another ")
    teacher = {name: p.detach() for name, p in teacher.items()}
    student = {n: ((0.7 * teacher[n] + 0.3 * other[n].detach()) / norm).requires_grad_() for n in shapes}
    learner = Learner(student, "none", untrained=("head.last_layer.weight_g",))
    for i in range(STEPS):
        (x,) = views("global", i, 32, number=1)
        log_q = F.log_softmax(head(teacher, "head.", backbone(teacher, x)[0]), -1)
        log_p = F.log_softmax(head(student, "head.", backbone(student, x)[0]), -1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        learner.learn(i, loss, {"kl": loss}, peak=None)
    return learner.outputs(teacher, teacher)
