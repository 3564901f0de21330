"""Clips that this project makes itself: shapes that move together, where no single frame tells how."""

from pathlib import Path

import numpy as np

from ssd.data.clips import import_av
from ssd.data.randomness import generator

MOTIONS = ("left", "right", "up", "down", "clockwise", "anticlockwise")
"""The classes. Where the shapes begin, what they are, their colours, sizes and the speed of all are drawn alike for each."""
SIDE, FRAMES, FPS = 48, 24, 12
SHAPES = 15
GREY = 125  # behind them: one that differed from clip to clip would tell clips apart more easily than what moves
KEY = -9  # of the random numbers


def write_moving_shapes(folder: str | Path, each: int = 150, seed: int = 0) -> Path:
    """Writes `each` clips of every motion, 2 s of 48 px, as FOLDER/MOTION/NUMBER.mp4, the same for the same seed; the folder."""
    for label, motion in enumerate(MOTIONS):
        for number in range(each):
            write_video(Path(folder, motion, f"{number:03}.mp4"), moving_shapes(motion, seed, label, number))
    return Path(folder)


def moving_shapes(motion: str, *place: int) -> np.ndarray:
    """One clip, (FRAMES, SIDE, SIDE, 3) uint8, drawn for `place`: discs and squares, brighter or darker than the grey behind
    them, that all go one way at one speed, or turn about the middle. What leaves at one side comes in at the other.
    """
    rng = generator(*place, KEY)
    centres = rng.uniform(0, SIDE, (SHAPES, 2))
    radii = rng.uniform(0.10, 0.16, SHAPES) * SIDE
    colours = GREY + rng.choice([-1, 1], (SHAPES, 1)) * rng.uniform(40, 90, (SHAPES, 3))
    round_ones = rng.integers(2, size=SHAPES).astype(bool)
    speed = rng.uniform(0.047, 0.078) * SIDE  # px a frame, in turning at 0.3 sides from the middle
    clip = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for frame in range(FRAMES):
        clip[frame] = drawn(moved(motion, centres, speed * frame), radii, colours, round_ones)
    return clip


def moved(motion: str, centres: np.ndarray, by: float) -> np.ndarray:
    """(SHAPES, 2) rows and columns, px, of what began at `centres`."""
    if motion in ("clockwise", "anticlockwise"):
        angle = by / (0.3 * SIDE) * (1 if motion == "clockwise" else -1)
        down, right = (centres - SIDE / 2).T
        turned = (down * np.cos(angle) + right * np.sin(angle), right * np.cos(angle) - down * np.sin(angle))
        return SIDE / 2 + np.stack(turned, axis=1)
    step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[motion]
    return centres + by * np.array(step)


def drawn(centres: np.ndarray, radii: np.ndarray, colours: np.ndarray, round_ones: np.ndarray) -> np.ndarray:
    """One frame, (SIDE, SIDE, 3), edges softened over a pixel."""
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    away = abs((pixels - centres[..., None] + SIDE / 2) % SIDE - SIDE / 2).astype(np.float32)  # (SHAPES, 2, SIDE)
    down, right = away[:, 0, :, None], away[:, 1, None, :]
    distance = np.where(
        round_ones[:, None, None], np.sqrt(down**2 + right**2), np.maximum(down, right) / np.float32(0.85)
    )
    cover = (radii[:, None, None] - distance + 0.5).clip(0, 1)  # (SHAPES, SIDE, SIDE)
    front = cover.argmax(0)
    share = np.take_along_axis(cover, front[None], 0)[0][..., None]
    return GREY * (1 - share) + colours[front] * share


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8 as H.264."""
    av = import_av()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        # x264's fast paths read past what they were given and do not always write the same bytes
        options = {"crf": "18", "preset": "veryfast", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
