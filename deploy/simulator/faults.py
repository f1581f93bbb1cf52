"""What goes wrong in a seed, and when: actors that stall, hang and die, stages that slow down, clocks that are set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Final

from deploy.control.placement import Process
from deploy.control.restarts import STALL_S
from deploy.simulator.actors import VirtualActor
from deploy.simulator.scenarios import Scenario
from deploy.simulator.world import HostClock, World
from graph.chunk import NS_PER_MS, NS_PER_S

HANGS_NS: Final = (round((STALL_S + 2) * NS_PER_S), round((STALL_S + 10) * NS_PER_S))
LONGEST_STEP_NS: Final = 2 * 3600 * NS_PER_S  # of a wall clock, as when summer ends
MAX_DEATHS: Final = 2  # of an actor
NUM_STEPS: Final = 2  # of each host, at most


class Faults:
    """Plans them all. num_deaths: of actors, by now; num_hung: of those that were taken for dead."""

    def __init__(
        self,
        world: World,
        scenario: Scenario,
        rng: Random,
        span_ns: tuple[int, int],
        actors: Mapping[str, VirtualActor],
    ) -> None:
        """span_ns: from when until when something may go wrong. actors: by name, those which live then."""
        self._world, self._scenario, self._rng = world, scenario, rng
        self._span_ns, self._actors = span_ns, actors
        self.num_deaths = self.num_hung = 0

    def plan(self, processes: Sequence[Process]) -> None:
        for process in processes:
            self._plan_stalls(process.name)
            self._plan_deaths(process.name)
        for stage, factor in self._scenario.slow.items():
            begin_ns = self._some_time_ns()
            self._world.at(begin_ns, lambda stage=stage, factor=factor: self._slow_down(stage, factor))  # type: ignore[misc]
            end_ns = begin_ns + self._scenario.longest_stall_ns
            self._world.at(end_ns, lambda stage=stage: self._slow_down(stage, 1.0))  # type: ignore[misc]

    def plan_steps(self, hosts: Sequence[HostClock]) -> None:
        """Of the hosts' wall clocks."""
        for host in hosts:
            for _ in range(NUM_STEPS):
                if self._rng.random() < self._scenario.steps:
                    by_ns = self._rng.randint(-LONGEST_STEP_NS, LONGEST_STEP_NS)
                    self._world.at(self._some_time_ns(), lambda host=host, by_ns=by_ns: host.step(by_ns))  # type: ignore[misc]

    def _some_time_ns(self) -> int:
        return self._rng.randint(*self._span_ns)

    def _plan_stalls(self, name: str) -> None:
        if self._rng.random() < self._scenario.stalls:
            for_ns = self._rng.randint(NS_PER_MS, self._scenario.longest_stall_ns)
            self._world.at(self._some_time_ns(), lambda: self._stall(name, for_ns))

    def _plan_deaths(self, name: str) -> None:
        deaths = self._scenario.deaths
        num_deaths = sum(self._rng.random() < deaths / MAX_DEATHS for _ in range(MAX_DEATHS))
        hangs = self._rng.random() < self._scenario.hangs and num_deaths < MAX_DEATHS
        for _ in range(num_deaths):
            self._world.at(self._some_time_ns(), lambda: self._die(name))
        if hangs:
            at_ns, for_ns = self._some_time_ns(), self._rng.randint(*HANGS_NS)
            self._world.at(at_ns, lambda: self._hang(name, for_ns))

    def _stall(self, name: str, for_ns: int) -> None:
        if (actor := self._actors.get(name)) is not None:
            actor.stall(self._world.now_ns + for_ns)

    def _hang(self, name: str, for_ns: int) -> None:
        """For so long that it is taken for dead."""
        if self._lives(name):
            self.num_deaths += 1
            self.num_hung += 1
            self._stall(name, for_ns)

    def _die(self, name: str) -> None:
        if self._lives(name):
            self.num_deaths += 1
            self._actors[name].die()

    def _lives(self, name: str) -> bool:
        actor = self._actors.get(name)
        return actor is not None and not actor.is_dead

    def _slow_down(self, stage: str, factor: float) -> None:
        for actor in self._actors.values():
            if stage in actor.runners:
                actor.runners[stage].stage.slow_down = factor  # type: ignore[attr-defined]
