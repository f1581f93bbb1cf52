"""What a stage has left to say behind the last window of its inputs: it is given windows more, in which it may.

Rule: until all is said, or five of them in a row are silent, for then nobody listens.
"""

from __future__ import annotations

from deploy.actor.replica import Replica
from deploy.actor.session_state import OpenSession
from graph.chunk import Failure
from graph.window import Unit, WindowJoin

MAX_QUIET = 5
"""Windows after its inputs' end in which a stage waits for a listener who hears nothing."""
UNSAID = f"what it had left to say was not said: its listener heard nothing for {MAX_QUIET} windows"


class Afterword:
    """The windows after its inputs' end, of each session of a replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def is_needed(self, state: OpenSession) -> bool:
        """Does it take a window more, after the last of the inputs?"""
        over = not state.ready and not state.ending and state.join is not None and state.join.finished
        return over and state.num_quiet < MAX_QUIET and self.has_more_to_say(state)

    def has_more_to_say(self, state: OpenSession) -> bool:
        """Has the stage, of itself?"""
        if state.faults.given_up:
            return False
        with state.faults.within("has_more_to_say"):
            return self._replica.stage.has_more_to_say(state.session.id)
        return False

    @staticmethod
    def due_ns(state: OpenSession, join: WindowJoin) -> int:
        """When that window leaves: at its end, so that the listener has heard on meanwhile; in virtual time at once."""
        return join.next_end_ns if state.session.paced else 0

    def unsaid(self, state: OpenSession, unit: Unit) -> tuple[Failure, ...]:
        """What is lost with the last window that is given to a stage for what it has left to say."""
        if not unit.is_afterword or state.num_quiet != MAX_QUIET or not self.has_more_to_say(state):
            return ()
        self._replica.meter.unsaid(state.session)
        return (Failure(self._replica.name, UNSAID),)
