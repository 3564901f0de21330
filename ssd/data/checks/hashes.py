"""Pictures that are the same or look the same: a hash of the pixels, one of what is seen, and a search by both."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

import numpy as np

from ssd.views.geometry import channels_last, resize

BITS = 64
SIDE = 32  # px to which a picture is brought before its frequencies are looked at
NEAR = 4  # bits of 64 in which the same picture, compressed or resized again, may differ
THUMBNAIL = 8  # px
CHUNK = 2**16  # pairs that are looked at together
ALIKE = 4.5  # grey levels by which thumbnails of the same picture, compressed or resized again, differ at most


def pixel_hash(picture: np.ndarray) -> int:
    """64 bits of shape and values: equal pictures have equal hashes, and others practically never."""
    # the quickest of hashlib where processors compute it themselves; nobody is to be kept out
    state = hashlib.sha1(str(picture.shape).encode(), usedforsecurity=False)
    state.update(np.ascontiguousarray(picture).data)
    return int.from_bytes(state.digest()[:8], "little")


def small_picture(picture: np.ndarray) -> np.ndarray:
    """The mean channel of a picture (H, W, C) uint8 at 32 x 32, from which hash and thumbnail are made, float32."""
    return resize(channels_last(picture), SIDE, SIDE)[0].numpy().mean(0, dtype=np.float32)


def thumbnail(small: np.ndarray) -> np.ndarray:
    """(32, 32) -> (64,) uint8: 8 x 8 means."""
    side = SIDE // THUMBNAIL
    means = small.reshape(THUMBNAIL, side, THUMBNAIL, side).mean((1, 3))
    return np.rint(means).astype(np.uint8).ravel()


def perceptual_hash(small: np.ndarray) -> int:
    """64 bits, one for each of the lowest frequencies of (32, 32): whether it is above their median.

    Of the cosine transform, without the constant. Compression, size and brightness change few bits; of a picture
    without detail the bits mean nothing.
    """
    rows, columns, basis = frequencies()
    spectrum = (basis @ small @ basis.T)[rows, columns]
    return int.from_bytes(np.packbits(spectrum > np.median(spectrum)).tobytes(), "little")


@lru_cache(maxsize=1)
def frequencies() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (64,) of the lowest frequencies but the constant, by rows and columns, and the basis of the cosine
    transform (DCT-II) that they need, (frequencies, SIDE)."""
    places = sorted((u + v, u, v) for u in range(SIDE) for v in range(SIDE))[1 : BITS + 1]
    rows, columns = (np.array([place[axis] for place in places]) for axis in (1, 2))
    number = np.arange(max(rows.max(), columns.max()) + 1)[:, None]
    basis = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * number).astype(np.float32)
    return rows, columns, basis


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits in which uint64 hashes differ, 0 to 64."""
    bits = first ^ second
    one, two, four = np.uint64(1), np.uint64(2), np.uint64(4)
    # sums of neighbouring bits, pairs, nibbles and bytes, all at once in one word
    bits = bits - ((bits >> one) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> two) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> four)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    with np.errstate(over="ignore"):
        return ((bits * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def near_pairs(hashes: np.ndarray, radius: int = NEAR) -> np.ndarray:
    """All pairs i < j whose hashes are at most `radius` bits apart, each once: (P, 2) int64, sorted.

    Exact, without comparing all with all: cut into radius + 2 blocks, two hashes that differ in `radius` bits agree in
    two blocks at least, so that only those that share two blocks are compared. Hashes (N,) uint64; many equal ones
    give many pairs, so give each value once.
    """
    if not 0 <= radius <= BITS - 2:
        raise ValueError(f"radius is {radius}. Give a number of bits from 0 to {BITS - 2}.")
    ends = np.linspace(0, BITS, radius + 3).astype(int).tolist()
    blocks = [((1 << high) - (1 << low)) for low, high in zip(ends[:-1], ends[1:])]
    found = [np.zeros((0, 2), np.int64)]
    for first, second in combinations(blocks, 2):
        for pairs in pairs_in_common(hashes, np.uint64(first | second)):
            found.append(pairs[distances(hashes[pairs[:, 0]], hashes[pairs[:, 1]]) <= radius])
    pairs = np.concatenate(found)
    pairs.sort(axis=1)
    code = np.unique(pairs[:, 0] * len(hashes) + pairs[:, 1])
    return np.stack(np.divmod(code, max(1, len(hashes))), 1)


def pairs_in_common(hashes: np.ndarray, mask: np.uint64) -> Iterator[np.ndarray]:
    """Pairs (P, 2) that agree in the bits of the mask, some at a time."""
    keys = hashes & mask
    order = np.argsort(keys)
    keys = keys[order]
    at, ahead = np.arange(len(keys)), 1
    while len(at):
        at = at[at + ahead < len(keys)]
        at = at[keys[at] == keys[at + ahead]]
        yield np.stack([order[at], order[at + ahead]], 1)
        ahead += 1


def same_pictures(pixels: np.ndarray) -> np.ndarray:
    """(N,) pixel hashes -> (N,) number of each picture's group of equal ones."""
    return np.unique(pixels, return_inverse=True)[1]


def alike_pictures(seen: np.ndarray, thumbnails: np.ndarray, radius: int = NEAR) -> np.ndarray:
    """(N,) perceptual hashes, (N, 64) thumbnails -> (N,) number of each picture's group of those that look the same.

    Two belong together when their hashes are at most `radius` bits apart and their thumbnails `ALIKE` grey levels, or
    when a chain of such pairs joins them. Hashes alone would join a few unrelated pictures in a million pairs, which
    in a million pictures is most of what they would find.
    """
    order = np.lexsort((thumbnails.mean(1), seen))  # equal hashes side by side, the dark ones first
    beside = np.stack([order[:-1], order[1:]], 1)[seen[order[:-1]] == seen[order[1:]]]
    first = np.unique(seen, return_index=True)[1]
    pairs = np.concatenate([beside, first[near_pairs(seen[first], radius)]])
    return groups_of(len(seen), pairs[confirmed(thumbnails, pairs)])


def confirmed(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(P,) whether the thumbnails of each pair differ by `ALIKE` grey levels or less on average."""
    verdicts = [np.zeros(0, bool)]
    for part in np.array_split(pairs, len(pairs) // CHUNK + 1):
        differences = thumbnails[part[:, 0]].astype(np.int16) - thumbnails[part[:, 1]]
        verdicts.append(np.abs(differences).mean(1) <= ALIKE)
    return np.concatenate(verdicts)


def groups_of(count: int, pairs: np.ndarray) -> np.ndarray:
    """Number of the group of each of `count` things, (count,): things that a chain of pairs joins have one number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    joined = coo_array((np.ones(len(pairs), np.uint8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(joined, directed=False)[1]
