"""Stacks of pictures in NumPy files."""

import numpy as np
import pytest

from ssd.data.pictures import decode
from ssd.data.sources import open_source
from ssd.errors import UserError


def stack(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(6, 9, 7), (6, 9, 7, 3), (6, 9, 7, 13)])
def test_a_npy_is_mapped(tmp_path, shape):
    pictures = stack(*shape)
    np.save(tmp_path / "x.npy", pictures)
    source = open_source(tmp_path / "x.npy")
    assert len(source) == 6 and source.labels is None and source.classes is None
    assert isinstance(source._array(), np.memmap)
    assert np.array_equal(source.open(4), pictures[4])


def test_channels_may_come_first(tmp_path):
    pictures = stack(5, 4, 20, 30)
    np.save(tmp_path / "x.npy", pictures)
    assert np.array_equal(open_source(tmp_path / "x.npy").open(2), pictures[2].transpose(1, 2, 0))


def test_labels_lie_beside_a_npy_and_in_a_npz(tmp_path):
    pictures, labels = stack(6, 9, 7), np.array([0, 1, 2, 0, 1, 2])
    np.save(tmp_path / "x.npy", pictures)
    np.save(tmp_path / "x-labels.npy", labels)
    np.savez(tmp_path / "y.npz", images=pictures, labels=labels[:, None])
    for name in ("x.npy", "y.npz"):
        source = open_source(tmp_path / name)
        assert source.labels.tolist() == labels.tolist() and source.label(2) == 2
        assert np.array_equal(source.open(3), pictures[3])
        assert open_source(tmp_path / name, labels=False).labels is None


def test_the_fingerprint_follows_the_content(tmp_path):
    pictures = stack(6, 9, 7)
    np.save(tmp_path / "x.npy", pictures)
    first = open_source(tmp_path / "x.npy").fingerprint()
    assert first == open_source(tmp_path / "x.npy").fingerprint()
    pictures[5, 0, 0] ^= 1
    np.save(tmp_path / "x.npy", pictures)
    assert first != open_source(tmp_path / "x.npy").fingerprint()


@pytest.mark.parametrize(
    "save, said",
    [
        (lambda path: np.save(path, stack(6, 9)), "shape"),
        (lambda path: np.save(path, stack(0, 9, 7)), "no pictures"),
        (lambda path: path.write_bytes(b"words"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.save(path, np.array([{"a": 1}]), allow_pickle=True), "cannot be read|shape"),
    ],
)
def test_what_is_no_stack_is_said(tmp_path, save, said):
    save(tmp_path / "x.npy")
    with pytest.raises(UserError, match=said):
        open_source(tmp_path / "x.npy")


def test_labels_that_do_not_fit_are_said(tmp_path):
    np.save(tmp_path / "x.npy", stack(6, 9, 7))
    np.save(tmp_path / "x_labels.npy", np.zeros(5, int))
    with pytest.raises(UserError, match="6 whole numbers"):
        open_source(tmp_path / "x.npy")


def test_a_npz_without_pictures_names_what_it_has(tmp_path):
    np.savez(tmp_path / "x.npz", weights=np.zeros(3))
    with pytest.raises(UserError, match=r"weights.*images"):
        open_source(tmp_path / "x.npz")


def test_pictures_of_a_stack_decode_like_any(tmp_path):
    pictures = stack(6, 9, 7, dtype=np.uint16)
    np.save(tmp_path / "x.npy", pictures)
    assert decode(open_source(tmp_path / "x.npy").open(0), 1).shape == (9, 7, 1)
