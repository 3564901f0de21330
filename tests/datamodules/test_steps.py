"""The engine takes steps on clips and on sounds, whatever their number in a step."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from datamodules.clips import Clips
from datamodules.sound import Sound
from lightning_modules.base import SelfDistillation
from ssd.batch import Batch, Targets
from ssd.teachers import EMA
from ssd.views.clips import ClipViews
from ssd.views.sound import SoundViews
from tests.data.media_files import write_clip, write_digits
from tests.lightning_modules.runs import fit


class Moments(nn.Module):
    """(n, ..., S) -> (n, 4): a layer on the mean and the spread of each sample, without its padding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 4)

    def forward(self, views: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        flat = views.flatten(1)
        share = torch.ones_like(flat) if valid is None else valid.float()
        mean = (flat * share).sum(1) / share.sum(1)
        spread = ((flat - mean[:, None]) ** 2 * share).sum(1) / share.sum(1)
        return self.layer(torch.stack([mean, spread], 1))


class Agreement(SelfDistillation):
    """The second global view of the student agrees with the first of its average."""

    def __init__(self, **engine):
        super().__init__(**engine)
        self.student = Moments()
        self.teacher = EMA(self.student)
        self.totals: list[int] = []

    def targets(self, batch: Batch) -> Targets:
        valid = batch.valid.get("global")
        return Targets(goal=self.teacher(batch.views["global"][0], None if valid is None else valid[0])[None])

    def losses(self, batch: Batch, targets: Targets) -> dict[str, torch.Tensor]:
        valid = batch.valid.get("global")
        answer = self.student(batch.views["global"][1], None if valid is None else valid[1])
        self.totals.append(batch.total)
        return {"agreement": ((answer - targets.goal[0]) ** 2).sum() / batch.total}

    def update(self, targets: Targets) -> None:
        self.teacher.update(self.student, 0.9)


def test_steps_of_as_much_sound_as_fits_have_each_their_own_total(tmp_path):
    views = SoundViews(rate_hz=8000, global_length_s=None, local_count=0)
    data = Sound(write_digits(tmp_path / "digits"), batch_seconds=1.0, num_workers=0, val_share=0.0)
    module = Agreement(views=views, micro_batches=2, lr=1e-3)
    trainer = fit(tmp_path / "run", module, data, max_epochs=2, limit_val_batches=0)
    steps = trainer.num_training_batches
    assert module.step == 2 * steps and module.skipped_steps == 0
    assert len(set(module.totals)) > 1 and all(total % 2 == 0 for total in module.totals)
    # two slices a step, at most a step's last sounds left out of an epoch
    assert sum(module.totals[: 2 * steps]) / 2 >= 35
    assert module.samples_per_step == 0, "no number that a resumed run would be held to"


class StopsAt(pl.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.stop_requested = pl_module.step == self.step - 1


def test_a_run_on_batches_by_length_that_was_stopped_ends_as_if_it_was_not(tmp_path):
    views = SoundViews(rate_hz=8000, global_length_s=None, local_count=0)
    folder = write_digits(tmp_path / "digits")
    ends = []
    for stops in ([], [3]):
        run = tmp_path / f"run{len(stops)}"
        for stop in [*stops, None]:
            torch.manual_seed(0)
            module = Agreement(views=views, micro_batches=2, lr=1e-3)
            data = Sound(folder, batch_seconds=1.0, num_workers=0, val_share=0.0)
            callbacks = [] if stop is None else [StopsAt(stop)]
            resume = run / "checkpoints" / "last.ckpt" if stop is None and stops else None
            fit(run, module, data, max_epochs=2, limit_val_batches=0, callbacks=callbacks, resume=resume)
            assert stop is None or module.step == stop
        ends.append({name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)})
    assert len(ends[0]) > 2 and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_steps_on_clips(tmp_path):
    pytest.importorskip("av")
    for number in range(8):
        write_clip(tmp_path / "clips" / f"{number}.mp4", 12, first=20 * number)
    views = ClipViews(global_size=16, global_frames=4, local_count=0)
    module = Agreement(views=views, micro_batches=2, lr=1e-3)
    data = Clips(tmp_path / "clips", batch_size=4, num_workers=0)
    trainer = fit(tmp_path / "run", module, data, max_epochs=2, limit_val_batches=0)
    assert module.step == 2 * trainer.num_training_batches == 4 and module.skipped_steps == 0
