"""Loaders of sounds: the same batches however they are loaded, padding told from sound, labels from names."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.sound import Sound
from ssd.data.sound import Sound as SoundFile
from ssd.errors import UserError
from ssd.record import build, describe
from ssd.views.sound import SoundViews
from tests.data.media_files import sine, wav_bytes, write_digits
from tests.datamodules.test_pictures import batches as picture_batches
from tests.datamodules.test_pictures import equal, in_trainer

VIEWS = SoundViews(rate_hz=8000, global_length_s=0.15, local_length_s=0.05, local_count=2)
WHOLE = SoundViews(
    rate_hz=8000, global_length_s=None, global_count=1, local_count=0, noise_prob=0.0, gain_db=(0.0, 0.0)
)
LABELS = "^(?P<label>[0-9])_"
HELD_OUT = "_[0][.]wav$"
SPEAKERS = "_([a-z]+)_"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_digits(tmp_path / "digits")


def batches(data: Sound, views=VIEWS, **place):
    return picture_batches(data, views=views, **place)


def names(source) -> list[str]:
    return [Path(source.describe(index)).name for index in range(len(source))]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("by_length", [False, True])
def test_workers_change_no_bit_of_any_batch(folder, workers, by_length):
    (folder / "1_bob_2.wav").write_bytes(wav_bytes(np.zeros(0)))
    settings = {"batch_size": 6, "max_broken_share": 0.1, "seed": 3, "label_pattern": LABELS}
    settings |= {"batch_seconds": 1.0} if by_length else {}
    views = WHOLE if by_length else VIEWS
    alone = batches(Sound(folder, num_workers=0, **settings), views, step=2)
    apart = batches(Sound(folder, num_workers=workers, **settings), views, step=2)
    assert len(alone) == len(apart) > 2
    assert all(equal(a, b) for a, b in zip(alone, apart, strict=True))


def test_views_are_padded_and_valid_says_where(folder):
    shortest = 1200
    for batch in batches(Sound(folder, batch_size=6, num_workers=0)):
        assert batch.views["global"].shape == (2, 6, 1200) and batch.views["local"].shape == (2, 6, 400)
        for kind, views in batch.views.items():
            valid = batch.valid[kind]
            assert valid.dtype == torch.bool and valid.shape == views.shape and views.dtype == torch.float32
            assert not views[~valid].any() and views[valid].std() > 0.1
            assert (valid.long().diff(dim=-1) <= 0).all(), "padding is at the end"
        assert batch.valid["local"].all(), "every sound is longer than 0.05 s"
        lengths = batch.valid["global"].sum(-1)
        assert torch.equal(lengths[0], lengths[1])
        shortest = min(shortest, int(lengths.min()))
        part = batch.part(2, 3)
        assert torch.equal(part.valid["global"], batch.valid["global"][:, 4:])
    assert 800 <= shortest < 1200, "the shortest have 0.1 s of 0.15"


def test_a_view_is_that_part_of_the_file_at_the_views_rate(folder):
    """No noise, no gain: a crop of the file at 16 kHz, as long as the view or the file."""
    views = SoundViews(
        rate_hz=16_000, global_length_s=0.1, global_count=1, local_count=0, noise_prob=0.0, gain_db=(0.0, 0.0)
    )
    data = in_trainer(Sound(folder, batch_size=9, num_workers=0), views=views)
    for batch in data.train_dataloader():
        for column, index in enumerate(batch.index.tolist()):
            with SoundFile(data.source.open(index)) as sound:
                whole = sound.read_at(16_000)
            view = batch.views["global"][0, column].numpy()
            places = np.lib.stride_tricks.sliding_window_view(whole, len(view))
            assert np.abs(places - view).max(1).min() < 1e-6


def test_two_ranks_see_the_halves_of_what_one_process_sees(folder):
    whole = batches(Sound(folder, batch_size=8, num_workers=0))
    halves = [batches(Sound(folder, batch_size=4, num_workers=0), rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for number, part in enumerate(parts):
            assert part.total == 8 and equal(part, batch.part(number, 2))


def test_batches_by_length_hold_so_much_sound_whole_and_the_same_on_every_rank(folder):
    settings = {"batch_seconds": 0.8, "num_workers": 0, "val_share": 0.0}
    ranks = [batches(Sound(folder, **settings), WHOLE, rank=rank, world=2, micro_batches=2) for rank in (0, 1)]
    seen = []
    for pair in zip(*ranks, strict=True):
        assert len({batch.views["global"].shape for batch in pair}) == 1
        for batch in pair:
            _, count, size = batch.views["global"].shape
            assert count % 2 == 0 and count * size <= 6400 and batch.total == 2 * count
            assert batch.valid["global"].float().mean() > 0.75
            seen += batch.index.tolist()
        assert max(batch.valid["global"].sum(-1).max() for batch in pair) == pair[0].views["global"].shape[-1]
    assert len(seen) == len(set(seen)) >= 33
    one = batches(Sound(folder, **settings), WHOLE, micro_batches=4)
    assert {batch.total % 4 for batch in one} == {0}


def test_a_long_sound_is_cut_to_what_a_step_may_hold(folder):
    (folder / "9_long_0.wav").write_bytes(wav_bytes(0.5 * sine(300, 8000, 3.0)))
    data = Sound(folder, batch_seconds=0.5, num_workers=0)
    assert max(batch.views["global"].shape[-1] for batch in batches(data, WHOLE)) == 4000


def test_whole_sounds_by_count_are_padded_to_the_longest_of_their_batch(folder):
    for batch in batches(Sound(folder, batch_size=5, num_workers=0), WHOLE):
        assert batch.valid["global"].any(0).any(0)[-1] and batch.total == 5


def test_a_restart_goes_on_with_the_very_next_batch(folder):
    settings = {"batch_seconds": 1.0, "label_pattern": LABELS}
    whole = batches(Sound(folder, num_workers=0, **settings), WHOLE)
    resumed = batches(Sound(folder, num_workers=1, **settings), WHOLE, step=3)
    assert len(resumed) == len(whole) - 3 and all(equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))


# ---------------------------------------------------------------- odd files


def test_odd_files_are_read_and_broken_ones_counted_named_and_replaced(tmp_path, caplog):
    soundfile = pytest.importorskip("soundfile")
    tone = 0.5 * sine(300, 8000, 0.3)
    good = {f"bits_{8 * width}.wav": wav_bytes(tone, width=width) for width in (1, 2, 3, 4)}
    good["stereo.wav"] = wav_bytes(np.stack([tone, tone], 1))
    good["cut.wav"] = wav_bytes(tone)[:2000]
    good["other_rate.wav"] = wav_bytes(0.5 * sine(300, 44100, 0.3), 44100)
    (tmp_path / "all").mkdir()
    for name, data in good.items():
        (tmp_path / "all" / name).write_bytes(data)
    soundfile.write(tmp_path / "all" / "extensible.wav", tone, 8000, format="WAVEX")
    soundfile.write(tmp_path / "all" / "lossless.flac", tone, 8000)
    bad = {"empty.wav": wav_bytes(tone[:0]), "header.wav": wav_bytes(tone)[:44], "words.wav": b"these are words"}
    for name, data in bad.items():
        (tmp_path / "all" / name).write_bytes(data)
    views = SoundViews(
        rate_hz=8000, global_length_s=0.1, global_count=1, local_count=0, noise_prob=0.0, gain_db=(0.0, 0.0)
    )
    data = Sound(tmp_path / "all", batch_size=12, num_workers=0, max_broken_share=0.3)
    with caplog.at_level(logging.WARNING):
        (batch,) = batches(data, views)
    seen = [Path(data.source.describe(index)).name for index in batch.index.tolist()]
    assert set(seen) == {*good, "extensible.wav", "lossless.flac"}
    # whatever file it comes from, it is the same tone, of root mean square 0.5 / sqrt(2)
    assert torch.allclose(batch.views["global"].pow(2).mean(-1).sqrt(), torch.tensor(0.3536), atol=0.01)
    assert len(data._training.broken) == 3
    for name in bad:
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(UserError, match=r"3 of 12 sounds cannot be read.*max_broken_share"):
        batches(Sound(tmp_path / "all", batch_size=12, num_workers=0, max_broken_share=0.2), views)


def test_views_of_a_compressed_file_that_was_cut_lie_in_what_there_is(tmp_path):
    """The header of an MP3 states the length that it once had."""
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "all").mkdir()
    for number in range(4):
        path = tmp_path / "all" / f"{number}.mp3"
        soundfile.write(path, np.random.default_rng(number).uniform(-0.5, 0.5, 32_000), 16_000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    views = SoundViews(rate_hz=16_000, global_length_s=1.0, local_length_s=0.2, noise_prob=0.0)
    for epoch in range(5):
        (batch,) = batches(Sound(tmp_path / "all", batch_size=4, num_workers=0), views, step=epoch)
        assert batch.valid["local"].float().mean() > 0.9 and batch.valid["global"].any(-1).all()


# ---------------------------------------------------------------- labels, parts, evaluation


def test_labels_and_the_held_out_part_come_from_names(folder):
    data = Sound(folder, label_pattern=LABELS, held_out_pattern=HELD_OUT, num_workers=0, batch_size=4)
    in_trainer(data, views=VIEWS)
    training, bank, held = data._parts
    assert bank is training and data.num_classes == 3
    assert sorted(names(held)) == sorted(name for name in names(data._sources[0]) if name.endswith("_0.wav"))
    assert len(training) == 27 and len(held) == 9
    for source in (training, held):
        assert source.labels.tolist() == [int(name[0]) for name in names(source)]


def test_groups_are_held_out_whole(folder):
    data = Sound(folder, label_pattern=LABELS, group_by=SPEAKERS, val_share=0.3, num_workers=0)
    speakers = [{name.split("_")[1] for name in names(part)} for part in (data._parts[0], data._parts[2])]
    assert len(speakers[0]) == 2 and len(speakers[1]) == 1 and not speakers[0] & speakers[1]


def test_a_held_out_part_without_labels_is_looked_at_alone(folder):
    data = in_trainer(Sound(folder, held_out_pattern=HELD_OUT, num_workers=0, batch_size=4), views=VIEWS)
    (loader,) = data.val_dataloader()
    assert len(loader.dataset) == 9 and len(data.source) == 27


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_pattern": "([0-9])"}, "no group 'label'"),
        ({"label_pattern": "(?P<label>[0-9"}, "no regular expression"),
        ({"label_pattern": "(?P<label>[0-1])_"}, r"finds nothing in '2_ada_0.wav' \(12 of 36 paths\)"),
        ({"held_out_pattern": "wav"}, "found in 36 of 36 paths"),
        ({"held_out_pattern": "_7"}, "found in 0 of 36 paths"),
        ({"held_out_pattern": "_0", "val_path": "elsewhere"}, "held_out_pattern is '_0' and val_path is 'elsewhere'"),
        ({"group_by": "wav", "label_pattern": LABELS}, "puts all of the 36 samples in one group"),
        ({"batch_seconds": 1.0}, "batch_seconds is 1 and all views have one length"),
    ],
)
def test_mistakes_that_show_with_the_data(folder, settings, message):
    with pytest.raises(UserError, match=message):
        batches(Sound(folder, batch_size=4, num_workers=0, **settings))


def test_evaluation_shows_the_middle_of_each_sound_as_it_is(folder):
    data = in_trainer(
        Sound(folder, batch_size=5, num_workers=0, label_pattern=LABELS, max_broken_share=0.1), views=VIEWS
    )
    (folder / "0_ada_1.wav").unlink()
    found = {}
    for loader, source in zip(data.val_dataloader(), data._parts[1:], strict=True):
        for batch in loader:
            assert batch["sample"].shape == batch["valid"].shape and batch["sample"].shape[1] == 1200
            for row, index in enumerate(batch["index"].tolist()):
                found[source.describe(index)] = batch["sample"][row][batch["valid"][row]]
                assert batch["label"][row] == source.label(index)
    assert len(found) == 35
    for path, sample in found.items():
        with SoundFile(open(path, "rb")) as sound:
            whole = sound.read()
        start = max(0, (len(whole) - 1200) // 2)
        assert np.array_equal(sample.numpy(), whole[start : start + 1200])


def test_a_record_builds_the_same_data(folder):
    data = Sound(folder, batch_size=4, num_workers=0, label_pattern=LABELS, held_out_pattern=HELD_OUT, limit=20)
    assert equal(batches(data)[0], batches(build(describe(data)))[0])
    assert data.describe_state() == {"seed": 0, "fingerprint": data.fingerprint()}


@pytest.mark.data
def test_the_spoken_digits_are_divided_as_is_customary(real_data):
    pattern = "(?P<label>[0-9])_[a-z]+_[0-9]+[.]wav$"
    data = Sound(real_data / "fsdd", label_pattern=pattern, held_out_pattern="_[0-4][.]wav$", num_workers=0)
    training, _, held = data._parts
    assert (len(training), len(held), data.num_classes) == (2700, 300, 10)
    data.prepare(SoundViews(rate_hz=16_000, global_length_s=1.0, local_count=0))
    batch = next(iter(data.train_dataloader()))
    assert batch.views["global"].shape == (2, 64, 16_000) and len(data._training.broken) == 0


# ---------------------------------------------------------------- equal lengths


def test_cropped_to_the_shortest_nothing_is_padding(folder):
    views = replace(WHOLE, crop_to_shortest=True)
    padded = batches(Sound(folder, batch_size=6, num_workers=0), WHOLE)
    cropped = batches(Sound(folder, batch_size=6, num_workers=0), views)
    assert any(not batch.valid["global"].all() for batch in padded)
    for whole, cut in zip(padded, cropped, strict=True):
        assert torch.equal(whole.index, cut.index) and cut.valid["global"].all()
        shortest = int(whole.valid["global"].sum(-1).min())
        assert cut.views["global"].shape[-1] == shortest
        for long, short in zip(whole.views["global"][0], cut.views["global"][0]):
            assert (long.unfold(0, shortest, 1) == short).all(1).any(), "a part of the sound"


def test_sounds_below_the_shortest_are_left_out_of_training_and_said(folder):
    (folder / "1_bob_9.wav").write_bytes(wav_bytes(sine(440, 8000, seconds=0.01)))
    with pytest.warns(UserWarning, match="1 of .* sounds are shorter than 0.05 s"):
        data = Sound(folder, batch_size=2, num_workers=0, shortest_s=0.05, labels=False)
        kept = names(data.source)
    assert "1_bob_9.wav" not in kept and len(kept) == len(data.everything) - 1
    with pytest.raises(UserError, match="every sound is shorter"):
        _ = Sound(folder, shortest_s=100.0, labels=False).source
