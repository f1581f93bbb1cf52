"""Packets to items: one source's connections read to their end, their packets decoded in the order of time.

What a packet becomes, and with which times, is decided in stages/media_tracks.py.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, Final, TypeAlias

import av
from av.container import InputContainer
from av.packet import Packet

from graph.chunk import NS_PER_S
from stages.media_tracks import Put, SoundTrack, Track, VideoTrack, to_ns
from stages.media_wire import FOREVER_NS, LIVE_KINDS, MediaRequest, Order, Progress

MAX_BAD_AT_START: Final = 300  # 10 s of a 30 fps camera
SIGN_OF_LIFE_NS: Final = NS_PER_S  # 0.1 fps without sound has nothing else to send; the parent's patience is 6 s

Feed: TypeAlias = tuple[InputContainer, dict[int, Track]]  # one connection, its tracks by stream index


def packets(feed: Feed) -> Iterator[tuple[int, Track, Packet[Any]]]:
    """The packets of one connection with their decoding time; the last one per track is empty and flushes it."""
    container, tracks = feed
    time_ns = 0
    for packet in container.demux([container.streams[index] for index in tracks]):
        dts_ns = to_ns(packet.dts, packet.time_base)
        time_ns = time_ns if dts_ns is None else dts_ns
        yield time_ns, tracks[packet.stream.index], packet


class Teller:
    """Sends Progress whenever a stream enters a new piece, and as a sign of life after a second without."""

    def __init__(
        self, request: MediaRequest, tracks: list[Track], put: Put, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._piece_ns = request.piece_ns
        self._tracks = tracks
        self._put = put
        self._clock = clock
        self._told: tuple[int, int] | None = None
        self._told_at_ns = 0

    def tell(self) -> None:
        video_ns = min((t.position_ns for t in self._tracks if isinstance(t, VideoTrack)), default=FOREVER_NS)
        audio_ns = min((t.position_ns for t in self._tracks if isinstance(t, SoundTrack)), default=FOREVER_NS)
        pieces = (video_ns // self._piece_ns, audio_ns // self._piece_ns)
        now_ns = self._clock()
        if pieces != self._told or now_ns - self._told_at_ns >= SIGN_OF_LIFE_NS:
            self._told, self._told_at_ns = pieces, now_ns
            num_gaps = sum(t.num_gaps for t in self._tracks)
            num_bad = Counter({VideoTrack: 0, SoundTrack: 0})
            for track in self._tracks:
                num_bad[type(track)] += track.num_bad
            self._put(Progress(video_ns, audio_ns, num_gaps, num_bad[VideoTrack], num_bad[SoundTrack]))


def session_ns(order: Order) -> int:
    """The event time that is now."""
    return time.monotonic_ns() - order.origin_ns


class LiveWatch:
    """When a live source is given up: files have all the time in the world, and their parent's watchdog."""

    def __init__(self, order: Order, now_ns: int) -> None:
        is_live = order.kind in LIVE_KINDS
        self._silence_ns = int(order.silence_timeout_s * NS_PER_S) if is_live else FOREVER_NS
        duration_ns = order.request.duration_ns
        self._until_ns = FOREVER_NS if duration_ns is None or not is_live else duration_ns + NS_PER_S
        self._listening_since_ns = now_ns

    def is_over(self, arrival_ns: int) -> bool:
        """Whether the duration has passed, though a stream which died never reaches it.

        TimeoutError after a silence: libav answers its own time-out with the last packet, and waits once more.
        """
        if arrival_ns - self._listening_since_ns >= self._silence_ns:
            raise TimeoutError
        return arrival_ns > self._until_ns

    def listen(self, now_ns: int) -> None:
        """Silence counts from now on; before, a packet was decoded and its items waited for the parent."""
        self._listening_since_ns = now_ns


def play(order: Order, feeds: list[Feed], tracks: list[Track], teller: Teller) -> bool:
    """Decode packets of all feeds in the order of their time; True when the duration was reached, False at the end."""
    watch = LiveWatch(order, session_ns(order))
    for _, track, packet in heapq.merge(*map(packets, feeds), key=itemgetter(0)):
        arrival_ns = session_ns(order)
        over = watch.is_over(arrival_ns)
        decode(packet, track, arrival_ns)
        teller.tell()
        if over or all(track.done for track in tracks):
            return not all(track.ended for track in tracks)
        watch.listen(session_ns(order))
    return False


def decode(packet: Packet[Any], track: Track, arrival_ns: int) -> None:
    """Decode one packet into its track; an empty one flushes and finishes it. Damaged packets are counted."""
    if track.done:
        return
    try:
        frames: list[Any] = packet.decode()  # of the track's own kind
        for frame in frames:
            track.add(frame, arrival_ns)
    except av.error.InvalidDataError:
        track.num_bad += 1
        if track.num_bad >= MAX_BAD_AT_START and not track.num_decoded:
            raise
    if packet.size == 0:
        track.finish()
