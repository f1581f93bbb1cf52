"""A session's life at a stage: it is opened, begins or resumes, comes to its end, and is closed.

Rule: it ends once its inputs have ended and all is processed, said and sent. Of an end so much is kept as a neighbour
that is replaced later has to know.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.actor.afterword import UNSAID, Afterword
from deploy.actor.inbox import Inbox
from deploy.actor.isolation import Faults, breaks_process, reason_of
from deploy.actor.replica import Replica
from deploy.actor.session_plan import Listener, SessionPlan, SessionSnapshot, StageSnapshot
from deploy.actor.session_state import OpenSession
from deploy.actor.sink import WindowEnd, usual_level
from graph.chunk import SessionId
from graph.ladder import Ladder
from graph.window import WindowJoin
from graph.wording import one_line
from stages.session import Session
from stages.stage import StageError

MAX_ENDED = 256
"""Sessions that have ended here, of which is known how, and those that were given up, of which is known why."""
MAX_CHUNKS_PER_WINDOW = 1 << 16
"""Of one stream; by far."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """A session that has come to its end here, for a neighbour that is replaced later."""

    num_windows: int
    listener: Listener | None


class Lives:
    """The sessions of one stage replica, from their opening to their end."""

    def __init__(self, replica: Replica, inbox: Inbox, afterword: Afterword) -> None:
        self._replica = replica
        self._inbox = inbox
        self._afterword = afterword
        self._ended: dict[SessionId, _Ended] = {}
        self._given_up_before: dict[SessionId, tuple[str, bool]] = {}  # that have ended: why, and whether aside

    def open_session(self, plan: SessionPlan) -> None:
        """Make room for a session, whose time then begins with `begin_session`.

        Raises StageError when the stage has no room; then nothing has changed.
        """
        session = plan.session
        if plan.resume_from is not None:
            session.playback.ack(plan.resume_from.ack)
        self._open_at_stage(session)
        lanes = {edge: self._replica.senders[edge][peer] for edge, peer in plan.peers.items()}
        queues = tuple(
            sender.open_session(session.id, plan.incarnation, lossless=not session.paced, held=edge in plan.held)
            for edge, sender in lanes.items()
        )
        for receiver in self._replica.receivers.values():
            receiver.open_session(session.id, plan.incarnation)
        hears = any(output.kind.is_control and output.edges for output in plan.outputs.values())
        has_ladder = session.ladder and session.paced and hears  # in virtual time nothing is late
        others = [state.session for state in self._replica.open.values() if state.ladder is not None]
        level = plan.resume_from.level if plan.resume_from else usual_level(session, others) if has_ladder else 0
        ladder = Ladder(session.ladder, session.window_ns, level) if has_ladder else None
        session.level.update(0, level)
        faults = Faults(self._replica.name, lambda error, where: self._replica.meter.failed(session, error, where))
        faults.given_up = plan.given_up
        state = OpenSession(plan, _join_of(plan), lanes, queues, self._replica.clock, ladder, faults)
        if plan.ends_windows:
            state.sink = WindowEnd(self._replica.name, session, ladder, self._replica.meter, state.events)
        self._replica.open[session.id] = state
        self._ended.pop(session.id, None)  # another one, of its name
        self._given_up_before.pop(session.id, None)
        self._replica.schedule.touch(session.id)
        self._replica.meter.opened(session, plan.upstream if plan.ends_windows else None)
        if ladder is not None:
            self._replica.meter.moved(session, ladder.level)

    def begin_session(self, session: SessionId, origin_ns: int) -> None:
        """Let a session's clock run. origin_ns: when event time 0 is, on this host's monotonic clock."""
        state = self._replica.open[session]
        state.begin(origin_ns)
        if state.plan.resume_from is not None:
            self._resume(state, state.plan.resume_from)
        self._replica.schedule.touch(session)

    def close_session(self, session: SessionId) -> None:
        """Forget a session at once; what it still holds here is dropped as `closed`. May be called twice."""
        state = self._replica.open.pop(session, None)
        self._replica.ready.pop(session, None)
        self._replica.schedule.forget(session)
        if state is None:
            return
        if state.faults.given_up:
            self._given_up_before[session] = (state.faults.given_up, state.plan.is_aside)
            if len(self._given_up_before) > MAX_ENDED:
                self._given_up_before.pop(next(iter(self._given_up_before)))
        for arrival in state.arrivals.values():
            self._replica.receivers[arrival.edge].drop(arrival, "closed")
        for sender in state.lanes.values():
            sender.close_session(session)
        for receiver in self._replica.receivers.values():
            receiver.close_session(session)
        with state.faults.within("close_session"):
            self._replica.stage.close_session(session)
        self._replica.meter.closed(state.session)

    def finish(self, state: OpenSession) -> None:
        """End the session here once its inputs have ended and everything is processed and sent."""
        if not state.ending and self._may_end(state):
            state.ending = True
            self._say_goodbye(state)
        if state.ending and all(sender.is_drained(state.session.id) for sender in state.lanes.values()):
            listener = self.listener(state.session.id)
            self._ended.pop(state.session.id, None)  # so that the newest is the last
            self._ended[state.session.id] = _Ended(state.num_units, listener)
            for oldest in [*self._ended][:-MAX_ENDED]:
                del self._ended[oldest]
            self.close_session(state.session.id)

    def reroute(self, session: SessionId, edge: str, replica: int) -> int | None:
        """A session is resumed at a replica behind this edge that knows nothing of it. Returns None while it is open
        here, else how many windows it had when it ended."""
        state = self._replica.open.get(session)
        if state is None:
            return self._ended[session].num_windows if session in self._ended else 0
        before, sender = state.lanes[edge], self._replica.senders[edge][replica]
        if sender is before:
            sender.release(session)
        else:
            before.move(session, sender)
            state.lanes[edge] = sender
        self._replica.out.say_again(state, edge)
        if state.join is not None and state.session.paced:  # windows in which nobody could hear do not count
            state.num_quiet = min(0, (state.join.next_end_ns - state.now_ns()) // state.session.window_ns)
        with state.faults.within("downstream_replaced"):
            self._replica.stage.downstream_replaced(session)
        self._replica.schedule.touch(session)
        return None

    def listener(self, session: SessionId) -> Listener | None:
        """What is known here of a session's listener; None where nothing is."""
        if (state := self._replica.open.get(session)) is None:
            return self._ended[session].listener if session in self._ended else None
        return Listener(state.session.playback.latest, state.session.level.num_steps)

    def snapshot(self) -> StageSnapshot:
        """What this replica is doing."""
        replica = self._replica
        sinks = {name: state.sink for name, state in replica.open.items()}
        seen = {n: SessionSnapshot(s.num_windows, s.num_late) if s else SessionSnapshot(0, 0) for n, s in sinks.items()}
        failing = {name: (s.faults.given_up, s.plan.is_aside) for name, s in replica.open.items() if s.faults.given_up}
        given_up, before = _of_way(failing, is_aside=False), _of_way(self._given_up_before, is_aside=False)
        aside = _of_way(self._given_up_before | failing, is_aside=True)
        return StageSnapshot(
            replica.num_units,
            replica.num_ready,
            seen,
            replica.stage.sources(),
            given_up,
            aside,
            before,
            replica.stage.runs_with,
        )

    def _open_at_stage(self, session: Session) -> None:
        try:
            self._replica.stage.open_session(session)
        except BaseException as error:
            if breaks_process(error):
                raise
            name, is_stage_error = self._replica.name, isinstance(error, StageError)
            if is_stage_error and str(error).startswith(f"{name}: "):
                raise
            reason = one_line(str(error)) if is_stage_error else reason_of(error)
            raise StageError(f"{name}: session {session.id!r} can't be opened: {reason}") from error

    def _resume(self, state: OpenSession, listener: Listener) -> None:
        """Numbers of chunks leave room for those of the replica that has died."""
        index = state.session.begin_index
        if state.sink is not None:
            state.sink.num_windows = min(listener.ack.num_windows, index)
            state.sink.num_late = state.plan.num_late
            if state.control:  # those since then come to their end here
                index = state.sink.num_windows
        if state.join is not None:
            state.join.begin_at(index, state.now_ns())
        state.num_units = index
        state.first_seq = state.session.begin_index * MAX_CHUNKS_PER_WINDOW
        state.fence.raise_to(listener.ack.epoch)
        self._replica.out.end_removed(state)

    def _may_end(self, state: OpenSession) -> bool:
        if state.ready or not self._inbox.have_ended(state) or not state.has_room() or self._afterword.is_needed(state):
            return False
        if state.faults.given_up:
            return True
        with state.faults.within("finished"):
            return self._replica.stage.finished(state.session.id)
        return False

    def _say_goodbye(self, state: OpenSession) -> None:
        if self._afterword.has_more_to_say(state):
            logging.warning("%s: session %s: %s", self._replica.name, state.session.id, UNSAID)
        if not state.faults.given_up:
            with state.faults.within("drain"):
                self._replica.out.send_all(state, self._replica.stage.drain(state.session.id))
        self._replica.out.tell_new_failures(state)
        window_ns = state.session.window_ns
        end_ns = state.num_units * window_ns
        # A source says itself where its streams end, unless it can't any more.
        says_itself = state.join is None and not state.faults.given_up
        if state.join is None and state.faults.given_up:
            end_ns = -(-max(state.now_ns(), 0) // window_ns) * window_ns if state.session.paced else 0
        self._replica.out.end(state, end_ns, says_itself=says_itself)


def _join_of(plan: SessionPlan) -> WindowJoin | None:
    if not plan.inputs:
        return None
    session = plan.session
    # The sources keep `lateness`; a window more is given to the stages in between, whose watermarks always come.
    lateness_ns = session.lateness_ns + session.window_ns if session.paced else None
    return WindowJoin(session.id, plan.inputs, window_ns=session.window_ns, lateness_ns=lateness_ns)


def _of_way(given_up: Mapping[SessionId, tuple[str, bool]], *, is_aside: bool) -> dict[SessionId, str]:
    """Of those that were given up, with the reason, the ones on a side branch, or on the way of the windows."""
    return {session: reason for session, (reason, aside) in given_up.items() if aside == is_aside}
