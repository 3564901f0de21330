"""What stored targets save: a step that reads them beside one that runs the teacher, and what they take on disk."""

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.benchmarks.masked import Case
from ssd.benchmarks.paired import Pair
from ssd.cached_targets.folder import Layout, ShardWriter, TargetFolder
from ssd.cached_targets.forms import Form
from ssd.cached_targets.identity import VERSION
from ssd.cached_targets.use import answers_of
from ssd.masking.recipes import RandomMasks
from ssd.step import Step
from ssd.views.recipes import CropViews


@dataclass(frozen=True)
class Found:
    """Of one method.

    Args:
        pair: pictures a second of reading beside computing.
        bytes_per_look: on disk.
        error: |stored - computed| / |computed| over all answers, what half precision costs.
    """

    pair: Pair
    bytes_per_look: int
    error: float

    def row(self) -> dict[str, Any]:
        return {**self.pair.row(), "bytes_per_look": self.bytes_per_look, "error": self.error}


def method(name: str, case: Case, teacher: ViT) -> Step:
    """One of METHODS, of the case's student and this teacher."""
    from lightning_modules.dbot import DBOT
    from lightning_modules.dmae import DMAE
    from lightning_modules.hybrid import HybridDistillation
    from lightning_modules.leap import LEAP

    views, masks, student = CropViews(size=case.size), RandomMasks(case.ratio), case.backbone()
    if name == "dbot":
        return DBOT(student, views=views, masks=masks, stages=[1.0], teacher=teacher)
    if name == "dmae":
        return DMAE(student, teacher, views=views, masks=masks)
    if name == "leap":
        return LEAP(student, teacher, views=views, match="last", mixup=False)
    return HybridDistillation(student, views=views, relation_teacher=teacher, feature_teacher=teacher)


METHODS = {
    "dbot": "the teacher sees whole pictures, the student a part of them",
    "dmae": "both see a part, the teacher to three quarters of its depth",
    "leap": "both see whole pictures, the teacher's last block",
    "hybrid": "two teachers, of whole pictures; relations are queries and keys, which are large",
}


def compare_step(name: str, case: Case, teacher: str, form: Form, rounds: int) -> Found:
    """Targets and losses, forward and backward: targets read from a folder in the step itself, in the process that trains, beside
    those of the teacher's pass. In a run the loader's workers read ahead."""
    torch.manual_seed(1)
    large = ViT(teacher, img_size=case.size, fixed_positions=True, arguments=case.arguments)
    module = method(name, case, large).to(case.device).train()
    module.begin(1000, 100)
    masks = {kind: plan.draw(case.batch, 0, 0) for kind, plan in module.mask_plans().items()}
    index = torch.arange(case.batch)
    live = Batch({"global": case.pictures()[None]}, index, case.batch, masks=masks, variant=torch.zeros_like(index))
    live = live.to(case.device)

    def learn(batch: Batch) -> None:
        with torch.no_grad():
            targets = module.targets(batch)
        total: Any = sum(module.losses(batch, targets).values())
        total.backward()
        module.student.zero_grad()

    arrays = answers_of(module, live, 0, form)
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as place:
        folder = written(place, arrays, form)
        numbers, zeros = list(range(case.batch)), [0] * case.batch

        def read() -> None:
            taught = {key: value.to(case.device) for key, value in folder.read(numbers, zeros).items()}
            live.taught = taught
            learn(live)

        def computed() -> None:
            live.taught = {}
            learn(live)

        title = f"{name}, teacher {teacher.partition('_patch')[0]}"
        pair = case.timed(title, "the teacher's pass", read, computed, rounds)
        exact = answers_of(module, live, 0, Form("float32", form.tokens, form.classes))
        found = Found(pair, folder.layout.bytes_per_look, error_of(arrays, exact))
        folder.close()
    return found


def written(place: str, arrays: dict[str, np.ndarray], form: Form) -> TargetFolder:
    """A folder that holds one batch."""
    samples = len(next(iter(arrays.values())))
    layout = Layout.of(arrays, samples, 1, None)
    folder = TargetFolder.begin(place, {"version": VERSION}, form.record(), layout, {})
    for shard in range(layout.shards):
        with ShardWriter(folder, shard) as writer:
            for sample in writer.samples:
                writer.put(sample, 0, sample, arrays)
            writer.finish()
    return folder


def error_of(stored: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    names = [name for name, value in exact.items() if value.dtype.kind == "f"]
    apart = sum(float(np.square(stored[name].astype(np.float64) - exact[name]).sum()) for name in names)
    whole = sum(float(np.square(exact[name].astype(np.float64)).sum()) for name in names)
    return (apart / whole) ** 0.5
