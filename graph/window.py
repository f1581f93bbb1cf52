"""Omni-Flow order: what was seen and heard in a window leaves together, window by window.

Rule: which chunk belongs to which unit, and when a unit may leave, is decided in this file and nowhere else. It takes
values and times and returns values: no clock, no socket.

Window k is [k·T, (k+1)·T). A unit leaves when the watermark of every stream has passed its end, or `lateness` after
it. Units leave with k = 0, 1, 2 … exactly once, and their content does not depend on the order of arrival between
streams (per stream, chunks arrive in seq order: the bus keeps that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from graph.chunk import Chunk, SessionId, Trace
from graph.kinds import Kind, Late
from graph.value import value

FOREVER_NS = 2**63 - 1


class Port(Protocol):
    """An input or output as its stage's class declares it (graph/stage_type.py)."""

    name: str


@dataclass(frozen=True, slots=True)
class Input:
    """How a stage takes one stream.

    port, kind:  of the stage. edge, source: on which it comes, and the stage that makes it.
    late:        what happens to a chunk whose window has left: dropped, or carried into the next unit.
    window_ns:   a unit holds what came in this time before its end; None: in its window.
    lateness_ns: a unit is given up this long after its end; None: as the join is told.
    is_side:     nothing waits for it, and it ends nothing.
    is_original: it comes from where it was seen or heard, and no trace comes with it.
    is_many:     its edge brings one such stream per view of the camera; views come and go.
    """

    port: str
    kind: Kind[Any]
    edge: str = ""
    source: str = ""
    late: Late = "drop"
    window_ns: int | None = None
    lateness_ns: int | None = None
    is_side: bool = False
    is_original: bool = False
    is_many: bool = False


