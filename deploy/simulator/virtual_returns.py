"""Sessions of a simulated pipeline that are closed by force while their chunks flow, and come again under their name:
in the same order as deploy/control/coordinator.py closes and opens them.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

from deploy.control.routing import stages_of
from graph.chunk import NS_PER_MS, SessionId

if TYPE_CHECKING:
    from deploy.simulator.simulate import Simulation

CALL_NS: Final = 20 * NS_PER_MS  # a stage is closed at most so long after the one before it
AWAY_NS: Final = 100 * NS_PER_MS  # for how long nobody has the name
RETRY_NS: Final = 250 * NS_PER_MS  # until it is tried again where somebody it needs has died


class Returns:
    """Lets sessions go and come."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._rng = Random(0)
        self.away: set[SessionId] = set()  # that are being closed, and not open again
        self.closed: set[SessionId] = set()

    def plan(self, rng: Random, returns: float, begin_ns: int, end_ns: int) -> None:
        """returns: how likely each session is closed, and comes again."""
        self._rng = Random(rng.random())
        for number in range(self._simulation.num_sessions):
            if self._rng.random() < returns:
                at_ns = self._rng.randint(begin_ns, end_ns)
                self._world.at(at_ns, lambda number=number: self._close(number))  # type: ignore[misc]

    def _close(self, number: int) -> None:
        simulation = self._simulation
        session = simulation.session(number)
        if session not in simulation.open_sessions():
            return  # it has come to its end
        simulation.note(f"{session.id} is closed by force")
        self.away.add(session.id)
        self.closed.add(session.id)
        passed = stages_of(session, simulation.spec)
        at_ns = self._world.now_ns
        for stage in (stage for stage in simulation.spec.wiring.upstream_first if stage in passed):
            self._world.at(at_ns, lambda stage=stage: self._close_at(stage, session.id))  # type: ignore[misc]
            at_ns += self._rng.randint(0, CALL_NS)
        self._world.at(at_ns + self._rng.randint(0, AWAY_NS), lambda: self._open(number))

    def _close_at(self, stage: str, session: SessionId) -> None:
        runner = self._simulation.runner_of(stage, session)
        if runner is not None:
            runner.close_session(session)

    def _open(self, number: int) -> None:
        simulation = self._simulation
        before = simulation.session(number)
        passed = stages_of(before, simulation.spec)
        if any(simulation.runner_of(stage, before.id) is None for stage in passed):
            self._world.at(self._world.now_ns + RETRY_NS, lambda: self._open(number))
            return
        simulation.note(f"{before.id} comes again")
        self.away.discard(before.id)
        simulation.come_again(number, replace(before, listener=()))
