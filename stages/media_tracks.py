"""Decoded pictures in, items out; and the time which a decoder gives to pictures and samples (stages/media_sound.py).

Rule: event time is made in this file. A file's time is its PTS, and zero its first media. A live source's time is PTS
too, moved onto the clock of arrival, which is the session's, whenever the two drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, Protocol, TypeAlias

from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media_view import Scaler, check_size
from stages.media_wire import FOREVER_NS, Frame, MediaError, MediaItem, MediaRequest

MAX_SOURCE_FPS: Final = 1000
DEFAULT_FPS: Final = Fraction(25)  # where the container has no idea

LIVE_DRIFT_NS: Final = 300 * NS_PER_MS  # more than Wi-Fi jitters, less than a third of a window
LIVE_CHECK_NS: Final = 5 * NS_PER_S  # a delay is drift, and no jitter, when it has not been less for so long
LIVE_LOST_NS: Final = 10 * NS_PER_S  # no network holds packets for so long: the camera's clock was set
FILE_BACK_NS: Final = NS_PER_S // 2  # recordings joined without care begin anew
FILE_AHEAD_NS: Final = 3600 * NS_PER_S  # a screen recording may stand still for so long

Put: TypeAlias = Callable[[MediaItem], None]  # where items go; may block

# --- time ---------------------------------------------------------------------------------------------------------


class FrameGrid:
    """Which pictures become frames: frame i is the first one at or after (i + 0.8) / fps.

    Frame 0.2 periods before the window's end, so that it is encoded when the window closes. After a hole the grid
    goes on behind the picture which ended it: no frames are made up, none come in a burst.
    """

    def __init__(self, fps: float) -> None:
        self._rate = Fraction(fps).limit_denominator(1000)
        self._index = 0

    def instant_ns(self, index: int) -> int:
        return (10 * index + 8) * NS_PER_S * self._rate.denominator // (10 * self._rate.numerator)

    @property
    def next_ns(self) -> int:
        return self.instant_ns(self._index)

    def skip_to(self, time_ns: int) -> None:
        """Leave out the periods before the one which this time lies in."""
        self._index = max(self._index, int(self._rate * time_ns / NS_PER_S))

    def take(self, time_ns: int) -> bool:
        """Whether the picture of this time becomes a frame; times must not go back."""
        if time_ns < self.next_ns:
            return False
        self._index = max(self._index, int(self._rate * time_ns / NS_PER_S - 1))
        while self.next_ns <= time_ns:
            self._index += 1
        return True


class Axis(Protocol):
    """Puts a stream's PTS on the session's axis."""

    num_jumps: int

    def place(self, pts_ns: int | None, expected_ns: int, arrival_ns: int) -> int:
        """Event time of media with this PTS, which would follow seamlessly at expected_ns."""
        ...


class FileAxis:
    """PTS minus the file's start. A jump which no recording makes (a day, or back) continues seamlessly instead."""

    def __init__(self, origin_ns: int | None) -> None:
        self._origin_ns = origin_ns
        self.num_jumps = 0

    def place(self, pts_ns: int | None, expected_ns: int, arrival_ns: int) -> int:
        if pts_ns is None:
            return expected_ns
        if self._origin_ns is None:
            self._origin_ns = pts_ns
        time_ns = pts_ns - self._origin_ns
        if expected_ns - FILE_BACK_NS <= time_ns <= expected_ns + FILE_AHEAD_NS:
            return time_ns
        self._origin_ns += time_ns - expected_ns
        self.num_jumps += 1
        return expected_ns


