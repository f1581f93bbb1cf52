"""Packets of open connections become items: which one is next, what a damaged one costs, and which track has stopped.

Rule: tracks live and die apart. An error of a decoder is never one of the file or the network: it costs its packet, and
a track of which nothing can be decoded costs itself. Errors of reading are the source's, and are not caught here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet

from graph.chunk import NS_PER_S
from stages.media.health import Warner
from stages.media.sound import OddSound, SoundTrack
from stages.media.thinning import Decoder, EagerDecoder
from stages.media.tracks import Put, VideoTrack, to_ns
from stages.media.wire import (
    FOREVER_NS,
    LIVE_KINDS,
    FailKind,
    Frame,
    MediaError,
    MediaItem,
    MediaRequest,
    Order,
    Progress,
    Sound,
    TrackName,
    WarnCode,
)

Track: TypeAlias = VideoTrack | SoundTrack

MAX_BAD_AT_START: Final = 300  # 10 s of a 30 fps camera
TELL_NO_KEYFRAME: Final = 150  # pictures which could not be decoded for want of a keyframe, before that is told
MAX_NO_KEYFRAME: Final = 3600  # 2 minutes at 30 fps: no camera has so few; then what can't be decoded is damaged
MIN_LOOK_S: Final = 0.02  # a picture is due, and libav is being read: look again so much later
SIGN_OF_LIFE_NS: Final = NS_PER_S  # 0.1 fps without sound has nothing else to send; the parent's patience is 6 s
FIRST_PATIENCE_NS: Final = 8 * NS_PER_S  # for a track whose pace is not known yet
NUM_GAPS_KNOWN: Final = 8  # its last so many distances say what a track's pace is
_WORDS: Final[Mapping[TrackName, str]] = {"video": "pictures", "audio": "sound"}
MAX_HOLE_READS: Final = 10_000  # in vain, one behind the other; MPEG-TS takes 64 kB of what is no media with each
_HOLES: Final = (av.error.InvalidDataError, BlockingIOError)  # what is read next is no media; a demuxer says EAGAIN too
_DECODER_ERRORS: Final = (FFmpegError, ValueError, OverflowError, NotImplementedError, MemoryError)


@dataclass(frozen=True, slots=True)
class Lane:
    """One track, and what it has made and not sent: of files that are read side by side, each waits for the other.

    So a burst of one track, held pictures or the silence before late sound, goes out beside what the other one has.
    """

    track: Track
    items: deque[MediaItem] = field(default_factory=deque)

    @property
    def position_ns(self) -> int:
        """Nothing earlier will be sent."""
        first = self.items[0] if self.items else None
        return first.start_ns if isinstance(first, (Frame, Sound)) else self.track.position_ns

    @property
    def done(self) -> bool:
        return self.track.done and not self.items


class Decoding:
    """One track: its packets are decoded, damaged ones are counted, and it is given up when all are.

    source: as it may be shown.
    """

    def __init__(self, lane: Lane, source: str, warner: Warner, decoder: Decoder | None = None) -> None:
        self.lane = lane
        self.track = track = lane.track
        self.name: TrackName = "audio" if isinstance(track, SoundTrack) else "video"
        self.given_up: MediaError | None = None
        self.num_packets = 0
        self.num_alive = 0  # signs of life: what was decoded, and packets while a keyframe is awaited
        self._source = source
        self._warner = warner
        self.decoder = decoder or EagerDecoder()
        self._num_before_key: int | None = 0 if isinstance(track, VideoTrack) else None  # None: a keyframe has come

    def decode(self, packet: Packet[Any], arrival_ns: int) -> None:
        """Decode one packet into the track; the last, empty one flushes and finishes it."""
        if packet.has_sidedata("encryption_info") and not self.track.done:  # it would decode to grey and noise
            self._give_up(MediaError("unreadable", f"holds {self._what} that can't be read: encrypted, copy-protected"))
            return
        is_last = packet.size == 0 and packet.pts is None and packet.dts is None
        if self.track.done or (packet.size == 0 and not is_last):  # AVI writes empty packets for dropped pictures
            return
        self.num_packets += not is_last
        if packet.is_keyframe:
            self._num_before_key = None
        num_jumps = self.track.axis.num_jumps
        with self._guard(packet):
            for frame in self._frames_of(packet, arrival_ns, is_last):
                if not self.track.done:
                    self.track.add(frame, arrival_ns)
        if self.track.axis.num_jumps > num_jumps:
            what = f"has {self._what} whose clock jumps or stands still; what follows goes on beside the rest"
            self.warn("clock_jump", what)
        if is_last:
            self.finish()

    def _frames_of(self, packet: Packet[Any], arrival_ns: int, is_last: bool) -> list[Any]:
        """What it decodes to, of the track's own kind."""
        try:
            frames = self.decoder.decode(packet, arrival_ns)
        except _DECODER_ERRORS:
            if is_last:
                return []  # a decoder which was given nothing that is whole
            raise
        self.num_alive += frames is None or bool(frames)
        frames = frames or []
        if self._num_before_key is None and (packet.is_corrupt or any(frame.is_corrupt for frame in frames)):
            self.damage("not all of it is there; the rest goes on")
        return frames

    def hold(self, now_ns: int) -> bool:
        """Send the picture that is still on the screen when its instant has passed; whether there was one."""
        with self._guard():
            return isinstance(self.track, VideoTrack) and self.track.hold(now_ns)
        return False

    def finish(self) -> None:
        """No more packets come: what is left is sent. A track of which nothing was decoded counts as lost."""
        if self.track.ended:
            return
        with self._guard():
            self.track.finish()
        if self.num_packets and not self.track.num_decoded and self.given_up is None:
            self.track.num_bad = max(self.track.num_bad, self.num_packets)
            why = "; it has no keyframe" if self._num_before_key else ""
            self._give_up(MediaError("unreadable", f"holds {self._what} of which nothing can be decoded{why}"))

    @contextlib.contextmanager
    def _guard(self, packet: Packet[Any] | None = None) -> Iterator[None]:
        """All calls into the decoder and the track are made in here: what they raise costs the packet, or the track."""
        try:
            yield
        except MediaError as error:
            self._give_up(error)
        except _DECODER_ERRORS as error:
            self._lose(packet, error)

    @property
    def _what(self) -> str:
        return _WORDS[self.name]

    def warn(self, code: WarnCode, what: str) -> None:
        """what: the rest of a sentence which begins with the source."""
        self._warner.warn(self.name, code, f"{self._source} {what}")

    def damage(self, how: str) -> None:
        """Count something which is damaged, and tell of the first."""
        self.track.num_bad += 1
        self.warn("damaged", f"has damaged {self._what}: {how}")

    def lose_place(self, error: BaseException) -> None:
        """There is a hole in the file, of unknown length."""
        if isinstance(self.track, VideoTrack):
            self.track.doubt()
        self.damage(f"a part of it can't be read ({_reading_text(error)}); what is behind goes on")

    def _lose(self, packet: Packet[Any] | None, error: BaseException) -> None:
        if self._awaits_keyframe():
            return
        track = self.track
        if isinstance(track, VideoTrack):
            track.doubt()
        elif packet is not None:
            track.lose(to_ns(packet.duration or 0, packet.time_base) or 0)
        self.damage(f"some can't be decoded ({_text(error)}); the rest goes on")
        if track.num_bad >= MAX_BAD_AT_START and not track.num_decoded:
            kind: FailKind = "limit" if isinstance(error, MemoryError) else "unreadable"
            self._give_up(MediaError(kind, f"holds {self._what} of which nothing can be decoded ({_text(error)})"))

    def _awaits_keyframe(self) -> bool:
        """Whether this picture builds on one from before the connection: no damage, the next keyframe ends it."""
        if self._num_before_key is None or self._num_before_key >= MAX_NO_KEYFRAME:
            return False
        self.num_alive += 1
        self._num_before_key += 1
        if self._num_before_key == TELL_NO_KEYFRAME:
            self.warn("no_keyframe", "has sent no keyframe yet: let it send one every 2 s, until then nothing is seen")
        return True

    def _give_up(self, error: MediaError) -> None:
        self.given_up = error
        self.warn("track_given_up", f"{error.message}; it goes on without its {self._what}")
        self.finish()


