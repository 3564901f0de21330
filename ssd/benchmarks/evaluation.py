"""The probes of cached features, ours beside the usual way to the same numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.benchmarks.paired import Pair, compare
from ssd.evaluation.heads import Heads
from ssd.evaluation.knn import knn_predict, unit_vectors
from ssd.evaluation.linear import RATES, train_heads
from ssd.evaluation.logistic import fit_logistic
from ssd.evaluation.ridge import ridge_predict
from ssd.evaluation.scaling import principal_axes, standardise

TEMPERATURE = 0.07
USUAL_BATCH = 512
L2, TOLERANCE = 1.0, 1e-4  # scikit-learn's defaults


@dataclass(frozen=True)
class Sizes:
    """What is probed: the published sizes of a small ViT's features, fewer for tests."""

    bank: int = 50_000
    queries: int = 10_000
    train: int = 10_000
    width: int = 384
    k: int = 200
    epochs: int = 5


Rows = tuple[list[Pair], list[dict[str, Any]]]


def clouds(count: int, width: int, classes: int, seed: int, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """Classes that overlap, in features whose covariance falls as 1 / i^decay along directions that no dimension shares.

    (N, D) and (N,); the classes are the same for every seed.
    """
    shared = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** (-decay / 2)
    turned = torch.linalg.qr(torch.randn(width, width, generator=shared))[0]
    centres = torch.randn(classes, width, generator=shared)
    own = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(classes, (count,), generator=own)
    return (0.12 * centres[labels] + torch.randn(count, width, generator=own)) * scale @ turned, labels


def compare_knn(sizes: Sizes, rounds: int, clock: Callable[[], float], classes: int = 100) -> Rows:
    """k-NN beside lightly's `knn_predict`, in float32 and batches of 512 queries, with the same unit vectors and votes."""
    from lightly.utils.benchmarking import knn_predict as lightlys

    (bank, labels), (queries, _) = (
        clouds(count, sizes.width, classes, seed) for seed, count in enumerate((sizes.bank, sizes.queries))
    )
    answers: dict[str, Tensor] = {}

    def ours() -> None:
        answers["ours"] = knn_predict(bank, labels, queries, (sizes.k,), TEMPERATURE, classes)[sizes.k]

    def theirs() -> None:
        units, asked = unit_vectors(bank, queries, center=False)
        parts = [lightlys(part, units.T, labels, classes, sizes.k, TEMPERATURE) for part in asked.split(USUAL_BATCH)]
        answers["lightly"] = torch.cat(parts)[:, 0]

    case = f"k-NN, {sizes.queries:,} queries against {sizes.bank:,} x {sizes.width}, k {sizes.k}"
    pair = compare(case, ours, theirs, count=sizes.queries, rounds=rounds, unit="queries/s", clock=clock)
    same = float((answers["ours"] == answers["lightly"]).double().mean())
    return [pair], [fact("k-NN, share of equal answers", same, 1.0)]


def compare_grid(sizes: Sizes, rounds: int, clock: Callable[[], float], classes: int) -> Rows:
    """13 learning rates as one product beside 13 layers in a loop over the same batches, as DINOv2's code has them."""
    train, labels, test, truth = standardised(sizes, classes)
    steps = sizes.epochs * (sizes.train // 256)
    best: dict[str, float] = {}

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(-1) == truth).double().mean())

    def ours() -> None:
        heads = train_heads(train, labels, RATES, classes, epochs=sizes.epochs, min_steps=1)
        best["ours"] = max(accuracy(each) for each in heads.logits(test))

    def theirs() -> None:
        layers = train_layers(train, labels, classes, steps)
        with torch.no_grad():
            best["loop"] = max(accuracy(layer(test)) for layer in layers)

    name = f"13 rates, {sizes.train:,} x {sizes.width}, {classes} classes"
    pair = compare(
        name, ours, theirs, count=steps, rounds=rounds, unit="steps/s", against="a loop of layers", clock=clock
    )
    return [pair], [fact(f"best of {name}, top1", best["ours"], best["loop"])]