class LiveAxis:
    """PTS moved onto the clock of arrival, with the least delay seen as zero.

    PTS keeps the distances between pictures, which jitter of the network doesn't. Its clock is not ours: where media
    comes before its time, or never closer than LIVE_DRIFT_NS to it for a while, the clock is set anew.
    """

    def __init__(self) -> None:
        self._shift_ns: int | None = None
        self._least_delay_ns = FOREVER_NS
        self._set_ns = 0  # arrival time at which the clock was last set
        self.num_jumps = 0

    def place(self, pts_ns: int | None, expected_ns: int, arrival_ns: int) -> int:
        if pts_ns is None:
            return max(expected_ns, arrival_ns)
        if self._shift_ns is None:
            self._shift_ns = arrival_ns - pts_ns
            self._set_ns = arrival_ns
        delay_ns = arrival_ns - pts_ns - self._shift_ns
        self._least_delay_ns = min(self._least_delay_ns, delay_ns)
        if not -LIVE_DRIFT_NS <= delay_ns <= LIVE_LOST_NS:
            self._set_anew(self._shift_ns + delay_ns, arrival_ns)
        elif arrival_ns >= self._set_ns + LIVE_CHECK_NS:
            drift_ns = self._least_delay_ns if self._least_delay_ns > LIVE_DRIFT_NS else 0
            self._set_anew(self._shift_ns + drift_ns, arrival_ns)
        return pts_ns + self._shift_ns

    def _set_anew(self, shift_ns: int, arrival_ns: int) -> None:
        # A backlog sets it with every packet: that is one jump, or none when it comes with the connection.
        self.num_jumps += shift_ns != self._shift_ns and arrival_ns - self._set_ns >= NS_PER_S
        self._shift_ns, self._set_ns = shift_ns, arrival_ns
        self._least_delay_ns = FOREVER_NS


def to_ns(count: int | None, time_base: Fraction | None) -> int | None:
    if count is None or time_base is None:
        return None
    return count * time_base.numerator * NS_PER_S // time_base.denominator


# --- tracks: packets in, items out --------------------------------------------------------------------------------


class VideoTrack:
    """One video stream: decodes every picture, sends those on the grid.

    start_ns: event time at which the source was opened; nothing is earlier.
    """

    def __init__(self, stream: VideoStream, request: MediaRequest, axis: Axis, put: Put, start_ns: int = 0) -> None:
        self.axis = axis
        self.num_bad = 0
        self.num_decoded = 0
        self.ended = False
        self._put = put
        self._grid = FrameGrid(request.fps)
        self._grid.skip_to(start_ns)
        self._scaler = Scaler(request.max_pixels)
        self._until_ns = FOREVER_NS if request.duration_ns is None else request.duration_ns
        self._period_ns = NS_PER_S / (stream.average_rate or DEFAULT_FPS)  # for pictures without PTS
        self._start_ns = self._time_ns = start_ns
        self._anchor_ns = start_ns  # time of the last picture which had a PTS, and the pictures since
        self._num_since = 0

    @property
    def position_ns(self) -> int:
        """Nothing earlier will be sent."""
        return FOREVER_NS if self.ended else max(self._time_ns, self._grid.next_ns)

    @property
    def done(self) -> bool:
        return self.position_ns >= self._until_ns

    @property
    def num_gaps(self) -> int:
        return self.axis.num_jumps

    def add(self, frame: VideoFrame, arrival_ns: int) -> None:
        pts_ns = to_ns(frame.dts if frame.pts is None else frame.pts, frame.time_base)
        if pts_ns is None:
            expected_ns = self._anchor_ns + int(self._num_since * self._period_ns)
        else:  # the average period says little about the next picture of an uneven stream
            expected_ns = self._time_ns
        self._time_ns = max(self.axis.place(pts_ns, expected_ns, arrival_ns), self._time_ns)
        if pts_ns is not None:
            self._anchor_ns, self._num_since = self._time_ns, 0
        if self.num_decoded == 0:  # else the first picture would be a frame of the period before, and the next its own
            self._grid.skip_to(self._time_ns)
        self._num_since += 1
        self.num_decoded += 1
        check_size(frame.width, frame.height)
        if self.num_decoded > MAX_SOURCE_FPS * ((self._time_ns - self._start_ns) // NS_PER_S + 1):
            raise MediaError("limit", f"has more than {MAX_SOURCE_FPS} pictures per second")
        if self._time_ns < self._until_ns and self._grid.take(self._time_ns):
            self._put(Frame(self._time_ns, self._scaler.to_rgb(frame)))

    def finish(self) -> None:
        self.ended = True
