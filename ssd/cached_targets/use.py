"""Stored targets in a run: checked before its first step, read by the loader's workers, and filled for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd.batch import Batch
from ssd.cached_targets.folder import TargetFolder
from ssd.cached_targets.forms import Form
from ssd.cached_targets.identity import check_storable, identity_of
from ssd.errors import UserError
from ssd.step import Step

ASKED_AGAIN = 2  # samples
MOST_APART = 0.05
"""Relative distance of stored from computed answers: half precision of the teacher makes .01, another view about 1."""


@dataclass(frozen=True)
class WithTargets:
    """A collate function whose batches come with what is stored of them."""

    collate: Callable[[Any], Batch]
    folder: TargetFolder

    def __call__(self, samples: Any) -> Batch:
        return self.folder.attach(self.collate(samples))


def check_targets(module: Step, data: Any) -> None:
    """Raises UserError where the targets of a run are not those of its teacher, views and data, or are not all there."""
    if data is None or getattr(data, "targets", None) is None:
        raise UserError(
            "cached_targets needs data of this project's own (a datamodule), which reads them. Leave it out."
        )
    folder: TargetFolder = data.targets
    check_storable(module, data)
    found = folder.differences(identity_of(module, data))
    if found:
        raise UserError(
            f"cached_targets {folder.path} were made otherwise: {'; '.join(found)}. Set back what differs, or make others with "
            "ssd cache."
        )
    folder.check_whole()
    ask_again(module, data, folder)


def ask_again(module: Step, data: Any, folder: TargetFolder) -> None:
    """The teacher's answers to a few samples, beside what is stored of them: what no record tells. Raises UserError where they
    are far apart."""
    looks = [(0, index) for index in range(min(ASKED_AGAIN, len(data.source)))]
    seen = data.on_after_batch_transfer(data.batch_of_looks(looks), 0)
    if not all(map(folder.holds, seen.index.tolist())):
        return
    here = answers_of(module, seen, data.seed, Form(**folder.form))
    there = folder.read(seen.index.tolist(), seen.variant.tolist())
    for name, value in there.items():
        apart = relative_distance(torch.from_numpy(here[name]).transpose(0, 1), value)
        if value.is_floating_point() and not apart <= MOST_APART:
            raise UserError(
                f"cached_targets {folder.path} were made otherwise: what the teacher says of the first samples ({name}) is "
                f"{apart:.2f} of its length away from what is stored. Make others with ssd cache."
            )


def answers_of(module: Step, batch: Batch, seed: int, form: Form) -> dict[str, np.ndarray]:
    """What is stored of a batch of fixed looks: name -> (B, V, ...)"""
    assert batch.variant is not None, "looks are fixed"
    looks = [(seed, *look) for look in zip(batch.variant.tolist(), batch.index.tolist(), strict=True)]
    with torch.no_grad():
        return form.stored(module.teach(batch), module.stored_in_part, looks)


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|"""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))
