"""One training step of DINO, ours beside lightly's published loop on the same timm backbone, and the parts of it."""

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.vit import ViT
from ssd.batch import Batch, Scores
from ssd.benchmarks.memory import peak_bytes
from ssd.benchmarks.packed import packed_pass
from ssd.benchmarks.paired import Pair, compare
from ssd.errors import UserError
from ssd.heads import Branch, PrototypeHead
from ssd.losses.prototype import cross_view_cross_entropy
from ssd.memory import STATUS, status_mib
from ssd.optim import parameter_groups
from ssd.parallel import compile_blocks
from ssd.teachers import EMA
from ssd.views.recipes import DINOViews

LR, MOMENTUM, WEIGHT_DECAY = 5e-4, 0.996, 0.04
BF16_FLOPS_PER_S = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""What makers write of dense bf16 products, by a part of the device's name."""


@dataclass(frozen=True)
class Case:
    """What both sides train.

    Args:
        arguments: of the timm model, for a smaller one.
        half: ours under bf16 autocast.
        renormalized: our prototypes at unit length after each step, instead of weight norm inside it.
    """

    network: str = "vit_tiny_patch16_224"
    arguments: dict[str, Any] = field(default_factory=dict)
    global_size: int = 96
    local_size: int = 48
    local_count: int = 6
    batch: int = 32
    prototypes: int = 4096
    half: bool = False
    renormalized: bool = False
    device: str = "cpu"

    def name(self) -> str:
        views = f"2x{self.global_size} + {self.local_count}x{self.local_size}"
        return f"{self.network.partition('_patch')[0]}, {views}, batch {self.batch}, K {self.prototypes:,}"

    def views(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"global": (2, self.global_size), "local": (self.local_count, self.local_size)}
        return {
            kind: torch.randn(count, self.batch, 3, size, size, generator=generator).to(self.device)
            for kind, (count, size) in shapes.items()
        }

    def backbone(self, **settings: Any) -> ViT:
        torch.manual_seed(0)
        return ViT(self.network, img_size=self.global_size, arguments=self.arguments, **settings)

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16) if self.half else nullcontext()


LARGE_ON_GPU = Case("vit_small_patch16_224", {}, 224, 96, 8, 64, 65_536, half=True, device="cuda")


class Ours:
    """The project's DINO, stepped outside a trainer.

    Args:
        fused: AdamW in torch's fused form, as the project builds it.
    """

    def __init__(self, case: Case, *, fused: bool = True, compiled: bool = False, **backbone: Any):
        from lightning_modules.dino import DINO

        views = DINOViews(global_size=case.global_size, local_size=case.local_size, local_count=case.local_count)
        self.case = case
        self.module = DINO(
            case.backbone(**backbone),
            views=views,
            num_prototypes=case.prototypes,
            lr=LR,
            lr_rule="none",
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
            freeze_last_layer=0.0,
            renormalize_prototypes=case.renormalized,
        )
        self.module.to(case.device).train().begin(1_000_000, 1000)
        if compiled:
            compile_blocks(self.module.student)
            compile_blocks(self.module.teacher)
        self.optimizers = self.module.build_optimizers()
        if not fused:
            self.optimizers = [torch.optim.AdamW(parameter_groups(self.module.student, self.module.decay_rule))]
        self.batch = Batch(case.views(), torch.arange(case.batch, device=case.device), case.batch)

    def __call__(self) -> None:
        with self.case.autocast():
            self.module.take_step(self.batch, self.optimizers)
        wait(self.case.device)


