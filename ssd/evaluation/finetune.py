"""Fine-tuning: a backbone and a linear head trained together on labels, the way pretraining is used afterwards.

AdamW with layer-wise learning rates, a warm-up and a cosine (Clark et al. 2020; Bao et al., BEiT, ICLR 2022), a head that
may begin where a linear probe ends (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022). Which epoch counts is decided on a held-out part of the training labels.

All randomness of an epoch follows from (seed, epoch), so that a training that is taken up again goes on as if it had
never stopped.
"""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssd.backbones.base import Backbone
from ssd.batch import Batch
from ssd.data.randomness import key
from ssd.errors import UserError
from ssd.evaluation.features import AUTOCAST, extract
from ssd.evaluation.logistic import fit_logistic
from ssd.evaluation.scaling import principal_axes, standardise
from ssd.evaluation.splits import held_out
from ssd.optim import AdamW, parameter_groups
from ssd.schedules import Cosine, value_at
from ssd.weights.checkpoint import read_file

HEADS = ("linear", "zero")
EPOCHS, LEAST_STEPS = 30, 400
LEAST_HELD_OUT = 50
"""Fewer samples than this say more about themselves than about the epochs that they should choose between."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on labels.

    Args:
        epochs: null = 30, or as many as make 400 steps.
        batch_size: at most so many samples a step; steps of an epoch are of equal size.
        lr: of the head at its peak; what lies below it learns at `layer_decay` of that, block after block; null = 1e-4, and
            1e-3 for random weights.
        warmup: share of the steps in which the learning rate rises.
        layer_decay: in (0, 1]; 1 = the same rate everywhere; null = 0.75, and 1 for random weights.
        weight_decay: of all but biases and vectors.
        drop_path: share of samples whose residual branch is skipped in the last block.
        mixup, cutmix: parameter of the beta distribution that pictures are mixed by; 0 = not. Clips know mixup alone, sounds
            neither.
        label_smoothing: share of a label that is spread over all classes.
        ema: momentum of the average of the weights that is judged in place of the weights; 0 = none.
        head: "linear" begins with logistic regression on the frozen features, "zero" with zeros; null = linear, and zero on
            random weights.
        held_out: share of the labels that chooses the epoch; 0, or too few of them = the last epoch.
        refit: train again on all labels up to the epoch that was chosen.
        precision: "32-true" or "bf16-mixed".
    """

    epochs: int | None = None
    batch_size: int = 64
    lr: float | None = None
    warmup: float = 0.1
    layer_decay: float | None = None
    weight_decay: float = 0.05
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    head: str | None = None
    held_out: float = 0.1
    refit: bool = False
    precision: str = "32-true"

    def __post_init__(self):
        shares = ("warmup", "weight_decay", "drop_path", "label_smoothing", "ema", "held_out")
        for name in shares:
            check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        for name in ("mixup", "cutmix"):
            check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        for name, most in (("lr", math.inf), ("layer_decay", 1.0)):
            value = getattr(self, name)
            expected = "a number above 0" + ("" if math.isinf(most) else " and at most 1")
            check(name, value, value is None or (0 < value <= most and math.isfinite(value)), expected)
        check("batch_size", self.batch_size, self.batch_size >= 2, "2 or more")
        check("epochs", self.epochs, self.epochs is None or self.epochs >= 1, "1 or more")
        check("head", self.head, self.head in (None, *HEADS), f"one of {', '.join(HEADS)}")
        check("precision", self.precision, self.precision in ("32-true", "bf16-mixed"), "32-true or bf16-mixed")

    def length(self, samples: int) -> tuple[int, int, int]:
        """Epochs, steps of an epoch, and samples of a step, for so many labelled samples."""
        steps = math.ceil(samples / self.batch_size)
        batch = max(2, samples // steps)
        batch -= batch % 2 if self.mixes else 0  # samples are mixed in pairs
        steps = samples // batch
        return self.epochs or max(EPOCHS, math.ceil(LEAST_STEPS / steps)), steps, batch

    def settled(self, learned: bool) -> "Recipe":
        """What is null decided: for weights that have learned something, which lower layers should keep and a linear head
        can read, or for random ones, where both would be in the way."""
        lr, layer_decay, head = (1e-4, 0.75, "linear") if learned else (1e-3, 1.0, "zero")
        return replace(self, lr=self.lr or lr, layer_decay=self.layer_decay or layer_decay, head=self.head or head)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def check(name: str, value: Any, fine: bool, expected: str) -> None:
    if not fine:
        raise UserError(f"--{name.replace('_', '-')} is {value}. Give {expected}.")


class Classifier(nn.Module):
    """A backbone and a linear layer on its pooled features."""

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, samples: Any) -> Tensor:
        """What the backbone takes of B samples, pictures (B, C, H, W) for instance -> logits (B, num_classes)."""
        return self.head(self.backbone(samples).pooled())


