"""From sounds of a source to samples and batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssd.batch import Batch, Masks
from ssd.data.broken import UNREADABLE, BrokenSamples, readable
from ssd.data.randomness import uniforms
from ssd.data.sampler import Draws
from ssd.data.sound import Sound, resampled_length
from ssd.data.sources import Source
from ssd.masking.batch import MaskPlan
from ssd.views.sound import SoundViews, Window, draw_windows, middle, normalised, sound_view
from ssd.views.spectra import draw_spectra

CUT = -9  # key of where sounds are cut to the shortest of their batch


@dataclass
class SoundSample:
    """One sound's views, each as long as it is, and the length that views of its batch are padded to."""

    views: dict[str, list[np.ndarray]]  # kind -> V times (n,)
    lengths: dict[str, int]  # kind -> samples to pad to at least
    index: int
    label: int
    spectra: dict[str, np.ndarray] = field(default_factory=dict)  # kind -> (V, 5), as `draw_spectra`


@dataclass
class SoundSamples:
    """The sounds of a batch, and the step of the run that it is for."""

    sounds: list[SoundSample]
    step: int


class TrainingSounds(Dataset[SoundSamples]):
    """Views of the sounds at places, drawn for (seed, *place); a place is as for `TrainingPictures`.

    With a fourth number, `longest`, whole sounds are cut and padded to as many samples. Broken sounds as in `TrainingPictures`.
    """

    def __init__(
        self, source: Source, views: SoundViews, broken: BrokenSamples, *, seed: int, draws: Draws | None = None
    ):
        self.source, self.views, self.broken, self.seed = source, views, broken, seed
        self.draws = draws or Draws(len(source))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, ...]) -> SoundSamples:
        """A batch of one. Raises UserError when more sounds are broken than may be."""
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[tuple[int, ...]]) -> SoundSamples:
        """A batch. Raises as `__getitem__`."""
        return SoundSamples([self._sample(place) for place in places], getattr(places, "step", 0))

    def _sample(self, place: tuple[int, ...]) -> SoundSample:
        drawn, longest = place[:3], place[3] if len(place) > 3 else None
        key = (self.seed, *drawn)
        seen, views = readable(
            lambda candidate: self._views(candidate, longest, key), self.broken, self.draws, self.seed, *drawn
        )
        lengths = {kind: members[0].samples or longest or 0 for kind, members in self.views.kinds().items()}
        return SoundSample(views, lengths, seen, self.source.label(seen), draw_spectra(self.views, *key))

    def _views(self, candidate: int, longest: int | None, key: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
        rate_hz = self.views.rate_hz
        with Sound(self.source.open(candidate)) as sound:  # type: ignore[arg-type]
            length = resampled_length(sound.length, sound.rate_hz, rate_hz)
            windows = draw_windows(self.views, length, longest, *key)
            asked = sum(window.count for table in windows.values() for window in table)
            whole = None  # of a long recording only the windows are decoded
            if 2 * asked >= length:
                whole = sound.read_at(rate_hz)
                if len(whole) < length:  # a compressed file that was cut short: the windows lie in what there is
                    windows = draw_windows(self.views, len(whole), longest, *key)

            def samples(window: Window) -> np.ndarray:
                if whole is None:
                    return sound.read_at(rate_hz, window.start, window.count)
                return whole[window.start : window.start + window.count]

            return {
                kind: [sound_view(samples(window), window, self.views.normalize) for window in table]
                for kind, table in windows.items()
            }


@dataclass(frozen=True)
class CollateSounds:
    """Samples -> Batch with views (V, B, S) float32 and `valid` (V, B, S), padded with zeros at the end.

    Args:
        labelled: whether the source has labels.
        masks: name -> what is masked, drawn for the step and no other.
        seed: of masks.
        rank, world: which part of the step's samples this is; all ranks have as many.
        crop_to_shortest: cut each kind's views at random to the shortest of this batch, in place of padding.
    """

    labelled: bool
    masks: Mapping[str, MaskPlan] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0
    world: int = 1
    crop_to_shortest: bool = False

    def __call__(self, batch: SoundSamples) -> Batch:
        samples = batch.sounds
        views, valid = {}, {}
        for kind, least in samples[0].lengths.items():
            rows = list(zip(*(sample.views[kind] for sample in samples), strict=True))  # V times B
            lengths = [len(row) for view in rows for row in view]
            # what is fixed for the step is the same on every rank
            size = min(lengths) if self.crop_to_shortest else least or max(lengths)
            if self.crop_to_shortest:
                begins = uniforms((len(rows), len(samples)), self.seed, batch.step, self.rank, CUT)
                rows = [tuple(map(cut, view, places, repeat(size))) for view, places in zip(rows, begins.tolist())]
            views[kind], valid[kind] = (torch.stack(parts) for parts in zip(*(padded(view, size) for view in rows)))
        return Batch(
            views=views,
            valid=valid,
            spectra={
                kind: torch.from_numpy(np.stack([sample.spectra[kind] for sample in samples], axis=1))
                for kind in samples[0].spectra
            },
            index=torch.tensor([sample.index for sample in samples]),
            total=len(samples) * self.world,
            label=torch.tensor([sample.label for sample in samples]) if self.labelled else None,
            masks={
                name: masks_of_sounds(
                    plan, valid[name], self.seed, batch.step, number, rank=self.rank, world=self.world
                )
                for number, (name, plan) in enumerate(sorted(self.masks.items()))
            },
        )


def masks_of_sounds(plan: MaskPlan, valid: Tensor, *place: int, rank: int = 0, world: int = 1) -> Masks:
    """The masks of views of which `valid` (V, B, S) says what is sound, by `MaskPlan.draw` or `MaskPlan.draw_padded`."""
    if plan.frames is None or plan.equal_lengths:
        return plan.draw(valid.shape[1], *place, rank=rank, world=world, side=valid.shape[2])
    return plan.draw_padded(valid.sum(-1).numpy(), valid.shape[2], *place, rank=rank, world=world)


def cut(sound: np.ndarray, place: float, size: int) -> np.ndarray:
    """`size` of a sound's samples, from where `place` in [0, 1) says."""
    start = int(place * (len(sound) - size + 1))
    return sound[start : start + size]


def padded(sounds: Sequence[np.ndarray], size: int) -> tuple[Tensor, Tensor]:
    """B times (n,), n up to `size` -> (B, size) float32 and bool"""
    samples, valid = torch.zeros(len(sounds), size), torch.zeros(len(sounds), size, dtype=torch.bool)
    for row, sound in enumerate(sounds):
        samples[row, : len(sound)] = torch.from_numpy(sound)
        valid[row, : len(sound)] = True
    return samples, valid


class EvaluationSounds(Dataset[dict[str, Any] | None]):
    """The middle of each sound as it is; None where the sound is broken."""

    def __init__(self, source: Source, views: SoundViews, broken: BrokenSamples):
        self.source, self.views, self.broken = source, views, broken

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        views = self.views
        try:
            with Sound(self.source.open(index)) as sound:  # type: ignore[arg-type]
                length = resampled_length(sound.length, sound.rate_hz, views.rate_hz)
                samples = sound.read_at(views.rate_hz, *middle(length, views.evaluation_samples))
        except UNREADABLE as error:
            self.broken.add(index, error)
            return None
        look = normalised(samples) if views.normalize else samples
        return {"sample": look, "label": self.source.label(index), "index": index}


@dataclass(frozen=True)
class CollateEvaluationSounds:
    """-> {"sample": (B, S) float32, "valid": (B, S), "label": (B,) or -1, "index": (B,)}, broken sounds left out."""

    views: SoundViews

    def __call__(self, samples: list[dict[str, Any] | None]) -> dict[str, Tensor]:
        whole = [s for s in samples if s is not None]
        size = self.views.evaluation_samples or max((len(s["sample"]) for s in whole), default=0)
        sounds, valid = padded([s["sample"] for s in whole], size)
        return {
            "sample": sounds,
            "valid": valid,
            "label": torch.tensor([s["label"] for s in whole], dtype=torch.int64),
            "index": torch.tensor([s["index"] for s in whole], dtype=torch.int64),
        }
