"""Microphone: the sound beside a camera, one chunk per window."""

from __future__ import annotations

from dataclasses import dataclass, field

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.stage_type import Out
from stages.kinds import SOUND
from stages.light import SESSIONS_PER_REPLICA, MediaOptions
from stages.media.feeds import Feeds, FeedStage, Reading, soonest_ns
from stages.rates import SOUND_RATE_HZ
from stages.session import Session, View
from stages.stage import Site


@dataclass(slots=True)
class _Open(Reading):
    index: int = field(init=False)  # of the window that leaves next

    def __post_init__(self) -> None:
        self.index = self.session.begin_index

    @property
    def end_ns(self) -> int:
        return (self.index + 1) * self.session.window_ns


class Microphone(FeedStage[_Open]):
    """Source of sound: float32 samples, 16 kHz mono, cut at the windows' ends; times come from running sample counts.

    A muted or dead microphone's watermark goes on, `lateness` behind the clock, and its windows carry no chunk.
    """

    sound = Out(SOUND)
    Options = MediaOptions
    is_local = True
    can_be_off = False
    shares = "decoder"
    sessions_per_replica = SESSIONS_PER_REPLICA

    def __init__(self, feeds: Feeds) -> None:
        super().__init__(feeds, _Open)

    @classmethod
    def load(cls, options: MediaOptions, site: Site) -> Microphone:
        return cls(Feeds.of(site))

    def views_of(self, session: Session) -> list[View]:
        return [view for view in session.media.views if view.name == session.media.heard]

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        state = self._heard(session)
        if state.ended:
            return []
        state.feed.pump(now_ns)
        chunks: list[Chunk] = []
        while _is_due(state, now_ns):
            cut = self._cut(state)
            if len(cut) == 1 and chunks and chunks[-1].is_control:
                chunks.pop()  # a row of windows without sound has one watermark: an hour of them is no flood
            chunks += cut
            state.index += 1
        end_ns = state.feed.times.audio_end_ns
        if end_ns is not None and end_ns < state.end_ns and (not state.session.paced or now_ns >= end_ns):
            # The rest, if the end cuts a window.
            chunks += [chunk for chunk in self._cut(state) if not chunk.is_control]
            chunks.append(self.sound.end(session, end_ns))
            state.ended = True
        return chunks

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        """The window's end has come, or it is given up."""
        state = self._heard(session)
        lateness_ns = 0 if state.feed.times.audio_ns >= state.end_ns else state.session.lateness_ns
        end_ns = None if state.ended else state.feed.times.audio_end_ns
        return soonest_ns(state.session, now_ns, end_ns, state.end_ns + lateness_ns)

    def _heard(self, session: SessionId) -> _Open:
        (state,) = self._open[session].values()
        return state

    def _cut(self, state: _Open) -> list[Chunk]:
        session = state.session.id
        first, samples = state.feed.take_sound(state.end_ns)
        chunks = [self.sound.watermark(session, state.end_ns)]
        if len(samples):
            start_ns = first * NS_PER_S // SOUND_RATE_HZ
            duration_ns = (first + len(samples)) * NS_PER_S // SOUND_RATE_HZ - start_ns
            chunks.insert(0, self.sound.chunk(session, start_ns, duration_ns, arrays={"samples": samples}))
        return chunks


def _is_due(state: _Open, now_ns: int) -> bool:
    """May the next window leave: its sound is complete, and in real time its end has come?"""
    session, feed = state.session, state.feed
    if feed.times.audio_end_ns is not None:
        return state.end_ns <= feed.times.audio_end_ns and (not session.paced or now_ns >= state.end_ns)
    if feed.times.audio_ns >= state.end_ns:
        return not session.paced or now_ns >= state.end_ns
    return session.paced and now_ns >= state.end_ns + session.lateness_ns
