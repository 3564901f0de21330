"""The engine under every method: its step inside Lightning, from settings to checkpoints."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ssd.batch import Batch, Tokens, network_input
from ssd.cached_targets.use import check_targets
from ssd.distributed import gather_objects, is_sharded, rank, world_size
from ssd.errors import UserError
from ssd.evaluation.dense import correspondence, has_places
from ssd.memory import keep_freed_memory
from ssd.parallel import compile_blocks, shard, synchronise_batch_norm
from ssd.record import Recorded, describe, differences
from ssd.resume import (
    code_version,
    generator_states,
    place_in_run,
    refuse_another_length,
    restore_generators,
    spread_generators,
)
from ssd.schedules import Schedule
from ssd.step import NORMALISATIONS, Step
from ssd.step_report import StepReport
from ssd.teachers import Teacher
from ssd.weights.stages import start_stage

LOOKED_AT = 512  # samples of each set that each process asks for more than features: enough for half a point

SEEN = ("views", "view_variants", "fingerprint", "sampling", "mean", "std", "value_range", "channels", "seed")
"""Of what a checkpoint says of views and data that which decides what a step sees."""


class SelfDistillation(Step, pl.LightningModule):
    """Base of all methods.

    A method sets `student` and `teacher` and defines `targets`, `losses` and `update`. The settings are those of `Step`.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False
        self.config_text: str | None = None
        self._generators: list[dict[str, Tensor]] | None = None

    def training_step(self, batch: Batch, batch_index: int) -> None:
        varying = getattr(self.trainer.datamodule, "batches_vary", False)
        if not varying and self.samples_per_step not in (0, batch.total):
            raise UserError(
                f"the checkpoint belongs to a run of {self.samples_per_step} samples a step; this run has {batch.total}, so "
                f"it would not see the same batches. Set data.batch_size to {self.samples_per_step} divided by the number "
                "of processes, or start a new run from its weights (backbone.weights)."
            )
        self.samples_per_step = 0 if varying else batch.total
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
        for kind, use in report.uses.items():
            before = "" if kind == "picture" else f"{kind}_"
            self.log(f"train/prototypes/{before}perplexity", use.perplexity)
            if use.center_share is not None:
                self.log(f"train/center/{before}share", use.center_share)
        self.log_dict(self.diagnostics(report))
        optimizers = self.optimizers(use_pl_optimizer=False)
        groups = (optimizers[0] if isinstance(optimizers, list) else optimizers).param_groups
        self.log("train/schedule/lr", max(group["lr"] for group in groups))
        self.log("train/schedule/weight_decay", max(group["weight_decay"] for group in groups))
        for name, value in vars(self).items():
            if isinstance(value, Schedule) and name not in ("lr", "weight_decay"):
                self.log(f"train/schedule/{name}", self.value_of(value, self.step - 1))
        if len(self.stages) > 1:
            self.log("train/schedule/stage", float(self.stage))

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
        if self.cached_targets is not None:
            self._rest_teacher()
        # one that evaluates, in a frozen teacher, couples no samples
        batch_norms = [m for m in self.modules() if isinstance(m, NORMALISATIONS) and m.training]
        if batch_norms and not self.ghost_norm:
            if self.micro_batches > 1:
                raise UserError(
                    f"micro_batches: {self.micro_batches} with batch normalisation would normalise each slice by itself, "
                    "which is another computation. Use micro_batches: 1, a network without batch normalisation, or allow "
                    "it with ghost_norm: true."
                )
            if self.trainer.world_size > 1:
                synchronise_batch_norm(self, self.trainer.strategy.root_device)
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        if self.compile_networks:
            for network in (self.student, self.teacher):
                compile_blocks(network)

    def _rest_teacher(self) -> None:
        """Leaves a teacher whose answers are read where it was built."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "cached_targets: a teacher that rests cannot be spread over processes (scale/sharded). Use strategy: ddp."
            )
        teacher: Any = self.teacher
        teacher.rests = True
        names = [name for name in self.state_dict() if name.startswith("teacher.")]
        self._ddp_params_and_buffers_to_ignore = names  # it lies on another device and never changes

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
        if self.step == 0:  # a checkpoint to go on with was read before
            if self.start_from is not None:
                start_stage(self, self.start_from)
            self.begin_fresh()
        if self.cached_targets is not None:
            check_targets(self, self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        steps_per_epoch = int(self.trainer.num_training_batches)
        self.begin(self._length(steps_per_epoch), steps_per_epoch)
        self.survey(self.trainer.datamodule, Path(self.trainer.default_root_dir))
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

    def configure_model(self) -> None:
        """Spreads student and teachers over processes where the strategy is FSDP2 (`ModelParallelStrategy`)."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy) or is_sharded(next(self.student.parameters())):
            return
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                f"strategy: tensor_parallel_size of {mesh['tensor_parallel'].size()} would split layers, which no method here "
                "does. Use tensor_parallel_size: 1 and data_parallel_size: the number of processes."
            )
        trained = [plan.module for plan in self.optimized()]
        teachers = [module.network for module in self.modules() if isinstance(module, Teacher)]
        for network in (*trained, *teachers):
            shard(network, mesh["data_parallel"])

    def configure_optimizers(self) -> list[Optimizer]:
        return self.build_optimizers()

    def validation_step(self, batch: dict[str, Tensor], batch_index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Frozen features of one evaluation batch, and more of the first `LOOKED_AT` samples.

        {"features": (B, D), "labels": (B,), "index": (B,)}, "dense": (B, 3) as `correspondence` gives it, of backbones
        with a map of patches, and "student": (B, D), the student's features where the evaluated network follows it.
        """
        answer, tokens = self._embedded(batch)
        if batch_index * len(batch["index"]) >= LOOKED_AT:
            return answer
        if batch["sample"].ndim == 4 and has_places(tokens):
            answer["dense"] = correspondence(self.evaluated_backbone, batch["sample"], batch["index"])
        student: Any = self.student
        if dataloader_idx == 0 and student.backbone is not self.evaluated_backbone:
            answer["student"] = student.backbone(network_input(batch)).pooled().float()
        return answer

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embeddings: {"features": (B, D), "labels": (B,), "index": (B,)}"""
        return self._embedded(batch)[0]

    def _embedded(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tokens]:
        tokens = self.evaluated_backbone(network_input(batch))
        found = {"features": tokens.pooled().float(), "labels": batch["label"], "index": batch["index"]}
        return found, tokens

    # ------------------------------------------------------------------ checkpoints

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
        # views are among what is seen, the length is compared in steps, and stored targets have a check of their own
        changed = [
            key
            for key in differences(before["method"], self.record())
            if not key.startswith(("views", "steps", "cached_targets"))
        ]
        if changed:
            rank_zero_warn(f"the run goes on with settings that are not the checkpoint's: {', '.join(changed)}.")
