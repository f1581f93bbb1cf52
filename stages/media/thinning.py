"""Which packets of a live video are decoded: no more than what is seen takes.

Where keyframes come at least once per period of the frames that are wanted, they alone are shown, each decoded when it
is sampled and not before. What is seen is then older by one such distance at most, and its frame says so (`age_ns`).
What has come since the last keyframe is kept: where the next one is overdue, it is decoded at once, and from then on
everything is. Until then packets are read a few at a time: to wake up for one costs more than to keep it.

Elsewhere, pictures on which no other one builds are left out where there are many more than are wanted.

Rule: of live sources only. A file gives the same pictures at every run and speed, which its digests promise; both ways
would show older ones of it. A live source is never the same twice, and is where cameras are many.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.tracks import VideoTrack, to_ns

NUM_REGULAR: Final = 3  # distances in a row before keyframes are relied on; twice as many whenever that was wrong
MAX_REGULAR: Final = 96
TOLERANCE: Final = 10  # a distance may be a tenth of a period longer: stamps jitter, and clocks of cameras are not ours
MAX_REORDER_NS: Final = 250 * NS_PER_MS  # pictures may come so much before their time; LiveAxis takes more for a jump
MAX_KEPT_BYTES: Final = 8 << 20  # since the last keyframe: 2 s of 32 Mbit/s
MAX_REST_NS: Final = 200 * NS_PER_MS
MAX_RESTING_RATE: Final = 512 * 1024  # bytes per second: 100 KiB in that time, which any socket holds
MANY: Final = 8  # pictures per period: of these three B-frames in a row are less than half a period


class Decoder(Protocol):
    """Decodes the packets of one track."""

    def decode(self, packet: Packet[Any], arrival_ns: int) -> list[Any] | None:
        """What is to be shown, or heard, of a packet; None where it is kept, and the track knows of it."""
        ...

    def rest_ns(self, now_ns: int) -> int:
        """How long its packets may wait in their socket."""
        ...


class EagerDecoder:
    """Decodes everything at once."""

    def decode(self, packet: Packet[Any], arrival_ns: int) -> list[Any]:
        frames: list[Any] = packet.decode()
        return frames

    def rest_ns(self, now_ns: int) -> int:
        return 0


class Keyframes:
    """Whether keyframes alone are enough, learned from their distances. Pure.

    period_ns: of the frames that are wanted.
    """

    def __init__(self, period_ns: int) -> None:
        self._period_ns = period_ns
        self._limit_ns = period_ns + period_ns // TOLERANCE
        self._last_ns: int | None = None
        self._latest_ns = 0  # of all pictures
        self._num_pictures = 0  # since the last keyframe
        self._num_regular = 0
        self._num_required = NUM_REGULAR
        self.step_ns = 0
        """Between two pictures."""
        self.are_many = False
        """Many more pictures come than are wanted."""

    @property
    def suffice(self) -> bool:
        return self._num_regular >= self._num_required

    def see(self, time_ns: int | None, is_keyframe: bool) -> None:
        """The next packet's presentation time; None where it has none."""
        if time_ns is None or time_ns < self._latest_ns - MAX_REORDER_NS:
            self.doubt()
            self._last_ns, self._latest_ns = None, time_ns or 0
            return
        self._latest_ns = max(self._latest_ns, time_ns)
        self._num_pictures += 1
        distance_ns = self._limit_ns if self._last_ns is None else time_ns - self._last_ns
        if distance_ns > self._limit_ns:
            self.doubt()
        if not is_keyframe:
            return
        if self._last_ns is not None:
            self._num_regular += distance_ns <= self._limit_ns
            self.step_ns = distance_ns // self._num_pictures
            self.are_many = self._num_pictures * self._period_ns >= MANY * max(distance_ns, 1)
        self._last_ns, self._num_pictures = time_ns, 0

    def doubt(self) -> None:
        """They do not suffice; where they were relied on, that takes longer the next time."""
        if self.suffice:
            self._num_required = min(2 * self._num_required, MAX_REGULAR)
        self._num_regular = 0


