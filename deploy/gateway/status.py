"""What a running pipeline says of itself, to the gateway and to `pipeline ps`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.actor.plan import Address
from deploy.actor.session_plan import SessionSnapshot, StageSnapshot
from deploy.cameras.sources import shown_sources
from deploy.control.placement import Process
from deploy.gateway.exposition import Target
from graph.chunk import SessionId
from graph.ledger import Account
from stages.stage import SourceId, SourceReport


@dataclass(slots=True)
class Status:
    """Written by the thread that runs the pipeline, read by the gateway's; each field is replaced as a whole.

    problem:  why it is not ready (yet, or any more); "" when it is.
    own_port: where the process itself serves its metrics; 0 until it does.
    """

    model: str
    trained: bool
    problem: str = "starting"
    dead: bool = False
    own_port: int = 0
    started_s: float = field(default_factory=time.monotonic)
    processes: Sequence[Process] = ()
    addresses: Mapping[str, Address] = field(default_factory=dict)
    snapshots: Mapping[str, Mapping[str, StageSnapshot]] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by session and view; masked
    last_seen: Mapping[str, SessionSnapshot] = field(default_factory=dict)  # by session, where windows end
    ledger: Mapping[str, Account] = field(default_factory=dict)
    slow: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by process: at which stage, and at what

    def saw(self, snapshots: Mapping[str, Mapping[str, StageSnapshot]]) -> None:
        """What the actors are doing. What was last seen of a session stays, as long as it is shown."""
        self.snapshots = snapshots
        last_seen: dict[str, SessionSnapshot] = {**self.last_seen, **self._at_end()}
        self.last_seen = {session: seen for session, seen in last_seen.items() if session in self.sources}

    def targets(self) -> Sequence[Target]:
        own = Target("127.0.0.1", self.own_port, stage="", replica=0, process="coordinator")
        actors = [
            Target(
                self.addresses[process.name].node_ip,
                self.addresses[process.name].metrics_port,
                stage=",".join(process.stages),
                replica=process.replica,
                process=process.name.rpartition(".")[0],
            )
            for process in self.processes
            if process.name in self.addresses
        ]
        return [own, *actors] if self.own_port else actors

    def alive(self) -> bool:
        return not self.dead

    def ready(self) -> tuple[bool, list[str]]:
        return not self.problem, [self.problem] if self.problem else []

    def snapshot(self) -> Mapping[str, object]:
        return {
            "model": self.model,
            "trained": self.trained,
            "ready": not self.problem,
            "problem": self.problem,
            "uptime_s": round(time.monotonic() - self.started_s, 1),
            "stages": [self._stage_row(process, stage) for process in self.processes for stage in process.stages],
            "sessions": [self._session_row(session, sources) for session, sources in self.sources.items()],
            "edges": {edge: account.as_dict() for edge, account in self.ledger.items()},
        }

    def _stage_row(self, process: Process, stage: str) -> Mapping[str, object]:
        address = self.addresses.get(process.name)
        snapshot = self.snapshots.get(process.name, {}).get(stage)
        at, what = self.slow.get(process.name, ("", ""))
        slow = what if at in ("", stage) else ""
        return {
            "stage": stage,
            "replica": process.replica,
            "process": process.name,
            "pid": address.pid if address else None,
            "node": address.node_ip if address else None,
            "node_id": address.node_id if address else None,
            "state": "busy" if slow else "ready" if snapshot else "starting",
            "sessions": len(snapshot.sessions) if snapshot else 0,
            "units": snapshot.num_units if snapshot else 0,
            "waiting": snapshot.num_ready if snapshot else 0,
            "runs_with": snapshot.runs_with if snapshot else "",
            "busy": slow,
        }

    def _session_row(self, session: str, sources: Mapping[str, str]) -> Mapping[str, object]:
        seen = self.last_seen.get(session, SessionSnapshot(0, 0))
        is_open = any(session in stage.sessions for stages in self.snapshots.values() for stage in stages.values())
        return {
            "session": session,
            "source": shown_sources(sources),
            "state": "running" if is_open else "ended",
            "windows": seen.num_windows,
            "late": seen.num_late,
            "views": [self._view_row(session, view, source, is_open) for view, source in sources.items() if view],
        }

    def _view_row(self, session: str, view: str, source: str, is_open: bool) -> Mapping[str, object]:
        """Of a camera that has several."""
        stages = (stage for stages in self.snapshots.values() for stage in stages.values())
        reports = (stage.sources.get(SourceId(SessionId(session), view)) for stage in stages)
        report = next((report for report in reports if report is not None), SourceReport())
        state = ("up" if report.is_up else "down") if is_open else "ended"
        return {"view": view, "source": source, "state": state, "lost": report.num_lost, "problem": report.problem}

    def _at_end(self) -> dict[str, SessionSnapshot]:
        """Of the sessions that run, what is counted where their windows end; elsewhere nothing is."""
        stages = (stage for stages in self.snapshots.values() for stage in stages.values())
        return {session: seen for stage in stages for session, seen in stage.sessions.items() if seen.num_windows}
