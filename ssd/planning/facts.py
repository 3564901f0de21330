"""What a run's settings come to: lengths in steps, rates after their rules, halves of averages, tokens, parameters."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ssd.backbones.base import Backbone
from ssd.data.broken import UNREADABLE
from ssd.heads import PROTOTYPES, Prototypes
from ssd.masking.batch import MaskPlan
from ssd.optim import resolve_lr
from ssd.schedules import Cosine, Linear, Schedule, in_steps, value_at
from ssd.targets import Sinkhorn
from ssd.views.view import PictureViews, Views

POINTS = 1000
"""Of a curve: more than a picture of it is wide."""
SEEN_PICTURES = 32
"""How many tell how large pictures are."""
DRAWN_MASKS = 256
"""Samples whose masks tell how many tokens are masked."""
DRAWN_STEPS = 500
"""Whose sizes tell how many tokens a step has, where they change from step to step."""
TEACHER_SEES = "global"
GRAM_TEACHER_SEES = "gram"


@dataclass(frozen=True)
class Curve:
    """A setting over the run: its value at the first and the last step, the highest and the lowest, and how many steps it
    takes to its peak (a warm-up) or to its end."""

    start: float
    end: float
    highest: float
    lowest: float
    rise: int
    steps: tuple[int, ...] = field(repr=False)
    values: tuple[float, ...] = field(repr=False)

    def row(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("start", "end", "highest", "lowest", "rise")}


@dataclass(frozen=True)
class ViewFacts:
    """One kind of views.

    Args:
        count: of each sample.
        size: side, px; the largest where it changes from step to step.
        smallest_side_px: of the smallest crop, in pixels of the data's own pictures; None where that is not known.
        grid: rows and columns of patches, of clips the times before them.
        tokens: of all views of a step, with class token and registers; the mean where sizes change.
        sizes: all that steps have.
    """

    count: int
    size: int
    scale: tuple[float, float]
    smallest_side_px: float | None
    grid: tuple[int, ...]
    tokens: int
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class MaskFacts:
    """What is masked of one kind of views, counted on drawn masks.

    Args:
        tokens: of a crop.
        mean: masked tokens of a crop on average, whole crops included.
        fewest, most: masked tokens of a crop that is masked.
        whole: share of crops that are not.
        per_view: masks of each view.
    """

    tokens: int
    mean: float
    fewest: int
    most: int
    whole: float
    per_view: int = 1


@dataclass(frozen=True)
class Facts:
    """A run as it is planned. Lengths are in steps, `batch` is that of one process.

    Args:
        curves: lr, weight_decay and every other setting that is a schedule or one of those that decide a run.
        lr_scales: name of a parameter -> what its learning rate is multiplied by.
        prototypes: name of the prototypes in the student -> K.
        sinkhorn: whether targets use all prototypes alike.
        teacher_follows: whether the teacher is an average of the student.
        masked: kind of view -> what is masked of it.
        picture_px: shorter side of the data's pictures, median; None where that is not known.
        stage: whether it begins with the networks of another run.
        normalised_by_batch: whether there is batch normalisation, which slices would change.
        encodes_visible: whether the student encodes what is not masked, and no more.
        targets_of_patches: whether all targets are of patches, of which there are many more than pictures.
        places_apart: whether Sinkhorn assigns each place of the grid by itself.
    """

    method: str
    data: str
    samples: int
    draws: int
    batch: int
    processes: int
    micro_batches: int
    steps: int
    steps_per_epoch: int
    precision: str
    curves: Mapping[str, Curve]
    lr_rule: str
    adam: bool
    lr_scales: Mapping[str, float]
    frozen_steps: int
    prototypes: Mapping[str, int]
    sinkhorn: bool
    teacher_follows: bool
    views: Mapping[str, ViewFacts]
    masked: Mapping[str, MaskFacts]
    koleo_group: int | None
    patch_loss: bool
    patches_px: int | None
    picture_px: float | None
    parameters: Mapping[str, int]
    trainable: int
    stage: bool
    normalised_by_batch: bool
    encodes_visible: bool = False
    targets_of_patches: bool = False
    places_apart: bool = False

    @property
    def target_rows(self) -> int:
        """Of a step, that are assigned together: the teacher's views, or their patches."""
        seen = self.views[TEACHER_SEES]
        together = math.prod(seen.grid) if self.targets_of_patches and not self.places_apart else 1
        return self.step_batch * seen.count * together

    @property
    def step_batch(self) -> int:
        """Samples of a step over all processes."""
        return self.batch * self.processes

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    @property
    def sizes_change(self) -> bool:
        """Whether views have another size from step to step."""
        return any(len(view.sizes) > 1 for view in self.views.values())

    @property
    def samples_seen(self) -> int:
        return self.steps * self.step_batch

    @property
    def momentum_half_life(self) -> float | None:
        """Steps after which half of the teacher is newer where it follows quickest, which is at the start of most runs; None
        without an average."""
        return half_life(self.curves["momentum"].lowest) if "momentum" in self.curves else None

    def tokens(self, network: str) -> int:
        """Of a step, that "student" or "teacher" encodes."""
        if network == "teacher" and not self.parameters["teacher"]:
            return 0
        seen = [kind for kind in self.views if kind != GRAM_TEACHER_SEES]
        if network == "teacher" or not self.teacher_follows:
            seen = [kind for kind in seen if kind == TEACHER_SEES]
        if network == "student" and self.encodes_visible:
            return sum(round(self.visible_tokens(kind)) for kind in seen if kind in self.masked)
        return sum(self.views[kind].tokens for kind in seen)

    def visible_tokens(self, kind: str) -> float:
        """Of a step, under all masks of these views, with class token and registers."""
        view, masks = self.views[kind], self.masked[kind]
        return masks.per_view * (view.tokens - self.step_batch * view.count * masks.mean)

    def masked_tokens(self) -> float:
        """Of a step, on average."""
        return sum(
            self.step_batch * self.views[kind].count * masks.per_view * masks.mean
            for kind, masks in self.masked.items()
        )

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            "data": self.data,
            "samples": self.samples,
            "steps": self.steps,
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "samples_seen": self.samples_seen,
            "batch": self.step_batch,
            "batch_of_a_process": self.batch,
            "processes": self.processes,
            "micro_batches": self.micro_batches,
            "precision": self.precision,
            "settings": {name: curve.row() for name, curve in self.curves.items()},
            "lr_scales": {"lowest": min(self.lr_scales.values()), "highest": max(self.lr_scales.values())},
            "last_layer_frozen_steps": self.frozen_steps,
            "teacher_half_life_steps": self.momentum_half_life,
            "prototypes": dict(self.prototypes),
            "tokens": {"student": self.tokens("student"), "teacher": self.tokens("teacher")},
            "parameters": dict(self.parameters),
            "trainable_parameters": self.trainable,
        }


