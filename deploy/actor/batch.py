"""What a stage works on at once: ready units are gathered, processed, and leave with their windows' watermarks.

Rule: what is stale or too late by now is taken out before the stage sees it, and has its reason in the ledger.
"""

from __future__ import annotations

from dataclasses import replace

from deploy.actor.afterword import Afterword
from deploy.actor.inbox import Inbox
from deploy.actor.isolation import process
from deploy.actor.replica import Replica
from deploy.actor.session_state import OpenSession, ReadyUnit, Sent
from deploy.actor.ticker import Ticker
from graph.chunk import NS_PER_S, Chunk, Span
from graph.gather import Gathering, Peer
from graph.trace import leave_stage
from graph.window import Unit
from stages.stage import Stage


class Batch:
    """The units of one stage replica that are worked on, batch by batch."""

    def __init__(
        self, replica: Replica, gathering: Gathering, inbox: Inbox, ticker: Ticker, afterword: Afterword
    ) -> None:
        self._replica = replica
        self._gathering = gathering
        self._inbox = inbox
        self._ticker = ticker
        self._afterword = afterword
        self._knows_idle = getattr(replica.stage.is_idle, "__func__", None) is not Stage.is_idle

    def idle(self) -> list[tuple[OpenSession, ReadyUnit]]:
        """Units which cost nothing: they go at once."""
        states = [state for state in self._replica.ready.values() if state.faults.given_up or self._is_idle(state)]
        return [(state, state.ready[0]) for state in states if self.may_go(state)]

    def gather(self) -> list[tuple[OpenSession, ReadyUnit]]:
        """The most urgent units, one per session; none while it is worth waiting for peers."""
        going = [state.ready[0].waiting for state in self._replica.ready.values() if self.may_go(state)]
        if not going:
            return []
        peers = (
            Peer(state.monotonic_ns(state.join.next_end_ns), state.speaks)
            for state in self._replica.open.values()
            if not state.ready and state.join is not None and state.begun and not state.ending
        )
        sessions = self._gathering.batch(going, peers, self._replica.clock.monotonic_ns())
        batch = [self._replica.open[session] for session in sessions]
        if len(batch) > 1 and any(state.goes_alone for state in batch):
            together = [state for state in batch if not state.goes_alone]
            batch = batch[:1] if batch[0].goes_alone else together
        return [(state, state.ready[0]) for state in batch]

    def may_go(self, state: OpenSession) -> bool:
        """May the first of its units that are ready be processed?"""
        if not state.has_room():
            return False
        if state.session.paced or not (self._replica.stage.paced_by_listener and state.session.speech):
            return True
        # Virtual time: the listener's clock must have come to the window's end, as it always has in real time.
        return state.session.playback.latest.at_ns >= state.ready[0].unit.end_ns

    def process(self, batch: list[tuple[OpenSession, ReadyUnit]], *, idle: bool = False) -> None:
        """Let the stage work on units, one per session, and send what it makes. idle: they cost nothing."""
        replica = self._replica
        for state, ready in batch:
            state.ready.popleft()
            if not state.ready:
                del replica.ready[state.session.id]
            self._ticker.advance(state)
            ready.unit = self._without_stale(state, self._marked(state, ready.unit))
        started_ns, cpu_ns = replica.clock.monotonic_ns(), replica.clock.cpu_ns()
        units = [ready.unit for state, ready in batch if not state.faults.given_up]
        with replica.working_on(replica.name, units):
            outcome = process(replica.stage, units, replica.open if replica.stage.scope == "pipeline" else ())
        compute_s = (replica.clock.monotonic_ns() - started_ns) / NS_PER_S
        cpu_s = (replica.clock.cpu_ns() - cpu_ns) / NS_PER_S
        queue_ns = max(started_ns - ready.waiting.since_ns for _, ready in batch)
        if idle:
            replica.meter.passed(len(batch))
        else:
            replica.meter.processed(len(batch), queue_s=queue_ns / NS_PER_S, compute_s=compute_s, cpu_s=cpu_s)
        outcome.send(lambda chunk: replica.out.send(replica.open[chunk.session], chunk))
        saying = {chunk.session for chunk in outcome.chunks if not chunk.is_control}
        for state, ready in batch:
            if (error := outcome.failed.get(state.session.id)) is not None:
                state.faults.failed("process", error, ready.unit.index)
            else:
                state.faults.succeeded("process")
            state.speaks = state.session.id in saying
            if state.speaks and replica.stage.paced_by_listener and state.session.paced:
                self._sent(state, ready, started_ns)
            is_quiet = ready.unit.is_afterword and state.session.id not in saying
            state.num_quiet = state.num_quiet + 1 if is_quiet else min(state.num_quiet, 0)
            has_failed = error is not None or bool(state.faults.given_up)
            self._leave(state, ready, started_ns, has_failed=has_failed)

    def _sent(self, state: OpenSession, ready: ReadyUnit, started_ns: int) -> None:
        """A piece of speech leaves; what has become of those before is learnt. started_ns: monotonic."""
        while state.sent and (arrived_ns := state.session.playback.arrived_ns(state.sent[0].end_ns)) is not None:
            piece = state.sent.popleft()
            was_late = None if piece.dry_ns is None else arrived_ns > piece.dry_ns
            way_ns = arrived_ns - piece.started_ns
            self._gathering.holding.arrived(way_ns, self._replica.clock.monotonic_ns(), was_late=was_late)
        waiting = ready.waiting
        is_held = waiting.dry_ns is not None and self._gathering.is_held(waiting, started_ns)
        dry_ns = state.session_ns(waiting.dry_ns) if is_held and waiting.dry_ns is not None else None
        state.sent.append(Sent(ready.unit.end_ns, state.session_ns(started_ns), dry_ns))

    def _is_idle(self, state: OpenSession) -> bool:
        if not self._knows_idle:
            return False
        with state.faults.within("is_idle"):
            return self._replica.stage.is_idle(state.ready[0].unit)
        return False

    def _marked(self, state: OpenSession, unit: Unit) -> Unit:
        """A unit that comes too late for its listener is overdue, and its pictures are not worth the work any more."""
        session = state.session
        if not session.paced or state.now_ns() <= unit.end_ns + session.window_ns + session.lateness_ns:
            return unit
        pictures = {stream for stream in unit.chunks if unit.inputs[stream].kind.is_sheddable}
        for stream in pictures:
            for chunk in unit.chunks[stream]:
                self._inbox.settle(state, chunk, "late")
        kept = {stream: chunks for stream, chunks in unit.chunks.items() if stream not in pictures}
        return replace(unit, chunks=kept, missing=unit.missing | pictures, overdue=True)

    def _without_stale(self, state: OpenSession, unit: Unit) -> Unit:
        """A barge-in may have come after the unit was complete."""
        if not state.fence.epoch:
            return unit
        kept: dict[str, tuple[Chunk, ...]] = {}
        for stream, chunks in unit.chunks.items():
            kind = unit.inputs[stream].kind
            for chunk in chunks:
                if state.fence.is_stale(chunk, kind):
                    self._inbox.settle(state, chunk, "stale")
            kept[stream] = tuple(chunk for chunk in chunks if not state.fence.is_stale(chunk, kind))
        if kept == unit.chunks:
            return unit
        return replace(unit, chunks=kept)

    def _leave(self, state: OpenSession, ready: ReadyUnit, started_ns: int, *, has_failed: bool) -> None:
        """The unit is done, or has failed: its chunks' credit goes back, its watermark goes on with its trace.

        started_ns: monotonic.
        """
        unit = ready.unit
        for chunks in unit.chunks.values():
            for chunk in chunks:
                self._inbox.settle(state, chunk, "failed" if has_failed else None)
        state.num_units += 1
        state.num_processed += 1
        self._replica.num_units += 1
        self._replica.meter.unit_done(state.session, unit.end_ns)
        received_ns = state.session_ns(ready.waiting.since_ns)
        span = Span(self._replica.name, received_ns, state.session_ns(started_ns), state.now_ns())
        failures = (*state.faults.take(), *self._afterword.unsaid(state, unit))
        if state.plan.is_aside:
            news = [failure for failure in failures if state.faults.is_news(failure)]
            self._replica.out.tell_failures(state, news, window=unit.index)
        trace = leave_stage(unit, span, *self._awaited(state, unit, received_ns), failures=failures)
        if state.sink is not None:
            events = state.sink.done(unit, received_ns, trace, state.now_ns(), len(self._replica.open))
            self._replica.out.send_all(state, events)
        self._replica.out.advance(state, unit.end_ns, trace)

    def _awaited(self, state: OpenSession, unit: Unit, given_up_ns: int) -> list[Span]:
        """Where a window was that was given up, or of which a stage that has died can't tell any more: as far as is
        known here, with the stages which it had not left."""
        untold = state.traced - unit.traces.keys()
        if not (untold or unit.awaited):
            return []
        sources = (unit.inputs[stream].source for stream in sorted(unit.awaited | untold))
        return [Span(source, unit.end_ns, given_up_ns, given_up_ns) for source in sources]
