"""Decoded pictures in, items out; and the time which a decoder gives to pictures and samples (stages/media/sound.py).

Rule: event time is made in this file. A file's time is its PTS, and zero its first media. A live source's time is PTS
too, moved onto the clock of arrival, which is the session's, whenever the two drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.screen import FrameGrid, Screen, Shot
from stages.media.view import PixelAspect, Scaler, check_size
from stages.media.wire import FOREVER_NS, Frame, MediaError, MediaItem, MediaRequest

MAX_SOURCE_FPS: Final = 1000
DEFAULT_FPS: Final = Fraction(25)  # where the container has no idea
MAX_RATED_NS: Final = 10 * NS_PER_S  # no camera's own account of its rate is believed beyond
MAX_PERIOD_NS: Final = 24 * 3600 * NS_PER_S  # no file's own account of it is: slow motion of a year has a picture a day
STAND_NS: Final = 60 * NS_PER_S  # a picture that stands for long is sent piece by piece

LIVE_DRIFT_NS: Final = 300 * NS_PER_MS  # more than Wi-Fi jitters, less than a third of a window
LIVE_CHECK_NS: Final = 5 * NS_PER_S  # a delay is drift, and no jitter, when it has not been less for so long
LIVE_LOST_NS: Final = 10 * NS_PER_S  # no network holds packets for so long: the camera's clock was set
FILE_BACK_NS: Final = NS_PER_S // 2  # recordings joined without care begin anew
FILE_AHEAD_NS: Final = 3600 * NS_PER_S  # a screen recording may stand still for so long

Put: TypeAlias = Callable[[MediaItem], None]  # where items go; may block

Picture: TypeAlias = tuple[VideoFrame, Fraction | None]  # and the aspect of its pixels
Deferred: TypeAlias = Callable[[], VideoFrame]  # a picture that is decoded when it is sampled

# --- time ---------------------------------------------------------------------------------------------------------


class Axis(Protocol):
    """Puts a stream's PTS on the session's axis."""

    num_jumps: int

    def place(self, pts_ns: int | None, expected_ns: int, arrival_ns: int) -> int:
        """Event time of media with this PTS, which would follow seamlessly at expected_ns."""
        ...


class FileAxis:
    """PTS minus the file's start. A jump which no recording makes (a day, or back) continues seamlessly instead.

    step_ns: what lies between the media before a jump and that behind it: for pictures, which last, their period.
    begins_ns: where reading begins, if not at the file's start.
    """

    def __init__(self, origin_ns: int | None, step_ns: int = 0, begins_ns: int = 0) -> None:
        self._origin_ns = origin_ns
        self._step_ns = step_ns
        self._ahead_ns = max(begins_ns + FILE_AHEAD_NS, 2 * step_ns)
        self.num_jumps = 0

    def place(self, pts_ns: int | None, expected_ns: int, arrival_ns: int) -> int:
        if pts_ns is None:
            return expected_ns
        if self._origin_ns is None:
            self._origin_ns = pts_ns
        time_ns = pts_ns - self._origin_ns
        if expected_ns - FILE_BACK_NS <= time_ns <= expected_ns + self._ahead_ns:
            return time_ns
        self._origin_ns += time_ns - expected_ns - self._step_ns
        self.num_jumps += 1
        return expected_ns + self._step_ns


class LiveAxis:
    """PTS moved onto the clock of arrival, with the least delay seen as zero.

    PTS keeps the distances between pictures, which jitter of the network doesn't. Its clock is not ours: where media
    comes before its time, or never closer than LIVE_DRIFT_NS to it for a while, the clock is set anew. What arrives now
    has not been before, so stamps that go back or stand still are no times: it follows what was there.
    """

    def __init__(self) -> None:
        self._shift_ns: int | None = None
        self._least_delay_ns = FOREVER_NS
        self._set_ns = 0  # arrival time at which the clock was last looked at
        self._jumped_ns = 0  # and at which it was last found to be another one
        self._pts_ns: int | None = None  # the last one, and the arrival of the first media which had it
        self._pts_since_ns = 0
        self._is_stuck = False
        self.num_jumps = 0

    def place(self, pts_ns: int | None, expected_ns: int, arrival_ns: int) -> int:
        if pts_ns is None or self._stands_still(pts_ns, arrival_ns):
            return _following_ns(expected_ns, arrival_ns)
        if self._shift_ns is None:
            self._shift_ns = arrival_ns - pts_ns
            self._set_ns = self._jumped_ns = arrival_ns
        delay_ns = arrival_ns - pts_ns - self._shift_ns
        self._least_delay_ns = min(self._least_delay_ns, delay_ns)
        if pts_ns + self._shift_ns < min(expected_ns, arrival_ns) - LIVE_DRIFT_NS:
            self._set_anew(_following_ns(expected_ns, arrival_ns) - pts_ns, arrival_ns)
        elif not -LIVE_DRIFT_NS <= delay_ns <= LIVE_LOST_NS:
            self._set_anew(self._shift_ns + delay_ns, arrival_ns)
        elif arrival_ns >= self._set_ns + LIVE_CHECK_NS:
            drift_ns = self._least_delay_ns if self._least_delay_ns > LIVE_DRIFT_NS else 0
            self._set_anew(self._shift_ns + drift_ns, arrival_ns)
        return max(pts_ns + self._shift_ns, min(expected_ns, arrival_ns))

    def _stands_still(self, pts_ns: int, arrival_ns: int) -> bool:
        """Whether this is the stamp of before: of a camera which stamps in groups, or gives no times at all."""
        if pts_ns != self._pts_ns:
            self._pts_ns, self._pts_since_ns, self._is_stuck = pts_ns, arrival_ns, False
            return False
        is_stuck = arrival_ns - self._pts_since_ns > LIVE_DRIFT_NS
        self.num_jumps += is_stuck and not self._is_stuck
        self._is_stuck = is_stuck
        return True

    def _set_anew(self, shift_ns: int, arrival_ns: int) -> None:
        if shift_ns != self._shift_ns:
            # A backlog sets it with every packet: that is one jump, or none when it comes with the connection.
            self.num_jumps += arrival_ns - self._jumped_ns >= NS_PER_S
            self._jumped_ns = arrival_ns
        self._shift_ns, self._set_ns = shift_ns, arrival_ns
        self._least_delay_ns = FOREVER_NS


def period_ns(rate: Fraction | None) -> int:
    """How long a picture stands at this rate, by a file's own account as far as it is believed, else by the default."""
    period = NS_PER_S // rate if rate else 0
    return period if 0 < period <= MAX_PERIOD_NS else NS_PER_S // DEFAULT_FPS


