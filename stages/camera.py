"""Camera: pictures of a camera's views, each stamped with the moment it was taken, or shown again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.kinds import attrs_of
from graph.stage_type import Feedback, Out
from graph.window import FOREVER_NS
from stages.kinds import EVENTS, FRAMES, PLAYBACK, Picture
from stages.light import SESSIONS_PER_REPLICA, MediaOptions
from stages.media.feed_buffer import Notice
from stages.media.feeds import Feeds, FeedStage, Reading, soonest_ns
from stages.media.health import Totals
from stages.media.wire import TrackName
from stages.session import Session, View
from stages.stage import Site, SourceId, StageError


@dataclass(slots=True)
class _Open(Reading):
    watermark_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.watermark_ns = self.session.begin_ns


class Camera(FeedStage[_Open]):
    """Source of pictures: their attribute `age_s` is how long each was on the screen when it was sampled.

    Each view of a session has a feed of its own and a stream of its own: what is lost of one costs the others nothing.
    All streams leave on one lane and share its credit. So in virtual time, where no clock holds a view back, none hands
    out pictures of a later window than the slowest one is in.
    The watermark runs ahead of the clock: after a picture it stands where the next one may begin, so that a window does
    not wait for its end when its picture has come. Without pictures it follows the clock, `lateness`
    behind.
    """

    playback = Feedback(PLAYBACK)
    frames = Out(FRAMES, many=True)
    events = Out(EVENTS)
    Options = MediaOptions
    is_local = True
    can_be_off = False
    shares = "decoder"
    sessions_per_replica = SESSIONS_PER_REPLICA

    def __init__(self, feeds: Feeds) -> None:
        super().__init__(feeds, _Open)

    @classmethod
    def load(cls, options: MediaOptions, site: Site) -> Camera:
        return cls(Feeds.of(site))

    def totals(self, source: SourceId) -> Totals:
        """What was damaged and missing within the source so far."""
        return self._open[source.session][source.view].feed.totals

    def delivers(self, source: SourceId) -> frozenset[TrackName]:
        """The tracks of which something has come, and still comes."""
        return self._open[source.session][source.view].feed.delivers

    def add_view(self, session: Session, view: View, now_ns: int) -> None:
        """It is watched from the next window on, which no other view is through with yet."""
        self._forget_removed(session.id)
        if view.name in self._open[session.id]:
            raise StageError(f"camera {session.camera}: view {view.name} is still there; it ends with the window")
        from_ns = (max(now_ns, 0) // session.window_ns + 1) * session.window_ns
        self._open_view(session, replace(view, from_ns=from_ns))

    def remove_view(self, session: SessionId, view: str, now_ns: int) -> None:
        state = self._open[session].get(view)
        if state is not None and not state.removed:
            state.removed, state.ended = True, False  # one that has ended by itself says so again
            state.feed.stop(now_ns)

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        self._forget_removed(session)
        return [chunk for state in self._open[session].values() for chunk in self._advance(state, now_ns)]

    def finished(self, session: SessionId) -> bool:
        """Its streams have ended, and what there was to notice of their ends has left, too."""
        return super().finished(session) and all(state.feed.is_done for state in self._open[session].values())

    def _forget_removed(self, session: SessionId) -> None:
        views = self._open[session]
        for name in [name for name, state in views.items() if state.removed and state.ended]:
            if len(views) > 1:
                del views[name]
                self._feeds.close(SourceId(session, name))

    def _advance(self, state: _Open, now_ns: int) -> list[Chunk]:
        session, view = state.session, state.view.name
        state.feed.pump(now_ns)
        notices = state.feed.take_notices(now_ns if session.paced else FOREVER_NS)
        chunks = [self._event(state, notice) for notice in notices]
        if state.view.from_ns and not state.watermark_ns:
            chunks.append(self._event(state, Notice("view_added", state.view.from_ns)))
        reached_ns = now_ns if session.paced else self._slowest_ns(state)
        for frame in state.feed.take_frames(reached_ns):
            chunks += self._move_on(state, frame.start_ns)  # first, so that no window waits for more than its own
            attrs = attrs_of(Picture(age_s=frame.age_ns / NS_PER_S))
            image = {"image": frame.image}
            chunks.append(self.frames.chunk(session.id, frame.start_ns, arrays=image, attrs=attrs, view=view))
        return chunks + self._settle(state, now_ns)

    def _slowest_ns(self, state: _Open) -> int:
        """Up to where a view's pictures may leave in virtual time: through the window that the slowest other is in."""
        window_ns = state.session.window_ns
        others = (each for each in self._open[state.session.id].values() if each is not state and not each.ended)
        return min(((other.watermark_ns // window_ns + 1) * window_ns - 1 for other in others), default=FOREVER_NS)

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        """The next picture's time has come, or that of a window that is given up."""
        return min(self._due_in_ns(state, now_ns) for state in self._open[session].values())

    def _due_in_ns(self, state: _Open, now_ns: int) -> int:
        window_ns, lateness_ns = state.session.window_ns, state.session.lateness_ns
        given_up_ns = ((now_ns - lateness_ns) // window_ns + 1) * window_ns + lateness_ns
        end_ns = None if state.ended else state.feed.times.video_end_ns
        return soonest_ns(state.session, now_ns, state.feed.next_frame_ns, end_ns, given_up_ns)

    def _settle(self, state: _Open, now_ns: int) -> list[Chunk]:
        feed, session = state.feed, state.session
        if state.ended:
            return []
        end_ns = feed.times.video_end_ns
        if end_ns is not None and feed.next_frame_ns is None and (not session.paced or now_ns >= end_ns):
            state.ended = True
            removed = [self._event(state, Notice("view_removed", end_ns))] if state.removed else []
            return [*removed, self.frames.end(session.id, end_ns, view=state.view.name, removed=state.removed)]
        settled_ns = _settled_ns(session, feed.times.video_ns, feed.next_frame_ns, now_ns)
        return self._move_on(
            state, min(settled_ns, feed.times.limit_ns)
        )  # beyond the end there are no windows to close

    def _move_on(self, state: _Open, settled_ns: int) -> list[Chunk]:
        """Move the watermark on; it never moves back."""
        if settled_ns <= state.watermark_ns:
            return []
        state.watermark_ns = settled_ns
        return [self.frames.watermark(state.session.id, settled_ns, view=state.view.name)]

    def _event(self, state: _Open, notice: Notice) -> Chunk:
        track = {"track": notice.track} if notice.track else {}
        view = {"view": state.view.name} if state.view.name else {}
        return self.events.event(
            state.session.id, notice.at_ns, notice.type, reason=notice.reason, message=notice.message, **track, **view
        )


def _settled_ns(session: Session, read_ns: int, waiting_ns: int | None, now_ns: int) -> int:
    """Up to where nothing more will come: what the decoder says and has been handed out, or given up by the clock."""
    read_ns = min(read_ns, waiting_ns) if waiting_ns is not None else read_ns
    if not session.paced:
        return read_ns
    return max(read_ns, (now_ns - session.lateness_ns) // session.window_ns * session.window_ns)
