"""The one loop of an actor: receive → join → gather a batch → process → send. No Ray here: actor/actor.py hosts it.

Rule: stages compute, graph/ decides, the bus carries; this file is where they meet, and the only one that measures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from deploy.actor.afterword import UNSAID, Afterword
from deploy.actor.batch import Batch
from deploy.actor.inbox import Inbox
from deploy.actor.isolation import Faults, breaks_process, reason_of
from deploy.actor.replica import Meter, Replica, WorkingOn
from deploy.actor.session_plan import Listener, SessionPlan, SessionSnapshot, StageSnapshot
from deploy.actor.session_state import OpenSession
from deploy.actor.sink import WindowEnd, usual_level
from deploy.actor.ticker import Ticker
from graph.chunk import (
    NS_PER_MS,
    Scalar,
    SessionId,
)
from graph.clock import Clock
from graph.edge import Receiver, Sender
from graph.gather import Gathering
from graph.ladder import Ladder
from graph.window import WindowJoin
from stages.session import Session, View
from stages.stage import TICK_NS, Stage, StageError

LEAST_SLEEP_NS = NS_PER_MS
MAX_ENDED = 256
"""Sessions that have ended here, of which is known how, and those that were given up, of which is known why."""
MAX_CHUNKS_PER_WINDOW = 1 << 16
"""Of one stream; by far."""
MAX_READY = 4
"""Units of a session that may wait for a stage that falls behind before more windows are given up for it."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """A session that has come to its end here, for a neighbour that is replaced later."""

    num_windows: int
    listener: Listener | None


class StageRunner:
    """One replica of one stage.

    receivers: by edge. senders: by edge, one per replica of the other end.
    working_on: entered for each batch with the stage's name, so that it is known whose data a process has died of.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        receivers: Mapping[str, Receiver],
        senders: Mapping[str, list[Sender]],
        meter: Meter,
        gathering: Gathering,
        clock: Clock,
        working_on: WorkingOn = lambda stage, units: nullcontext(),
    ) -> None:
        self.name = name
        self.stage = stage
        self.replica = Replica(name, stage, receivers, senders, meter, clock, working_on)
        self._gathering = gathering
        self._ended: dict[SessionId, _Ended] = {}
        self._given_up_before: dict[SessionId, tuple[str, bool]] = {}  # that have ended: why, and whether aside
        self._afterword = Afterword(self.replica)
        self._inbox = Inbox(self.replica)
        self.take = self._inbox.take
        self.end_input = self._inbox.end_input
        self._ticker = Ticker(self.replica)
        self.files = self._ticker.files
        self.wake = self._ticker.wake
        self._batch = Batch(self.replica, gathering, self._inbox, self._ticker, self._afterword)

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def open_session(self, plan: SessionPlan) -> None:
        """Make room for a session, whose time then begins with `begin_session`.

        Raises StageError when the stage has no room; then nothing has changed.
        """
        session = plan.session
        if plan.resume_from is not None:
            session.playback.ack(plan.resume_from.ack)
        self._open_at_stage(session)
        lanes = {edge: self.replica.senders[edge][peer] for edge, peer in plan.peers.items()}
        queues = tuple(
            sender.open_session(session.id, plan.incarnation, lossless=not session.paced, held=edge in plan.held)
            for edge, sender in lanes.items()
        )
        for receiver in self.replica.receivers.values():
            receiver.open_session(session.id, plan.incarnation)
        hears = any(output.kind.is_control and output.edges for output in plan.outputs.values())
        has_ladder = session.ladder and session.paced and hears  # in virtual time nothing is late
        others = [state.session for state in self.replica.open.values() if state.ladder is not None]
        level = plan.resume_from.level if plan.resume_from else usual_level(session, others) if has_ladder else 0
        ladder = Ladder(session.ladder, session.window_ns, level) if has_ladder else None
        session.level.told(0, level)
        faults = Faults(self.name, lambda error, where: self.replica.meter.failed(session, error, where))
        state = OpenSession(plan, self._join(plan), lanes, queues, self.replica.clock, ladder, faults)
        if plan.ends_windows:
            state.sink = WindowEnd(self.name, session, ladder, self.replica.meter, state.events)
        self.replica.open[session.id] = state
        self._ended.pop(session.id, None)  # another one, of its name
        self._given_up_before.pop(session.id, None)
        self.replica.schedule.touch(session.id)
        self.replica.meter.opened(session, plan.upstream if plan.ends_windows else None)
        if ladder is not None:
            self.replica.meter.moved(session, ladder.level)

    def _open_at_stage(self, session: Session) -> None:
        try:
            self.stage.open_session(session)
        except StageError:
            raise
        except Exception as error:
            if breaks_process(error):
                raise
            raise StageError(f"{self.name}: session {session.id!r} can't be opened: {reason_of(error)}") from error

    def begin_session(self, session: SessionId, origin_ns: int) -> None:
        """Let a session's clock run. origin_ns: when event time 0 is, on this host's monotonic clock."""
        state = self.replica.open[session]
        state.begin(origin_ns)
        if state.plan.resume_from is not None:
            self._resume(state, state.plan.resume_from)
        self.replica.schedule.touch(session)

    def _resume(self, state: OpenSession, listener: Listener) -> None:
        """Numbers of chunks leave room for those of the replica that has died."""
        index = state.session.begin_index
        if state.sink is not None and state.control:  # those since then come to their end here
            index = state.sink.num_windows = min(listener.ack.num_windows, index)
        if state.join is not None:
            state.join.begin_at(index, state.now_ns())
        state.num_units = index
        state.first_seq = state.session.begin_index * MAX_CHUNKS_PER_WINDOW
        state.fence.raise_to(listener.ack.epoch)
        self.replica.out.end_removed(state)

    def close_session(self, session: SessionId) -> None:
        """Forget a session at once; what it still holds here is dropped as `shed`. May be called twice."""
        state = self.replica.open.pop(session, None)
        self.replica.ready.pop(session, None)
        self.replica.schedule.forget(session)
        if state is None:
            return
        if state.faults.given_up:
            self._given_up_before[session] = (state.faults.given_up, state.plan.is_aside)
            if len(self._given_up_before) > MAX_ENDED:
                self._given_up_before.pop(next(iter(self._given_up_before)))
        for arrival in state.arrivals.values():
            self.replica.receivers[arrival.edge].drop(arrival, "shed")
        for sender in state.lanes.values():
            sender.close_session(session)
        for receiver in self.replica.receivers.values():
            receiver.close_session(session)
        with state.faults.within("close_session"):
            self.stage.close_session(session)
        self.replica.meter.closed(state.session)

    def end_session(self, session: SessionId) -> None:
        """Let a source stop now."""
        state = self.replica.open.get(session)
        if state is not None:
            with state.faults.within("end"):
                self.stage.end(session, state.now_ns())
            self.replica.schedule.touch(session)

    def listener(self, session: SessionId) -> Listener | None:
        """What is known here of a session's listener; None where nothing is."""
        if (state := self.replica.open.get(session)) is None:
            return self._ended[session].listener if session in self._ended else None
        return Listener(state.session.playback.latest, state.session.level.num_steps)

    def reroute(self, session: SessionId, edge: str, replica: int) -> int | None:
        """A session is resumed at a replica behind this edge that knows nothing of it. Returns None while it is open
        here, else how many windows it had when it ended."""
        state = self.replica.open.get(session)
        if state is None:
            return self._ended[session].num_windows if session in self._ended else 0
        before, sender = state.lanes[edge], self.replica.senders[edge][replica]
        if sender is before:
            sender.release(session)
        else:
            before.move(session, sender)
            state.lanes[edge] = sender
        self.replica.out.say_again(state, edge)
        if state.join is not None and state.session.paced:  # windows in which nobody could hear do not count
            state.num_quiet = min(0, (state.join.next_end_ns - state.now_ns()) // state.session.window_ns)
        with state.faults.within("downstream_replaced"):
            self.stage.downstream_replaced(session)
        self.replica.schedule.touch(session)
        return None

    def add_view(self, session: SessionId, view: View) -> None:
        """The camera has another view. Raises StageError where the session has ended here, or the stage refuses."""
        state = self.replica.open.get(session)
        if state is None or state.ending or state.faults.given_up:
            raise StageError(f"{self.name}: what session {session!r} sees has ended")
        before = state.session
        state.session = before.with_view(view)
        try:
            self.stage.add_view(state.session, view, state.now_ns())
        except Exception:
            state.session = before
            raise
        self.replica.schedule.touch(session)

    def remove_view(self, session: SessionId, view: str) -> None:
        """The camera has one view less, from the window's end on."""
        state = self.replica.open.get(session)
        if state is not None:
            with state.faults.within("remove_view"):
                self.stage.remove_view(session, view, state.now_ns())
            self.replica.schedule.touch(session)

    def tell(self, session: SessionId, kind: str, attrs: Mapping[str, Scalar], *, cuts: bool) -> None:
        """Something worth telling has happened to a session. cuts: what is said and not heard is lost with it."""
        state = self.replica.open.get(session)
        if state is None or state.ending:
            return
        now_ns = state.now_ns()
        if cuts and not state.faults.given_up:
            with state.faults.within("cut_off"):
                self.replica.out.send_all(state, self.stage.cut_off(session, now_ns))
        self.replica.out.tell(state, now_ns, {"type": kind, **attrs})

    def snapshot(self) -> StageSnapshot:
        """What this replica is doing."""
        replica = self.replica
        sinks = {name: state.sink for name, state in replica.open.items()}
        seen = {n: SessionSnapshot(s.num_windows, s.num_late) if s else SessionSnapshot(0, 0) for n, s in sinks.items()}
        failing = {name: (s.faults.given_up, s.plan.is_aside) for name, s in replica.open.items() if s.faults.given_up}
        given_up, before = _of_way(failing, is_aside=False), _of_way(self._given_up_before, is_aside=False)
        aside = _of_way(self._given_up_before | failing, is_aside=True)
        return StageSnapshot(replica.num_units, replica.num_ready, seen, self.stage.sources(), given_up, aside, before)

    @property
    def incoming(self) -> Iterable[str]:
        """The edges that come here."""
        return self.replica.receivers

    def _join(self, plan: SessionPlan) -> WindowJoin | None:
        if not plan.inputs:
            return None
        session = plan.session
        # The sources keep `lateness`; a window more is given to the stages in between, whose watermarks always come.
        lateness_ns = session.lateness_ns + session.window_ns if session.paced else None
        return WindowJoin(session.id, plan.inputs, window_ns=session.window_ns, lateness_ns=lateness_ns)

    # ---- what goes out -----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do what is due; True when there is more to do at once.

        Only sessions are looked at for which something came or is due, so that a step costs what happens in it, not
        what is open.
        """
        if self.replica.schedule.is_empty and not self.replica.ready:
            return False
        looked_at = self._due()
        if not looked_at and not self.replica.ready:
            return False
        for state in looked_at.values():
            self._ticker.advance(state)
            self.replica.out.tell_new_failures(state)
            if state.begun and state.join is not None and len(state.ready) < MAX_READY:
                now_ns = state.now_ns()
                self._inbox.joined(state, state.join.expire(now_ns, MAX_READY - len(state.ready)))
                if self._afterword.is_needed(state) and self._afterword.due_ns(state, state.join) <= now_ns:
                    self._inbox.joined(state, state.join.extend())
        while idle := self._batch.idle():
            self._batch.process(idle, idle=True)
            looked_at |= {state.session.id: state for state, _ in idle}
        if batch := self._batch.gather():
            self._batch.process(batch)
            looked_at |= {state.session.id: state for state, _ in batch}
        for state in looked_at.values():
            self._finish(state)
        self._plan_looks(looked_at)
        return bool(batch) and bool(self.replica.ready)

    def due_in_ns(self) -> int | None:
        """How long the loop may sleep if nothing comes; None: as long as nothing comes."""
        next_ns = self.replica.schedule.next_ns
        return None if next_ns is None else max(next_ns - self.replica.clock.monotonic_ns(), LEAST_SLEEP_NS)

    def _due(self) -> dict[SessionId, OpenSession]:
        """The sessions to look at now."""
        due = self.replica.schedule.due(self.replica.clock.monotonic_ns())
        return {session: self.replica.open[session] for session in due if session in self.replica.open}

    def _plan_looks(self, looked_at: Mapping[SessionId, OpenSession]) -> None:
        """When to look at them again if nothing comes."""
        for name, state in looked_at.items():
            if name in self.replica.open:
                self._look_again(name, state)

    def _look_again(self, session: SessionId, state: OpenSession) -> None:
        if state.ending or not state.has_room():
            self.replica.schedule.touch(session)  # its lanes drain in silence: look whenever there is a step
        now_ns = self.replica.clock.monotonic_ns()
        due_ns: list[int] = []
        if self._ticker.follows_clock and self._ticker.may_advance(state):
            due_ns.append(now_ns + self._ticker.due_in_ns(session, state, now_ns))
        if state.faults.are_recent:
            due_ns.append(now_ns + TICK_NS)
        if state.ready and self._batch.may_go(state):
            due_ns.append(self._gathering.until_ns(state.ready[0].waiting))
        elif not state.ready and state.begun and state.join is not None:
            expires_ns = state.join.expires_ns
            if expires_ns is not None:
                due_ns.append(state.monotonic_ns(expires_ns))
            elif self._afterword.is_needed(state):
                due_ns.append(state.monotonic_ns(self._afterword.due_ns(state, state.join)))
        self.replica.schedule.plan(session, min(due_ns, default=None))

    def _finish(self, state: OpenSession) -> None:
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

    def _may_end(self, state: OpenSession) -> bool:
        if state.ready or not self._inbox.have_ended(state) or not state.has_room() or self._afterword.is_needed(state):
            return False
        if state.faults.given_up:
            return True
        with state.faults.within("finished"):
            return self.stage.finished(state.session.id)
        return False

    def _say_goodbye(self, state: OpenSession) -> None:
        if self._afterword.has_more_to_say(state):
            logging.warning("%s: session %s: %s", self.name, state.session.id, UNSAID)
        if not state.faults.given_up:
            with state.faults.within("drain"):
                self.replica.out.send_all(state, self.stage.drain(state.session.id))
        self.replica.out.tell_new_failures(state)
        window_ns = state.session.window_ns
        end_ns = state.num_units * window_ns
        # A source says itself where its streams end, unless it can't any more.
        says_itself = state.join is None and not state.faults.given_up
        if state.join is None and state.faults.given_up:
            end_ns = -(-max(state.now_ns(), 0) // window_ns) * window_ns if state.session.paced else 0
        self.replica.out.end(state, end_ns, says_itself=says_itself)


def _of_way(given_up: Mapping[SessionId, tuple[str, bool]], *, is_aside: bool) -> dict[SessionId, str]:
    """Of those that were given up, with the reason, the ones on a side branch, or on the way of the windows."""
    return {session: reason for session, (reason, aside) in given_up.items() if aside == is_aside}
