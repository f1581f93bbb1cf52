"""The coordinator: which actors there are, how they are wired, which session lives where. Never on a chunk's way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from deploy.clock import clock_ahead_ns
from deploy.cluster import Cluster
from deploy.placement import Process, processes_of
from deploy.plan import ActorPlan, Address
from deploy.routing import SOURCES, least_loaded, opening_order, phase_ns, session_plan, stages_of
from deploy.runner import StageSnapshot
from graph.chunk import NS_PER_MS, SessionId
from graph.errors import GraphError
from graph.ledger import Account, merge
from graph.spec import PipelineSpec
from stages.stage import Session, StageError

START_TIMEOUT_S = 300.0  # a 9 B checkpoint from a slow disk takes minutes
CALL_TIMEOUT_S = 60.0
# From the opening of sessions to their event time 0 their decoders start, each on a core; alone it takes one 0.2 s.
HEAD_START_NS = 300 * NS_PER_MS
DECODER_START_NS = 200 * NS_PER_MS
NUM_CLOCK_QUESTIONS = 8


class CoordinatorError(GraphError):
    """An actor did not start, or has died; says which and why."""


class CallError(CoordinatorError):
    """An actor has failed at what it was asked to do, and lives."""


@dataclass(slots=True)
class _Placed:
    """An actor that runs. clock_ahead_ns: its node's wall clock minus ours."""

    process: Process
    handle: Any
    address: Address
    clock_ahead_ns: int = 0


@dataclass(slots=True)
class _Placement:
    """Where a session lives: per stage the replica."""

    session: Session
    replicas: Mapping[str, int]
    opened: list[str] = field(default_factory=list)


