"""When the frames of a clip are shown, and from where they can be decoded."""

from dataclasses import dataclass

import numpy as np

JUMP = 8  # frames that a jump to a keyframe has to spare: it empties the decoder


@dataclass(frozen=True)
class Timeline:
    """When the frames of a clip are shown, in the order of showing.

    Args:
        times: (N,) int64 ascending, in units of `unit_s` seconds; from any zero.
        keys: (K,) int64 places in `times` of the frames from which decoding can start, ascending.
        last_s: how long the last frame is shown, s.
        timed: False where the file has no times: then `times` counts frames as they come out of the decoder.
    """

    times: np.ndarray
    unit_s: float
    keys: np.ndarray
    last_s: float
    timed: bool = True

    def __len__(self) -> int:
        """Number of frames, N, at least 1."""
        return len(self.times)

    @property
    def seconds(self) -> np.ndarray:
        """(N,) float64, s from the first frame."""
        return (self.times - self.times[0]) * self.unit_s

    @property
    def duration_s(self) -> float:
        return float(self.seconds[-1]) + self.last_s

    def runs(self, wanted: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Wanted frames in pieces that are decoded without a jump: the frame to start from, and the frames.

        A jump is made where it spares at least `JUMP` frames. `wanted` (n,) ascending places in `times`.
        """
        at = 0
        pieces: list[tuple[int, list[int]]] = []
        for frame in wanted.tolist():
            before = np.searchsorted(self.keys, frame, side="right")
            key = int(self.keys[before - 1]) if self.timed and before else 0
            if not pieces or key - at >= JUMP:
                pieces.append((key if key - at >= JUMP else 0, []))
            pieces[-1][1].append(frame)
            at = frame + 1
        return [(start, np.array(frames)) for start, frames in pieces]
