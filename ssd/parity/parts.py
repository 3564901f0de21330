"""Our values of every part that knows no method: losses, targets, heads, schedules, optimiser rules, teachers."""

import copy

import torch
from torch import Tensor, nn

from ssd.backbones.vit import ViT
from ssd.batch import Scores
from ssd.data.randomness import key, uniforms
from ssd.heads import PrototypeHead, Prototypes
from ssd.losses.divergence import divergence
from ssd.losses.gram import gram_loss, resize_tokens
from ssd.losses.prototype import cross_view_cross_entropy, entropy, token_cross_entropy
from ssd.losses.spread import koleo
from ssd.optim import LARS, SGD, AdamW, Clip, OptimizerRule, parameter_groups, resolve_lr
from ssd.parity.inputs import distribution, fill, numbers
from ssd.patch_heads import PatchBranch, PatchHead
from ssd.schedules import Cosine, Linear, Schedule, value_at
from ssd.targets import Centering, Sinkhorn
from ssd.teachers import EMA

Outputs = dict[str, Tensor]


def random_numbers(device: torch.device) -> Outputs:
    """The counter-based generator of crops, colours and masks, and of all inputs here."""
    drawn = torch.from_numpy(uniforms((2, 2), 7, 1, 2)).flatten() * 2**53
    return {"uniforms": words([int(number) for number in drawn]), "key": words([key(3, -2)])}


def words(numbers_of_64_bits: list[int]) -> Tensor:
    """In pieces of 16 bits, which are exact in any format."""
    return torch.tensor([number >> shift & 0xFFFF for number in numbers_of_64_bits for shift in (48, 32, 16, 0)])


# ---------------------------------------------------------------------- losses


