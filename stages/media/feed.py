"""One view's media on the session's axis: what the decoder process reads ahead, handed out when its time has come.

A camera has one view or several, each with a feed of its own. Camera and microphone of a session share the feed of the
view that is heard, so that one connection serves both. The feed never holds more than two seconds of media, or two
windows (feed_buffer.py). What it does not read of a file waits in the decoder's pipe, and the decoder waits with it. A
live camera waits for nobody: where one of the two takes nothing, or much comes too late at once, the oldest windows are
forgotten, which are missing then, and the other one continues.

Rules. Which tracks there are is a matter of the connection: one that a live camera lacks now may come with the next.
And time goes on with the present: where all of us were stopped for long (a laptop's lid, a paused container), a file
goes on where it was, and what has piled up of a live camera is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from graph.chunk import NS_PER_MS, NS_PER_S
from graph.window import FOREVER_NS
from stages.media.feed_buffer import Notice, Sides
from stages.media.feed_opening import Opener, Opening, at_once
from stages.media.feed_retries import Retries
from stages.media.feed_times import FeedTimes
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
from stages.media.wire import DURATION_OVER, TrackName
from stages.rates import SOUND_RATE_HZ
from stages.session import Session
from stages.stage import SourceReport

PIECE_NS = 50 * NS_PER_MS  # of a live source's sound, which may be late for its window, no more is late than must be
STOPPED = "it was stopped"
STOPPED_NS = 3 * NS_PER_S  # or two windows: who was not called for longer was stopped, and the world went on

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
        self._sides = Sides.of(session)
        self._health = Health()
        self._delivers: set[TrackName] = set()
        self._frozen: set[TrackName] = set()  # told, and nothing has come since
        self._report = SourceReport()
        self._pumped_ns: int | None = None
        self._stop_reason = ""
        self.times = FeedTimes.of(session, from_ns)

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

    def close(self) -> None:
        if self._opening is not None:
            self._opening.abandon()
            self._opening = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._delivers.clear()

    @property
    def is_done(self) -> bool:
        """Nothing more will come, and all that there was to notice of it was taken."""
        return self.times.are_over and not self._sides.has_notices

    def stop(self, now_ns: int, reason: str = "") -> None:
        """End the source with the window that `now_ns` lies in; what comes after it is forgotten.

        Of the last window, what is under way is still waited for, as of any window. In virtual time, where the clock
        says nothing, the last whole window that was read is the last. reason: of the notice `camera_ended`; "": there
        is none.
        """
        window_ns = self._session.window_ns
        if self._session.paced:
            end_ns = -(-max(now_ns, 0) // window_ns) * window_ns
        else:
            end_ns = self.times.seen_ns // window_ns * window_ns
            self.close()
        if self.times.limit_ns <= end_ns and (self.times.are_over or self.times.stop_ns is not None):
            return
        self._sides.cut(end_ns)
        self._stop_reason, self.times.stop_ns = reason, end_ns
        if self.times.are_over and self._sides.ending is None:  # it was lost for good, or its end is known already
            self.times.end_ns = end_ns
        elif self.times.are_over or not self._session.paced or self._is_to_end(now_ns):
            self._end_at_limit()

    def wakes(self) -> list[int]:
        """The descriptor to wait on while there is room to read ahead."""
        return [self._reader.fileno()] if self._reader is not None and self._sides.has_room else []

    def pump(self, now_ns: int) -> None:
        """Read ahead what there is, without waiting; the first time, start the decoder; find a lost camera again.

        Raises nothing: a source that can't be opened is a lost camera.
        """
        self._catch_up(now_ns)
        if self._reader is None and not self.times.are_over and not self._is_to_end(now_ns):
            self._connect(now_ns)
        if self._live:
            self._sides.make_room()
        while self._reader is not None and self._sides.has_room and not self.times.have_reached_stop:
            item = self._reader.read(0)
            if item is None:
                break
            self._take(item, now_ns)
        self._pass_absent(now_ns)
        if not self.times.are_over and self._is_to_end(now_ns):
            self._end_at_limit()

    def take_frames(self, until_ns: int) -> list[Frame]:
        """The pictures whose time has come."""
        return self._sides.take_frames(until_ns)

    def take_sound(self, end_ns: int) -> tuple[int, np.ndarray]:
        """The sound up to `end_ns`: (number of its first sample, samples float32 [n]); n = 0 when there is none."""
        return self._sides.sound.take(end_ns * SOUND_RATE_HZ // NS_PER_S)

    def take_notices(self, until_ns: int = FOREVER_NS) -> list[Notice]:
        """What has happened, and that it has ended, if that was by `until_ns`."""
        return self._sides.take_notices(until_ns)

    @property
    def next_frame_ns(self) -> int | None:
        return self._sides.next_frame_ns

    # ---- the present -------------------------------------------------------------------------------------------------

    def _catch_up(self, now_ns: int) -> None:
        """Go on with the present where we were stopped: in real time nothing that is hours late is of any use."""
        before_ns, self._pumped_ns = self._pumped_ns, now_ns
        window_ns = self._session.window_ns
        if before_ns is None or not self._session.paced or self.times.are_over:
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
        self.times.shift(by_ns, has_frames=bool(self._sides.frames), has_sound=bool(self._sides.sound.num_samples))
        self._sides.shift(by_ns)

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
            start_ns=max(self.times.begin_ns - self.times.pause_ns, 0),
        )
        reader = self._open(request)
        self._live = reader.is_live
        if self._live:
            self.times.pause_ns = 0
        reader.start(now_ns, at_ns)
        return reader

    def _take(self, item: MediaItem, now_ns: int) -> None:
        if isinstance(item, Frame):
            self._take_frame(replace(item, start_ns=item.start_ns + self.times.pause_ns), now_ns)
        elif isinstance(item, Sound):
            self._take_sound(item.first_sample + self.times.pause_ns * SOUND_RATE_HZ // NS_PER_S, item.samples, now_ns)
        elif isinstance(item, Progress):
            self.times.video_ns = max(self.times.video_ns, self._reached_ns("video", item.video_ns))
            self.times.audio_ns = max(self.times.audio_ns, self._reached_ns("audio", item.audio_ns))
            self._health.count(item)
        elif isinstance(item, Warned):
            self._warn(item, now_ns)
        elif isinstance(item, Ended):
            self._come_to_end(item.reason)
        else:
            self._lose(item, now_ns)

    def _warn(self, item: Warned, now_ns: int) -> None:
        if self._health.news.is_new(item):
            at_ns = now_ns if self._session.paced else self.times.seen_ns
            self._sides.notices.append(Notice("camera_warning", at_ns, item.code, item.message, item.track))
        if item.code in ("track_frozen", "track_given_up"):
            self._delivers.discard(item.track)
        if item.code == "track_frozen":
            self._frozen.add(item.track)
        if item.code == "track_frozen" and self._live and self._retries.may_renew(now_ns):
            self._lose(Failed("timeout", f"{item.message}: it is opened anew"), now_ns)

    def _reached_ns(self, track: TrackName, progress_ns: int) -> int:
        if progress_ns < FOREVER_NS:
            return progress_ns + self.times.pause_ns
        if not self._live:
            return FOREVER_NS
        self._absent.add(track)  # not there, given up, or the connection's end is near: the next one may have it
        return 0

    def _pass_absent(self, now_ns: int) -> None:
        """Nobody waits for a track that this connection does not have."""
        if "video" in self._absent:
            self.times.video_ns = max(self.times.video_ns, now_ns)
        if "audio" in self._absent:
            self.times.audio_ns = max(self.times.audio_ns, now_ns)

    def _take_frame(self, frame: Frame, now_ns: int) -> None:
        # A camera that was lost and found within one long period gives a second picture of it.
        if not self.times.video_ns <= frame.start_ns < self.times.limit_ns or self._is_stale(frame.start_ns, now_ns):
            return
        self._come_up("video", frame.start_ns)
        self._sides.frames.append(frame)
        self.times.shown_ns = self.times.video_ns = frame.start_ns + 1

    def _take_sound(self, first: int, samples: np.ndarray, now_ns: int) -> None:
        end_ns = (first + len(samples)) * NS_PER_S // SOUND_RATE_HZ
        self.times.audio_ns = max(self.times.audio_ns, end_ns)
        samples = samples[: max(self.times.limit_ns * SOUND_RATE_HZ // NS_PER_S - first, 0)]
        if len(samples) == 0 or self._is_stale(end_ns, now_ns):
            return
        self._sides.sound.add(first, samples)
        self._come_up("audio", end_ns)
        self.times.heard_ns = max(self.times.heard_ns, min(end_ns, self.times.limit_ns))

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
            self._lose_for_good(notice)
            return
        self._sides.notices.append(notice)
        self._retries.lost(now_ns)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _lose_for_good(self, notice: Notice) -> None:
        """A lost file still owes its windows, as missing, until the time that was asked for is over."""
        self._sides.notices.append(notice)
        self._finish(self.times.media_end_ns if self._session.duration_ns is None else self._session.duration_ns)

    def _come_to_end(self, reason: str) -> None:
        """The source says that it is at its end."""
        if self.times.stop_ns is not None and self.times.seen_ns >= self.times.stop_ns:
            self._end_at_limit()
            return
        self._miss_all(reason)
        self._sides.ending = Notice("camera_ended", self.times.media_end_ns, reason)
        self._finish(self.times.media_end_ns)

    def _is_to_end(self, now_ns: int) -> bool:
        """All has come up to where it is to stop, or nothing more is waited for."""
        may_miss = self._session.paced and (self._live or self.times.stop_ns is not None)
        under_way_ns = self._session.lateness_ns if self._reader is not None else 0  # of a lost camera nothing is
        return self.times.have_reached_stop or (may_miss and now_ns >= self.times.limit_ns + under_way_ns)

    def _end_at_limit(self) -> None:
        """End where it was stopped, or the time that was asked for is over."""
        end_ns = self.times.limit_ns
        is_stopped = self.times.stop_ns is not None and self.times.stop_ns < (self._session.duration_ns or FOREVER_NS)
        reason = self._stop_reason if is_stopped else DURATION_OVER
        if not is_stopped:
            self._miss_all(reason)
        self._sides.ending = Notice("camera_ended", end_ns, reason) if reason else None
        self._finish(end_ns)

    def _miss_all(self, reason: str) -> None:
        """Report it where a source has never given anything."""
        report = self._report
        if not report.has_delivered and not report.problem and self._session.resume_ns is None:
            self._report = replace(report, problem=f"gave neither picture nor sound: {reason}")

    def _finish(self, end_ns: int) -> None:
        self.close()
        self.times.end_ns = end_ns if self.times.end_ns is None else min(self.times.end_ns, end_ns)
