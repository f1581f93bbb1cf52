"""`pipeline up`: from a checked description to running sessions, and cleanly back."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.cameras.live_cameras import LiveCameras
from deploy.cameras.source_watch import SourceWatch
from deploy.cameras.sources import check_cameras
from deploy.control import ray_environment
from deploy.control.capacity import Demand, admit
from deploy.control.ending import DRAIN_S, END_S, drain_s
from deploy.gateway.gateway_server import GatewayServer
from deploy.gateway.observe import build_gateway
from deploy.gateway.status import Status
from deploy.process.deadline import Deadline
from deploy.process.interrupts import Interrupted, Interrupts
from deploy.run.checkpoints import Checkpoint, open_checkpoint
from deploy.run.gpu_memory import check_gpu_memory
from deploy.run.pipeline_meter import PipelineMeter
from deploy.run.state import Running, StateFolder
from deploy.run.watched import SessionOptions, Watched
from graph.errors import GraphError
from graph.ledger import Account
from graph.sections import CameraSpec
from graph.spec import PipelineSpec
from stages.session import ListenerAction

if TYPE_CHECKING:
    from deploy.control.coordinator import Coordinator

POLL_S = 0.25
BUSY_S = 0.02  # between two looks while a camera opens, or moves


class UpError(GraphError):
    """The pipeline can't start; says what, where and what instead."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line adds to the description. duration_ns None: as long as the sources can.

    wait_for_cameras_s: see `check_cameras`.
    """

    duration_ns: int | None = None
    out: Path | None = None
    paced: bool = True
    listener: tuple[ListenerAction, ...] = ()
    address: str | None = None
    state: StateFolder | None = None
    wait_for_cameras_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. interrupted: by Ctrl-C. in_vain: by itself, and no source ever gave anything. problem: what was
    missing at its end, so that sessions could not come to theirs; "" for nothing."""

    interrupted: bool
    in_vain: bool
    ledger: Mapping[str, Account]
    out: Path | None
    problem: str = ""


def run_up(spec: PipelineSpec, options: UpOptions, tell: Callable[[str], None]) -> Outcome:
    """Run the pipeline until its sources end, or until it is interrupted. tell: one line for the user.

    Raises UpError, GraphError, StageError, ModelError or GatewayError with one clear message; whatever was started
    before has been stopped then.
    """
    state = options.state or StateFolder(Path.cwd())
    if (other := state.read()) is not None:
        raise UpError(
            f"a pipeline of this folder is running already (pid {other.pid}, {other.url}); `pipeline down` it"
        )
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(state.hold())
        stack.callback(state.forget)  # the last thing, so that who sees it gone may start another
        _check_output(options.out)
        checkpoint = open_checkpoint(spec, tell)
        spec = checkpoint.fit(spec)
        if options.paced:
            admit(spec, Demand.described(spec))
        checkpoint.check_tensors(spec)
        cameras = check_cameras(spec, options.duration_ns, tell, options.wait_for_cameras_s)
        if not (options.address or os.environ.get("RAY_ADDRESS")):
            checkpoint.check_memory(spec)
            check_gpu_memory(spec, checkpoint.config, len(spec.cameras))
        status = Status(model=spec.model, trained=checkpoint.trained)
        state.create()
        live = LiveCameras(spec, paced=options.paced, keeps_files=options.out is not None)
        token = secrets.token_urlsafe(32)
        gateway = GatewayServer(build_gateway(status, live, token), spec.console.host, spec.console.port)
        gateway.start()
        stack.callback(gateway.stop)
        stack.callback(live.close)
        state.write(Running(os.getpid(), gateway.url, token, str(state.path)))
        return _Run(spec, options, checkpoint, state, status, gateway.url, interrupts, live, tell).run(cameras)


