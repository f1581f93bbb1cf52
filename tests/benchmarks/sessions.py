"""How many sessions are served in real time, beside one session at a time and beside a plain loop.

Two pipelines stand side by side, the described one and `fifo`, whose model stages take one session's window at a time
and wait for no other (`batch: 1`, `wait: 0s`); neither sheds anything. For each number of sessions first one serves
them, then the other: busy rooms with their sound for nano, test://pattern for other models. Windows after the warm-up
count, so that starts are left out: of cameras, of decoders, of the models' memory. A number of sessions is served where
99 % of the windows are on time, and nearly served where 90 % are.

The second rival, `sequential`, is how the official server goes about it: one process, one thread, one session after the
other, encode, prefill token by token, decode, talk, vocode. Its real stages are timed and virtual time moves on by what
they take, so that nothing but they costs it any time.

What a run costs stands beside what its stages take of it for their own work: the rest is ours, Ray's, the decoders'.

Options: OMNI_BENCH_SESSIONS, the numbers of sessions (default: 4,8,12,16); OMNI_BENCH_SECONDS, how long each is timed
(default: 15); OMNI_BENCH_WARM_UP, for how many windows before (default: 10; all of it then takes eight minutes);
OMNI_BENCH_WINDOWS, how many windows of each session the plain loop is
measured for (default: 20); OMNI_BENCH_MODEL, a checkpoint (default: nano).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from deploy.control import ray_environment
from deploy.evaluate.bench import (
    FOLDER,
    ROOT,
    BenchError,
    Row,
    command_of,
    find_benchmarks,
    less_is_better,
    more_is_better,
    option,
)
from deploy.run.checkpoints import Checkpoint, open_checkpoint
from deploy.simulator.scenarios import Scenario
from graph.chunk import SessionId
from graph.sections import NANO
from graph.spec import PipelineSpec
from model_shards.kv_cache import KvCache
from model_shards.llm import LanguageModel, SequenceInput
from stages.stage import Stage
from tests.support.sessions import make_session
from tests.support.specs import load_spec, model_stages

NAME = "sessions"
NUM_SESSIONS = "8,16,24,32"
MEASURED_S = "15"
WARM_UP = "10"
NUM_WINDOWS = "20"
SERVED, NEARLY = 0.99, 0.9  # of the windows are on time
NUM_WARM_UP_OF_ONE = 2  # windows of `sequential`, which has no processes to start
DRAIN_S = 10.0  # after the sources' end; the listener may still have a lead to hear
BARE = "the work of its stages alone"
FIFO = "fifo: one session at a time in each model stage (batch: 1, wait: 0s)"
SEQUENTIAL = "sequential: one process, one session after the other, prefill token by token"
UNBATCHED = [f"stages.{stage}.{setting}" for stage in model_stages() for setting in ("batch=1", "wait=0s")]


def run() -> list[Row]:
    """Five rows per number of sessions: windows on time, latency p50 and p99, CPU; then how many are served."""
    measured_s, warm_up = float(option("SECONDS", MEASURED_S)), int(option("WARM_UP", WARM_UP))
    counts = [int(count) for count in option("SESSIONS", NUM_SESSIONS).split(",")]
    with _pipelines() as (ours, fifo):
        measured = {n: (ours.serve(n, warm_up, measured_s), fifo.serve(n, warm_up, measured_s)) for n in counts}
    on_time = [{n: pair[side].on_time for n, pair in measured.items()} for side in (0, 1)]
    sequential = _sequential(max(counts))
    rows = [row for n, pair in measured.items() for row in _rows(n, *pair)]
    for share in (SERVED, NEARLY):
        served, fifo_served, sequential_served = (_most(each, share) for each in (*on_time, sequential))
        name = f"sessions with {share:.0%} of windows on time, of {', '.join(map(str, counts))}"
        rows.append(more_is_better(name, served, "sessions", FIFO, fifo_served, command_of(NAME)))
        rows.append(more_is_better(name, served, "sessions", SEQUENTIAL, sequential_served, command_of(NAME)))
    return rows


def _most(on_time: Mapping[int, list[bool]], share: float) -> int:
    """The largest number of sessions of whose windows such a share is on time."""
    return max((n for n, each in on_time.items() if sum(each) >= share * len(each)), default=0)


@dataclass(frozen=True, slots=True)
class Served:
    """How some sessions went. latencies_s: of every window after the warm-up, from its end to the sink."""

    latencies_s: list[float]
    on_time: list[bool]
    cpu_s: float  # of all actors and decoders, per second of one session
    work_s: float  # of it, what the stages' own work takes


def _rows(num_sessions: int, ours: Served, rival: Served) -> list[Row]:
    name, command = f"{num_sessions} session{'s' if num_sessions > 1 else ''}", command_of(NAME)
    percent = [100 * sum(served.on_time) / len(served.on_time) for served in (ours, rival)]
    p50, p99 = ([float(np.percentile(s.latencies_s, q)) * 1000 for s in (ours, rival)] for q in (50, 99))
    return [
        more_is_better(f"{name}: windows on time", percent[0], "%", FIFO, percent[1], command),
        less_is_better(f"{name}: window latency p50", p50[0], "ms", FIFO, p50[1], command),
        less_is_better(f"{name}: window latency p99", p99[0], "ms", FIFO, p99[1], command),
        less_is_better(f"{name}: CPU per session", ours.cpu_s, "s/s", FIFO, rival.cpu_s, command),
        less_is_better(f"{name}: CPU per session", ours.cpu_s, "s/s", BARE, ours.work_s, command),
    ]


class Pipeline:
    """A pipeline that runs, and serves as many sessions as it is asked to."""

    def __init__(self, name: str, spec: PipelineSpec, checkpoint: Checkpoint, folder: Path, cluster: Any) -> None:
        from deploy.control.coordinator import Coordinator

        self._name = name
        self._is_nano = spec.model == NANO
        self._folder = folder / name
        self.coordinator = Coordinator(spec, checkpoint.path, self._folder, cluster, lambda line: None)

    def serve(self, num_sessions: int, warm_up: int, measured_s: float) -> Served:
        """Open sessions, measure for so long after the warm-up, and let them come to their end."""
        _tell(f"{self._name}: {num_sessions} session(s)")
        out = self._folder / f"{num_sessions}-sessions"
        sessions = [SessionId(f"{self._name}-{n}") for n in range(num_sessions)]
        self.coordinator.open_sessions([make_session(s, self._source(n), out=out) for n, s in enumerate(sessions)])
        time.sleep(warm_up)
        begin_s, cpu_s, work_s = time.monotonic(), self._cpu_s(), self._work_s()
        time.sleep(measured_s)
        cpu_s, work_s, lasted_s = self._cpu_s() - cpu_s, self._work_s() - work_s, time.monotonic() - begin_s
        self._end(sessions)
        windows = [row for row in _read(out / "windows.jsonl") if row["index"] >= warm_up]
        if not windows:
            raise BenchError(f"{num_sessions} session(s) made no window in {measured_s:g} s; see {self._folder}/logs")
        session_s = num_sessions * lasted_s
        latencies_s, on_time = ([window[key] for window in windows] for key in ("latency_s", "on_time"))
        return Served(latencies_s, on_time, cpu_s / session_s, work_s / session_s)

    def _source(self, number: int) -> str:
        return f"synthetic://room?seed={number}&events=busy" if self._is_nano else f"test://pattern?seed={number}"

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

    def _work_s(self) -> float:
        """What the stages' own work has taken so far."""
        addresses = self.coordinator.actors.values()
        urls = [f"http://{address.node_ip}:{address.metrics_port}/metrics" for address in addresses]
        texts = [urllib.request.urlopen(url, timeout=5).read().decode() for url in urls]
        families = [family for text in texts for family in text_string_to_metric_families(text)]
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "omni_stage_cpu_seconds_total")


