"""Frames of video files by their place, whatever the header says and wherever decoding has to start."""

import sys

import numpy as np
import pytest

from ssd.data.clips import BrokenClip, Clip, settled
from ssd.data.timeline import JUMP, Timeline
from ssd.errors import UserError
from tests.data.media_files import GREY_STEP, write_audio_only, write_clip

av = pytest.importorskip("av")
KINDS = {
    "mp4": {},
    "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "mkv": {},
    "ts": {},
    "webm": {"codec": "libvpx-vp9"},
    "avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg"},
    "mpg": {"codec": "mpeg2video"},
    "m2v": {"codec": "mpeg2video", "form": "mpeg2video"},
    "h264": {"form": "h264"},
}


@pytest.fixture(autouse=True)
def quiet():
    """FFmpeg's own words about broken files."""
    av.logging.set_level(None)


def every_frame(path) -> list[np.ndarray]:
    """All frames by plain decoding, the reference."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_frames_of_any_container_are_those_of_decoding_everything(tmp_path, kind):
    path = write_clip(tmp_path / f"a.{kind}", **KINDS[kind])
    reference = every_frame(path)
    for wanted in (range(24), [0], [23], [3, 4, 20], [9, 17]):
        with Clip(open(path, "rb")) as clip:
            assert len(clip.timeline) == 24 == len(reference)
            frames = clip.frames(np.array(wanted))
        assert np.array_equal(frames, np.stack([reference[place] for place in wanted])), wanted


def test_several_reads_of_one_open_clip_go_back_and_forth(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    reference = every_frame(path)
    with Clip(path.read_bytes()) as clip:
        for wanted in ([20], [2, 3], [10], [0, 23]):
            assert np.array_equal(clip.frames(np.array(wanted)), np.stack([reference[w] for w in wanted]))


@pytest.mark.parametrize("kind", ["m2v", "webm", "fragmented.mp4"])
def test_a_header_that_says_no_frames_does_not_matter(tmp_path, kind):
    path = write_clip(tmp_path / f"a.{kind}", frames=10, **KINDS[kind])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    with Clip(open(path, "rb")) as clip:
        assert len(clip.timeline) == 10
        assert clip.timeline.duration_s == pytest.approx(0.4, abs=1e-3)


def test_times_are_seconds_from_the_first_frame_and_the_last_frame_counts(tmp_path):
    with Clip(open(write_clip(tmp_path / "a.ts", frames=12, fps=10), "rb")) as clip:
        assert np.allclose(clip.timeline.seconds, np.arange(12) / 10)
        assert clip.timeline.duration_s == pytest.approx(1.2)


def test_a_clip_of_one_frame_is_a_clip(tmp_path):
    with Clip(open(write_clip(tmp_path / "a.mp4", frames=1), "rb")) as clip:
        assert len(clip.timeline) == 1 and clip.timeline.duration_s > 0
        assert clip.frames(np.array([0])).shape == (1, 48, 64, 3)


def test_frames_are_shrunk_to_one_exact_size_and_never_enlarged(tmp_path):
    path = write_clip(tmp_path / "a.mp4", size=(48, 84))
    with Clip(open(path, "rb")) as clip:
        small = clip.frames(np.arange(24), short_side=20)
        assert small.shape == (24, 20, 35, 3) == (24, *settled(84, 48, 20)[::-1], 3)
        assert clip.frames(np.arange(2), short_side=200).shape == (2, 48, 84, 3)
        grey = clip.frames(np.arange(24), short_side=20, channels=1)
    assert grey.shape == (24, 20, 35, 1)
    # flat frames stay what they are, to the rounding of 8-bit luma
    levels = np.arange(24) * GREY_STEP % 250
    assert np.abs(small.mean((1, 2, 3)) - levels).max() < 3
    assert np.abs(grey.mean((1, 2, 3)) - levels).max() < 3


def test_a_clip_filmed_upright_is_turned_as_its_header_says(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 200  # bright on the left: on top once turned clockwise
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    one = 65536
    data[place : place + 36] = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (0, one, 0, -one, 0, 0, 32 * one, 0, one << 14)
    )
    with Clip(bytes(data)) as clip:
        (frame,) = clip.frames(np.array([0]))
    assert frame.shape == (64, 32, 3)
    assert frame[:28].min() > 150 and frame[36:].max() < 50


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with Clip(open(path, "rb")) as clip:
        assert clip.frames(np.array([0]), short_side=32).shape == (1, 32, 64, 3)


# ---------------------------------------------------------------- files that are no clips


def test_what_is_no_clip_says_why(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", frames=40, movflags="faststart").read_bytes()
    end_lost = tmp_path / "end.mp4"
    write_clip(end_lost, frames=40)
    files = {
        "words": b"these are words\n" * 50,
        "empty": b"",
        "the index is lost with the end": end_lost.read_bytes()[:-400],
        "only the header is there": whole[: whole.index(b"mdat") + 8],
        "sound alone": write_audio_only(tmp_path / "sound.mp4").read_bytes(),
    }
    for what, data in files.items():
        with pytest.raises(BrokenClip), Clip(data) as clip:
            clip.frames(clip.timeline.runs(np.array([0]))[0][1])
            pytest.fail(what)


def test_a_cut_clip_is_broken_where_the_damage_is_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            noise = rng.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    cut = data[: len(data) // 2]
    with pytest.raises(BrokenClip), Clip(cut) as clip:
        clip.frames(np.arange(len(clip.timeline)))


def test_a_file_is_closed_whatever_happens(tmp_path):
    for data in (write_clip(tmp_path / "a.mp4").read_bytes(), b"words"):
        path = tmp_path / "b.mp4"
        path.write_bytes(data)
        file = open(path, "rb")  # noqa: SIM115
        try:
            with Clip(file):
                pass
        except BrokenClip:
            pass
        assert file.closed


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install ssd\[video\]"):
        Clip(b"")


# ---------------------------------------------------------------- what is decoded


def test_a_jump_is_made_where_it_spares_frames():
    timeline = Timeline(np.arange(100), 0.1, np.array([0, 10, 20, 50, 90]), 0.1)

    def starts(*wanted):
        return [(start, run.tolist()) for start, run in timeline.runs(np.array(wanted))]

    assert starts(3, 5) == [(0, [3, 5])]
    assert starts(12) == [(10, [12])]
    assert starts(3, 55) == [(0, [3]), (50, [55])]
    assert starts(18, 22) == [(10, [18, 22])], f"keyframe 20 spares 1 frame, less than {JUMP}"
    assert starts(0, 99, 99) == [(0, [0]), (90, [99, 99])]
    untimed = Timeline(np.arange(100), 0.1, np.array([0]), 0.1, timed=False)
    assert [start for start, _ in untimed.runs(np.array([3, 80]))] == [0]


def test_only_frames_from_the_keyframe_before_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", frames=80)
    decoded = []
    original = Clip._decoded

    def counting(self, *arguments):
        for item in original(self, *arguments):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(Clip, "_decoded", counting)
    with Clip(open(path, "rb")) as clip:
        clip.frames(np.array([70]))
    assert decoded[-1] == 70 and min(decoded) >= 64


@pytest.mark.data
def test_real_clips_are_decoded_exactly_with_and_without_a_known_timeline(real_data):
    for path in sorted((real_data / "clips").glob("*/*.mp4"))[::24]:
        reference = every_frame(path)
        wanted = np.unique(np.linspace(2, len(reference) - 1, 7).astype(int))
        with Clip(open(path, "rb")) as clip:
            timeline = clip.timeline
        with Clip(open(path, "rb"), timeline) as clip:
            frames = clip.frames(wanted)
        assert all(np.array_equal(frame, reference[place]) for frame, place in zip(frames, wanted, strict=True))
