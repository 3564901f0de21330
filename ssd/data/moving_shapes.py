"""Clips that this project makes itself: shapes that move, where no single frame tells how."""

from pathlib import Path

import numpy as np

from ssd.data.clips import import_av
from ssd.data.randomness import generator

MOTIONS = ("left", "right", "up", "down", "clockwise", "anticlockwise")
"""The classes. What moves, where it begins, its colour, size and speed, and what lies behind it are drawn alike for all."""
SHAPES = ("disc", "square", "ring", "cross")
SIDE, FRAMES, FPS = 64, 16, 8
KEY = -9  # of the random numbers


def write_moving_shapes(folder: str | Path, each: int = 40, seed: int = 0) -> Path:
    """Writes `each` clips of every motion, 2 s of 64 px, as FOLDER/MOTION/NUMBER.mp4, the same for the same seed; the folder."""
    for label, motion in enumerate(MOTIONS):
        for number in range(each):
            write_video(Path(folder, motion, f"{number:03}.mp4"), moving_shape(motion, seed, label, number))
    return Path(folder)


def moving_shape(motion: str, *place: int) -> np.ndarray:
    """One clip, (FRAMES, SIDE, SIDE, 3) uint8, drawn for `place`."""
    rng = generator(*place, KEY)
    behind = rng.uniform(20, 110, 3) + rng.normal(0, 12, (SIDE // 4, SIDE // 4, 1)).repeat(4, 0).repeat(4, 1)
    colour, shape = rng.uniform(130, 255, 3), SHAPES[rng.integers(len(SHAPES))]
    radius = rng.uniform(0.10, 0.18) * SIDE
    speed = rng.uniform(0.4, 0.9)  # sides or turns in the whole clip
    begins, angle = rng.uniform(0, SIDE, 2), rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    clip = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for frame in range(FRAMES):
        row, column = position(motion, begins, angle, speed * frame / (FRAMES - 1))
        # what leaves at one side comes in at the other
        down, right = ((axis + SIDE / 2) % SIDE - SIDE / 2 for axis in (rows - row, columns - column))
        clip[frame] = np.where(inside(shape, down, right, radius)[..., None], colour, behind).clip(0, 255)
    return clip


def position(motion: str, begins: np.ndarray, angle: float, moved: float) -> tuple[float, float]:
    """Row and column, px, after a share of a side or a turn."""
    if motion in ("clockwise", "anticlockwise"):
        angle += 2 * np.pi * moved * (1 if motion == "clockwise" else -1)
        return begins[0] + SIDE / 4 * np.sin(angle), begins[1] + SIDE / 4 * np.cos(angle)
    step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[motion]
    return begins[0] + step[0] * moved * SIDE, begins[1] + step[1] * moved * SIDE


def inside(shape: str, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """Which pixels, by their way from the centre, a shape covers."""
    distance = np.hypot(down, right)
    if shape == "disc":
        return distance < radius
    if shape == "ring":
        return (distance < radius) & (distance > 0.5 * radius)
    if shape == "square":
        return np.maximum(abs(down), abs(right)) < 0.85 * radius
    return (np.minimum(abs(down), abs(right)) < 0.35 * radius) & (np.maximum(abs(down), abs(right)) < radius)


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8 as H.264."""
    av = import_av()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        # x264's fast paths read past what they were given and do not always write the same bytes
        options = {"crf": "18", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