@contextmanager
def _pipelines() -> Iterator[tuple[Pipeline, Pipeline]]:
    """Ours and the rival, in one Ray."""
    settings = {"batched": _settings(), "unbatched": [*_settings(), *UNBATCHED]}
    specs = {name: load_spec(ROOT / "pipeline.yaml", sets) for name, sets in settings.items()}
    checkpoint = open_checkpoint(specs["batched"], _tell)
    ray_environment.prepare(None)
    from deploy.control.cluster import connect
    from deploy.control.placement import processes_of

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-bench-")))
        cluster = connect([p for spec in specs.values() for p in processes_of(spec)], None, folder / "ray")
        stack.callback(cluster.close)
        ours, rival = (
            Pipeline(name, checkpoint.fit(spec), checkpoint, folder, cluster) for name, spec in specs.items()
        )
        for pipeline in (ours, rival):
            stack.callback(pipeline.coordinator.stop)
            pipeline.coordinator.start()
        yield ours, rival


def _settings() -> list[str]:
    return [f"model={option('MODEL', NANO)}", "shedding.ladder=[]"]


def _sequential(most: int) -> dict[int, list[bool]]:
    """By number of sessions, whether each window was on time; up to the first number that is not even nearly served."""
    spec = load_spec(ROOT / "pipeline.yaml", [*_settings(), *UNBATCHED])
    checkpoint = open_checkpoint(spec, _tell)
    on_time: dict[int, list[bool]] = {}
    for n in range(1, most + 1):
        _tell(f"sequential: {n} session(s)")
        scenario = Scenario("sequential", "", n, int(option("WINDOWS", NUM_WINDOWS)), devices={"cpu": 1})
        rooms = _one_after_the_other()(checkpoint.fit(spec), scenario, checkpoint.path)
        rooms.watch()
        windows = [window for _, window in rooms.windows() if int(window["index"] or 0) >= NUM_WARM_UP_OF_ONE]
        on_time[n] = [bool(window["on_time"]) for window in windows]
        if sum(on_time[n]) < NEARLY * len(on_time[n]):
            break
    return on_time


def _one_after_the_other() -> type[Any]:
    watched: type[Any] = find_benchmarks(FOLDER)["stages"].Watched

    class OneAfterTheOther(watched):  # type: ignore[misc]
        """Rooms that are watched by real stages on one thread, with a prefill of single tokens."""

        def make_stage(self, name: str) -> Stage:
            stage: Stage = super().make_stage(name)
            if name == "llm":
                engine = stage._stage._engine  # type: ignore[attr-defined]
                engine._model = TokenByToken(engine._model)
            return stage

    return OneAfterTheOther


class TokenByToken:
    """A language model that is given one token at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.embed, self.logits = model.embed, model.logits

    def __call__(self, cache: KvCache, batch: Sequence[SequenceInput]) -> list[torch.Tensor]:
        return [torch.cat([self._row(cache, item, k) for k in range(len(item.embeds))]) for item in batch]

    def _row(self, cache: KvCache, item: SequenceInput, k: int) -> torch.Tensor:
        start = None if item.start is None else item.start + k
        hidden: list[torch.Tensor] = self._model(cache, [SequenceInput(item.sequence, item.embeds[k : k + 1], start)])
        return hidden[0]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
