"""Small picture files of every kind, written where a test wants them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def scene(height: int = 24, width: int = 32, seed: int = 0, detail: int = 1) -> np.ndarray:
    """A smooth picture, (H, W, 3) uint8, another for each seed: JPEG keeps it to a few grey levels.

    Made of 3 x 4 patches of colour, or `detail` times as many each way.
    """
    rng = np.random.default_rng(seed)
    low = Image.fromarray(rng.integers(0, 256, (3 * detail, 4 * detail, 3), np.uint8))
    return np.array(low.resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def class_folders(root: Path, counts: dict[str, int], side: int = 16) -> Path:
    """root/CLASS/NUMBER.png, every picture another one."""
    seed = 0
    for name, count in counts.items():
        for number in range(count):
            write(root / name / f"{number:03}.png", encoded(scene(side, side, seed)))
            seed += 1
    return root
