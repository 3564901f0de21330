"""Sound files of every kind, and a resampler that can be checked on paper."""

import io
import struct
import sys
import wave

import numpy as np
import pytest

from ssd.data.sound import BrokenSound, Sound, pcm, ratio, resample, resampled_length
from ssd.errors import UserError
from tests.data.media_files import sine, wav_bytes


def read(data: bytes) -> np.ndarray:
    with Sound(data) as sound:
        samples = sound.read()
        assert len(samples) == sound.length
        return samples


def snr_db(samples: np.ndarray, reference: np.ndarray) -> float:
    return 10 * np.log10(np.mean(reference**2) / np.mean((samples - reference) ** 2))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_any_width_are_read_to_half_a_step(width):
    samples = 0.9 * sine(440, 8000)
    step = 2.0 ** (1 - 8 * width)
    # float32 has 24 bits
    assert np.abs(read(wav_bytes(samples, width=width)) - samples).max() <= max(step / 2, 2**-24) + 1e-9


def test_the_ends_of_the_range():
    assert pcm(bytes([0, 128, 255]), 1).tolist() == [-1, 0, 127 / 128]
    assert pcm(struct.pack("<hhh", -32768, 0, 32767), 2).tolist() == [-1, 0, 32767 / 32768]
    assert pcm(b"\x00\x00\x80\x00\x00\x00\x01\x00\x00", 3).tolist() == [-1, 0, 2**-23]
    assert pcm(struct.pack("<ii", -(2**31), 2**30), 4).tolist() == [-1, 0.5]


def test_channels_are_averaged():
    left, right = sine(440, 8000), np.zeros(4000)
    both = read(wav_bytes(0.5 * np.stack([left, right], 1)))
    assert np.abs(both - 0.25 * left).max() < 2**-15


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "FLOAT"), ("WAVEX", "PCM_16"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16")]
)
def test_what_the_standard_library_does_not_read_soundfile_does(kind, subtype):
    soundfile = pytest.importorskip("soundfile")
    samples = 0.8 * sine(300, 16000)
    out = io.BytesIO()
    soundfile.write(out, samples, 16000, format=kind, subtype=subtype)
    if kind != "FLAC":
        with pytest.raises(wave.Error):
            wave.open(io.BytesIO(out.getvalue()))  # noqa: SIM115
    with Sound(out.getvalue()) as sound:
        assert (sound.rate_hz, sound.length) == (16000, 8000)
        assert np.abs(sound.read() - samples).max() < 2**-15
        assert np.array_equal(sound.read(100, 50), sound.read()[100:150])


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_files_keep_the_tone(kind, subtype):
    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, 0.5 * sine(1000, 16000, 1.0), 16000, format=kind, subtype=subtype)
    samples = read(out.getvalue())
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert spectrum.argmax() * 16000 / len(samples) == pytest.approx(1000, abs=2)


def test_a_wav_that_is_cut_short_or_was_never_finished_gives_what_is_there():
    samples = 0.5 * sine(440, 8000)
    data = wav_bytes(samples)
    whole = read(data)
    assert np.array_equal(read(data[: 44 + 2 * 1000]), whole[:1000])
    assert np.array_equal(read(data[: 44 + 2 * 1000 + 1]), whole[:1000]), "in the middle of a sample"
    endless = data[:4] + b"\xff\xff\xff\xff" + data[8:40] + b"\xff\xff\xff\xff" + data[44:]
    assert np.array_equal(read(endless), whole), "written to a pipe, its length unknown"


@pytest.mark.parametrize(
    "data",
    [
        wav_bytes(np.zeros(0)),
        wav_bytes(np.zeros(100))[:44],
        wav_bytes(np.zeros(100))[:30],
        b"",
        b"words, not sound" * 9,
    ],
    ids=["no samples", "a header alone", "half a header", "empty", "words"],
)
def test_what_holds_no_sound_says_so(data):
    pytest.importorskip("soundfile")
    with pytest.raises(BrokenSound), Sound(data):
        pass


def test_a_compressed_file_that_ends_before_its_header_says_is_broken_where_nothing_is_left():
    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, 0.5 * sine(300, 16000, 1.0), 16000, format="OGG", subtype="VORBIS")
    with Sound(out.getvalue()) as sound:
        sound.length *= 2
        assert len(sound.read(0, 16000)) == 16000
        with pytest.raises(BrokenSound):
            sound.read(20_000, 1000)


def test_at_another_rate_too_a_part_behind_the_end_is_broken_and_not_empty():
    with Sound(wav_bytes(np.zeros(1000))) as sound:
        sound.length = 4000
        assert len(sound.read_at(16_000, 1900, 500)) == 100
        with pytest.raises(BrokenSound, match="ends before sample 2010 at 16000 Hz"):
            sound.read_at(16_000, 2010, 50)


def test_without_soundfile_pcm_is_read_and_the_extra_named_for_the_rest(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert len(read(wav_bytes(np.zeros(10)))) == 10
    with pytest.raises(UserError, match=r"pip install ssd\[audio\]"):
        Sound(b"fLaC and so on")


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize(
    ("before", "after"), [(44100, 16000), (8000, 16000), (48000, 16000), (11025, 16000), (16000, 8000)]
)
@pytest.mark.parametrize("share", [0.05, 0.4, 0.78])
def test_a_sine_stays_a_sine(before, after, share):
    """To 100 dB, what the filter is made for; `share` is of the lower Nyquist frequency."""
    hz = share * min(before, after) / 2
    samples = resample(sine(hz, before, 1.0).astype(np.float32), before, after)
    assert len(samples) == resampled_length(before, before, after) == after
    inside = slice(after // 20, -after // 20)  # the filter reaches beyond the ends, into silence
    assert snr_db(samples[inside], sine(hz, after, 1.0)[inside]) > 95


def test_what_the_new_rate_cannot_hold_is_gone():
    for hz in (8100, 12000, 20000):
        samples = resample(sine(hz, 44100, 1.0).astype(np.float32), 44100, 16000)[800:-800]
        assert 10 * np.log10(np.mean(samples**2) / 0.5) < -95


def test_silence_and_a_constant():
    assert not resample(np.zeros(100, np.float32), 8000, 16000).any()
    # the gain of every polyphase branch is 1 to the filter's ripple
    assert np.abs(resample(np.ones(4000, np.float32), 8000, 16000)[800:-800] - 1).max() < 2e-5
    assert ratio(44100, 16000) == (160, 441)


@pytest.mark.parametrize("before", [8000, 11025, 44100])
def test_a_part_is_exactly_that_part_of_the_whole_resampled(before):
    data = wav_bytes(np.random.default_rng(0).uniform(-0.9, 0.9, before), before)
    with Sound(data) as sound:
        whole = sound.read_at(16000)
        for start, count in [(0, 50), (3, 1000), (7001, 3000), (15990, 500), (12345, None)]:
            part = sound.read_at(16000, start, count)
            expected = whole[start : None if count is None else start + count]
            assert len(part) == len(expected)
            np.testing.assert_allclose(part, expected, atol=1e-6)


@pytest.mark.data
def test_every_real_recording_is_read_as_soundfile_reads_it(real_data):
    soundfile = pytest.importorskip("soundfile")
    for path in sorted((real_data / "fsdd").glob("*.wav"))[::100]:
        with Sound(open(path, "rb")) as sound:
            assert sound.rate_hz == 8000
            assert np.array_equal(sound.read(), soundfile.read(path, dtype="float32")[0])
