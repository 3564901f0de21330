"""Names what is wrong with a run while it goes, keeps the batch that shows it, and suggests one change."""

import math
import statistics
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ssd.batch import Batch
from ssd.callbacks.checkpoints import AtomicCheckpointIO
from ssd.callbacks.throughput import Throughput
from ssd.diagnosis.batches import BATCH_FACTS, BatchFacts, diagnose_batch, first_views, guilty_rows, measure_batch
from ssd.diagnosis.course import Look, Phase, diagnose_course, phase_of, temperatures_of
from ssd.diagnosis.features import deviations_of
from ssd.diagnosis.findings import Finding, is_news
from ssd.diagnosis.networks import Watch, copies, diagnose_networks, moved, sampled_weights
from ssd.diagnosis.origin import origin
from ssd.distributed import gather_objects, rank, sum_over_ranks, world_size
from ssd.evaluation.spectrum import effective_rank, singular_values
from ssd.schedules import value_at

LOOK_EVERY = 10  # steps at least from one look to the next
ROWS = 64  # features that tell the rank: their spectrum takes a millisecond
RECENT = 50  # steps of which skipped ones are counted
REMEMBERED = 300  # looks
MANY_COPIES = 0.1  # share of a batch that is copies in every step, and makes no jump
KOLEO_JUMP = 20.0  # what two equal samples add to the sum of the term: -2 ln of a distance of about 1e-8, less what was


