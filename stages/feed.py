"""One camera's media on the session's axis: what the decoder process reads ahead, handed out when its time has come.

Camera and microphone of a session share a feed, so that one connection serves both. The feed never holds more than
`MAX_AHEAD_NS` of media, or two windows. What it does not read of a file waits in the decoder's pipe, and the decoder
waits with it. A live camera waits for nobody: where one of the two takes nothing, or much comes too late at once, the
oldest windows are forgotten, which are missing then, and the other one goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.streams import SOUND_RATE_HZ
from graph.window import FOREVER_NS
from stages.media import (
    Ended,
    Failed,
    Frame,
    MediaError,
    MediaItem,
    MediaReader,
    MediaRequest,
    Progress,
    Sound,
    Warned,
)
from stages.media_health import Health, Totals
from stages.stage import Session, Stage

MAX_AHEAD_NS = 2 * NS_PER_S
PIECE_NS = 50 * NS_PER_MS  # of a live source's sound, which may be late for its window, no more is late than must be
FIRST_RETRY_NS, LAST_RETRY_NS = NS_PER_S, 30 * NS_PER_S  # a camera that is gone is looked for again, ever less often

Open = Callable[[MediaRequest], MediaReader]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened to a camera: it delivers, it was lost, it ended, or not all of it can be used."""

    type: str
    at_ns: int
    reason: str = ""
    message: str = ""
    track: str = ""


@dataclass(slots=True)
class _Sides:
    """What the two readers of a feed have not taken yet."""

    frames: deque[Frame] = field(default_factory=deque)
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    first_sample: int = 0
    notices: deque[Notice] = field(default_factory=deque)


