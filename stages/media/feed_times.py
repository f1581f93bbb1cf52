"""How far a feed has come: what will still come, what was really seen and heard, and where it ends. Event times, ns."""

from __future__ import annotations

from dataclasses import dataclass

from graph.window import FOREVER_NS
from stages.session import Session


@dataclass(slots=True)
class FeedTimes:
    """The times of one feed.

    begin_ns:           where its sound begins: a window's is whole or none.
    video_ns, audio_ns: nothing before these will come.
    shown_ns, heard_ns: the ends of what was really seen, and heard.
    pause_ns:           a file's media are so much later than it says.
    duration_ns:        of the session.
    stop_ns:            it is to end there; what still comes of the time before is waited for.
    end_ns:             set when the source has ended for good.
    """

    begin_ns: int
    video_ns: int
    audio_ns: int
    shown_ns: int
    heard_ns: int
    pause_ns: int
    duration_ns: int | None
    stop_ns: int | None = None
    end_ns: int | None = None

    @classmethod
    def of(cls, session: Session, from_ns: int) -> FeedTimes:
        """from_ns: since when the view is watched; a file begins then."""
        begin_ns = max(session.begin_index * session.window_ns, from_ns)
        seen_ns = max(session.begin_ns, from_ns)
        return cls(begin_ns, seen_ns, begin_ns, seen_ns, begin_ns, from_ns, session.duration_ns)

    @property
    def are_over(self) -> bool:
        return self.end_ns is not None

    @property
    def have_reached_stop(self) -> bool:
        """All has come up to where it is to stop, and more would follow."""
        return self.stop_ns is not None and self.stop_ns <= min(self.video_ns, self.audio_ns) < FOREVER_NS

    @property
    def limit_ns(self) -> int:
        """What begins here or later is not wanted."""
        return min(ns for ns in (self.end_ns, self.stop_ns, self.duration_ns, FOREVER_NS) if ns is not None)

    @property
    def seen_ns(self) -> int:
        """End of what was really seen and heard."""
        return max(self.shown_ns, self.heard_ns)

    @property
    def media_end_ns(self) -> int:
        """End of the media, or of the time that was asked for."""
        return self.seen_ns if self.duration_ns is None else min(self.seen_ns, self.duration_ns)

    @property
    def video_end_ns(self) -> int | None:
        """Where the pictures end, once that is known; frames that have been read may still wait to be taken."""
        return self._end_of(self.video_ns, self.shown_ns)

    @property
    def audio_end_ns(self) -> int | None:
        """Where the sound ends, once that is known; samples that have been read may still wait to be taken."""
        return self._end_of(self.audio_ns, self.heard_ns)

    def shift(self, by_ns: int, *, has_frames: bool, has_sound: bool) -> None:
        """All that is still to come, and what waits, happens so much later."""
        self.pause_ns += by_ns
        if self.video_ns < FOREVER_NS or has_frames:
            self.shown_ns += by_ns
        if self.audio_ns < FOREVER_NS or has_sound:
            self.heard_ns += by_ns
        self.video_ns, self.audio_ns = _later(self.video_ns, by_ns), _later(self.audio_ns, by_ns)

    def _end_of(self, stream_ns: int, seen_ns: int) -> int | None:
        ends = [self.end_ns, self.stop_ns if self.stop_ns is not None and stream_ns >= self.stop_ns else None]
        ends.append(seen_ns if stream_ns >= FOREVER_NS else None)
        return min((ns for ns in ends if ns is not None), default=None)


def _later(time_ns: int, by_ns: int) -> int:
    return time_ns + by_ns if time_ns < FOREVER_NS else time_ns
