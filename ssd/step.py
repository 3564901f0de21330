"""One optimiser step of any method, without a trainer.

`Step.take_step` is the arithmetic that every method shares, in an order that never varies. A method
states itself in `targets`, `losses` and `update`.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.cached_targets.forms import Sampled
from ssd.diagnosis.targets import centers_of, measured_use, target_use
from ssd.distributed import sum_over_ranks, world_size
from ssd.errors import UserError
from ssd.gradients import gradient_norms, not_finite_gradients, part_of, trained_gradients
from ssd.heads import restore_lengths
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import Masking
from ssd.optim import AdamW, Clip, Optimized, OptimizerRule, resolve_lr
from ssd.record import Recorded
from ssd.resume import refuse_another_length
from ssd.schedules import Cosine, Length, Schedule, in_steps, value_at
from ssd.step_report import StepReport, Terms
from ssd.views.recipes import views_named
from ssd.views.view import WHOLE_SOUND, Views

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm,)

MOVING_TEACHER = (
    "what its student learns from changes with every step, so that nothing can be stored beforehand. Stored targets are for "
    "methods of a frozen teacher, such as DBOT, DMAE, LEAP and HybridDistillation (docs/cached_targets.md); leave them out."
)


class Step(Recorded, nn.Module):
    """What a method trains, its settings, and its step.

    A method sets `student` and `teacher` and defines `targets`, `losses` and `update`.

    Args:
        views: name of a view recipe, or the recipe spelled out.
        optimizer: AdamW, SGD or LARS with their own settings.
        lr: learning rate at the reference batch; a schedule's start is its peak.
        lr_rule: how the rate follows the global batch: "linear" or "sqrt" in batch / `lr_reference_batch`, or "none".
        lr_reference_batch: the global batch for which `lr` is written.
        weight_decay: of decayed parameters.
        decay_rule: "bias_and_1d" frees biases and vectors (DINO), "bias_norm_and_scale" frees by name (DINOv2),
            "bias_and_norms_by_a_tenth" frees biases and leaves gains of normalisations a tenth (CAPI), "none" frees nothing.
        layer_decay: factor on the learning rate from one block to the one before it; 1 trains all alike.
        patch_embed_lr_scale: further factor on the learning rate of the patch embedding.
        clip: gradient clipping, or null.
        freeze_last_layer: for how long prototypes stay as drawn, a share of the run or "1 epochs".
        freeze_by: "gradient": meanwhile the optimiser does not see them (DINO); "rate": it gathers its moments and steps
            at rate 0 (DINOv2).
        steps: length of the run in steps; null follows `trainer.max_epochs`.
        start_from: checkpoint of the same method whose networks and centres a new run begins with, at step 0 and with a fresh
            optimiser: the next stage of a recipe. Going on with a run is `ckpt_path`.
        cached_targets: folder that `ssd cache` filled with what a frozen teacher says of fixed views (data.view_variants),
            which is then read and not computed.
        micro_batches: slices of a batch that are passed one after the other to save memory; same result.
        ghost_norm: allow batch normalisation over slices or over unsynchronised ranks, which is not the same result.
        compile: compile student and teacher block by block; pays on a GPU, costs minutes at the start.
        max_skipped_steps: steps in a row that may be skipped as not finite before the run stops.
    """

    student: nn.Module
    teacher: nn.Module
    added_later: tuple[str, ...] = ()
    """Beginnings of the names of state that checkpoints of earlier stages may lack."""
    masking: Mapping[str, Masking] = MappingProxyType({})
    """Kind of view -> how its tokens are masked; a method that masks sets it."""
    alters_spectra: bool = False
    """Whether the method does to spectrograms what views say of them."""
    teacher_sees_masks: bool = False
    """Whether what the teacher says depends on the masks: fixed views then have fixed masks."""
    stored_in_part: Sampled = Sampled()
    """Of what `teach` answers that of which a sample may be stored in place of the whole."""
    masks_per_view: int = 1
    """How many masks each masked view gets, all views under their first mask, then under their second."""

    def __init__(
        self,
        *,
        views: str | Views = "dino",
        optimizer: OptimizerRule = AdamW(),  # noqa: B008 (frozen)
        lr: float | Schedule = Cosine(5e-4, 1e-6, warmup=0.1),  # noqa: B008
        lr_rule: str = "linear",
        lr_reference_batch: int = 256,
        weight_decay: float | Schedule = Cosine(0.04, 0.4),  # noqa: B008
        decay_rule: str = "bias_and_1d",
        layer_decay: float = 1.0,
        patch_embed_lr_scale: float = 1.0,
        clip: Clip | None = Clip(3.0, over="tensor"),  # noqa: B008
        freeze_last_layer: Length = "1 epochs",
        freeze_by: str = "gradient",
        steps: int | None = None,
        start_from: str | None = None,
        cached_targets: str | None = None,
        micro_batches: int = 1,
        ghost_norm: bool = False,
        compile: bool = False,
        max_skipped_steps: int = 100,
    ):
        super().__init__()
        for name, value in {"micro_batches": micro_batches, "max_skipped_steps": max_skipped_steps}.items():
            if value < 1:
                raise UserError(f"{name}: {value} is not a positive count. Use 1 or more.")
        if steps is not None and steps < 1:
            raise UserError(f"steps: {steps} is not a positive count. Use null to follow trainer.max_epochs.")
        for name, factor in {"layer_decay": layer_decay, "patch_embed_lr_scale": patch_embed_lr_scale}.items():
            if not 0 < factor <= 1:
                raise UserError(f"{name}: {factor} is not a factor above 0 and at most 1. 1 changes nothing.")
        if freeze_by not in ("gradient", "rate"):
            raise UserError(f"freeze_by: '{freeze_by}' is unknown. Choose 'gradient' or 'rate'.")
        resolve_lr(1.0, lr_rule, lr_reference_batch, lr_reference_batch)
        if cached_targets is not None and not self.has_constant_teacher():
            raise UserError(f"cached_targets: {cached_targets} cannot serve {type(self).__name__}: {MOVING_TEACHER}")
        self.views = views_named(views)
        if self.views.alters_spectra and not self.alters_spectra:
            raise UserError(
                f"views: mix_share and resize change spectrograms, which {type(self).__name__} does not. Use mix_share: 0 and "
                "resize: null."
            )
        self.optimizer = optimizer
        self.lr = lr
        self.lr_rule = lr_rule
        self.lr_reference_batch = lr_reference_batch
        self.weight_decay = weight_decay
        self.decay_rule = decay_rule
        self.layer_decay = layer_decay
        self.patch_embed_lr_scale = patch_embed_lr_scale
        self.clip = clip
        self.freeze_last_layer = freeze_last_layer
        self.freeze_by = freeze_by
        self.steps = steps
        self.start_from = start_from
        self.cached_targets = cached_targets
        self.micro_batches = micro_batches
        self.ghost_norm = ghost_norm
        self.compile_networks = compile
        self.max_skipped_steps = max_skipped_steps

        self.step = 0
        self.total_steps = 0
        self.steps_per_epoch = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.samples_per_step = 0
        self.stop_requested = False
        self.evident: tuple[float, ...] = ()
        self.last_report: StepReport | None = None

    # ------------------------------------------------------------------ a method

    def targets(self, batch: Batch) -> Targets:
        """Teacher side, whole batch of this rank, no gradient, all reductions over ranks. Reads only."""
        raise NotImplementedError(f"{type(self).__name__} must define targets")

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        """Of a method with a frozen teacher, name -> (V, B, ...): what `targets` needs of it, a function of each sample's own
        views (and masks, see `teacher_sees_masks`) and of nothing that changes in the run or its stage. Reads only."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen teacher")

    def asked_of_teacher(self) -> dict[str, Any]:
        """Settings that `teach` depends on, beside the teacher's networks, views and masks: plain data."""
        return {}

    def unstorable(self) -> str | None:
        """Why what `teach` answers cannot be stored for a whole run, as a sentence; None where it can."""
        return None if self.has_constant_teacher() else MOVING_TEACHER

    @classmethod
    def has_constant_teacher(cls) -> bool:
        return cls.teach is not Step.teach

    def taught(self, batch: Batch) -> dict[str, Tensor]:
        """What `teach` answers, or what of it was stored and came with the batch, in float32; of tokens of which some were
        stored with "places" (V, B, n), the others being absent. Raises UserError where neither can be had."""
        if batch.taught:
            return {
                name: value.float() if value.is_floating_point() else value.long()
                for name, value in batch.taught.items()
            }
        if getattr(self.teacher, "rests", False):
            raise UserError(
                "these batches come without stored targets, and the teacher rests because cached_targets is set. Load them by "
                "the run's own data, or leave cached_targets out."
            )
        return self.teach(batch)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Student side, on a slice: raw terms, each a sum divided by a count of the whole step. Reads only, but may fill
        room that `targets` left in what it answered.

        As `Terms` where more than they is to be known.
        """
        raise NotImplementedError(f"{type(self).__name__} must define losses")

    def update(self, targets: Targets) -> None:
        """Writes whatever is not the student's weights. Once, after the optimiser step; not on a skipped step."""
        raise NotImplementedError(f"{type(self).__name__} must define update")

    def settle(self, batch: Batch) -> None:
        """What a run must learn from its data before its first step, with that step's whole batch and no gradient. Called
        before every step, so that a batch that is not finite settles nothing: what is settled already returns at once. The
        one place that may wait for the device."""

    def survey(self, data: Any, folder: Path | None = None) -> None:
        """What a run must learn from all of its training data before its first step. Called on every process where a fit
        begins or goes on; what is known already returns at once.

        Args:
            data: the datamodule, prepared.
            folder: the run's, for what is to be read by people; None = write nothing.
        """

    def evidence(self, targets: Targets) -> Tensor | None:
        """Numbers (R,), float32 and the same on every rank, that `update` decides by. Called after the losses of all slices,
        which may have filled `targets`; while `update` runs they are `self.evident`, come with the step's one wait."""
        return None

    def begin_fresh(self) -> None:
        """Called once where a run begins that goes on with no other, before its first step and after `start_from` was
        read: for networks that are read from files, or copied from others."""

    def resting(self) -> Iterable[nn.Parameter]:
        """Parameters that do not move in this step, neither by gradient nor by decay; no norm of gradients counts them."""
        return ()

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        """What else is worth knowing of the targets of a logged step: scalars over this rank's samples, on the device,
        which the report gives as their mean over ranks."""
        return {}

    def of_answers(self, answers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars for the report of a logged step, of what `Terms` measured of the student: means over slices and ranks."""
        return answers

    def optimized(self) -> list[Optimized]:
        """One entry an optimiser: the student by the engine's settings, unless a method says otherwise."""
        rates = (self.decay_rule, self.layer_decay, self.patch_embed_lr_scale)
        return [Optimized(self.student, self.optimizer, self.lr, self.weight_decay, self.clip, *rates)]

    def build_optimizers(self) -> list[Optimizer]:
        """One for each entry of `optimized`, in its order."""
        return [plan.optimizer.build(plan.groups()) for plan in self.optimized()]

    @property
    def evaluated_backbone(self) -> Backbone:
        """What probes and exports use: the teacher's backbone where the teacher follows the student, else the student's."""
        network: Any = self.teacher.network if self.teacher.follows else self.student
        return network.backbone

    def mask_plans(self) -> dict[str, MaskPlan]:
        """What the data masks in each batch: the recipes of `masking` on the token grids of the kinds of view they name.

        Raises UserError for a kind that the views lack.
        """
        kinds, plans = self.views.kinds(), {}
        for kind, recipe in self.masking.items():
            if kind not in kinds:
                raise UserError(
                    f"masks are for '{kind}' views, and the views have {', '.join(kinds)}. Name one of them."
                )
            backbone, lengths = self.evaluated_backbone, kinds[kind][0].lengths
            if lengths is None and backbone.frames is None:
                raise UserError(
                    f"masks are for '{kind}' views, which are whole sounds of any length, and {type(backbone).__name__} does "
                    "not say how many tokens a length gives. Use SpeechEncoder or LogMelEncoder."
                )
            others = {views.kinds()[kind][0].lengths for views in self.views.all_of_a_run()} - {lengths}
            grids = tuple((other[-1], backbone.grid(*other)) for other in sorted(others))
            plans[kind] = MaskPlan(
                recipe,
                len(kinds[kind]),
                backbone.grid(*(lengths or WHOLE_SOUND)),
                self.micro_batches,
                grids,
                self.masks_per_view,
                frames=backbone.frames,
                equal_lengths=self.views.equal_lengths,
                of_looks=self.teacher_sees_masks,
            )
        return plans

    # ------------------------------------------------------------------ time

    def at(self, setting: str) -> float:
        """The value in force in this step of the setting of this name, number or schedule."""
        return self.value_of(getattr(self, setting), self.step)

    def value_of(self, setting: float | Schedule, step: int) -> float:
        """The value of a setting in a step of this run; in a run of stages schedules begin anew with each of them."""
        begins = self.stage_begins()
        number = bisect.bisect_right(begins, step) - 1
        ends = begins[number + 1] if number + 1 < len(begins) else self.total_steps
        return value_at(setting, step - begins[number], ends - begins[number], self.steps_per_epoch)

    # ------------------------------------------------------------------ stages

    stages: Sequence[float] = (1.0,)
    """Lengths of a run's stages relative to each other; a method with more than one defines `begin_stage`."""

    def stage_begins(self) -> list[int]:
        """The first step of each stage."""
        ends = np.cumsum(self.stages) / sum(self.stages)
        return [0, *(round(float(end) * self.total_steps) for end in ends[:-1])]

    @property
    def stage(self) -> int:
        """Which stage the next step belongs to, from 0."""
        return bisect.bisect_right(self.stage_begins(), self.step) - 1

    def begin_stage(self, number: int) -> None:
        """What changes between the last step of a stage and the first of the next, whose number this is: weights, in place.
        The optimiser has forgotten its moments by then, and schedules begin anew."""
        raise NotImplementedError(f"{type(self).__name__} has stages and must define begin_stage")

    def begin(self, total_steps: int, steps_per_epoch: int) -> None:
        """Fixes the length of the run, which every schedule refers to.

        Raises UserError when a resumed run was planned with another length.
        """
        if self.step > 0:
            refuse_another_length((self.total_steps, self.steps_per_epoch), (total_steps, steps_per_epoch))
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch

    # ------------------------------------------------------------------ the step

    def take_step(
        self,
        batch: Batch,
        optimizers: list[Optimizer],
        *,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        accumulate: Callable[[], AbstractContextManager] = nullcontext,
        scaler: "torch.amp.GradScaler | None" = None,
        measure: bool = False,
    ) -> StepReport:
        """One optimiser step on this rank's batch. Gradients must average over ranks (DDP).

        Args:
            backward: called with each slice's loss.
            accumulate: context in which gradients are not yet synchronised, for all slices but the last.
            scaler: of 16-bit losses; unscaled and updated here, once.
            measure: also look at the targets, for a step that is logged.
        """
        if len(batch) % self.micro_batches:
            raise UserError(
                f"micro_batches: {self.micro_batches} does not divide the batch of {len(batch)} samples on this process. Use "
                "a divisor of data.batch_size."
            )
        statistics = self.normalisation_statistics()
        with torch.no_grad():
            self.settle(batch)
            targets = self.targets(batch)

        slices = self.micro_batches
        terms: dict[str, Tensor] = {}
        answers: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.student.parameters()).device)
        for number in range(slices):
            with accumulate() if number < slices - 1 else nullcontext():
                part = self.losses(batch.part(number, slices), targets.part(number, slices))
                loss: Any = sum(self._weight(name) * term for name, term in part.items())
                backward(loss * world_size())
            total = total + loss.detach()
            for name, term in part.items():
                terms[name] = terms.get(name, 0) + term.detach()
            for name, value in part.measures.items() if isinstance(part, Terms) else ():
                answers[name] = answers.get(name, 0) + value.detach() / slices

        for parameter in self.resting():
            # without a gradient the optimiser neither decays a weight nor moves its moments
            parameter.grad = None
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        plans = self.optimized()
        norms = [gradient_norms(plan.module) for plan in plans]
        report = self._agree(terms, total, norms, answers, targets, measure)

        if report.not_finite:
            for buffer, saved in statistics:
                buffer.copy_(saved)
            report = replace(report, gradients=not_finite_gradients(plans, norms))
        else:
            frozen = self._frozen()
            for plan, optimizer, plan_norms in zip(plans, optimizers, norms, strict=True):
                if plan.clip is not None:
                    names, gradients = trained_gradients(plan.module)
                    plan.clip.apply(gradients, plan_norms, [part_of(name) for name in names])
                if frozen and self.freeze_by == "gradient":
                    for name, parameter in plan.module.named_parameters():
                        if "last_layer" in name:
                            parameter.grad = None
                self._write_rates(plan, optimizer, batch.total)
                optimizer.step()
            restore_lengths(self.student)
            self.update(targets)
            restore_lengths(self)  # averages of unit vectors are shorter
        if scaler is not None:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        self.step += 1
        # here and not before the next step, so that a checkpoint between the two holds the new stage
        if self.step in self.stage_begins()[1:] and self.step < self.total_steps:
            for optimizer in optimizers:
                optimizer.state.clear()
            with torch.no_grad():
                self.begin_stage(self.stage)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.not_finite else 0
        self.skipped_steps += bool(report.not_finite)
        self.last_report = report
        return report

    def _frozen(self) -> bool:
        """Whether the prototypes stay as drawn in this step."""
        return self.step < in_steps(self.freeze_last_layer, self.total_steps, self.steps_per_epoch)

    def _weight(self, term: str) -> float:
        return self.at(f"{term}_weight") if hasattr(self, f"{term}_weight") else 1.0

    def _write_rates(self, plan: Optimized, optimizer: Optimizer, batch: int) -> None:
        lr = resolve_lr(plan.lr, self.lr_rule, self.lr_reference_batch, batch)
        lr = self.value_of(lr, self.step)
        weight_decay = self.value_of(plan.weight_decay, self.step)
        still = self.freeze_by == "rate" and self._frozen()
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if still and group["last_layer"] else lr * group["lr_scale"]
            group["weight_decay"] = weight_decay * group["decays"]

    def normalisation_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that a forward pass writes, with copies: batch normalisation gathers while it computes."""
        return [
            (buffer, buffer.clone())
            for module in self.modules()
            if isinstance(module, NORMALISATIONS) and module.training
            for buffer in module.buffers(recurse=False)
        ]

    def _agree(
        self,
        terms: dict[str, Tensor],
        total: Tensor,
        norms: list[Tensor],
        answers: dict[str, Tensor],
        targets: Targets,
        measure: bool,
    ) -> StepReport:
        """Sums the terms over ranks and finds out whether all is finite on all of them. The step's one wait."""
        with torch.no_grad():
            evidence = self.evidence(targets)
        if measure and answers:
            answers = self.of_answers({name: sum_over_ranks(sums) / world_size() for name, sums in answers.items()})
        measured = self.measures(targets) | answers if measure else {}
        used = measured_use(targets, centers_of(self)) if measure else {}
        of_measures = [value.detach().float()[None] for value in measured.values()]
        decisive = total.new_zeros(0) if evidence is None else evidence.float()
        means = torch.cat([decisive, *of_measures, *(state for _, state in used.values())])
        parts = torch.stack([*(term.float() for term in terms.values()), total.float()])
        norm = torch.linalg.vector_norm(torch.cat(norms))
        flags = torch.cat([~parts.isfinite(), ~norm.isfinite()[None]]).float()
        stop = torch.full((1,), float(self.stop_requested), device=parts.device)
        # the norm and what follows are alike on all ranks or a mean of each, so their sum is world_size times their mean
        values = sum_over_ranks(torch.cat([flags, stop, parts, norm[None].float(), means])).tolist()
        names = [*terms, "total", "gradient"]
        flagged = tuple(name for name, flag in zip(names, values, strict=False) if flag)
        if any(name in flagged for name in terms):
            flagged = tuple(name for name in flagged if name != "total")
        rest = values[len(names) + 1 :]
        sums, (total_sum, norm_sum, *mean_sums) = rest[: len(terms)], rest[len(terms) :]
        of_all = [value / world_size() for value in mean_sums]
        self.evident, found = tuple(of_all[: len(decisive)]), of_all[len(decisive) :]
        states = found[len(measured) :]
        uses = {
            kind: target_use(size, *states[4 * place : 4 * place + 4])
            for place, (kind, (size, _)) in enumerate(used.items())
        }
        return StepReport(
            terms=dict(zip(terms, sums, strict=True)),
            total=total_sum,
            gradient_norm=norm_sum / world_size(),
            teacher_entropy=uses["picture"].entropy if "picture" in uses else None,
            not_finite=flagged,
            stop=bool(values[len(names)]),
            measures=dict(zip(measured, found, strict=False)),
            uses=uses,
        )

    # ------------------------------------------------------------------ state

    def get_extra_state(self) -> dict[str, int]:
        """Counts that a run continues from, so that they travel with the state dict."""
        return {name: getattr(self, name) for name in COUNTS}

    def set_extra_state(self, state: dict[str, int]) -> None:
        for name in COUNTS:
            setattr(self, name, int(state[name]))


COUNTS = ("step", "total_steps", "steps_per_epoch", "skipped_steps", "skipped_in_a_row", "samples_per_step")
