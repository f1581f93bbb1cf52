"""One view's media on the session's axis: what the decoder process reads ahead, handed out when its time has come.

A camera has one view or several, each with a feed of its own. Camera and microphone of a session share the feed of the
view that is heard, so that one connection serves both. The feed never holds more than
`MAX_AHEAD_NS` of media, or two windows. What it does not read of a file waits in the decoder's pipe, and the decoder
waits with it. A live camera waits for nobody: where one of the two takes nothing, or much comes too late at once, the
oldest windows are forgotten, which are missing then, and the other one goes on.

Rules. Which tracks there are is a matter of the connection: one that a live camera lacks now may come with the next.
And time goes on with the present: where all of us were stopped for long (a laptop's lid, a paused container), a file
goes on where it was, and what has piled up of a live camera is forgotten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.window import FOREVER_NS
from stages.media.feed_buffer import Notice, Sides, SoundBuffer
from stages.media.feed_opening import Opener, Opening, at_once, in_thread
from stages.media.feed_retries import Retries
from stages.media.health import Health, Totals
from stages.media.reader import (
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
    mask_source,
)
from stages.media.wire import TrackName
from stages.rates import SOUND_RATE_HZ
from stages.session import Session, View
from stages.stage import TICK_NS, Site, SourceId, SourceReport, Stage

MAX_AHEAD_NS = 2 * NS_PER_S
PIECE_NS = 50 * NS_PER_MS  # of a live source's sound, which may be late for its window, no more is late than must be
STOPPED_NS = 3 * NS_PER_S  # or two windows: who was not called for longer was stopped, and the world went on
LOOK_NS = 50 * NS_PER_MS  # a source that is opened, or has gone silent, need not be seen sooner
MAX_CLOSED = 256  # sources of which is known how they did when they are gone

Open = Callable[[MediaRequest], MediaReader]


class Feed:
    """The media of one view of a session, from one decoder process at a time."""

    def __init__(self, session: Session, open_reader: Open, opener: Opener = at_once, from_ns: int = 0) -> None:
        """session: as this view alone has it. from_ns: event time from which on it is watched; a file begins then."""
        self._session = session
        (self._view,) = session.media.views
        self._open = open_reader
        self._opener = opener
        self._opening: Opening | None = None
        self._reader: MediaReader | None = None
        self._live = False  # the last reader that could be made reads a source that sets the pace itself
        self._absent: set[TrackName] = set()  # of this connection of a live source: nothing of these will come
        self._retries = Retries()
        self._sides = Sides(sound=SoundBuffer(session.begin_index * session.window_ns * SOUND_RATE_HZ // NS_PER_S))
        self._health = Health()
        self._delivers: set[TrackName] = set()
        self._frozen: set[TrackName] = set()  # told, and nothing has come since
        self._report = SourceReport()
        self._pumped_ns: int | None = None
        self._pause_ns = from_ns  # a file's media are so much later than it says
        self._begin_ns = max(session.begin_index * session.window_ns, from_ns)  # of sound: a window's is whole or none
        self.video_ns = max(session.begin_ns, from_ns)  # nothing before this will come
        self.audio_ns = self._begin_ns
        self._shown_ns, self._heard_ns = self.video_ns, self.audio_ns  # end of what was really seen, and heard
        self.end_ns: int | None = None  # set when the source has ended for good

    @property
    def totals(self) -> Totals:
        """What was damaged and missing within the source so far."""
        return self._health.totals

    @property
    def delivers(self) -> frozenset[TrackName]:
        """The tracks of which something has come, and still comes."""
        return frozenset(self._delivers)

    @property
    def report(self) -> SourceReport:
        return replace(self._report, is_up=bool(self._delivers))

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
        if self._opening is not None:
            self._opening.abandon()
            self._opening = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._delivers.clear()

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
        self._sides.cut(end_ns)
        self.end_ns = end_ns

    def wakes(self) -> list[int]:
        """The descriptor to wait on while there is room to read ahead."""
        return [self._reader.fileno()] if self._reader is not None and self._has_room() else []

    def pump(self, now_ns: int) -> None:
        """Read ahead what there is, without waiting; the first time, start the decoder; find a lost camera again.

        Raises nothing: a source that can't be opened is a lost camera.
        """
        self._catch_up(now_ns)
        duration_ns = self._session.duration_ns
        if self._live and duration_ns is not None and now_ns >= duration_ns + self._session.lateness_ns:
            self.stop(duration_ns)
        if self._reader is None and not self.over:
            self._connect(now_ns)
        if self._live:
            self._make_room()
        while self._reader is not None and self._has_room():
            item = self._reader.read(0)
            if item is None:
                break
            self._take(item, now_ns)
        self._pass_absent(now_ns)

    def take_frames(self, until_ns: int) -> list[Frame]:
        """The pictures whose time has come."""
        return self._sides.take_frames(until_ns)

    def take_sound(self, end_ns: int) -> tuple[int, np.ndarray]:
        """The sound up to `end_ns`: (number of its first sample, samples float32 [n]); n = 0 when there is none."""
        return self._sides.sound.take(end_ns * SOUND_RATE_HZ // NS_PER_S)

    def take_notices(self) -> list[Notice]:
        notices = list(self._sides.notices)
        self._sides.notices.clear()
        return notices

    @property
    def next_frame_ns(self) -> int | None:
        return self._sides.next_frame_ns

    def _has_room(self) -> bool:
        return self._has_room_to_see and self._has_room_to_hear

    @property
    def _has_room_to_see(self) -> bool:
        return len(self._sides.frames) < max(int(self._session.media.fps * self._ahead_ns // NS_PER_S), 2)

    @property
    def _has_room_to_hear(self) -> bool:
        return self._sides.sound.num_samples < self._ahead_ns * SOUND_RATE_HZ // NS_PER_S

    @property
    def _ahead_ns(self) -> int:
        return max(MAX_AHEAD_NS, 2 * self._session.window_ns)

    def _make_room(self) -> None:
        """Forget the oldest window of what nobody takes; once per `pump`, so that no source keeps us here."""
        sides = self._sides
        if not self._has_room_to_see:
            self.take_frames(self._window_end_ns(sides.frames[0].start_ns) - 1)
        if not self._has_room_to_hear:
            self.take_sound(self._window_end_ns(sides.sound.first_ns))

    def _window_end_ns(self, time_ns: int) -> int:
        return (time_ns // self._session.window_ns + 1) * self._session.window_ns

    # ---- the present -------------------------------------------------------------------------------------------------

    def _catch_up(self, now_ns: int) -> None:
        """Go on with the present where we were stopped: in real time nothing that is hours late is of any use."""
        before_ns, self._pumped_ns = self._pumped_ns, now_ns
        window_ns = self._session.window_ns
        if before_ns is None or not self._session.paced or self.over:
            return
        stopped_ns = now_ns - before_ns
        if stopped_ns <= max(STOPPED_NS, 2 * window_ns):
            return
        if self._live:
            self._forget_before(now_ns - window_ns - self._session.lateness_ns)
            what = "what a live camera gave meanwhile is forgotten"
        else:
            self._shift(stopped_ns // window_ns * window_ns)
            what = "it goes on where it was"
        seconds = f"{stopped_ns / NS_PER_S:.1f} s"
        self._sides.notices.append(
            Notice("camera_warning", now_ns, "stopped", f"nothing ran here for {seconds}: {what}")
        )

    def _forget_before(self, time_ns: int) -> None:
        self._sides.take_frames(time_ns - 1)
        self.take_sound(max(time_ns, 0))

    def _shift(self, by_ns: int) -> None:
        """A file's media happen so much later: whole windows, so that its pictures keep their place within them."""
        sides = self._sides
        self._pause_ns += by_ns
        sides.frames = deque(replace(frame, start_ns=frame.start_ns + by_ns) for frame in sides.frames)
        sides.sound.shift(by_ns * SOUND_RATE_HZ // NS_PER_S)
        if self.video_ns < FOREVER_NS or sides.frames:
            self._shown_ns += by_ns
        if self.audio_ns < FOREVER_NS or sides.sound.num_samples:
            self._heard_ns += by_ns
        self.video_ns, self.audio_ns = self._later(self.video_ns, by_ns), self._later(self.audio_ns, by_ns)

    @staticmethod
    def _later(time_ns: int, by_ns: int) -> int:
        return time_ns + by_ns if time_ns < FOREVER_NS else time_ns

    def _is_stale(self, end_ns: int, now_ns: int) -> bool:
        """Of a live camera: too old for any window that is still open."""
        behind_ns = self._session.lateness_ns + max(STOPPED_NS, 2 * self._session.window_ns)
        return self._live and self._session.paced and end_ns < now_ns - behind_ns

    @property
    def _shown_name(self) -> str:
        return self._view.masked_source or mask_source(self._view.source)

    # ---- the connection ----------------------------------------------------------------------------------------------

    def _connect(self, now_ns: int) -> None:
        if self._opening is None:
            if not self._retries.is_due(now_ns):
                return
            at_ns = time.monotonic_ns()
            self._opening = Opening(self._opener(lambda: self._open_and_start(now_ns, at_ns)), now_ns)
        if self._opening.becomes_overdue(now_ns):
            why = f"{self._shown_name} could not be opened in time: its storage does not answer; it is waited for"
            self._sides.notices.append(Notice("camera_lost", now_ns, "timeout", why))
        if not self._opening.done:
            return
        opening, self._opening = self._opening, None
        self._absent.clear()
        self._health.connect()
        try:
            self._reader = opening.reader()
        except MediaError as error:
            self._lose(Failed(error.kind, error.message), now_ns)

    def _open_and_start(self, now_ns: int, at_ns: int) -> MediaReader:
        """Perhaps in another thread. MediaError when the source can't be opened."""
        session = self._session
        request = MediaRequest(
            source=self._view.source,
            fps=session.media.fps,
            max_pixels=session.media.max_pixels,
            want_video=session.pictures,
            want_audio=session.microphone,
            piece_ns=min(PIECE_NS, session.window_ns),
            duration_ns=session.duration_ns,
            masked=self._view.masked_source,
            window_ns=session.window_ns,
            start_ns=max(self._begin_ns - self._pause_ns, 0),
        )
        reader = self._open(request)
        self._live = reader.is_live
        if self._live:
            self._pause_ns = 0
        reader.start(now_ns, at_ns)
        return reader

    def _take(self, item: MediaItem, now_ns: int) -> None:
        if isinstance(item, Frame):
            self._take_frame(replace(item, start_ns=item.start_ns + self._pause_ns), now_ns)
        elif isinstance(item, Sound):
            self._take_sound(item.first_sample + self._pause_ns * SOUND_RATE_HZ // NS_PER_S, item.samples, now_ns)
        elif isinstance(item, Progress):
            self.video_ns = max(self.video_ns, self._reached_ns("video", item.video_ns))
            self.audio_ns = max(self.audio_ns, self._reached_ns("audio", item.audio_ns))
            self._health.count(item)
        elif isinstance(item, Warned):
            self._warn(item, now_ns)
        elif isinstance(item, Ended):
            if not self._report.has_delivered and not self._begin_ns:
                self._report = replace(self._report, problem=f"gave neither picture nor sound: {item.reason}")
            self._finish(Notice("camera_ended", self._end_ns(), reason=item.reason))
        else:
            self._lose(item, now_ns)

    def _warn(self, item: Warned, now_ns: int) -> None:
        if self._health.news.is_new(item):
            at_ns = now_ns if self._session.paced else self._seen_ns
            self._sides.notices.append(Notice("camera_warning", at_ns, item.code, item.message, item.track))
        if item.code in ("track_frozen", "track_given_up"):
            self._delivers.discard(item.track)
        if item.code == "track_frozen":
            self._frozen.add(item.track)
        if item.code == "track_frozen" and self._live and self._retries.may_renew(now_ns):
            self._lose(Failed("timeout", f"{item.message}: it is opened anew"), now_ns)

    def _reached_ns(self, track: TrackName, progress_ns: int) -> int:
        if progress_ns < FOREVER_NS:
            return progress_ns + self._pause_ns
        if not self._live:
            return FOREVER_NS
        self._absent.add(track)  # not there, given up, or the connection's end is near: the next one may have it
        return 0

    def _pass_absent(self, now_ns: int) -> None:
        """Nobody waits for a track that this connection does not have."""
        if "video" in self._absent:
            self.video_ns = max(self.video_ns, now_ns)
        if "audio" in self._absent:
            self.audio_ns = max(self.audio_ns, now_ns)

    def _take_frame(self, frame: Frame, now_ns: int) -> None:
        # A camera that was lost and found within one long period gives a second picture of it.
        if not self.video_ns <= frame.start_ns < self.limit_ns or self._is_stale(frame.start_ns, now_ns):
            return
        self._come_up("video", frame.start_ns)
        self._sides.frames.append(frame)
        self._shown_ns = self.video_ns = frame.start_ns + 1

    def _take_sound(self, first: int, samples: np.ndarray, now_ns: int) -> None:
        end_ns = (first + len(samples)) * NS_PER_S // SOUND_RATE_HZ
        self.audio_ns = max(self.audio_ns, end_ns)
        samples = samples[: max(self.limit_ns * SOUND_RATE_HZ // NS_PER_S - first, 0)]
        if len(samples) == 0 or self._is_stale(end_ns, now_ns):
            return
        self._sides.sound.add(first, samples)
        self._come_up("audio", end_ns)
        self._heard_ns = max(self._heard_ns, min(end_ns, self.limit_ns))

    def _come_up(self, track: TrackName, at_ns: int) -> None:
        """The camera delivers, for the first time or again."""
        if not self._delivers:
            self._sides.notices.append(Notice("camera_up", at_ns))
        self._report = replace(self._report, has_delivered=True)
        self._delivers.add(track)
        if track in self._frozen:
            self._frozen.discard(track)
            self._warn(Warned(track, "track_back", f"{self._shown_name} gives {track} again"), at_ns)
        self._retries.delivers()

    def _lose(self, failed: Failed, now_ns: int) -> None:
        self.close()
        self._report = replace(self._report, num_lost=self._report.num_lost + 1, problem=failed.message)
        notice = Notice("camera_lost", now_ns, reason=failed.kind, message=failed.message)
        if not self._live:
            self._finish(notice)
            return
        self._sides.notices.append(notice)
        self._retries.lost(now_ns)

    def _finish(self, notice: Notice) -> None:
        self.close()
        self._sides.notices.append(notice)
        # A lost file still owes its windows, as missing, until the time that was asked for is over.
        lost_ns = self._session.duration_ns if notice.type == "camera_lost" else None
        end_ns = self._end_ns() if lost_ns is None else lost_ns
        self.end_ns = end_ns if self.end_ns is None else min(self.end_ns, end_ns)

    # ---- the end -----------------------------------------------------------------------------------------------------

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
    """The open feeds of the process, by view; owned by the process, read by its camera and microphone stages."""

    def __init__(self, open_reader: Open = MediaReader, opener: Opener = at_once) -> None:
        """opener: `in_thread` where a source that can't be opened must not hold up the others."""
        self._open = open_reader
        self._opener = opener
        self._feeds: dict[SourceId, Feed] = {}
        self._closed: dict[SourceId, SourceReport] = {}
        self._users: dict[SourceId, int] = {}

    @classmethod
    def of(cls, site: Site) -> Feeds:
        """Those of the process."""
        return site.common(cls, lambda: cls(opener=in_thread))

    def open(self, session: Session, view: View) -> Feed:
        """The view's feed, made by its first user."""
        source = SourceId(session.id, view.name)
        if source not in self._feeds:
            self._feeds[source] = Feed(session.of_view(view), self._open, self._opener, view.from_ns)
        self._users[source] = self._users.get(source, 0) + 1
        return self._feeds[source]

    def close(self, source: SourceId) -> None:
        """Closed by its last user."""
        if source not in self._users:
            return
        self._users[source] -= 1
        if self._users[source] == 0:
            del self._users[source]
            feed = self._feeds.pop(source)
            feed.close()
            self._closed.pop(source, None)  # so that the newest is the last
            self._closed[source] = feed.report
            for oldest in [*self._closed][:-MAX_CLOSED]:
                del self._closed[oldest]

    def reports(self) -> dict[SourceId, SourceReport]:
        """How the sources do that are open, and those that were until lately."""
        return self._closed | {source: feed.report for source, feed in self._feeds.items()}

    def wakes(self) -> dict[int, SessionId]:
        return {descriptor: source.session for source, feed in self._feeds.items() for descriptor in feed.wakes()}


def soonest_ns(session: Session, now_ns: int, *at_ns: int | None) -> int:
    """In how many ns the first of these times comes. What a decoder brings wakes its stage; for what does not, such as
    a source that opens, it looks now and then. In virtual time no clock is waited for."""
    if not session.paced:
        return TICK_NS
    return max(min(LOOK_NS, *(each - now_ns for each in at_ns if each is not None)), 0)


@dataclass(slots=True)
class Reading:
    """A view of a session at a stage that reads its feed. removed: it was taken away."""

    session: Session
    view: View
    feed: Feed
    ended: bool = False
    removed: bool = False


R = TypeVar("R", bound=Reading)


class FeedStage(Stage, Generic[R]):
    """What camera and microphone share: they read the feeds of a session's views, until their ends.

    begin: makes the state of a view that opens.
    """

    def __init__(self, feeds: Feeds, begin: Callable[[Session, View, Feed], R]) -> None:
        self._feeds = feeds
        self._begin = begin
        self._open: dict[SessionId, dict[str, R]] = {}  # by view

    def views_of(self, session: Session) -> Sequence[View]:
        """Those whose feeds it reads."""
        return session.media.views

    def open_session(self, session: Session) -> None:
        self._open[session.id] = {}
        try:
            for view in self.views_of(session):
                self._open_view(session, view)
        except Exception:
            self.close_session(session.id)
            raise

    def _open_view(self, session: Session, view: View) -> None:
        feed = self._feeds.open(session, view)
        try:
            self._open[session.id][view.name] = self._begin(session, view, feed)
        except Exception:
            self._feeds.close(SourceId(session.id, view.name))
            raise

    def close_session(self, session: SessionId) -> None:
        for name in self._open.pop(session, {}):
            self._feeds.close(SourceId(session, name))

    def wakes(self) -> dict[int, SessionId]:
        return self._feeds.wakes()

    def sources(self) -> dict[SourceId, SourceReport]:
        return self._feeds.reports()

    def end(self, session: SessionId, now_ns: int) -> None:
        for reading in self._open[session].values():
            reading.feed.stop(now_ns)

    def finished(self, session: SessionId) -> bool:
        return all(reading.ended for reading in self._open[session].values())