def train_layers(train: Tensor, labels: Tensor, classes: int, steps: int, batch_size: int = 256) -> list[nn.Linear]:
    layers = [nn.Linear(train.shape[1], classes) for _ in RATES]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, RATES, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, done = torch.Generator().manual_seed(0), 0
    while done < steps:
        order = torch.randperm(len(train), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size)[: steps - done]:
            batch, truth = train[rows], labels[rows]
            loss = torch.stack([F.cross_entropy(layer(batch), truth) for layer in layers]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    return layers


def compare_logistic(sizes: Sizes, rounds: int, clock: Callable[[], float], decay: float, classes: int = 10) -> Rows:
    """Logistic regression beside scikit-learn's at the same penalty and tolerance, on standardised features."""
    from sklearn.linear_model import LogisticRegression

    train, labels, test, truth = standardised(sizes, classes, decay)
    found: dict[str, float] = {}

    def ours() -> None:
        basis, _ = principal_axes(train)
        heads = fit_logistic(train @ basis, labels, torch.tensor([L2]), classes, tolerance=TOLERANCE)
        heads = Heads(basis @ heads.weight, heads.bias)
        found["ours"] = float((heads.logits(test)[0].argmax(1) == truth).double().mean())

    def theirs() -> None:
        model = LogisticRegression(C=1 / L2, tol=TOLERANCE, max_iter=1000)
        found["scikit-learn"] = model.fit(train.numpy(), labels.numpy()).score(test.numpy(), truth.numpy())

    name = f"logistic regression, {sizes.train:,} x {sizes.width}, spectrum i^-{decay:g}"
    pair = compare(
        name, ours, theirs, count=sizes.train, rounds=rounds, unit="samples/s", against="scikit-learn", clock=clock
    )
    return [pair], [fact(f"{name}, top1", found["ours"], found["scikit-learn"])]


def standardised(sizes: Sizes, classes: int, decay: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (train, labels), (test, truth) = (
        clouds(count, sizes.width, classes, seed, decay) for seed, count in enumerate((sizes.train, sizes.train // 5))
    )
    train, test = standardise(train, test)
    return train, labels, test, truth


def fact(case: str, ours: float, baseline: float | None, unit: str = "share") -> dict[str, Any]:
    return {"case": case, "ours": ours, "baseline": baseline, "ratio": None, "low": None, "high": None, "unit": unit}


PARTS = {
    "knn": "weighted k-NN, beside lightly's",
    "grid": "the linear probe's learning rates, beside a layer for each",
    "logistic": "logistic regression, beside scikit-learn's",
}


def measure(part: str, sizes: Sizes, rounds: int, clock: Callable[[], float]) -> Rows:
    """The comparisons of one of PARTS, and what both sides answered."""
    if part == "knn":
        return compare_knn(sizes, rounds, clock)
    if part == "grid":
        found = [compare_grid(sizes, rounds, clock, classes) for classes in (10, 100)]
    else:
        found = [compare_logistic(sizes, rounds, clock, decay) for decay in (1.0, 2.0)]
    return [pair for pairs, _ in found for pair in pairs], [row for _, rows in found for row in rows]


def measure_on_gpu(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Seconds that each probe takes on the device, of the whole bank."""
    (bank, labels), (queries, _) = (
        clouds(count, sizes.width, 100, seed) for seed, count in enumerate((sizes.bank, sizes.queries))
    )
    bank, labels, queries = bank.cuda(), labels.cuda(), queries.cuda()
    (train,) = standardise(bank)

    def logistic() -> None:
        fit_logistic(train @ principal_axes(train)[0], labels, torch.tensor([L2]), 100, tolerance=TOLERANCE)

    work: dict[str, Callable[[], Any]] = {
        f"k-NN, k {sizes.k}": lambda: knn_predict(bank, labels, queries, (sizes.k,), TEMPERATURE, 100),
        "linear probe, 13 rates": lambda: train_heads(train, labels, RATES, 100),
        "logistic regression": logistic,
        "ridge": lambda: ridge_predict(bank, labels, queries),
    }
    rows = []
    for name, run in work.items():
        run()
        times = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        size = f"{sizes.bank:,} x {sizes.width}, 100 classes"
        rows.append(fact(f"{name}, {size}, on the device", sorted(times)[len(times) // 2], None, "s"))
    return rows
