"""Sounds in audio files."""

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from datamodules.files import FileData
from ssd.data.broken import BrokenSamples
from ssd.data.lengths import LengthSampler, counted_lengths, lengths_at, rows_in_files
from ssd.data.sampler import Draws
from ssd.data.sound import SOUND_SUFFIXES
from ssd.data.sound_samples import CollateEvaluationSounds, CollateSounds, EvaluationSounds, TrainingSounds
from ssd.data.sources import Source, Subset
from ssd.errors import UserError
from ssd.views.sound import SoundViews


class Sound(FileData):
    """Sounds under one path, mono; the method's views are `SoundViews`.

    PCM WAV needs nothing else, other files need soundfile (`pip install ssd[audio]`).

    Args:
        batch_seconds: sounds of a step on each process by their length in all, padding included, in place of
            `batch_size`; for views that are whole sounds. Longer ones are cut to it.
        shortest_s: sounds below this length, s, are left out of training; what their headers say is read once.
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
        shortest_s: float = 0.0,
        **loading: Any,
    ):
        super().__init__(path, val_path, **loading)
        if shortest_s < 0:
            raise UserError(f"shortest_s is {shortest_s}. Give a length in s, or 0 to leave nothing out.")
        self.shortest_s = shortest_s
        if batch_seconds is not None and not batch_seconds > 0:
            raise UserError(f"batch_seconds is {batch_seconds}. Give a length in s above 0, or null for batch_size.")
        self.batch_seconds = batch_seconds

    @cached_property
    def _parts(self) -> tuple[Source, Source | None, Source]:
        training, bank, queries = super()._parts
        return self._long_enough(training), bank, queries

    def _long_enough(self, source: Source) -> Source:
        """Without what is shorter than `shortest_s`; broken sounds stay, to be counted where they are read."""
        if not self.shortest_s:
            return source
        files, rows = rows_in_files(source)
        samples, rate_hz = counted_lengths(files)[rows].T
        kept = np.flatnonzero((samples == 0) | (samples >= self.shortest_s * rate_hz))
        if not len(kept):
            raise UserError(f"shortest_s is {self.shortest_s:g} and every sound is shorter. Use less.")
        if len(kept) < len(source):
            left_out = len(source) - len(kept)
            warnings.warn(
                f"{left_out:,} of {len(source):,} sounds are shorter than {self.shortest_s:g} s and are left out of training.",
                stacklevel=2,
            )
        return Subset(source, kept)

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
        cropped = self.views.crop_to_shortest
        return CollateSounds(labelled, self.masks, self.seed, rank, world, crop_to_shortest=cropped)

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
