"""The one loop of an actor: receive → join → gather a batch → process → send. No Ray here: actor/actor.py hosts it.

Rule: stages compute, graph/ decides, the bus carries; here they meet. The parts of the loop stand beside it: inbox.py,
batch.py, outbox.py, lives.py, changes.py, ticker.py and afterword.py, on what they share (replica.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

from deploy.actor.afterword import Afterword
from deploy.actor.batch import Batch
from deploy.actor.changes import Changes
from deploy.actor.inbox import Inbox
from deploy.actor.lives import Lives
from deploy.actor.replica import Meter, Replica, WorkingOn
from deploy.actor.session_state import OpenSession
from deploy.actor.ticker import Ticker
from graph.chunk import NS_PER_MS, SessionId
from graph.clock import Clock
from graph.edge import Receiver, Sender
from graph.gather import Gathering
from stages.stage import TICK_NS, Stage

LEAST_SLEEP_NS = NS_PER_MS
MAX_READY = 4
"""Units of a session that may wait for a stage that falls behind before more windows are given up for it."""


class StageRunner:
    """One replica of one stage: its parts, and the step that they take together.

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
        self._afterword = Afterword(self.replica)
        self._inbox = Inbox(self.replica)
        self._ticker = Ticker(self.replica)
        self._batch = Batch(self.replica, gathering, self._inbox, self._ticker, self._afterword)
        self._lives = Lives(self.replica, self._inbox, self._afterword)
        changes = Changes(self.replica)
        # What the actor calls are the parts' own methods, so that a chunk costs no call more.
        self.take, self.end_input = self._inbox.take, self._inbox.end_input
        self.files, self.wake = self._ticker.files, self._ticker.wake
        self.open_session, self.begin_session = self._lives.open_session, self._lives.begin_session
        self.close_session, self.end_session = self._lives.close_session, changes.end_session
        self.listener, self.reroute, self.snapshot = self._lives.listener, self._lives.reroute, self._lives.snapshot
        self.add_view, self.remove_view, self.tell = changes.add_view, changes.remove_view, changes.tell

    @property
    def incoming(self) -> Iterable[str]:
        """The edges that come here."""
        return self.replica.receivers

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
            self._lives.finish(state)
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
