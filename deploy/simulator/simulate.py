"""`pipeline simulate`: the pipeline's real decisions (join, credit, TAIL, gathering, routing, opening, restarting) in
virtual time, under faults, many seeds in a row.

Rule: all that decides is what ships: the coordinator and its procedures (deploy/control), the actors' commands, loops
and edges (deploy/actor, graph). What is virtual is what they stand on: time, hosts, networks, what stages compute.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from deploy.actor.afterword import UNSAID
from deploy.actor.plan import ActorPlan, Call
from deploy.actor.runner import StageRunner
from deploy.actor.session_plan import SessionPlan
from deploy.control.coordinator import Coordinator
from deploy.control.placement import Process, processes_of
from deploy.control.restarts import NoSessionLeft
from deploy.simulator.actors import VirtualActor
from deploy.simulator.cluster import VirtualCluster
from deploy.simulator.comings import Comings
from deploy.simulator.costly import Costly, OutOfOrder
from deploy.simulator.faults import HANGS_NS, Faults
from deploy.simulator.figures import Figures, VirtualMeter
from deploy.simulator.invariants import Invariants, Violation
from deploy.simulator.links import Wires
from deploy.simulator.operator import Operator
from deploy.simulator.report import Report
from deploy.simulator.scenarios import Scenario, by_stage
from deploy.simulator.sources import VirtualCamera, VirtualMicrophone, silent
from deploy.simulator.speech import VirtualLlm
from deploy.simulator.stages import FREE, TWINS, StandIn, VirtualEvents
from deploy.simulator.world import Device, HostClock, Network, World, WorldOver
from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, Scalar, SessionId
from graph.gather import Gathering
from graph.kinds import WINDOW_EVENT
from graph.ledger import REASONS, Account
from graph.sections import ReplicasSpec
from graph.spec import PipelineSpec
from stages.camera import Camera
from stages.catalog import stage_class
from stages.events import Events
from stages.llm import Llm
from stages.microphone import Microphone
from stages.session import View
from stages.speaker import Speaker
from stages.stage import Source, SourceId, Stage

UPTIME_NS: Final = 1000 * 86_400 * NS_PER_S  # of a host, at most: its monotonic clock counts from its start
DAY_NS: Final = 1_700_000_000 * NS_PER_S  # what a host's wall clock says when all begins
PATIENCE_NS: Final = 30 * NS_PER_S  # after the sources' end, until whoever has not come to its end is said to starve
CHECK_NS: Final = 500 * NS_PER_MS
NUM_CORES: Final = 32  # of the machine where the cameras are
LATER: Final = View("later", "virtual")  # a view that comes and goes
NOWHERE: Final = Path("virtual")


class Simulation:
    """One seed of a scenario."""

    def __init__(self, spec: PipelineSpec, scenario: Scenario, seed: int, *, traced: bool = False) -> None:
        """traced: keep what happens, a line per event, in `trace`."""
        self.spec, self._scenario, self.seed = described(spec, scenario), scenario, seed
        self._rng = Random(f"{scenario.name} {seed}")
        self.world = World()
        self.figures = Figures()
        self._devices = {name: Device(self.world, number) for name, number in scenario.devices.items()}
        self._events = VirtualEvents()
        self._comings = Comings(self.spec, scenario, self._rng)
        num_sessions, edges = len(self._comings.sessions), [edge.id for edge in self.spec.edges]
        longest = HANGS_NS[1] // spec.window.length_ns if scenario.hangs else 0
        self._invariants = Invariants(self.world, seed, edges, num_sessions, longest, traced=traced)
        self.actors: dict[str, VirtualActor] = {}  # by name; of each the last one, dead or alive
        self._hosts: dict[str, HostClock] = {}
        self._llms: list[VirtualLlm] = []
        self._wires = Wires(self.world, self._invariants, self._named_rng, self._network_of, scenario.grants)
        here = self._host("coordinator")
        self._cluster = VirtualCluster(self.world, scenario.calls, self._named_rng("calls"), self._make_actor)
        coordinator = Coordinator(
            self.spec, NOWHERE, NOWHERE, self._cluster, self._invariants.note, here.monotonic_s, NUM_CORES
        )
        self._operator = Operator(self.world, coordinator, here, scenario.poll_ns)
        with contextlib.suppress(WorldOver):  # `run` tells why
            self._comings.start(self.world, self._operator)
        self._begin_ns = min(self._comings.origins_ns.values(), default=self.world.now_ns)
        self.end_ns = self._begin_ns + self._comings.last_ns
        span_ns = (self._begin_ns, self.end_ns)
        slowed = replace(scenario, slow=by_stage(self.spec, scenario.slow))
        self._faults = Faults(self.world, slowed, self._named_rng("faults"), span_ns, self.actors)
        self._plan_faults()

    @property
    def violations(self) -> list[Violation]:
        return self._invariants.violations

    @property
    def trace(self) -> list[str]:
        return self._invariants.trace

    # ---- building ----------------------------------------------------------------------------------------------------

    def _named_rng(self, name: str) -> Random:
        """Each link, host and fault draws from its own, so that what one does is not changed by what another draws."""
        return Random(f"{self._scenario.name} {self.seed} {name}")

    def _new_rng(self) -> Random:
        """For a stage."""
        return Random(self._rng.random())

    def _host(self, name: str) -> HostClock:
        if name not in self._hosts:
            rng, most = self._named_rng(f"host {name}"), self._scenario.drift_ppm
            begun_ns, drift_ppm = rng.randint(0, UPTIME_NS), rng.randint(-most, most)
            self._hosts[name] = HostClock(self.world, drift_ppm=drift_ppm, begun_ns=begun_ns, day_ns=DAY_NS)
        return self._hosts[name]

    def _network_of(self, edge: str) -> Network:
        is_control = next(each.kind.is_control for each in self.spec.edges if each.id == edge)
        return self._scenario.acks if is_control else self._scenario.network

    def _make_actor(self, process: Process, plan: ActorPlan, load_ns: int) -> VirtualActor:
        host = self._host(process.name)
        self.actors[process.name] = VirtualActor(plan, host, self._wires, self._build, self, load_ns)
        return self.actors[process.name]

    def _build(self, actor: VirtualActor) -> list[StageRunner]:
        """As deploy/actor/actor.py does."""
        receivers, senders = actor.ends.receivers, actor.ends.senders
        return [
            StageRunner(
                name,
                self.make_stage(name),
                {e.id: receivers[e.id] for e in actor.plan.edges if e.target == name},
                {e.id: senders[e.id] for e in actor.plan.edges if e.source == name},
                VirtualMeter(name, self.figures, self._invariants.violated, self._comings.num_ended),
                self._gathering(name),
                actor.host,
                actor.note,
            )
            for name in actor.plan.stages
        ]

    def _gathering(self, name: str) -> Gathering:
        options = self.spec.stages[name]
        return Gathering(options.batch, options.wait_ns, options.hold_ns)

    def make_stage(self, name: str) -> Stage:
        """One replica's. Overridden by who tries real ones (tests/benchmarks/stages.py)."""
        scenario = self._scenario
        rng = self._new_rng()
        cls = stage_class(self.spec.types[name].use)
        if cls is Camera:
            return VirtualCamera(rng, self._dead_cameras())
        if cls is Microphone:
            return VirtualMicrophone()
        if cls is Speaker:
            return Speaker()
        if cls is Events:
            return self._events
        if issubclass(cls, Source):
            return silent(cls)
        device = next(iter(self._devices.values()))
        stage = self._costly(name, cls, device, rng)
        stage.spoils = scenario.spoils
        return stage

    def _costly(self, name: str, cls: type[Stage], device: Device, rng: Random) -> Costly:
        scenario = self._scenario
        cost = scenario.costs.get(name) or cls.cost or FREE
        cost = replace(cost, each_ns=scenario.each_times * cost.each_ns)
        if cls is Llm:
            self._llms.append(VirtualLlm(cost, scenario.token_ns, scenario.picture_ns, scenario.talks, device, rng))
            return self._llms[-1]
        if cls in TWINS:
            return TWINS[cls](cost, device, rng)
        return StandIn(self.spec.types[name], cost, device, rng)

    def _dead_cameras(self) -> dict[SourceId, tuple[int, int]]:
        dead: dict[SourceId, tuple[int, int]] = {}
        for session in self._comings.sessions:
            for view in session.media.views:
                if self._rng.random() < self._scenario.dies:
                    begin_ns = self._rng.randint(0, session.duration_ns or 0)
                    until_ns = begin_ns + self._rng.randint(NS_PER_S, 4 * NS_PER_S)
                    dead[SourceId(session.id, view.name)] = (begin_ns, until_ns)
        return dead

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        operator = self._operator
        self._faults.plan(processes_of(self.spec))
        self._faults.plan_steps(list(self._hosts.values()))
        rng = self._named_rng("returns")
        for number in range(len(self._comings.sessions)):
            if rng.random() < self._scenario.returns:
                at_ns = rng.randint(self._begin_ns, self.end_ns)
                self.world.at(at_ns, lambda number=number: self._close(number))  # type: ignore[misc]

        rng = self._named_rng("views")
        for session in [each.id for each in self._comings.sessions]:
            if rng.random() < self._scenario.view_comes:
                times_ns = sorted(rng.randint(self._begin_ns, self.end_ns) for _ in range(3))
                for at_ns, action in zip(
                    times_ns, (operator.add_view, operator.remove_view, operator.add_view), strict=True
                ):
                    self.world.at(at_ns, partial(action, session, LATER))

        rng = self._named_rng("interrupt")
        if rng.random() < self._scenario.interrupted:
            at_ns = rng.randint(self._begin_ns, self.end_ns)
            self.world.at(at_ns, lambda: self._operator.interrupt(self.spec))

    def _close(self, number: int) -> None:
        self._comings.close_and_come_again(self.world, self._operator, number)

    def called(self, actor: VirtualActor, call: Call) -> None:
        """An actor has done a call."""
        self._invariants.called(actor, call)
        self._comings.called(call, actor.host.ahead_ns())
        if call.method == "resume_session":
            plans: Mapping[str, SessionPlan] = call.arguments[0]  # type: ignore[assignment]
            for name, plan in plans.items():
                resumed = actor.runners[name].stage
                if isinstance(resumed, Costly):
                    resumed.begin_anywhere(plan.session.id)

    def died(self, actor: VirtualActor) -> None:
        self._invariants.died(actor)
        self._cluster.died()

    def run(self) -> None:
        """To the end, or to the first violation."""
        self.world.at(self.world.now_ns, self._check_and_again)
        patience_ns = PATIENCE_NS + (HANGS_NS[1] + PATIENCE_NS if self._scenario.hangs else 0)
        with contextlib.suppress(WorldOver):
            self.world.run(self.end_ns + self.spec.window.length_ns + patience_ns)
        if (error := self.world.error) is not None:
            rule = "order" if isinstance(error, OutOfOrder) else "no crash"
            self._invariants.violated(rule, str(error) if rule == "order" else f"{type(error).__name__}: {error}")
        if not self.violations:
            self._check_end()
        self._count()

    def windows(self) -> Iterable[tuple[float, Mapping[str, Scalar]]]:
        """What was told of each window at its end, and when in the scenario that was (s)."""
        for chunk in self._events.chunks:
            if chunk.attrs["type"] == WINDOW_EVENT:
                begin_ns = self._comings.origins_ns[chunk.session] - self._begin_ns
                yield begin_ns / NS_PER_S + float(chunk.attrs["end_s"] or 0), chunk.attrs

    def accounts(self) -> dict[str, Account]:
        """Of every edge, the ends of dead actors included."""
        return self._invariants.accounts(self._living())

    def _living(self) -> list[VirtualActor]:
        return [actor for actor in self.actors.values() if not actor.is_dead]

    def _open_sessions(self) -> Iterator[tuple[str, SessionId]]:
        for actor in self._living():
            for name, runner in actor.runners.items():
                for session in runner.snapshot().sessions:
                    yield name, session

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def _check_and_again(self) -> None:
        self._invariants.check(self._living())
        self.world.is_over = self.world.is_over or bool(self.violations)
        self.world.after(CHECK_NS, self._check_and_again)

    def _check_end(self) -> None:
        invariants, operator = self._invariants, self._operator
        invariants.check(self._living())
        if operator.failure is not None and not isinstance(operator.failure, NoSessionLeft):
            invariants.violated("the run goes on", str(operator.failure))
        for name, session in self._open_sessions():
            invariants.violated("no starvation", f"{session} has not come to its end at {name}")
        if operator.ledger is None:
            invariants.violated("no starvation", "the coordinator has not come to its end")
        for actor in self._living():
            actor.bury_all()
        invariants.check_exact(self.accounts())
        invariants.check_exact(operator.ledger or {})
        self._check_said()
        may_lack = self._faults.num_deaths and not self.spec.has_speech  # who counts them has died
        for session, num_ended, num_due in () if may_lack else self._comings.lacking():
            invariants.violated("every window ends", f"{num_ended} of {num_due} windows of {session} have come to it")

    def _check_said(self) -> None:
        excused = {chunk.session for chunk in self._events.chunks if self._says_what_is_lost(chunk)}
        if self._faults.num_hung:  # the trace that names it may have been lost with the one that hung; it is counted
            excused |= self.figures.unsaid
        for actor in self._living():
            for name, runner in actor.runners.items():
                for session in runner.stage.unsaid if isinstance(runner.stage, Costly) else ():
                    if session not in excused | self._comings.cut:
                        what = f"{session} was closed at {name} with something left to say"
                        self._invariants.violated("all is said", what)

    def _says_what_is_lost(self, event: Chunk) -> bool:
        """That what was to be said was cut off, or that nobody heard it, or that a unit of it was spoilt."""
        kind, reason = event.attrs.get("type"), event.attrs.get("reason")
        return kind == "cut_off" or (kind == "unit_failed" and (reason == UNSAID or self._scenario.spoils > 0))

    def _count(self) -> None:
        self.figures.num_deaths = self._faults.num_deaths
        for account in self.accounts().values():
            self.figures.drops.update({reason: account.dropped.get(reason, 0) for reason in REASONS})
        self.figures.wasted_tokens += [wasted for llm in self._llms for wasted in llm.wasted]
        for chunk in self._events.chunks:
            kind = chunk.attrs.get("type")
            self.figures.num_underruns += kind == "underrun"
            self.figures.num_pieces += kind == "heard"
            self.figures.stalled_s += float(chunk.attrs["seconds"] or 0) if kind == "underrun" else 0.0
            self.figures.spoken_s += float(chunk.attrs["seconds"] or 0) if kind == "heard" else 0.0
            self.figures.levels.update([int(chunk.attrs["level"] or 0)] if kind == WINDOW_EVENT else [])


