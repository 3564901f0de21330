"""Evaluation during training: what the frozen features are worth at every validation, from one pass over the data."""

from typing import Any

import pytorch_lightning as pl
import torch

from ssd.distributed import sum_over_ranks
from ssd.evaluation.dense import correspondence_number
from ssd.evaluation.features import Features, gathered
from ssd.evaluation.protocol import Number
from ssd.evaluation.suite import monitor

BANK, QUERIES = 0, 1


class OnlineEvaluation(pl.Callback):
    """Logs k-NN, a linear probe and RankMe of the features that `validation_step` returns.

    A module's `validation_step` returns {"features" (B, D), "labels" (B,) with -1 for none, "index" (B,)}.
    The first validation loader is the bank that probes learn from, the second holds the queries. The parts of all
    ranks are brought together, each sample once. Logged are `val/knn/top1` (k 20, temperature 0.07, the bank's mean
    subtracted), `val/linear/top1` (ridge regression in closed form, its penalty chosen by leaving one out of the
    bank) and `val/spectrum/rankme` (of the bank); the last alone where bank or queries have no labels, or where
    features are not finite. Where the module also returns "dense" (B, 3), of `correspondence`, `val/dense/correspondence`
    is that of the queries, or of the bank where it is all there is. Lightning's check before training is left out.

    Attributes:
        numbers: the last result with its protocols.
        step: how many steps the module had done then, -1 before the first result.
    """

    def __init__(self) -> None:
        self.numbers: list[Number] = []
        self.step = -1
        self._begin()

    def _begin(self) -> None:
        self._parts: dict[int, list[Features]] = {BANK: [], QUERIES: []}
        self._dense: dict[int, list[torch.Tensor]] = {BANK: [], QUERIES: []}

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

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        bank, queries = (gathered(self._parts[which], pl_module.device) for which in (BANK, QUERIES))
        none = torch.zeros(3, device=pl_module.device)
        sums = (sum(self._dense[which], none) for which in (BANK, QUERIES))
        of_bank, of_queries = sum_over_ranks(torch.stack(list(sums)))
        self._begin()
        if not len(bank.index):
            return
        with torch.no_grad():
            self.numbers = monitor(bank.features, bank.labels, queries.features, queries.labels)
        counts = of_queries if of_queries[0] > 0 else of_bank
        if counts[0] > 0:
            self.numbers.append(correspondence_number(counts))
        self.step = int(getattr(pl_module, "step", -1))
        for number in self.numbers:
            pl_module.log(f"val/{number.name}", number.value, sync_dist=True, batch_size=len(bank.index))
