"""An actor process: one stage replica, or several light stages, and the loop that runs them.

Ray calls come in on Ray's threads and are handed to the loop's thread, which alone touches sockets and stages. They
are control only: wiring, opening and closing sessions, asking. No chunk ever travels by a Ray call.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import ray
from prometheus_client import CollectorRegistry

from deploy.accounts import EdgeEnds
from deploy.build import build_stage
from deploy.masked_output import MaskingFormatter
from deploy.measure import StageMeter
from deploy.packages import check_packages
from deploy.plan import ActorPlan, Address
from deploy.runner import ActorLoop, Listener, SessionPlan, StageRunner, StageSnapshot
from graph.bus import Bus
from graph.chunk import NS_PER_S, Scalar, SessionId
from graph.clock import SystemClock
from graph.edge import EdgeRule, Receiver, Sender
from graph.exporter import serve_metrics
from graph.gather import Gathering
from graph.ledger import Account, merge
from graph.metrics import EdgeMetrics, Metrics
from graph.sections import StageSpec
from stages.feed import Feeds

T = TypeVar("T")
GAUGE_PERIOD_S = 1.0
IDLE_S = 0.05  # what Ray's threads ask for waits at most so long
INVALID_REASONS = ("version", "kind", "name", "number", "header", "arrays", "dtype", "shape", "attrs", "trace", "grant")


class Actor:
    """The process behind a Ray actor handle (deploy/coordinator.py makes it one)."""

    def __init__(self, plan: ActorPlan) -> None:
        check_packages()
        _log_to(plan.log)
        self._plan = plan
        self._registry = CollectorRegistry()
        self._metrics = Metrics(self._registry)
        self._server = serve_metrics(self._registry, host=_node_ip())
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._runners: dict[str, StageRunner] = {}
        self._receivers: dict[str, Receiver] = {}
        self._senders: dict[str, list[Sender]] = {}
        self._observers: dict[str, EdgeMetrics] = {}
        self._failure: str | None = None
        self._gauges_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)
        self._thread.start()

    # ---- wiring ------------------------------------------------------------------------------------------------------

    def address(self) -> Address:
        """Returns once the process is up (not yet its models: see `load`)."""
        return Address(ray.get_runtime_context().get_node_id(), _node_ip(), os.getpid(), self._server.port)

    def clock(self) -> int:
        """The monotonic clock of this node, ns."""
        return time.monotonic_ns()

    def bind(self, over_tcp: Mapping[str, bool]) -> dict[str, str]:
        """Open the receiving ends of this actor's edges; returns the endpoints. over_tcp: by edge."""
        return self._do(lambda: {edge: self._bind(edge, tcp) for edge, tcp in over_tcp.items()})

    def connect(self, endpoints: Mapping[str, list[str]]) -> None:
        """Open the sending ends: per edge the endpoints of all replicas of the other stage."""
        self._do(lambda: self._connect(endpoints))

    def bury(self, ends: Sequence[tuple[str, int]]) -> None:
        """Replicas that this actor sends to have died: on which edge, and which one."""
        self._do(lambda: self._bury(ends))

    def reconnect(self, ends: Sequence[tuple[str, int, str]]) -> None:
        """Others have taken their place: on which edge, which one, and its endpoint."""
        self._do(lambda: self._reconnect(ends))

    def load(self) -> None:
        """Build the stages, with their weights. Raises what they raise."""
        self._do(self._load)

    def open_sessions(self, stage: str, plans: Sequence[SessionPlan]) -> None:
        """Raises StageError when there is no room for one; those before it are open then."""

        def work() -> None:
            for plan in plans:
                self._runners[stage].open_session(plan)

        self._do(work)

    def begin_sessions(self, stage: str, origins_ns: Mapping[SessionId, int]) -> None:
        """Let their clocks run, each from event time 0 at its origin, of this node's monotonic clock."""

        def work() -> None:
            for session, origin_ns in origins_ns.items():
                self._runners[stage].begin_session(session, origin_ns)

        self._do(work)

    def end_session(self, stage: str, session: SessionId) -> None:
        """Let a source stop: its stream ends now."""
        self._do(lambda: self._runners[stage].end_session(session))

    def close_session(self, stage: str, session: SessionId) -> None:
        self._do(lambda: self._runners[stage].close_session(session))

    def reroute(self, stage: str, session: SessionId, edge: str, replica: int) -> bool:
        """See `StageRunner.reroute`."""
        return self._do(lambda: self._runners[stage].reroute(session, edge, replica))

    def end_input(self, stage: str, session: SessionId, edge: str) -> None:
        """See `StageRunner.end_input`."""
        self._do(lambda: self._runners[stage].end_input(session, edge))

    def tell(self, stage: str, session: SessionId, kind: str, attrs: Mapping[str, Scalar], cuts: bool) -> None:
        """See `StageRunner.tell`."""
        self._do(lambda: self._runners[stage].tell(session, kind, attrs, cuts=cuts))

    # ---- asking ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, StageSnapshot]:
        """What each stage here is doing. Raises RuntimeError when the loop has failed, with its reason."""
        return self._do(lambda: {name: runner.snapshot() for name, runner in self._runners.items()})

    def listener(self, stage: str, session: SessionId) -> Listener | None:
        """See `StageRunner.listener`."""
        return self._do(lambda: self._runners[stage].listener(session))

    def accounts(self) -> dict[str, EdgeEnds]:
        """This actor's ends of its edges."""
        return self._do(self._accounts)

    def stop(self) -> None:
        """End the loop, close sockets and decoders."""
        self._do(self._close_sessions)
        self._stopping.set()
        self._thread.join(timeout=5)
        self._server.stop()

    # ---- the loop's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._feeds = Feeds()
            self._bus = Bus(self._plan.peer, self._plan.directory, self._metrics.bus(INVALID_REASONS).invalid)
        except OSError as error:
            self._failure = f"{self._plan.name}: {error}"
            return
        try:
            while not self._stopping.is_set():
                self._turn()
            self._failure = f"{self._plan.name} has stopped"
        except Exception as error:
            logging.exception("%s: the loop has failed", self._plan.name)
            self._failure = f"{self._plan.name}: {type(error).__name__}: {error}"
            self._close_stages()
        self._bus.close()

    def _turn(self) -> None:
        while not self._commands.empty():
            self._commands.get()()
        if not self._runners:
            time.sleep(0.002)  # nothing to run yet: only commands
            return
        due_ns = self._loop.due_in_ns()
        sleep_s = IDLE_S if due_ns is None else min(due_ns / NS_PER_S, IDLE_S)
        self._loop.turn(self._bus.wait(sleep_s, self._loop.files()))
        if time.monotonic() >= self._gauges_at:
            self._gauges_at = time.monotonic() + GAUGE_PERIOD_S
            self._set_gauges()

    def _bind(self, edge: str, over_tcp: bool) -> str:
        rule = self._rule(edge)
        receiver, endpoint = self._bus.bind(rule, _node_ip() if over_tcp else None, self._observer(edge))
        self._receivers[edge] = receiver
        return endpoint

    def _connect(self, endpoints: Mapping[str, list[str]]) -> None:
        for edge, replicas in endpoints.items():
            rule, observer = self._rule(edge), self._observer(edge)
            self._senders[edge] = [self._bus.connect(rule, endpoint, observer) for endpoint in replicas]

    def _bury(self, ends: Sequence[tuple[str, int]]) -> None:
        for edge, replica in ends:
            self._bus.bury(self._senders[edge][replica])

    def _reconnect(self, ends: Sequence[tuple[str, int, str]]) -> None:
        for edge, replica, endpoint in ends:
            self._bus.reconnect(self._senders[edge][replica], endpoint, self._observer(edge))

    def _load(self) -> None:
        runners = [self._runner(name, spec) for name, spec in self._plan.stages.items()]
        self._loop = ActorLoop(runners)
        self._runners = {runner.name: runner for runner in runners}

    def _runner(self, name: str, spec: StageSpec) -> StageRunner:
        stage = build_stage(name, spec, self._plan.checkpoint, self._feeds)
        return StageRunner(
            name,
            stage,
            {e.id: self._receivers[e.id] for e in self._plan.edges if e.target.stage == name},
            {e.id: self._senders[e.id] for e in self._plan.edges if e.source.stage == name},
            StageMeter(self._metrics, name, stage, self._plan.all_stages),
            Gathering(spec.batch, spec.wait_ns),
            SystemClock(),
        )

    def _accounts(self) -> dict[str, EdgeEnds]:
        return {
            edge.id: EdgeEnds(
                merge(sender.account() for sender in self._senders.get(edge.id, ())),
                receiver.account() if (receiver := self._receivers.get(edge.id)) else Account(),
                {peer.decode(): number for peer, number in receiver.arrived.items()} if receiver else {},
            )
            for edge in self._plan.edges
        }

    def _set_gauges(self) -> None:
        for edge, senders in self._senders.items():
            capacity = senders[0].rule.limit.chunks if senders else 0
            self._observers[edge].queue(sum(s.num_waiting for s in senders), capacity)
            self._observers[edge].in_flight(sum(s.num_in_flight for s in senders))

    def _rule(self, edge: str) -> EdgeRule:
        spec = next(e for e in self._plan.edges if e.id == edge)
        return EdgeRule(edge, spec.credit, spec.when_full)

    def _observer(self, edge: str) -> EdgeMetrics:
        if edge not in self._observers:
            self._observers[edge] = self._metrics.edge(edge)
        return self._observers[edge]

    # ---- from Ray's threads into the loop's --------------------------------------------------------------------------

    def _do(self, work: Callable[[], T]) -> T:
        """Run `work` in the loop's thread and return what it returns, or raise what it raises."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        if self._failure is not None:
            raise RuntimeError(self._failure)
        self._commands.put(command)
        while True:
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if future.done():  # the work itself timed out
                    raise
                if self._failure is not None:
                    raise RuntimeError(self._failure) from None

    def _close_sessions(self) -> None:
        for runner in self._runners.values():
            for session in runner.snapshot().sessions:
                runner.close_session(session)

    def _close_stages(self) -> None:
        """After a failure: files and decoders are closed; the sockets' other ends will find out by themselves."""
        for runner in self._runners.values():
            for session in runner.snapshot().sessions:
                runner.stage.close_session(session)


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