def _following_ns(expected_ns: int, arrival_ns: int) -> int:
    """The time of what arrives now without one: right behind what was before, unless there was a pause."""
    return expected_ns if abs(arrival_ns - expected_ns) <= LIVE_DRIFT_NS else arrival_ns


def to_ns(count: int | None, time_base: Fraction | None) -> int | None:
    if count is None or time_base is None:
        return None
    return count * time_base.numerator * NS_PER_S // time_base.denominator


# --- tracks: packets in, items out --------------------------------------------------------------------------------


class VideoTrack:
    """One video stream: takes its pictures, sends what is on the screen at the sampling instants.

    start_ns: event time at which the source was opened; nothing is earlier. media_end_ns: where the file says it ends.
    """

    def __init__(
        self,
        stream: VideoStream,
        request: MediaRequest,
        axis: Axis,
        put: Put,
        start_ns: int = 0,
        *,
        live: bool = False,
        media_end_ns: int | None = None,
    ) -> None:
        self.axis = axis
        self.num_bad = 0
        self.num_decoded = 0
        self.ended = False
        self._put = put
        self._period_ns = period_ns(stream.average_rate)  # for pictures without PTS
        self._grid = FrameGrid(request.fps, request.window_ns)
        rated_ns = NS_PER_S // stream.average_rate if stream.average_rate else 0
        self._until_ns = FOREVER_NS if request.duration_ns is None else request.duration_ns
        self._screen: Screen[Picture | Deferred] = Screen(
            self._grid,
            start_ns,
            until_ns=self._until_ns,
            live=live,
            usual_ns=min(rated_ns, MAX_RATED_NS) if live else 0,
        )
        self._scaler = Scaler(request.max_pixels, is_exact=not live)
        self._pixel_aspect = PixelAspect(stream)
        self._converted: tuple[Picture | Deferred, npt.NDArray[np.uint8]] | None = (
            None  # the last picture sent, and as RGB
        )
        self._media_end_ns = media_end_ns
        self._start_ns = self._time_ns = start_ns
        self._duration_ns = 0  # of the last picture
        self._anchor_ns = start_ns  # time of the last picture which had a PTS, and the pictures since
        self._num_since = 0

    @property
    def position_ns(self) -> int:
        """Nothing earlier will be sent."""
        return FOREVER_NS if self.ended else self._screen.next_ns if self._has_all else self._screen.position_ns

    @property
    def _has_all(self) -> bool:
        return self._screen.next_ns >= self._until_ns

    @property
    def done(self) -> bool:
        return self.ended or self._has_all

    @property
    def num_gaps(self) -> int:
        return self.axis.num_jumps

    @property
    def time_ns(self) -> int:
        """When the last picture that came was shown."""
        return self._time_ns

    @property
    def next_ns(self) -> int:
        """The next sampling instant."""
        return self._screen.next_ns

    @property
    def due_ns(self) -> int:
        """When the picture on the screen is to be sent though no newer one has come; of live sources."""
        return self._screen.next_ns + self._grid.grace_ns

    def add(self, frame: VideoFrame, arrival_ns: int) -> None:
        self._move_on(to_ns(frame.dts if frame.pts is None else frame.pts, frame.time_base), arrival_ns)
        self.num_decoded += 1
        duration_ns = to_ns(frame.duration, frame.time_base) or 0
        self._duration_ns = duration_ns if 0 < duration_ns <= MAX_PERIOD_NS else self._period_ns
        check_size(frame.width, frame.height)
        if self.num_decoded > MAX_SOURCE_FPS * ((self._time_ns - self._start_ns) // NS_PER_S + 1):
            raise MediaError("limit", f"has more than {MAX_SOURCE_FPS} pictures per second")
        self._stand(self._time_ns - 1)
        self._send(self._screen.show(self._time_ns, (frame, self._pixel_aspect.now())))

    def show(self, picture: Deferred, pts_ns: int, arrival_ns: int) -> None:
        """A picture comes on the screen that is decoded when it is sampled."""
        self._move_on(pts_ns, arrival_ns)
        self._stand(self._time_ns - 1)
        self._send(self._screen.show(self._time_ns, picture))

    def pass_by(self, pts_ns: int, arrival_ns: int) -> None:
        """A picture comes that is not shown: the one before stays on the screen, and the source goes on."""
        self._move_on(pts_ns, arrival_ns)
        self._screen.vouch(self._time_ns)
        self._stand(self._time_ns - 1)

    def _move_on(self, pts_ns: int | None, arrival_ns: int) -> None:
        """To the time of the next picture."""
        if pts_ns is None:
            expected_ns = self._anchor_ns + self._num_since * self._period_ns
        else:  # the average period says little about the next picture of an uneven stream
            expected_ns = self._time_ns
        self._time_ns = max(self.axis.place(pts_ns, expected_ns, arrival_ns), self._time_ns)
        if pts_ns is not None:
            self._anchor_ns, self._num_since = self._time_ns, 0
        self._num_since += 1

    def hold(self, now_ns: int) -> bool:
        """Send what is still on the screen though nothing came until now, as far as that is trusted; whether it did."""
        return self._send(self._screen.stand(now_ns - self._grid.grace_ns))

    def doubt(self) -> None:
        """A picture is lost: the one before is no longer what would be on the screen."""
        self._screen.doubt()

    def finish(self) -> None:
        try:
            if not self.ended:
                self._stand(self._screen.last_ns(self._duration_ns, self._media_end_ns))
        finally:
            self.ended = True

    def _stand(self, until_ns: int) -> None:
        """Send what stays on the screen until then, a piece at a time, however long that is."""
        while self._send(self._screen.stand(min(until_ns, self._screen.next_ns + STAND_NS))):
            pass

    def _send(self, shots: list[Shot[Picture | Deferred]]) -> bool:
        for shot in shots:
            self._put(Frame(shot.start_ns, self._to_rgb(shot.picture), shot.age_ns))
        return bool(shots)

    def _to_rgb(self, picture: Picture | Deferred) -> npt.NDArray[np.uint8]:
        """Decoded and converted once, however often it is sent."""
        if self._converted is None or self._converted[0] is not picture:
            frame, aspect = picture if isinstance(picture, tuple) else (picture(), self._pixel_aspect.now())
            self._converted = (picture, self._scaler.to_rgb(frame, aspect))
        return self._converted[1]
