"""The attentive probe: a learned query looks over all patches, and a linear layer reads what it saw.

Cross-attention of one learned query with several heads over frozen patch tokens, with key and value projections and
without an MLP behind it, as in El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models" (AIM), 2024,
arXiv 2401.08541; Bardes et al. (V-JEPA), 2024, add an MLP and a residual. Departs from AIM: tokens are standardised by
the training set's statistics, which is its batch normalisation once the statistics stand still. A query never changes
with the sample, so that its product with the key projection is one vector a head, and the values of what a head looks at are
those of the mean token it sees: the same function, without projecting every token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from ssd.data.randomness import generator
from ssd.errors import UserError
from ssd.evaluation.heads import Fit
from ssd.evaluation.patches import in_parts, scaling
from ssd.evaluation.protocol import Number, accuracy_number, check_labels, count_classes, top1
from ssd.evaluation.splits import held_out

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HEADS = 12
WEIGHT_DECAY = 0.01
ORDER, START = 7, 8
"""Keys of the order of training and of the first weights."""


@dataclass
class AttentiveHeads:
    """G probes of H heads over D dimensions into C classes, which differ in the rate they were trained at.

    Args:
        query: (G, H, E) with E = D / H, one for all samples.
        key: (G, H, D, E).
        value: (G, H, D, E).
        weight: (G, H E, C).
        bias: (G, C).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.query, self.key, self.value, self.weight, self.bias]

    def logits(self, tokens: Tensor) -> Tensor:
        """Standardised tokens (B, P, D) -> (G, B, C)."""
        groups, heads, each = self.query.shape
        looks_for = torch.einsum("ghe,ghde->dgh", self.query, self.key).flatten(1) / math.sqrt(each)  # (D, G H)
        attention = (tokens @ looks_for).softmax(1)  # over the patches
        seen = (attention.mT @ tokens).unflatten(1, (groups, heads))  # (B, G, H, D): each head's mean token
        values = torch.einsum("bghd,ghde->gbhe", seen, self.value).flatten(2)
        return values @ self.weight + self.bias[:, None]


