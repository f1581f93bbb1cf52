"""`pipeline simulate`: the pipeline's real decisions (join, credit, TAIL, gathering, routing) in virtual time, under
faults, many seeds in a row; and what must hold whatever happens.

What must hold: units come as 0, 1, 2 …, each once; nothing is sent without credit; no more speech waits unheard than
lead + window (seen at each unit, chunk and ack); the ledger of every edge is exact and queues stay bounded (seen every
half second and at the end); and every window comes to its end. Also when actors die (simulator/virtual_deaths.py).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any, Final, TypeAlias

import numpy as np

from deploy.actor.accounts import Accounts, EdgeEnds
from deploy.actor.runner import MAX_READY, StageRunner
from deploy.control.placement import Process, processes_of
from deploy.control.routing import least_loaded, phase_ns, session_plan, stages_of
from deploy.simulator.scenarios import SCENARIOS, Arrivals, Scenario, SimulateError
from deploy.simulator.virtual import Actor, Device, HostClock, ReceiveEnd, SendEnd, World
from deploy.simulator.virtual_deaths import Deaths
from deploy.simulator.virtual_returns import Returns
from deploy.simulator.virtual_stages import (
    Costly,
    OutOfOrder,
    Spoilt,
    StandIn,
    VirtualAudio,
    VirtualCamera,
    VirtualEvents,
    VirtualLlm,
    VirtualMicrophone,
    VirtualTts,
    VirtualVision,
    VirtualVocoder,
    own_of,
)
from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, Scalar, SessionId
from graph.costs import StageCost
from graph.credit import Limit
from graph.edge import CONTROL_PER_CHUNK, Arrival, EdgeRule, Receiver, Sender, SilentObserver
from graph.edges import EdgeSpec
from graph.gather import Gathering
from graph.kinds import Kind
from graph.ledger import REASONS, Account, Reason, merge
from graph.sections import ReplicasSpec, StageOptions
from graph.spec import PipelineSpec
from graph.tail import Ack
from stages.audio_encoder import AudioEncoder
from stages.camera import Camera
from stages.catalog import stage_class
from stages.events import WINDOW_EVENT, Events
from stages.llm import Llm
from stages.microphone import Microphone
from stages.speaker import Speaker
from stages.stage import ListenerAction, Session, Stage
from stages.tts import Tts
from stages.vision_encoder import VisionEncoder
from stages.vocoder import Vocoder

ORIGIN_NS: Final = NS_PER_S  # of the sessions, in the world's time
UPTIME_NS: Final = 1000 * 86_400 * NS_PER_S  # of a host, at most: its monotonic clock counts from its start
PATIENCE_NS: Final = 30 * NS_PER_S  # after the sources' end, until whoever has not come to its end is said to starve
MAX_VIOLATIONS: Final = 20
FEW: Final = 8
CHECK_NS: Final = 500 * NS_PER_MS


TWINS: Final[Mapping[type[Stage], type[Costly]]] = {
    VisionEncoder: VirtualVision,
    AudioEncoder: VirtualAudio,
    Tts: VirtualTts,
    Vocoder: VirtualVocoder,
}
FREE: Final = StageCost(0, 0)
_Way: TypeAlias = tuple[str, bytes, SessionId, int]
"""Of chunks: their edge, who sent them, their session and its incarnation."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What did not hold. time_s: of the world."""

    seed: int
    time_s: float
    rule: str
    what: str


@dataclass(slots=True)
class Figures:
    """What was seen, of one seed or of many."""

    num_windows: int = 0
    num_late: int = 0
    latencies_s: list[float] = field(default_factory=list)
    late_stages: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    levels: Counter[int] = field(default_factory=Counter)  # windows, by the level of the shedding ladder
    num_deaths: int = 0  # of actors
    num_underruns: int = 0
    num_pieces: int = 0
    unheard_max_ns: int = 0
    wasted_tokens: list[float] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.num_windows += other.num_windows
        self.num_late += other.num_late
        self.latencies_s += other.latencies_s
        self.late_stages += other.late_stages
        self.missing += other.missing
        self.drops += other.drops
        self.levels += other.levels
        self.num_deaths += other.num_deaths
        self.num_underruns += other.num_underruns
        self.num_pieces += other.num_pieces
        self.unheard_max_ns = max(self.unheard_max_ns, other.unheard_max_ns)
        self.wasted_tokens += other.wasted_tokens

    def as_dict(self) -> dict[str, object]:
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) if self.latencies_s else (0.0, 0.0)
        return {
            "windows": self.num_windows,
            "on_time": 1 - self.num_late / max(self.num_windows, 1),
            "latency_p50_s": round(float(p50), 4),
            "latency_p99_s": round(float(p99), 4),
            "late_stages": dict(self.late_stages),
            "missing": dict(self.missing),
            "drops": dict(self.drops),
            "deaths": self.num_deaths,
            "levels": {str(level): number for level, number in sorted(self.levels.items())},
            "unheard_max_s": self.unheard_max_ns / NS_PER_S,
            "underruns": self.num_underruns / max(self.num_pieces, 1),
            "wasted_tokens_per_barge_in": round(float(np.mean(self.wasted_tokens)), 2) if self.wasted_tokens else None,
        }


