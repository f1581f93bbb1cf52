"""Camera: pictures of one camera, each stamped with the moment it was taken, or shown again."""

from __future__ import annotations

from dataclasses import dataclass

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.kinds import attrs_of
from graph.stage_type import Feedback, Out
from graph.window import FOREVER_NS
from stages.kinds import EVENTS, FRAMES, PLAYBACK, Picture
from stages.light import LightOptions
from stages.media.feed import Feeds, FeedStage, Reading, soonest_ns
from stages.media.feed_buffer import Notice
from stages.media.health import Totals
from stages.media.wire import TrackName
from stages.stage import Session, Site


@dataclass(slots=True)
class _Open(Reading):
    watermark_ns: int = 0


class Camera(FeedStage[_Open]):
    """Source of pictures: their attribute `age_s` is how long each was on the screen when it was sampled.

    The watermark runs ahead of the clock: after a picture it stands where the next one may begin, so that a window does
    not wait for its end when its picture has come. Without pictures it follows the clock, `lateness`
    behind.
    """

    playback = Feedback(PLAYBACK)
    frames = Out(FRAMES)
    events = Out(EVENTS)
    Options = LightOptions
    is_local = True
    can_be_off = False
    shares = "decoder"

    def __init__(self, feeds: Feeds) -> None:
        super().__init__(feeds, _Open)

    @classmethod
    def load(cls, options: LightOptions, site: Site) -> Camera:
        return cls(Feeds.of(site))

    def totals(self, session: SessionId) -> Totals:
        """What was damaged and missing within the source so far."""
        return self._open[session].feed.totals

    def delivers(self, session: SessionId) -> frozenset[TrackName]:
        """The tracks of which something has come, and still comes."""
        return self._open[session].feed.delivers

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        state = self._open[session]
        state.feed.pump(now_ns)
        chunks = [self._event(session, notice) for notice in state.feed.take_notices()]
        reached_ns = now_ns if state.session.paced else FOREVER_NS
        for frame in state.feed.take_frames(reached_ns):
            chunks += self._move_on(state, frame.start_ns)  # first, so that no window waits for more than its own
            attrs = attrs_of(Picture(age_s=frame.age_ns / NS_PER_S))
            chunks.append(self.frames.chunk(session, frame.start_ns, arrays={"image": frame.image}, attrs=attrs))
        return chunks + self._settle(state, now_ns)

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        """The next picture's time has come, or that of a window that is given up."""
        state = self._open[session]
        window_ns, lateness_ns = state.session.window_ns, state.session.lateness_ns
        given_up_ns = ((now_ns - lateness_ns) // window_ns + 1) * window_ns + lateness_ns
        end_ns = None if state.ended else state.feed.video_end_ns
        return soonest_ns(state.session, now_ns, state.feed.next_frame_ns, end_ns, given_up_ns)

    def _settle(self, state: _Open, now_ns: int) -> list[Chunk]:
        feed, session = state.feed, state.session
        if state.ended:
            return []
        end_ns = feed.video_end_ns
        if end_ns is not None and feed.next_frame_ns is None and (not session.paced or now_ns >= end_ns):
            state.ended = True
            return [self.frames.end(session.id, end_ns)]
        settled_ns = _settled_ns(session, feed.video_ns, feed.next_frame_ns, now_ns)
        return self._move_on(state, min(settled_ns, feed.limit_ns))  # beyond the end there are no windows to close

    def _move_on(self, state: _Open, settled_ns: int) -> list[Chunk]:
        """Move the watermark on; it never moves back."""
        if settled_ns <= state.watermark_ns:
            return []
        state.watermark_ns = settled_ns
        return [self.frames.watermark(state.session.id, settled_ns)]

    def _event(self, session: SessionId, notice: Notice) -> Chunk:
        track = {"track": notice.track} if notice.track else {}
        return self.events.event(
            session, notice.at_ns, notice.type, reason=notice.reason, message=notice.message, **track
        )


def _settled_ns(session: Session, read_ns: int, waiting_ns: int | None, now_ns: int) -> int:
    """Up to where nothing more will come: what the decoder says and has been handed out, or given up by the clock."""
    read_ns = min(read_ns, waiting_ns) if waiting_ns is not None else read_ns
    if not session.paced:
        return read_ns
    return max(read_ns, (now_ns - session.lateness_ns) // session.window_ns * session.window_ns)