def half_life(momentum: float) -> float:
    """Steps in which an average forgets half: ln 1/2 / ln m."""
    if momentum <= 0:
        return 0.0
    return math.inf if momentum >= 1 else math.log(0.5) / math.log(momentum)


def facts_of(module: Any, data: Any, *, processes: int, max_epochs: int | None, precision: str) -> Facts:
    """Of a method and of data that is prepared for it. Raises UserError where the data does not fill a step.

    Args:
        processes: how many the run is to have, over all machines.
        max_epochs: its length, where the method does not say `steps`.
    """
    loader_order = data.order(data.train_dataloader().dataset, 0, processes)
    steps_per_epoch = loader_order.steps_per_epoch
    steps = module.steps if module.steps is not None else max_epochs * steps_per_epoch
    batch = data.batch_size
    plan = module.optimized()[0]
    lr = resolve_lr(plan.lr, module.lr_rule, module.lr_reference_batch, batch * processes)
    settings = {"lr": lr, "weight_decay": plan.weight_decay}
    for name, value in vars(module).items():
        decides = name in ("momentum", "student_temperature") or name.endswith("teacher_temperature")
        if name not in ("lr", "weight_decay") and (isinstance(value, Schedule) or decides):
            settings[name] = value
    side = picture_side(data)
    backbone = module.evaluated_backbone
    parts = [name for name, _ in module.student.named_children() if name != "backbone"]
    heads = sum(count(getattr(module.student, name).parameters()) for name in parts)
    patch = backbone.patch_size if "visible" in backbone.can else None
    return Facts(
        method=type(module).__name__,
        data=type(data).__name__,
        samples=len(data.source),
        draws=data.draws.size,
        batch=batch,
        processes=processes,
        micro_batches=module.micro_batches,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        precision=precision,
        curves={name: curve(value, steps, steps_per_epoch) for name, value in settings.items()},
        lr_rule=module.lr_rule,
        adam=type(plan.optimizer).__name__ == "AdamW",
        lr_scales=scales_of(module),
        frozen_steps=min(in_steps(module.freeze_last_layer, steps, steps_per_epoch), steps),
        prototypes=prototypes_of(module.student),
        sinkhorn=any(isinstance(part, Sinkhorn) for part in module.modules()),
        teacher_follows=module.teacher.follows,
        views=views_of(module, backbone, batch * processes, side, data.seed),
        masked={
            kind: masked_by(plan)
            for kind, plan in module.mask_plans().items()
            if kind in module.masking and plan.frames is None
        },
        koleo_group=module.koleo_group if getattr(module, "koleo_weight", 0) != 0 else None,
        patch_loss=hasattr(module, "ibot_weight"),
        patches_px=max(patch) if isinstance(patch, tuple) else patch,
        picture_px=side,
        parameters={
            "student": count(module.student.parameters()),
            "backbone": count(module.student.backbone.parameters()),
            "head": heads,
            "teacher": count(module.teacher.parameters()),
        },
        trainable=count(p for plan in module.optimized() for p in plan.module.parameters() if p.requires_grad),
        stage=module.start_from is not None,
        normalised_by_batch=any(
            isinstance(p, nn.modules.batchnorm._BatchNorm) and p.training for p in module.modules()
        ),
        encodes_visible=getattr(module.student, "encodes_visible", False),
        targets_of_patches=getattr(module.student, "predicts_patches", False),
        places_apart=any(isinstance(part, Sinkhorn) and part.apart is not None for part in module.modules()),
    )