class VirtualMeter:
    """What deploy/actor/measure.py's StageMeter is told, kept for one seed."""

    def __init__(self, figures: Figures, violated: Callable[[str, str], None], ended: Counter[SessionId]) -> None:
        """ended: windows of each session that have come to their end."""
        self._figures, self._violated, self._ended = figures, violated, ended

    def opened(self, session: Session, ended: Collection[str] | None) -> None: ...
    def closed(self, session: Session) -> None: ...
    def processed(self, num_units: int, queue_s: float, compute_s: float) -> None: ...
    def passed(self, num_units: int) -> None: ...
    def carried(self, num_chunks: int) -> None: ...
    def made(self, session: Session, chunk: Chunk, kind: Kind[Any]) -> None: ...
    def unit_done(self, session: Session, end_ns: int) -> None: ...
    def moved(self, session: Session, level: int) -> None: ...

    def failed(self, session: Session, error: Exception) -> None:
        """Nothing of ours may raise, but for what a scenario spoils."""
        if not isinstance(error, Spoilt):
            raise error

    def played(self, session: Session, ack: Ack) -> None:
        unheard_ns = ack.received_ns - ack.heard_ns
        self._figures.unheard_max_ns = max(self._figures.unheard_max_ns, unheard_ns)
        if unheard_ns > session.lead_ns + session.window_ns:
            self._violated("TAIL", f"{session.id}: {unheard_ns / NS_PER_S:.3f} s of speech wait unheard")

    def window(self, session: Session, latency_s: float, late_stage: str, missing: tuple[str, ...]) -> None:
        self._figures.num_windows += 1
        self._ended[session.id] += 1
        self._figures.latencies_s.append(latency_s)
        self._figures.num_late += bool(late_stage)
        self._figures.late_stages.update([late_stage] if late_stage else [])
        self._figures.missing.update(missing)


