"""Random numbers of data as a pure function of where they are used.

A counter-based generator: the numbers of sample `index` in `epoch` depend on nothing but
`(seed, epoch, index, view)`, so 0 or 8 workers, 1 or 8 processes and a resumed run see the same
crops, colours and masks. The bits are those of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) with the counter hashed from the place of use.
"""

from collections.abc import Sequence

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
MASK = 0xFFFFFFFFFFFFFFFF


def mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit words. Wraps around on purpose."""
    bits = (bits ^ (bits >> np.uint64(30))) * MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * MIX_2
    return bits ^ (bits >> np.uint64(31))


def key(*place: int) -> int:
    """One 64-bit key from any number of integers; their order matters."""
    state = 0
    for part in place:
        state = (state ^ (part & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        state = state + 0x9E3779B97F4A7C15 & MASK
        state ^= state >> 30
        state = state * 0xBF58476D1CE4E5B9 & MASK
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def uniforms(shape: tuple[int, ...], *place: int) -> np.ndarray:
    """Independent uniform numbers in [0, 1), float64, 53 bits each; the same place, the same numbers."""
    return uniforms_of_many(shape, [place])[0]


def uniforms_of_many(shape: tuple[int, ...], places: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`uniforms(shape, *place)` for each place, stacked, in one go. (len(places), *shape)"""
    keys = np.array([key(*place) for place in places], dtype=np.uint64)
    return uniforms_of_keys(int(np.prod(shape)), keys).reshape(len(places), *shape)


def uniforms_of_keys(count: int, keys: np.ndarray) -> np.ndarray:
    """(len(keys), count) uniform numbers of the streams `keys` uint64; the first ones are the same for any count."""
    with np.errstate(over="ignore"):
        counter = keys[:, None] + GAMMA * np.arange(1, count + 1, dtype=np.uint64)
        return (mix(counter) >> np.uint64(11)) * 2.0**-53


def generator(*place: int) -> np.random.Generator:
    """A NumPy generator for draws whose number is not known beforehand (a permutation, a mask)."""
    return np.random.Generator(np.random.Philox(key=np.array([key(*place), key(1, *place)], dtype=np.uint64)))
