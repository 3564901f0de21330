"""Views of sounds: crops in time, louder or softer, with noise or without.

All that is drawn for a sound is a function of (seed, epoch, index), one row of numbers a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssd.data.randomness import generator, uniforms
from ssd.errors import UserError
from ssd.views.view import Views, check_between, check_count, check_range, is_number, keep_as_tuples

SOUND = -5  # key of the numbers of sounds
NOISE = -6  # key of the noise itself
DRAWS = 4  # of a view: place in time, gain, whether there is noise, its level


@dataclass(frozen=True)
class SoundView:
    """
    Args:
        length_s: length, s; None = the whole sound.
        rate_hz: samples a second.
        gain_db: softest and loudest change, dB.
        noise_prob: probability of white noise.
        noise_db: level of the sound over the noise, lowest and highest, dB.
    """

    length_s: float | None = 2.0
    rate_hz: int = 16_000
    gain_db: Sequence[float] = (0.0, 0.0)
    noise_prob: float = 0.0
    noise_db: Sequence[float] = (10.0, 30.0)

    def __post_init__(self):
        keep_as_tuples(self, "gain_db", "noise_db")
        check_seconds("length_s", self.length_s)
        check_between("noise_prob", self.noise_prob, 0, 1)
        for name in ("gain_db", "noise_db"):
            value = getattr(self, name)
            if len(value) != 2 or not all(map(is_number, value)) or value[0] > value[1]:
                raise UserError(f"{name} is {list(value)}. Give a smallest and a largest number of dB, in this order.")

    @property
    def samples(self) -> int | None:
        """At least 1; None for whole sounds."""
        return None if self.length_s is None else max(1, round(self.length_s * self.rate_hz))

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """(samples,), None for whole sounds."""
        return None if self.samples is None else (self.samples,)


@dataclass(frozen=True, kw_only=True)
class SoundViews(Views):
    """Global and local views of every sound, mono and at one rate; shorter sounds are padded and `Batch.valid` says where.

    Args:
        rate_hz: samples a second of all views.
        global_count: number of global views, 1 or more.
        global_length_s: length of the global views, s; null = whole sounds, padded to the longest of a batch.
        local_count: number of local views, 0 or more.
        local_length_s: length of the local views, s.
        gain_db: softest and loudest change, dB.
        noise_prob: probability of white noise in a view.
        noise_db: level of the sound over the noise, lowest and highest, dB.
        normalize: each view to mean 0 and standard deviation 1 over what is not padding, as networks that were
            published with such input want it; takes the gain out again.
        crop_to_shortest: cut the views of a batch at random to the shortest of them on each process, in place of padding.
        mix_share: of another sound in the power of a view's spectrogram at most; 0 = none. The other one is its neighbour in the
            step. This and `resize` are for methods and networks that say so.
        mix_group: neighbours among which sounds are mixed, in a ring; divides the sounds of a process or slice.
        resize: smallest and largest crop of a spectrogram, along both axes, that is resized to the whole; above 1 the
            sound shrinks, over time alone; null = none.
        evaluation_length_s: length of the evaluation look, the middle of each sound, s; null = `global_length_s`.
    """

    rate_hz: int = 16_000
    global_count: int = 2
    global_length_s: float | None = 2.0
    local_count: int = 4
    local_length_s: float = 0.5
    gain_db: Sequence[float] = (-6.0, 6.0)
    noise_prob: float = 0.5
    noise_db: Sequence[float] = (10.0, 30.0)
    normalize: bool = False
    crop_to_shortest: bool = False
    mix_share: float = 0.0
    mix_group: int = 8
    resize: Sequence[float] | None = None
    evaluation_length_s: float | None = None

    def __post_init__(self):
        keep_as_tuples(self, "gain_db", "noise_db")
        check_between("mix_share", self.mix_share, 0, 0.99)
        check_count("mix_group", self.mix_group, least=2)
        if self.resize is not None:
            keep_as_tuples(self, "resize")
            check_range("resize", self.resize, above=0, up_to=10)
        check_count("rate_hz", self.rate_hz)
        check_count("global_count", self.global_count)
        check_count("local_count", self.local_count, least=0)
        for name in ("global_length_s", "local_length_s", "evaluation_length_s"):
            check_seconds(name, getattr(self, name))
        if self.local_length_s is None:
            raise UserError("local_length_s is None. Give a length in s; whole sounds are global views.")
        self.kinds()

    def kinds(self) -> dict[str, tuple[SoundView, ...]]:
        def view(length_s: float | None) -> SoundView:
            return SoundView(length_s, self.rate_hz, self.gain_db, self.noise_prob, self.noise_db)

        kinds = {"global": (view(self.global_length_s),) * self.global_count}
        if self.local_count:
            kinds["local"] = (view(self.local_length_s),) * self.local_count
        return kinds

    @property
    def alters_spectra(self) -> bool:
        """Whether something is done to spectrograms, which a method has to apply."""
        return self.mix_share > 0 or self.resize is not None

    @property
    def equal_lengths(self) -> bool:
        return self.crop_to_shortest

    @property
    def evaluation_samples(self) -> int | None:
        """Length of the evaluation look, samples; None for whole sounds."""
        return SoundView(self.evaluation_length_s or self.global_length_s, self.rate_hz).samples

    @property
    def evaluation_lengths(self) -> tuple[int, ...] | None:
        return None if self.evaluation_samples is None else (self.evaluation_samples,)


def check_seconds(name: str, value: float | None) -> None:
    if value is not None and (not is_number(value) or not 0 < value < 1e6):
        raise UserError(f"{name} is {value!r}. Give a length in s, above 0.")


@dataclass(frozen=True)
class Window:
    """What a view takes of a sound, samples at the views' rate, and what is done to it."""

    start: int
    count: int
    gain: float  # factor
    noise_level: float | None  # standard deviation over that of the sound, None for none
    key: tuple[int, ...]


