"""What a stage does though nothing comes: as its sessions' clocks go on, and as its files become readable."""

from __future__ import annotations

from collections.abc import Collection

from deploy.actor.replica import Replica
from deploy.actor.session_state import OpenSession
from graph.chunk import SessionId
from stages.stage import TICK_NS, Stage


class Ticker:
    """The clock and the files of one stage replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.follows_clock = type(replica.stage).advance is not Stage.advance
        self._has_files = type(replica.stage).wakes is not Stage.wakes

    def advance(self, state: OpenSession) -> None:
        """Send what it makes until now."""
        if self.follows_clock and self.may_advance(state):
            with state.faults.within("advance"):
                self._replica.out.send_all(state, self._replica.stage.advance(state.session.id, state.now_ns()))

    def may_advance(self, state: OpenSession) -> bool:
        """Has the session's clock begun, and is there room for what is made?"""
        return state.begun and not state.ending and not state.faults.given_up and state.has_room()

    def due_in_ns(self, session: SessionId, state: OpenSession, now_ns: int) -> int:
        """When it is to be looked at again. now_ns: monotonic."""
        with state.faults.within("due_in_ns"):
            return self._replica.stage.due_in_ns(session, state.session_ns(now_ns))
        return TICK_NS

    def files(self) -> list[int]:
        """File descriptors that become readable when there is something to do: of sessions that could do it."""
        if not self._has_files:
            return []
        wakes = self._replica.stage.wakes()
        return [descriptor for descriptor, session in wakes.items() if self._may_be_woken(session)]

    def wake(self, descriptors: Collection[int]) -> None:
        """These are readable."""
        if self._has_files:
            wakes = self._replica.stage.wakes()
            for descriptor in descriptors:
                if descriptor in wakes:
                    self._replica.schedule.touch(wakes[descriptor])

    def _may_be_woken(self, session: SessionId) -> bool:
        state = self._replica.open.get(session)
        return state is not None and self.may_advance(state)
