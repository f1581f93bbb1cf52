"""What is changed from outside of a session that is open: its views, its end, what is worth telling its listener."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.actor.replica import Replica
from graph.chunk import Scalar, SessionId
from stages.session import View
from stages.stage import StageError


class Changes:
    """Changes to the sessions that are open at one stage replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def add_view(self, session: SessionId, view: View) -> None:
        """The camera has another view. Raises StageError where the session has ended here, or the stage refuses."""
        state = self._replica.open.get(session)
        if state is None or state.ending or state.faults.given_up:
            raise StageError(f"{self._replica.name}: what session {session!r} sees has ended")
        before = state.session
        state.session = before.with_view(view)
        try:
            self._replica.stage.add_view(state.session, view, state.now_ns())
        except BaseException:
            state.session = before
            raise
        self._replica.schedule.touch(session)

    def remove_view(self, session: SessionId, view: str) -> None:
        """The camera has one view less, from the window's end on."""
        state = self._replica.open.get(session)
        if state is not None:
            with state.faults.within("remove_view"):
                self._replica.stage.remove_view(session, view, state.now_ns())
            self._replica.schedule.touch(session)

    def end_session(self, session: SessionId) -> None:
        """Let a source stop now."""
        state = self._replica.open.get(session)
        if state is not None:
            with state.faults.within("end"):
                self._replica.stage.end(session, state.now_ns())
            self._replica.schedule.touch(session)

    def tell(self, session: SessionId, kind: str, attrs: Mapping[str, Scalar], *, cuts: bool) -> None:
        """Something worth telling has happened to a session. cuts: what is said and not heard is lost with it."""
        state = self._replica.open.get(session)
        if state is None or state.ending:
            return
        now_ns = state.now_ns()
        if cuts and not state.faults.given_up:
            with state.faults.within("cut_off"):
                self._replica.out.send_all(state, self._replica.stage.cut_off(session, now_ns))
        self._replica.out.tell(state, now_ns, {"type": kind, **attrs})