@value
class Unit:
    """All chunks of one session and window, per stream ordered by time; `missing` names the streams that gave nothing.

    closed_by is the stream whose watermark came last, "" when the window was given up by lateness; `awaited` then names
    the streams that were not through with it. traces are what the streams' watermarks brought along. overdue: set by
    the actor when its work begins so late that the window has been given up where it ends. is_afterword: every stream
    had ended before it. inputs: how each stream is taken.
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
    inputs: Mapping[str, Input] = field(default_factory=dict)

    def of(self, port: Port) -> tuple[Chunk, ...]:
        """The chunks that came in at a port, in the order of time; of several views, in the order of (time, view)."""
        if isinstance(port, str):
            raise TypeError(f"of() takes a port, such as self.{port}, and not its name {port!r}")
        chunks = [self.chunks[stream] for stream in self.chunks if self._port_of(stream) == port.name]
        if len(chunks) == 1:
            return chunks[0]
        return tuple(sorted((c for each in chunks for c in each), key=lambda c: (c.start_ns, c.view, c.stream, c.seq)))

    def _port_of(self, stream: str) -> str:
        return self.inputs[stream].port if stream in self.inputs else stream


@value
class Joined:
    """What came out of the join: complete units, chunks too late to be in any, and those which are in a later one."""

    units: tuple[Unit, ...] = ()
    late: tuple[Chunk, ...] = ()
    carried: tuple[Chunk, ...] = ()


NOTHING = Joined()


class WindowJoin:
    """Event-time join of one session's streams in tumbling windows.

    lateness_ns: a window is given up this long after its end; None waits for ever (virtual time).
    """

    def __init__(
        self, session: SessionId, inputs: Mapping[str, Input], *, window_ns: int, lateness_ns: int | None
    ) -> None:
        """inputs: by stream. Where all are side inputs, they are waited for like others."""
        self._session = session
        self._inputs = inputs
        self._window_ns = window_ns
        self._lateness_ns = lateness_ns
        self._patient_until_ns = 0
        self._awaited = tuple(stream for stream, each in inputs.items() if not each.is_side) or tuple(inputs)
        own_ns = {stream: inputs[stream].lateness_ns for stream in self._awaited}
        self._own_lateness_ns = {
            stream: lateness_ns if own is None else own for stream, own in own_ns.items() if lateness_ns is not None
        }
        if not any(own_ns.values()):
            self._own_lateness_ns = {}
        self._beside = set(inputs) - set(self._awaited)  # side inputs that have not ended
        self._watermarks = dict.fromkeys(self._awaited, 0)
        self._pending: dict[str, list[Chunk]] = {stream: [] for stream in inputs}
        self._kept: dict[str, list[Chunk]] = {stream: [] for stream, each in inputs.items() if each.window_ns}
        self._traces: dict[int, dict[str, Trace]] = {}
        self._begins_ns: dict[str, int] = {}  # of streams that have come later: windows before it lack nothing of them
        self._removed_ns: dict[str, int] = {}  # of streams that nothing is expected of any more: windows after it
        self._last_stream = ""
        self._num_going = len(self._awaited)  # streams that have not ended
        self._ended_ns = 0  # the latest END of any stream
        self._index = 0  # the next unit to leave
        self.next_end_ns = window_ns
        """End of the window that leaves next."""

    @property
    def inputs(self) -> Mapping[str, Input]:
        """By stream, how it is taken; never changed, but for another one when a stream comes or has gone."""
        return self._inputs

    @property
    def expires_ns(self) -> int | None:
        """When the window that leaves next does so, whatever has come; None: never, or there is none left."""
        if self._lateness_ns is None:
            return None
        if self._is_over:
            return self.next_end_ns if self.num_pending else None
        if self._own_lateness_ns:
            return max(self.next_end_ns + self._patience_ns(self.next_end_ns), self._patient_until_ns)
        return max(self.next_end_ns + self._lateness_ns, self._patient_until_ns)

    @property
    def is_steady(self) -> bool:
        """Whether what comes without completing a window changes nothing about when the next one leaves."""
        return self._num_going > 0 and not self._own_lateness_ns

    @property
    def num_pending(self) -> int:
        """Chunks held back that have a window of their own to come."""
        return sum(len(self._pending[stream]) for stream in self._awaited)

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

    @property
    def ended(self) -> bool:
        """True once it has finished, and its side inputs have ended, too."""
        return self.finished and not self._beside

    def rest(self) -> tuple[Chunk, ...]:
        """What came beside for windows that will not come: once it has finished, and each chunk once."""
        if not self.finished:
            return ()
        streams = [stream for stream in self._pending if stream not in self._watermarks]
        left = tuple(chunk for stream in streams for chunk in self._pending[stream])
        self._pending.update((stream, []) for stream in streams)
        return left

    def begin_at(self, index: int, now_ns: int = 0) -> None:
        """Let this window be the first; those before it have left elsewhere, or are lost. Before anything has come.

        now_ns: windows that end before this are given up as if they ended then: what was held for them comes only now.
        """
        self._patient_until_ns = now_ns + (self._lateness_ns or 0)
        self._index = index
        self.next_end_ns = (index + 1) * self._window_ns

    def open(self, stream: str, edge: str, at_ns: int) -> bool:
        """Another stream has come on an edge, of another view: it is waited for, and windows that end at `at_ns` or
        before lack nothing of it. False: this edge brings one stream only."""
        taken = next((each for each in self._inputs.values() if each.edge == edge and each.is_many), None)
        if taken is None:
            return False
        self._inputs = {**self._inputs, stream: taken}
        self._pending[stream] = []
        if taken.window_ns:
            self._kept[stream] = []
        if taken.is_side and any(not each.is_side for each in self._inputs.values()):
            self._beside.add(stream)
            return True
        self._awaited = (*self._awaited, stream)
        if self._own_lateness_ns and self._lateness_ns is not None:
            own_ns = taken.lateness_ns
            self._own_lateness_ns[stream] = self._lateness_ns if own_ns is None else own_ns
        self._begins_ns[stream] = self._watermarks[stream] = at_ns
        self._num_going += 1
        return True

    def add(self, chunk: Chunk, stream: str = "") -> Joined:
        """Take a data chunk. It never completes a window by itself: a watermark does.

        stream: as the join knows it, where that is not the chunk's own. Raises KeyError when it has no such stream.
        """
        stream = stream or chunk.stream
        pending = self._pending[stream]
        if stream in self._beside and self.finished:
            return Joined(late=(chunk,))
        is_late = chunk.start_ns < self._index * self._window_ns
        if is_late and self._inputs[stream].late == "drop":
            return Joined(late=(chunk,))
        pending.append(chunk)
        return Joined(carried=(chunk,)) if is_late else NOTHING

    def advance(self, stream: str, watermark_ns: int, trace: Trace | None = None) -> Joined:
        """Nothing before `watermark_ns` will come on `stream`. A watermark never moves back."""
        if trace is not None:
            index = watermark_ns // self._window_ns - 1
            if index >= self._index:
                self._traces.setdefault(index, {}).setdefault(stream, trace)  # a second one may be too late
        if self._removed_ns and watermark_ns < FOREVER_NS and self._removed_ns.pop(stream, None) is not None:
            self._begins_ns[stream] = self._watermarks[stream] = watermark_ns  # it is there again
            self._num_going += 1
        if watermark_ns > self._watermarks.get(stream, FOREVER_NS):
            self._watermarks[stream] = watermark_ns
            self._num_going -= watermark_ns == FOREVER_NS
            self._last_stream = stream
        return self._leave(self._settled_ns())

    def end(self, stream: str, at_ns: int, *, removed: bool = False) -> Joined:
        """The stream is over; its last chunk ended at `at_ns` at the latest. Of several such words the first stands.

        removed: windows after it lack nothing.
        """
        self._beside.discard(stream)
        if removed and stream in self._watermarks:
            self._removed_ns.setdefault(stream, at_ns)
        if self._watermarks.get(stream, FOREVER_NS) == FOREVER_NS:
            return NOTHING
        self._ended_ns = max(self._ended_ns, at_ns)
        return self.advance(stream, FOREVER_NS)

    def expire(self, now_ns: int, most: int | None = None) -> Joined:
        """Give up the windows, `most` of them at most, whose end is more than `lateness` ago.

        A window after the end of all streams leaves at its own end: in real time nobody is ahead of the listener.
        """
        if self._lateness_ns is None or now_ns < self.next_end_ns:
            return NOTHING
        if self._is_over:
            return self._leave(now_ns, most)
        if now_ns < self._patient_until_ns:
            return NOTHING
        if self._own_lateness_ns:
            return self._leave(self._given_up_ns(now_ns), most)
        return self._leave(now_ns - self._lateness_ns, most)

    def extend(self) -> Joined:
        """One window more, after the last: there is something left to say. Only for a join that has `finished`."""
        return Joined(units=(self._close(),))

    def _given_up_ns(self, now_ns: int) -> int:
        """Up to where nothing is waited for any more, where inputs have a lateness of their own."""
        return min(max(self._watermarks[stream], now_ns - own) for stream, own in self._own_lateness_ns.items())

    def _patience_ns(self, end_ns: int) -> int:
        """How long after its end a window waits at most for those that are not through with it."""
        waiting = (own for stream, own in self._own_lateness_ns.items() if self._watermarks[stream] < end_ns)
        return max(waiting, default=0)

    def _settled_ns(self) -> int:
        """Before this nothing will come any more; where all have ended, no further than their end (see `expire`)."""
        settled_ns = min(self._watermarks.values())
        if settled_ns == FOREVER_NS and self._lateness_ns is not None:
            return -(-self._ended_ns // self._window_ns) * self._window_ns
        return settled_ns

    def _leave(self, settled_ns: int, most: int | None = None) -> Joined:
        if self.next_end_ns > settled_ns:
            return NOTHING
        units: list[Unit] = []
        while self.next_end_ns <= settled_ns and not self.finished and len(units) != most:
            units.append(self._close())
        return Joined(units=tuple(units))

    def _close(self) -> Unit:
        end_ns = self.next_end_ns
        awaited = frozenset(stream for stream, at_ns in self._watermarks.items() if at_ns < end_ns)
        chunks = {stream: taken for stream in self._pending if (taken := self._take(stream, end_ns))}
        missing = frozenset(self._awaited).difference(chunks)
        if self._begins_ns or self._removed_ns:
            missing = frozenset(stream for stream in missing if self._is_expected(stream, end_ns))
        unit = Unit(
            session=self._session,
            index=self._index,
            start_ns=end_ns - self._window_ns,
            end_ns=end_ns,
            chunks=chunks,
            missing=missing,
            traces=self._traces.pop(self._index, {}),
            is_afterword=self._is_over,
            closed_by="" if awaited else self._last_stream,
            awaited=awaited,
            inputs=self._inputs,
        )
        self._index += 1
        self.next_end_ns += self._window_ns
        if self._removed_ns:
            self._forget_removed(end_ns)
        return unit

    def _is_expected(self, stream: str, end_ns: int) -> bool:
        """Does the window that ends there lack something if this stream gives nothing?"""
        start_ns = end_ns - self._window_ns
        return self._begins_ns.get(stream, 0) < end_ns and self._removed_ns.get(stream, FOREVER_NS) > start_ns

    def _forget_removed(self, end_ns: int) -> None:
        """What was removed and has nothing left to give, but for the last stream of all."""
        for stream in [stream for stream, at_ns in self._removed_ns.items() if at_ns <= end_ns]:
            if not self._pending[stream] and not self._kept.get(stream) and len(self._awaited) > 1:
                del self._removed_ns[stream], self._pending[stream], self._watermarks[stream]
                for known in (self._begins_ns, self._own_lateness_ns, self._kept):
                    known.pop(stream, None)
                self._awaited = tuple(other for other in self._awaited if other != stream)
                self._inputs = {other: taken for other, taken in self._inputs.items() if other != stream}

    def _take(self, stream: str, end_ns: int) -> tuple[Chunk, ...]:
        """What belongs to the unit that ends there."""
        pending = self._pending[stream]
        if pending:
            taken = [c for c in pending if c.start_ns < end_ns]
            self._pending[stream] = [c for c in pending if c.start_ns >= end_ns] if len(taken) < len(pending) else []
            if len(taken) > 1:
                # Between streams the order of arrival must not show; inside a stream it is seq order already, but that
                # the views in it may have been made in any.
                taken.sort(key=lambda c: (c.start_ns, c.view, c.seq))
        else:
            taken = []
        if stream not in self._kept:
            return tuple(taken)
        whole = self._kept[stream] + taken
        first_ns = end_ns + self._window_ns - (self._inputs[stream].window_ns or 0)  # of the next unit
        self._kept[stream] = [c for c in whole if max(c.end_ns, c.start_ns + 1) > first_ns]
        return tuple(whole)
