"""Actors that die are started again in their place, and their sessions are resumed there, or at other replicas.

Rule: who pays. A death costs the sessions that lived there what was under way; nobody else waits. What ends sessions:

- one that was in the work of two deaths of its process in a row (actor/suspects.py), since its data kill, is closed; or
  it goes on without the stage, where that is on a side branch;
- one for which nobody has room any more is closed.

No death ends the run while a session is left. Between two tries to bring an actor up there is an ever longer pause, a
minute at last; a try takes as long as an actor may take to load, and all others continue meanwhile.
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
from deploy.control.placement import Process, group_of
from deploy.control.recovery import Resumption, announce, redirect, reopen, tell
from deploy.control.routing import is_aside
from deploy.control.sessions import Placement, SessionTable
from deploy.control.wiring import Wiring
from graph.chunk import NS_PER_S, Scalar, SessionId
from graph.spec import PipelineSpec

START_TIMEOUT_S = 300.0  # a 9 B checkpoint from a slow disk takes minutes
STALL_S = 30.0  # in real time: whoever takes no call for so long is thirty windows late, and is taken for dead
DEATHS_WITHIN_S = 600.0  # those before are forgotten
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
    """How often each actor has died, and how often of late."""

    def __init__(self, now_s: NowS) -> None:
        self._now_s = now_s
        self._times_s: dict[str, list[float]] = {}

    @property
    def numbers(self) -> Mapping[str, int]:
        return {name: len(times_s) for name, times_s in self._times_s.items()}

    def count(self, name: str) -> int:
        """One more; returns how many there were of late."""
        times_s = self._times_s.setdefault(name, [])
        times_s.append(self._now_s())
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
        if not all(placement.session.paced for placement in tools.table.placements.values()):
            raise error
        for placement in tools.table.at(process):
            seen = tools.fleet.at_end(living, placement)
            placement.num_windows = max(placement.num_windows, seen.num_windows)
            placement.num_late = max(placement.num_late, seen.num_late)
        tools.fleet.remove(living)  # it is as good as dead, and what it noted outlives it
        work = tools.fleet.work_of(living, tools.plan(process).directory)
        self._bury(living)
        tools.tell(f"{error}; stage {work.stage} was at {work.named}" if work.windows else str(error))
        for placement in tools.table.at(process):
            placement.absent |= process.stages.keys() & placement.replicas.keys()
        guilty = self._suspects.died(process.group, work.sessions)
        ended = [session for session in guilty if not self._goes_on_without(session, work.stage)]
        for session in ended:
            self._end(session, _killed_by_data(process.group))
        if ended and not tools.table.placements.keys() - set(ended):
            raise NoSessionLeft(f"{error}; no session is left")
        self._try_again(process)
        tools.procedures.begin(self._resume(process))

    def _goes_on_without(self, session: SessionId, stage: str) -> bool:
        """Give a session up at the stage that its data kill, where no window of it ends there or behind it."""
        tools, placement = self._tools, self._tools.table.placements.get(session)
        if placement is None or not is_aside(tools.spec, stage, placement.session):
            return False
        placement.given_up[stage] = _killed_by_data(group_of(stage, tools.spec.stages[stage]))
        return True

    def look(self) -> None:
        """Begin to bring up whose pause is over."""
        for coming in list(self.coming.values()):
            if coming.line is None and self._tools.now_s() >= coming.due_s:
                plan = self._tools.plan(coming.process)
                handle = self._tools.cluster.replace(coming.process, plan)
                coming.line = self._tools.lines.open(coming.process.name, handle, START_TIMEOUT_S)
                self._tools.procedures.begin(self._bring_up(coming.process, plan, coming.line))

    def _try_again(self, process: Process) -> None:
        """Let it be brought up: at once, or after a pause where it has died of late."""
        num_recent = self._deaths.count(process.name)
        pause_s = PAUSES_S[min(num_recent, len(PAUSES_S)) - 1]
        self.coming[process.name] = Coming(process, self._tools.now_s() + pause_s)
        if pause_s:
            within = f"{num_recent} times within {DEATHS_WITHIN_S / 60:g} minutes"
            self._tools.tell(f"{process.name} has died {within}: it is tried again in {pause_s:g} s")

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
            tools.tell(str(reason))
            self._try_again(process)
            return
        del self.coming[process.name]
        yield from self._resume(process)
        if not tools.fleet.has(living):  # somebody else comes by now
            return
        # Nothing is sent to it before its sessions are open, nor before who sends knows that it has begun anew.
        for other in tools.fleet.living.values():
            ends = tools.wiring.between(other.process, process)
            if ends and other is not living:  # it has reached itself before
                other.line.post("reconnect", ends)
        tools.tell(f"  {process.name} ready again")

    def _resume(self, process: Process) -> Steps[None]:
        """Let the sessions that are open nowhere at its stages go on where there is room, else wait for what comes."""
        tools, stages = self._tools, self._stages_of(process)
        placements = tools.table.absent_at(stages)
        tried: dict[SessionId, set[str]] = {placement.session.id: set() for placement in placements}
        before = {p.session.id: {s: p.replicas[s] for s in stages if s in p.replicas} for p in placements}
        for placement in placements:
            placement.in_hand.update(stages)
        while chosen := self._choose(process, placements, tried):
            opened = yield from reopen(self._remote, tools.spec, stages, [self._resumption(p) for p in chosen])
            for placement, reply in zip(chosen, opened, strict=True):
                stage = next(iter(before[placement.session.id]))
                living = tools.fleet.replica(stage, placement.replicas[stage])  # which may have been replaced meanwhile
                if reply.error is None and living is not None:
                    placements.remove(placement)
                    self._is_resumed(placement, living, process.name)
                else:
                    placement.absent |= before[placement.session.id].keys()
                    placement.replicas |= before[placement.session.id]
        for placement in placements:
            placement.in_hand.difference_update(stages)
            if tools.table.holds(placement) and not any(c.process.group == process.group for c in self.coming.values()):
                self._end(placement.session.id, f"no {process.group} has room for it any more")

    def _choose(
        self, process: Process, placements: Sequence[Placement], tried: Mapping[SessionId, set[str]]
    ) -> list[Placement]:
        """Those that have a replica which they have not tried; they are placed at the least loaded from now on."""
        chosen: list[Placement] = []
        for placement in placements:
            replicas = self._tools.fleet.in_group(process.group)
            there = [each for each in replicas if each.peer not in tried[placement.session.id]]
            if there and self._tools.table.holds(placement):
                here = [stage for stage in process.stages if stage in placement.replicas]
                loads = self._tools.table.load_of(here[0])
                living = min(there, key=lambda each: loads[each.process.replica])
                tried[placement.session.id].add(living.peer)
                placement.replicas.update(dict.fromkeys(here, living.process.replica))
                chosen.append(placement)
        return chosen

    def _is_resumed(self, placement: Placement, living: Living, dead: str) -> None:
        """A session is open again: who sends to it hears where."""
        tools, stages = self._tools, self._stages_of(living.process)
        placement.in_hand.difference_update(stages)
        placement.since = tools.fleet.num_reports
        if not tools.table.holds(placement):  # it was closed meanwhile, there as well: that comes behind its opening
            return
        if placement.is_ending:
            for stage in tools.spec.wiring.sources:
                if stage in stages and stage in placement.replicas:
                    living.line.post("end_session", stage, placement.session.id)
        resumed = self._resumption(placement)
        redirected = redirect(self._remote, tools.spec, stages, resumed)
        tools.procedures.begin(announce(self._remote, tools.spec, stages, resumed, dead, redirected))

    def _stages_of(self, process: Process) -> list[str]:
        """Downstream first."""
        return [stage for stage in self._tools.spec.wiring.downstream_first if stage in process.stages]

    def _resumption(self, placement: Placement) -> Resumption:
        resume_ns = round(self._tools.now_s() * NS_PER_S) - placement.origin_ns
        session = replace(placement.session, resume_ns=resume_ns)
        removed = tuple(sorted(placement.removed_views))
        windows, late = placement.num_windows, placement.num_late
        return Resumption(session, placement.replicas, placement.incarnation, windows, removed, late)

    def announce(self, placement: Placement, kind: str, attrs: dict[str, Scalar]) -> None:
        """Let an event of a session be written."""
        tell(self._remote, self._tools.spec, self._resumption(placement), kind, attrs)

    def _end(self, session: SessionId, reason: str) -> None:
        placement = self._tools.table.placements.get(session)
        if placement is not None:
            self._tools.tell(f"camera {placement.session.camera}: its session is over: {reason}")
            placement.in_hand |= placement.absent  # nobody looks for another replica any more
            self._tools.procedures.begin(self._tell_and_close(placement, reason))

    def _tell_and_close(self, placement: Placement, reason: str) -> Steps[None]:
        """Its last event is on its way before the way is closed."""
        session = placement.session.id
        closed = self._resumption(placement)
        yield [tell(self._remote, self._tools.spec, closed, "session_closed", {"reason": reason})]
        if self._tools.table.holds(placement):
            self._close_session(session)


class Remote:
    """The `Replicas`, by their lines. A session is not to be reached where it is absent."""

    def __init__(self, tools: Tools, suspects: Suspects) -> None:
        self._tools, self._suspects = tools, suspects

    def resume(self, resumed: Resumption, plans: Mapping[str, SessionPlan]) -> Reply[None]:
        spec, placement, session = self._tools.spec, self._placement(resumed), resumed.session.id
        stage = next(iter(plans))
        living = self._tools.fleet.replica(stage, resumed.replicas[stage])
        if living is None or placement is None:
            return _gone(stage, resumed)
        placement.absent -= plans.keys()  # what is posted from now on comes behind this
        nowhere = (placement.absent | placement.in_hand) - plans.keys()
        held = frozenset(edge.id for edge in spec.edges if edge.source.stage in plans and edge.target.stage in nowhere)
        alone_for = NUM_ALONE if self._suspects.is_suspect(group_of(stage, spec.stages[stage]), session) else 0
        plans = {
            name: replace(plan, held=held, alone_for=alone_for, given_up=placement.given_up.get(name, ""))
            for name, plan in plans.items()
        }
        return living.line.post("resume_session", plans, self._tools.fleet.origin_ns(living, placement.origin_ns))

    def listener(self, stage: str, resumed: Resumption) -> Reply[Listener | None]:
        return self._post(stage, resumed, "listener")

    def reroute(self, stage: str, resumed: Resumption, edge: str, target: int) -> Reply[int | None]:
        return self._post(stage, resumed, "reroute", edge, target)

    def end_input(self, stage: str, resumed: Resumption, edge: str, num_windows: int) -> None:
        self._post(stage, resumed, "end_input", edge, num_windows)

    def tell(self, stage: str, resumed: Resumption, kind: str, attrs: dict[str, Scalar], *, cuts: bool) -> Reply[None]:
        return self._post(stage, resumed, "tell", kind, attrs, cuts)

    def _post(self, stage: str, resumed: Resumption, method: str, *arguments: object) -> Reply[Any]:
        living, placement = self._tools.fleet.replica(stage, resumed.replicas[stage]), self._placement(resumed)
        if living is None or placement is None or stage in placement.absent:
            return _gone(stage, resumed)
        return living.line.post(method, stage, resumed.session.id, *arguments)

    def _placement(self, resumed: Resumption) -> Placement | None:
        """None where it is over; another session may have its name by now."""
        placement = self._tools.table.placements.get(resumed.session.id)
        return placement if placement is not None and placement.incarnation == resumed.incarnation else None


def _killed_by_data(group: str) -> str:
    return f"{group} died twice in a row while it worked on its data"


def _gone(stage: str, resumed: Resumption) -> Reply[Any]:
    return failed(ActorDied(f"{stage}.{resumed.replicas[stage]} is not there, or {resumed.session.id} is over"))
