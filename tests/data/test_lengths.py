"""Batches by length: a function of (seed, epoch), every sound at most once, within what a step may hold."""

import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd.data import lengths as module
from ssd.data.broken import BrokenSamples
from ssd.data.lengths import BIN, LengthSampler, counted_lengths, lengths_at
from ssd.data.media import MediaFiles
from ssd.data.sound import SOUND_SUFFIXES
from ssd.data.sources import Subset
from ssd.errors import UserError
from tests.data.media_files import wav_bytes, write_digits

WORLD = 2


def files(folder) -> MediaFiles:
    return MediaFiles(folder, suffixes=SOUND_SUFFIXES, word="sound")


def lengths(count: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1000, 30_000, count)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(20, 300), most=st.integers(30_000, 200_000), world=st.integers(1, 3), multiple=st.integers(1, 3),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_every_step_keeps_its_limit_and_no_sound_comes_twice(count, most, world, multiple, seed):
    given_lengths = lengths(count, seed)
    samplers = [
        LengthSampler(given_lengths, most, rank=rank, world=world, seed=seed, multiple=multiple)
        for rank in range(world)
    ]
    ranks = [list(sampler) for sampler in samplers]
    seen = []
    for parts in zip(*ranks, strict=True):
        rows = [[index for _, index, *_ in part] for part in parts]
        padded = {longest for part in parts for *_, longest in part}
        capped = np.minimum(given_lengths, most // multiple)[np.concatenate(rows)]
        assert padded == {capped.max()}, "all ranks pad to the same"
        assert len({len(part) for part in parts}) == 1 and len(parts[0]) % multiple == 0
        assert len(parts[0]) * capped.max() <= most
        seen += np.concatenate(rows).tolist()
    assert len(seen) == len(set(seen)) > count - world * multiple
    assert len(ranks[0]) == len(samplers[0])


def test_the_number_of_steps_is_that_of_every_epoch_and_their_order_of_its_own():
    sampler = LengthSampler(lengths(), 100_000, world=WORLD)
    epochs = [sampler.steps(epoch) for epoch in range(4)]
    assert {len(steps) for steps in epochs} == {len(sampler)}
    again = LengthSampler(lengths(), 100_000, world=WORLD).steps(2)
    assert all(np.array_equal(a, b) for a, b in zip(epochs[2], again, strict=True))
    members = [{frozenset(step.tolist()) for step in steps} for steps in epochs]
    assert len(members[0] & members[1]) < len(members[0]) / 2, "other sounds come together"
    other = LengthSampler(lengths(), 100_000, world=WORLD, seed=1).steps(2)
    assert any(not np.array_equal(a, b) for a, b in zip(epochs[2], other, strict=True))


def test_little_is_padded():
    given_lengths = lengths(2000)
    steps = LengthSampler(given_lengths, 200_000).steps(0)
    padded = sum(given_lengths[step].max() * len(step) for step in steps)
    # within a bin at most BIN, and a step that spans two bins at most its square
    assert padded / given_lengths.sum() < BIN


def test_a_run_goes_on_with_the_step_after_the_last_one_done():
    done = 0
    sampler = LengthSampler(lengths(), 100_000, steps_done=lambda: done)
    whole = list(sampler)
    done = 7
    assert list(sampler) == whole[7:]
    done = len(sampler)
    assert list(sampler) == list(LengthSampler(lengths(), 100_000, steps_done=lambda: len(sampler)))
    assert next(iter(sampler))[0][0] == 1


def test_sounds_of_no_length_are_left_out_and_too_few_are_refused():
    steps = LengthSampler(np.array([0, 500, 500, 0, 500]), 1000).steps(0)
    assert sorted(np.concatenate(steps).tolist()) == [1, 2, 4]
    with pytest.raises(UserError, match="2 training sounds do not fill one step of 3 processes"):
        LengthSampler(np.array([10, 10]), 1000, world=3)


def test_lengths_are_counted_once_kept_and_counted_anew_when_a_file_changes(tmp_path, monkeypatch):
    folder = write_digits(tmp_path / "digits")
    broken = folder / "0_ada_1.wav"
    broken.write_bytes(wav_bytes(np.zeros(0)))
    first = counted_lengths(files(folder))
    assert first.shape == (36, 2) and first[1].tolist() == [0, 0]
    assert first[0].tolist() == [800, 8000]
    opened = []

    class Watched(module.Sound):
        def __init__(self, file):
            opened.append(file)
            super().__init__(file)

    monkeypatch.setattr(module, "Sound", Watched)
    assert np.array_equal(counted_lengths(files(folder)), first) and not opened
    broken.write_bytes(wav_bytes(np.zeros(123)))
    assert counted_lengths(files(folder))[1].tolist() == [123, 8000]
    assert len(files(folder)) == 36, "what is kept is no sound"


def test_a_folder_that_may_not_be_written_to_is_counted_all_the_same(tmp_path, monkeypatch):
    folder = write_digits(tmp_path / "digits", counts=1)

    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr(module.np, "save", refuse)
    assert counted_lengths(files(folder))[:, 1].tolist() == [8000] * 9
    assert not list(folder.glob(".*"))


def test_a_sound_that_could_not_be_read_once_is_not_left_out_for_ever(tmp_path, monkeypatch):
    folder = write_digits(tmp_path / "digits", counts=1)

    def away(*_):
        raise OSError("the disk does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(module, "Sound", away)
        assert not counted_lengths(files(folder)).any()
    broken = BrokenSamples(files(folder), 0.5, multiprocessing.get_context("fork"), "sound")
    assert lengths_at(files(folder), 8000, broken).min() >= 800 and not len(broken)


def test_what_one_rank_cannot_read_no_rank_takes(tmp_path, monkeypatch):
    folder = write_digits(tmp_path / "digits", counts=1)
    (folder / "0_bob_0.wav").write_bytes(b"words")
    found = []
    for other in ([4, 1], []):
        monkeypatch.setattr(module, "gather_objects", lambda mine, other=other: [mine, other])
        broken = BrokenSamples(files(folder), 0.5, multiprocessing.get_context("fork"), "sound")
        found.append(np.flatnonzero(lengths_at(files(folder), 8000, broken) == 0).tolist())
        assert len(broken) == len(found[-1])
    assert found == [[1, 4], [1]]


def test_lengths_are_those_at_the_views_rate_and_broken_files_are_counted(tmp_path):
    folder = write_digits(tmp_path / "digits")
    (folder / "0_ada_1.wav").write_bytes(b"words")
    chosen = Subset(Subset(files(folder), np.arange(10)), np.array([0, 1, 5]))
    broken = BrokenSamples(chosen, 0.5, multiprocessing.get_context("fork"), "sound")
    assert lengths_at(chosen, 16_000, broken).tolist() == [1600, 0, 2 * round(0.13 * 8000)]
    assert len(broken) == 1
