"""What leaves a stage: each chunk at its port, numbered, checked, on the edges that the session's plan names.

Rule: a chunk that its kind forbids, or that no receiver would take, is refused here, before credit is spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from deploy.actor.session_plan import Output
from deploy.actor.session_state import OpenSession
from graph.chunk import Chunk, ChunkType, Failure, Scalar, Trace, end_of_stream, watermark
from graph.codec import CodecError, check
from graph.kinds import Kind, KindError
from graph.ladder import sheds_picture
from graph.tail import totals_of
from stages.session import Session
from stages.stage import StageError


class OutMeter(Protocol):
    """What is counted of what leaves (deploy/actor/measure.py: StageMeter)."""

    def made(self, session: Session, chunk: Chunk, kind: Kind[Any]) -> None: ...
    def played(self, session: Session, heard_ns: int, received_ns: int) -> None: ...


class Outbox:
    """The outputs of one stage replica."""

    def __init__(self, stage: str, meter: OutMeter) -> None:
        self._stage = stage
        self._meter = meter

    def send_all(self, state: OpenSession, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self.send(state, chunk)

    def send(self, state: OpenSession, chunk: Chunk) -> None:
        """Raises StageError for a chunk that nobody would take; then nothing has changed."""
        if chunk.is_control:
            self._send_control(state, chunk)
        else:
            self._send_data(state, chunk)

    def tell(self, state: OpenSession, at_ns: int, attrs: Mapping[str, Scalar]) -> None:
        """An event of the machinery's; where the stage makes none, there is nobody who would take it."""
        if state.events:
            self.send(state, Chunk(state.session.id, state.events, at_ns, attrs=attrs))

    def tell_failures(self, state: OpenSession, failures: Iterable[Failure], **window: int) -> None:
        """window: at which one, where there are any."""
        for failure in failures:
            what = {"stage": failure.stage, "reason": failure.reason}
            self.tell(state, state.now_ns(), {"type": "unit_failed", **window, **what})

    def tell_new_failures(self, state: OpenSession) -> None:
        """Of a stage without windows, which otherwise tell of them, at once, if it can tell anything."""
        if state.join is None and state.faults.are_new:
            self.tell_failures(state, state.faults.take())

    def say_again(self, state: OpenSession, edge: str) -> None:
        """Another one takes what leaves on an edge: it hears which streams have ended."""
        for output, chunk in state.ends.values():
            if edge in output.edges:
                self._send_on(state, [edge], chunk, chunk.stream)

    def end_removed(self, state: OpenSession) -> None:
        """Views that were taken away before the session was resumed here: those behind may not have heard of it."""
        at_ns = state.session.begin_ns
        for name, output in state.plan.outputs.items():
            for view in state.plan.removed_views if output.is_many else ():
                end = end_of_stream(state.session.id, name, at_ns, view=view, removed=True)
                sent = end.on(output.stream_of(view), state.plan.incarnation)
                state.ends[sent.stream] = (output, sent)
                self._send_on(state, output.edges, sent, name)

    def advance(self, state: OpenSession, end_ns: int, trace: Trace) -> None:
        """A window is done: its watermark leaves wherever windows do."""
        session, incarnation = state.session.id, state.plan.incarnation
        for name, output in state.windowed:
            epoch = state.fence.epoch_of(output.kind)
            self._send_on(
                state, output.edges, watermark(session, output.stream, end_ns, epoch, trace, incarnation), name
            )

    def end(self, state: OpenSession, end_ns: int, *, says_itself: bool) -> None:
        """Nothing will leave any more. says_itself: the stage has said where its windows end, as a source does."""
        for name, output in state.plan.outputs.items():
            if not output.kind.is_control and not (says_itself and output.kind.is_windowed):
                epoch = state.fence.epoch_of(output.kind)
                for view in [each.name for each in state.session.media.views] if output.is_many else [""]:
                    self.send(state, end_of_stream(state.session.id, name, end_ns, epoch, view))

    def _send_control(self, state: OpenSession, chunk: Chunk) -> None:
        is_playback = chunk.type is ChunkType.PLAYBACK
        if is_playback:
            state.session.playback.hear(chunk)
            self._meter.played(state.session, *totals_of(chunk))
        elif chunk.type is ChunkType.BARGE_IN:
            state.fence.raise_to(chunk.epoch)
        for output in self._outputs_of(state, chunk):
            sent = chunk.on(output.stream_of(chunk.view), state.plan.incarnation)
            if chunk.type is ChunkType.END:
                state.ends[sent.stream] = (output, sent)
            elif state.ends:
                state.ends.pop(sent.stream, None)  # a view that was taken away is there again
            edges = [edge for edge in output.edges if _is_news(state, edge)] if is_playback else output.edges
            self._send_on(state, edges, sent, chunk.stream)

    def _send_data(self, state: OpenSession, chunk: Chunk) -> None:
        name, output = chunk.stream, self._output(state, chunk)
        try:
            output.kind.check(chunk)
            if not output.edges:  # nobody reads it, and it is refused all the same
                check(chunk.numbered(output.stream, 0, 0, state.plan.incarnation))
        except (KindError, CodecError) as error:
            raise StageError(f"stage {self._stage}, port {name}: {error}") from error
        stream = output.stream_of(chunk.view)
        seq = state.seqs.get(stream, state.first_seq)
        chunk = chunk.numbered(stream, seq, state.fence.epoch_of(output.kind), state.plan.incarnation)
        may_shed = output.kind.is_sheddable and state.join is None  # where it is taken, and nowhere again
        is_shed = may_shed and sheds_picture(state.session.taken, chunk.session, seq)
        if is_shed:
            for edge in output.edges:
                state.lanes[edge].shed(chunk)
        else:
            self._send_on(state, output.edges, chunk, name)
        state.seqs[stream] = seq + 1
        self._meter.made(state.session, chunk, output.kind)

    def _send_on(self, state: OpenSession, edges: Iterable[str], chunk: Chunk, port: str) -> None:
        try:
            for edge in edges:
                state.lanes[edge].send(chunk)
        except CodecError as error:
            raise StageError(f"stage {self._stage}, port {port}: {error}") from error

    def _outputs_of(self, state: OpenSession, chunk: Chunk) -> tuple[Output, ...]:
        """Where a control chunk leaves."""
        if chunk.type in (ChunkType.PLAYBACK, ChunkType.BARGE_IN):
            return state.control
        return (self._output(state, chunk),)

    def _output(self, state: OpenSession, chunk: Chunk) -> Output:
        output = state.plan.outputs.get(chunk.stream)
        if output is None:
            has = ", ".join(sorted(state.plan.outputs)) or "none"
            raise StageError(f"stage {self._stage} has no output {chunk.stream!r}; it has: {has}")
        if output.is_many and chunk.view not in (views := [view.name for view in state.session.media.views]):
            has = ", ".join(views) if any(views) else "one only, without a name"
            where = f"stage {self._stage}, port {chunk.stream}"
            raise StageError(f"{where}: camera {state.session.camera} has no view {chunk.view!r}; it has: {has}")
        return output


def _is_news(state: OpenSession, edge: str) -> bool:
    """A source asks nothing of the listener but the level: a new one, and in each window the last once more."""
    if edge not in state.plan.to_sources:
        return True
    level, now_ns = state.session.level.num_steps, state.now_ns()
    sent, sent_ns = state.levels_sent.get(edge, (0, 0))
    if level == sent and now_ns - sent_ns < state.session.window_ns:
        return False
    state.levels_sent[edge] = (level, now_ns)
    return True
