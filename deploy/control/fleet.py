"""The actors that live: each with its line, its place on the bus, and its machine's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy.actor.accounts import EdgeEnds
from deploy.actor.clock import NodeClocks
from deploy.actor.plan import ActorPlan, Address, Report
from deploy.actor.session_plan import SessionSnapshot, StageSnapshot
from deploy.actor.suspects import Work
from deploy.control.calls import CoordinatorError, Line, Reply, Transport
from deploy.control.placement import Process
from deploy.control.sessions import Placement


class Cluster(Transport, Protocol):
    """Where actors are placed and called (deploy/control/cluster.py)."""

    @property
    def node_id(self) -> str:
        """The node that we run on."""

    def place(self, processes: Iterable[Process], plans: Iterable[ActorPlan]) -> Mapping[str, Any]: ...
    def replace(self, process: Process, plan: ActorPlan) -> Any: ...
    def clock_ns(self, handle: Any, timeout_s: float) -> int: ...
    def work_of(self, handle: Any, directory: Path, peer: str) -> Work: ...
    def stop(self, handles: Iterable[Any], timeout_s: float) -> None: ...
    def kill(self, handle: Any) -> None: ...


@dataclass(slots=True, eq=False)
class Living:
    """An actor that runs. peer: its name on the bus.

    pending_report: that has not come yet; requested_at, reported_at: the numbers of it and of the last that came.
    """

    process: Process
    line: Line
    peer: str
    address: Address
    pending_report: Reply[Report] | None = None
    requested_at: int = 0
    reported_at: int = 0


class Fleet:
    """By name."""

    def __init__(self, cluster: Cluster, now_ns: Callable[[], int]) -> None:
        self._cluster = cluster
        self._clocks = NodeClocks(cluster.node_id, now_ns)
        self._num_reports = 0
        self.living: dict[str, Living] = {}
        self.snapshots: dict[str, Mapping[str, StageSnapshot]] = {}

    def add(self, living: Living) -> None:
        """Raises TimeoutError where its machine's clock can't be read."""
        self._read_clock(living)
        self.living[living.process.name] = living

    def remove(self, living: Living) -> None:
        """It has died, or is to."""
        del self.living[living.process.name]
        self.snapshots.pop(living.process.name, None)
        self._cluster.kill(living.line.handle)

    def work_of(self, living: Living, directory: Path) -> Work:
        """What it works on, or did when it died. directory: the actors'."""
        return self._cluster.work_of(living.line.handle, directory, living.peer)

    def has(self, living: Living) -> bool:
        """Does it still live?"""
        return self.living.get(living.process.name) is living

    def of(self, stage: str) -> list[Living]:
        """The replicas of a stage that live."""
        living = [each for each in self.living.values() if stage in each.process.stages]
        return sorted(living, key=lambda each: each.process.replica)

    def in_group(self, group: str) -> list[Living]:
        """The processes of a group that live (deploy/control/placement.py: group_of)."""
        living = [each for each in self.living.values() if each.process.group == group]
        return sorted(living, key=lambda each: each.process.replica)

    def replica(self, stage: str, replica: int) -> Living | None:
        """None when it is not there."""
        return next((living for living in self.of(stage) if living.process.replica == replica), None)

    def origin_ns(self, living: Living, origin_ns: int) -> int:
        """A time of our clock, on that of an actor's machine."""
        return origin_ns + self._clocks.ahead_ns(living.address.node_id)

    def read_clocks(self) -> None:
        """Of the other machines. Each time anew: between two openings clocks drift, and machines sleep."""
        for living in {living.address.node_id: living for living in self.living.values()}.values():
            self._read_clock(living)

    def _read_clock(self, living: Living) -> None:
        handle = living.line.handle
        self._clocks.read(living.address.node_id, lambda timeout_s: self._cluster.clock_ns(handle, timeout_s))

    # ---- reports -----------------------------------------------------------------------------------------------------

    @property
    def num_reports(self) -> int:
        """How often reports were asked for."""
        return self._num_reports

    def ask_for_reports(self) -> list[Reply[Report]]:
        """Of all; who has not answered the last time is not asked again. Returns all that are to come."""
        self._num_reports += 1
        for living in self.living.values():
            if living.pending_report is None:
                living.pending_report, living.requested_at = living.line.post("report"), self._num_reports
        return [living.pending_report for living in self.living.values() if living.pending_report is not None]

    def take_reports(self) -> Mapping[str, Mapping[str, EdgeEnds]]:
        """Those that have come: the accounts in them, by the actor's name on the bus."""
        ends: dict[str, Mapping[str, EdgeEnds]] = {}
        for living in self.living.values():
            if living.pending_report is not None and living.pending_report.is_done:
                if living.pending_report.error is None:
                    report = living.pending_report.result()
                    self.snapshots[living.process.name] = report.stages
                    living.reported_at = living.requested_at
                    ends[living.peer] = report.ends
                else:  # it can't say any more what it does
                    living.line.fail(CoordinatorError(str(living.pending_report.error)))
                living.pending_report = None
        return ends

    def at_end(self, living: Living, placement: Placement) -> SessionSnapshot:
        """How many windows of a session have come to their end there, and how many late, as was reported last."""
        stages = self.snapshots.get(living.process.name, {}) if living.reported_at > placement.since else {}
        seen = [
            stage.sessions[placement.session.id] for stage in stages.values() if placement.session.id in stage.sessions
        ]
        return max(seen, key=lambda each: each.num_windows, default=SessionSnapshot(0, 0))

    def has_ended(self, placement: Placement) -> bool:
        """Has everybody reported, of a time when the session was open, that it is not any more? What is down and comes
        again may still owe its windows."""
        if not placement.is_open or placement.absent or placement.in_hand:
            return False
        replicas = (self.replica(stage, n) for stage, n in placement.replicas.items())
        have_left = (self._has_left(placement, living) for living in replicas if living is not None)
        return next(have_left, False) and all(have_left)

    def has_left(self, placement: Placement, stage: str) -> bool:
        """Is it known to be at a stage no more?"""
        living = self.replica(stage, placement.replicas[stage])
        return placement.is_open and living is not None and self._has_left(placement, living, stage)

    def _has_left(self, placement: Placement, living: Living, at: str | None = None) -> bool:
        """at: one of the process's stages; None: all of them."""
        stages = self.snapshots.get(living.process.name, {})
        is_there = any(placement.session.id in stages[name].sessions for name in stages if at in (None, name))
        return living.reported_at > placement.since and not is_there
