"""Actors of a simulated pipeline that die, and are started again: by the same control/recovery.py as real ones, and in
the same order as deploy/control/coordinator.py does it.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

from deploy.actor.runner import StageRunner
from deploy.actor.session_plan import Listener, SessionPlan
from deploy.control.calls import Reply, answered, at_once
from deploy.control.placement import Process
from deploy.control.recovery import Going, announce, inputs_of, redirect, reopen
from deploy.simulator.virtual import Actor
from deploy.simulator.virtual_stages import Costly, own_of
from graph.chunk import NS_PER_MS, NS_PER_S, Scalar, SessionId
from stages.stage import Session

if TYPE_CHECKING:
    from deploy.simulator.simulate import Simulation

LOOKS_NS: Final = 250 * NS_PER_MS  # how often the coordinator looks for its actors
STARTS_NS: Final = (NS_PER_S, 5 * NS_PER_S)  # how long one takes to start


class Deaths:
    """Lets actors die, and brings them back. Also the `Replicas` of deploy/control/recovery.py."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._spec = simulation.spec
        self._rng = Random(0)
        self.num_deaths = 0

    def plan(self, rng: Random, deaths: float, begin_ns: int, end_ns: int) -> None:
        """deaths: of each actor that may die, on average."""
        self._rng = Random(rng.random())
        mortal = [p for p in self._simulation.processes if not p.is_local]
        for process in mortal:
            for _ in range(2):
                if rng.random() < deaths / 2:
                    at_ns = rng.randint(begin_ns, end_ns)
                    self._world.at(at_ns, lambda process=process: self._die(process))  # type: ignore[misc]

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _die(self, process: Process) -> None:
        actor = self._simulation.actors.get(process.name)
        if actor is None or actor.is_dead:
            return
        self.num_deaths += 1
        self._simulation.note(f"{actor.name} dies")
        actor.die()
        found_ns = self._world.now_ns + self._rng.randint(0, LOOKS_NS)
        self._world.at(found_ns, lambda: self._find(process, actor))

    def _find(self, process: Process, actor: Actor) -> None:
        """It is seen that an actor has died."""
        simulation = self._simulation
        del simulation.actors[process.name]
        (stage,) = process.stages
        inputs = [edge.id for edge in inputs_of(self._spec, stage)]
        for other in simulation.actors.values():
            for link, sender in other.senders:
                if sender.rule.id in inputs and link.target.actor is actor:
                    sender.bury()
        simulation.forget(actor, [other.name for other in simulation.actors.values()], inputs)
        for session in self._sessions_at(process):
            self._move_away(process, session)
        starts_ns = self._rng.randint(*STARTS_NS)
        self._world.at(self._world.now_ns + starts_ns, lambda: self._come_back(process))

    def _move_away(self, process: Process, session: Session) -> None:
        (stage,) = process.stages
        replicas_of = self._simulation.replicas
        others = [p.replica for p in self._simulation.processes if stage in p.stages and self._actor(stage, p.replica)]
        loads = {replica: sum(each.get(stage) == replica for each in replicas_of.values()) for replica in others}
        if loads:
            replicas_of[session.id][stage] = min(loads, key=lambda replica: loads[replica])
            at_once(reopen(self, self._spec, stage, [self._going(session)]))
            redirected = redirect(self, self._spec, stage, self._going(session))
            at_once(announce(self, self._spec, stage, self._going(session), process.name, redirected))

    def _come_back(self, process: Process) -> None:
        simulation, (stage,) = self._simulation, process.stages
        simulation.note(f"{process.name} is back")
        simulation.revive(process, f"{process.name}-{self.num_deaths}")
        actor = simulation.actors[process.name]
        for link, sender in actor.senders:
            if link.target.actor.is_dead:
                sender.bury()
        waiting = self._sessions_at(process)
        at_once(reopen(self, self._spec, stage, [self._going(session) for session in waiting]))
        redirected = [redirect(self, self._spec, stage, self._going(session)) for session in waiting]
        inputs = {edge.id: edge for edge in inputs_of(self._spec, stage)}
        for other in simulation.actors.values():
            for number, (link, sender) in enumerate(other.senders):
                if sender.rule.id in inputs and link.target.replica == process.replica and not other.is_dead:
                    new = simulation.link(other, inputs[sender.rule.id], process.replica)
                    other.senders[number] = (new, sender)
                    sender.meet(new)
        for session, replies in zip(waiting, redirected, strict=True):
            at_once(announce(self, self._spec, stage, self._going(session), process.name, replies))

    def _sessions_at(self, process: Process) -> list[Session]:
        """Those that are open and live there."""
        (stage,) = process.stages
        replicas = self._simulation.replicas
        return [each for each in self._simulation.open_sessions() if replicas[each.id].get(stage) == process.replica]

    def _going(self, session: Session) -> Going:
        return Going(session, self._simulation.replicas[session.id], self._simulation.incarnations[session.id])

    # ---- Replicas ----------------------------------------------------------------------------------------------------

    def resume(self, stage: str, replica: int, plan: SessionPlan) -> Reply[None]:
        runner = self._runner(stage, replica)
        assert runner is not None
        runner.open_session(replace(plan, session=own_of(plan.session)))
        if isinstance(runner.stage, Costly):
            runner.stage.begin_anywhere(plan.session.id)
        self._simulation.begin(stage, plan.session.id)
        self._wake(stage, replica)
        return answered(stage, None)

    def listener(self, stage: str, replica: int, session: SessionId) -> Reply[Listener | None]:
        runner = self._runner(stage, replica)
        return answered(stage, None if runner is None else runner.listener(session))

    def reroute(self, stage: str, replica: int, session: SessionId, edge: str, target: int) -> Reply[bool]:
        runner = self._runner(stage, replica)
        is_open = runner is None or runner.reroute(session, edge, target)
        self._wake(stage, replica)
        return answered(stage, is_open)

    def end_input(self, stage: str, replica: int, session: SessionId, edge: str) -> None:
        runner = self._runner(stage, replica)
        assert runner is not None
        runner.end_input(session, edge)
        self._wake(stage, replica)

    def tell(
        self, stage: str, replica: int, session: SessionId, kind: str, attrs: dict[str, Scalar], *, cuts: bool
    ) -> Reply[None]:
        runner = self._runner(stage, replica)
        if runner is not None:
            runner.tell(session, kind, attrs, cuts=cuts)
            self._wake(stage, replica)
        return answered(stage, None)

    def _runner(self, stage: str, replica: int) -> StageRunner | None:
        actor = self._actor(stage, replica)
        return None if actor is None else actor.runners[stage]

    def _actor(self, stage: str, replica: int) -> Actor | None:
        """None where it is dead."""
        actor = self._simulation.actors.get(self._simulation.process_of(stage, replica).name)
        return None if actor is None or actor.is_dead else actor

    def _wake(self, stage: str, replica: int) -> None:
        if (actor := self._actor(stage, replica)) is not None:
            actor.wake()