def attentive_numbers(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> list[Number]:
    """Top-1 accuracy. Patch tokens (N, P, D) and (Q, P, D), labels (N,) and (Q,); `training` is that of `train_attentive`."""
    check_labels("the attentive probe", training=train_labels, test=test_labels)
    classes = count_classes(train_labels, test_labels)
    fit = attentive_predict(train, train_labels, test, classes, seed=seed, progress=progress, **training)
    heads = heads_for(train.shape[2])
    protocol = (
        f"attentive-v1 one query, {heads} heads, {train.shape[1]} patches, best of {len(RATES)} rates on 10% of train: "
        f"{fit.setting:g}"
    )
    return [accuracy_number("attentive/top1", top1(fit.predictions, test_labels, classes), protocol, test_labels)]


def attentive_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int | None = None,
    rates: Sequence[float] = RATES,
    held_out_share: float = 0.1,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> Fit:
    """Classes of the test samples by the probe whose rate was best on the held-out part, then trained on all.

    Patch tokens (N, P, D) and (Q, P, D) in 16 or 32 bits, which may lie in a file; labels (N,). Ties go to the smaller
    rate. A single rate needs no held-out part. `training` is passed to `train_attentive`.
    """
    check_labels("the attentive probe", train=labels)
    for name, features in (("train", train), ("test", test)):
        for _, part in in_parts(features):
            if not part.isfinite().all():
                raise UserError(f"patch features of the {name} samples are NaN or infinite. Probe another checkpoint.")
    num_classes = num_classes or count_classes(labels)
    mean, factor = scaling(train)
    rates = sorted(rates)

    def trained(rows: Tensor, rates: Sequence[float], text: str) -> AttentiveHeads:
        bar = text if progress else None
        return train_attentive(
            train, labels, rows, rates, num_classes, mean, factor, seed=seed, progress=bar, **training
        )

    def answers(heads: AttentiveHeads, features: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [heads.logits((part - mean) * factor).argmax(2) for _, part in in_parts(features)]
        return torch.cat(parts, 1)  # (G, N)

    if len(rates) > 1:
        fit, held = held_out(labels, held_out_share, seed)
        heads = trained(fit, rates, f"{len(rates)} attentive probes")
        correct = (answers(heads, train[held]) == labels[held]).sum(1)
        rates = [rates[int(correct.argmax())]]
    heads = trained(torch.arange(len(train)), rates, "attentive probe")
    return Fit(answers(heads, test)[0], rates[0])


def train_attentive(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    rates: Sequence[float],
    num_classes: int,
    mean: Tensor,
    factor: Tensor,
    heads: int | None = None,
    epochs: int = 10,
    min_steps: int = 500,
    batch_size: int = 128,
    weight_decay: float = WEIGHT_DECAY,
    seed: int = 0,
    progress: str | None = None,
) -> AttentiveHeads:
    """One probe for each learning rate, from the same weights, all seeing the same batches. -> G = len(rates)

    AdamW, the rate falling to zero along half a cosine. Small sets go through more epochs than asked for, until there
    were `min_steps` steps.
    """
    if min(rates, default=0) <= 0:
        raise UserError(f"learning rates {list(rates)} of the attentive probe: give at least one, all above 0.")
    number = len(rows)
    batch_size = min(batch_size, number)
    steps_per_epoch = number // batch_size
    epochs = max(epochs, math.ceil(min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    probes = [first_weights(features.shape[2], num_classes, heads or heads_for(features.shape[2]), seed) for _ in rates]
    for probe in probes:
        for tensor in probe.tensors():
            tensor.requires_grad_()
    groups = [{"params": probe.tensors(), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
    with torch.enable_grad(), Progress(disable=progress is None, transient=True) as bar:
        optimiser = torch.optim.AdamW(groups, weight_decay=weight_decay)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
        task = bar.add_task(progress or "", total=total)
        for epoch in range(epochs):
            order = rows[torch.from_numpy(generator(ORDER, seed, epoch).permutation(number))]
            for some in order.split(batch_size)[:steps_per_epoch]:
                some = some.sort().values  # in order, for a file's sake
                logits = together(probes).logits((features[some].float() - mean) * factor)
                # probes share nothing but the batch, so that the sum's gradient is that of each
                loss = F.cross_entropy(logits.flatten(0, 1), labels[some].repeat(len(rates))) * len(rates)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                falling.step()
                bar.advance(task)
    return AttentiveHeads(*(tensor.detach() for tensor in together(probes).tensors()))


def first_weights(width: int, num_classes: int, heads: int, seed: int) -> AttentiveHeads:
    """One probe that looks at all patches nearly alike and answers every class alike. Raises UserError where heads do not
    divide the width."""
    if width % heads:
        raise UserError(f"{heads} heads of the attentive probe do not divide features of {width} dimensions.")
    each = width // heads
    numbers = generator(START, seed, width, heads)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(numbers.standard_normal((1, *shape)).astype("float32"))

    scale = 1 / math.sqrt(width)
    return AttentiveHeads(
        query=0.02 * normal(heads, each),
        key=scale * normal(heads, width, each),
        value=scale * normal(heads, width, each),
        weight=torch.zeros(1, width, num_classes),
        bias=torch.zeros(1, num_classes),
    )


def together(probes: Sequence[AttentiveHeads]) -> AttentiveHeads:
    """Probes of one group each as one of as many groups."""
    return AttentiveHeads(*(torch.cat(tensors) for tensors in zip(*(probe.tensors() for probe in probes), strict=True)))


def heads_for(width: int) -> int:
    """The largest number of heads up to `HEADS` that divides the width."""
    return next(heads for heads in range(HEADS, 0, -1) if width % heads == 0)
