"""Who runs a simulated pipeline: looks at its actors through the real coordinator, opens and closes sessions.

Rule: as deploy/run/up.py does it. Whoever wants something of the coordinator waits until it is not looking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from deploy.control.calls import CoordinatorError, Reply
from deploy.control.coordinator import ENDS_S, Coordinator
from deploy.control.ending import DRAIN_S, END_S, drain_s
from deploy.process.deadline import Deadline
from deploy.simulator.world import HostClock, World
from graph.chunk import NS_PER_MS, SessionId
from graph.ledger import Account
from graph.spec import PipelineSpec
from stages.session import Session, View

BUSY_NS: Final = 20 * NS_PER_MS  # as deploy/run/up.py
RETRY_NS: Final = 250 * NS_PER_MS  # until a session is tried again that could not be opened


@dataclass(frozen=True, slots=True)
class _Opening:
    session: Session
    reply: Reply[None]


class Operator:
    """Runs a coordinator to the end of its sessions.

    ledger: the last one, once all is over. failure: why the run could not go on.
    """

    def __init__(self, world: World, coordinator: Coordinator, clock: HostClock, poll_ns: int) -> None:
        """poll_ns: between two looks where nothing is under way."""
        self._world, self._coordinator, self._clock, self._poll_ns = world, coordinator, clock, poll_ns
        self._requests: list[Callable[[], None]] = []
        self._openings: list[_Opening] = []
        self._num_coming = 0  # sessions that will be opened some time
        self._look_ns: int | None = None
        self._drain: Deadline | None = None  # once the user has ended the run
        self._ending: Deadline | None = None
        self._is_looking = False
        self.ledger: dict[str, Account] | None = None
        self.failure: CoordinatorError | None = None

    def start(self, sessions: list[Session]) -> None:
        """Start the pipeline with these sessions, and look at it from now on."""
        self._coordinator.start()
        self._coordinator.open_sessions(sessions)
        self._schedule(self._world.now_ns + self._poll_ns)

    def open_at(self, at_ns: int, session: Session) -> None:
        """Open a session then, or as soon as it can be."""
        self._num_coming += 1
        self._world.at(at_ns, lambda: self._request(lambda: self._open(session)))

    def close(self, session: SessionId, closed: Callable[[], None]) -> None:
        """Close a session at once, if it is open. closed: called if it was."""

        def close() -> None:
            if session in self._coordinator.sessions:
                self._coordinator.close_session(session)
                closed()

        self._request(close)

    def interrupt(self, spec: PipelineSpec) -> None:
        """The user ends the run: sessions drain, and what has not come to its end by then is closed."""

        def interrupt() -> None:
            self._drain = Deadline(drain_s(spec), self._clock.monotonic_s)
            self._ending = Deadline(drain_s(spec) + END_S - DRAIN_S, self._clock.monotonic_s)
            for session in self._coordinator.sessions:
                self._coordinator.end_session(session)

        if self._drain is None:
            self._request(interrupt)

    def add_view(self, session: SessionId, view: View) -> None:
        """Let a session have another view, if it is open."""

        def add() -> None:
            if session in self._coordinator.sessions:
                self._coordinator.add_view(session, view)

        self._request(add)

    def remove_view(self, session: SessionId, view: View) -> None:
        """Let a session have one view less, if it is open and has it."""

        def remove() -> None:
            if session in self._coordinator.sessions:
                self._coordinator.remove_view(session, view.name)

        self._request(remove)

    def _request(self, action: Callable[[], None]) -> None:
        self._requests.append(action)
        if not self._is_looking:
            self._schedule(self._world.now_ns)

    def _open(self, session: Session) -> None:
        self._openings.append(_Opening(session, self._coordinator.begin_to_open(session, lambda: None)))

    def _schedule(self, at_ns: int) -> None:
        if self.ledger is None and (self._look_ns is None or at_ns < self._look_ns):
            self._look_ns = at_ns
            self._world.at(at_ns, lambda: self._look_at(at_ns))

    def _look_at(self, at_ns: int) -> None:
        if at_ns != self._look_ns:
            return  # an earlier one has come in between
        self._look_ns, self._is_looking = None, True
        try:
            self._look()
            if self._is_over():
                self._end()
        except CoordinatorError as error:
            self.failure = error
            self._end()
        self._is_looking = False
        is_busy = self._coordinator.expects_answers or bool(self._requests)
        self._schedule(self._world.now_ns + (BUSY_NS if is_busy else self._poll_ns))

    def _look(self) -> None:
        requests, self._requests = self._requests, []
        for request in requests:
            request()
        self._coordinator.poll()
        for opening in [opening for opening in self._openings if opening.reply.is_done]:
            self._openings.remove(opening)
            self._num_coming -= 1
            if opening.reply.error is not None:
                self.open_at(self._world.now_ns + RETRY_NS, opening.session)

    def _is_over(self) -> bool:
        if self._drain is not None:
            return self._drain.is_over or not self._coordinator.sessions
        return not (self._num_coming or self._requests or self._coordinator.sessions or self._coordinator.is_busy)

    def _end(self) -> None:
        self.ledger = self._coordinator.end(self._ending or Deadline(ENDS_S, self._clock.monotonic_s))
        self._world.is_over = True
