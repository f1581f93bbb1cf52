"""What is counted of the pipeline as a whole: sessions, replicas, restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from deploy.control.placement import Process, replicas_of
from graph.exporter import serve_metrics
from graph.metrics import Metrics

RESTART_REASONS = ("crash",)


class PipelineMeter:
    """Counts for the pipeline as a whole, and serves them, in the process that holds it."""

    def __init__(self, model: str, trained: bool, processes: Sequence[Process]) -> None:
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        metrics.build_info(version("omni-pipeline"), model, trained)
        self._processes = processes
        self._num_replicas = replicas_of(processes)
        self._coordinator = metrics.coordinator(self._num_replicas, RESTART_REASONS)
        self._num_deaths: Counter[str] = Counter()
        self.saw(0, {process.name for process in processes}, {})
        self._server = serve_metrics(registry)

    @property
    def port(self) -> int:
        return self._server.port

    def saw(self, num_sessions: int, alive: Collection[str], num_deaths: Mapping[str, int]) -> None:
        """How things are. alive: the actors that are. num_deaths: of each actor so far."""
        self._coordinator.sessions("open", num_sessions)
        ready = replicas_of(process for process in self._processes if process.name in alive)
        for stage, num_replicas in self._num_replicas.items():
            self._coordinator.replicas(stage, "ready", ready.get(stage, 0))
            self._coordinator.replicas(stage, "starting", num_replicas - ready.get(stage, 0))
        for process in self._processes:
            for _ in range(num_deaths.get(process.name, 0) - self._num_deaths[process.name]):
                for stage in process.stages:
                    self._coordinator.restarted(stage, "crash")
            self._num_deaths[process.name] = num_deaths.get(process.name, 0)

    def stop(self) -> None:
        self._server.stop()