def with_gradients(name: str, loss: Tensor, **leaves: Tensor) -> Outputs:
    """The loss, and the gradients of its sum under weights that differ by element."""
    pull = numbers(f"pull of {name}", *loss.shape).to(loss.device)
    gradients = torch.autograd.grad((loss * pull).sum(), list(leaves.values()))
    return {name: loss} | {f"gradient of {name}, {leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}


def leaf(name: str, *shape: int, device: torch.device) -> Tensor:
    return numbers(name, *shape).to(device).requires_grad_()


def cross_entropy_of_views(device: torch.device) -> Outputs:
    logits = leaf("student logits", 4, 3, 7, device=device)
    target = distribution("targets", 2, 3, 7).to(device)
    values: Outputs = {}
    for skip, name in ((True, "other views"), (False, "all views")):
        values |= with_gradients(
            name, cross_view_cross_entropy(logits, target, 0.1, skip_same_view=skip), logits=logits
        )
    features = leaf("student features", 4, 3, 5, device=device)
    prototypes = leaf("prototypes", 7, 5, device=device)
    loss = cross_view_cross_entropy(Scores(features, prototypes), target, 0.1, skip_same_view=True)
    return values | with_gradients("scores", loss, features=features, prototypes=prototypes)


def cross_entropy_of_tokens(device: torch.device) -> Outputs:
    logits = leaf("student logits", 5, 7, device=device)
    return with_gradients(
        "tokens", token_cross_entropy(logits, distribution("targets", 5, 7).to(device), 0.1, chunk=2), logits=logits
    )


def divergences(device: torch.device) -> Outputs:
    logits = leaf("student logits", 2, 3, 7, device=device)
    target = torch.log_softmax(numbers("teacher logits", 2, 3, 7).to(device) / 0.5, dim=-1)
    return with_gradients("divergence", divergence(logits, target, 0.7), logits=logits)


def entropies(device: torch.device) -> Outputs:
    return {"entropy": entropy(distribution("targets", 2, 3, 7).to(device))}


def koleo_of_groups(device: torch.device) -> Outputs:
    values: Outputs = {}
    for group in (3, 6):
        features = leaf("features", 2, 6, 5, device=device)
        values |= with_gradients(f"groups of {group}", koleo(features, group), features=features)
    return values


def gram(device: torch.device) -> Outputs:
    student = leaf("student patches", 2, 6, 5, device=device)
    return with_gradients("gram", gram_loss(student, numbers("teacher patches", 2, 6, 4).to(device)), student=student)


def resized(device: torch.device) -> Outputs:
    tokens = numbers("patches", 1, 48, 2).to(device)
    return {"smaller": resize_tokens(tokens, (6, 8), (3, 4)), "larger": resize_tokens(tokens, (6, 8), (9, 8))}


# ---------------------------------------------------------------------- targets


def centring(device: torch.device) -> Outputs:
    """Two updates from logits, and one from scores of which some are padding."""
    center = Centering(7, momentum=0.9).to(device)
    values: Outputs = {}
    for number in range(2):
        logits = numbers(f"teacher logits {number}", 2, 3, 7).to(device)
        values[f"targets {number}"] = center(logits, 0.2)
        center.update(logits)
        values[f"centre {number}"] = center.center.clone()
    scores = Scores(numbers("teacher features", 4, 5).to(device), numbers("prototypes", 7, 5).to(device))
    center.update(scores, torch.tensor([True, False, True, True], device=device))
    return values | {"centre of scores": center.center}


def sinkhorn(device: torch.device) -> Outputs:
    return {"targets": Sinkhorn()(numbers("teacher logits", 2, 3, 5).to(device), 0.2)}


def padded_sinkhorn(device: torch.device) -> Outputs:
    logits, valid = numbers("teacher logits", 8, 5), torch.tensor([True, True, False, True, True, False, True, True])
    return {"targets": Sinkhorn()(logits.to(device), 0.2, valid.to(device))}


# ---------------------------------------------------------------------- heads


def head_outputs(name: str, head: nn.Module, logits: Tensor, features: Tensor) -> Outputs:
    trained = {part: p for part, p in head.named_parameters() if p.requires_grad}
    return with_gradients(f"{name}logits", logits, features=features, **trained)


def head_with_weight_norm(device: torch.device) -> Outputs:
    head = PrototypeHead(6, 9, hidden_dim=8, bottleneck_dim=4, train_gain=True)
    return head_answers(head.to(device), device)


def plain_head(device: torch.device) -> Outputs:
    head = PrototypeHead(6, 9, hidden_dim=8, bottleneck_dim=4, weight_norm=False)
    return head_answers(head.to(device), device)


def head_answers(head: PrototypeHead, device: torch.device) -> Outputs:
    fill(head)
    features = leaf("features", 2, 3, 6, device=device)
    return head_outputs("", head, head(features).logits(), features)


def patch_head(device: torch.device) -> Outputs:
    """Pictures and patches together, with the pictures' prototypes and with the patches' own."""
    values: Outputs = {}
    for name, own in (("shared, ", None), ("own, ", Prototypes(4, 9, train_gain=True))):
        head = PatchHead(PrototypeHead(6, 9, hidden_dim=8, bottleneck_dim=4, train_gain=True), own).to(device)
        fill(head)
        features = leaf("features", 9, 6, device=device)
        of_pictures, of_patches = head(features[:4].unflatten(0, (2, 2)), features[4:])
        logits = torch.cat([of_pictures.logits().flatten(0, 1), of_patches.logits()])
        values |= head_outputs(name, head, logits, features)
    return values


# ---------------------------------------------------------------------- schedules

TOTAL, PER_EPOCH = 20, 4


def curve(schedule: Schedule) -> Tensor:
    return torch.tensor([value_at(schedule, i, TOTAL, PER_EPOCH) for i in range(TOTAL)], dtype=torch.float64)


def linear_schedules(device: torch.device) -> Outputs:
    return {
        "share of the steps": curve(Linear(0.04, 0.07, until=0.3)),
        "steps": curve(Linear(0.04, 0.07, until="8 steps")),
        "epochs as stairs": curve(Linear(0.04, 0.07, until="3 epochs", every="epoch")),
        "share of the epochs": curve(Linear(0.04, 0.07, until=0.6, every="epoch")),
        "after a wait": curve(Linear(0.0, 2.0, until=0.5, after="2 epochs")),
    }


def cosine_schedules(device: torch.device) -> Outputs:
    return {
        "no warm-up": curve(Cosine(0.996, 1.0)),
        "warm-up": curve(Cosine(1.0, 0.1, warmup="4 steps")),
        "warm-up from above 0": curve(Cosine(1.0, 0.1, warmup=0.25, warmup_start=0.2)),
        "reaches its end": curve(Cosine(1.0, 0.1, warmup="4 steps", reaches_end=True)),
        "reaches its end without warm-up": curve(Cosine(1.0, 0.0, reaches_end=True)),
        "stairs": curve(Cosine(1.0, 0.1, warmup="1 epochs", every="epoch")),
        "stairs with a longer warm-up": curve(Cosine(1.0, 0.1, warmup="2 epochs", every="epoch")),
        "after a wait": curve(Cosine(0.0, 2.0, after=0.5)),
    }


# ---------------------------------------------------------------------- optimisers


def groups_of_dino(device: torch.device) -> Outputs:
    return group_outputs("bias_and_1d", 1.0, 1.0)


def groups_of_dinov2(device: torch.device) -> Outputs:
    return group_outputs("bias_norm_and_scale", 0.9, 0.2)


def group_outputs(decay_rule: str, layer_decay: float, patch_embed_lr_scale: float) -> Outputs:
    """For each parameter of a small ViT with registers and scales: whether it decays, factor of its rate, last layer."""
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "init_values": 0.1, "reg_tokens": 2}
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=size)
    own = Prototypes(8, 32, train_gain=True)
    head = PatchHead(PrototypeHead(24, 32, hidden_dim=16, bottleneck_dim=8, train_gain=True), own)
    network = PatchBranch(backbone, head)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: torch.tensor(
            [group["decays"], group["lr_scale"], group["last_layer"]], dtype=torch.double
        )
        for group in parameter_groups(network, decay_rule, layer_decay, patch_embed_lr_scale)
        for parameter in group["params"]
    }


