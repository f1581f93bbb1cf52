"""Actors that die are started again in their place, and their sessions go on: at other replicas, or at the new one.

Rule: who pays. A death costs the sessions that lived there what was under way; nobody else waits. What ends sessions:

- one that was in the work of two deaths of its stage in a row (actor/suspects.py), since its data kill, is closed;
- one for which nobody has room any more is closed.

What ends the run: `MAX_DEATHS` within `DEATHS_WITHIN_S` of one stage, none of which can be laid at a session's door
(it dies idle, or can't be brought up), while no other replica of the stage lives. Between two tries to bring it up
there is an ever longer pause; a try takes as long as an actor may take to load, and whoever can goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deploy.actor.accounts import Accounts
from deploy.actor.plan import ActorPlan
from deploy.actor.session_plan import Listener, SessionPlan
from deploy.actor.suspects import NUM_ALONE, Suspects
from deploy.control.calls import (
    ActorDied,
    CallError,
    CoordinatorError,
    Line,
    Lines,
    NowS,
    Procedures,
    Reply,
    Steps,
    failed,
)
from deploy.control.fleet import Cluster, Fleet, Living
from deploy.control.placement import Process
from deploy.control.recovery import Going, announce, redirect, reopen, tell
from deploy.control.sessions import Placement, SessionTable
from deploy.control.wiring import Wiring
from graph.chunk import Scalar, SessionId
from graph.spec import PipelineSpec

START_TIMEOUT_S = 300.0  # a 9 B checkpoint from a slow disk takes minutes
STALL_S = 30.0  # in real time: whoever takes no call for so long is thirty windows late, and is taken for dead
MAX_DEATHS = 3  # what dies at once each time would die for ever
DEATHS_WITHIN_S = 600.0
PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)  # before the first try to bring one up after a death of late, the second, …


class NoSessionLeft(CoordinatorError):
    """The last session was closed, since actors die of its data."""


@dataclass(slots=True, eq=False)
class Coming:
    """An actor that takes the place of a dead one, or will. line None: not before its pause is over."""

    process: Process
    due_s: float
    line: Line | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """What a coordinator has, and lends."""

    spec: PipelineSpec
    cluster: Cluster
    lines: Lines
    procedures: Procedures
    fleet: Fleet
    wiring: Wiring
    table: SessionTable
    accounts: Accounts
    plan: Callable[[Process], ActorPlan]
    tell: Callable[[str], None]
    now_s: NowS


class Deaths:
    """How often each actor has died, and how often of late for no session's sake."""

    def __init__(self, now_s: NowS) -> None:
        self._now_s = now_s
        self._times_s: dict[str, list[float]] = {}
        self._unexplained_s: dict[str, list[float]] = {}

    @property
    def numbers(self) -> Mapping[str, int]:
        return {name: len(times_s) for name, times_s in self._times_s.items()}

    def count(self, name: str, *, explained: bool) -> bool:
        """One more; True when those that nothing explains are too many."""
        self._times_s.setdefault(name, []).append(self._now_s())
        if explained:
            return False
        self._unexplained_s.setdefault(name, []).append(self._now_s())
        return self._num_recent(self._unexplained_s[name]) >= MAX_DEATHS

    def pause_s(self, name: str) -> float:
        """How long to wait before the next try."""
        return PAUSES_S[min(self._num_recent(self._times_s[name]), len(PAUSES_S)) - 1]

    def _num_recent(self, times_s: Sequence[float]) -> int:
        return sum(self._now_s() - each_s < DEATHS_WITHIN_S for each_s in times_s)