@dataclass(frozen=True)
class Labelled:
    """Labelled samples to train on, by their places.

    Args:
        labels: (N,) class of each.
        num_classes: of these and of the test samples.
        views: (rows, batch size, seed, steps done) -> the augmented batches that are left of the epoch that the steps
            done lead to.
        looks: rows -> the evaluation look at them, batches of {"sample", "label", "index"}, index counting rows.
        finish: a batch that is on the device, with what was left to be done there.
    """

    labels: Tensor
    num_classes: int
    views: Callable[[np.ndarray, int, int, Callable[[], int]], Iterable[Batch]]
    looks: Callable[[np.ndarray], Iterable[Mapping[str, Tensor]]]
    finish: Callable[[Batch], Batch] = field(default=lambda batch: batch)


@dataclass(frozen=True)
class FineTuned:
    """What came of a training.

    Args:
        network: with the weights of the epoch that counts, on the CPU, in evaluation mode.
        epoch: the number of that epoch, from 1.
        curve: of each epoch its number, mean loss and, where labels were held out, `held_out_top1`.
        protocol: how it was made, in words.
    """

    network: Classifier
    epoch: int
    curve: list[dict[str, float]]
    protocol: str


def finetune(
    fresh: Callable[[float], Backbone],
    data: Labelled,
    rows: np.ndarray,
    recipe: Recipe,
    seed: int = 0,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    saved: Path | None = None,
    save: Callable[[], bool] = lambda: True,
) -> FineTuned:
    """Trains what `fresh` gives for a share of drop path on the labelled samples at `rows`.

    Args:
        after_epoch: told each row of the curve.
        saved: file that the training is taken up from where it is there, and written to after the last epoch and those
            for which `save` says so; null = none.
    """
    recipe = recipe.settled(learned=True)
    training = Training(fresh, data, recipe, seed, torch.device(device), saved, save)
    fitted, held = parts(data.labels, rows, recipe.held_out, seed)
    if held is None:
        epochs, _, _ = recipe.length(len(rows))
        network, curve = training.run("all", rows, epochs, epochs, None, after_epoch)
        return FineTuned(network, epochs, curve, protocol(recipe, f"the last of {epochs} epochs"))
    epochs, _, _ = recipe.length(len(fitted))
    network, curve = training.run("fit", fitted, epochs, epochs, held, after_epoch)
    epoch = int(best_of(curve)["epoch"])
    chosen = f"best of {epochs} epochs on {len(held)} held-out labels"
    if recipe.refit:
        network, _ = training.run("refit", rows, epochs, epoch, None, after_epoch)
        chosen += ", trained again on all"
    return FineTuned(network, epoch, curve, protocol(recipe, chosen))