def rates_of_batches(device: torch.device) -> Outputs:
    rates = []
    for rule, lr, reference, batch in (
        ("linear", 5e-4, 256, 1024),
        ("sqrt", 4e-3, 1024, 2048),
        ("sqrt", 2e-4, 1024, 4096),
        ("none", 1e-3, 256, 4096),
        ("linear", Cosine(5e-4, 1e-6), 256, 1024),
        ("sqrt", Cosine(4e-3, 1e-6), 1024, 2048),
    ):
        resolved = resolve_lr(lr, rule, reference, batch)
        ends = (resolved.start, resolved.end) if isinstance(resolved, Schedule) else (resolved, resolved)
        rates.append(ends)
    # in thousandths, so that a difference is relative to rates of this size
    return {"thousandths": 1000 * torch.tensor(rates, dtype=torch.float64)}


def clipping(device: torch.device) -> Outputs:
    values: Outputs = {}
    for over in ("tensor", "module", "all"):
        gradients = [(number + 1) * numbers(f"gradient {number}", 3, 2).to(device) for number in range(4)]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        Clip(2.5, over=over).apply(gradients, norms, ["backbone", "backbone", "head", "patch_head"])
        values[over] = torch.stack(gradients)
    return values


def optimisers(device: torch.device) -> Outputs:
    """Three steps of each rule on a matrix that decays, a vector that does not, and one whose gradients are as small as
    what Adam adds to them."""
    rules: dict[str, OptimizerRule] = {"AdamW": AdamW(), "SGD": SGD(), "LARS": LARS(trust_coefficient=0.1)}
    shapes = {"matrix": (3, 2), "vector": (4,), "faint vector": (4,)}
    values: Outputs = {}
    for name, rule in rules.items():
        parameters = {part: nn.Parameter(numbers(part, *shape).to(device)) for part, shape in shapes.items()}
        optimizer = rule.build([{"params": [parameter]} for parameter in parameters.values()])
        for step in range(3):
            for group, (part, parameter) in zip(optimizer.param_groups, parameters.items(), strict=True):
                size = 1e-7 if part == "faint vector" else 1.0
                parameter.grad = size * numbers(f"gradient of the {part} {step}", *parameter.shape).to(device)
                group["lr"], group["weight_decay"] = 0.1, 0.3 if part == "matrix" else 0.0
            optimizer.step()
        values |= {f"{name}, {part}": parameter for part, parameter in parameters.items()}
    return values


def teacher_average(device: torch.device) -> Outputs:
    """Three updates of a teacher without the student's mask token."""

    class Network(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.mask_token = nn.Parameter(torch.zeros(1, 3))

    student = Network().to(device)
    fill(student)
    teacher = EMA(copy.deepcopy(student), without=("mask_token",))
    for update, momentum in enumerate((0.9, 0.5, 0.99)):
        fill(student, f"update {update} ")
        teacher.update(student, momentum)
    return {f"teacher {name}": parameter for name, parameter in teacher.network.named_parameters()}