class _Run:
    """One run, from the cluster to the last ledger."""

    def __init__(
        self,
        spec: PipelineSpec,
        options: UpOptions,
        checkpoint: Checkpoint,
        state: StateFolder,
        status: Status,
        url: str,
        interrupts: Interrupts,
        live: LiveCameras,
        tell: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._options = options
        self._checkpoint = checkpoint
        self._state = state
        self._status = status
        self._url = url
        self._interrupts = interrupts
        self._live = live
        self._ending: Deadline | None = None  # once an end was asked for
        self._problem = ""  # which the run has ended for
        self._tell = tell
        self._sources = SourceWatch(tell)
        needs_pictures = checkpoint.config.generation.needs_pictures
        common = SessionOptions(options.duration_ns, options.out, options.paced, options.listener, needs_pictures)
        self._watched = Watched(spec, common, status, self._sources, tell)

    def run(self, cameras: Mapping[str, CameraSpec]) -> Outcome:
        # Ray is imported here: what can be refused without it has been refused by now, and its environment is set.
        address = self._options.address or os.environ.get("RAY_ADDRESS")
        ray_environment.prepare(address)
        from deploy.control.cluster import connect
        from deploy.control.coordinator import Coordinator
        from deploy.control.placement import processes_of

        processes = processes_of(self._spec)
        self._tell(f"starting {len(processes)} processes on Ray")
        with ExitStack() as stack:
            cluster = connect(processes, address, self._state.path / "ray")
            stack.callback(cluster.close)
            self._interrupts.listen()
            self._interrupts.check()
            path = self._checkpoint.path.absolute()
            coordinator = Coordinator(self._spec, path, self._state.path, cluster, self._tell)
            stack.callback(lambda: coordinator.stop(self._ending))
            coordinator.start()
            self._status.processes, self._status.addresses = coordinator.processes, coordinator.actors
            self._watched.begin(coordinator, cameras)
            meter = PipelineMeter(self._spec.model, self._status.trained, coordinator.processes)
            stack.callback(meter.stop)
            self._status.own_port = meter.port
            self._status.problem = ""
            self._tell(f"running: {len(cameras)} session(s); status {self._url}/api/v1/ps, metrics {self._url}/metrics")
            try:
                self._wait(coordinator, meter)
            except Interrupted:  # the second time: nobody is waited for
                pass
            finally:
                self._interrupts.ignore()  # what is left has an end of its own
                self._live.close()
                self._status.problem = "stopping"
                ledger = coordinator.end(self._ending)  # also of a run that breaks
                self._write_ledger(ledger)
            self._tell("stopping")
        for source, problem in self._sources.unreported.items():
            self._tell(f"camera {source}: {problem or 'gave neither picture nor sound'}")
        in_vain = self._sources.is_all_silent and not self._interrupts.count
        return Outcome(self._interrupts.is_ctrl_c, in_vain, ledger, self._options.out, self._problem)

    def _wait(self, coordinator: Coordinator, meter: PipelineMeter) -> None:
        """Until every session has ended, by itself or because a signal has asked for it, or no time is left for that.

        The second signal raises.
        """
        drain: Deadline | None = None
        behind: Deadline | None = None  # what is on side branches only
        self._interrupts.graceful = True
        self._live.begin(self._watched.until_s)
        while coordinator.sessions:
            if self._interrupts.count and drain is None:
                drain = Deadline(drain_s(self._spec))
                self._ending = Deadline(drain_s(self._spec) + END_S - DRAIN_S)
                self._live.close()
                at_once = "; Ctrl-C again ends at once" if self._interrupts.is_ctrl_c else ""
                self._tell(f"ending: the listener hears what was said{at_once}")
                for session in coordinator.sessions:
                    coordinator.end_session(session)
            if drain is not None and drain.is_over:
                break
            left = coordinator.behind if self._options.paced else ()  # in virtual time nothing is too late
            behind = (behind or Deadline(drain_s(self._spec))) if left else None
            if behind is not None and behind.is_over and drain is None:
                late = ", ".join(sorted(left))
                self._tell(f"all windows have come to their end; what {late} is still at is dropped")
                break
            if self._waits_in_vain(coordinator):
                self._problem = coordinator.problem
                self._tell(f"{self._problem}: the run ends without")
                break
            self._live.answer(self._watched)
            self._poll(coordinator, meter)
            self._state.keep()
            if coordinator.sessions:
                self._live.wait(BUSY_S if coordinator.expects_answers else POLL_S)

    def _waits_in_vain(self, coordinator: Coordinator) -> bool:
        """Is the time over that was asked for, and what the sessions' ends still need is not there?"""
        until_s = self._watched.until_s
        return until_s is not None and time.monotonic() > until_s + drain_s(self._spec) and bool(coordinator.problem)

    def _poll(self, coordinator: Coordinator, meter: PipelineMeter) -> None:
        """Look at the actors once, and let the gateway and the metrics know."""
        before = coordinator.sessions
        snapshots = coordinator.poll()
        self._status.saw(snapshots)
        self._status.slow = coordinator.slow
        self._sources.saw(snapshots)
        for session in set(before) - set(coordinator.sessions):
            self._live.ended(session)
            self._sources.ended(session)
        self._status.ledger = coordinator.ledger()
        self._status.addresses, self._status.problem = coordinator.actors, coordinator.problem
        meter.saw(len(coordinator.sessions), coordinator.actors, coordinator.num_deaths)

    def _write_ledger(self, ledger: Mapping[str, Account]) -> None:
        if self._options.out is not None:
            self._options.out.mkdir(parents=True, exist_ok=True)  # it may have been removed meanwhile
            rows = {edge: account.as_dict() for edge, account in ledger.items()}
            (self._options.out / "ledger.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _check_output(out: Path | None) -> None:
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "ledger.json").touch()  # it is written at the end, but that it can be is seen first
        (out / "ledger.json").unlink()
    except OSError as error:
        raise UpError(f"--out {out}: can't be written to: {error.strerror}") from error
