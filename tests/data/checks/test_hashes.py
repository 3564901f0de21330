"""Same pictures are found, others are not, and the search misses no pair."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers
from PIL import Image

from ssd.data.checks import hashes
from ssd.data.checks.hashes import (
    alike_pictures,
    distances,
    frequencies,
    near_pairs,
    perceptual_hash,
    pixel_hash,
    same_pictures,
    small_picture,
    thumbnail,
)
from tests.data.files import scene


def looks(picture: np.ndarray) -> tuple[int, np.ndarray]:
    small = small_picture(picture)
    return perceptual_hash(small), thumbnail(small)


def groups(pictures: list[np.ndarray]) -> list[int]:
    seen, thumbnails = zip(*map(looks, pictures), strict=True)
    return alike_pictures(np.array(seen, np.uint64), np.stack(thumbnails)).tolist()


def detailed(seed: int) -> np.ndarray:
    return scene(120, 160, seed, detail=3)


def again(picture: np.ndarray, quality: int = 50, scale: float = 1.0) -> np.ndarray:
    """Resized, and through a JPEG."""
    image = Image.fromarray(picture)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return np.array(Image.open(out))


def test_the_basis_is_the_cosine_transform_of_scipy():
    from scipy.fft import dctn

    small = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    rows, columns, basis = frequencies()
    expected = dctn(small, type=2)[rows, columns] / 4
    np.testing.assert_allclose((basis @ small @ basis.T)[rows, columns], expected, atol=1e-3)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 64
    assert (0, 0) not in zip(rows.tolist(), columns.tolist(), strict=True)
    assert (rows + columns).max() <= 10, "the lowest ones"


@given(integers(0, 2**64 - 1), integers(0, 2**64 - 1))
def test_the_distance_is_the_number_of_differing_bits(first, second):
    found = distances(np.array([first], np.uint64), np.array([second], np.uint64))
    assert found.tolist() == [(first ^ second).bit_count()]


@pytest.mark.parametrize("radius", [0, 1, 3, 4, 7])
def test_the_search_finds_every_pair_within_the_radius_and_no_other(radius):
    """Against all pairs, on clusters whose members lie at every distance from 0 bits on."""
    rng = np.random.default_rng(radius)
    centres = rng.integers(0, 2**64, 20, dtype=np.uint64)
    flipped = [sum(1 << int(bit) for bit in rng.permutation(64)[: number % 12]) for number in range(400)]
    drawn = np.unique(np.repeat(centres, 20) ^ np.array(flipped, np.uint64))
    first, second = np.triu_indices(len(drawn), 1)
    near = distances(drawn[first], drawn[second]) <= radius
    expected = np.stack([first[near], second[near]], 1)
    assert near_pairs(drawn, radius).tolist() == expected.tolist()
    assert radius < 3 or len(expected) > 100, "there is something to find"


def test_two_hashes_that_differ_in_one_block_each_are_found():
    """The worst case of the pigeonhole: every differing bit in another block."""
    low = np.uint64(0)
    high = np.uint64(1 | 1 << 11 | 1 << 22 | 1 << 33)
    assert near_pairs(np.array([low, high]), 4).tolist() == [[0, 1]]
    assert near_pairs(np.array([low, high]), 3).tolist() == []
    assert near_pairs(np.zeros(0, np.uint64)).shape == near_pairs(np.zeros(1, np.uint64)).shape == (0, 2)
    with pytest.raises(ValueError, match="radius is 63"):
        near_pairs(np.zeros(2, np.uint64), 63)


@pytest.mark.parametrize("change", [{"quality": 30}, {"scale": 0.5}, {"scale": 2.0, "quality": 90}, {"scale": 1.2}])
def test_a_picture_compressed_or_resized_again_is_the_same_picture(change):
    pictures = [detailed(seed) for seed in range(20)]
    found = groups(pictures + [again(picture, **change) for picture in pictures])
    # of real photographs 99 of 100 are within 4 bits, at quality 30 as well as at half the size
    assert sum(map(int.__eq__, found[:20], found[20:])) >= 19 and len(set(found)) <= 21


def test_other_pictures_and_other_shades_are_not():
    pictures = [detailed(seed) for seed in range(60)] + [np.rint(detailed(0) * 0.7).astype(np.uint8)]
    assert len(set(groups(pictures))) == 61
    bits = [looks(picture)[0] for picture in (pictures[0], pictures[-1])]
    assert (bits[0] ^ bits[1]).bit_count() <= hashes.NEAR, "the hash alone cannot tell shades apart"


def test_equal_pixels_are_the_same_whatever_holds_them_and_a_single_level_is_another():
    picture = scene()
    assert pixel_hash(picture) == pixel_hash(np.asfortranarray(picture)) != pixel_hash(picture.transpose(1, 0, 2))
    other = picture.copy()
    other[3, 4, 1] ^= 1
    assert pixel_hash(other) != pixel_hash(picture)
    assert pixel_hash(np.zeros((2, 3, 1), np.uint8)) != pixel_hash(np.zeros((3, 2, 1), np.uint8))
    assert same_pictures(np.array([5, 2, 5, 9], np.uint64)).tolist() == [1, 0, 1, 2]


def test_a_chain_of_pairs_is_one_group_and_equal_hashes_alone_are_none():
    chain = np.cumsum([1 << (5 * number) for number in range(10)]).astype(np.uint64)
    flat = np.zeros((10, 64), np.uint8)
    assert len(set(alike_pictures(chain, flat, radius=1).tolist())) == 1
    apart = np.repeat(np.arange(10, dtype=np.uint8)[:, None] * 20, 64, 1)
    assert len(set(alike_pictures(np.zeros(10, np.uint64), apart).tolist())) == 10


def test_the_search_does_not_compare_all_with_all(monkeypatch):
    compared = []
    counted = hashes.distances
    monkeypatch.setattr(hashes, "distances", lambda a, b: compared.append(len(a)) or counted(a, b))
    drawn = np.unique(np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64))
    near_pairs(drawn)
    assert sum(compared) < 100_000, "of 1.2 billion pairs"


@pytest.mark.data
def test_photographs_that_are_known_to_repeat_are_found_and_similar_ones_are_not(real_data):
    """Looked at one by one: by the hash alone, 8 of 13 pairs are different motorcycles before white."""
    from ssd.data.pictures import decode
    from ssd.data.sources import open_source

    source = open_source(real_data / "caltech20")
    found = groups([decode(source.open(index)) for index in range(len(source))])
    repeats: dict[int, list[str]] = {}
    for index, group in enumerate(found):
        repeats.setdefault(group, []).append(source.describe(index).rpartition("caltech20/")[2].replace("image_00", ""))
    pairs = {tuple(sorted(names)) for names in repeats.values() if len(names) > 1}
    known = {
        ("grand_piano/06.jpg", "grand_piano/14.jpg"),
        ("grand_piano/41.jpg", "grand_piano/51.jpg"),
        ("kangaroo/15.jpg", "kangaroo/25.jpg"),
        ("kangaroo/35.jpg", "kangaroo/50.jpg"),
        ("ketch/35.jpg", "ketch/41.jpg"),
    }
    assert known <= pairs and len(pairs - known) <= 1
