"""The coordinator: which actors there are, how they are wired, which session lives where. Never on a chunk's way.

An actor that dies, or can't go on, is started again in its place while the others run on: `poll()` sees it, moves its
sessions to other replicas of its stage or lets them wait for the new one (deploy/recovery.py), and looks whether that
is up. Not so for who holds cameras, files and devices, and not in virtual time, where a run is to be whole or none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from deploy.accounts import Accounts
from deploy.clock import clock_ahead_ns
from deploy.cluster import Cluster
from deploy.placement import LOCAL_STAGES, Process, processes_of
from deploy.plan import ActorPlan, Address
from deploy.recovery import Going, announce, inputs_of, redirect, reopen
from deploy.routing import SOURCES, opening_order, phase_ns, session_plan, stages_of
from deploy.runner import Listener, SessionPlan, StageSnapshot
from graph.chunk import NS_PER_MS, Scalar, SessionId
from graph.errors import GraphError
from graph.ledger import Account
from graph.spec import PipelineSpec
from stages.stage import Session, StageError

START_TIMEOUT_S = 300.0  # a 9 B checkpoint from a slow disk takes minutes
CALL_TIMEOUT_S = 60.0
# From the opening of sessions to their event time 0 their decoders start, each on a core; alone it takes one 0.2 s.
HEAD_START_NS = 300 * NS_PER_MS
DECODER_START_NS = 200 * NS_PER_MS
NUM_CLOCK_QUESTIONS = 8
MAX_DEATHS = 3  # of one actor within so long; what dies at once each time would die for ever
DEATHS_WITHIN_S = 600.0


class CoordinatorError(GraphError):
    """An actor did not start, or has died; says which and why."""


class CallError(CoordinatorError):
    """An actor has failed at what it was asked to do, and lives."""


class ActorDied(CoordinatorError):
    """An actor is not there any more."""


@dataclass(slots=True)
class _Placed:
    """An actor that runs. peer: its name on the bus. clock_ahead_ns: its node's monotonic clock minus ours."""

    process: Process
    handle: Any
    peer: str
    address: Address
    clock_ahead_ns: int = 0


@dataclass(slots=True)
class _Placement:
    """Where a session lives: per stage that it passes the replica. origin_ns: its event time 0 on our monotonic clock,
    once it has one."""

    session: Session
    replicas: dict[str, int]
    opened: list[str] = field(default_factory=list)
    origin_ns: int = 0


@dataclass(slots=True)
class _Down:
    """Who takes the place of a dead actor. coming: what brings it up, step by step; awaited: what that waits for."""

    process: Process
    peer: str
    handle: Any
    coming: Iterator[Any]
    awaited: Any
    since_s: float