class Lightlys:
    """lightly's DINO example: its head, loss and momentum update, one forward pass per view, AdamW."""

    def __init__(self, case: Case):
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.case = case
        backbone = case.backbone().model
        head = DINOProjectionHead(backbone.embed_dim, 2048, 256, case.prototypes, freeze_last_layer=-1)
        # weight norm's own tensors do not copy: a second head takes over the first one's state
        teacher_head = DINOProjectionHead(backbone.embed_dim, 2048, 256, case.prototypes)
        teacher_head.load_state_dict(head.state_dict())
        self.student = nn.Sequential(backbone, head).to(case.device).train()
        self.teacher = nn.Sequential(copy.deepcopy(backbone), teacher_head).to(case.device).train()
        deactivate_requires_grad(self.teacher)
        self.criterion = DINOLoss(output_dim=case.prototypes, warmup_teacher_temp_epochs=5).to(case.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        self.views = [view for kind in case.views().values() for view in kind]

    def __call__(self) -> Tensor:
        from lightly.models.utils import update_momentum

        for mine, theirs in zip(self.student, self.teacher):
            update_momentum(mine, theirs, m=MOMENTUM)
        with self.case.autocast():
            with torch.no_grad():
                targets = [self.teacher(view) for view in self.views[:2]]
            answers = [self.student(view) for view in self.views]
            loss = self.criterion(targets, answers, epoch=0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        wait(self.case.device)
        return loss.detach()


SIDES: dict[str, Callable[[Case], Any]] = {"ours": Ours, "lightly": Lightlys}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock() -> Callable[[], float]:
    """Processor time for one thread, which others on the machine do not lengthen; the wall's for more."""
    one = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if one else time.perf_counter


# ---------------------------------------------------------------------- comparisons


def compare_steps(case: Case, rounds: int) -> list[Pair]:
    """Ours in float32 and in bf16, with exact weight norm and renormalised, beside lightly's loop in float32, in images/s."""
    theirs, pairs = Lightlys(replace(case, half=False)), []
    for half, renormalized in product((False, True), (False, True)):
        name = f"step, {case.name()}, {'bf16' if half else 'float32'} to float32"
        name += ", renormalised" if renormalized else ""
        ours = Ours(replace(case, half=half, renormalized=renormalized))
        pairs.append(compare(name, ours, theirs, count=case.batch, rounds=rounds, unit="images/s", clock=clock()))
        del ours
    return pairs


def compare_settings(case: Case, rounds: int, compiled: bool) -> list[Pair]:
    """What each setting does to our own step: with it beside without it."""
    half = replace(case, half=True)
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
        ("bf16", lambda: Ours(half), lambda: Ours(case)),
        ("fused AdamW", lambda: Ours(case), lambda: Ours(case, fused=False)),
        ("activation checkpointing", lambda: Ours(case, activation_checkpointing=True), lambda: Ours(case)),
    ]
    if compiled:
        cases.append(("compile, bf16", lambda: Ours(half, compiled=True), lambda: Ours(half)))
    if case.device == "cpu":
        cases.append(("plain attention, bf16", lambda: Ours(half), lambda: with_fused_attention(Ours(half))))
    pairs = []
    for setting, build_with, build_without in cases:
        name = f"setting: {setting}, {case.name()}"
        sides = build_with(), build_without()
        pairs.append(
            compare(name, *sides, count=case.batch, rounds=rounds, unit="images/s", against="without", clock=clock())
        )
        mine, others = (peak_bytes(side, case.device) / 2**20 for side in sides)
        ratio = mine / others
        pairs.append(Pair(f"{name}: memory of a step", "without", mine, others, ratio, ratio, ratio, "MiB"))
    return pairs


def with_fused_attention(ours: Ours) -> Ours:
    """The kernel that the backbone avoids in bf16 on a CPU."""
    for module in ours.module.modules():
        if isinstance(module, ViT):
            for attention in module.attention:
                attention.fused_attn = True
            module.attention = ()
    return ours


def compare_packed(case: Case, rounds: int) -> Pair:
    """The student's forward and backward pass: tokens of all views packed, beside one pass for each size."""
    network, views = case.backbone().to(case.device).train(), case.views()
    pictures = [kind.flatten(0, 1) for kind in views.values()]
    branch = Branch(network, nn.Identity())

    def one_per_size() -> None:
        learn(lambda: branch(views))

    def packed() -> None:
        learn(lambda: packed_pass(network, pictures))

    def learn(answer: Callable[[], Tensor]) -> None:
        with case.autocast():
            answer().square().sum().backward()
        network.zero_grad()
        wait(case.device)

    name = f"packed pass of all views, {case.name()}, {'bf16' if case.half else 'float32'}"
    against = "pass per size"
    return compare(
        name, packed, one_per_size, count=case.batch, rounds=rounds, unit="images/s", against=against, clock=clock()
    )


def compare_ema(rounds: int, network: str, arguments: dict[str, Any], prototypes: int, device: str = "cpu") -> Pair:
    """Our update of a backbone with its head, beside the loop over parameters that published code has."""
    backbone = ViT(network, arguments=arguments)
    student = Branch(backbone, PrototypeHead(backbone.embed_dim, prototypes)).to(device)
    teacher, other = EMA(student).to(device), copy.deepcopy(student)

    @torch.no_grad()
    def loop() -> None:
        for old, new in zip(other.parameters(), student.parameters()):
            old.data = old.data * MOMENTUM + new.data * (1.0 - MOMENTUM)
        wait(device)

    def fused() -> None:
        teacher.update(student, MOMENTUM)
        wait(device)

    name = f"EMA, {network.partition('_patch')[0]} and head, K {prototypes:,}"
    return compare(
        name, fused, loop, count=1, rounds=rounds, unit="updates/s", against="a loop", times=3, clock=clock()
    )


def compare_losses(rounds: int, batch: int, prototypes: int, half: bool, device: str = "cpu") -> list[Pair]:
    """The loss of 2 + 8 views from features and prototypes, with gradients, beside one over stacked logits; also in MiB."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(10, batch, 256, generator=generator), dim=-1).to(device).requires_grad_()
    weight = F.normalize(torch.randn(prototypes, 256, generator=generator), dim=-1).to(device)
    weight = weight.to(torch.bfloat16 if half else torch.float32).requires_grad_()  # as heads give them
    target = torch.softmax(torch.randn(2, batch, prototypes, generator=generator) / 0.5, dim=-1).to(device)

    def plain() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            log_probs = torch.log_softmax((features @ weight.T).float() / 0.1, dim=-1)
            pairs = -torch.einsum("vbk,sbk->vs", target, log_probs)
        learn(pairs.fill_diagonal_(0).sum())

    def chunked() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            scores = Scores(features, weight)
            loss = cross_view_cross_entropy(scores, target, 0.1, skip_same_view=True)
        learn(loss.sum())

    def learn(loss: Tensor) -> None:
        torch.autograd.grad(loss, [features, weight])
        wait(device)

    name = f"loss, 2 + 8 views of {batch}, K {prototypes:,}, {'bf16' if half else 'float32'}"
    speed = compare(
        name, chunked, plain, count=batch, rounds=rounds, unit="images/s", against="stacked logits", clock=clock()
    )
    ours, theirs = (peak_bytes(work, device) / 2**20 for work in (chunked, plain))
    ratio = ours / theirs
    return [speed, Pair(f"{name}: memory", "stacked logits", ours, theirs, ratio, ratio, ratio, "MiB")]


# ---------------------------------------------------------------------- memory of a process


def compare_processes(case: Case, rounds: int) -> list[Pair]:
    """High-water mark above the imports of a fresh process that takes three steps, MiB: less is better."""
    if not STATUS.exists():
        raise UserError(f"--parts memory reads {STATUS}, which Linux alone has. Name the other parts.")
    theirs, pairs = [process_mib("lightly", replace(case, half=False)) for _ in range(rounds)], []
    for half in (False, True):
        ours = [process_mib("ours", replace(case, half=half)) for _ in range(rounds)]
        ratios = [a / b for a, b in zip(ours, theirs)]
        name = f"process memory, {case.name()}, {'bf16' if half else 'float32'} to float32"
        mine, lightlys, ratio = map(statistics.median, (ours, theirs, ratios))
        pairs.append(Pair(name, "lightly", mine, lightlys, ratio, min(ratios), max(ratios), "MiB"))
    return pairs


def process_mib(side: str, case: Case) -> float:
    spec = json.dumps({"side": side, "threads": torch.get_num_threads(), "case": asdict(case)})
    command = [sys.executable, "-m", "ssd.benchmarks.step", spec]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_this_process(spec: dict[str, Any]) -> float:
    """MiB that three steps add at their highest to what a process with everything imported has."""
    import lightly.loss
    import lightly.models.modules
    import lightly.models.utils  # noqa: F401 (both sides stand on the same imports)

    import lightning_modules.dino  # noqa: F401

    torch.set_num_threads(spec["threads"])
    before = status_mib("VmRSS")
    side = SIDES[spec["side"]](Case(**spec["case"]))
    for _ in range(3):
        side()
    return status_mib("VmHWM") - before


# ---------------------------------------------------------------------- on a GPU


def flops_of_step(case: Case) -> int:
    """Of matrix products and attention in one of our steps, what is made a second time in the loss left out."""
    from torch.utils.flop_counter import FlopCounterMode

    ours = Ours(case)
    with FlopCounterMode(display=False) as counter:
        ours()
    again = 2 * (2 + case.local_count) * case.batch * case.prototypes * 256
    return counter.get_total_flops() - again


def utilisation(case: Case, images_per_s: float) -> dict[str, Any] | None:
    """Share of the device's bf16 rate that a step's own arithmetic makes use of; None for a device that is not listed."""
    device = torch.cuda.get_device_name()
    rate = next((rate for part, rate in BF16_FLOPS_PER_S.items() if part in device), None)
    if rate is None:
        return None
    share = flops_of_step(case) / case.batch * images_per_s / rate
    return {
        "case": f"model-flops utilisation, {case.name()}, bf16",
        "ours": share,
        "unit": f"of {rate / 1e12:.0f} TFLOP/s",
    }


def largest_batch(side: str, case: Case) -> int:
    """How many samples a step takes before memory ends, to 1 in 16."""

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            step = SIDES[side](replace(case, batch=batch))
            step()
            step()
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    low = 16
    if not fits(low):
        return 0
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(low // 16, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compare_on_gpu(rounds: int, case: Case = LARGE_ON_GPU) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Both in bf16: images/s at equal batch, the largest batch, and facts of our step alone."""
    pair = compare(
        f"step, {case.name()}, both bf16",
        Ours(case),
        Lightlys(case),
        count=case.batch,
        rounds=rounds,
        unit="images/s",
        clock=time.perf_counter,
    )
    used = utilisation(case, pair.ours)
    ours, theirs = largest_batch("ours", case), largest_batch("lightly", case)
    ratio = ours / max(theirs, 1)
    largest = Pair(f"largest batch, {case.name()}", "lightly", ours, theirs, ratio, ratio, ratio, "images")
    return [pair, largest], [] if used is None else [used]


PARTS = {
    "steps": "the whole step, float32 and bf16, beside lightly's in float32",
    "memory": "of fresh processes that take such steps",
    "loss": "the loss alone, time and memory, beside one over stacked logits",
    "ema": "the teacher's update, beside a loop over parameters",
    "packed": "all views in one packed pass, beside a pass for each size",
    "settings": "what each setting does to our own step",
}


def measure(part: str, case: Case, counts: Sequence[int], large: str, rounds: int, compiled: bool) -> list[Pair]:
    """The comparisons of one of PARTS; `counts` of prototypes, `large` the network whose average is kept up."""
    most = replace(case, prototypes=max(counts))
    if part == "steps":
        return [pair for count in counts for pair in compare_steps(replace(case, prototypes=count), rounds)]
    if part == "memory":
        few = min(rounds, 3)  # it hardly varies
        return [pair for count in counts for pair in compare_processes(replace(case, prototypes=count), few)]
    if part == "loss":
        of_a_gpu = 2 * case.batch  # 64, the published share of one
        return [pair for half in (False, True) for pair in compare_losses(rounds, of_a_gpu, max(counts), half)]
    if part == "ema":
        return [compare_ema(rounds, large, {}, max(counts))]
    if part == "packed":
        return [compare_packed(replace(case, half=half), rounds) for half in (False, True)]
    return compare_settings(most, rounds, compiled)


if __name__ == "__main__":
    print(measure_this_process(json.loads(sys.argv[1])))
