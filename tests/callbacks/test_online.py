import math

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ssd.callbacks.online import OnlineEvaluation
from ssd.evaluation.suite import monitor
from tests.evaluation.samples import clouds


class Embedder(pl.LightningModule):
    """Features are the samples themselves; each training step sets one more dimension to zero."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.automatic_optimization = False
        self.factor = torch.nn.Parameter(torch.full((16,), factor), requires_grad=False)
        self.logged = []

    def training_step(self, batch, batch_index):
        self.factor[int((self.factor == 0).sum())] = 0

    def validation_step(self, batch, batch_index, dataloader_idx=0):
        return {"features": self.factor * batch["sample"], "labels": batch["label"], "index": batch["index"]}

    def log(self, name, value, **settings):
        self.logged.append((name, value))
        super().log(name, value, **settings)

    def configure_optimizers(self):
        return None


def loader(features, labels, order=None, size=16):
    rows = torch.arange(len(labels)) if order is None else order
    samples = [{"sample": features[i], "label": labels[i], "index": i} for i in rows]
    return DataLoader(samples, batch_size=size)


@pytest.fixture
def trainer(tmp_path):
    def build(**settings):
        callback = OnlineEvaluation()
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        settings |= {"accelerator": "cpu", "default_root_dir": tmp_path, "callbacks": [callback]}
        return pl.Trainer(**dict.fromkeys(quiet, False), **settings), callback

    return build


def test_the_logged_numbers_are_those_of_the_features_in_any_order_and_with_repeats(trainer):
    (bank, labels), (queries, truth) = clouds(90), clouds(50, seed=1)
    expected = {f"val/{number.name}": number.value for number in monitor(bank, labels, queries, truth)}
    assert list(expected) == ["val/knn/top1", "val/linear/top1", "val/spectrum/rankme"]
    repeated = torch.cat([torch.randperm(90, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3, 80])])
    fit, callback = trainer()
    fit.validate(Embedder(), [loader(bank, labels, repeated), loader(queries, truth, size=7)], verbose=False)
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert logged == pytest.approx(expected, abs=1e-6)
    assert {f"val/{number.name}": number.value for number in callback.numbers} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("second", [True, False])
def test_without_labels_only_the_rank_is_logged(trainer, second):
    (bank, labels), (queries, _) = clouds(60), clouds(30, seed=1)
    fit, callback = trainer()
    loaders = [loader(bank, labels if second else torch.full_like(labels, -1))]
    if second:
        loaders.append(loader(queries, torch.full((30,), -1)))
    fit.validate(Embedder(), loaders, verbose=False)
    assert list(fit.callback_metrics) == ["val/spectrum/rankme"]
    assert [number.name for number in callback.numbers] == ["spectrum/rankme"]


def test_each_validation_of_a_fit_counts_its_own_features_alone(trainer):
    """One step an epoch, and each changes the features; the check before training logs nothing."""
    (bank, labels), (queries, truth) = clouds(60), clouds(30, seed=1)
    fit, _ = trainer(max_epochs=3, num_sanity_val_steps=2)
    module = Embedder()
    fit.fit(module, loader(bank, labels, size=60), [loader(bank, labels), loader(queries, truth)])
    expected = []
    for epoch in range(3):
        kept = (torch.arange(16) > epoch).float()
        expected += [(f"val/{n.name}", n.value) for n in monitor(kept * bank, labels, kept * queries, truth)]
    assert [name for name, _ in module.logged] == [name for name, _ in expected]
    assert [value for _, value in module.logged] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert len({value for name, value in expected if "rankme" in name}) == 3


def test_a_diverged_network_is_logged_as_such_and_the_run_goes_on(trainer):
    (bank, labels), (queries, truth) = clouds(60), clouds(30, seed=1)
    module = Embedder(float("inf"))
    fit, _ = trainer()
    fit.validate(module, [loader(bank, labels), loader(queries, truth)], verbose=False)
    assert list(fit.callback_metrics) == ["val/spectrum/rankme"]
    assert math.isnan(fit.callback_metrics["val/spectrum/rankme"])


class AsksPatches(Embedder):
    """Finds every patch of the queries again and none of the bank."""

    def validation_step(self, batch, batch_index, dataloader_idx=0):
        counts = torch.tensor([[4.0, 4.0 * dataloader_idx, 1.0]]).expand(len(batch["index"]), -1)
        return super().validation_step(batch, batch_index, dataloader_idx) | {"dense": counts}


def test_patches_found_again_are_those_of_the_queries_where_there_are_some(trainer):
    (bank, labels), (queries, truth) = clouds(40), clouds(30, seed=1)
    fit, callback = trainer()
    fit.validate(AsksPatches(), [loader(bank, labels), loader(queries, truth)], verbose=False)
    assert float(fit.callback_metrics["val/dense/correspondence"]) == 1.0
    assert {number.name: number.chance for number in callback.numbers}["dense/correspondence"] == 0.25
    fit, callback = trainer()
    fit.validate(AsksPatches(), [loader(bank, torch.full_like(labels, -1))], verbose=False)
    assert float(fit.callback_metrics["val/dense/correspondence"]) == 0.0