class Restarts:
    """Brings up what has died."""

    def __init__(self, tools: Tools, close_session: Callable[[SessionId], None]) -> None:
        """close_session: at once, everywhere."""
        self._tools = tools
        self._close_session = close_session
        self._deaths = Deaths(tools.now_s)
        self._suspects = Suspects(tools.now_s)
        self._remote = Remote(tools, self._suspects)
        self.coming: dict[str, Coming] = {}

    @property
    def num_deaths(self) -> Mapping[str, int]:
        """By actor's name, how often it has died."""
        return self._deaths.numbers

    def lost(self, living: Living, error: CoordinatorError) -> None:
        """An actor has died, or can't go on: another one takes its place.

        Raises the error where it can't be replaced.
        """
        tools, process = self._tools, living.process
        paced = all(placement.session.paced for placement in tools.table.placements.values())
        if process.is_local or not paced:
            raise error
        stage = stage_of(process)
        tools.fleet.remove(living)  # it is as good as dead, and what it noted outlives it
        work = tools.fleet.work_of(living, tools.plan(process).directory)
        self._bury(living)
        tools.tell(f"{error}; stage {work.stage} was at {work.named}" if work.windows else str(error))
        for placement in tools.table.at(process):
            placement.absent.add(stage)
        guilty = self._suspects.died(stage, work.sessions)
        for session in guilty:
            self._end(session, f"{stage} died twice in a row while it worked on its data")
        if guilty and not tools.table.placements.keys() - set(guilty):
            raise NoSessionLeft(f"{error}; no session is left")
        self._try_again(process, error, explained=bool(work.windows))
        tools.procedures.begin(self._resume(process))

    def look(self) -> None:
        """Begin to bring up whose pause is over."""
        for coming in list(self.coming.values()):
            if coming.line is None and self._tools.now_s() >= coming.due_s:
                plan = self._tools.plan(coming.process)
                handle = self._tools.cluster.replace(coming.process, plan)
                coming.line = self._tools.lines.open(coming.process.name, handle, START_TIMEOUT_S)
                self._tools.procedures.begin(self._bring_up(coming.process, plan, coming.line))

    def _try_again(self, process: Process, error: CoordinatorError, *, explained: bool) -> None:
        name = process.name
        too_often = self._deaths.count(name, explained=explained)
        if too_often and not self._tools.fleet.of(stage_of(process)):
            told = f"that was {MAX_DEATHS} times within {DEATHS_WITHIN_S / 60:g} minutes"
            raise CoordinatorError(f"{error}; {told}, and no other {stage_of(process)} is there")
        self.coming[name] = Coming(process, self._tools.now_s() + self._deaths.pause_s(name))

    def _bury(self, dead: Living) -> None:
        """Let all who send to an actor know that it has died."""
        self._tools.accounts.died(dead.peer, ())

        def wait_for(other: Living, buried: Reply[None]) -> Steps[None]:
            yield [buried]
            if buried.error is None:  # what it reports from now on has it
                self._tools.accounts.died(dead.peer, [other.peer])

        for other in self._tools.fleet.living.values():
            if ends := [end[:2] for end in self._tools.wiring.between(other.process, dead.process)]:
                self._tools.procedures.begin(wait_for(other, other.line.post("bury", ends)))

    def _bring_up(self, process: Process, plan: ActorPlan, line: Line) -> Steps[None]:
        """Start an actor again, and let the sessions that wait for it go on."""
        tools = self._tools
        try:
            yield [address := line.post("address")]
            tools.wiring.is_at(process, address.result())
            yield [bound := line.post("bind", tools.wiring.over_tcp(process))]
            tools.wiring.is_bound(process, bound.result())
            before = tools.wiring.outgoing(process)
            line.post("connect", before)
            yield [loaded := line.post("load")]
            loaded.result()
            line.limit_s = STALL_S
            line.post("reconnect", tools.wiring.moved(process, before))
            line.post("bury", tools.wiring.outgoing_to_others_than(process, tools.fleet.living.keys()))
            living = Living(process, line, plan.peer, address.result())
            tools.fleet.add(living)
        except Exception as error:  # what a stage says that can't be built is a death like any other
            line.fail(ActorDied(str(error)))
            tools.cluster.kill(line.handle)
            reason = error if isinstance(error, CoordinatorError) else CallError(f"{process.name}: {error}")
            tools.tell(f"{reason}; it is tried again")
            self._try_again(process, reason, explained=False)
            return
        del self.coming[process.name]
        yield from self._resume(process)
        if not tools.fleet.has(living):  # somebody else comes by now
            return
        # Nothing is sent to it before its sessions are open, nor before who sends knows that it has begun anew.
        for other in tools.fleet.living.values():
            if ends := tools.wiring.between(other.process, process):
                other.line.post("reconnect", ends)
        tools.tell(f"  {process.name} ready again")

    def _resume(self, process: Process) -> Steps[None]:
        """Let the sessions that are open nowhere at a stage go on where there is room, else wait for who comes."""
        tools, stage = self._tools, stage_of(process)
        placements = tools.table.absent_at(stage)
        tried: dict[SessionId, set[str]] = {placement.session.id: set() for placement in placements}
        before = {placement.session.id: placement.replicas[stage] for placement in placements}
        for placement in placements:
            placement.in_hand.add(stage)
        while chosen := self._choose(stage, placements, tried):
            opened = yield from reopen(self._remote, tools.spec, stage, [_going(p) for p, _ in chosen])
            for (placement, living), reply in zip(chosen, opened, strict=True):
                if reply.error is None and tools.fleet.has(living):
                    placements.remove(placement)
                    self._is_resumed(placement, living, process.name)
                else:
                    placement.absent.add(stage)
                    placement.replicas[stage] = before[placement.session.id]
        for placement in placements:
            placement.in_hand.discard(stage)
            if tools.table.holds(placement) and not any(stage in c.process.stages for c in self.coming.values()):
                self._end(placement.session.id, f"no {stage} has room for it any more")

    def _choose(
        self, stage: str, placements: Sequence[Placement], tried: Mapping[SessionId, set[str]]
    ) -> list[tuple[Placement, Living]]:
        """For each session the least loaded replica that it has not tried; its placement is there from now on."""
        chosen: list[tuple[Placement, Living]] = []
        for placement in placements:
            there = [each for each in self._tools.fleet.of(stage) if each.peer not in tried[placement.session.id]]
            if there and self._tools.table.holds(placement):
                loads = self._tools.table.load_of(stage)
                living = min(there, key=lambda each: loads[each.process.replica])
                tried[placement.session.id].add(living.peer)
                placement.replicas[stage] = living.process.replica
                chosen.append((placement, living))
        return chosen

    def _is_resumed(self, placement: Placement, living: Living, dead: str) -> None:
        """A session is open again: who sends to it hears where."""
        tools, stage = self._tools, stage_of(living.process)
        placement.in_hand.discard(stage)
        placement.since = tools.fleet.num_reports
        if not tools.table.holds(placement):  # it was closed meanwhile, there as well: that comes behind its opening
            return
        redirected = redirect(self._remote, tools.spec, stage, _going(placement))
        tools.procedures.begin(announce(self._remote, tools.spec, stage, _going(placement), dead, redirected))

    def announce(self, placement: Placement, kind: str, attrs: dict[str, Scalar]) -> None:
        """Let an event of a session be written."""
        tell(self._remote, self._tools.spec, _going(placement), kind, attrs)

    def _end(self, session: SessionId, reason: str) -> None:
        placement = self._tools.table.placements.get(session)
        if placement is not None:
            self._tools.tell(f"camera {placement.session.camera}: its session is over: {reason}")
            placement.in_hand |= placement.absent  # nobody looks for another replica any more
            self._tools.procedures.begin(self._tell_and_close(placement, reason))

    def _tell_and_close(self, placement: Placement, reason: str) -> Steps[None]:
        """Its last event is on its way before the way is closed."""
        session = placement.session.id
        yield [tell(self._remote, self._tools.spec, _going(placement), "session_closed", {"reason": reason})]
        if self._tools.table.holds(placement):
            self._close_session(session)


