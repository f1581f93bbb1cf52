"""What comes in to a stage: the listener's news at once, data through the session's join, until a unit is complete.

Rule: a chunk whose epoch is over goes no further; each chunk's credit goes back exactly once, with what became of it.
"""

from __future__ import annotations

from typing import Any

from deploy.actor.isolation import process
from deploy.actor.replica import Replica
from deploy.actor.session_state import OpenSession, ReadyUnit
from graph.chunk import NS_PER_S, REMOVED, Chunk, ChunkType, SessionId
from graph.edge import Arrival
from graph.kinds import Kind
from graph.ledger import Reason
from graph.window import NOTHING, Joined, Unit, WindowJoin


class Inbox:
    """The inputs of one stage replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def take(self, arrival: Arrival) -> None:
        """One chunk from the bus."""
        chunk = arrival.chunk
        state = self._replica.open.get(chunk.session)
        if state is None:  # the session was closed here while the chunk was under way
            if not chunk.is_control:
                self._replica.receivers[arrival.edge].drop(arrival, "closed")
            return
        if chunk.type is ChunkType.PLAYBACK and chunk.epoch <= state.fence.epoch:
            self._hear(state, chunk)
            return
        with state.faults.within("take"):
            self._take(state, arrival)
            if state.join is None or not state.join.is_steady:
                self._replica.schedule.touch(chunk.session)
            return
        self._replica.schedule.touch(chunk.session)
        if state.arrivals.pop(id(chunk), None) is not None:
            self._replica.receivers[arrival.edge].drop(arrival, "failed")

    def end_input(self, session: SessionId, edge: str, num_windows: int) -> None:
        """Nothing more comes on this edge, and nobody is left to say so. num_windows: that came there, in all."""
        state = self._replica.open.get(session)
        if state is None:  # it has heard of the end meanwhile
            return
        join = state.join
        if join is None:
            state.ended.add(edge)
        else:
            window_ns = state.session.window_ns
            at_ns = max(num_windows * window_ns, join.next_end_ns - window_ns)
            for stream in [name for name, each in join.inputs.items() if each.edge == edge]:
                self.joined(state, join.end(stream, at_ns))
        self._replica.schedule.touch(session)

    def have_ended(self, state: OpenSession) -> bool:
        """Have all the inputs of a session? Then nothing waits here for a chunk more."""
        if state.join is not None:
            if not state.join.finished:
                return False
            for chunk in state.join.rest():
                self.settle(state, chunk, "late")
            return state.join.ended
        return len(state.ended) >= state.plan.num_inputs

    def joined(self, state: OpenSession, given: Joined) -> None:
        """What its join gives: what came too late, and units, which are then ready."""
        if given is NOTHING:
            return
        for chunk in given.late:
            self.settle(state, chunk, "late")
        self._replica.meter.carried(len(given.carried))
        if given.units:
            now_ns = self._replica.clock.monotonic_ns()
            state.ready.extend([self._ready(state, unit, now_ns) for unit in given.units])
            self._replica.ready[state.session.id] = state
            self._replica.schedule.touch(state.session.id)

    def _ready(self, state: OpenSession, unit: Unit, now_ns: int) -> ReadyUnit:
        stage, session = self._replica.stage, state.session
        if not (stage.paced_by_listener and session.paced and session.speech):
            return state.ready_unit(unit, now_ns)
        dry_ns, may_hold = session.playback.dry_ns, False
        with state.faults.within("may_hold"):
            may_hold = dry_ns is not None and stage.may_hold(unit)
        return state.ready_unit(unit, now_ns, dry_ns, may_hold=may_hold)

    def settle(self, state: OpenSession, chunk: Chunk, reason: Reason | None) -> None:
        """Give a chunk's credit back: used, or dropped for a reason. One of a sliding window is in several units."""
        arrival = state.arrivals.pop(id(chunk), None)
        if arrival is None:
            return
        if reason is None:
            self._replica.receivers[arrival.edge].deliver(arrival, self._age_s(state, chunk))
        else:
            self._replica.receivers[arrival.edge].drop(arrival, reason)

    def _hear(self, state: OpenSession, chunk: Chunk) -> None:
        """News of the listener. In real time they wake nothing: a stage reads the newest when it decides."""
        state.session.playback.hear(chunk)
        state.session.level.update(chunk.start_ns, int(chunk.attrs.get("level") or 0))
        if not state.session.paced:
            self._replica.schedule.touch(chunk.session)

    def _take(self, state: OpenSession, arrival: Arrival) -> None:
        chunk = arrival.chunk
        if chunk.is_control:
            self._control(state, chunk, arrival.edge)
            return
        if state.join is None:
            self._process_single(state, arrival)
            return
        state.arrivals[id(chunk)] = arrival
        stream = self._stream_of(state, state.join, chunk, arrival.edge)
        if self._is_stale(state, chunk, state.join.inputs[stream].kind):
            self.settle(state, chunk, "stale")
        else:
            self.joined(state, state.join.add(chunk, stream))

    def _process_single(self, state: OpenSession, arrival: Arrival) -> None:
        """Of a stage without windows."""
        replica, unit = self._replica, _single(state, arrival)
        if not state.faults.given_up:
            with replica.working_on(replica.name, [unit]):
                outcome = process(replica.stage, [unit], replica.open if replica.stage.scope == "pipeline" else ())
            outcome.send(lambda chunk: replica.out.send(replica.open[chunk.session], chunk))
            error = outcome.failed.get(unit.session)
            if error is None:
                state.faults.succeeded("process")
                replica.receivers[arrival.edge].deliver(arrival, self._age_s(state, arrival.chunk))
                return
            state.faults.failed("process", error, unit.index)
        replica.receivers[arrival.edge].drop(arrival, "failed")

    def _control(self, state: OpenSession, chunk: Chunk, edge: str) -> None:
        if chunk.type is ChunkType.WATERMARK:
            join = _of(state.join)
            stream = self._stream_of(state, join, chunk, edge)
            self.joined(state, join.advance(stream, chunk.start_ns, chunk.trace))
        elif chunk.type is ChunkType.END and state.join is not None:
            removed = bool(chunk.attrs.get(REMOVED))
            self.joined(state, state.join.end(state.stream_of(edge, chunk), chunk.start_ns, removed=removed))
        elif chunk.type is ChunkType.END:
            state.ended.add(edge)  # twice, where one that takes a dead one's place says so again
        else:
            if chunk.type is ChunkType.PLAYBACK:
                self._hear(state, chunk)
            self._raise_epoch(state, chunk.epoch)

    @staticmethod
    def _stream_of(state: OpenSession, join: WindowJoin, chunk: Chunk, edge: str) -> str:
        """As the join calls it. What comes of a view that it does not know yet opens that view's stream."""
        stream = state.stream_of(edge, chunk)
        if chunk.view and stream not in join.inputs:
            join.open(stream, edge, chunk.start_ns)
        return stream

    def _is_stale(self, state: OpenSession, chunk: Chunk, kind: Kind[Any]) -> bool:
        self._raise_epoch(state, chunk.epoch)
        return state.fence.is_stale(chunk, kind)

    def _raise_epoch(self, state: OpenSession, epoch: int) -> None:
        """A barge-in, from whoever tells of it first: the listener, or the first chunk that was made after it."""
        if state.fence.raise_to(epoch):
            state.sent.clear()  # nobody will hear it
            self._replica.schedule.touch(state.session.id)
            if not state.faults.given_up:
                with state.faults.within("interrupt"):
                    made = self._replica.stage.interrupt(state.session.id, state.session.playback.latest)
                    self._replica.out.send_all(state, made)

    @staticmethod
    def _age_s(state: OpenSession, chunk: Chunk) -> float:
        return max(state.now_ns() - chunk.end_ns, 0) / NS_PER_S


def _single(state: OpenSession, arrival: Arrival) -> Unit:
    """What came, of a stage without windows; by the name of the port that it came in at."""
    chunk, window_ns = arrival.chunk, state.session.window_ns
    index, port = chunk.start_ns // window_ns, state.plan.ports[arrival.edge]
    return Unit(chunk.session, index, index * window_ns, (index + 1) * window_ns, chunks={port: (chunk,)})


def _of(join: WindowJoin | None) -> WindowJoin:
    assert join is not None, "a stage with inputs has a join"
    return join
