"""Sounds that are made, for where there are none: two tones after each other, whose pair is the class."""

import wave
from itertools import permutations
from pathlib import Path

import numpy as np

from ssd.data.randomness import uniforms

RATE_HZ = 8000
NOTES_HZ = {"low": 400.0, "mid": 700.0, "high": 1200.0, "top": 2000.0}
TONES = -10  # key of what differs between the sounds of a class


def write_tones(folder: str | Path, each: int = 60, seed: int = 0) -> Path:
    """Writes `each` sounds of every ordered pair of two notes as FOLDER/FIRST-SECOND/NUMBER.wav; the folder.

    8 kHz, 16 bits, 0.3 to 0.9 s. Pitch, lengths, overtones, loudness and noise differ from sound to sound, a function of (seed,
    class, number). The average over time is that of the pair in the other order, so that only order tells the two apart.
    """
    for kind, pair in enumerate(permutations(NOTES_HZ, 2)):
        place = Path(folder, "-".join(pair))
        place.mkdir(parents=True, exist_ok=True)
        for number in range(each):
            with wave.open(str(place / f"{number:03d}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE_HZ)
                sound = two_tones(NOTES_HZ[pair[0]], NOTES_HZ[pair[1]], seed, kind, number)
                file.writeframes((sound * 32767).astype("<i2").tobytes())
    return Path(folder)


def two_tones(first_hz: float, second_hz: float, *place: int) -> np.ndarray:
    """(n,) in [-1, 1]"""
    numbers = uniforms((8,), *place, TONES)
    pitch = 2 ** (0.3 * (numbers[0] - 0.5))  # an eighth of an octave either way, about
    parts = []
    for hz, length, overtone in ((first_hz, numbers[1], numbers[3]), (second_hz, numbers[2], numbers[4])):
        seconds = np.arange(round((0.15 + 0.3 * length) * RATE_HZ)) / RATE_HZ
        tone = np.sin(2 * np.pi * hz * pitch * seconds) + 0.5 * overtone * np.sin(4 * np.pi * hz * pitch * seconds)
        parts.append(tone * np.minimum(1, 50 * np.minimum(seconds, seconds[::-1])))  # no click
    sound = np.concatenate(parts)
    noise = 2 * uniforms((len(sound),), *place, TONES, 1) - 1
    sound = sound / 1.5 + (0.02 + 0.2 * numbers[5]) * noise
    return (0.1 + 0.7 * numbers[6]) * sound / np.abs(sound).max()