class Coordinator:
    """Owns the session table and the wiring of one pipeline."""

    def __init__(self, spec: PipelineSpec, checkpoint: Path, directory: Path) -> None:
        """directory: for sockets and logs, mode 0700."""
        self._spec = spec
        self._checkpoint = checkpoint
        self._directory = directory
        self._processes = processes_of(spec)
        self._actors: dict[str, _Placed] = {}  # that live
        self._addresses: dict[str, Address] = {}  # by actor's name, where it is, or was last
        self._endpoints: dict[str, dict[int, str]] = {}  # by edge and receiving replica
        self._down: dict[str, _Down] = {}
        self._deaths: dict[str, list[float]] = {}  # when, on the monotonic clock
        self._accounts = Accounts()
        self._sessions: dict[SessionId, _Placement] = {}
        self._node_id = ""  # ours
        self._first_origin_ns: int | None = None
        self._num_opened = 0

    @property
    def actors(self) -> Mapping[str, Address]:
        """Where each actor runs, by its name."""
        return {name: placed.address for name, placed in self._actors.items()}

    @property
    def processes(self) -> list[Process]:
        """All there are to be."""
        return self._processes

    @property
    def sessions(self) -> list[SessionId]:
        """The sessions that are open."""
        return list(self._sessions)

    @property
    def problem(self) -> str:
        """Who is missing; "" when all actors run."""
        return f"{', '.join(self._down)} started again after it has died" if self._down else ""

    @property
    def num_deaths(self) -> Mapping[str, int]:
        """By actor's name, how often it has died."""
        return {name: len(times) for name, times in self._deaths.items()}

    # ---- start and stop ----------------------------------------------------------------------------------------------

    def start(self, cluster: Cluster, tell: Callable[[str], None]) -> None:
        """Place the actors, wire them, load their models. tell: one line for the user, then and later.

        Raises PlacementError, CoordinatorError, or what a stage raises when it can't be built.
        """
        self._cluster, self._tell = cluster, tell
        plans = [self._plan(process) for process in self._processes]
        handles = cluster.place(self._processes, plans)
        addresses = {name: handle.address.remote() for name, handle in handles.items()}
        for process, plan in zip(self._processes, plans, strict=True):
            address = self._get(process.name, addresses[process.name], START_TIMEOUT_S)
            self._actors[process.name] = _Placed(process, handles[process.name], plan.peer, address)
            self._addresses[process.name] = address
        self._node_id = cluster.node_id
        self._wire()
        loading = {name: placed.handle.load.remote() for name, placed in self._actors.items()}
        while loading:
            done, _ = ray.wait(list(loading.values()), num_returns=1, timeout=START_TIMEOUT_S)
            if not done:
                raise CoordinatorError(f"{', '.join(loading)} did not load within {START_TIMEOUT_S:g} s")
            name = next(name for name, reference in loading.items() if reference == done[0])
            self._get(name, loading.pop(name), CALL_TIMEOUT_S)
            tell(f"  {name} ready")

    def stop(self) -> None:
        """Stop every actor; one that is gone already is no error."""
        calls = [placed.handle.stop.remote() for placed in self._actors.values()]
        for call in calls:
            try:
                ray.get(call, timeout=10)
            except RayError:
                continue
        for handle in [*(placed.handle for placed in self._actors.values()), *(d.handle for d in self._down.values())]:
            ray.kill(handle)
        self._actors.clear()
        self._down.clear()

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def open_sessions(self, sessions: Sequence[Session]) -> None:
        """Open sessions at every stage they pass, stage by stage; then the time of all begins, sources last.

        Raises StageError when a stage has no room for one; then none of them is open.
        """
        try:
            for session in sessions:
                passed = stages_of(session, self._spec)
                replicas = {name: self._next_replica(name) for name in self._spec.stages if name in passed}
                self._sessions[session.id] = _Placement(session, replicas)
            order = opening_order(self._spec)
            for stage in order:
                self._open_at(stage, sessions)
            self._read_clocks()
            origins_ns = self._next_origins_ns(sessions)
            for session in sessions:
                self._sessions[session.id].origin_ns = origins_ns[session.id]
            others = [stage for stage in order if stage not in SOURCES]
            sources = [stage for stage in order if stage in SOURCES]
            self._get_all(self._ask_to_begin(others, sessions, origins_ns))
            # A call per session: each starts a decoder, which takes its actor a while.
            self._get_all([call for one in sessions for call in self._ask_to_begin(sources, [one], origins_ns)])
        except BaseException as error:
            for session in sessions:
                self.close_session(session.id)
            if isinstance(error, ActorDied):  # which the next poll() will see
                raise StageError(f"{error}; try again") from error
            raise

    def close_session(self, session: SessionId) -> None:
        """End a session at once, sources first; what is under way is dropped and counted."""
        placement = self._sessions.pop(session, None)
        if placement is None:
            return
        for stage in reversed(placement.opened):
            with suppress(CoordinatorError):  # then it holds nothing any more
                self._call(self._replica(stage, placement.replicas[stage]), "close_session", stage, session)

    def end_session(self, session: SessionId) -> None:
        """Let a session's sources stop now; it then runs to its end by itself."""
        placement = self._sessions[session]
        for stage in SOURCES:
            if stage in placement.opened:
                self._call(self._replica(stage, placement.replicas[stage]), "end_session", stage, session)

    def poll(self) -> dict[str, dict[str, StageSnapshot]]:
        """What every actor is doing: by actor name and stage. Sessions that came to their end leave the table.

        Raises CoordinatorError when an actor has died for good; one that can be is replaced.
        """
        snapshots = self._ask_all("snapshot")
        self._look_at_coming()
        alive = {session for stages in snapshots.values() for stage in stages.values() for session in stage.sessions}
        for session in [session for session in self._sessions if session not in alive]:
            del self._sessions[session]
        return snapshots

    def ledger(self) -> dict[str, Account]:
        """The account of every edge, both ends and all replicas put together."""
        while True:
            before = set(self._actors)
            told = self._ask_all("accounts")
            if before == set(self._actors):
                break  # else somebody has died meanwhile, of which some did not know yet
        for name, ends in told.items():
            self._accounts.told(self._actors[name].peer, ends)
        return self._accounts.of(edge.id for edge in self._spec.edges)

    def load_of(self, stage: str) -> list[int]:
        """Sessions per replica of a stage."""
        counts = [0] * max(self._spec.stages[stage].replicas, 1)
        for placement in self._sessions.values():
            if stage in placement.replicas:
                counts[placement.replicas[stage]] += 1
        return counts

    def _next_replica(self, stage: str) -> int:
        """Where a new session goes. Raises StageError when no replica of the stage is there."""
        loads = self.load_of(stage)
        here = {placed.process.replica for placed in self._replicas_of(stage)}
        if not here:
            raise StageError(f"{stage} has died and is being started again; try again in a moment")
        return min(here, key=lambda replica: (loads[replica], replica))

    # ---- who has died ------------------------------------------------------------------------------------------------

    def _lost(self, name: str, error: CoordinatorError) -> None:
        """An actor has died, or can't go on. Raises the error where it can't be replaced."""
        placed = self._actors[name]
        if LOCAL_STAGES & placed.process.stages.keys() or not all(p.session.paced for p in self._sessions.values()):
            raise error
        self._replace(placed.process, placed.peer, placed.handle, error)

    def _replace(self, process: Process, peer: str, handle: Any, error: CoordinatorError) -> None:
        self._count_death(process.name, error)
        self._actors.pop(process.name, None)
        ray.kill(handle)
        self._accounts.died(peer, self._bury(process))
        self._tell(str(error))
        self._move_away(process)
        self._start_again(process)

    def _bury(self, process: Process) -> list[str]:
        """Let all who send to an actor know that it has died; returns who does."""
        inputs = inputs_of(self._spec, _stage_of(process))
        buried_by = []
        for other in list(self._actors.values()):
            ends = [(edge.id, process.replica) for edge in inputs if edge.source.stage in other.process.stages]
            with suppress(CoordinatorError):  # it has died as well
                self._call(other, "bury", ends)
                buried_by.append(other.peer)
        return buried_by

    def _count_death(self, name: str, error: CoordinatorError) -> None:
        times = self._deaths.setdefault(name, [])
        times.append(time.monotonic())
        if len(times) >= MAX_DEATHS and times[-1] - times[-MAX_DEATHS] < DEATHS_WITHIN_S:
            raise CoordinatorError(f"{error}; that was {MAX_DEATHS} times within {DEATHS_WITHIN_S / 60:g} minutes")

    def _move_away(self, process: Process) -> None:
        """Let its sessions go on at other replicas, as far as those have room."""
        stage = _stage_of(process)
        for placement in self._sessions_at(process):
            if self._move(placement, stage):
                ended = redirect(_Remote(self), self._spec, stage, _going(placement))
                announce(_Remote(self), self._spec, stage, _going(placement), process.name, ended)

    def _move(self, placement: _Placement, stage: str) -> bool:
        before = placement.replicas[stage]
        others = {placed.process.replica for placed in self._replicas_of(stage)}
        loads = self.load_of(stage)
        for replica in sorted(others, key=lambda replica: loads[replica]):
            placement.replicas[stage] = replica
            with suppress(StageError, CoordinatorError):
                reopen(_Remote(self), self._spec, stage, _going(placement))
                return True
        placement.replicas[stage] = before
        return False

    def _start_again(self, process: Process) -> None:
        plan = self._plan(process)
        handle = self._cluster.replace(process, plan)
        coming = self._bring_up(process, plan, handle)
        self._down[process.name] = _Down(process, plan.peer, handle, coming, next(coming), time.monotonic())

    def _look_at_coming(self) -> None:
        """Who is started again: is it up by now?"""
        for name, down in list(self._down.items()):
            try:
                while ray.wait([down.awaited], num_returns=1, timeout=0)[0]:
                    down.awaited = next(down.coming)
            except StopIteration:
                del self._down[name]
            except CoordinatorError as error:
                self._replace(down.process, down.peer, down.handle, error)
            else:
                if time.monotonic() - down.since_s > START_TIMEOUT_S:
                    raise CoordinatorError(f"{name} did not load within {START_TIMEOUT_S:g} s")

    def _bring_up(self, process: Process, plan: ActorPlan, handle: Any) -> Iterator[Any]:
        """Start an actor again, and let the sessions that wait for it go on. Yields what it waits for."""

        def answer(reference: Any) -> Any:
            try:
                return self._get(process.name, reference, CALL_TIMEOUT_S)
            except CoordinatorError:
                raise
            except Exception as error:  # what a stage says that can't be built is a death like any other
                raise CallError(f"{process.name}: {error}") from error

        yield (address := handle.address.remote())
        self._addresses[process.name] = answer(address)
        yield (bound := handle.bind.remote(self._over_tcp(process)))
        for edge, endpoint in answer(bound).items():
            self._endpoints[edge][process.replica] = endpoint
        before = self._outgoing(process)
        yield (connected := handle.connect.remote(before))
        answer(connected)
        yield (loaded := handle.load.remote())
        answer(loaded)
        if moved := self._moved(process, before):
            answer(handle.reconnect.remote(moved))
        answer(handle.bury.remote(self._outgoing_down(process)))
        placed = _Placed(process, handle, plan.peer, self._addresses[process.name])
        self._actors[process.name] = placed
        if placed.address.node_id != self._node_id:
            placed.clock_ahead_ns = self._clock_ahead_ns(placed)
        self._go_on_at(placed)
        self._tell(f"  {process.name} ready again")

    def _go_on_at(self, placed: _Placed) -> None:
        """Let the sessions that waited for it go on there. Nothing is sent to it before they are open, nor before who
        sends knows that it has begun anew."""
        process, stage, remote = placed.process, _stage_of(placed.process), _Remote(self)
        going: list[Going] = []
        for placement in self._sessions_at(process):
            try:
                reopen(remote, self._spec, stage, _going(placement))
                going.append(_going(placement))
            except StageError as error:  # those which have come meanwhile have taken its room
                self._tell(f"camera {placement.session.camera}: its session is over: {error}")
                self.close_session(placement.session.id)
        ended = [redirect(remote, self._spec, stage, each) for each in going]
        self._reconnect(process)
        for each, edges in zip(going, ended, strict=True):
            announce(remote, self._spec, stage, each, process.name, edges)

    def _reconnect(self, process: Process) -> None:
        """Let all who send to an actor reach the one that has taken its place."""
        inputs = inputs_of(self._spec, _stage_of(process))
        for other in list(self._actors.values()):
            ends = [
                (edge.id, process.replica, self._endpoints[edge.id][process.replica])
                for edge in inputs
                if edge.source.stage in other.process.stages
            ]
            with suppress(CoordinatorError):  # the next poll() takes care of it
                self._call(other, "reconnect", ends)

    def _sessions_at(self, process: Process) -> list[_Placement]:
        """The sessions that live there."""
        stage = _stage_of(process)
        placements = [placement for placement in self._sessions.values() if stage in placement.opened]
        return [placement for placement in placements if placement.replicas[stage] == process.replica]

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _ask_all(self, method: str) -> dict[str, Any]:
        """What all actors that live answer, by name; one that does not is lost."""
        asked = {name: getattr(placed.handle, method).remote() for name, placed in self._actors.items()}
        answers: dict[str, Any] = {}
        for name, reference in asked.items():
            try:
                answers[name] = self._get(name, reference, CALL_TIMEOUT_S)
            except CoordinatorError as error:
                self._lost(name, error)
        return answers

    def _plan(self, process: Process) -> ActorPlan:
        edges = tuple(e for e in self._spec.edges if {e.source.stage, e.target.stage} & process.stages.keys())
        num_deaths = len(self._deaths.get(process.name, ()))
        return ActorPlan(
            name=process.name,
            peer=f"{process.name}-{num_deaths}" if num_deaths else process.name,
            replica=process.replica,
            stages=process.stages,
            edges=edges,
            all_stages=tuple(self._spec.stages),
            checkpoint=self._checkpoint,
            directory=self._directory / "bus",
            log=self._directory / "logs" / f"{process.name}.log",
        )

    def _wire(self) -> None:
        """Every receiver binds; then every sender connects."""
        self._endpoints = {edge.id: {} for edge in self._spec.edges}
        for name, placed in self._actors.items():
            over_tcp = self._over_tcp(placed.process)
            for edge, endpoint in self._get(name, placed.handle.bind.remote(over_tcp), CALL_TIMEOUT_S).items():
                self._endpoints[edge][placed.process.replica] = endpoint
        for placed in self._actors.values():
            self._call(placed, "connect", self._outgoing(placed.process))

    def _over_tcp(self, process: Process) -> dict[str, bool]:
        """The edges that come to it, and whether one of their senders is on another node."""
        here = self._addresses[process.name].node_id
        return {
            edge.id: any(
                self._addresses[other.name].node_id != here
                for other in self._processes
                if edge.source.stage in other.stages
            )
            for edge in self._spec.edges
            if edge.target.stage in process.stages
        }

    def _outgoing(self, process: Process) -> dict[str, list[str]]:
        """The edges that leave it, with the endpoints of all replicas at the other end."""
        outgoing = [edge.id for edge in self._spec.edges if edge.source.stage in process.stages]
        return {edge: [endpoint for _, endpoint in sorted(self._endpoints[edge].items())] for edge in outgoing}

    def _moved(self, process: Process, before: Mapping[str, list[str]]) -> list[tuple[str, int, str]]:
        """The ends of its edges that have been replaced since, with their replicas and endpoints."""
        return [
            (edge, replica, endpoint)
            for edge, endpoints in self._outgoing(process).items()
            for replica, endpoint in enumerate(endpoints)
            if endpoint != before[edge][replica]
        ]

    def _outgoing_down(self, process: Process) -> list[tuple[str, int]]:
        """The edges that leave it for somebody who is down, and for which replica."""
        return [
            (edge.id, other.replica)
            for edge in self._spec.edges
            for other in self._processes
            if edge.source.stage in process.stages
            and edge.target.stage in other.stages
            and other.name not in (*self._actors, process.name)
        ]

    def _replicas_of(self, stage: str) -> list[_Placed]:
        """Those that live."""
        placed = [placed for placed in self._actors.values() if stage in placed.process.stages]
        return sorted(placed, key=lambda p: p.process.replica)

    def _replica(self, stage: str, replica: int) -> _Placed:
        """Raises ActorDied when it is not there."""
        for placed in self._replicas_of(stage):
            if placed.process.replica == replica:
                return placed
        raise ActorDied(f"{stage}.{replica} has died and is being started again")

    def _open_at(self, stage: str, sessions: Iterable[Session]) -> None:
        """Open the sessions that pass a stage, at all its replicas at once."""
        asked = []
        for placed, here in self._by_replica(stage, sessions):
            plans = [session_plan(self._spec, stage, s, self._sessions[s.id].replicas) for s in here]
            for session in here:
                self._sessions[session.id].opened.append(stage)  # before it is, for one of them may fail
            asked.append((placed, placed.handle.open_sessions.remote(stage, plans)))
        self._get_all(asked)

    def _ask_to_begin(
        self, stages: Iterable[str], sessions: Sequence[Session], origins_ns: Mapping[SessionId, int]
    ) -> list[tuple[_Placed, Any]]:
        """Let the sessions' clocks run at these stages; returns whom it asked. origins_ns: on our monotonic clock."""
        asked = []
        for stage in stages:
            for placed, here in self._by_replica(stage, sessions):
                theirs_ns = {session.id: origins_ns[session.id] + placed.clock_ahead_ns for session in here}
                asked.append((placed, placed.handle.begin_sessions.remote(stage, theirs_ns)))
        return asked

    def _by_replica(self, stage: str, sessions: Iterable[Session]) -> list[tuple[_Placed, list[Session]]]:
        """Which of the sessions pass a stage, and at which replica."""
        passing = [session for session in sessions if stage in stages_of(session, self._spec)]
        by_replica = [
            (placed, [s for s in passing if self._sessions[s.id].replicas[stage] == placed.process.replica])
            for placed in self._replicas_of(stage)
        ]
        return [(placed, here) for placed, here in by_replica if here]

    def _next_origins_ns(self, sessions: Sequence[Session]) -> dict[SessionId, int]:
        """When each session's event time begins: soon, and in step with the windows of its phase, so that the units of
        sessions of one phase are ready together and share their forwards. The phases take turns within a window."""
        window = self._spec.window
        soon_ns = time.monotonic_ns() + HEAD_START_NS + DECODER_START_NS * len(sessions) // (os.cpu_count() or 1)
        if self._first_origin_ns is None:
            self._first_origin_ns = soon_ns
        next_ns = soon_ns + (self._first_origin_ns - soon_ns) % window.length_ns
        origins_ns: dict[SessionId, int] = {}
        for session in sessions:
            origins_ns[session.id] = next_ns
            if session.paced:  # in virtual time there are no bursts, and the larger the batch the better
                origins_ns[session.id] += phase_ns(self._num_opened, window)
                self._num_opened += 1
        return origins_ns

    def _read_clocks(self) -> None:
        """Of the other nodes. Each time anew: between two openings clocks drift, and machines sleep."""
        for placed in self._actors.values():
            if placed.address.node_id != self._node_id:
                placed.clock_ahead_ns = self._clock_ahead_ns(placed)

    def _clock_ahead_ns(self, placed: _Placed) -> int:
        return clock_ahead_ns(
            lambda: int(self._get(placed.process.name, placed.handle.clock.remote(), CALL_TIMEOUT_S)),
            num_questions=NUM_CLOCK_QUESTIONS,
        )

    def _call(self, placed: _Placed, method: str, *args: object) -> Any:
        return self._get(placed.process.name, getattr(placed.handle, method).remote(*args), CALL_TIMEOUT_S)

    def _get_all(self, asked: Sequence[tuple[_Placed, Any]]) -> None:
        """Wait for all calls, so that what is done next comes after them; raise what the first of them raised."""
        if asked:
            ray.wait([reference for _, reference in asked], num_returns=len(asked), timeout=START_TIMEOUT_S)
        for placed, reference in asked:
            self._get(placed.process.name, reference, CALL_TIMEOUT_S)

    def _get(self, name: str, reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, GraphError | StageError) or type(cause).__name__ == "ModelError":
                raise cause from None
            raise CallError(f"{name}: {cause or error}; see {self._directory / 'logs' / name}.log") from error
        except RayActorError as error:
            reason = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
            raise ActorDied(f"{name} has died: {reason}; see {self._directory / 'logs' / name}.log") from error
        except RayError as error:
            raise CoordinatorError(f"{name} does not answer: {error}") from error


