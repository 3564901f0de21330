import math

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ssd.callbacks.online import OnlineEvaluation
from ssd.errors import UserError
from ssd.evaluation.label_free import agreement_number
from ssd.evaluation.moments import steps_of
from ssd.evaluation.suite import monitor
from tests.evaluation.samples import clouds
from tests.lightning_modules.runs import At, digits, fit, fit_as_rank, last, vit


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
    assert list(expected) == ["val/knn/top1", "val/linear/top1", "val/spectrum/rankme", "val/spectrum/alpha_req"]
    repeated = torch.cat([torch.randperm(90, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3, 80])])
    run, callback = trainer()
    run.validate(Embedder(), [loader(bank, labels, repeated), loader(queries, truth, size=7)], verbose=False)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged == pytest.approx(expected, abs=1e-6)
    assert {f"val/{number.name}": number.value for number in callback.numbers} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("second", [True, False])
def test_without_labels_only_the_spectrum_is_logged(trainer, second):
    (bank, labels), (queries, _) = clouds(60), clouds(30, seed=1)
    run, callback = trainer()
    loaders = [loader(bank, labels if second else torch.full_like(labels, -1))]
    if second:
        loaders.append(loader(queries, torch.full((30,), -1)))
    run.validate(Embedder(), loaders, verbose=False)
    assert list(run.callback_metrics) == ["val/spectrum/rankme", "val/spectrum/alpha_req"]
    assert [number.name for number in callback.numbers] == ["spectrum/rankme", "spectrum/alpha_req"]


def test_each_validation_of_a_fit_counts_its_own_features_alone(trainer):
    """One step an epoch, and each changes the features; the check before training logs nothing."""
    (bank, labels), (queries, truth) = clouds(60), clouds(30, seed=1)
    run, _ = trainer(max_epochs=3, num_sanity_val_steps=2)
    module = Embedder()
    run.fit(module, loader(bank, labels, size=60), [loader(bank, labels), loader(queries, truth)])
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
    run, _ = trainer()
    run.validate(module, [loader(bank, labels), loader(queries, truth)], verbose=False)
    assert list(run.callback_metrics) == ["val/spectrum/rankme", "val/spectrum/alpha_req"]
    assert all(math.isnan(value) for value in run.callback_metrics.values())


class AsksPatches(Embedder):
    """Finds every patch of the queries again and none of the bank."""

    def validation_step(self, batch, batch_index, dataloader_idx=0):
        counts = torch.tensor([[4.0, 4.0 * dataloader_idx, 1.0]]).expand(len(batch["index"]), -1)
        return super().validation_step(batch, batch_index, dataloader_idx) | {"dense": counts}


def test_patches_found_again_are_those_of_the_queries_where_there_are_some(trainer):
    (bank, labels), (queries, truth) = clouds(40), clouds(30, seed=1)
    run, callback = trainer()
    run.validate(AsksPatches(), [loader(bank, labels), loader(queries, truth)], verbose=False)
    assert float(run.callback_metrics["val/dense/correspondence"]) == 1.0
    assert {number.name: number.chance for number in callback.numbers}["dense/correspondence"] == 0.25
    run, callback = trainer()
    run.validate(AsksPatches(), [loader(bank, torch.full_like(labels, -1))], verbose=False)
    assert float(run.callback_metrics["val/dense/correspondence"]) == 0.0


class HasStudent(Embedder):
    """The student sees the first half of the dimensions, the teacher all."""

    def validation_step(self, batch, batch_index, dataloader_idx=0):
        answer = super().validation_step(batch, batch_index, dataloader_idx)
        if batch_index > 1 or dataloader_idx == 1:
            return answer
        return answer | {"student": batch["sample"] * (torch.arange(16) < 8)}


def test_agreement_is_that_of_the_samples_both_networks_saw(trainer):
    (bank, labels), (queries, truth) = clouds(80), clouds(30, seed=1)
    run, _ = trainer()
    run.validate(HasStudent(), [loader(bank, labels), loader(queries, truth)], verbose=False)
    seen = bank[:32]
    expected = agreement_number(seen, seen * (torch.arange(16) < 8)).value
    assert float(run.callback_metrics["val/agreement/cosine"]) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- of a method


def test_a_method_is_asked_for_its_views_and_prototypes_and_nothing_of_it_changes(tmp_path):
    module = vit(steps=4)
    before = {}
    keep = At(4, lambda trainer, module: before.update({k: torch.clone(v) for k, v in module.named_parameters()}))
    run = fit(tmp_path, module, callbacks=[keep], val_check_interval=4)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    numbers = {number.name: number for number in run.callbacks[-2].numbers}
    assert numbers["spectrum/lidar"].protocol == "lidar-v1 of 160 training samples in 2 views"
    assert 1 <= numbers["prototypes/perplexity"].value <= 32 and 0 < numbers["prototypes/used"].value <= 1
    assert numbers["prototypes/used"].protocol == "prototypes-v1 K=32, 320 views"
    assert 0.9 < numbers["agreement/cosine"].value <= 1


class KeepNumbers(pl.Callback):
    """On the module, which comes back from another process where its trainer does not."""

    def on_validation_end(self, trainer, pl_module):
        numbers = trainer.callback_metrics.items()
        pl_module.found = {name: float(value) for name, value in numbers if name.startswith("val/")}


def test_two_processes_find_what_one_finds(pair, tmp_path):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "callbacks": [KeepNumbers()]}
    alone = vit(steps=2)
    fit(tmp_path / "one", alone, digits(batch_size=16), **settings)
    assert {"val/spectrum/lidar", "val/prototypes/used", "val/agreement/cosine"} <= set(alone.found)
    for module, error in pair.run(fit_as_rank, tmp_path / "two", vit, {"steps": 2}, settings):
        assert error is None
        assert module.found == pytest.approx(alone.found, rel=1e-3, abs=1e-5)


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    "times, steps",
    [(4, {25, 50, 75, 100}), (1, {100}), ([0.001, 0.1, 1.0], {1, 10, 100}), (300, set(range(1, 101)))],
)
def test_evaluations_lie_at_shares_of_the_run(times, steps):
    assert steps_of(times, 100) == steps


@pytest.mark.parametrize("times", [0, -3, [], [0.0, 0.5], [0.5, 1.5]])
def test_shares_that_are_none_are_refused(times):
    with pytest.raises(UserError, match=r"evaluation.times: .* neither a count .* nor shares"):
        OnlineEvaluation(times)


class Evaluated(pl.Callback):
    """After which steps."""

    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(pl_module.step)


@pytest.mark.parametrize("length", [{"steps": 25}, {}])
def test_they_are_due_there_across_epochs_and_after_a_stop(tmp_path, length):
    """10 steps an epoch; the run is of 25 or of 30 steps, and is stopped at 14."""
    ends = 25 if length else 30
    due = sorted(steps_of([0.1, 0.4, 0.6, 1.0], ends))

    def stop(trainer, module):
        module.stop_requested = True
        trainer.limit_val_batches = 0  # as Preemption does

    first, second = Evaluated(), Evaluated()
    times = OnlineEvaluation([0.1, 0.4, 0.6, 1.0])
    fit(tmp_path, vit(**length), callbacks=[first, At(13, stop)], evaluation=times)
    fit(tmp_path, vit(**length), callbacks=[second], evaluation=times, resume=last(tmp_path))
    assert (first.steps, second.steps) == ([s for s in due if s <= 14], [s for s in due if s > 14])