class Simulation:
    """One seed of a scenario."""

    def __init__(self, spec: PipelineSpec, scenario: Scenario, seed: int, *, traced: bool = False) -> None:
        """traced: keep what happens, a line per event, in `trace`."""
        self.spec, self._scenario, self.seed = _with_replicas(spec, scenario.replicas), scenario, seed
        self._traced = traced
        self.trace: list[str] = []
        self._rng = Random(f"{scenario.name} {seed}")
        self.world = World()
        self.figures = Figures()
        self.violations: list[Violation] = []
        self._devices = {name: Device(self.world, number) for name, number in scenario.devices.items()}
        self._events = VirtualEvents()
        window_ns = spec.window.length_ns
        together = Arrivals(scenario.num_sessions, scenario.num_windows * window_ns)
        coming = [(begin_ns, a.until_ns) for a in scenario.arrivals or (together,) for begin_ns in a.begins_ns()]
        num_windows = [(until_ns - begin_ns) // window_ns for begin_ns, until_ns in coming]
        self._sessions = [self._session(number, windows) for number, windows in enumerate(num_windows)]
        self._begin_ns = [ORIGIN_NS + begin_ns + n * scenario.stagger_ns for n, (begin_ns, _) in enumerate(coming)]
        self._num_due = sum(num_windows)
        self._num_ended: Counter[SessionId] = Counter()
        self.end_ns = ORIGIN_NS + max(until_ns for _, until_ns in coming)
        self.actors: dict[str, Actor] = {}  # that live
        self._clocks: dict[str, HostClock] = {}
        self._speaker = Speaker()
        self._llms: list[VirtualLlm] = []
        self._ends: dict[tuple[str, int], ReceiveEnd] = {}  # by edge and replica
        self._accounts = Accounts()
        self.processes = processes_of(self.spec)
        self._place(self.processes, [process.name for process in self.processes])
        self._under_way: dict[_Way, list[Chunk]] = {}
        self.replicas: dict[SessionId, dict[str, int]] = {}
        self.incarnations: dict[SessionId, int] = {}
        self._num_incarnations = 0
        self._origins_ns: dict[SessionId, int] = {}
        self._num_coming = 0  # sessions that are not open yet
        self.deaths = Deaths(self)
        self.returns = Returns(self)
        self._open()
        self._plan_faults()

    # ---- building ----------------------------------------------------------------------------------------------------

    def _session(self, number: int, num_windows: int) -> Session:
        rng, scenario = self._rng, self._scenario
        name = f"camera{number}"
        window_ns = self.spec.window.length_ns
        last_ns = max((num_windows - 3) * window_ns, NS_PER_S)
        actions: list[ListenerAction] = []
        if rng.random() < scenario.barges_in:
            actions.append(ListenerAction(rng.randint(NS_PER_S, last_ns), "barge_in"))
        if rng.random() < scenario.pauses:
            begin_ns = rng.randint(NS_PER_S, last_ns)
            actions.append(ListenerAction(begin_ns, "pause"))
            actions.append(ListenerAction(begin_ns + rng.randint(1, 3 * NS_PER_S), "resume"))
        return Session(
            SessionId(name),
            name,
            "virtual",
            window_ns=window_ns,
            lateness_ns=self.spec.window.lateness_ns,
            lead_ns=self.spec.tail.lead_ns,
            delay_ns=self.spec.tail.delay_ns,
            duration_ns=num_windows * window_ns,
            pictures="camera" in self.spec.stages,
            microphone="microphone" in self.spec.stages,
            speech="speaker" in self.spec.stages,
            listener=tuple(actions),
            ladder=self.spec.shedding.steps(),
        )

    def _place(self, processes: Sequence[Process], peers: Sequence[str]) -> None:
        """Make their actors, wire them, and let them run. peers: their names on the bus."""
        for process, peer in zip(processes, peers, strict=True):
            self.actors[process.name] = Actor(self.world, peer)
            self._clocks[process.name] = self._clock()
        for edge in self.spec.edges:
            for process in processes:
                if edge.target.stage in process.stages:
                    self._bind(edge, process)
        for process in processes:
            actor = self.actors[process.name]
            for name, stage_spec in process.stages.items():
                actor.runners[name] = self._runner(actor, process, name, stage_spec)
            actor.start()

    def _bind(self, edge: EdgeSpec, process: Process) -> None:
        actor = self.actors[process.name]
        link = ReceiveEnd(self.world, actor, process.replica, self._scenario.grants, self._new_rng())
        actor.receivers.append((link, WatchedReceiver(self._rule(edge), link, self._settled)))
        self._ends[(edge.id, process.replica)] = link

    def revive(self, process: Process, peer: str) -> None:
        """Another actor takes the place of one that has died."""
        self._place([process], [peer])

    def link(self, actor: Actor, edge: EdgeSpec, replica: int) -> SendEnd:
        """The way from an actor to a replica at the other end of an edge."""
        network = self._scenario.acks if edge.kind.is_control else self._scenario.network
        target = self._ends[(edge.id, replica)]
        return SendEnd(self.world, actor, target, network, self._new_rng(), self._sent_on(self._rule(edge)))

    def _rule(self, edge: EdgeSpec) -> EdgeRule:
        return EdgeRule(edge.id, self._scenario.credit or edge.credit, edge.when_full)

    def _new_rng(self) -> Random:
        """Each link and stage draws from its own, so that what one does is not changed by what another draws."""
        return Random(self._rng.random())

    def _clock(self) -> HostClock:
        drift_ppm = self._rng.randint(-self._scenario.drift_ppm, self._scenario.drift_ppm)
        return HostClock(self.world, drift_ppm=drift_ppm, begun_ns=self._rng.randint(0, UPTIME_NS))

    def _runner(self, actor: Actor, process: Process, name: str, spec: StageOptions) -> StageRunner:
        incoming = {
            receiver.rule.id: receiver
            for _, receiver in actor.receivers
            if receiver.rule.id.partition("->")[2].partition(".")[0] == name
        }
        outgoing: dict[str, list[Sender]] = {}
        for edge in self.spec.edges:
            if edge.source.stage == name:
                for replica in range(sum(edge.target.stage in other.stages for other in self.processes)):
                    link = self.link(actor, edge, replica)
                    sender = Sender(self._rule(edge), link, SilentObserver(), self._clocks[process.name].monotonic_ns)
                    actor.senders.append((link, sender))
                    outgoing.setdefault(edge.id, []).append(sender)
        return StageRunner(
            name,
            self.make_stage(name),
            incoming,
            outgoing,
            VirtualMeter(self.figures, self._violated, self._num_ended),
            Gathering(self._scenario.batch or spec.batch, spec.wait_ns),
            self._clocks[process.name],
        )

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
            return self._speaker
        if cls is Events:
            return self._events
        device = self._devices[scenario.on.get(name, next(iter(self._devices)))]
        stage = self._costly(name, cls, device, rng)
        stage.spoils = scenario.spoils
        return stage

    def _costly(self, name: str, cls: type[Stage], device: Device, rng: Random) -> Costly:
        scenario = self._scenario
        cost = scenario.costs.get(name) or cls.cost or FREE
        if cls is Llm:
            self._llms.append(VirtualLlm(cost, scenario.token_ns, scenario.picture_ns, device, rng))
            return self._llms[-1]
        if cls in TWINS:
            return TWINS[cls](cost, device, rng)
        return StandIn(self.spec.types[name], cost, device, rng)

    def _dead_cameras(self) -> dict[SessionId, tuple[int, int]]:
        dead: dict[SessionId, tuple[int, int]] = {}
        for session in self._sessions:
            if self._rng.random() < self._scenario.dies:
                begin_ns = self._rng.randint(0, session.duration_ns or 0)
                dead[session.id] = (begin_ns, begin_ns + self._rng.randint(NS_PER_S, 4 * NS_PER_S))
        return dead

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        counts = {name: [0] * max(stage.replicas, 1) for name, stage in self.spec.stages.items()}
        for session in self._sessions:
            passed = stages_of(session, self.spec)
            replicas = {name: least_loaded(counts[name]) for name in self.spec.stages if name in passed}
            for name, replica in replicas.items():
                counts[name][replica] += 1
            self.replicas[session.id] = replicas
        together: dict[int, list[int]] = {}
        for number, begin_ns in enumerate(self._begin_ns):
            together.setdefault(0 if self._scenario.stagger_ns else begin_ns - ORIGIN_NS, []).append(number)
        for at_ns, numbers in together.items():
            if at_ns == 0:
                self._enter(numbers)
            else:
                self._num_coming += len(numbers)
                self.world.at(at_ns, lambda numbers=numbers: self._come(numbers))  # type: ignore[misc]

    def _come(self, numbers: Sequence[int]) -> None:
        self._num_coming -= len(numbers)
        self._enter(numbers)

    def _enter(self, numbers: Sequence[int]) -> None:
        """Open these sessions, whose time begins soon."""
        wiring = self.spec.wiring
        sessions = [self._sessions[number] for number in numbers]
        for session in sessions:
            self._num_incarnations += 1
            self.incarnations[session.id] = self._num_incarnations
        for stage in wiring.downstream_first:
            for session in sessions:
                if stage in stages_of(session, self.spec):
                    where = (self.replicas[session.id], self.incarnations[session.id])
                    self._runner_of(stage, session.id).open_session(
                        session_plan(self.spec, stage, own_of(session), *where)
                    )
        takers = [stage for stage in wiring.downstream_first if stage not in wiring.sources]
        for stage in (*takers, *wiring.sources):
            for number, session in zip(numbers, sessions, strict=True):
                self._origins_ns[session.id] = self._begin_ns[number] + phase_ns(number, self.spec.window)
                self.begin(stage, session.id)

    def come_again(self, number: int, session: Session) -> None:
        """Another session of a name whose last one was closed by force."""
        self._num_due += self._num_ended.pop(session.id, 0)  # of the one before it, no more windows are due than came
        self._sessions[number], self._begin_ns[number] = session, self.world.now_ns
        self._enter([number])

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def session(self, number: int) -> Session:
        """The one of this number that there is now."""
        return self._sessions[number]

    def runner_of(self, stage: str, session: SessionId) -> StageRunner | None:
        """Where a session lives; None where that is dead."""
        actor = self.actors.get(self.process_of(stage, self.replicas[session][stage]).name)
        return None if actor is None or actor.is_dead else actor.runners[stage]

    def begin(self, stage: str, session: SessionId) -> None:
        """Let a session's clock run at a stage, by the clock of its host."""
        name = self.process_of(stage, self.replicas[session][stage]).name
        origin_ns = self._origins_ns[session] + self._clocks[name].ahead_ns()
        self.actors[name].runners[stage].begin_session(session, origin_ns)

    def _plan_faults(self) -> None:
        rng, scenario = self._rng, self._scenario
        for actor in self.actors.values():
            if rng.random() < scenario.stalls:
                begin_ns = rng.randint(ORIGIN_NS, self.end_ns)
                end_ns = begin_ns + rng.randint(NS_PER_MS, scenario.longest_stall_ns)
                self.world.at(begin_ns, lambda actor=actor, end_ns=end_ns: actor.stall(end_ns))  # type: ignore[misc]
        for name, factor in scenario.slow.items():
            begin_ns = rng.randint(ORIGIN_NS, self.end_ns)
            self.world.at(begin_ns, lambda name=name, factor=factor: self._slow_down(name, factor))  # type: ignore[misc]
            end_ns = begin_ns + scenario.longest_stall_ns
            self.world.at(end_ns, lambda name=name: self._slow_down(name, 1.0))  # type: ignore[misc]
        if scenario.deaths:
            self.deaths.plan(rng, scenario.deaths, ORIGIN_NS, self.end_ns)
        if scenario.returns:
            self.returns.plan(rng, scenario.returns, ORIGIN_NS, self.end_ns)

    def _slow_down(self, name: str, factor: float) -> None:
        for actor in self.actors.values():
            if name in actor.runners:
                actor.runners[name].stage.slow_down = factor  # type: ignore[attr-defined]

    def run(self) -> None:
        """To the end, or to the first violation."""
        self.world.at(ORIGIN_NS, self._check_and_again)
        last_ns = self.end_ns + self.spec.window.length_ns + PATIENCE_NS
        last_ns += len(self._sessions) * self._scenario.stagger_ns
        try:
            self.world.run(last_ns)
        except OutOfOrder as error:
            self._violated("order", str(error))
        except Exception as error:  # whatever it is, it is told with its seed
            self._violated("no crash", f"{type(error).__name__}: {error}")
        if not self.violations:
            self._check()
            self._check_end()
        self._count()

    def windows(self) -> Iterable[tuple[float, Mapping[str, Scalar]]]:
        """What was told of each window at its end, and when in the scenario that was (s)."""
        begin_ns = {
            session.id: begin - ORIGIN_NS for session, begin in zip(self._sessions, self._begin_ns, strict=True)
        }
        for chunk in self._events.chunks:
            if chunk.attrs["type"] == WINDOW_EVENT:
                yield begin_ns[chunk.session] / NS_PER_S + float(chunk.attrs["end_s"] or 0), chunk.attrs

    def open_sessions(self) -> list[Session]:
        """Those that are open somewhere."""
        names = {name for _, name in self._open_sessions()} - self.returns.away
        return [session for session in self._sessions if session.id in names]

    def _open_sessions(self) -> Iterable[tuple[str, SessionId]]:
        for name, runner in self._runners():
            for session in runner.snapshot().sessions:
                yield name, session

    def _runners(self) -> Iterable[tuple[str, StageRunner]]:
        for actor in self.actors.values():
            yield from actor.runners.items()

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def _violated(self, rule: str, what: str) -> None:
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(self.seed, self.world.now_ns / NS_PER_S, rule, what))

    def _check_and_again(self) -> None:
        self._check()
        goes_on = self._num_coming or self.returns.away or any(self._open_sessions())
        self.world.is_over = bool(self.violations) or not goes_on
        self.world.at(self.world.now_ns + CHECK_NS, self._check_and_again)

    def _check(self) -> None:
        for actor in self.actors.values():
            for _, sender in actor.senders:
                self._bound(f"{sender.rule.id}: chunks that wait for credit", sender.num_waiting, sender.rule.limit)
            for link, receiver in actor.receivers:
                self._bound(f"{receiver.rule.id}: messages that were not taken", link.num_waiting, receiver.rule.limit)
            for name, runner in actor.runners.items():
                self._bound(f"{name}: units that wait", runner.num_ready, Limit(MAX_READY))
        for edge, account in self.accounts().items():
            if account.in_flight < 0:
                self._violated("ledger", f"{edge}: more has come out than went in: {account}")

    def _bound(self, what: str, number: int, limit: Limit) -> None:
        """Per session: what credit allows, and the control and the windows without anything beside it."""
        most = len(self._sessions) * (limit.chunks * (1 + CONTROL_PER_CHUNK) + FEW)
        if number > most:
            self._violated("bounded queues", f"{what}: {number}, {most} is the most")

    def _sent_on(self, rule: EdgeRule) -> Callable[[bytes, Chunk], None]:
        def sent(peer: bytes, chunk: Chunk) -> None:
            if self._traced:
                self.note(f"{rule.id}: {chunk.session} sends {_told(chunk)}")
            if not chunk.is_control:
                key = (rule.id, peer, chunk.session, chunk.incarnation)
                self._under_way.setdefault(key, []).append(chunk)
                self._check_credit(rule, self._under_way[key])

        return sent

    def _check_credit(self, rule: EdgeRule, under_way: Sequence[Chunk]) -> None:
        """What was sent and has not been settled, as neither end counts it."""
        spent_ns, limit_ns = sum(chunk.duration_ns for chunk in under_way), rule.limit.duration_ns
        is_too_long = limit_ns is not None and spent_ns > limit_ns and len(under_way) > 1
        if len(under_way) > rule.limit.chunks or is_too_long:
            told = f"{len(under_way)} chunks, {spent_ns / NS_PER_S:.3f} s"
            self._violated("credit", f"{rule.id}, {under_way[0].session}: {told} are under way")

    def note(self, what: str) -> None:
        """For the trace."""
        self.trace.append(f"{self.world.now_ns / NS_PER_S:9.4f} s  {what}")

    def _settled(self, arrival: Arrival) -> None:
        if self._traced:
            self.note(f"{arrival.edge}: {arrival.chunk.session} has done with {_told(arrival.chunk)}")
        chunk = arrival.chunk
        key = (arrival.edge, arrival.peer, chunk.session, chunk.incarnation)
        left = [other for other in self._under_way.get(key, ()) if other is not chunk]
        if len(left) == len(self._under_way.get(key, ())):
            self._violated("ledger", f"{arrival.edge}: {chunk.stream} {chunk.seq} is settled twice")
        self._under_way[key] = left

    def _check_end(self) -> None:
        for name, session in self._open_sessions():
            self._violated("no starvation", f"{session} has not come to its end at {name}")
        for edge, account in self.accounts().items():
            if account.in_flight:
                self._violated("ledger", f"{edge}: {account.in_flight} chunks are neither delivered nor dropped")
        cuts = ("cut_off", "unit_failed")
        cut_off = {chunk.session for chunk in self._events.chunks if chunk.attrs.get("type") in cuts}
        for name, runner in self._runners():
            unsaid = runner.stage.unsaid if isinstance(runner.stage, Costly) else []
            for session in (each for each in unsaid if each not in cut_off | self.returns.closed):
                self._violated("all is said", f"{session} was closed at {name} with something left to say")
        ended, due = self.figures.num_windows, self._num_due
        may_lack = self.deaths.num_deaths and "speaker" not in self.spec.stages  # who counts them has died
        if ended < due and not self.violations and not may_lack:  # what is carried past the end has one of its own
            self._violated("every window ends", f"{ended} of {due} windows have come to their end")

    def accounts(self) -> dict[str, Account]:
        """Of every edge, the ends of dead actors included."""
        for actor in self.actors.values():
            if actor.is_dead:  # whoever asks it sees that
                self._accounts.died(actor.name, ())
            else:
                self._accounts.told(actor.name, _ends_of(actor))
        return self._accounts.of(edge.id for edge in self.spec.edges)

    def forget(self, actor: Actor, buried_by: Iterable[str], edges: Iterable[str]) -> None:
        """An actor has died. edges: on which it received."""
        self._accounts.died(actor.name, buried_by)
        of_dead = {key for key in self._under_way if key[0] in edges and self._is_at(key[0], key[2], actor)}
        for key in of_dead:
            del self._under_way[key]

    def _is_at(self, edge: str, session: SessionId, actor: Actor) -> bool:
        stage = edge.partition("->")[2].partition(".")[0]
        return stage in actor.runners and session in actor.runners[stage].snapshot().sessions

    def _count(self) -> None:
        self.figures.num_deaths = self.deaths.num_deaths
        for account in self.accounts().values():
            self.figures.drops.update({reason: account.dropped.get(reason, 0) for reason in REASONS})
        self.figures.wasted_tokens += [wasted for llm in self._llms for wasted in llm.wasted]
        for chunk in self._events.chunks:
            kind = chunk.attrs.get("type")
            self.figures.num_underruns += kind == "underrun"
            self.figures.num_pieces += kind == "heard"
            self.figures.levels.update([int(chunk.attrs["level"] or 0)] if kind == WINDOW_EVENT else [])

    def _runner_of(self, stage: str, session: SessionId) -> StageRunner:
        return self.actors[self.process_of(stage, self.replicas[session][stage]).name].runners[stage]

    def process_of(self, stage: str, replica: int) -> Process:
        """The process of a replica, alive or not."""
        return next(p for p in self.processes if stage in p.stages and p.replica == replica)


