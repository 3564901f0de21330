"""Evaluation during training: what the frozen features are worth at every validation, from one pass over the data."""

from typing import Any

import pytorch_lightning as pl
import torch

from ssd.distributed import gather_rows, sum_over_ranks
from ssd.evaluation.dense import correspondence_number
from ssd.evaluation.features import Features, gathered
from ssd.evaluation.label_free import PrototypeUse, agreement_number, lidar_number, prototype_numbers
from ssd.evaluation.moments import check_times, steps_of
from ssd.evaluation.protocol import Number
from ssd.evaluation.suite import monitor

BANK, QUERIES = 0, 1
FIXED_SAMPLES = 256
"""Training samples whose views are looked at, the same at every evaluation."""
NEVER = 2**62


class OnlineEvaluation(pl.Callback):
    """Logs k-NN, a linear probe and label-free numbers of the features that `validation_step` returns.

    A module's `validation_step` returns {"features" (B, D), "labels" (B,) with -1 for none, "index" (B,)}.
    The first validation loader is the bank that probes learn from, the second holds the queries. The parts of all
    ranks are brought together, each sample once. Logged are `val/knn/top1` (k 20, temperature 0.07, the bank's mean
    subtracted), `val/linear/top1` (ridge regression in closed form, its penalty chosen by leaving one out of the
    bank), `val/spectrum/rankme` and `val/spectrum/alpha_req` (of the bank); the last two alone where bank or queries have
    no labels, or where features are not finite. Where the module also returns "dense" (B, 3), of `correspondence`,
    `val/dense/correspondence` is that of the queries, or of the bank where it is all there is; where it returns "student"
    (B', D), the other network's features of the first samples, `val/agreement/cosine` compares them with the bank's.

    On 256 training samples in the views of epoch 0, the same at every evaluation: `val/spectrum/lidar`, and
    `val/prototypes/perplexity` and `val/prototypes/used` of the targets. Lightning's check before training is left out.

    Args:
        times: how often in a run, evenly and at its end, or at which shares of it, such as [0.01, 0.1, 1]; null leaves it
            to trainer.check_val_every_n_epoch and trainer.val_check_interval.

    Attributes:
        numbers: the last result with its protocols.
        step: how many steps the module had done then, -1 before the first result.
    """

    def __init__(self, times: int | list[float] | None = None) -> None:
        self.times = check_times(times)
        self.numbers: list[Number] = []
        self.step = -1
        self._begin()

    def _begin(self) -> None:
        self._parts: dict[int, list[Features]] = {BANK: [], QUERIES: []}
        self._pairs: list[Features] = []
        self._dense: dict[int, list[torch.Tensor]] = {BANK: [], QUERIES: []}

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.times is not None:
            trainer.check_val_every_n_epoch = None
            trainer.val_check_batch = NEVER

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        # Lightning asks after this whether an evaluation is due: whether the batches done divide by this
        if self.times is not None:
            due = pl_module.step in steps_of(self.times, pl_module.total_steps)
            trainer.val_check_batch = 1 if due else NEVER

    # ------------------------------------------------------------------ what

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or dataloader_idx not in self._parts:
            return
        part = Features(outputs["features"].detach().float(), outputs["labels"], outputs["index"])
        self._parts[dataloader_idx].append(part)
        if "dense" in outputs:
            self._dense[dataloader_idx].append(outputs["dense"].sum(0))
        if "student" in outputs and dataloader_idx == BANK:
            both = torch.stack([part.features, outputs["student"].detach().float()], 1)  # (B, 2, D)
            self._pairs.append(part._replace(features=both.flatten(1)))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        bank, queries, pairs = (
            gathered(parts, pl_module.device) for parts in (self._parts[BANK], self._parts[QUERIES], self._pairs)
        )
        none = torch.zeros(3, device=pl_module.device)
        sums = (sum(self._dense[which], none) for which in (BANK, QUERIES))
        of_bank, of_queries = sum_over_ranks(torch.stack(list(sums)))
        self._begin()
        if not len(bank.index):
            return
        with torch.no_grad():
            self.numbers = monitor(bank.features, bank.labels, queries.features, queries.labels)
            self.numbers += self.of_fixed_samples(trainer, pl_module)
        if len(pairs.index) > 1:
            self.numbers.append(agreement_number(*pairs.features.unflatten(1, (2, -1)).unbind(1)))
        counts = of_queries if of_queries[0] > 0 else of_bank
        if counts[0] > 0:
            self.numbers.append(correspondence_number(counts))
        self.step = int(getattr(pl_module, "step", -1))
        for number in self.numbers:
            pl_module.log(f"val/{number.name}", number.value, sync_dist=True, batch_size=len(bank.index))

    def of_fixed_samples(self, trainer: pl.Trainer, pl_module: Any) -> list[Number]:
        """LiDAR and the use of prototypes, of what has views and such targets."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "fixed_batches") or not getattr(pl_module, "total_steps", 0):
            return []
        use, views, index = PrototypeUse(pl_module.device), [], []
        with trainer.precision_plugin.val_step_context():
            for batch in data.fixed_batches(FIXED_SAMPLES):
                batch = data.on_after_batch_transfer(batch.to(pl_module.device), 0)
                probs = getattr(pl_module.targets(batch), "probs", None)
                if probs is not None:
                    use.add(probs)
                seen = batch.views.get("global")
                if (
                    seen is not None and seen.ndim > 3 and len(seen) > 1
                ):  # sounds of many lengths have no plain features
                    features = pl_module.evaluated_backbone(seen.flatten(0, 1)).pooled().float()
                    views.append(features.unflatten(0, seen.shape[:2]).transpose(0, 1))  # (B, V, D)
                    index.append(batch.index)
        numbers = prototype_numbers(sum_over_ranks(use.state())) if len(use.mass) else []
        if not views:
            return numbers
        # a sum in the order of the samples is the same for any number of processes
        order = gather_rows(torch.cat(index)).argsort()
        return [lidar_number(gather_rows(torch.cat(views))[order]), *numbers]
