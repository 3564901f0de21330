"""How many tokens a network makes of so many samples of sound: plain data that the loader needs as well as the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Frames:
    """Windows one after the other, each layer over the answers of the one before.

    Args:
        layers: (window, stride) of each layer, in its own inputs; the window is at least the stride.
        padding: samples of silence around the sound, both sides together, that the first layer sees too.
    """

    layers: tuple[tuple[int, int], ...]
    padding: int = 0

    def count(self, samples: int) -> int:
        """Tokens of so many samples; 0 where they do not fill one."""
        return max(0, self._count(samples))

    def counts(self, samples: Any) -> Any:
        """As `count`, of an array or tensor of whole numbers."""
        return self._count(samples).clip(0)

    def _count(self, samples: Any) -> Any:
        samples = samples + self.padding
        # what is too short becomes 0 or less and stays so, since no window is shorter than its stride
        for window, stride in self.layers:
            samples = (samples - window) // stride + 1
        return samples

    @property
    def receptive_field(self) -> int:
        """Samples that one token sees."""
        seen, hop = 1, 1
        for window, stride in self.layers:
            seen, hop = seen + (window - 1) * hop, hop * stride
        return seen

    @property
    def shortest(self) -> int:
        """Samples of the shortest sound that gives a token."""
        return max(1, self.receptive_field - self.padding)

    @property
    def hop(self) -> int:
        """Samples from one token to the next."""
        hop = 1
        for _, stride in self.layers:
            hop *= stride
        return hop


def as_layers(layers: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Lists from a config as `Frames.layers`."""
    return tuple((int(window), int(stride)) for window, stride in layers)