def _with_replicas(spec: PipelineSpec, replicas: Mapping[str, int]) -> PipelineSpec:
    scaled = {
        name: spec.stages[name].model_copy(update={"scale": ReplicasSpec(min=number)})
        for name, number in replicas.items()
        if name in spec.stages
    }
    return replace(spec, stages={**spec.stages, **scaled})


def _ends_of(actor: Actor) -> dict[str, EdgeEnds]:
    sent: dict[str, list[Account]] = {}
    for _, sender in actor.senders:
        sent.setdefault(sender.rule.id, []).append(sender.account())
    ends: dict[str, EdgeEnds] = {}
    for _, receiver in actor.receivers:
        arrived = {peer.decode(): number for peer, number in receiver.arrived.items()}
        ends[receiver.rule.id] = EdgeEnds(merge(sent.pop(receiver.rule.id, ())), receiver.account(), arrived)
    for edge, accounts in sent.items():
        ends[edge] = EdgeEnds(merge(accounts))
    return ends


def _told(chunk: Chunk) -> str:
    what = chunk.type.name.lower() if chunk.is_control else f"chunk {chunk.seq}"
    return f"{what} of {chunk.stream} at {chunk.start_ns / NS_PER_S:g} s, epoch {chunk.epoch}"


class WatchedReceiver(Receiver):
    """Tells of each chunk that is settled."""

    def __init__(self, rule: EdgeRule, link: ReceiveEnd, settled: Callable[[Arrival], None]) -> None:
        super().__init__(rule, link, SilentObserver())
        self._settled = settled

    def deliver(self, arrival: Arrival, age_s: float) -> None:
        self._settled(arrival)
        super().deliver(arrival, age_s)

    def drop(self, arrival: Arrival, reason: Reason) -> None:
        self._settled(arrival)
        super().drop(arrival, reason)


