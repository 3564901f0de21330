"""Small clips and sounds of every kind, written where a test wants them."""

import io
import wave
from pathlib import Path

import numpy as np

GREY_STEP = 10  # from each frame of a clip to the next


def write_clip(
    path: Path,
    frames: int = 24,
    *,
    codec: str = "libx264",
    fps: int = 25,
    size=(48, 64),
    form=None,
    first: int = 0,
    **options,
) -> Path:
    """Flat frames, brighter by `GREY_STEP` each, with an 8-frame distance of keyframes; `size` is (height, width)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 8
        for number in range(frames):
            picture = np.full((*size, 3), (first + number * GREY_STEP) % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_audio_only(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def sine(hz: float, rate_hz: int, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def wav_bytes(samples: np.ndarray, rate_hz: int = 8000, width: int = 2) -> bytes:
    """(n,) or (n, channels) in [-1, 1) as PCM of `width` bytes."""
    columns = samples[:, None] if samples.ndim == 1 else samples
    whole = np.clip(np.rint(columns * 2 ** (8 * width - 1)), -(2 ** (8 * width - 1)), 2 ** (8 * width - 1) - 1)
    if width == 1:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((columns.shape[1], width, rate_hz, 0, "NONE", ""))
        file.writeframes(data)
    return out.getvalue()


def write_digits(folder: Path, counts: int = 4, rate_hz: int = 8000) -> Path:
    """{digit}_{speaker}_{number}.wav: sines of another height and length each."""
    folder.mkdir(parents=True, exist_ok=True)
    for digit in range(3):
        for place, speaker in enumerate(("ada", "bob", "cy")):
            for number in range(counts):
                seconds = 0.1 + 0.05 * digit + 0.02 * place + 0.01 * number
                samples = 0.5 * sine(200 + 100 * digit + 10 * number, rate_hz, seconds)
                (folder / f"{digit}_{speaker}_{number}.wav").write_bytes(wav_bytes(samples, rate_hz))
    return folder