def draw_windows(views: SoundViews, length: int, longest: int | None, *place: int) -> dict[str, list[Window]]:
    """For each view of a sound of `length` samples, a function of place = (seed, epoch, index).

    A window has the samples that are there, at most those of its view, and at most `longest`.
    """
    kinds = views.kinds()
    numbers = uniforms((sum(map(len, kinds.values())), DRAWS), *place, SOUND)
    rows = enumerate(numbers.tolist())
    windows: dict[str, list[Window]] = {}
    for kind, members in kinds.items():
        windows[kind] = []
        for view in members:
            number, (where, gain, gate, level) = next(rows)
            wanted = view.samples or length
            count = min(wanted, length, longest or length)
            gain_db = view.gain_db[0] + (view.gain_db[1] - view.gain_db[0]) * gain
            noise_db = view.noise_db[0] + (view.noise_db[1] - view.noise_db[0]) * level
            windows[kind].append(
                Window(
                    start=int(where * (length - count + 1)),
                    count=count,
                    gain=10 ** (gain_db / 20),
                    noise_level=10 ** (-noise_db / 20) if gate < view.noise_prob else None,
                    key=(*place, number, NOISE),
                )
            )
    return windows


def sound_view(samples: np.ndarray, window: Window, normalize: bool) -> np.ndarray:
    """(n,) float32 of a window -> (n,) float32 with its noise and gain."""
    if window.noise_level is not None:
        noise = generator(*window.key).standard_normal(len(samples), dtype=np.float32)
        samples = samples + noise * np.float32(window.noise_level * root_mean_square(samples))
    return normalised(samples) if normalize else samples * np.float32(window.gain)


def root_mean_square(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def normalised(samples: np.ndarray) -> np.ndarray:
    """To mean 0 and standard deviation 1; silence stays silence."""
    centred = samples - samples.mean(dtype=np.float64)
    return (centred / max(root_mean_square(centred), 1e-7)).astype(np.float32)


def middle(length: int, wanted: int | None) -> tuple[int, int]:
    """Start and count of the middle of a sound, samples."""
    count = length if wanted is None else min(wanted, length)
    return (length - count) // 2, count