def curve(setting: float | Schedule, steps: int, steps_per_epoch: int) -> Curve:
    """A setting at up to `POINTS` steps of the run, its first and its last among them."""
    at = tuple(dict.fromkeys(np.linspace(0, steps - 1, min(steps, POINTS)).round().astype(int).tolist()))
    values = tuple(value_at(setting, step, steps, steps_per_epoch) for step in at)
    rise = 0
    if isinstance(setting, Cosine | Linear):
        way = setting.warmup if isinstance(setting, Cosine) else setting.until
        waiting = in_steps(setting.after, steps, steps_per_epoch)
        rise = waiting + in_steps(way, max(steps - waiting, 1), steps_per_epoch)
    peak = value_at(setting, min(rise, steps - 1), steps, steps_per_epoch)
    return Curve(values[0], values[-1], max(*values, peak), min(values), rise, at, values)


def scales_of(module: Any) -> dict[str, float]:
    """Of every trained parameter by its name: what its rate is multiplied by."""
    scales: dict[str, float] = {}
    for plan in module.optimized():
        names = {id(parameter): name for name, parameter in plan.module.named_parameters()}
        scales |= {names[id(p)]: group["lr_scale"] for group in plan.groups() for p in group["params"]}
    return scales


def prototypes_of(student: nn.Module) -> dict[str, int]:
    """Name of each set of prototypes in the student -> K; one that is shared counts once."""
    return {
        name: len(part.weight_v if isinstance(part, Prototypes) else part.weight)
        for name, part in student.named_modules()
        if isinstance(part, PROTOTYPES)
    }


def views_of(module: Any, backbone: Backbone, batch: int, side: float | None, seed: int) -> dict[str, ViewFacts]:
    if not isinstance(module.views, PictureViews):
        return {}
    prefix = getattr(backbone, "num_prefix", 0)
    steps = [module.views.at(seed, step).kinds() for step in range(DRAWN_STEPS if changing(module.views) else 1)]
    found = {}
    for kind, first in steps[0].items():
        sizes = [step[kind][0].size for step in steps]
        size, view = max(sizes), first[0]
        smallest = None if side is None else side * math.sqrt(min(view.scale[0] for view in first))
        low, high = view.scale
        before = view.lengths[:-2]  # frames of a clip
        tokens = [len(first) * batch * (math.prod(backbone.grid(*before, px, px)) + prefix) for px in sizes]
        grid = backbone.grid(*before, size, size)
        mean = round(sum(tokens) / len(tokens))
        found[kind] = ViewFacts(len(first), size, (low, high), smallest, grid, mean, tuple(sorted(set(sizes))))
    return found


def changing(views: Views) -> bool:
    """Whether sizes are not the same in every step."""
    return len(views.all_of_a_run()) > 1


def masked_by(plan: MaskPlan) -> MaskFacts:
    drawn = plan.recipe.draw(plan.masks, DRAWN_MASKS, plan.grid, 0, 0)  # (V, B, N)
    counts = drawn.sum(-1).ravel()
    masked = counts[counts > 0]
    fewest, most = (int(masked.min()), int(masked.max())) if len(masked) else (0, 0)
    whole = float((counts == 0).mean())
    return MaskFacts(drawn.shape[-1], float(counts.mean()), fewest, most, whole, plan.masks_per_view)


def picture_side(data: Any) -> float | None:
    """Shorter side of the training pictures, px, the median of some that are spread over them; None for other data."""
    pictures = getattr(data.train_dataloader().dataset, "pictures", None)
    if pictures is None:
        return None
    sides = []
    for index in np.linspace(0, len(pictures) - 1, min(len(pictures), SEEN_PICTURES)).astype(int).tolist():
        try:
            sides.append(min(pictures[index].shape[:2]))
        except UNREADABLE:
            continue
    return float(np.median(sides)) if sides else None


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
