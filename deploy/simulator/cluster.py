"""Where virtual actors are placed and called: what deploy/control/cluster.py is over Ray, in virtual time.

Rule: the coordinator's process waits as a real one does, by letting the world go on until its answer is there. What
is called travels as values: an actor gets copies of its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from deploy.actor.plan import ActorPlan, Answer, Call
from deploy.actor.suspects import Work
from deploy.control.calls import ActorDied
from deploy.control.placement import Process
from deploy.simulator.actors import VirtualActor
from deploy.simulator.world import Network, World
from graph.chunk import NS_PER_S

LOADS_NS: Final = (NS_PER_S, 5 * NS_PER_S)  # how long an actor takes to start again
LEAST_WAIT_NS: Final = 1_000  # so that time passes, however a clock rounds
STAMPS: Final = Network()  # how clocks are read: not in the actor's loop, so that no batch is in the way

Make = Callable[[Process, ActorPlan, int], VirtualActor]


@dataclass(slots=True, eq=False)
class Batch:
    """Calls under way to an actor."""

    actor: VirtualActor
    answers: list[Answer] | None = None

    @property
    def is_through(self) -> bool:
        return self.answers is not None or self.actor.is_dead


class VirtualCluster:
    """See deploy/control/fleet.py: Cluster."""

    node_id = "coordinator"

    def __init__(self, world: World, calls: Network, rng: Random, make: Make) -> None:
        """make: an actor for a process, by its plan and by how long it is to load."""
        self._world, self._calls, self._rng, self._make = world, calls, rng, make
        self._has_news = False  # for who waits for an answer

    def place(self, processes: Iterable[Process], plans: Iterable[ActorPlan]) -> Mapping[str, VirtualActor]:
        return {process.name: self._make(process, plan, 0) for process, plan in zip(processes, plans, strict=True)}

    def replace(self, process: Process, plan: ActorPlan) -> VirtualActor:
        return self._make(process, plan, self._rng.randint(*LOADS_NS))

    def perform(self, handle: VirtualActor, calls: Sequence[Call]) -> Batch:
        batch = Batch(handle)
        if any(call.arguments for call in calls):
            calls = pickle.loads(pickle.dumps(calls))

        def came(answers: list[Answer]) -> None:
            batch.answers, self._has_news = answers, True

        def answered(answers: list[Answer]) -> None:
            self._world.after(self._calls.delay_ns(self._rng), lambda: came(answers))

        self._world.after(self._calls.delay_ns(self._rng), lambda: handle.perform(calls, answered))
        return batch

    def finished(self, references: Sequence[Batch], timeout_s: float) -> Sequence[Batch]:
        until_ns = self._until_ns(timeout_s)
        while not any(batch.is_through for batch in references) and self._world.now_ns < until_ns:
            self._has_news = False
            self._world.wait(until_ns, lambda: self._has_news)
        self._world.wait(self._world.now_ns)  # those that come in the same moment
        return [batch for batch in references if batch.is_through]

    def died(self) -> None:
        """An actor has: who waits for its answer waits no longer."""
        self._has_news = True

    def answers(self, name: str, reference: Batch) -> Sequence[Answer]:
        if reference.answers is None:
            raise ActorDied(f"{name} has died")
        return reference.answers

    def clock_ns(self, handle: VirtualActor, timeout_s: float) -> int:
        there_ns, back_ns = STAMPS.delay_ns(self._rng), STAMPS.delay_ns(self._rng)
        if handle.is_dead or there_ns + back_ns > timeout_s * NS_PER_S:
            self._world.wait(self._until_ns(timeout_s))
            raise TimeoutError
        self._world.wait(self._world.now_ns + there_ns)
        theirs_ns = handle.host.monotonic_ns()
        self._world.wait(self._world.now_ns + back_ns)
        return theirs_ns

    def work_of(self, handle: VirtualActor, directory: Path, peer: str) -> Work:
        return handle.work

    def stop(self, handles: Iterable[VirtualActor], timeout_s: float) -> None:
        for handle in handles:
            handle.die()

    def kill(self, handle: VirtualActor) -> None:
        handle.die()

    def _until_ns(self, timeout_s: float) -> int:
        return self._world.now_ns + max(round(timeout_s * NS_PER_S), LEAST_WAIT_NS)