@dataclass(frozen=True, slots=True)
class Report:
    """Many seeds of one scenario."""

    scenario: str
    seeds: tuple[int, int]
    violations: tuple[Violation, ...]
    simulated_s: float
    cpu_s: float
    figures: Figures

    def as_dict(self) -> dict[str, object]:
        return {
            "scenario": self.scenario,
            "seeds": f"{self.seeds[0]}:{self.seeds[1]}",
            "violations": [asdict(violation) for violation in self.violations],
            "simulated_s": round(self.simulated_s, 3),
            "cpu_s": round(self.cpu_s, 3),
            **self.figures.as_dict(),
        }


def parse_seeds(text: str) -> range:
    """ "0:1000" or "7". Raises SimulateError."""
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last) if colon else int(first) + 1)
    except ValueError:
        raise SimulateError(f"--seeds {text}: expected FIRST:LAST or one number, like 0:1000") from None
    if not seeds or seeds[0] < 0:
        raise SimulateError(f"--seeds {text}: there are none in it")
    return seeds


def find_scenario(name: str) -> Scenario:
    """Raises SimulateError when there is none of that name."""
    if name not in SCENARIOS:
        raise SimulateError(f"no scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


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


def print_scenarios(as_json: bool) -> None:
    """What there is."""
    told = {scenario.name: scenario.about for scenario in SCENARIOS.values()}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in told.items()], indent=2))
        return
    for name, about in told.items():
        print(f"{name:<16} {about}")