def described(spec: PipelineSpec, scenario: Scenario) -> PipelineSpec:
    """The pipeline as a scenario has it: its replicas, batches, credit and phases."""
    replicas = by_stage(spec, scenario.replicas)
    stages = {
        name: stage.model_copy(
            update={
                **({"scale": ReplicasSpec(min=replicas[name])} if name in replicas else {}),
                **({"batch": scenario.batch} if scenario.batch else {}),
            }
        )
        for name, stage in spec.stages.items()
    }
    edges = tuple(replace(edge, credit=scenario.credit or edge.credit) for edge in spec.edges)
    window = spec.window.model_copy(update={"phases": scenario.phases} if scenario.phases else {})
    return replace(spec, stages=stages, edges=edges, window=window)


def run_scenario(spec: PipelineSpec, scenario: Scenario, seeds: range) -> Report:
    """Run the seeds of a scenario, one after the other."""
    figures, violations = Figures(), list[Violation]()
    begin_s, simulated_s = time.process_time(), 0.0
    for seed in seeds:
        simulation = Simulation(spec, scenario, seed)
        simulation.run()
        figures.add(simulation.figures)
        violations += simulation.violations
        simulated_s += simulation.world.now_ns / NS_PER_S
    cpu_s = time.process_time() - begin_s
    return Report(scenario.name, (seeds[0], seeds[-1] + 1), tuple(violations), simulated_s, cpu_s, figures)
