"""Sounds in audio files."""

from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from datamodules.files import FileData
from ssd.data.broken import BrokenSamples
from ssd.data.lengths import LengthSampler, lengths_at
from ssd.data.sampler import Draws
from ssd.data.sound import SOUND_SUFFIXES
from ssd.data.sound_samples import CollateEvaluationSounds, CollateSounds, EvaluationSounds, TrainingSounds
from ssd.data.sources import Source
from ssd.errors import UserError
from ssd.views.sound import SoundViews


class Sound(FileData):
    """Sounds under one path, mono; the method's views are `SoundViews`.

    PCM WAV needs nothing else, other files need soundfile (`pip install ssd[audio]`).

    Args:
        batch_seconds: sounds of a step on each process by their length in all, padding included, in place of
            `batch_size`; for views that are whole sounds. Longer ones are cut to it.
    """

    sample_word = "sound"
    views_class = SoundViews
    suffixes = SOUND_SUFFIXES
    views: SoundViews

    def __init__(
        self,
        path: str | Path,
        val_path: str | Path | None = None,
        *,
        batch_seconds: float | None = None,
        **loading: Any,
    ):
        super().__init__(path, val_path, **loading)
        if batch_seconds is not None and not batch_seconds > 0:
            raise UserError(f"batch_seconds is {batch_seconds}. Give a length in s above 0, or null for batch_size.")
        self.batch_seconds = batch_seconds

    @property
    def batches_vary(self) -> bool:
        """Whether steps have different numbers of samples."""
        return self.batch_seconds is not None

    def training_samples(self, source: Source, broken: BrokenSamples) -> TrainingSounds:
        if self.batch_seconds is not None and self.views.global_length_s is not None:
            raise UserError(
                f"batch_seconds is {self.batch_seconds:g} and all views have one length (global_length_s "
                f"{self.views.global_length_s:g}). Use batch_size, or whole sounds: global_length_s null."
            )
        return TrainingSounds(source, self.views, broken, seed=self.seed)

    def evaluation_samples(self, source: Source, broken: BrokenSamples) -> EvaluationSounds:
        return EvaluationSounds(source, self.views, broken)

    def collate(self, labelled: bool, rank: int, world: int) -> CollateSounds:
        return CollateSounds(labelled, self.masks, seed=self.seed, rank=rank, world=world)

    def evaluation_collate(self) -> CollateEvaluationSounds:
        return CollateEvaluationSounds(self.views)

    def order(self, samples: Any, rank: int, world: int) -> Sampler[list[Any]]:
        if self.batch_seconds is None:
            return super().order(samples, rank, world)
        if type(self.draws) is not Draws:
            raise UserError(
                f"batch_seconds takes every sound once an epoch, and sampling is {self.drawn}. Use batch_size."
            )
        micro_batches = 1 if self.trainer is None else getattr(self.trainer.lightning_module, "micro_batches", 1)
        return LengthSampler(
            lengths_at(samples.source, self.views.rate_hz, samples.broken),
            max(micro_batches, round(self.batch_seconds * self.views.rate_hz)),
            rank=rank,
            world=world,
            seed=self.seed,
            multiple=micro_batches,
            steps_per_epoch=self._steps_per_epoch,
            steps_done=self._steps_done,
        )