def _reading_text(error: BaseException) -> str:
    """A demuxer's EAGAIN has nothing to do with a resource."""
    return "no media there" if isinstance(error, BlockingIOError) else _text(error)


def _text(error: BaseException) -> str:
    """In the owner's words."""
    if isinstance(error, OddSound):
        return str(error)
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return str(getattr(error, "strerror", None) or "its data are not as its type has them")


Feed: TypeAlias = tuple[InputContainer, dict[int, Decoding]]  # one connection, its tracks by stream index


def packets(feed: Feed, *, over_holes: bool = False) -> Iterator[tuple[Decoding, Packet[Any]]]:
    """The packets of one connection as they come; the last one per track is empty and flushes it.

    over_holes: go on behind what is no media, as players do; the error is raised when nothing else comes.
    """
    container, tracks = feed
    streams = [container.streams[index] for index in tracks]
    num_in_vain = 0
    while True:
        try:
            for packet in container.demux(streams):
                num_in_vain = 0
                yield tracks[packet.stream.index], packet
            return
        except _HOLES as error:
            num_in_vain += 1
            if not over_holes or num_in_vain > MAX_HOLE_READS:
                raise
            if num_in_vain == 1:
                for decoding in tracks.values():
                    decoding.lose_place(error)


class Teller:
    """Sends Progress whenever a stream enters a new piece, and as a sign of life after a second without."""

    def __init__(
        self, request: MediaRequest, lanes: Sequence[Lane], put: Put, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._piece_ns = request.piece_ns
        self._lanes = lanes
        self._put = put
        self._clock = clock
        self._reported: tuple[int, int] | None = None
        self._reported_at_ns = 0

    def tell(self) -> None:
        video_ns, audio_ns = self._position_ns(VideoTrack), self._position_ns(SoundTrack)
        pieces = (video_ns // self._piece_ns, audio_ns // self._piece_ns)
        now_ns = self._clock()
        if pieces != self._reported or now_ns - self._reported_at_ns >= SIGN_OF_LIFE_NS:
            self._reported, self._reported_at_ns = pieces, now_ns
            num_gaps = sum(lane.track.num_gaps for lane in self._lanes)
            self._put(Progress(video_ns, audio_ns, num_gaps, self._num_bad(VideoTrack), self._num_bad(SoundTrack)))

    def _position_ns(self, of_type: type[Track]) -> int:
        return min((lane.position_ns for lane in self._lanes if isinstance(lane.track, of_type)), default=FOREVER_NS)

    def _num_bad(self, of_type: type[Track]) -> int:
        return sum(lane.track.num_bad for lane in self._lanes if isinstance(lane.track, of_type))


class LiveWatch:
    """When a live source is given up: files have all the time in the world, and their parent's watchdog.

    Time counts while packets are waited for only: before, one was decoded, and its items waited for the parent.
    """

    def __init__(self, order: Order, now_ns: int) -> None:
        is_live = order.kind in LIVE_KINDS
        self._silence_ns = int(order.silence_timeout_s * NS_PER_S) if is_live else FOREVER_NS
        duration_ns = order.request.duration_ns
        self._until_ns = FOREVER_NS if duration_ns is None or not is_live else duration_ns + NS_PER_S
        self._listening_since_ns = now_ns
        self.listened_ns = 0  # time spent waiting for packets

    def is_over(self, arrival_ns: int) -> bool:
        """Whether the duration has passed, though a stream which died never reaches it.

        TimeoutError after a silence: libav answers its own time-out with the last packet, and waits once more.
        """
        waited_ns = arrival_ns - self._listening_since_ns
        self.listened_ns += waited_ns
        if waited_ns >= self._silence_ns:
            raise TimeoutError
        return arrival_ns > self._until_ns

    def listen(self, now_ns: int) -> None:
        """Waiting for the next packet begins."""
        self._listening_since_ns = now_ns


class Pulse:
    """Whether one track has stopped while others go on, judged against its own pace.

    patience_ns: how long a track of any pace may pause.
    """

    def __init__(self, patience_ns: int) -> None:
        self._patience_ns = patience_ns
        self._gaps: deque[int] = deque(maxlen=NUM_GAPS_KNOWN)
        self._alive_ns = 0

    @property
    def has_lived(self) -> bool:
        return bool(self._gaps)

    def beat(self, now_ns: int) -> None:
        """A sign of life."""
        self._gaps.append(now_ns - self._alive_ns)
        self._alive_ns = now_ns

    def is_still(self, now_ns: int) -> bool:
        is_known = len(self._gaps) == NUM_GAPS_KNOWN
        patience_ns = max(self._patience_ns, 3 * max(self._gaps, default=0), 0 if is_known else FIRST_PATIENCE_NS)
        return now_ns - self._alive_ns > patience_ns


class PulseWatch:
    """Tells of a live source's tracks which stop, and which come back."""

    def __init__(self, order: Order, decodings: Sequence[Decoding]) -> None:
        patience_ns = int(order.silence_timeout_s * NS_PER_S)
        self._pulses = [(decoding, Pulse(patience_ns)) for decoding in decodings]
        self._num_alive = dict.fromkeys(decodings, 0)
        self._still: set[Decoding] = set()

    def look(self, now_ns: int) -> None:
        """now_ns: of a clock which stands still while nobody listens."""
        for decoding, pulse in self._pulses:
            what = _WORDS[decoding.name]
            if decoding.num_alive > self._num_alive[decoding]:
                self._num_alive[decoding] = decoding.num_alive
                if decoding in self._still:
                    self._still.discard(decoding)
                    decoding.warn("track_back", f"gives {what} again" if pulse.has_lived else f"gives {what} now")
                pulse.beat(now_ns)
            elif decoding not in self._still and not decoding.track.done and pulse.is_still(now_ns):
                self._still.add(decoding)
                self._tell(decoding, pulse)

    def _tell(self, decoding: Decoding, pulse: Pulse) -> None:
        what = _WORDS[decoding.name]
        if pulse.has_lived:
            decoding.warn("track_frozen", f"gives no {what} any more, while the rest goes on")
        else:
            decoding.warn("track_late", f"announces {what} and has sent none yet; the rest goes on without until then")


def play(order: Order, feeds: Sequence[Feed], put: Put, teller: Teller) -> bool:
    """Decode all feeds, items in the order of their time; True when the duration was reached, False at the end."""
    if len(feeds) == 1:
        return play_connection(order, feeds[0], teller)
    return play_side_by_side(feeds, put, teller)


def play_side_by_side(feeds: Sequence[Feed], put: Put, teller: Teller) -> bool:
    """A file with a connection per track. What is behind is read next; what is ready and first goes out.

    So a track which has nothing for long says soon where it goes on, and none is ahead of the other by more than one of
    its packets makes.
    """
    readers = {decoding: packets(feed, over_holes=True) for feed in feeds for decoding in feed[1].values()}
    while open_decodings := [decoding for decoding in readers if not decoding.lane.done]:
        behind = min(open_decodings, key=lambda decoding: decoding.lane.position_ns)
        if behind.lane.items:
            put(behind.lane.items.popleft())
        elif (following := next(readers[behind], None)) is None:
            behind.finish()
        else:
            behind.decode(following[1], arrival_ns=0)
        teller.tell()
    return not all(decoding.track.ended for decoding in readers)


def play_connection(order: Order, feed: Feed, teller: Teller) -> bool:
    """Everything in the order in which it comes; of a live source also what is on the screen when nothing comes."""
    decodings = list(feed[1].values())
    watch = LiveWatch(order, session_ns(order))
    pulses = PulseWatch(order, decodings if order.kind in LIVE_KINDS else [])
    with keep_showing(order, decodings, teller) as lock:
        for decoding, packet in packets(feed, over_holes=order.kind not in LIVE_KINDS):
            arrival_ns = session_ns(order)
            over = watch.is_over(arrival_ns)
            with lock:
                decoding.decode(packet, arrival_ns)
                pulses.look(watch.listened_ns)
                teller.tell()
            if over or all(d.track.done for d in decodings):
                return not all(d.track.ended for d in decodings)
            time.sleep(min(d.decoder.rest_ns(session_ns(order)) for d in decodings) / NS_PER_S)
            watch.listen(session_ns(order))
    return False


@contextlib.contextmanager
def keep_showing(order: Order, decodings: Sequence[Decoding], teller: Teller) -> Iterator[threading.Lock]:
    """Meanwhile a live camera's picture is sent when its sampling instant has passed, also when no newer one comes.

    Gives the lock under which tracks are fed: libav waits for packets outside of it. A picture that is held too long is
    no longer sent, so that a source that hangs falls silent, which the parent notices.
    """
    lock, over = threading.Lock(), threading.Event()
    pictures = [(d, d.track) for d in decodings if isinstance(d.track, VideoTrack)]

    def watch_clock(decoding: Decoding, track: VideoTrack) -> None:
        while not over.wait(max((track.due_ns - session_ns(order)) / NS_PER_S, MIN_LOOK_S)):
            with lock:
                if decoding.hold(session_ns(order)):
                    teller.tell()

    threads = [threading.Thread(target=watch_clock, args=pair, daemon=True) for pair in pictures]
    threads = threads if order.kind in LIVE_KINDS else []
    for thread in threads:
        thread.start()
    try:
        yield lock
    finally:
        over.set()
        for thread in threads:
            thread.join()  # two threads must not write into the pipe at once


def session_ns(order: Order) -> int:
    """The event time that is now."""
    return time.monotonic_ns() - order.origin_ns
