"""LEAP: a student matches a large frozen teacher's blocks one after the other, the next when it is like enough to the last.

Zhang et al., "LEAP: Layer-skipping Efficiency via Adaptive Progression for Vision Transformer Distillation", arXiv 2606.19483.
Departs from the published code: likeness is measured over the step's tokens of all processes, without the bias of few of them
(unbiased_cka: false is the published estimate), and is part of the checkpoint (there each process has its own target block);
pictures are mixed within small groups; a blur of at most .1 px, which changes no pixel, is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.cached_targets.forms import Sampled, picked
from ssd.cka import linear_cka
from ssd.curriculum import Curriculum
from ssd.data.randomness import uniforms
from ssd.decoders import Projector
from ssd.errors import UserError
from ssd.losses.regression import squared_error
from ssd.masked_branch import has_cls
from ssd.mixing import mixed
from ssd.optim import LARS, Clip, OptimizerRule
from ssd.schedules import Cosine, Length, Schedule, in_steps
from ssd.step_report import StepReport
from ssd.teachers import Frozen
from ssd.views.view import Views

MATCHES = ("curriculum", "last", "all")
CALIBRATED = 64
"""Pictures of the first batch, on each process, by which the first target is chosen: all blocks' tokens of them are held."""
MIXUP = -11  # key of the shares that pictures are mixed by


