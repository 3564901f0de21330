"""From a sound file to mono samples at the rate that was asked for, a part of it where only a part is needed.

PCM WAV is read by the standard library, everything else by soundfile (`pip install ssd[audio]`). A header may state
more than the file holds: what is there counts.
"""

import contextlib
import io
import math
import wave
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from ssd.errors import BrokenSample, UserError

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
ZERO_CROSSINGS = 32  # of the resampling filter, each side
CUTOFF = 0.9  # of the lower of the two Nyquist frequencies: the filter falls from 0.8 to 1.0 of it
BETA = 10.0  # Kaiser's: 100 dB below from there on
LONGEST_FILTER = 2**22


class BrokenSound(BrokenSample):
    """This file is no sound that can be read; the message says why."""


class Sound:
    """An open sound file, closed with the block that opened it. Raises BrokenSound where it is none.

    Attributes:
        rate_hz: samples a second as recorded.
        length: samples of each channel that the file holds, at least 1; of some compressed kinds as the header says.
    """

    def __init__(self, file: BinaryIO | bytes):
        self.file = io.BytesIO(file) if isinstance(file, bytes) else file
        self._decoder: Any = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with contextlib.suppress(wave.Error, EOFError):
            self._decoder = wave.open(self.file)  # noqa: SIM115 (closed with this)
        if self._decoder is not None:
            self.rate_hz, self.length = self._decoder.getframerate(), self._frames_there()
        else:
            self.file.seek(0)
            soundfile = import_soundfile()
            with told(soundfile):
                self._decoder = soundfile.SoundFile(self.file)
            self.rate_hz, self.length = self._decoder.samplerate, self._decoder.frames
        if self.length < 1 or self.rate_hz < 1:
            raise BrokenSound("no samples in it")

    def _frames_there(self) -> int:
        """Of a WAV: what the header says, or what the file has room for where that is less."""
        width = self._decoder.getsampwidth() * self._decoder.getnchannels()
        start = self.file.tell()
        there = self.file.seek(0, io.SEEK_END) - start
        self.file.seek(start)
        return min(self._decoder.getnframes(), there // width)

    def __enter__(self) -> "Sound":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
        self.file.close()

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        """The mean of the channels, (n,) float32 in [-1, 1]; fewer than `count` where the file ends.

        Raises BrokenSound where it cannot be decoded, or ends before `start`.
        """
        samples = self._read(start, self.length - start if count is None else min(count, self.length - start))
        if not len(samples):
            raise BrokenSound(f"it ends before sample {start}, its header says {self.length}")
        return samples

    def _read(self, start: int, count: int) -> np.ndarray:
        if isinstance(self._decoder, wave.Wave_read):
            self._decoder.setpos(start)
            values = pcm(self._decoder.readframes(count), self._decoder.getsampwidth())
            return mono(values.reshape(-1, self._decoder.getnchannels()))
        with told(import_soundfile()):
            self._decoder.seek(start)
            return mono(self._decoder.read(count, dtype="float32", always_2d=True))

    def read_at(self, rate_hz: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """As `read`, in samples of another rate: exactly that part of the whole sound resampled.

        `start` and `count` in samples of `rate_hz`. Beyond its ends a sound is silent. Raises as `read`.
        """
        whole = resampled_length(self.length, self.rate_hz, rate_hz)
        count = whole - start if count is None else min(count, whole - start)
        if rate_hz == self.rate_hz:
            return self.read(start, count)
        up, down = ratio(self.rate_hz, rate_hz)
        # blocks of `down` recorded samples become `up` samples; the filter reaches beyond the part's ends
        margin = math.ceil(ZERO_CROSSINGS * max(up, down) / up / CUTOFF / down) + 1
        first = max(0, start // up - margin)
        last = -(-(start + count) // up) + margin
        part = self.read(first * down, (last - first) * down)
        skip = start - first * up
        samples = resample(part, self.rate_hz, rate_hz)[skip : skip + count]
        if not len(samples):
            raise BrokenSound(f"it ends before sample {start} at {rate_hz} Hz, its header says {whole}")
        return samples


def pcm(data: bytes, width: int) -> np.ndarray:
    """Little-endian integers of `width` bytes -> float32 in [-1, 1); 8 bits are unsigned, as in every WAV."""
    data = data[: len(data) // width * width]
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    if width not in (2, 4):
        raise BrokenSound(f"samples of {width} bytes")
    return (np.frombuffer(data, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)


def mono(samples: np.ndarray) -> np.ndarray:
    """(n, channels) -> (n,)"""
    mean = samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)
    if not np.isfinite(mean).all():
        raise BrokenSound("samples that are not finite")
    return np.ascontiguousarray(mean, np.float32)


def ratio(from_hz: int, to_hz: int) -> tuple[int, int]:
    common = math.gcd(from_hz, to_hz)
    return to_hz // common, from_hz // common


def resampled_length(length: int, from_hz: int, to_hz: int) -> int:
    up, down = ratio(from_hz, to_hz)
    return -(-length * up // down)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """(n,) float32 at one rate -> (ceil(n to / from),) at another, by a polyphase windowed sinc (Kaiser).

    Up to 0.8 of the lower Nyquist frequency it keeps, above 1.0 it drops, to 100 dB both. The first sample stays where
    it is in time.
    """
    if from_hz == to_hz:
        return samples
    from scipy.signal import resample_poly

    up, down = ratio(from_hz, to_hz)
    return resample_poly(samples, up, down, window=low_pass(max(up, down))).astype(np.float32, copy=False)


@lru_cache(maxsize=32)
def low_pass(factor: int) -> np.ndarray:
    """Taps for a cut-off at `CUTOFF` / `factor` of the Nyquist frequency. (odd number,) float32"""
    from scipy.signal import firwin

    half = math.ceil(ZERO_CROSSINGS * factor / CUTOFF)
    if half > LONGEST_FILTER:
        raise BrokenSound("a sample rate that has no small ratio to the one asked for")
    return firwin(2 * half + 1, CUTOFF / factor, window=("kaiser", BETA)).astype(np.float32)


@contextlib.contextmanager
def told(soundfile: Any) -> Iterator[None]:
    """soundfile's errors as BrokenSound."""
    try:
        yield
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise BrokenSound(f"{type(error).__name__}: {error}") from None


def import_soundfile() -> Any:
    """Raises UserError that names the extra where soundfile is missing."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(
            f"sounds other than PCM WAV need soundfile ({error}). Install it with: pip install ssd[audio]"
        ) from None
    return soundfile