class Doctor(pl.Callback):
    """Looks at every tenth step or so, where numbers are logged, and says what is wrong: once, and again if it gets worse.

    What it says goes to the terminal, to TensorBoard as text, into the run's `summary.json` and into checkpoints, so that a
    run that goes on does not say it again. Batches are kept in the folder `doctor` of the run as files of tensors, which
    `torch.load(FILE, weights_only=True)` reads. It changes nothing of the run.

    Args:
        enabled: false for none of it.
        keep_batches: how many batches are kept at most, on each process.
    """

    def __init__(self, enabled: bool = True, keep_batches: int = 3):
        self.enabled = enabled
        self.keep_batches = keep_batches
        self.findings: list[Finding] = []
        self.kept = 0
        self._forget()

    def _forget(self) -> None:
        """What is known of the steps of this process alone."""
        self._looks: list[Look] = []
        self._norms: list[float] = []
        self._koleo: deque[float] = deque(maxlen=RECENT)
        self._skips: deque[bool] = deque(maxlen=RECENT)
        self._largest_rate = 0.0
        self._clock = (0.0, 0.0)
        self._last_look = 0
        self._features: Tensor | None = None
        self._before: tuple[list[Tensor], list[Tensor], Tensor] | None = None
        self._hook: Any = None

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.enabled:
            return
        self._forget()
        self._last_look = pl_module.step
        self._phase: Phase | None = None
        self._student = sampled_weights(pl_module.student)
        networks = (
            hasattr(pl_module.teacher, "network") and not pl_module.teacher.rests
        )  # else on another device, unused
        theirs = dict(pl_module.teacher.network.named_parameters()) if networks else {}
        # a teacher of its own may have layers of the same names and other sizes
        self._teacher = {
            n: theirs[n] for n, own in self._student.items() if n in theirs and theirs[n].shape == own.shape
        }
        self._hook = pl_module.evaluated_backbone.register_forward_hook(self._catch)
        self._watch = Watch(pl_module)
        self._look_at_networks(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if self._is_due(trainer, pl_module.step + 1):
            student, teacher = copies(self._student.values()), copies(self._teacher.values())
            shared = [place for place, name in enumerate(self._student) if name in self._teacher]
            apart = moved(teacher, [student[place] for place in shared]) if teacher else torch.zeros(0)
            self._before = student, teacher, apart

    def _is_due(self, trainer: pl.Trainer, step: int) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.enabled and every > 0 and step % every == 0 and step - self._last_look >= LOOK_EVERY

    def _catch(self, backbone: Any, inputs: Any, tokens: Any) -> None:
        """The first features of a step that is looked at: the teacher's of all global views, or the student's of a slice."""
        if self._before is not None and self._features is None:
            self._features = tokens.pooled().detach()[:ROWS].float()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self.enabled:
            return
        report = pl_module.last_report
        self._skips.append(bool(report.not_finite))
        if report.not_finite:
            self._on_skipped(trainer, pl_module, batch)
        else:
            self._norms.append(report.gradient_norm)
            if self._koleo_jumps(report, batch.total):
                self._look_at_batch(trainer, pl_module, batch, self._gathered(self._batch_facts(batch)), copies=0.0)
        if self._before is not None:
            self._look(trainer, pl_module, batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._forget()

    # ------------------------------------------------------------------ a look

    def _look(self, trainer: pl.Trainer, pl_module: Any, batch: Batch) -> None:
        report, step = pl_module.last_report, pl_module.step
        self._last_look = step
        own = torch.cat([self._batch_facts(batch), self._network_facts(pl_module)])
        facts = self._gathered(own)
        koleo = "koleo" in report.terms
        self._look_at_batch(trainer, pl_module, batch, facts, MANY_COPIES if koleo else math.inf)
        rank_of_features, update, teacher_moved, teacher_due = of_all(facts)
        skipped = bool(report.not_finite)
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = max(rates, default=0.0)
        self._largest_rate = max(self._largest_rate, rate)
        waiting, seconds = self._waited(trainer)
        look = Look(
            step=step,
            terms=report.terms,
            uses=report.uses,
            rank=rank_of_features,
            gradient_norm=statistics.median(self._norms) if self._norms else None,
            update=None if skipped else update,
            rate_share=rate / self._largest_rate if self._largest_rate else 0.0,
            teacher_moved=None if skipped else teacher_moved,
            teacher_due=teacher_due,
            skipped=sum(self._skips),
            recent=len(self._skips),
            loss_scale=scale_of(trainer),
            waiting=waiting,
            waited_of=seconds,
            temperatures=temperatures_of(pl_module, step),
            deviations=deviations_of(report.measures),
        )
        self._looks = [*self._looks[-REMEMBERED:], look]
        self._norms = []
        for name, value in {"train/spectrum/effective_rank": look.rank, "train/update/share": look.update}.items():
            if value is not None:
                pl_module.log(name, value)
        self._look_at_networks(trainer, pl_module)
        self._phase = self._phase or phase_of(pl_module)
        for finding in diagnose_course(self._looks, self._phase):
            self._say(trainer, pl_module, finding)

    def _look_at_networks(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._watch.changed():
            for finding in diagnose_networks(pl_module, trainer.optimizers, pl_module.step):
                self._say(trainer, pl_module, finding)

    def _batch_facts(self, batch: Batch) -> Tensor:
        """(6,) as `BatchFacts`, all NaN of what is not looked at."""
        views = first_views(batch)
        device = next(iter(batch.views.values())).device
        return torch.full((len(BATCH_FACTS),), torch.nan, device=device) if views is None else measure_batch(views)

    def _network_facts(self, pl_module: Any) -> Tensor:
        """(4,) rank of the features, share by which weights changed, the same of the teacher, and what it should be."""
        before, self._before = self._before, None
        features, self._features = self._features, None
        assert before is not None
        student, teacher, apart = before
        found = torch.full((4,), torch.nan, device=student[0].device if student else None)
        if features is not None and len(features) > 1:
            found[0] = centred_rank(features)
        if student:
            found[1] = moved(student, copies(self._student.values())).median()
        if teacher:
            found[2] = moved(teacher, copies(self._teacher.values())).max()
            if hasattr(pl_module, "momentum"):
                length = pl_module.total_steps, pl_module.steps_per_epoch
                momentum = value_at(pl_module.momentum, pl_module.step - 1, *length)  # of the step that was taken
                found[3] = (1 - momentum) * apart.max()
        return found

    def _gathered(self, own: Tensor) -> list[list[float]]:
        """The numbers of all ranks; the one wait of a look."""
        table = own.new_zeros(world_size(), len(own))
        table[rank()] = own
        return sum_over_ranks(table).tolist()

    def _waited(self, trainer: pl.Trainer) -> tuple[float | None, float]:
        """Share of the time since the last look that steps waited for data, and that time."""
        throughput = next((part for part in trainer.callbacks if isinstance(part, Throughput)), None)  # type: ignore
        if throughput is None:
            return None, 0.0
        since, self._clock = self._clock, (throughput.waited, throughput.seconds)
        seconds = throughput.seconds - since[1]
        # the first looks see the workers start
        return ((throughput.waited - since[0]) / seconds if seconds > 0 and len(self._looks) > 1 else None), seconds

    # ------------------------------------------------------------------ batches

    def _koleo_jumps(self, report: Any, total: int) -> bool:
        """Whether the term is higher than usual by what two equal samples add to it."""
        if "koleo" not in report.terms:
            return False
        value, before = report.terms["koleo"], list(self._koleo)
        self._koleo.append(value)
        if len(before) < 5:
            return False
        usual = statistics.median(before)
        spread = statistics.median(abs(old - usual) for old in before)
        return value - usual > max(KOLEO_JUMP / total, 6 * spread)

    def _look_at_batch(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, facts: list[list[float]], copies: float
    ) -> None:
        of_ranks = [BatchFacts(*fact[: len(BATCH_FACTS)]) for fact in facts]
        for finding in diagnose_batch(of_ranks, pl_module.step, pl_module.teacher.follows, copies):
            self._say(trainer, pl_module, finding, batch)

    def _on_skipped(self, trainer: pl.Trainer, pl_module: Any, batch: Batch) -> None:
        """A loss that is not finite, named by where it comes from. A gradient alone may be the scaler's search."""
        report = pl_module.last_report
        terms = [name for name in report.not_finite if name != "gradient"]
        if any(finding.kind == "not-finite" for finding in self.findings) or (
            not terms and scale_of(trainer) is not None
        ):
            return
        views = first_views(batch)
        input_is_broken = views is not None and not bool(views.isfinite().all())
        with trainer.precision_plugin.train_step_context():
            layer = origin(pl_module, batch) if terms else report.gradients[0] if report.gradients else None
        places = gather_objects("the input" if input_is_broken else layer)
        guilty = next((number for number, place in enumerate(places) if place is not None), None)
        place = None if guilty is None else places[guilty]
        what = f"loss term '{terms[0]}' is" if terms else "the loss is finite and its gradient is"
        where = "" if place is None else f"; first in {place}" + (f" on rank {guilty}" if world_size() > 1 else "")
        advice = {
            "the input": "Remove or mend the samples that the kept batch names.",
            None: "Lower lr: a third.",
        }.get(place, "Lower lr: a third; with 16-mixed use bf16-mixed.")
        finding = Finding(
            "not-finite",
            pl_module.step,
            f"{what} not finite in step {pl_module.step - 1}{where}.",
            advice,
            term=terms[0] if terms else None,
            layer=place,
            rank=guilty,
        )
        self._say(trainer, pl_module, finding, batch)

    def _keep(self, trainer: pl.Trainer, finding: Finding, batch: Batch) -> str | None:
        """The file, relative to the run's folder, in which this batch is kept; None where there is enough of them."""
        folder = Path(trainer.default_root_dir)
        file = Path("doctor", f"step-{finding.step}-rank-{finding.rank or 0}-{finding.kind}.pt")
        if self.kept >= self.keep_batches:
            return None
        self.kept += 1
        if (finding.rank or 0) != rank():
            return str(file)
        views = first_views(batch)
        rows = guilty_rows(finding.kind, views) if views is not None else torch.arange(len(batch))
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        index = batch.index.tolist()
        content = {
            "views": {kind: view.detach().cpu() for kind, view in batch.views.items()},
            "index": batch.index.cpu(),
            "label": None if batch.label is None else batch.label.cpu(),
            "boxes": {kind: boxes.cpu() for kind, boxes in batch.boxes.items()},
            "masks": {kind: masks.boolean.cpu() for kind, masks in batch.masks.items()},
            "names": [] if source is None else [source.describe(place) for place in index],
            "guilty": rows.cpu(),
            "finding": finding.row(),
        }
        AtomicCheckpointIO().save_checkpoint(content, folder / file)
        return str(file)

    # ------------------------------------------------------------------ saying it

    def _say(self, trainer: pl.Trainer, pl_module: Any, finding: Finding, batch: Batch | None = None) -> None:
        if not is_news(finding, self.findings):
            return
        if batch is not None:
            finding = replace(finding, batch=self._keep(trainer, finding, batch))
        self.findings.append(finding)
        if not trainer.is_global_zero:
            return
        print(f"doctor: step {finding.step}: {finding.text()}", file=sys.stderr, flush=True)
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):
                writer.add_text(f"doctor/{finding.kind}", finding.text(), finding.step)

    def state_dict(self) -> dict[str, Any]:
        return {"findings": [finding.row() for finding in self.findings], "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = [Finding(**row) for row in state_dict["findings"]]
        self.kept = state_dict["kept"]


def of_all(facts: list[list[float]]) -> tuple[float | None, ...]:
    """Means over ranks of what `_network_facts` measured, None of what was not."""
    columns = list(zip(*facts))[len(BATCH_FACTS) :]
    means = [statistics.fmean(column) for column in columns]
    return tuple(None if mean != mean else mean for mean in means)


def centred_rank(features: Tensor) -> float:
    """Effective rank of (N, D) features about their mean; 0 where they are all the same."""
    return effective_rank(singular_values(features - features.mean(0)))


def scale_of(trainer: pl.Trainer) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