class LiveDecoder:
    """Decodes a live video's packets for its track, as few as will do."""

    def __init__(self, stream: VideoStream, track: VideoTrack, fps: float) -> None:
        self._codec = stream.codec_context
        self._track = track
        self._keyframes = Keyframes(round(NS_PER_S / fps))
        self._kept: list[Packet[Any]] = []  # the last keyframe and what came since; empty: everything is decoded
        self._num_bytes = 0  # of these
        self._bytes_per_s = 0  # of the last keyframe and what came until the next one
        self._shown_ns = self._latest_ns = 0
        self._keyframe_pts: int | None = None
        self._are_whole = True  # keyframes are pictures of their own; of a gradual refresh they are not

    def decode(self, packet: Packet[Any], arrival_ns: int) -> list[VideoFrame] | None:
        """The pictures to be shown of the next packet; None where it is kept, and the track knows of it."""
        if packet.size == 0:  # the last one
            return [] if self._kept else self._codec.decode(packet)
        time_ns = to_ns(packet.pts, packet.time_base)
        self._keyframes.see(time_ns, packet.is_keyframe)
        is_enough = self._keyframes.suffice and self._are_whole and self._num_bytes <= MAX_KEPT_BYTES
        if time_ns is not None and is_enough and packet.is_keyframe:
            self._show(packet, time_ns, arrival_ns)
        elif time_ns is not None and is_enough and self._kept:
            self._pass_by(packet, time_ns, arrival_ns)
        else:
            return self._decode_all(packet)
        self._num_bytes += packet.size
        return None

    def rest_ns(self, now_ns: int) -> int:
        """Until the next sampling instant at most, where keyframes are relied on and all that was due has come."""
        has_all = self._track.time_ns + self._keyframes.step_ns > now_ns
        if not (self._kept and has_all and 0 < self._bytes_per_s <= MAX_RESTING_RATE):
            return 0
        return max(min(self._track.next_ns - now_ns, MAX_REST_NS), 0)

    def _show(self, keyframe: Packet[Any], time_ns: int, arrival_ns: int) -> None:
        if not self._kept:
            for frame in self._codec.decode(None):  # what it holds back to put it in order
                self._track.add(frame, arrival_ns)
        self._bytes_per_s = self._num_bytes * NS_PER_S // max(time_ns - self._shown_ns, 1)
        self._kept, self._num_bytes = [keyframe], 0
        self._shown_ns = self._latest_ns = time_ns
        self._track.show(lambda: self._decode_alone(keyframe), time_ns, arrival_ns)

    def _pass_by(self, packet: Packet[Any], time_ns: int, arrival_ns: int) -> None:
        self._kept.append(packet)
        if time_ns > self._latest_ns:  # it is shown after all that came
            self._latest_ns = time_ns
            self._track.pass_by(time_ns, arrival_ns)

    def _decode_alone(self, keyframe: Packet[Any]) -> VideoFrame:
        try:
            self._codec.flush_buffers()
            frames = [*self._codec.decode(keyframe), *self._codec.decode(None)]
            self._codec.flush_buffers()
            (frame,) = frames  # ValueError where there is none
        except Exception:
            self._keyframes.doubt()
            raise
        return frame

    def _decode_all(self, packet: Packet[Any]) -> list[VideoFrame]:
        kept, self._kept, self._num_bytes = self._kept, [], 0
        if kept:
            self._codec.flush_buffers()
            for earlier in [] if packet.is_keyframe else kept:
                self._codec.decode(earlier)  # what comes of them has had its time
        if packet.is_keyframe:
            self._keyframe_pts = packet.pts
            self._codec.skip_frame = "NONREF" if self._keyframes.are_many else "DEFAULT"
        frames = self._codec.decode(packet)
        self._are_whole &= all(f.pict_type == PictureType.I for f in frames if f.pts == self._keyframe_pts)
        return frames
