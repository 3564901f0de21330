"""What all networks over sound share, and what those share that begin with a spectrogram."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd.backbones.base import Backbone
from ssd.batch import Padded, Tokens
from ssd.errors import UserError
from ssd.frames import Frames
from ssd.spectrogram import Levels


class SoundNetwork(Backbone, ABC):
    """Networks over sounds (B, S) or `Padded`, whose answer to a sound is the same alone and padded in a batch.

    Padding is told by `Padded.valid`; a tensor is all sound.

    Attributes:
        frames: how many tokens a sound gives over time.
    """

    of_timm: ClassVar[bool] = False
    axes: ClassVar[int] = 1
    frames: Frames

    def __init__(self, name: str, rate_hz: int):
        super().__init__(name, in_chans=1, drop_path_rate=0.0)
        self.rate_hz = rate_hz

    @abstractmethod
    def forward(self, x: Any, *args: Any, **asked: Any) -> Tokens:
        """As `Backbone.forward`, of sounds (B, S) or `Padded`."""

    @property
    def patch_size(self) -> int:
        """Samples from one token to the next."""
        return self.frames.hop

    @property
    def rows(self) -> int:
        """Tokens of each moment."""
        return 1

    def grid(self, *lengths: int) -> tuple[int, ...]:
        """Of the samples of a sound: (frames,), or (frames, rows) with several tokens a moment."""
        (samples,) = lengths
        return (self.frames.count(samples),)

    def example(self, lengths: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(2, *lengths, generator=generator)

    def instead(self, ability: str) -> str:
        return "Networks over sound see whole sequences."

    def check_input(self, x: Tensor | Padded) -> None:  # type: ignore[override]
        samples = x.samples if isinstance(x, Padded) else x
        if samples.ndim != 2 or not samples.is_floating_point():
            raise UserError(
                f"'{self.name}' was built for sounds, (B, samples) of floating point, and was given {tuple(samples.shape)} of "
                f"{samples.dtype}."
            )
        shortest = self.frames.shortest
        if samples.shape[1] < shortest:
            raise UserError(
                f"sounds of {samples.shape[1]} samples are shorter than one token of '{self.name}', which sees "
                f"{shortest} ({1000 * shortest / self.rate_hz:g} ms). Give longer ones."
            )

    def grid_of(self, x: Tensor | Padded) -> tuple[int, ...]:
        return self.grid((x.samples if isinstance(x, Padded) else x).shape[1])

    def valid_tokens(self, x: Tensor | Padded) -> Tensor | None:
        """(B, N) bool, at least one of each sound; None where all is sound."""
        if not isinstance(x, Padded):
            return None
        return self.first_tokens(self.frames.counts(x.valid.sum(1)), self.grid_of(x)[0])

    def first_tokens(self, counts: Tensor, moments: int) -> Tensor:
        """Those of the first `counts` (B,) of so many moments, at least one of each sound. (B, N) bool"""
        over_time = torch.arange(moments, device=counts.device) < counts.clamp_min(1)[:, None]
        return over_time.repeat_interleave(self.rows, dim=1) if self.rows > 1 else over_time


class Spectral(ABC):
    """Networks that begin with a spectrogram, which may be changed before they go on: `network(altered(network.hear(sounds)))`.

    Called with `Levels` in place of sounds they go on from there.
    """

    @abstractmethod
    def hear(self, sounds: Tensor | Padded) -> Levels:
        """The spectrogram of sounds, as the network reads it. Raises UserError for what are no sounds, or too short ones."""
