"""The coordinator: which actors there are, how they are wired, which session lives where. Never on a chunk's way.

Rule: it never waits for one actor. Calls go out side by side (control/calls.py); what takes several is a procedure that
goes on as the answers come: opening sessions (control/opening.py), bringing up who has died (control/restarts.py).
`poll()` looks after all of them for a moment; whoever has not answered by then is asked no more until he has, and what
he reported last stands. An actor that dies, or takes no call for so long that it is as good as dead, is started again
in its place while the others run on. Not so in virtual time, where a run is to be whole or none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.actor.accounts import Accounts
from deploy.actor.plan import ActorPlan, Address, EdgePlan, stage_plan
from deploy.actor.session_plan import StageSnapshot
from deploy.control.calls import CoordinatorError, Lines, NowS, Procedures, Reply
from deploy.control.ending import last_ledger, ledger_of, take_reports
from deploy.control.fleet import Cluster, Fleet
from deploy.control.given_up import GivenUp
from deploy.control.opening import SILENT_S, Openings
from deploy.control.placement import Process, processes_of
from deploy.control.restarts import STALL_S, START_TIMEOUT_S, Restarts, Tools
from deploy.control.routing import ends_of, is_aside
from deploy.control.sessions import SessionTable
from deploy.control.start import LOOK_S, start_actors
from deploy.control.watch import Slow, Waiting
from deploy.control.wiring import Wiring
from deploy.process.deadline import Deadline
from graph.chunk import NS_PER_S, SessionId
from graph.ledger import Account
from graph.spec import PipelineSpec
from stages.session import Session, View

OPEN_TIMEOUT_S = 10.0  # for a camera that comes while others run: somebody waits for the answer
ENDS_S = 10.0  # to end an orderly run, in which nobody is in a batch any more
STOP_S = 1.0


class Coordinator:
    """Owns the session table and the wiring of one pipeline."""

    def __init__(
        self,
        spec: PipelineSpec,
        checkpoint: Path,
        directory: Path,
        cluster: Cluster,
        tell: Callable[[str], None],
        now_s: NowS = time.monotonic,
        num_cores: int = os.cpu_count() or 1,
    ) -> None:
        """directory: for sockets and logs, mode 0700. tell: one line for the user. num_cores: of this machine."""
        self._spec = spec
        self._checkpoint = checkpoint
        self._directory = directory
        self._now_s = now_s
        self._processes = processes_of(spec)
        self._table = SessionTable(spec, self._now_ns, num_cores)
        self._tools = Tools(
            spec=spec,
            cluster=cluster,
            lines=Lines(cluster, directory / "logs", now_s),
            procedures=Procedures(now_s),
            fleet=Fleet(cluster, self._now_ns),
            wiring=Wiring(spec, self._processes),
            table=self._table,
            accounts=Accounts(),
            plan=self._plan,
            tell=tell,
            now_s=now_s,
        )
        self._openings = Openings(self._tools)
        self._restarts = Restarts(self._tools, self.close_session)
        self._slow = Slow(self._tools.fleet, directory / "bus", tell)
        self._given_up = GivenUp(self._tools, self._restarts, self.end_session)

    @property
    def actors(self) -> Mapping[str, Address]:
        """Where each actor runs, by its name."""
        return {name: living.address for name, living in self._tools.fleet.living.items()}

    @property
    def processes(self) -> list[Process]:
        """All there are to be."""
        return self._processes

    @property
    def sessions(self) -> list[SessionId]:
        """The sessions that are open, or about to be."""
        return list(self._table.placements)

    @property
    def problem(self) -> str:
        """Who is missing; "" when all actors run."""
        coming = self._restarts.coming
        return f"{', '.join(coming)} started again after it has died" if coming else ""

    @property
    def behind(self) -> set[str]:
        """The stages at which sessions still are although all their windows have come to their end, but for those that
        wait for these. None as long as a session has windows to come."""
        spec, fleet, behind = self._spec, self._tools.fleet, set[str]()
        for placement in self._table.placements.values():
            if not all(fleet.has_left(placement, stage) for stage in ends_of(placement.session, spec)):
                return set()
            behind |= {s for s in placement.replicas if is_aside(spec, s, placement.session)}
            behind -= {s for s in placement.replicas if fleet.has_left(placement, s)}
        waiting = {edge.target.stage for edge in spec.edges if edge.source.stage in behind}
        return (behind - waiting) or behind

    @property
    def slow(self) -> Mapping[str, tuple[str, str]]:
        """The actors that take no call for seconds: by name, the stage ("" where it is unknown), and at what it is."""
        return self._slow.at

    @property
    def num_deaths(self) -> Mapping[str, int]:
        """By actor's name, how often it has died."""
        return self._restarts.num_deaths

    def load_of(self, stage: str) -> list[int]:
        """Sessions per replica of a stage."""
        return self._table.load_of(stage)

    # ---- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Place the actors, wire them, load their models.

        Raises PlacementError, CoordinatorError, or what a stage raises when it can't be built.
        """
        start_actors(self._tools, self._processes)

    def end(self, deadline: Deadline | None = None) -> dict[str, Account]:
        """Close what is still open, and return the last ledger, in which nothing is in flight.

        deadline: until when; whoever has not answered by then has died for it. What he reported last stands.
        """
        for session in self.sessions:
            self.close_session(session)
        ledger = last_ledger(self._tools, deadline or Deadline(ENDS_S, self._now_s))
        self._given_up.report()
        return ledger

    def stop(self, deadline: Deadline | None = None) -> None:
        """Stop every actor; one that is gone already, or does not answer, is no error."""
        handles = [living.line.handle for living in self._tools.fleet.living.values()]
        self._tools.cluster.stop(handles, (deadline or Deadline(STOP_S, self._now_s)).share(STOP_S).left_s)
        handles += [coming.line.handle for coming in self._restarts.coming.values() if coming.line is not None]
        for handle in handles:
            self._tools.cluster.kill(handle)
        self._tools.fleet.living.clear()
        self._restarts.coming.clear()

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def open_sessions(self, sessions: Sequence[Session]) -> None:
        """Open sessions together, and wait until they are.

        Raises StageError when a stage has no room for one; then none of them is open.
        """
        done = self._openings.open(sessions, START_TIMEOUT_S)
        waiting = Waiting(f"open {', '.join(session.camera for session in sessions)}", self._tools.tell, self._now_s)
        while not done.is_done:
            self._look(LOOK_S)
            waiting.look(sorted(self._tools.procedures.awaited))
        done.result()

    def begin_to_open(self, session: Session, opened: Callable[[], None]) -> Reply[None]:
        """Open one while others run: the next polls do. The reply fails with StageError when it can't be.

        opened: called when it is.
        """
        return self._openings.open([session], OPEN_TIMEOUT_S, opened)

    def add_view(self, session: SessionId, view: View, opened: Callable[[], None] = lambda: None) -> Reply[None]:
        """Let a session have another view: the next polls do. The reply fails with StageError when it can't.

        opened: called when it is watched.
        """
        return self._openings.add_view(session, view, OPEN_TIMEOUT_S, opened)

    def remove_view(self, session: SessionId, view: str) -> None:
        """Let a session have one view less, from the window's end on. Nobody waits for it."""
        self._openings.remove_view(session, view)

    def close_session(self, session: SessionId) -> None:
        """End a session at once; what is under way is dropped and counted."""
        self._openings.close(session)

    def end_session(self, session: SessionId) -> None:
        """Let a session's sources stop now; it then runs to its end by itself."""
        placement = self._table.placements[session]
        placement.is_ending = True
        for stage in self._spec.wiring.sources:
            living = self._tools.fleet.replica(stage, placement.replicas.get(stage, 0))
            if stage in placement.opened and stage not in placement.absent and living is not None:
                living.line.post("end_session", stage, session)

    def poll(self) -> Mapping[str, Mapping[str, StageSnapshot]]:
        """What every actor is doing: by actor name and stage. Sessions that came to their end leave the table.

        Raises CoordinatorError when an actor has died for good; one that can be is replaced.
        """
        deadline = Deadline(LOOK_S, self._now_s)
        reports = self._tools.fleet.ask_for_reports()
        while True:
            self._look(deadline.left_s)
            if all(report.is_done for report in reports) or deadline.is_over:
                break
        self._slow.look()
        self._given_up.end()
        self._given_up.report()
        for placement in [each for each in self._table.placements.values() if self._tools.fleet.has_ended(each)]:
            del self._table.placements[placement.session.id]
        return dict(self._tools.fleet.snapshots)

    @property
    def is_busy(self) -> bool:
        """Is there something under way that goes on with the next poll?"""
        return self._tools.procedures.are_running

    @property
    def expects_answers(self) -> bool:
        """Will an answer come soon with which something goes on? Not of one that has been silent or has loaded for
        seconds."""
        lines = {name: living.line for name, living in self._tools.fleet.living.items()}
        lines |= {name: coming.line for name, coming in self._restarts.coming.items() if coming.line is not None}
        awaited = [lines[name] for name in self._tools.procedures.awaited if name in lines]
        return any(line.silent_s < SILENT_S for line in awaited)

    def ledger(self) -> dict[str, Account]:
        """The account of every edge, both ends and all replicas put together, as reported last."""
        return ledger_of(self._tools)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _look(self, timeout_s: float) -> None:
        """Take what has come, see who has died, and go on with what is under way."""
        self._tools.lines.look(timeout_s)
        take_reports(self._tools)
        for living in [living for living in self._tools.fleet.living.values() if living.line.error is not None]:
            self._restarts.lost(living, living.line.error or CoordinatorError(""))
        self._restarts.look()
        self._tools.procedures.step()
        # In virtual time a batch takes as long as it takes.
        paced = all(placement.session.paced for placement in self._table.placements.values())
        for living in self._tools.fleet.living.values():
            living.line.limit_s = STALL_S if paced else START_TIMEOUT_S

    def _now_ns(self) -> int:
        return round(self._now_s() * NS_PER_S)

    def _plan(self, process: Process) -> ActorPlan:
        edges = tuple(e for e in self._spec.edges if {e.source.stage, e.target.stage} & process.stages.keys())
        num_deaths = self._restarts.num_deaths.get(process.name, 0)
        return ActorPlan(
            name=process.name,
            peer=f"{process.name}-{num_deaths}" if num_deaths else process.name,
            replica=process.replica,
            stages={name: stage_plan(self._spec.types[name].use, stage) for name, stage in process.stages.items()},
            edges=tuple(EdgePlan.of(edge) for edge in edges),
            all_stages=tuple(self._spec.stages),
            checkpoint=self._checkpoint,
            directory=self._directory / "bus",
            log=self._directory / "logs" / f"{process.name}.log",
            modules=self._spec.modules,
        )
