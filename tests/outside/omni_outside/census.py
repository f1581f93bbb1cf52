from __future__ import annotations

from stages.api import EVENTS, FRAMES, Chunk, In, Out, Session, SessionId, Stage, Unit


class Census(Stage):
    """Tells every session how many there are; one replica sees all of them."""

    frames = In(FRAMES, side=True)
    counts = Out(EVENTS)
    scope = "pipeline"

    def __init__(self) -> None:
        self._open: set[SessionId] = set()
        self._seen: set[SessionId] = set()

    def open_session(self, session: Session) -> None:
        self._open.add(session.id)

    def close_session(self, session: SessionId) -> None:
        self._open.discard(session)

    def process(self, units: list[Unit]) -> list[Chunk]:
        self._seen |= {unit.session for unit in units if unit.of(self.frames)}
        latest_ns = max(unit.end_ns for unit in units)
        return [
            self.counts.event(session, latest_ns, "census", open=len(self._open), seen=len(self._seen))
            for session in sorted(self._open)
        ]