class Feed:
    """The media of one session, from one decoder process at a time."""

    def __init__(self, session: Session, open_reader: Open) -> None:
        self._session = session
        self._open = open_reader
        self._reader: MediaReader | None = None
        self._live = False  # the last reader that could be made reads a source that sets the pace itself
        self._told = False  # the current reader has said which streams there are
        self._retry_ns = FIRST_RETRY_NS
        self._retry_at_ns = -FOREVER_NS  # at once, before event time 0
        self._sides = _Sides()
        self._health = Health()
        self._up = False
        self._shown_ns = 0  # end of what was really seen, and heard
        self._heard_ns = 0
        self.video_ns = 0  # nothing before this will come
        self.audio_ns = 0
        self.end_ns: int | None = None  # set when the source has ended for good

    @property
    def totals(self) -> Totals:
        """What was damaged and missing within the source so far."""
        return self._health.totals

    @property
    def over(self) -> bool:
        return self.end_ns is not None

    @property
    def video_end_ns(self) -> int | None:
        """Where the pictures end, once that is known; frames that have been read may still wait to be taken."""
        return self._end_of(self.video_ns, self._shown_ns)

    @property
    def audio_end_ns(self) -> int | None:
        """Where the sound ends, once that is known; samples that have been read may still wait to be taken."""
        return self._end_of(self.audio_ns, self._heard_ns)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def stop(self, now_ns: int) -> None:
        """End the source with the window that `now_ns` lies in; what comes after it is forgotten.

        In virtual time, where the clock says nothing, with the last whole window that was read.
        """
        window_ns = self._session.window_ns
        if self._session.paced:
            end_ns = -(-max(now_ns, 0) // window_ns) * window_ns
        else:
            end_ns = self._seen_ns // window_ns * window_ns
            self.close()
        if self.end_ns is not None and self.end_ns <= end_ns:
            return
        sides = self._sides
        sides.frames = deque(frame for frame in sides.frames if frame.start_ns < end_ns)
        sides.samples = sides.samples[: max(end_ns * SOUND_RATE_HZ // NS_PER_S - sides.first_sample, 0)]
        self.end_ns = end_ns

    def wakes(self) -> list[int]:
        """The descriptor to wait on while there is room to read ahead."""
        return [self._reader.fileno()] if self._reader is not None and self._has_room() else []

    def pump(self, now_ns: int) -> None:
        """Read ahead what there is, without waiting; the first time, start the decoder; find a lost camera again.

        Raises nothing: a source that can't be opened is a lost camera.
        """
        duration_ns = self._session.duration_ns
        if self._live and duration_ns is not None and now_ns >= duration_ns + self._session.lateness_ns:
            self.stop(duration_ns)
        if self._reader is None and not self.over and now_ns >= self._retry_at_ns:
            self._connect(now_ns)
        if self._live:
            self._make_room()
        while self._reader is not None and self._has_room():
            item = self._reader.read(0)
            if item is None:
                return
            self._take(item, now_ns)

    def take_frames(self, until_ns: int) -> list[Frame]:
        """The pictures whose time has come."""
        taken = []
        frames = self._sides.frames
        while frames and frames[0].start_ns <= until_ns:
            taken.append(frames.popleft())
        return taken

    def take_sound(self, end_ns: int) -> tuple[int, np.ndarray]:
        """The sound up to `end_ns`: (number of its first sample, samples float32 [n]); n = 0 when there is none."""
        sides = self._sides
        count = max(min(end_ns * SOUND_RATE_HZ // NS_PER_S - sides.first_sample, len(sides.samples)), 0)
        first, taken = sides.first_sample, sides.samples[:count]
        sides.samples = sides.samples[count:]
        sides.first_sample += count
        return first, taken

    def take_notices(self) -> list[Notice]:
        notices = list(self._sides.notices)
        self._sides.notices.clear()
        return notices

    @property
    def next_frame_ns(self) -> int | None:
        return self._sides.frames[0].start_ns if self._sides.frames else None

    def _has_room(self) -> bool:
        return self._has_room_to_see and self._has_room_to_hear

    @property
    def _has_room_to_see(self) -> bool:
        return len(self._sides.frames) < max(int(self._session.fps * self._ahead_ns // NS_PER_S), 2)

    @property
    def _has_room_to_hear(self) -> bool:
        return len(self._sides.samples) < self._ahead_ns * SOUND_RATE_HZ // NS_PER_S

    @property
    def _ahead_ns(self) -> int:
        return max(MAX_AHEAD_NS, 2 * self._session.window_ns)

    def _make_room(self) -> None:
        """Forget the oldest window of what nobody takes; once per `pump`, so that no source keeps us here."""
        sides = self._sides
        if not self._has_room_to_see:
            self.take_frames(self._window_end_ns(sides.frames[0].start_ns) - 1)
        if not self._has_room_to_hear:
            self.take_sound(self._window_end_ns(sides.first_sample * NS_PER_S // SOUND_RATE_HZ))

    def _window_end_ns(self, time_ns: int) -> int:
        return (time_ns // self._session.window_ns + 1) * self._session.window_ns

    def _connect(self, now_ns: int) -> None:
        session = self._session
        self._told = False
        self._health.connect()
        try:
            request = MediaRequest(
                source=session.source,
                fps=session.fps,
                max_pixels=session.max_pixels,
                want_video=session.pictures,
                want_audio=session.microphone,
                piece_ns=min(PIECE_NS, session.window_ns),
                duration_ns=session.duration_ns,
                masked=session.masked_source,
                window_ns=session.window_ns,
            )
            reader = self._open(request)
            self._live = reader.is_live
            reader.start(now_ns)
        except MediaError as error:
            self._lose(Failed(error.kind, error.message), now_ns)
        else:
            self._reader = reader

    def _take(self, item: MediaItem, now_ns: int) -> None:
        if isinstance(item, Frame):
            self._take_frame(item)
        elif isinstance(item, Sound):
            self._take_sound(item)
        elif isinstance(item, Progress):
            self.video_ns = max(self.video_ns, self._reached_ns(item.video_ns))
            self.audio_ns = max(self.audio_ns, self._reached_ns(item.audio_ns))
            self._told = True
            self._health.count(item)
        elif isinstance(item, Warned):
            self._warn(item, now_ns)
        elif isinstance(item, Ended):
            self._finish(Notice("camera_ended", self._end_ns(), reason=item.reason))
        else:
            self._lose(item, now_ns)

    def _warn(self, item: Warned, now_ns: int) -> None:
        if self._health.news.is_new(item):
            at_ns = now_ns if self._session.paced else self._seen_ns
            self._sides.notices.append(Notice("camera_warning", at_ns, item.code, item.message, item.track))

    def _reached_ns(self, progress_ns: int) -> int:
        if progress_ns < FOREVER_NS:
            return progress_ns
        # A stream of a live source that "ends" has lost its connection, which comes again.
        return 0 if self._live and self._told else FOREVER_NS

    def _take_frame(self, frame: Frame) -> None:
        # A camera that was lost and found within one long period gives a second picture of it.
        if not self.video_ns <= frame.start_ns < self.limit_ns:
            return
        self._come_up(frame.start_ns)
        self._sides.frames.append(frame)
        self._shown_ns = self.video_ns = frame.start_ns + 1

    def _take_sound(self, sound: Sound) -> None:
        sides, first = self._sides, sound.first_sample
        end_ns = (first + len(sound.samples)) * NS_PER_S // SOUND_RATE_HZ
        self.audio_ns = max(self.audio_ns, end_ns)
        samples = sound.samples[: max(self.limit_ns * SOUND_RATE_HZ // NS_PER_S - first, 0)]
        if len(samples) == 0:
            return
        if len(sides.samples) == 0:
            sides.first_sample = max(first, sides.first_sample)
        gap = np.zeros(max(first - sides.first_sample - len(sides.samples), 0), np.float32)
        sides.samples = np.concatenate([sides.samples, gap, samples])
        self._come_up(end_ns)
        self._heard_ns = max(self._heard_ns, min(end_ns, self.limit_ns))

    def _come_up(self, at_ns: int) -> None:
        """The camera delivers, for the first time or again."""
        if not self._up:
            self._sides.notices.append(Notice("camera_up", at_ns))
        self._up = True
        self._retry_ns = FIRST_RETRY_NS

    def _lose(self, failed: Failed, now_ns: int) -> None:
        self._up = False
        self.close()
        if not self._live:
            self._finish(Notice("camera_lost", now_ns, reason=failed.kind, message=failed.message))
            return
        self._sides.notices.append(Notice("camera_lost", now_ns, reason=failed.kind, message=failed.message))
        self._retry_at_ns = now_ns + self._retry_ns
        self._retry_ns = min(self._retry_ns * 2, LAST_RETRY_NS)

    def _finish(self, notice: Notice) -> None:
        self.close()
        self._sides.notices.append(notice)
        # A lost file still owes its windows, as missing, until the time that was asked for is over.
        lost_ns = self._session.duration_ns if notice.type == "camera_lost" else None
        end_ns = self._end_ns() if lost_ns is None else lost_ns
        self.end_ns = end_ns if self.end_ns is None else min(self.end_ns, end_ns)

    @property
    def limit_ns(self) -> int:
        """What begins here or later is not wanted."""
        return min(ns for ns in (self.end_ns, self._session.duration_ns, FOREVER_NS) if ns is not None)

    @property
    def _seen_ns(self) -> int:
        """End of what was really seen and heard."""
        return max(self._shown_ns, self._heard_ns)

    def _end_of(self, stream_ns: int, seen_ns: int) -> int | None:
        ends = [ns for ns in (self.end_ns, seen_ns if stream_ns >= FOREVER_NS else None) if ns is not None]
        return min(ends, default=None)

    def _end_ns(self) -> int:
        """End of the media, or of the time that was asked for."""
        duration_ns = self._session.duration_ns
        return self._seen_ns if duration_ns is None else min(self._seen_ns, duration_ns)


class Feeds:
    """The feeds of one process, by session; owned by the process, read by its camera and microphone stages."""

    def __init__(self, open_reader: Open = MediaReader) -> None:
        self._open = open_reader
        self._feeds: dict[SessionId, Feed] = {}
        self._users: dict[SessionId, int] = {}

    def open(self, session: Session) -> Feed:
        """The session's feed, made by its first user."""
        if session.id not in self._feeds:
            self._feeds[session.id] = Feed(session, self._open)
        self._users[session.id] = self._users.get(session.id, 0) + 1
        return self._feeds[session.id]

    def close(self, session: SessionId) -> None:
        """Closed by its last user."""
        if session not in self._users:
            return
        self._users[session] -= 1
        if self._users[session] == 0:
            del self._users[session]
            self._feeds.pop(session).close()

    def wakes(self) -> list[int]:
        return [descriptor for feed in self._feeds.values() for descriptor in feed.wakes()]


@dataclass(slots=True)
class Reading:
    """A session at a stage that reads its feed."""

    session: Session
    feed: Feed
    ended: bool = False


R = TypeVar("R", bound=Reading)


class FeedStage(Stage, Generic[R]):
    """What camera and microphone share: they read the session's feed, until its end.

    begin: makes the state of a session that opens.
    """

    def __init__(self, feeds: Feeds, begin: Callable[[Session, Feed], R]) -> None:
        self._feeds = feeds
        self._begin = begin
        self._open: dict[SessionId, R] = {}

    def open_session(self, session: Session) -> None:
        self._open[session.id] = self._begin(session, self._feeds.open(session))

    def close_session(self, session: SessionId) -> None:
        if self._open.pop(session, None) is not None:
            self._feeds.close(session)

    def wakes(self) -> Sequence[int]:
        return self._feeds.wakes()

    def end(self, session: SessionId, now_ns: int) -> None:
        self._open[session].feed.stop(now_ns)

    def finished(self, session: SessionId) -> bool:
        return self._open[session].ended
