"""Sessions in real time on the tiny checkpoint, beside the same without batches across sessions.

Two pipelines stand side by side, the described one and one whose model stages take one session's window at a time and
wait for no other (`batch: 1`, `wait: 0s`). For each number of sessions first one serves them, then the other: cameras
at 1 fps showing test://pattern, with their microphone. Windows after the warm-up count.

Options: OMNI_BENCH_SESSIONS, the numbers of sessions (default: 1,2,4,8); OMNI_BENCH_SECONDS, how long each is measured
(default: 10; all of it then takes three minutes).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy import ray_environment
from deploy.bench import ROOT, BenchError, Row, command_of, less_is_better, more_is_better, option
from deploy.build import MODEL_STAGES
from deploy.checkpoints import Checkpoint, open_checkpoint
from graph.chunk import SessionId
from graph.spec import PipelineSpec, load_spec
from stages.stage import Session

NAME = "sessions"
NUM_SESSIONS = "1,2,4,8"
MEASURED_S = "10"
NUM_WARM_UP_WINDOWS = 2
DRAIN_S = 10.0  # after the sources' end; the listener may still have a lead to hear
RIVAL = "the same sessions, one at a time in each model stage (batch: 1, wait: 0s)"
TINY = ["model=tiny"]
UNBATCHED = [f"stages.{stage}.{setting}" for stage in MODEL_STAGES for setting in ("batch=1", "wait=0s")]


def run() -> list[Row]:
    """Four rows per number of sessions: windows on time, latency p50 and p99, CPU."""
    measured_s = float(option("SECONDS", MEASURED_S))
    counts = [int(count) for count in option("SESSIONS", NUM_SESSIONS).split(",")]
    with _pipelines() as (ours, rival):
        return [row for n in counts for row in _rows(n, ours.serve(n, measured_s), rival.serve(n, measured_s))]


@dataclass(frozen=True, slots=True)
class Served:
    """How some sessions went. latencies_s: of every window after the warm-up, from its end to the sink."""

    latencies_s: list[float]
    on_time: list[bool]
    cpu_s: float  # of all actors and decoders, per second of one session


def _rows(num_sessions: int, ours: Served, rival: Served) -> list[Row]:
    name, command = f"{num_sessions} session{'s' if num_sessions > 1 else ''}", command_of(NAME)
    percent = [100 * sum(served.on_time) / len(served.on_time) for served in (ours, rival)]
    p50, p99 = ([float(np.percentile(s.latencies_s, q)) * 1000 for s in (ours, rival)] for q in (50, 99))
    return [
        more_is_better(f"{name}: windows on time", percent[0], "%", RIVAL, percent[1], command),
        less_is_better(f"{name}: window latency p50", p50[0], "ms", RIVAL, p50[1], command),
        less_is_better(f"{name}: window latency p99", p99[0], "ms", RIVAL, p99[1], command),
        less_is_better(f"{name}: CPU per session", ours.cpu_s, "s/s", RIVAL, rival.cpu_s, command),
    ]


class Pipeline:
    """A pipeline that runs, and serves as many sessions as it is asked to."""

    def __init__(self, name: str, spec: PipelineSpec, checkpoint: Checkpoint, folder: Path) -> None:
        from deploy.coordinator import Coordinator

        self._name = name
        self._folder = folder / name
        self.coordinator = Coordinator(spec, checkpoint.path, self._folder)

    def serve(self, num_sessions: int, measured_s: float) -> Served:
        """Open sessions, measure for so long after the warm-up, and let them come to their end."""
        _tell(f"{self._name}: {num_sessions} session(s)")
        out = self._folder / f"{num_sessions}-sessions"
        sessions = [SessionId(f"{self._name}-{n}") for n in range(num_sessions)]
        self.coordinator.open_sessions([Session(session, session, "test://pattern", out=out) for session in sessions])
        time.sleep(NUM_WARM_UP_WINDOWS)
        begin_s, cpu_s = time.monotonic(), self._cpu_s()
        time.sleep(measured_s)
        cpu_s = (self._cpu_s() - cpu_s) / (time.monotonic() - begin_s)
        self._end(sessions)
        windows = [row for row in _read(out / "windows.jsonl") if row["index"] >= NUM_WARM_UP_WINDOWS]
        if not windows:
            raise BenchError(f"{num_sessions} session(s) made no window in {measured_s:g} s; see {self._folder}/logs")
        return Served([w["latency_s"] for w in windows], [w["on_time"] for w in windows], cpu_s / num_sessions)

    def _end(self, sessions: list[SessionId]) -> None:
        for session in sessions:
            self.coordinator.end_session(session)
        deadline_s = time.monotonic() + DRAIN_S
        while self.coordinator.sessions and time.monotonic() < deadline_s:
            time.sleep(0.2)
            self.coordinator.poll()
        for session in self.coordinator.sessions:
            self.coordinator.close_session(session)

    def _cpu_s(self) -> float:
        """What the actors have used so far, and the decoders that are their children."""
        actors = [psutil.Process(address.pid) for address in self.coordinator.actors.values()]
        times = [p.cpu_times() for actor in actors for p in (actor, *actor.children(recursive=True))]
        return float(sum(t.user + t.system for t in times))


@contextmanager
def _pipelines() -> Iterator[tuple[Pipeline, Pipeline]]:
    """Ours and the rival, in one Ray."""
    settings = {"batched": TINY, "unbatched": [*TINY, *UNBATCHED]}
    specs = {name: load_spec(ROOT / "pipeline.yaml", sets) for name, sets in settings.items()}
    checkpoint = open_checkpoint(specs["batched"], _tell)
    ray_environment.prepare(None)
    from deploy.cluster import connect
    from deploy.placement import processes_of

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-bench-")))
        cluster = connect([p for spec in specs.values() for p in processes_of(spec)], None, folder / "ray")
        stack.callback(cluster.close)
        ours, rival = (Pipeline(name, checkpoint.fit(spec), checkpoint, folder) for name, spec in specs.items())
        for pipeline in (ours, rival):
            stack.callback(pipeline.coordinator.stop)
            pipeline.coordinator.start(cluster, lambda name: None)
        yield ours, rival


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