def _stage_of(process: Process) -> str:
    """Of one that may be replaced: stages with a model have a process of their own (graph/spec_check.py)."""
    (stage,) = process.stages
    return stage


def _going(placement: _Placement) -> Going:
    return Going(placement.session, placement.replicas)


class _Remote:
    """The replicas, by Ray calls. Of one that has died meanwhile the next `poll()` takes care."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def open(self, stage: str, replica: int, plan: SessionPlan) -> None:
        self._call(stage, replica, "open_sessions", [plan])

    def begin(self, stage: str, replica: int, session: SessionId) -> None:
        placed = self._coordinator._replica(stage, replica)
        origin_ns = self._coordinator._sessions[session].origin_ns + placed.clock_ahead_ns
        self._call(stage, replica, "begin_sessions", {session: origin_ns})

    def listener(self, stage: str, replica: int, session: SessionId) -> Listener | None:
        listener = self._call(stage, replica, "listener", session)
        assert listener is None or isinstance(listener, Listener)
        return listener

    def reroute(self, stage: str, replica: int, session: SessionId, edge: str, target: int) -> bool:
        with suppress(CoordinatorError):
            return bool(self._call(stage, replica, "reroute", session, edge, target))
        return True  # whoever takes its place will send

    def end_input(self, stage: str, replica: int, session: SessionId, edge: str) -> None:
        with suppress(CoordinatorError):
            self._call(stage, replica, "end_input", session, edge)

    def tell(
        self, stage: str, replica: int, session: SessionId, kind: str, attrs: dict[str, Scalar], *, cuts: bool
    ) -> None:
        with suppress(CoordinatorError):
            self._call(stage, replica, "tell", session, kind, attrs, cuts)

    def _call(self, stage: str, replica: int, method: str, *args: object) -> Any:
        return self._coordinator._call(self._coordinator._replica(stage, replica), method, stage, *args)
