"""The engine under every method: one step, in an order that never varies.

A method states itself in `targets`, `losses` and `update`; everything else is here. `Step` is the
arithmetic of one optimiser step without a trainer; `SelfDistillation` runs it inside Lightning.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.distributed import gather_objects, rank, sum_over_ranks, world_size
from ssd.errors import UserError
from ssd.losses.prototype import entropy
from ssd.optim import AdamW, Clip, OptimizerRule, parameter_groups, resolve_lr
from ssd.parallel import compile_blocks, synchronise_batch_norm
from ssd.record import Recorded, describe
from ssd.schedules import Cosine, Length, Schedule, in_steps, value_at
from ssd.views.recipes import views_named
from ssd.views.view import Views

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Optimized:
    """What one optimiser trains, and how. A method with several students names one of these for each."""

    module: nn.Module
    optimizer: OptimizerRule
    lr: float | Schedule
    weight_decay: float | Schedule
    clip: Clip | None


@dataclass(frozen=True)
class StepReport:
    """What one step did, in plain numbers that are the same on every rank.

    Args:
        terms: loss terms before their weight, over the whole step.
        total: what was minimised.
        gradient_norm: L2 norm over all trained parameters before clipping.
        teacher_entropy: mean entropy of the targets `probs` in nats, where it was asked for and there are such.
        not_finite: what was not finite and made the step be skipped: names of terms, or "gradient".
        stop: whether any rank was asked to stop.
    """

    terms: dict[str, float]
    total: float
    gradient_norm: float
    teacher_entropy: float | None
    not_finite: tuple[str, ...]
    stop: bool


class SelfDistillation(Recorded, pl.LightningModule):
    """Base of all methods: the loop, its settings, its state.

    A method sets `student` and `teacher` and defines `targets`, `losses` and `update`.

    Args:
        views: name of a view recipe, or the recipe spelled out.
        optimizer: AdamW, SGD or LARS with their own settings.
        lr: learning rate at the reference batch; a schedule's start is its peak.
        lr_rule: how the rate follows the global batch: "linear" or "sqrt" in batch / `lr_reference_batch`, or "none".
        lr_reference_batch: the global batch for which `lr` is written.
        weight_decay: of decayed parameters.
        decay_rule: "bias_and_1d" frees biases and vectors (DINO), "bias_norm_and_scale" frees by name (DINOv2).
        clip: gradient clipping, or null.
        freeze_last_layer: for how long prototypes stay as drawn, a share of the run or "1 epochs".
        steps: length of the run in steps; null follows `trainer.max_epochs`.
        micro_batches: slices of a batch that are passed one after the other to save memory; same result.
        ghost_norm: allow batch normalisation over slices or over unsynchronised ranks, which is not the same result.
        compile: compile student and teacher block by block; pays on a GPU, costs minutes at the start.
        max_skipped_steps: steps in a row that may be skipped as not finite before the run stops.
    """

    student: nn.Module
    teacher: nn.Module

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
        clip: Clip | None = Clip(3.0, over="tensor"),  # noqa: B008
        freeze_last_layer: Length = "1 epochs",
        steps: int | None = None,
        micro_batches: int = 1,
        ghost_norm: bool = False,
        compile: bool = False,
        max_skipped_steps: int = 100,
    ):
        super().__init__()
        self.automatic_optimization = False
        for name, value in {"micro_batches": micro_batches, "max_skipped_steps": max_skipped_steps}.items():
            if value < 1:
                raise UserError(f"{name}: {value} is not a positive count. Use 1 or more.")
        if steps is not None and steps < 1:
            raise UserError(f"steps: {steps} is not a positive count. Use null to follow trainer.max_epochs.")
        resolve_lr(1.0, lr_rule, lr_reference_batch, lr_reference_batch)
        self.views = views_named(views)
        self.optimizer = optimizer
        self.lr = lr
        self.lr_rule = lr_rule
        self.lr_reference_batch = lr_reference_batch
        self.weight_decay = weight_decay
        self.decay_rule = decay_rule
        self.clip = clip
        self.freeze_last_layer = freeze_last_layer
        self.steps = steps
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
        self.last_report: StepReport | None = None
        self.config_text: str | None = None
        self._generators: list[dict[str, Tensor]] | None = None

    # ------------------------------------------------------------------ a method

    def targets(self, batch: Batch) -> Targets:
        """Teacher side, whole batch of this rank, no gradient, all reductions over ranks. Reads only."""
        raise NotImplementedError(f"{type(self).__name__} must define targets")

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Student side, on a slice: raw terms, each a sum divided by a count of the whole step. Reads only."""
        raise NotImplementedError(f"{type(self).__name__} must define losses")

    def update(self, targets: Targets) -> None:
        """Writes whatever is not the student's weights. Once, after the optimiser step; not on a skipped step."""
        raise NotImplementedError(f"{type(self).__name__} must define update")

    def optimized(self) -> list[Optimized]:
        """One entry an optimiser: the student by the engine's settings, unless a method says otherwise."""
        return [Optimized(self.student, self.optimizer, self.lr, self.weight_decay, self.clip)]

    @property
    def evaluated_backbone(self) -> Backbone:
        """What probes and exports use: the teacher's backbone where the teacher follows the student, else the student's."""
        network: Any = self.teacher.network if self.teacher.follows else self.student
        return network.backbone

    # ------------------------------------------------------------------ time

    def at(self, setting: str) -> float:
        """The value in force in this step of the setting of this name, number or schedule."""
        return value_at(getattr(self, setting), self.step, self.total_steps, self.steps_per_epoch)

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
        statistics = self._normalisation_statistics()
        with torch.no_grad():
            targets = self.targets(batch)

        slices = self.micro_batches
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for number in range(slices):
            with accumulate() if number < slices - 1 else nullcontext():
                part = self.losses(batch.part(number, slices), targets.part(number, slices))
                loss: Any = sum(self._weight(name) * term for name, term in part.items())
                backward(loss * world_size())
            total = total + loss.detach()
            for name, term in part.items():
                terms[name] = terms.get(name, 0) + term.detach()

        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        plans = self.optimized()
        norms = [gradient_norms(plan.module) for plan in plans]
        report = self._agree(terms, total, norms, targets if measure else None)

        if report.not_finite:
            for buffer, saved in statistics:
                buffer.copy_(saved)
        else:
            frozen = self.step < in_steps(self.freeze_last_layer, self.total_steps, self.steps_per_epoch)
            for plan, optimizer, plan_norms in zip(plans, optimizers, norms, strict=True):
                if plan.clip is not None:
                    names, gradients = trained_gradients(plan.module)
                    plan.clip.apply(gradients, plan_norms, [name.partition(".")[0] for name in names])
                if frozen:
                    # without a gradient the optimiser neither decays a weight nor moves its moments
                    for name, parameter in plan.module.named_parameters():
                        if "last_layer" in name:
                            parameter.grad = None
                self._write_rates(plan, optimizer, batch.total)
                optimizer.step()
            self.update(targets)
        if scaler is not None:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.not_finite else 0
        self.skipped_steps += bool(report.not_finite)
        self.last_report = report
        return report

    def _weight(self, term: str) -> float:
        return self.at(f"{term}_weight") if hasattr(self, f"{term}_weight") else 1.0

    def _write_rates(self, plan: Optimized, optimizer: Optimizer, batch: int) -> None:
        lr = resolve_lr(plan.lr, self.lr_rule, self.lr_reference_batch, batch)
        lr = value_at(lr, self.step, self.total_steps, self.steps_per_epoch)
        weight_decay = value_at(plan.weight_decay, self.step, self.total_steps, self.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

    def _normalisation_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that a forward pass writes, with copies: batch normalisation gathers while it computes."""
        return [
            (buffer, buffer.clone())
            for module in self.modules()
            if isinstance(module, NORMALISATIONS) and module.training
            for buffer in module.buffers(recurse=False)
        ]

    def _agree(
        self, terms: dict[str, Tensor], total: Tensor, norms: list[Tensor], targets: Targets | None
    ) -> StepReport:
        """Sums the terms over ranks and finds out whether all is finite on all of them. The step's one wait."""
        probs = getattr(targets, "probs", None)
        spread = total.new_zeros(1) if probs is None else entropy(probs).mean()[None].float()
        parts = torch.stack([*(term.float() for term in terms.values()), total.float()])
        norm = torch.linalg.vector_norm(torch.cat(norms))
        flags = torch.cat([~parts.isfinite(), ~norm.isfinite()[None]]).float()
        stop = torch.full((1,), float(self.stop_requested), device=parts.device)
        # the last two are alike on all ranks or a mean of each, so their sum is world_size times their mean
        values = sum_over_ranks(torch.cat([flags, stop, parts, norm[None].float(), spread])).tolist()
        names = [*terms, "total", "gradient"]
        flagged = tuple(name for name, flag in zip(names, values, strict=False) if flag)
        *sums, total_sum, norm_sum, spread_sum = values[len(names) + 1 :]
        return StepReport(
            terms=dict(zip(terms, sums, strict=True)),
            total=total_sum,
            gradient_norm=norm_sum / world_size(),
            teacher_entropy=None if probs is None else spread_sum / world_size(),
            not_finite=flagged,
            stop=bool(values[len(names)]),
        )

    # ------------------------------------------------------------------ inside Lightning

    def training_step(self, batch: Batch, batch_index: int) -> None:
        if self.samples_per_step not in (0, batch.total):
            raise UserError(
                f"the checkpoint belongs to a run of {self.samples_per_step} samples a step; this run has {batch.total}, so "
                f"it would not see the same batches. Set data.batch_size to {self.samples_per_step} divided by the number "
                "of processes, or start a new run from its weights (backbone.weights)."
            )
        self.samples_per_step = batch.total
        every = self.trainer.log_every_n_steps
        wanted = every > 0 and (self.step + 1) % every == 0
        strategy = self.trainer.strategy
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizers = self.optimizers(use_pl_optimizer=False)
        report = self.take_step(
            batch,
            optimizers if isinstance(optimizers, list) else [optimizers],
            backward=self.manual_backward,
            accumulate=strategy.block_backward_sync if isinstance(strategy, ParallelStrategy) else nullcontext,
            scaler=scaler,
            measure=wanted,
        )
        # Lightning's count of steps decides when checkpoints are due; ours counts skipped steps and many optimisers once
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        if report.not_finite:
            self._on_skipped_step(report)
        if wanted:
            self._log_step(report)
        if report.stop or self.step >= self.total_steps:
            self._stop()

    def _stop(self) -> None:
        """Ends the run here, whatever least number of epochs or steps the trainer was given for other reasons to stop."""
        self.trainer.fit_loop.min_epochs, self.trainer.fit_loop.epoch_loop.min_steps = 0, None
        self.trainer.should_stop = True

    def _on_skipped_step(self, report: StepReport) -> None:
        named = ", ".join(name if name == "gradient" else f"loss term '{name}'" for name in report.not_finite)
        rank_zero_warn(f"step {self.step - 1} was skipped: {named} not finite. Nothing was changed.")
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row were not finite ({named}), so the run cannot go on. The last "
                "checkpoint is intact. Try precision bf16-mixed or 32-true, or a lower lr."
            )

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        """More numbers of a logged step, full log keys; a method may add its own."""
        return {}

    def _log_step(self, report: StepReport) -> None:
        self.log_dict({f"train/loss/{name}": value for name, value in report.terms.items()})
        self.log("train/loss/total", report.total, prog_bar=True)
        self.log("train/grad/norm", report.gradient_norm)
        self.log("train/health/skipped_steps", float(self.skipped_steps))
        if report.teacher_entropy is not None:
            self.log("train/teacher/entropy", report.teacher_entropy)
        self.log_dict(self.diagnostics(report))
        optimizers = self.optimizers(use_pl_optimizer=False)
        groups = (optimizers[0] if isinstance(optimizers, list) else optimizers).param_groups
        self.log("train/schedule/lr", groups[0]["lr"])
        self.log("train/schedule/weight_decay", groups[0]["weight_decay"])
        for name, value in vars(self).items():
            if isinstance(value, Schedule) and name not in ("lr", "weight_decay"):
                self.log(
                    f"train/schedule/{name}", value_at(value, self.step - 1, self.total_steps, self.steps_per_epoch)
                )

    @pl.LightningModule.trainer.setter  # type: ignore[attr-defined]
    def trainer(self, trainer: pl.Trainer | None) -> None:
        """Set where a fit begins, the only moment before Lightning takes no length for 1000 epochs."""
        pl.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.steps is not None:
            trainer.fit_loop.max_epochs = -1
        elif trainer.max_epochs in (None, -1):
            raise UserError("the run has no length. Set trainer.max_epochs, or steps in the method.")

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        batch_norms = [m for m in self.modules() if isinstance(m, NORMALISATIONS)]
        if batch_norms and not self.ghost_norm:
            if self.micro_batches > 1:
                raise UserError(
                    f"micro_batches: {self.micro_batches} with batch normalisation would normalise each slice by itself, "
                    "which is another computation. Use micro_batches: 1, a network without batch normalisation, or allow "
                    "it with ghost_norm: true."
                )
            if self.trainer.world_size > 1:
                synchronise_batch_norm(self, self.trainer.strategy.root_device)
        if self.compile_networks:
            for network in (self.student, self.teacher):
                compile_blocks(network)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The first hook of a run, used to refuse trainer settings that manual optimisation would ignore."""
        trainer = self.trainer
        if trainer.gradient_clip_val:
            raise UserError(
                f"trainer.gradient_clip_val: {trainer.gradient_clip_val} would be ignored. Use the method's clip, for "
                f"instance clip: {{max_norm: {trainer.gradient_clip_val}, over: all}}."
            )
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} would be ignored. Raise data.batch_size "
                "and cut the batch with the method's micro_batches."
            )
        if trainer.max_steps != -1 and not trainer.fast_dev_run:
            raise UserError(f"trainer.max_steps: {trainer.max_steps} would be ignored. Use the method's steps.")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "trainer.use_distributed_sampler: true would split the data over ranks a second time. Set it to false; "
                "the sampler of the datamodule splits already."
            )
        return []

    def on_fit_start(self) -> None:
        self.stop_requested, self.last_report = False, None

    def on_train_start(self) -> None:
        steps_per_epoch = int(self.trainer.num_training_batches)
        self.begin(self._length(steps_per_epoch), steps_per_epoch)
        if self.step >= self.total_steps:
            self._stop()
        states, self._generators = self._generators, None
        if states is not None and len(states) == world_size():
            restore_generators(states[rank()])
        elif states is not None:
            rank_zero_warn(
                f"the checkpoint was written by {len(states)} processes and is resumed by {world_size()}: drop path and "
                "dropout draw anew; data and masks are the same."
            )
            spread_generators(self.step)
        elif self.step == 0 and world_size() > 1:
            spread_generators(self.step)

    def _length(self, steps_per_epoch: int) -> int:
        """Of the whole run in steps, as the settings say it."""
        return self.steps if self.steps is not None else self.trainer.max_epochs * steps_per_epoch

    def configure_optimizers(self) -> list[Optimizer]:
        return [plan.optimizer.build(parameter_groups(plan.module, self.decay_rule)) for plan in self.optimized()]

    def validation_step(self, batch: dict[str, Tensor], batch_index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Frozen features of one evaluation batch. {"features": (B, D), "labels": (B,), "index": (B,)}"""
        features = self.evaluated_backbone(batch["picture"]).pooled()
        return {"features": features.float(), "labels": batch["label"], "index": batch["index"]}

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embeddings, as `validation_step`."""
        return self.validation_step(batch, batch_index, dataloader_idx)

    # ------------------------------------------------------------------ state

    def get_extra_state(self) -> dict[str, int]:
        """Counts that a run continues from, so that they travel with the state dict."""
        return {name: getattr(self, name) for name in COUNTS}

    def set_extra_state(self, state: dict[str, int]) -> None:
        for name in COUNTS:
            setattr(self, name, int(state[name]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `validate`, `probe` and `export` need, and every rank's generators for exact resume."""
        about = {"method": self.record(), "config": self.config_text, "version": code_version()}
        checkpoint["ssd"] = about | self._what_is_seen()
        checkpoint["generators"] = gather_objects(generator_states())
        if self.steps_per_epoch:
            checkpoint["epoch"] = self.step // self.steps_per_epoch
            checkpoint["loops"]["fit_loop"] |= place_in_run(self.step, self.steps_per_epoch)

    def _what_is_seen(self) -> dict[str, Any]:
        """Views and data, as plain data."""
        datamodule = self.trainer.datamodule
        about = {
            "views": describe(self.views),
            "data": datamodule.record() if isinstance(datamodule, Recorded) else None,
        }
        return about | (datamodule.describe_state() if hasattr(datamodule, "describe_state") else {})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "ssd" not in checkpoint:
            raise UserError(
                "the checkpoint was not written by a run of this project. To start from its weights, give it as "
                "backbone.weights."
            )
        method = checkpoint["ssd"]["method"]["class_path"].rpartition(".")[2]
        if method != type(self).__name__:
            raise UserError(
                f"the checkpoint was made by {method} and cannot continue as {type(self).__name__}. Use the same method, or "
                "start a new run from its backbone (backbone.weights)."
            )
        self._generators = checkpoint["generators"]
        counts = checkpoint["state_dict"]["_extra_state"]
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING or not counts["step"]:
            return
        total, steps_per_epoch = counts["total_steps"], counts["steps_per_epoch"]
        # what can be told before data is loaded, and before Lightning finds more epochs done than were asked for
        refuse_another_length((total, steps_per_epoch), (self._length(steps_per_epoch), steps_per_epoch))
        before, now = checkpoint["ssd"], self._what_is_seen()
        changed = [name for name in SEEN if before.get(name) != now.get(name)]
        if changed:
            rank_zero_warn(
                f"the run goes on with other data than the checkpoint's: {', '.join(changed)} changed. It is not the run "
                "that it would have been without a stop."
            )