def stage_of(process: Process) -> str:
    """Of one that may be replaced: stages with a model have a process of their own (graph/spec_check.py)."""
    (stage,) = process.stages
    return stage


def _going(placement: Placement) -> Going:
    return Going(placement.session, placement.replicas, placement.incarnation)


class Remote:
    """The `Replicas`, by their lines. A session is not to be reached where it is absent."""

    def __init__(self, tools: Tools, suspects: Suspects) -> None:
        self._tools, self._suspects = tools, suspects

    def resume(self, stage: str, going: Going, plan: SessionPlan) -> Reply[None]:
        living, placement = self._tools.fleet.replica(stage, going.replicas[stage]), self._placement(going)
        if living is None or placement is None:
            return _gone(stage, going)
        placement.absent.discard(stage)  # what is posted from now on comes behind this
        nowhere = placement.absent | placement.in_hand
        held = (e.id for e in self._tools.spec.edges if e.source.stage == stage and e.target.stage in nowhere)
        alone_for = NUM_ALONE if self._suspects.goes_on(stage, plan.session.id) else 0
        plan = replace(plan, held=frozenset(held), alone_for=alone_for)
        origin_ns = self._tools.fleet.origin_ns(living, placement.origin_ns)
        return living.line.post("resume_session", stage, plan, origin_ns)

    def listener(self, stage: str, going: Going) -> Reply[Listener | None]:
        return self._post(stage, going, "listener")

    def reroute(self, stage: str, going: Going, edge: str, target: int) -> Reply[bool]:
        return self._post(stage, going, "reroute", edge, target)

    def end_input(self, stage: str, going: Going, edge: str) -> None:
        self._post(stage, going, "end_input", edge)

    def tell(self, stage: str, going: Going, kind: str, attrs: dict[str, Scalar], *, cuts: bool) -> Reply[None]:
        return self._post(stage, going, "tell", kind, attrs, cuts)

    def _post(self, stage: str, going: Going, method: str, *arguments: object) -> Reply[Any]:
        living, placement = self._tools.fleet.replica(stage, going.replicas[stage]), self._placement(going)
        if living is None or placement is None or stage in placement.absent:
            return _gone(stage, going)
        return living.line.post(method, stage, going.session.id, *arguments)

    def _placement(self, going: Going) -> Placement | None:
        """None where it is over; another session may have its name by now."""
        placement = self._tools.table.placements.get(going.session.id)
        return placement if placement is not None and placement.incarnation == going.incarnation else None


def _gone(stage: str, going: Going) -> Reply[Any]:
    return failed(ActorDied(f"{stage}.{going.replicas[stage]} is not there, or {going.session.id} is over"))