class BlockTokens(nn.Module):
    """Class token and patches behind blocks of a ViT, each as if the network ended there.

    Args:
        cls: whether the class token comes along, in front.
        final_norm: whether the network's last norm is applied behind each block, or none.
        out_dims: what each block's tokens are mapped to by a linear layer of their own; none leaves them as they are.
    """

    def __init__(self, backbone: Backbone, *, cls: bool, final_norm: bool = True, out_dims: Sequence[int] = ()):
        super().__init__()
        self.backbone = backbone
        self.cls = cls
        self.final_norm = final_norm
        self.projectors = nn.ModuleList(Projector(backbone.embed_dim, width) for width in out_dims)

    def forward(self, views: Tensor, blocks: Sequence[int]) -> Tensor:
        """Pictures (V, B, C, H, W) and L numbers of blocks in order -> (V, B, L, c + N, D)"""
        answer = self.backbone(views.flatten(0, 1), taps=blocks, until=blocks[-1])
        found = [self.of_block(answer.taps[f"block{block}"], answer.grid) for block in blocks]
        if len(self.projectors) > 0:
            found = [projector(tokens) for projector, tokens in zip(self.projectors, found, strict=True)]
        return torch.stack(found, dim=1).unflatten(0, views.shape[:2])

    def of_block(self, tap: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, prefix + N, D) -> (B, c + N, D), registers left out"""
        if self.final_norm:
            tokens = self.backbone.tokens_at(tap, grid)
            cls, patches = tokens.cls, tokens.patches
        else:
            patches = tap[:, -(grid[0] * grid[1]) :]
            cls = tap[:, 0]
        return torch.cat([cls[:, None], patches], dim=1) if self.cls and cls is not None else patches


class LEAP(SelfDistillation):
    """LEAP (Zhang et al. 2026).

    Args:
        backbone: the ViT that is trained.
        teacher: a frozen ViT with the same grid of patches, for instance ViT with weights.
        views: recipe with one "global" view or more; published is one crop of 14 % or more.
        mixup: mix each picture with another one, by one share for the whole step; both networks see the mixture.
        mixup_group: neighbours of a batch among which pictures are mixed; divides a slice of it.
        mixup_seed: of the shares, which follow from it and the step.
        match: "curriculum", one block of the teacher after the other; or the baselines "last", the teacher's last block from
            the start, and "all", each block of the student with the teacher's as deep, by a projector of its own.
        cls_weight: of the class tokens' distance beside the patches', where both networks have one.
        final_norm: apply the teacher's last norm behind its earlier blocks too, for which it was not trained; false
            matches what blocks give, behind the last one too.
        start_block: number of the first target from 1; null is the one that the untrained student is most like.
        cka_threshold: likeness at which the next block becomes the target: published .8 for ImageNet, .85 for a tenth of it.
        cka_smoothing: share of the newest likeness in the mean that is compared. Published is 1, where one lucky batch
            suffices.
        patience: for how long a block is the target at most; null has no limit.
        cka_every: steps from one measurement to the next.
        cka_patches: patches of each picture that are measured, others in each step; null is all.
        unbiased_cka: see `linear_cka`. Without it few tokens pass any threshold: keep many more than the teacher's width.
    """

    student: BlockTokens
    teacher: Frozen
    stored_in_part = Sampled(tokens={"patches": 3})

    def __init__(
        self,
        backbone: Backbone,
        teacher: Backbone,
        *,
        views: str | Views = "leap",
        mixup: bool = True,
        mixup_group: int = 8,
        mixup_seed: int = 0,
        match: str = "curriculum",
        cls_weight: float | Schedule = 0.05,
        final_norm: bool = True,
        start_block: int | None = None,
        cka_threshold: float = 0.8,
        cka_smoothing: float = 1.0,
        patience: Length | None = "5 epochs",
        cka_every: int = 1,
        cka_patches: int | None = 16,
        unbiased_cka: bool = True,
        lr: float | Schedule = Cosine(9.0, 9e-3, scaled_end=True, warmup=0.1),  # noqa: B008
        lr_rule: str = "sqrt",
        lr_reference_batch: int = 1536,
        optimizer: OptimizerRule = LARS(),  # noqa: B008
        weight_decay: float | Schedule = 1e-6,
        clip: Clip | None = Clip(1.0, over="all"),  # noqa: B008
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_rule=lr_rule,
            lr_reference_batch=lr_reference_batch,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        for network in (backbone, teacher):
            network.require("taps", "until", by="LEAP")
        self._check(backbone, teacher, match, start_block, cka_every, cka_patches)
        self.mixup = mixup
        self.mixup_group = mixup_group
        self.mixup_seed = mixup_seed
        self.match = match
        self.cls_weight = cls_weight
        if patience is not None:
            in_steps(patience, 1, 1)  # refused here where it is no length
        self.patience = patience
        self.cka_every = cka_every
        self.cka_patches = cka_patches
        self.unbiased_cka = unbiased_cka

        self.cls = has_cls(backbone) and has_cls(teacher)
        last, depth = backbone.num_blocks, teacher.num_blocks
        self.student_blocks = tuple(range(1, last + 1)) if match == "all" else (last,)
        self.matched_blocks = tuple(max(1, round(block * depth / last)) for block in self.student_blocks)
        widths = [teacher.embed_dim] * len(self.student_blocks)
        self.student = BlockTokens(backbone, cls=self.cls, out_dims=widths)
        self.teacher = Frozen(BlockTokens(teacher, cls=self.cls, final_norm=final_norm))
        self.curriculum = Curriculum(depth, cka_threshold, cka_smoothing)
        if start_block is not None:
            self.curriculum.begin(start_block, 0)

    def settle(self, batch: Batch) -> None:
        """Chooses the first target: the block that the student is most like before it has learned anything."""
        if self.match != "curriculum" or self.curriculum.block > 0:
            return
        pictures = self.seen(batch)[:, :CALIBRATED]
        blocks = range(1, self.curriculum.num_blocks + 1)
        student = self.measured(self.student(pictures, self.student_blocks))[:, :, 0]
        teacher = self.measured(self.teacher(pictures, blocks))
        likeness = torch.stack([self.likeness(student, teacher[:, :, number]) for number in range(len(blocks))])
        if likeness.isfinite().all():
            self.curriculum.begin(blocks[int(likeness.argmax())], self.step)

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        tokens = self.teacher(self.seen(batch), self.teacher_blocks)  # (V, B, L, c + N, D)
        cls = {"cls": tokens[:, :, :, :1]} if self.cls else {}
        return {**cls, "patches": tokens[:, :, :, self.cls :]}

    def asked_of_teacher(self) -> dict[str, Any]:
        network: Any = self.teacher.network
        return {"blocks": list(self.teacher_blocks), "final_norm": network.final_norm, "cls": self.cls}

    def unstorable(self) -> str | None:
        if self.mixup:
            return "pictures are mixed with others of their batch (mixup: true). Set model.mixup: false."
        if self.match == "curriculum":
            return "the target block moves on (match: curriculum). Set model.match: last, or all."
        return super().unstorable()

    def targets(self, batch: Batch) -> Targets:
        taught = self.taught(batch)
        places = {"places": taught["places"]} if "places" in taught else {}
        tokens = torch.cat(
            [taught[name] for name in ("cls", "patches") if name in taught], dim=3
        )  # (V, B, L, c + N, D)
        if not self.measures_likeness:
            return Targets(tokens=tokens, **places)
        return Targets(tokens=tokens, answered=torch.empty_like(self.measured(tokens), dtype=torch.float32))

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        tokens = self.student(self.seen(batch), self.student_blocks)
        if self.measures_likeness:
            targets.answered.copy_(self.measured(tokens.detach()))
        places = getattr(targets, "places", None)  # of the patches whose targets were stored, where not all were
        if places is not None:
            cls, patches = tokens[:, :, :, : self.cls], tokens[:, :, :, self.cls :]
            tokens = torch.cat([cls, picked(patches, places, 3)], dim=3)
        error = squared_error(tokens, targets.tokens)  # (V, B, L, c + N)
        pairs = error.shape[0] * error.shape[2] * batch.total
        terms = {"patches": error[..., self.cls :].mean(-1).sum() / pairs}
        if self.cls:
            terms["cls"] = error[..., 0].sum() / pairs
        return terms

    def evidence(self, targets: Targets) -> Tensor | None:
        if not self.measures_likeness:
            return None
        return self.likeness(targets.answered, self.measured(targets.tokens))[None]

    def update(self, targets: Targets) -> None:
        """The target block moves on; the teacher is frozen."""
        if self.match == "curriculum" and self.curriculum.block > 0:
            lengths = (self.total_steps, self.steps_per_epoch)
            limit = None if self.patience is None else in_steps(self.patience, *lengths)
            self.curriculum.update(self.evident[0] if self.evident else None, self.step + 1, limit)

    def begin_fresh(self) -> None:
        # after `start_from` the block is that of the other run, whose steps are not this one's
        self.curriculum.since = 0

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        if self.match != "curriculum":
            return {}
        likeness = {"train/curriculum/cka": self.evident[0]} if self.evident else {}
        return {"train/curriculum/block": float(self.curriculum.block), **likeness}

    @property
    def teacher_blocks(self) -> tuple[int, ...]:
        """The teacher's blocks that are matched in this step, in order."""
        return (max(self.curriculum.block, 1),) if self.match == "curriculum" else self.matched_blocks

    @property
    def measures_likeness(self) -> bool:
        """Whether this step measures it."""
        return self.match == "curriculum" and self.step % self.cka_every == 0

    def seen(self, batch: Batch) -> Tensor:
        """What both networks see, (V, B, C, H, W); while they evaluate, pictures as they are, in batches of any size."""
        pictures = batch.views["global"]
        if not self.mixup or not self.training:
            return pictures
        return mixed(pictures, float(uniforms((1,), self.mixup_seed, self.step, MIXUP)[0]), self.mixup_group)

    def measured(self, tokens: Tensor) -> Tensor:
        """The patches that likeness is measured on, evenly over the row-major grid: (V, B, L, c + N, D) -> (V, B, L, n, D)"""
        count = tokens.shape[3] - self.cls
        if self.cka_patches is None or self.cka_patches >= count:
            return tokens[:, :, :, self.cls :]
        even = torch.arange(self.cka_patches, device=tokens.device) * count // self.cka_patches
        return tokens.index_select(3, (even + self.step) % count + self.cls)

    def likeness(self, student: Tensor, teacher: Tensor) -> Tensor:
        return linear_cka(student.flatten(0, -2), teacher.flatten(0, -2), unbiased=self.unbiased_cka)

    def _check(
        self,
        backbone: Backbone,
        teacher: Backbone,
        match: str,
        start_block: int | None,
        cka_every: int,
        cka_patches: int | None,
    ) -> None:
        if "global" not in self.views.kinds():
            raise UserError("views: this recipe has no 'global' view, which both networks see. Use the recipe 'crop'.")
        size = self.views.kinds()["global"][0].size
        grids = [network.grid(size, size) for network in (backbone, teacher)]
        if grids[0] != grids[1]:
            raise UserError(
                f"student and teacher cut views of {size} px into {grids[0]} and {grids[1]} patches, which are matched one by "
                "one. Use networks with patches of one size."
            )
        if match not in MATCHES:
            raise UserError(f"match: '{match}' is unknown. Choose one of {', '.join(MATCHES)}.")
        if start_block is not None and not 1 <= start_block <= teacher.num_blocks:
            raise UserError(
                f"start_block: {start_block} is no block of '{teacher.name}'. Use 1 to {teacher.num_blocks}."
            )
        for name, count in {"cka_every": cka_every, "cka_patches": cka_patches}.items():
            if count is not None and count < 1:
                raise UserError(f"{name}: {count} is not a positive count. Use 1 or more.")
