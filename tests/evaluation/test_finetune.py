"""Fine-tuning of a tiny network on tensors: where it begins, what it may see, and that a stop changes nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers
from torch import Tensor

from ssd.backbones.base import Backbone
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.evaluation.finetune import (
    LEAST_HELD_OUT,
    LEAST_STEPS,
    Classifier,
    Labelled,
    Recipe,
    begin_linear,
    best_of,
    finetune,
    parts,
)
from ssd.evaluation.logistic import logistic_predict

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
CPU = torch.device("cpu")


def fresh(drop_path: float = 0.0) -> Backbone:
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        return ViT("vit_tiny_patch16_224", img_size=8, in_chans=1, drop_path_rate=drop_path, arguments=VIT)


class Pictures:
    """Pictures of two classes, darker and lighter ones, that note who is looked at."""

    def __init__(self, count: int = 40):
        chance = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 2
        self.pictures = torch.randn(count, 1, 8, 8, generator=chance) + 1.5 * self.labels[:, None, None, None]
        self.trained: list[int] = []
        self.looked_at: list[int] = []

    def views(self, rows: np.ndarray, batch_size: int, seed: int, steps_done: Any) -> Any:
        return Steps(self, rows, batch_size, seed, steps_done)

    def looks(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        self.looked_at += rows.tolist()
        place = torch.arange(len(rows))
        return [{"sample": self.pictures[rows], "label": self.labels[rows], "index": place}]

    @property
    def data(self) -> Labelled:
        return Labelled(self.labels, 2, self.views, self.looks)


class Steps:
    """The steps of an epoch, in an order that follows from (seed, epoch)."""

    def __init__(self, of: Pictures, rows: np.ndarray, batch_size: int, seed: int, steps_done: Any):
        self.of, self.rows, self.size, self.seed, self.steps_done = of, rows, batch_size, seed, steps_done

    def __iter__(self):
        steps = len(self.rows) // self.size
        order = np.random.default_rng([self.seed, self.steps_done() // steps]).permutation(self.rows)
        for step in range(steps):
            rows = order[step * self.size : (step + 1) * self.size]
            self.of.trained += rows.tolist()
            pictures = self.of.pictures[rows][None].clone()
            yield Batch({"global": pictures}, torch.from_numpy(rows), len(rows), self.of.labels[rows])


ALL = np.arange(40)
QUICK = Recipe(epochs=4, batch_size=8, lr=3e-3)


@given(samples=integers(2, 3000), batch=integers(2, 256), mixes=booleans())
def test_steps_of_an_epoch_are_of_equal_size_and_leave_out_less_than_one_each(samples, batch, mixes):
    recipe = Recipe(batch_size=batch, mixup=0.8 if mixes else 0.0)
    epochs, steps, size = recipe.length(samples)
    assert 2 <= size <= batch and steps * size <= samples < (steps + 1) * size
    assert epochs * steps >= LEAST_STEPS and epochs >= 30
    assert not (mixes and size % 2), "pictures are mixed in pairs"


def test_the_head_begins_where_logistic_regression_on_frozen_features_ends():
    pictures = Pictures(60)
    network = Classifier(fresh(), 2)
    fit, rest = np.arange(40), np.arange(40, 60)
    begin_linear(network, pictures.looks(fit), CPU, "32-true")
    with torch.no_grad():
        features = network.backbone.eval()(pictures.pictures).pooled()
        logits = network(pictures.pictures[40:])
    expected = logistic_predict(features[fit], pictures.labels[fit], features[rest], l2=1.0)
    assert torch.equal(logits.argmax(1), expected.predictions)
    # the probabilities sum to what the labels do: the bias, which has no penalty, is at its optimum
    with torch.no_grad():
        probs = network(pictures.pictures[fit]).softmax(1)
    assert probs.sum(0).tolist() == pytest.approx([20, 20], abs=1e-2)


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    """Drop path, mixing and averaging are random or have memory, and every weight is equal to the bit."""
    recipe = Recipe(epochs=5, batch_size=8, drop_path=0.3, mixup=0.5, cutmix=0.5, ema=0.9, lr=3e-3)
    whole = finetune(fresh, Pictures().data, ALL, recipe, seed=3)

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    saved = tmp_path / "training"
    with pytest.raises(KeyboardInterrupt):
        finetune(fresh, Pictures().data, ALL, recipe, seed=3, after_epoch=stop, saved=saved)
    pictures = Pictures()
    again = finetune(fresh, pictures.data, ALL, recipe, seed=3, saved=saved)
    assert len(pictures.trained) == 3 * 40, "two epochs were done"
    assert again.curve == whole.curve
    for (name, ours), theirs in zip(again.network.state_dict().items(), whole.network.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_refitting_goes_on_too(tmp_path):
    pictures, rows = Pictures(600), np.arange(600)
    recipe = Recipe(epochs=2, batch_size=100, refit=True)
    whole = finetune(fresh, pictures.data, rows, recipe)
    seen: list[int] = []

    def stop(row: dict[str, float]) -> None:
        seen.append(int(row["epoch"]))
        if len(seen) == 3:  # the first epoch of the second training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(fresh, pictures.data, rows, recipe, after_epoch=stop, saved=tmp_path / "training")
    pictures.trained.clear()
    again = finetune(fresh, pictures.data, rows, recipe, saved=tmp_path / "training")
    assert len(pictures.trained) <= 1200, "the training that chose the epoch was not repeated"
    assert again.protocol == whole.protocol and "trained again on all" in again.protocol
    assert all(
        torch.equal(a, b) for a, b in zip(again.network.state_dict().values(), whole.network.state_dict().values())
    )


def test_the_epoch_is_chosen_on_held_out_labels_that_nothing_was_fitted_on():
    pictures, rows = Pictures(700), np.arange(50, 650)
    found = finetune(fresh, pictures.data, rows, Recipe(epochs=2, batch_size=100))
    fitted, held = parts(pictures.labels, rows, 0.1, seed=0)
    assert len(held) == 60 and set(fitted) | set(held) == set(rows) and not set(fitted) & set(held)
    assert set(pictures.trained) <= set(fitted)
    assert set(pictures.looked_at) == set(rows), "and nothing but them is looked at"
    assert found.epoch == best_of(found.curve)["epoch"] and "held-out labels" in found.protocol


def test_of_equal_epochs_the_last_is_chosen_and_the_weights_are_its():
    curve = [{"epoch": n, "held_out_top1": top1} for n, top1 in enumerate((0.5, 0.9, 0.8, 0.9, 0.7), 1)]
    assert best_of(curve)["epoch"] == 4


def test_too_few_labels_choose_nothing_and_the_last_epoch_counts():
    enough = LEAST_HELD_OUT * 10
    labels = torch.arange(enough) % 2
    assert parts(labels, np.arange(enough), 0.1, 0)[1] is not None
    assert parts(labels, np.arange(enough - 10), 0.1, 0)[1] is None
    found = finetune(fresh, Pictures().data, ALL, QUICK)
    assert found.epoch == 4 and "the last of 4 epochs" in found.protocol and "held_out_top1" not in found.curve[0]


def test_it_learns_and_leaves_the_random_numbers_of_others_alone():
    pictures = Pictures()
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = finetune(fresh, pictures.data, ALL, Recipe(epochs=15, batch_size=8, lr=3e-3, head="zero", mixup=0.2))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    with torch.no_grad():
        assert (found.network(pictures.pictures).argmax(1) == pictures.labels).float().mean() > 0.9
    assert found.curve[0]["loss"] == pytest.approx(np.log(2), abs=0.1), "a head of zeros knows nothing"


def test_the_seed_decides_the_order_and_nothing_else_does():
    curves = [finetune(fresh, Pictures().data, ALL, QUICK, seed=seed).curve for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_a_training_that_diverges_says_so():
    with pytest.raises(UserError, match=r"diverged. Use a smaller --lr than 1e\+30"):
        finetune(fresh, Pictures().data, ALL, Recipe(epochs=3, batch_size=8, lr=1e30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "--lr is 0.0. Give a number above 0"),
        ({"layer_decay": 1.5}, "--layer-decay is 1.5. Give a number above 0 and at most 1"),
        ({"batch_size": 1}, "--batch-size is 1. Give 2 or more"),
        ({"epochs": 0}, "--epochs is 0. Give 1 or more"),
        ({"held_out": 1.0}, "--held-out is 1.0. Give a number from 0 to below 1"),
        ({"mixup": -1.0}, "--mixup is -1.0. Give 0 or more"),
        ({"head": "mlp"}, "--head is mlp. Give one of linear, zero"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings)


def test_from_random_weights_no_layer_is_held_back_and_no_probe_is_asked():
    learned, random = Recipe().settled(learned=True), Recipe().settled(learned=False)
    assert (learned.lr, learned.layer_decay, learned.head) == (1e-4, 0.75, "linear")
    assert (random.lr, random.layer_decay, random.head) == (1e-3, 1.0, "zero")
    given = Recipe(lr=0.1, layer_decay=0.5, head="zero")
    assert given.settled(learned=True) == given.settled(learned=False) == given