class Coordinator:
    """Owns the session table and the wiring of one pipeline."""

    def __init__(self, spec: PipelineSpec, checkpoint: Path, directory: Path) -> None:
        """directory: for sockets and logs, mode 0700."""
        self._spec = spec
        self._checkpoint = checkpoint
        self._directory = directory
        self._actors: dict[str, _Placed] = {}
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
        return [placed.process for placed in self._actors.values()]

    @property
    def sessions(self) -> list[SessionId]:
        """The sessions that are open."""
        return list(self._sessions)

    # ---- start and stop ----------------------------------------------------------------------------------------------

    def start(self, cluster: Cluster, tell: Callable[[str], None]) -> None:
        """Place the actors, wire them, load their models. tell: called with each actor's name when it is ready.

        Raises PlacementError, CoordinatorError, or what a stage raises when it can't be built.
        """
        processes = processes_of(self._spec)
        plans = [self._plan(process) for process in processes]
        handles = cluster.place(processes, plans)
        addresses = {name: handle.address.remote() for name, handle in handles.items()}
        for process in processes:
            address = self._get(process.name, addresses[process.name], START_TIMEOUT_S)
            self._actors[process.name] = _Placed(process, handles[process.name], address)
        self._node_id = cluster.node_id
        self._wire()
        loading = {name: placed.handle.load.remote() for name, placed in self._actors.items()}
        while loading:
            done, _ = ray.wait(list(loading.values()), num_returns=1, timeout=START_TIMEOUT_S)
            if not done:
                raise CoordinatorError(f"{', '.join(loading)} did not load within {START_TIMEOUT_S:g} s")
            name = next(name for name, reference in loading.items() if reference == done[0])
            self._get(name, loading.pop(name), CALL_TIMEOUT_S)
            tell(name)

    def stop(self) -> None:
        """Stop every actor; one that is gone already is no error."""
        calls = [placed.handle.stop.remote() for placed in self._actors.values()]
        for call in calls:
            try:
                ray.get(call, timeout=10)
            except RayError:
                continue
        for placed in self._actors.values():
            ray.kill(placed.handle)
        self._actors.clear()

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def open_sessions(self, sessions: Sequence[Session]) -> None:
        """Open sessions at every stage they pass, stage by stage; then the time of all begins, sources last.

        Raises StageError when a stage has no room for one; then none of them is open.
        """
        for session in sessions:
            replicas = {name: least_loaded(self.load_of(name)) for name in self._spec.stages}
            self._sessions[session.id] = _Placement(session, replicas)
        try:
            order = opening_order(self._spec)
            for stage in order:
                self._open_at(stage, sessions)
            self._read_clocks()
            origins_ns = self._next_origins_ns(sessions)
            others = [stage for stage in order if stage not in SOURCES]
            sources = [stage for stage in order if stage in SOURCES]
            self._get_all(self._ask_to_begin(others, sessions, origins_ns))
            # A call per session: each starts a decoder, which takes its actor a while.
            self._get_all([call for one in sessions for call in self._ask_to_begin(sources, [one], origins_ns)])
        except BaseException:
            for session in sessions:
                self.close_session(session.id)
            raise

    def close_session(self, session: SessionId) -> None:
        """End a session at once, sources first; what is under way is dropped and counted."""
        placement = self._sessions.pop(session, None)
        if placement is None:
            return
        for stage in reversed(placement.opened):
            self._call(stage, placement.replicas[stage], "close_session", stage, session)

    def end_session(self, session: SessionId) -> None:
        """Let a session's sources stop now; it then runs to its end by itself."""
        placement = self._sessions[session]
        for stage in SOURCES:
            if stage in placement.opened:
                self._call(stage, placement.replicas[stage], "end_session", stage, session)

    def forget_camera(self, camera: str) -> None:
        """End its series in all actors' metrics."""
        asked = [(placed, placed.handle.forget_camera.remote(camera)) for placed in self._actors.values()]
        self._get_all(asked)

    def poll(self) -> dict[str, dict[str, StageSnapshot]]:
        """What every actor is doing: by actor name and stage. Sessions that came to their end leave the table.

        Raises CoordinatorError when an actor has died.
        """
        asked = {name: placed.handle.snapshot.remote() for name, placed in self._actors.items()}
        snapshots = {name: self._get(name, reference, CALL_TIMEOUT_S) for name, reference in asked.items()}
        alive = {session for stages in snapshots.values() for stage in stages.values() for session in stage.sessions}
        for session in [session for session in self._sessions if session not in alive]:
            del self._sessions[session]
        return snapshots

    def ledger(self) -> dict[str, Account]:
        """The account of every edge, both ends and all replicas put together."""
        ends: dict[str, list[Account]] = {edge.id: [] for edge in self._spec.edges}
        asked = {name: placed.handle.accounts.remote() for name, placed in self._actors.items()}
        for name, reference in asked.items():
            for edge, account in self._get(name, reference, CALL_TIMEOUT_S).items():
                ends[edge].append(account)
        return {edge: merge(accounts) for edge, accounts in ends.items()}

    def load_of(self, stage: str) -> list[int]:
        """Sessions per replica of a stage."""
        counts = [0] * max(self._spec.stages[stage].replicas, 1)
        for placement in self._sessions.values():
            counts[placement.replicas[stage]] += 1
        return counts

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _plan(self, process: Process) -> ActorPlan:
        edges = tuple(e for e in self._spec.edges if {e.source.stage, e.target.stage} & process.stages.keys())
        return ActorPlan(
            name=process.name,
            replica=process.replica,
            stages=process.stages,
            edges=edges,
            all_stages=tuple(self._spec.stages),
            checkpoint=self._checkpoint,
            directory=self._directory / "bus",
            log=self._directory / "logs" / f"{process.name}.log",
        )

    def _wire(self) -> None:
        """Every receiver binds, over tcp where one of its senders is on another node; then every sender connects."""
        endpoints: dict[str, list[str]] = {}
        for edge in self._spec.edges:
            for target in self._replicas_of(edge.target.stage):
                over_tcp = any(
                    source.address.node_id != target.address.node_id for source in self._replicas_of(edge.source.stage)
                )
                bound = self._get(target.process.name, target.handle.bind.remote({edge.id: over_tcp}), CALL_TIMEOUT_S)
                endpoints.setdefault(edge.id, []).append(bound[edge.id])
        for name, placed in self._actors.items():
            outgoing = {e.id: endpoints[e.id] for e in self._spec.edges if e.source.stage in placed.process.stages}
            self._get(name, placed.handle.connect.remote(outgoing), CALL_TIMEOUT_S)

    def _replicas_of(self, stage: str) -> list[_Placed]:
        placed = [placed for placed in self._actors.values() if stage in placed.process.stages]
        return sorted(placed, key=lambda p: p.process.replica)

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
        """Let the sessions' clocks run at these stages; returns whom it asked. origins_ns: on our wall clock."""
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
            (placed, [session for session in passing if self._sessions[session.id].replicas[stage] == replica])
            for replica, placed in enumerate(self._replicas_of(stage))
        ]
        return [(placed, here) for placed, here in by_replica if here]

    def _next_origins_ns(self, sessions: Sequence[Session]) -> dict[SessionId, int]:
        """When each session's event time begins: soon, and in step with the windows of its phase, so that the units of
        sessions of one phase are ready together and share their forwards. The phases take turns within a window."""
        window = self._spec.window
        soon_ns = time.time_ns() + HEAD_START_NS + DECODER_START_NS * len(sessions) // (os.cpu_count() or 1)
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
        """Of the other nodes. Each time anew: between two openings clocks drift, and are set."""
        for placed in self._actors.values():
            if placed.address.node_id != self._node_id:
                placed.clock_ahead_ns = self._clock_ahead_ns(placed)

    def _clock_ahead_ns(self, placed: _Placed) -> int:
        return clock_ahead_ns(
            lambda: int(self._get(placed.process.name, placed.handle.clock.remote(), CALL_TIMEOUT_S)),
            num_questions=NUM_CLOCK_QUESTIONS,
        )

    def _call(self, stage: str, replica: int, method: str, *args: object) -> Any:
        placed = self._replicas_of(stage)[replica]
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
            reason = str(error).strip().splitlines()[-1]
            raise CoordinatorError(f"{name} has died: {reason}; see {self._directory / 'logs' / name}.log") from error
        except RayError as error:
            raise CoordinatorError(f"{name} does not answer: {error}") from error