COUNTS = ("step", "total_steps", "steps_per_epoch", "skipped_steps", "skipped_in_a_row", "samples_per_step")
SEEN = ("views", "fingerprint", "mean", "std", "channels", "seed")
"""Of what a checkpoint says of views and data that which decides what a step sees."""


def refuse_another_length(before: tuple[int, int], now: tuple[int, int]) -> None:
    """Raises UserError where steps in all and steps an epoch are not those of the checkpoint."""
    if before != now:
        raise UserError(
            f"the checkpoint belongs to a run of {before[0]} steps, {before[1]} an epoch; this run has {now[0]}, {now[1]} an "
            "epoch. Schedules depend on the length: resume with the same data, batch size and length, or start a new run "
            "from its weights (backbone.weights)."
        )


def place_in_run(step: int, steps_per_epoch: int) -> dict[str, Any]:
    """Lightning's own account of a run after `step` steps, to be put into its loop state.

    Lightning takes an epoch for done when its loop ends, also where a run was stopped within it, and would then
    leave out the rest. Within an epoch this is the state at `on_train_batch_end`, where a batch is processed and
    not yet completed; at its end nothing is open.
    """
    epochs, batches = divmod(step, steps_per_epoch)
    open_ = int(batches > 0)

    def count(begun: int, processed: int, completed: int) -> dict[str, int]:
        return {"ready": begun, "started": begun, "processed": processed, "completed": completed}

    epoch, none = count(epochs + open_, epochs, epochs), count(0, 0, 0)
    return {
        "epoch_progress": {"total": epoch, "current": epoch.copy()},
        "epoch_loop.batch_progress": {
            "total": count(step, step, step - open_),
            "current": count(batches, batches, batches - open_),
            "is_last_batch": False,
        },
        "epoch_loop.val_loop.batch_progress": {"total": none, "current": none.copy(), "is_last_batch": False},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - open_},
    }


def trained_gradients(module: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and gradients of the parameters that have one."""
    pairs = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    return [name for name, _ in pairs], [gradient for _, gradient in pairs]


def gradient_norms(module: nn.Module) -> Tensor:
    """(P,) L2 norm of each gradient, in the order of `trained_gradients`."""
    _, gradients = trained_gradients(module)
    return torch.stack(torch._foreach_norm(gradients))


def generator_states() -> dict[str, Tensor]:
    """This rank's random state, for layers that draw from the global generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())


def spread_generators(step: int) -> None:
    """A seed for each rank and step, derived from the global one: else all ranks would drop the same paths."""
    torch.manual_seed(torch.initial_seed() + step * world_size() + rank())


def code_version() -> str:
    try:
        return version("ssd")
    except PackageNotFoundError:
        return "unknown"
