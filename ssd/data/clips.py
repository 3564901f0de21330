"""From a video file to the frames that were asked for, whatever its header says.

A header may state no frames, or another length than the file has, so the packets are counted: without decoding they
tell when each frame is shown and where decoding can start. Then only what is needed is decoded, from the keyframe
before it, and each frame is shrunk while its colours are converted. Needs PyAV (`pip install ssd[video]`).
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from ssd.data.timeline import Timeline
from ssd.errors import BrokenSample, UserError

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2v", ".mpv", ".ts", ".m2ts", ".mts",
    ".flv", ".wmv", ".3gp", ".ogv", ".vob", ".h264", ".264", ".hevc", ".h265", ".mjpeg",
)  # fmt: skip
USUAL_FPS = 25.0  # of a stream that does not say when its frames are shown, nor how fast
FORMATS = {1: "gray", 3: "rgb24"}


class BrokenClip(BrokenSample):
    """This file is no clip that can be read; the message says why."""


class Missed(Exception):
    """A jump has landed behind the frame it was for."""


class Clip:
    """An open video file, closed with the block that opened it. Raises BrokenClip where it is none.

    Args:
        file: a binary file that can seek, or the bytes of one.
        timeline: what `timeline` has told of this file before.
    """

    def __init__(self, file: BinaryIO | bytes, timeline: Timeline | None = None):
        self.file = io.BytesIO(file) if isinstance(file, bytes) else file
        self._timeline = timeline
        self._container: Any = None
        self._fresh = False
        try:
            self._reopen()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self.file.close()

    def _reopen(self) -> None:
        av = import_av()
        if self._container is not None:
            self._container.close()
            self._container = None
        self.file.seek(0)
        with told(av):
            self._container = av.open(self.file, metadata_errors="ignore")
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            raise BrokenClip("no moving pictures in it")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise BrokenClip("its pictures are coded in a way that this PyAV does not know")
        # of processes there are as many as is good already
        self._stream.codec_context.thread_count = 1
        self._fresh = True

    @property
    def timeline(self) -> Timeline:
        """Counted once, by reading the packets of the whole file."""
        if self._timeline is None:
            self._timeline = self._count()
        return self._timeline

    def _count(self) -> Timeline:
        av = import_av()
        stream = self._stream
        rate = float(stream.average_rate or stream.guessed_rate or USUAL_FPS)
        self._fresh = False
        with told(av):
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in self._container.demux(stream)
                if packet.size and not packet.is_discard
            ]
        if packets and all(pts is not None for pts, _ in packets):
            times = np.unique(np.array([pts for pts, _ in packets], np.int64))
            keys = np.searchsorted(times, np.unique(np.array([pts for pts, key in packets if key], np.int64)))
            unit_s = float(stream.time_base)
            last_s = float(np.median(np.diff(times))) * unit_s if len(times) > 1 else 1 / rate
            return Timeline(times, unit_s, keys, last_s)
        self._reopen()
        self._fresh = False
        with told(av):
            count = sum(1 for _ in self._container.decode(self._stream))
        if not count:
            raise BrokenClip("no frames in it")
        return Timeline(np.arange(count), 1 / rate, np.zeros(1, np.int64), 1 / rate, timed=False)

    def frames(self, wanted: np.ndarray, short_side: int | None = None, channels: int = 3) -> np.ndarray:
        """Frames at ascending places of the timeline, upright and with square pixels.

        A frame that cannot be decoded by itself is the one before it. Raises BrokenClip where the decoder meets
        damage, or decodes nothing.

        Args:
            wanted: (n,) places in `timeline.times`, ascending.
            short_side: px to which larger frames are shrunk; None = as recorded.
            channels: 1 or 3.

        Returns:
            (n, H, W, channels) uint8
        """
        try:
            return self._frames(wanted, short_side, channels, self.timeline.runs(wanted))
        except Missed:
            # the file's own table of places is wrong: from the start, without jumps
            self._reopen()
            return self._frames(wanted, short_side, channels, [(0, wanted)])

    def _frames(
        self, wanted: np.ndarray, short_side: int | None, channels: int, runs: list[tuple[int, np.ndarray]]
    ) -> np.ndarray:
        aspect = float(self._stream.sample_aspect_ratio or 1)
        convert = Converter(short_side, channels, aspect)
        return np.stack([picture for start, run in runs for picture in self._run(start, run, convert)])

    def _run(self, start: int, wanted: np.ndarray, convert: "Converter") -> Iterator[np.ndarray]:
        """The pictures of ascending frames, one after another, decoded from frame `start`."""
        shown = None
        jumped = start > 0 or not self._fresh
        queue = iter(wanted.tolist())
        target = next(queue)
        for place, frame in self._decoded(start, set(wanted.tolist())):
            if jumped and shown is None and place > target:
                raise Missed
            while place > target:
                yield convert(frame if shown is None else shown)
                following = next(queue, None)
                if following is None:
                    return
                target = following
            shown = frame
            if place == target:
                yield convert(frame)
                following = next(queue, None)
                if following is None:
                    return
                target = following
        if shown is None and jumped:
            raise Missed
        if shown is None:
            raise BrokenClip("no frame of it can be decoded")
        for _ in (target, *queue):
            yield convert(shown)

    def _decoded(self, start: int, wanted: set[int]) -> Iterator[tuple[int, Any]]:
        """Place in the timeline and frame, from frame `start` on or from a little before it.

        Frames that are neither wanted nor needed for others may be left out, which takes no time then.
        """
        av = import_av()
        timeline = self.timeline
        if not self._fresh and not timeline.timed:
            self._reopen()
        with told(av):
            if start or not self._fresh:
                self._container.seek(int(timeline.times[start]), stream=self._stream)
            self._fresh = False
            if not timeline.timed:
                yield from enumerate(self._container.decode(self._stream))
                return
            wanted_times = set(timeline.times[sorted(wanted)].tolist())
            decoder = self._stream.codec_context
            for packet in self._container.demux(self._stream):
                decoder.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted_times else "NONREF"
                for frame in packet.decode():
                    if frame.pts is not None:
                        yield int(np.searchsorted(timeline.times, frame.pts, side="right")) - 1, frame


class Converter:
    """Frames of one clip as pictures (H, W, channels) uint8 of one size, which the first frame settles.

    Args:
        aspect: width of a recorded pixel over its height.
    """

    def __init__(self, short_side: int | None, channels: int, aspect: float = 1.0):
        from av.video.reformatter import VideoReformatter

        if channels not in FORMATS:
            raise UserError(f"channels is {channels}. Clips have 1 (grey) or 3.")
        self.short_side, self.format, self.aspect = short_side, FORMATS[channels], aspect
        self.size: tuple[int, int] | None = None  # width, height, before turning
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        if self.size is None:
            self.size = settled(frame.width * self.aspect, frame.height, self.short_side)
        width, height = self.size
        small = self._reformatter.reformat(frame, width, height, self.format, interpolation="BICUBIC")
        picture = small.to_ndarray()
        picture = picture[..., None] if picture.ndim == 2 else picture
        quarters = round(frame.rotation / 90) % 4
        return np.rot90(picture, quarters) if quarters else picture


def settled(width: float, height: float, short_side: int | None) -> tuple[int, int]:
    """Whole width and height, px, of a picture whose short side is at most `short_side`."""
    shrink = 1.0 if short_side is None else min(1.0, short_side / min(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


@contextlib.contextmanager
def told(av: Any) -> Iterator[None]:
    """PyAV's errors as BrokenClip."""
    try:
        yield
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        raise BrokenClip(f"{type(error).__name__}: {error}") from None


def import_av() -> Any:
    """Raises UserError that names the extra where PyAV is missing."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"clips need PyAV ({error}). Install it with: pip install ssd[video]") from None
    return av
