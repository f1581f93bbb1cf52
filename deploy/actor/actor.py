"""An actor process: one stage replica, or several light stages, and the loop that runs them.

Calls come in on the threads of whoever hosts it (Ray, or deploy/actor/hosted.py) and are handed to the loop's thread,
which alone touches sockets and stages. They are control only: wiring, opening and closing sessions, asking. No chunk
ever travels by a call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry

from deploy.actor.build import build_stage, memory_limit, options_of
from deploy.actor.commands import Commands, Ends
from deploy.actor.measure import StageMeter
from deploy.actor.plan import ActorPlan, Address, Answer, Call, StagePlan
from deploy.actor.runner import StageRunner
from deploy.actor.suspects import WorkNote, note_path
from deploy.process.masked_output import MaskingFormatter
from deploy.process.memory_limit import lift_memory_limit, limit_memory
from deploy.process.packages import check_packages
from deploy.process.printed import log_what_is_printed
from graph.bus import Bus
from graph.chunk import NS_PER_S
from graph.clock import SystemClock
from graph.exporter import serve_metrics
from graph.gather import Gathering
from graph.metrics import EdgeMetrics, Metrics
from stages.catalog import look_beside

T = TypeVar("T")
GAUGE_PERIOD_S = 1.0
INVALID_REASONS = ("version", "kind", "name", "number", "header", "arrays", "dtype", "shape", "attrs", "trace", "grant")
IDLE_S = 0.5  # as in deploy/simulator/actors.py: what is due wakes the loop, and so does what other threads ask for


@dataclass(frozen=True, slots=True)
class Node:
    """The machine that an actor runs on. ip: at which others reach it."""

    id: str
    ip: str


class Actor:
    """The process behind a handle of a driver (deploy/control/cluster.py, deploy/control/processes.py)."""

    def __init__(self, plan: ActorPlan, node: Node) -> None:
        check_packages()
        _log_to(plan.log)
        log_what_is_printed()
        for folder in plan.modules:
            look_beside(folder)
        self._plan = plan
        self._metrics = Metrics(registry := CollectorRegistry())
        self._node = node
        self._server = serve_metrics(registry, host=node.ip)
        self._address = Address(node.id, node.ip, os.getpid(), self._server.port)
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # rung when there is some
        self._failure: str | None = None  # without the name, which the caller adds
        self._edges: dict[str, EdgeMetrics] = {}
        self._gauges_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)
        self._thread.start()

    # ---- the host's threads ------------------------------------------------------------------------------------------

    def clock(self) -> int:
        """The monotonic clock of this node, ns."""
        return time.monotonic_ns()

    def perform(self, calls: Sequence[Call]) -> list[Answer]:
        """Do these, in order, each whatever became of those before it.

        Raises RuntimeError when the loop has failed, with its reason.
        """
        return self._do(lambda: self._commands.perform(calls))

    def stop(self) -> None:
        """End the loop, close sockets and decoders."""
        self._do(lambda: self._commands.close_sessions())
        self._stopping.set()
        os.eventfd_write(self._bell, 1)
        self._thread.join(timeout=5)
        self._server.stop()

    def _do(self, work: Callable[[], T]) -> T:
        """Run `work` in the loop's thread and return what it returns, or raise what it raises."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        if self._failure is not None:
            raise RuntimeError(self._failure)
        self._work.put(run)
        os.eventfd_write(self._bell, 1)
        while True:
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if future.done():  # the work itself timed out
                    raise
                if self._failure is not None:
                    raise RuntimeError(self._failure) from None

    # ---- the loop's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            on_invalid = self._metrics.bus(INVALID_REASONS).invalid
            self._bus = Bus(self._plan.peer, self._plan.directory, on_invalid)
            self._ends = Ends(self._plan, self._bus, self._node.ip, self._observe)
            self._commands = Commands(self._address, self._ends, self._build)
        except OSError as error:
            self._failure = str(error)
            return
        try:
            while not self._stopping.is_set():
                self._turn()
            self._failure = "it has stopped"
        except BaseException as error:  # a thread that ends of one says nothing
            lift_memory_limit()
            logging.exception("%s: the loop has failed", self._plan.name)
            self._failure = f"{type(error).__name__}: {error}"
            self._commands.close_stages()
        self._bus.close()

    def _turn(self) -> None:
        if self._bell in self._bus.woken:
            os.eventfd_read(self._bell)
        while not self._work.empty():
            self._work.get()()
        if not self._commands.runners:
            time.sleep(0.002)  # nothing to run yet: only commands
            return
        loop = self._commands.loop
        due_ns = loop.due_in_ns()
        sleep_s = IDLE_S if due_ns is None else min(due_ns / NS_PER_S, IDLE_S)
        arrivals = self._bus.wait(sleep_s, loop.files() | {self._bell})
        loop.turn(arrivals, self._bus.woken)
        if time.monotonic() >= self._gauges_at:
            self._gauges_at = time.monotonic() + GAUGE_PERIOD_S
            self._set_gauges()

    def _observe(self, edge: str) -> EdgeMetrics:
        self._edges[edge] = self._metrics.edge(edge)
        return self._edges[edge]

    def _set_gauges(self) -> None:
        for edge, senders in self._ends.senders.items():
            gauges = self._edges[edge]
            gauges.queue(sum(s.num_waiting for s in senders), senders[0].rule.limit.chunks if senders else 0)
            gauges.in_flight(sum(s.num_in_flight for s in senders))

    def _build(self) -> list[StageRunner]:
        note = WorkNote(note_path(self._plan.directory, self._plan.peer))
        if limit := memory_limit(self._plan.stages.values()):
            limit_memory(limit)
        shared: dict[type, object] = {}
        return [self._runner(name, stage, shared, note) for name, stage in self._plan.stages.items()]

    def _runner(self, name: str, plan: StagePlan, shared: dict[type, object], note: WorkNote) -> StageRunner:
        stage = build_stage(name, plan, self._plan.checkpoint, shared)
        options, clock = options_of(type(stage), plan), SystemClock()
        return StageRunner(
            name,
            stage,
            {e.id: self._ends.receivers[e.id] for e in self._plan.edges if e.target == name},
            {e.id: self._ends.senders[e.id] for e in self._plan.edges if e.source == name},
            StageMeter(self._metrics, name, stage, self._plan.all_stages, clock),
            Gathering(options.batch, options.wait_ns, options.hold_ns),
            clock,
            note.of,
        )


def _log_to(path: Path) -> None:
    """A disk that is full costs the log, and nothing else."""
    logging.raiseExceptions = False
    handler: logging.Handler = logging.NullHandler()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
