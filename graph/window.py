"""Omni-Flow order: what was seen and heard in a window leaves together, window by window.

Rule: which chunk belongs to which unit, and when a unit may leave, is decided in this file and nowhere else. It takes
values and times and returns values: no clock, no socket.

Window k is [k·T, (k+1)·T). A unit leaves when the watermark of every stream has passed its end, or `lateness` after
it. Units leave with k = 0, 1, 2 … exactly once, and their content does not depend on the order of arrival between
streams (per stream, chunks arrive in seq order: the bus keeps that).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from graph.chunk import Chunk, SessionId, Trace

Late = Literal["drop", "carry"]
FOREVER_NS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Unit:
    """All chunks of one session and window, per stream ordered by time; `missing` names the streams that gave nothing.

    closed_by is the stream whose watermark came last, "" when the window was given up by lateness; `awaited` then names
    the streams that were not through with it. traces are what the streams' watermarks brought along. overdue: set by
    the actor when its work begins so late that the window has been given up where it ends. is_afterword: every stream
    had ended before it.
    """

    session: SessionId
    index: int
    start_ns: int
    end_ns: int
    chunks: Mapping[str, tuple[Chunk, ...]] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    traces: Mapping[str, Trace] = field(default_factory=dict)
    closed_by: str = ""
    awaited: frozenset[str] = frozenset()
    overdue: bool = False
    is_afterword: bool = False

    def of(self, stream: str) -> tuple[Chunk, ...]:
        """The chunks of one stream; empty when it gave nothing."""
        return self.chunks.get(stream, ())

    def emit(self, stream: str, **fields: object) -> Chunk:
        """A chunk of `stream` which covers this unit's window."""
        return Chunk(self.session, stream, self.start_ns, self.end_ns - self.start_ns, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Joined:
    """What came out of the join: complete units, chunks too late to be in any, and those which are in a later one."""

    units: tuple[Unit, ...] = ()
    late: tuple[Chunk, ...] = ()
    carried: tuple[Chunk, ...] = ()


NOTHING = Joined()


class WindowJoin:
    """Event-time join of one session's streams in tumbling windows.

    lateness_ns: a window is given up this long after its end; None waits for ever (virtual time).
    late:        per stream, what happens to a chunk whose window has left: dropped, or carried into the next unit.
    """

    def __init__(
        self,
        session: SessionId,
        streams: Iterable[str],
        *,
        window_ns: int,
        lateness_ns: int | None,
        late: Mapping[str, Late] | None = None,
    ) -> None:
        self._session = session
        self._window_ns = window_ns
        self._lateness_ns = lateness_ns
        self._late = dict(late or {})
        self._watermarks = dict.fromkeys(streams, 0)
        self._pending: dict[str, list[Chunk]] = {stream: [] for stream in self._watermarks}
        self._traces: dict[int, dict[str, Trace]] = {}
        self._last_stream = ""
        self._num_going = len(self._watermarks)  # streams that have not ended
        self._ended_ns = 0  # the latest END of any stream
        self._index = 0  # the next unit to leave

    @property
    def next_end_ns(self) -> int:
        """End of the window that leaves next."""
        return (self._index + 1) * self._window_ns

    @property
    def expires_ns(self) -> int | None:
        """When the window that leaves next does so, whatever has come; None: never, or there is none left."""
        if self._lateness_ns is None or self.finished:
            return None
        return self.next_end_ns if self._is_over else self.next_end_ns + self._lateness_ns

    @property
    def num_pending(self) -> int:
        """Chunks held back."""
        return sum(len(chunks) for chunks in self._pending.values())

    @property
    def finished(self) -> bool:
        """True once every stream has ended, every window up to the latest end has left and no chunk is held back.

        A picture taken where its stream ends, or what is still to be said after the end, has a window of its own.
        """
        return self._is_over and not self.num_pending

    @property
    def _is_over(self) -> bool:
        """Every stream has ended, and every window up to the latest end has left."""
        return not self._num_going and self._index * self._window_ns >= self._ended_ns

    def begin_at(self, index: int) -> None:
        """Let this window be the first; those before it have left elsewhere, or are lost. Before anything has come."""
        self._index = index

    def add(self, chunk: Chunk) -> Joined:
        """Take a data chunk. It never completes a window by itself: a watermark does.

        Raises KeyError when the stream is not one of this join's.
        """
        pending = self._pending[chunk.stream]
        is_late = chunk.start_ns < self._index * self._window_ns
        if is_late and self._late.get(chunk.stream, "drop") == "drop":
            return Joined(late=(chunk,))
        pending.append(chunk)
        return Joined(carried=(chunk,)) if is_late else NOTHING

    def advance(self, stream: str, watermark_ns: int, trace: Trace | None = None) -> Joined:
        """Nothing before `watermark_ns` will come on `stream`. A watermark never moves back."""
        if trace is not None:
            index = watermark_ns // self._window_ns - 1
            if index >= self._index:
                self._traces.setdefault(index, {}).setdefault(stream, trace)  # a second one may be too late
        if watermark_ns > self._watermarks[stream]:
            self._watermarks[stream] = watermark_ns
            self._num_going -= watermark_ns == FOREVER_NS
            self._last_stream = stream
        return self._leave(self._settled_ns())

    def end(self, stream: str, at_ns: int) -> Joined:
        """The stream is over; its last chunk ended at `at_ns` at the latest. Of several such words the first stands."""
        if self._watermarks[stream] == FOREVER_NS:
            return NOTHING
        self._ended_ns = max(self._ended_ns, at_ns)
        return self.advance(stream, FOREVER_NS)

    def expire(self, now_ns: int, most: int | None = None) -> Joined:
        """Give up the windows, `most` of them at most, whose end is more than `lateness` ago.

        A window after the end of all streams leaves at its own end: in real time nobody is ahead of the listener.
        """
        if self._lateness_ns is None:
            return NOTHING
        if self._is_over:
            return self._leave(now_ns, most)
        return self._leave(now_ns - self._lateness_ns, most)

    def go_on(self) -> Joined:
        """One window more, after the last: there is something left to say. Only for a join that has `finished`."""
        return Joined(units=(self._close(),))

    def _settled_ns(self) -> int:
        """Before this nothing will come any more; where all have ended, no further than their end (see `expire`)."""
        settled_ns = min(self._watermarks.values())
        if settled_ns == FOREVER_NS and self._lateness_ns is not None:
            return -(-self._ended_ns // self._window_ns) * self._window_ns
        return settled_ns

    def _leave(self, settled_ns: int, most: int | None = None) -> Joined:
        units: list[Unit] = []
        while self.next_end_ns <= settled_ns and not self.finished and len(units) != most:
            units.append(self._close())
        return Joined(units=tuple(units))

    def _close(self) -> Unit:
        end_ns = self.next_end_ns
        awaited = frozenset(stream for stream, at_ns in self._watermarks.items() if at_ns < end_ns)
        chunks: dict[str, tuple[Chunk, ...]] = {}
        for stream, pending in self._pending.items():
            # Between streams the order of arrival must not show; inside a stream it is seq order already.
            taken = sorted((c for c in pending if c.start_ns < end_ns), key=lambda c: (c.start_ns, c.seq))
            if taken:
                chunks[stream] = tuple(taken)
                self._pending[stream] = [c for c in pending if c.start_ns >= end_ns]
        unit = Unit(
            session=self._session,
            index=self._index,
            start_ns=end_ns - self._window_ns,
            end_ns=end_ns,
            chunks=chunks,
            missing=frozenset(self._pending) - frozenset(chunks),
            traces=self._traces.pop(self._index, {}),
            is_afterword=self._is_over,
            closed_by="" if awaited else self._last_stream,
            awaited=awaited,
        )
        self._index += 1
        return unit
