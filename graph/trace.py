"""What a window went through: its digest, and where its time was spent. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Final

from graph.chunk import AFTERWORD, MAX_IN_TRACE, Chunk, Failure, Span, Trace
from graph.value import value
from graph.window import Unit

_PLACE: Final = attrgetter("finished_ns", "received_ns", "stage")  # of a span


@value
class Part:
    """A stretch of a window's latency: the way to a stage (hop), its wait there (queue), or its work (compute)."""

    stage: str
    phase: str
    duration_ns: int


def leave_stage(unit: Unit, *spans: Span, failures: Iterable[Failure] = ()) -> Trace:
    """The trace of a unit that has been processed: what came with it, and this stage's spans and failures.

    Of a window that was given up, what was awaited is missing, too: nobody knows what would have been in it. Where the
    way is longer than a trace may be, its end counts. A view that is missing beside others makes no stage idle.
    """
    views = _missing_views(unit)
    inherited_failures = (failure for trace in unit.traces.values() for failure in trace.failures)
    all_spans = {*spans}.union(*[trace.spans for trace in unit.traces.values()])
    inherited = {name for trace in unit.traces.values() for name in trace.missing}
    # A stage that had nothing to work on has nothing to give, even if it sends something (the voice, say). One that had
    # all, and gave nothing, has decided so (as one does that lets pass only what moves).
    idle = {stream for stream, trace in unit.traces.items() if trace.missing or trace.failures}
    silent = unit.missing - views - (unit.traces.keys() - idle)
    sensed_missing = {stream for stream in silent | idle if not _is_said(unit, stream)}
    views = views.union(*(trace.missing_views for trace in unit.traces.values()))
    return Trace(
        digest=digest_of(unit),
        missing=tuple(sorted((unit.awaited - views).union(sensed_missing or (inherited if _says(unit) else ())))),
        spans=tuple(sorted(all_spans, key=_PLACE)[-MAX_IN_TRACE:]),
        failures=tuple(dict.fromkeys([*inherited_failures, *failures]))[-MAX_IN_TRACE:],
        missing_views=tuple(sorted(views))[:MAX_IN_TRACE],
    )


def digest_of(unit: Unit) -> str:
    """Hash of what was seen and heard in this window: equal content and times give an equal digest."""
    if unit.is_afterword and not unit.traces and not any(_is_original(unit, stream) for stream in unit.chunks):
        return AFTERWORD
    streams = (stream for stream in {*unit.chunks, *unit.traces, *unit.missing} if not _is_side(unit, stream))
    parts = {stream: _digest_stream(unit, stream) for stream in sorted(streams)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return _hash(f"{stream}={digest}\n".encode() for stream, digest in parts.items())


def waterfall(start_ns: int, end_ns: int, spans: Iterable[Span], sink: str) -> list[Part]:
    """Where the time from `start_ns` to its arrival at `sink` went, along the critical path; the parts sum to it."""
    parts: list[Part] = []
    cursor_ns = end_ns
    for span in sorted(spans, key=lambda s: s.finished_ns, reverse=True):
        if span.finished_ns > cursor_ns or span.finished_ns <= start_ns:
            continue  # ran beside the critical path, or before the window's end
        started_ns, received_ns = max(span.started_ns, start_ns), max(span.received_ns, start_ns)
        stretches = [
            Part(span.stage, "queue", started_ns - received_ns),
            Part(span.stage, "compute", span.finished_ns - started_ns),
            Part(parts[0].stage if parts else sink, "hop", cursor_ns - span.finished_ns),
        ]
        parts = stretches + parts
        cursor_ns = received_ns
    return [Part(parts[0].stage if parts else sink, "hop", cursor_ns - start_ns), *parts]


def slowest_stage(parts: Iterable[Part]) -> str:
    """The stage on which most time was spent; "" when nothing is known."""
    totals: dict[str, int] = {}
    for part in parts:
        totals[part.stage] = totals.get(part.stage, 0) + part.duration_ns
    return max(totals, key=lambda stage: totals[stage], default="")


def stage_seconds(parts: Iterable[Part]) -> Mapping[str, float]:
    """Seconds per "stage.phase", for windows.jsonl; parts of no length are left out."""
    totals: dict[str, int] = {}
    for part in parts:
        name = f"{part.stage}.{part.phase}"
        totals[name] = totals.get(name, 0) + part.duration_ns
    return {name: round(total * 1e-9, 6) for name, total in totals.items() if total}


def _missing_views(unit: Unit) -> frozenset[str]:
    """The streams of views that gave nothing, or had not come through, where another view did."""
    lacking = [s for s in unit.missing | unit.awaited if s in unit.inputs and unit.inputs[s].is_many]
    if not lacking:
        return frozenset()
    giving = {stream: unit.inputs[stream].edge for stream in unit.chunks if stream in unit.inputs}
    return frozenset(
        stream
        for stream in lacking
        if any(edge == unit.inputs[stream].edge and other != stream for other, edge in giving.items())
    )


def _says(unit: Unit) -> bool:
    return any(_is_said(unit, stream) for stream in {*unit.chunks, *unit.traces, *unit.missing})


def _is_said(unit: Unit, stream: str) -> bool:
    return stream in unit.inputs and unit.inputs[stream].kind.is_fenced


def _is_original(unit: Unit, stream: str) -> bool:
    return stream in unit.inputs and unit.inputs[stream].is_original


def _is_side(unit: Unit, stream: str) -> bool:
    return stream in unit.inputs and unit.inputs[stream].is_side


def _digest_stream(unit: Unit, stream: str) -> str:
    if _is_original(unit, stream):
        return _hash(part for chunk in unit.chunks.get(stream, ()) for part in _content(chunk))
    return unit.traces[stream].digest if stream in unit.traces else ""


def _content(chunk: Chunk) -> Iterable[bytes]:
    yield f"{chunk.stream}@{chunk.start_ns}+{chunk.duration_ns}".encode()
    for name, array in sorted(chunk.arrays.items()):
        yield f"{name}:{array.dtype}:{array.shape}".encode()
        yield array.tobytes()


def _hash(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:32]
