"""Image retrieval: does ranking all other samples by similarity bring those of a sample's class to the front?

Mean average precision over the whole ranking, and how often and how many of the first few are right. Exact, by cosine
similarity; a query is never compared with itself.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.protocol import Number, check_finite, check_labels

SCORES_AT_ONCE = 2**24
"""Similarities held at a time: 64 MiB."""


def average_precisions(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    first: Sequence[int] = (1, 5, 10),
) -> tuple[Tensor, Tensor]:
    """Average precision of each query's ranking (Q,), and how many of its `first` are of its class (Q, len(first)).

    (Q, D), (Q,) against the bank (N, D), (N,), or without a bank against the other queries. Both float64, NaN for a
    query whose class nothing else has. Samples that are exactly as similar share a threshold, as in scikit-learn's
    average precision; among the first, they count behind those of other classes, so that equal features win nothing.
    """
    among_themselves = bank is None
    if bank is None or bank_labels is None:
        bank, bank_labels = queries, query_labels
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    precision = torch.full((len(queries),), float("nan"), dtype=torch.float64, device=queries.device)
    found = torch.full((len(queries), len(first)), float("nan"), dtype=torch.float64, device=queries.device)
    wanted = torch.tensor(first, device=queries.device)
    for label in query_labels.unique().tolist():
        # all queries of a class are asked for the same samples, so that their rankings form one table
        asking = (query_labels == label).nonzero().squeeze(1)
        same = bank_labels == label
        relevant, others = same.nonzero().squeeze(1), (~same).nonzero().squeeze(1)
        count = len(relevant) - int(among_themselves)
        if count < 1:
            continue
        for rows in torch.arange(len(asking)).split(max(1, SCORES_AT_ONCE // len(bank))):
            scores = queries[asking[rows]] @ bank.T  # one product: equal features round alike
            right, wrong = scores[:, relevant], scores[:, others]
            if among_themselves:
                right[torch.arange(len(rows)), rows] = -torch.inf  # the query itself comes last, and is cut off
            right, wrong = ascending(-right)[:, :count].contiguous(), ascending(-wrong)  # the most similar first
            before = torch.searchsorted(wrong, right, right=True)  # others at least as similar, (q, R)
            place = torch.arange(1, count + 1, device=right.device)
            as_similar = torch.searchsorted(right, right, right=True)  # of the class, at least as similar
            precision[asking[rows]] = (as_similar / (as_similar + before).double()).mean(1)
            found[asking[rows]] = ((before + place)[..., None] <= wanted).sum(1).double()
    return precision, found


def ascending(values: Tensor) -> Tensor:
    """Each row sorted. NumPy's sort of plain floats uses vector instructions: 15 times as fast as torch's on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


def retrieval_numbers(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    seed: int = 0,
    among: str = "test",
    recalls: Sequence[int] = (1, 5),
    precisions: Sequence[int] = (10,),
) -> list[Number]:
    """mAP, recall@k (a sample of the class among the first k) and precision@k (their share), as means over queries.

    (N, D), (N,), (Q, D), (Q,). Each test sample is a query, against all other test samples, or with `among` "train"
    against the training samples. Queries whose class nothing else has are left out, and the protocol says how many.
    Numbers of samples above those that are ranked are left out too. Chance is what a random order gives on average.
    Nothing is drawn: `seed` is not used.
    """
    if among not in ("test", "train"):
        raise UserError(f"among = '{among}' is unknown; retrieval is among 'test' or 'train' samples.")
    check_labels("retrieval", training=train_labels, test=test_labels)
    check_finite(train=train, test=test)
    alone = among == "test"
    bank_labels = test_labels if alone else train_labels
    ranked = len(bank_labels) - int(alone)
    first = sorted({k for k in (*recalls, *precisions) if k <= ranked})
    bank, of_bank = (None, None) if alone else (train, train_labels)
    precision, found = average_precisions(test, test_labels, bank, of_bank, first)
    asked = ~precision.isnan()
    if not asked.any():
        raise UserError(f"retrieval among {among} samples needs a class with two samples or more. Give more samples.")
    sizes = bank_labels.bincount(minlength=int(test_labels.max()) + 1)[test_labels[asked]] - int(alone)  # relevant
    missing = int((~asked).sum())
    against = f"{ranked} others" if alone else f"{ranked} training samples"
    left = f", {missing} without another left out" if missing else ""
    protocol = f"retrieval-v1 cosine, each test sample among {against}{left}"
    numbers = [
        Number("retrieval/map", float(precision[asked].mean()), protocol, float(chance_precision(sizes, ranked).mean()))
    ]
    for k in (k for k in recalls if k in first):
        hit = float((found[asked, first.index(k)] > 0).double().mean())
        numbers.append(Number(f"retrieval/recall{k}", hit, protocol, float(chance_hit(sizes, ranked, k).mean())))
    for k in (k for k in precisions if k in first):
        share = float(found[asked, first.index(k)].mean()) / k
        numbers.append(Number(f"retrieval/precision{k}", share, protocol, float(sizes.double().mean()) / ranked))
    return numbers


def chance_precision(relevant: Tensor, ranked: int) -> Tensor:
    """The average precision that a random order of `ranked` samples has on average, for each count of relevant ones.

    At each place the sample is relevant with probability R / N, and then each place before with (R - 1) / (N - 1).
    """
    harmonic = float((1 / torch.arange(1, ranked + 1, dtype=torch.float64)).sum())
    other = (relevant.double() - 1) / max(ranked - 1, 1)
    return (harmonic + other * (ranked - harmonic)) / ranked


def chance_hit(relevant: Tensor, ranked: int, k: int) -> Tensor:
    """How likely a random choice of k of `ranked` samples has one of the relevant ones: 1 - C(N - R, k) / C(N, k)."""
    missed = torch.ones(relevant.shape, dtype=torch.float64, device=relevant.device)
    for taken in range(k):
        missed *= (ranked - relevant.double() - taken).clamp_min(0) / (ranked - taken)
    return 1 - missed
