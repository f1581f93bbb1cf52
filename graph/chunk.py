"""The values on the edges: what a camera saw, what was heard, what is said, and the control words between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import IntEnum
from typing import Final, NewType

import numpy as np

from graph.value import value

SessionId = NewType("SessionId", str)
Scalar = int | float | str | bool | None
Array = np.ndarray

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


class ChunkType(IntEnum):
    """What a chunk is. Everything but DATA is control: it takes no credit and stands in no ledger."""

    DATA = 0
    WATERMARK = 1  # nothing before `start_ns` will come on this stream
    END = 2  # nothing will come on this stream any more; `start_ns` is its end
    PLAYBACK = 3  # how far the listener has heard (graph/tail.py: Ack)
    BARGE_IN = 4  # the listener interrupts: raises the session's epoch to `epoch`


@value
class Span:
    """A window's stay in one stage, in ns on the session's axis: received, then (queue) started, then finished."""

    stage: str
    received_ns: int
    started_ns: int
    finished_ns: int


@value
class Failure:
    """A stage that could not do its part of a window. reason: one line."""

    stage: str
    reason: str


AFTERWORD = "afterword"
MAX_IN_TRACE = 256
"""Spans, missing streams and failures of a trace, each; more than stages on any way."""


@value
class Trace:
    """What is known of a window when it leaves a stage; travels with its watermark.

    digest:  hash of what was seen and heard in it (hex), equal for equal input at any speed; "" when unknown,
             AFTERWORD for a window after the end of all this, in which there is only something left to say.
    missing: streams which gave nothing, or had not come through when the window was given up.
    missing_views: likewise the streams of single views, where another view of the same camera gave something.
    spans:   the stages on the window's critical path, in order.
    failures: the stages that have failed at it.
    """

    digest: str = ""
    missing: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    failures: tuple[Failure, ...] = ()
    missing_views: tuple[str, ...] = ()

    @property
    def all_missing(self) -> tuple[str, ...]:
        """Streams of single views included."""
        return tuple(sorted({*self.missing, *self.missing_views})) if self.missing_views else self.missing


@value
class Chunk:
    """One piece of one stream on the session's event-time axis; covers [start_ns, start_ns + duration_ns).

    seq counts the data chunks of a (session, stream) without holes: a hole is a loss. Arrays are read-only. attrs are
    small scalars. epoch grows at each barge-in (0 on streams that a barge-in does not touch). incarnation tells apart
    sessions of one name, one after the other; the sender of an edge fills it in. view: which of the camera's views it
    shows; "" where the camera has one only.
    """

    session: SessionId
    stream: str
    start_ns: int
    duration_ns: int = 0
    seq: int = 0
    epoch: int = 0
    type: ChunkType = ChunkType.DATA
    arrays: Mapping[str, Array] = field(default_factory=dict)
    attrs: Mapping[str, Scalar] = field(default_factory=dict)
    trace: Trace | None = None
    incarnation: int = 0
    view: str = ""

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.duration_ns

    @property
    def is_control(self) -> bool:
        return self.type is not ChunkType.DATA

    def numbered(self, stream: str, seq: int, epoch: int, incarnation: int) -> Chunk:
        """The same chunk with its place in a stream of a session."""
        own = (self.arrays, self.attrs, self.trace, incarnation, self.view)
        return Chunk(self.session, stream, self.start_ns, self.duration_ns, seq, epoch, self.type, *own)

    def on(self, stream: str, incarnation: int = 0) -> Chunk:
        """The same chunk on a stream of a session."""
        return self.numbered(stream, self.seq, self.epoch, incarnation)

    def of_incarnation(self, incarnation: int) -> Chunk:
        """The same chunk, of this session of its name and no other."""
        if incarnation == self.incarnation:
            return self
        own = (self.seq, self.epoch, self.type, self.arrays, self.attrs, self.trace, incarnation, self.view)
        return Chunk(self.session, self.stream, self.start_ns, self.duration_ns, *own)


def watermark(
    session: SessionId,
    stream: str,
    at_ns: int,
    epoch: int = 0,
    trace: Trace | None = None,
    incarnation: int = 0,
    view: str = "",
) -> Chunk:
    """A promise: nothing before `at_ns` will come on `stream`."""
    return Chunk(session, stream, at_ns, 0, 0, epoch, ChunkType.WATERMARK, {}, {}, trace, incarnation, view)


REMOVED: Final = "removed"
"""Attribute of an END: the view was taken away, so windows after it lack nothing."""


def end_of_stream(
    session: SessionId, stream: str, at_ns: int, epoch: int = 0, view: str = "", *, removed: bool = False
) -> Chunk:
    """The last word of a stream. removed: nothing is expected of it any more."""
    attrs: dict[str, Scalar] = {REMOVED: True} if removed else {}
    return Chunk(session, stream, at_ns, epoch=epoch, type=ChunkType.END, attrs=attrs, view=view)
