"""Where a session's windows end: how long each took, what failed at it, and when the shedding ladder moves.

It returns what is to be said of it; who has it sends that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Protocol

from graph.chunk import AFTERWORD, NS_PER_S, Chunk, Scalar, Span, Trace
from graph.kinds import WINDOW_EVENT
from graph.ladder import Ladder
from graph.tail import ack_chunk
from graph.trace import slowest_stage, stage_seconds, waterfall
from graph.window import Unit
from stages.session import Session


class WindowMeter(Protocol):
    """What is counted of windows."""

    def window(self, session: Session, latency_s: float, late_stage: str, missing: tuple[str, ...]) -> None: ...
    def moved(self, session: Session, level: int) -> None: ...


class WindowEnd:
    """The windows of one session, at the last stage that they pass."""

    def __init__(self, stage: str, session: Session, ladder: Ladder | None, meter: WindowMeter, events: str) -> None:
        """events: the port at which it tells of them; "": at none."""
        self._events = events
        self._stage = stage
        self._session = session
        self._ladder = ladder
        self._meter = meter
        self.num_windows = 0  # that are through
        self.num_late = 0
        self._is_over = False  # the camera has ended: what comes now only says the rest

    def done(self, unit: Unit, received_ns: int, trace: Trace, now_ns: int, num_sessions: int) -> list[Chunk]:
        """A window is through, which had come here at `received_ns`. num_sessions: that share what there is."""
        chunks = [e for f in trace.failures for e in self._event(now_ns, _failed(unit, f.stage, f.reason))]
        self._is_over |= trace.digest == AFTERWORD
        if self._is_over:  # no window of the camera, nor is a later one that was given up before its trace came
            return chunks
        latency_ns = max(received_ns - unit.end_ns, 0)
        chunks += self._event(unit.start_ns, self._row(unit, received_ns, latency_ns, trace))
        if self._ladder is not None and self._ladder.window(now_ns, latency_ns, num_sessions):
            chunks += self._moved(self._ladder, now_ns)
        return chunks

    def _row(self, unit: Unit, received_ns: int, latency_ns: int, trace: Trace) -> dict[str, Scalar]:
        session = self._session
        before = [span for span in trace.spans if span.stage != self._stage]
        parts = waterfall(unit.end_ns, max(received_ns, unit.end_ns), before, self._stage)
        late = session.paced and latency_ns > session.window_ns
        late_stage = slowest_stage(parts) if late else ""
        self.num_windows += 1
        self.num_late += late
        self._meter.window(session, latency_ns / NS_PER_S, late_stage, trace.all_missing)
        playback = session.playback.latest  # told by this stage, after it took the window's speech
        return {
            "type": WINDOW_EVENT,
            "index": unit.index,
            "start_s": unit.start_ns / NS_PER_S,
            "end_s": unit.end_ns / NS_PER_S,
            "digest": trace.digest,
            "missing": ",".join(trace.all_missing),
            "failed": ",".join(dict.fromkeys(failure.stage for failure in trace.failures)),
            "latency_s": round(latency_ns / NS_PER_S, 6) if session.paced else None,
            "on_time": not late if session.paced else None,
            "late_stage": late_stage,
            "level": session.level.num_steps,
            "lead_s": round((playback.received_ns - playback.heard_ns) / NS_PER_S, 6),
            "stages": json.dumps(stage_seconds(parts) if session.paced else {}),
            "compute": json.dumps(_work_seconds(before)),
        }

    def _moved(self, ladder: Ladder, now_ns: int) -> list[Chunk]:
        """A step of the ladder was taken, or given back: the other stages hear of it with the listener's news."""
        session = self._session
        before, level = session.level.num_steps, ladder.level
        session.level.update(now_ns, level)
        self._meter.moved(session, level)
        attrs: dict[str, Scalar] = {
            "type": "shed" if level > before else "restored",
            "step": ladder.steps[min(before, level)],
            "level": level,
        }
        return [*self._event(now_ns, attrs), ack_chunk(session.id, session.playback.latest, level)]

    def _event(self, at_ns: int, attrs: dict[str, Scalar]) -> list[Chunk]:
        return [Chunk(self._session.id, self._events, at_ns, attrs=attrs)] if self._events else []


def usual_level(session: Session, others: Iterable[Session]) -> int:
    """As far down as the other sessions are a new one begins, so that it costs them no more than that."""
    taken: Sequence[tuple[str, ...]] = sorted((other.taken for other in others), key=len)
    usual = taken[len(taken) // 2] if taken else ()
    return sum(step in usual for step in session.ladder)


def _failed(unit: Unit, stage: str, reason: str) -> dict[str, Scalar]:
    return {"type": "unit_failed", "window": unit.index, "stage": stage, "reason": reason}


def _work_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """How long each stage worked, on the critical path or beside it."""
    return {span.stage: round((span.finished_ns - span.started_ns) / NS_PER_S, 6) for span in spans}
