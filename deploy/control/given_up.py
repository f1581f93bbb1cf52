"""Sessions that a stage has failed at too often: they end, or go on without it; each is reported once."""

from __future__ import annotations

from collections.abc import Callable

from deploy.control.restarts import Restarts, Tools
from graph.chunk import SessionId


class GivenUp:
    """Looks at what the actors report of sessions that they have given up."""

    def __init__(self, tools: Tools, restarts: Restarts, end_session: Callable[[SessionId], None]) -> None:
        """end_session: lets its sources stop."""
        self._tools, self._restarts, self._end_session = tools, restarts, end_session
        self._reported: set[tuple[str, SessionId]] = set()  # at which stage which session is given up

    def end(self) -> None:
        """Where a stage has failed at a session too often, its sources end; what is under way is gone through."""
        for name, stages in self._tools.fleet.snapshots.items():
            living = self._tools.fleet.living.get(name)
            given_up = [(stage, *item) for stage, each in stages.items() for item in each.given_up.items()]
            for stage, session, reason in given_up:
                placement = self._tools.table.placements.get(session)
                if placement is None or living is None or living.reported_at <= placement.since:
                    continue
                if placement.is_open and not placement.is_given_up:
                    placement.is_given_up = True
                    self._reported.add((stage, session))
                    self._tools.tell(f"camera {placement.session.camera}: closed: {reason}")
                    self._restarts.announce(placement, "session_closed", {"reason": reason})
                    self._end_session(session)

    def report(self) -> None:
        """What ends nothing any more: on a side branch, where the session goes on without the stage, or in a session
        that has ended before anybody looked."""
        given_up: set[tuple[str, SessionId]] = set()
        for name, stage in [item for stages in self._tools.fleet.snapshots.values() for item in stages.items()]:
            given_up |= {(name, session) for session in stage.given_up}
            aside = {s: f"{reason}; the camera goes on without {name}" for s, reason in stage.given_up_aside.items()}
            before = {s: f"closed: {reason}" for s, reason in stage.given_up_before.items()}
            for session, what in (aside | before).items():
                given_up.add((name, session))
                if (name, session) not in self._reported:
                    self._reported.add((name, session))
                    self._tools.tell(f"camera {session}: {what}")
        self._reported &= given_up  # who opens again under its name is another one