def parts(labels: Tensor, rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows to fit on and rows that choose the epoch, None where too few could be held out."""
    if share == 0 or round(share * len(rows)) < LEAST_HELD_OUT:
        return rows, None
    fitted, held = held_out(labels[rows], share, seed)
    return rows[fitted.numpy()], rows[held.numpy()]


def best_of(curve: list[dict[str, float]]) -> dict[str, float]:
    """The row of the best epoch, of equals the last: later epochs moved less."""
    return max(curve, key=lambda row: (row["held_out_top1"], row["epoch"]))


def protocol(recipe: Recipe, chosen: str) -> str:
    """Name, version and what differs from one training to the next."""
    plain = asdict(Recipe())
    differs = [f"{name}={value:g}" for name, value in asdict(recipe).items() if tells(name, value, plain[name])]
    return ", ".join([f"finetune-v1 lr={recipe.lr:g}", *differs, f"{recipe.head} head", chosen])


def tells(name: str, value: Any, default: Any) -> bool:
    kept_elsewhere = ("epochs", "lr", "head", "refit", "precision")
    return name not in kept_elsewhere and value != default


class Training:
    """Trains one start on one choice of labels, in one stage or two, and keeps how far it has come."""

    def __init__(
        self,
        fresh: Callable[[float], Backbone],
        data: Labelled,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        saved: Path | None,
        save: Callable[[], bool],
    ):
        self.fresh, self.data, self.recipe, self.seed, self.device = fresh, data, recipe, seed, device
        self.saved, self.save = saved, save
        self.kept: dict[str, Any] = {} if saved is None or not saved.exists() else read_file(saved)

    def run(
        self,
        stage: str,
        rows: np.ndarray,
        epochs: int,
        until: int,
        held: np.ndarray | None,
        after_epoch: Callable[[dict[str, float]], None],
    ) -> tuple[Classifier, list[dict[str, float]]]:
        """Trains on `rows` with the schedule of so many epochs, `until` the end of one of them; the network of the best
        epoch on the `held` rows, or of the last, and the curve."""
        recipe, device = self.recipe, self.device
        _, steps, batch = recipe.length(len(rows))
        before = self.kept.get(stage)
        with own_randomness(self.seed, 0, device):
            network = Classifier(self.fresh(recipe.drop_path), self.data.num_classes).to(device)
        if before is None and recipe.head == "linear":
            begin_linear(network, self.data.looks(rows), device, recipe.precision)
        assert recipe.lr is not None and recipe.layer_decay is not None, "settled"
        optimizer = AdamW().build(parameter_groups(network, "bias_and_1d", recipe.layer_decay))
        average = averaged(network, recipe.ema)
        judged = network if average is None else average.module
        curve: list[dict[str, float]] = []
        best = copy.deepcopy(judged.state_dict())
        if before is not None:
            network.load_state_dict(before["network"])
            optimizer.load_state_dict(before["optimizer"])
            if average is not None:
                average.load_state_dict(before["average"])
            curve, best = before["curve"], before["best"]
        mix = None
        if recipe.mixes:
            smoothing, classes = recipe.label_smoothing, self.data.num_classes
            mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)
        rate = Cosine(recipe.lr, 0.0, warmup=recipe.warmup)
        done = len(curve) * steps

        views = self.data.views(rows, batch, self.seed, lambda: done)
        for epoch in range(len(curve) + 1, until + 1):
            total = torch.zeros((), device=device)
            network.train()
            with own_randomness(self.seed, epoch, device):
                for given in views:
                    schedule(optimizer, value_at(rate, done, epochs * steps, steps), recipe.weight_decay)
                    given = self.data.finish(given.to(device))
                    assert given.label is not None, "samples to train on have labels"
                    loss = self.loss(network, given.seen("global"), given.label, mix)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    if average is not None:
                        average.update_parameters(network)
                    total += loss.detach()
                    done += 1
            row: dict[str, float] = {"epoch": epoch, "loss": float(total) / steps}
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss is {row['loss']} in epoch {epoch}: the training has diverged. Use a smaller --lr than "
                    f"{recipe.lr:g}, or --precision 32-true."
                )
            if held is not None:
                row["held_out_top1"] = accuracy(judged, self.data.looks(held), device, recipe.precision)
            curve.append(row)
            last = epoch == until
            if last if held is None else best_of(curve) is row:
                best = copy.deepcopy(judged.state_dict())
            after_epoch(row)
            if self.saved is not None and (last or self.save()):
                state = {"curve": curve, "best": best, "network": network.state_dict()}
                state["optimizer"] = optimizer.state_dict()
                state |= {} if average is None else {"average": average.state_dict()}
                self.kept[stage] = state
                write_whole(self.kept, self.saved)
        network.load_state_dict(best)
        return network.cpu().eval(), curve

    def loss(self, network: Classifier, samples: Any, labels: Tensor, mix: Mixup | None) -> Tensor:
        """Mean cross-entropy of B samples and (B,), in nats; against mixed labels where samples are mixed."""
        targets = labels
        if mix is not None:
            samples, targets = mix(samples, labels)  # (B, num_classes)
        kind = AUTOCAST[self.recipe.precision]
        with torch.autocast(self.device.type, kind, enabled=kind is not None):
            logits = network(samples)
        smoothing = self.recipe.label_smoothing if mix is None else 0.0
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def averaged(network: Classifier, momentum: float) -> AveragedModel | None:
    if momentum == 0:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(momentum), use_buffers=True)


def schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["decays"]


@contextlib.contextmanager
def own_randomness(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Torch's and NumPy's global generators seeded by (seed, epoch) inside, and as they were afterwards."""
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    before = np.random.get_state()
    with torch.random.fork_rng(devices):
        torch.manual_seed(key(seed, epoch))
        np.random.seed(key(seed, epoch, 1) % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


def begin_linear(
    network: Classifier, looks: Iterable[Mapping[str, Tensor]], device: torch.device, precision: str, l2: float = 1.0
) -> None:
    """Sets the head to logistic regression on the frozen features, as few-label probes fit it."""
    found = extract(lambda samples: network.eval().backbone(samples).pooled(), looks, device, precision)
    width = found.features.shape[1]
    # what standardises the features is affine, and so is the head: known from the origin and the unit vectors
    corners = torch.cat([torch.zeros(1, width), torch.eye(width)])
    train, moved = standardise(found.features, corners)
    basis, _ = principal_axes(train)
    heads = fit_logistic(train @ basis, found.labels, torch.tensor([l2]), network.head.out_features)
    answers = heads.logits(moved @ basis)[0]  # (1 + D, C)
    with torch.no_grad():
        network.head.weight.copy_((answers[1:] - answers[0]).T)
        network.head.bias.copy_(answers[0])


def predict(
    network: nn.Module, looks: Iterable[Mapping[str, Tensor]], device: torch.device | str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Class (Q,) of each sample, its label and its place, in order of place."""
    found = extract(network, looks, device, precision)
    return found.features.argmax(1), found.labels, found.index


def accuracy(
    network: nn.Module, looks: Iterable[Mapping[str, Tensor]], device: torch.device | str, precision: str
) -> float:
    classes, labels, _ = predict(network, looks, device, precision)
    return float((classes == labels).double().mean())


def write_whole(content: Any, path: Path) -> None:
    """Beside the file first, then in its place: a stop in between harms neither."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)
