"""What `pipeline plan` foresees for so many sessions, beside what they measure when they run.

First a profile is measured: what batches cost (as `pipeline bench stages` does), then, in a pipeline that runs, what
its processes take while they are idle; how much more or less its stages take with some sessions than they did by
themselves, and what processes take beside them. Then, for each number
of sessions, they run, and beside that is what was foreseen: windows on time, latency p50 and p99, cores that are busy.
Where others are on the cores, how much longer batches took than they computed is known to whoever foresees: as many
rivals are assumed as explain it, none on a machine of one's own. Ratios are foreseen over measured.
Windows after the warm-up count, and busy rooms with their sound are watched.

The second rival has the real stages in virtual time, where what their batches take of a core is what they take: so it
knows nothing of others on the machine. There, each 8 sessions have a core, and each 32 a replica of every model stage.

Options: OMNI_BENCH_SESSIONS, the numbers of sessions (default: 4,12,20); OMNI_BENCH_SECONDS, how long each is timed
(default: 20); OMNI_BENCH_SIMULATED, the numbers of sessions in virtual time (default: 16,64); OMNI_BENCH_CALIBRATED,
with how many sessions processes are measured (default: 16); OMNI_BENCH_PROFILE, a file to write the profile to, for
`pipeline plan`; OMNI_BENCH_SIZES and OMNI_BENCH_WINDOWS as for `stages`; OMNI_BENCH_MODEL, a checkpoint (default:
nano).
"""

from __future__ import annotations

import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from deploy.control import ray_environment
from deploy.control.placement import processes_of
from deploy.evaluate.bench import FOLDER, ROOT, Row, command_of, find_benchmarks, option
from deploy.run.checkpoints import open_checkpoint
from deploy.simulator.foresee import NUM_WARM_UP, Foreseen, Foresight, foresee, summed
from graph.chunk import NS_PER_S
from graph.costs import ActorCost, Overheads, Profile
from graph.sections import NANO, ReplicasSpec
from graph.spec import PipelineSpec
from stages.stage import Stage
from tests.support.specs import load_spec

NAME = "plan"
NUM_SESSIONS = "4,12,20"
MEASURED_S = "20"
CALIBRATED = "16"
IDLE_S = 5.0
NUM_SEEDS = 4
RIVAL = "measured"
SIMULATED = "16,64"
VIRTUAL = "the real stages in virtual time"
SESSIONS_PER_CORE = 8
SESSIONS_PER_REPLICA = 32
MOST_RIVALS = 32.0
NUM_STEPS = 7  # until as many rivals are found


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of cores that were used: by each actor, by the decoders, by all else of a run; and when it was looked.

    batches_s: from the beginning of each batch to its end; stages: what of it was their own work, by stage.
    """

    at_s: float
    actors: Mapping[str, float]
    stages: Mapping[str, float]
    decoders: float
    beside: float
    batches_s: float

    def since(self, begin: Taken) -> Taken:
        """The same per second since then."""
        span_s = self.at_s - begin.at_s
        actors, stages = (
            {name: (used_s - earlier.get(name, 0.0)) / span_s for name, used_s in now.items()}
            for now, earlier in ((self.actors, begin.actors), (self.stages, begin.stages))
        )
        decoders, beside, batches = (
            max(getattr(self, what) - getattr(begin, what), 0.0) / span_s
            for what in ("decoders", "beside", "batches_s")
        )
        return Taken(self.at_s, actors, stages, decoders, beside, batches)

    @property
    def cores(self) -> float:
        return sum(self.actors.values()) + self.decoders + self.beside

    @property
    def stretch(self) -> float:
        """How much longer batches took than they computed."""
        worked_s = sum(self.stages.values())
        return self.batches_s / worked_s if worked_s else 1.0


def run() -> list[Row]:
    """Four rows per number of sessions, once of those that run and once of those in virtual time."""
    measured_s = float(option("SECONDS", MEASURED_S))
    alone, _ = find_benchmarks(FOLDER)["stages"].measure(with_views=False)
    with _pipeline() as pipeline:
        profile = _calibrated(pipeline, alone, int(option("CALIBRATED", CALIBRATED)), measured_s)
        measured = {
            count: (pipeline.serve(count, NUM_WARM_UP, measured_s), pipeline.taken())
            for count in _counts("SESSIONS", NUM_SESSIONS)
        }
    if path := option("PROFILE", ""):
        Path(path).write_text(profile.as_json() + "\n", encoding="utf-8")
    num_windows = round(measured_s) + NUM_WARM_UP
    rows = []
    for count, (served, taken) in measured.items():
        rivals = _rivals(pipeline.spec, profile, count, num_windows, taken.stretch)
        foreseen = foresee(pipeline.spec, profile, count, num_windows, rivals=rivals, num_seeds=NUM_SEEDS)
        rows += _rows(foreseen, _served(count, served, taken), RIVAL, f", beside {rivals:.1f} rivals")
    for count in _counts("SIMULATED", SIMULATED):
        _tell(f"virtual time: {count} session(s)")
        wide = replace(alone, overheads=profile.overheads, num_cores=max(profile.num_cores, count // SESSIONS_PER_CORE))
        spec = _with_replicas(pipeline.spec, -(-count // SESSIONS_PER_REPLICA))
        virtual = _in_virtual_time()(spec, wide, count, num_windows, pipeline.checkpoint)
        virtual.run()
        foreseen = foresee(spec, wide, count, num_windows, num_seeds=NUM_SEEDS)
        rows += _rows(foreseen, summed([virtual]), VIRTUAL, f" of {wide.num_cores}")
    return rows


def _rivals(spec: PipelineSpec, profile: Profile, count: int, num_windows: int, stretch: float) -> float:
    """As many threads of others as make actors wait so long."""
    low, high = 0.0, MOST_RIVALS
    for _ in range(NUM_STEPS):
        middle = (low + high) / 2
        run = Foresight(spec, profile, count, num_windows, rivals=middle)
        run.run()
        low, high = (middle, high) if run.stretch < stretch else (low, middle)
    return low


def _with_replicas(spec: PipelineSpec, count: int) -> PipelineSpec:
    scale = {"scale": ReplicasSpec(min=count)}
    stages = {
        name: stage.model_copy(update=scale if spec.types[name].has_model else {})
        for name, stage in spec.stages.items()
    }
    return replace(spec, stages=stages)


def _counts(name: str, default: str) -> list[int]:
    return [int(count) for count in option(name, default).split(",") if count]


def _served(count: int, served: Any, taken: Taken) -> Foreseen:
    """What was measured, in the words of what was foreseen."""
    p50, p99 = (float(np.percentile(served.latencies_s, q)) for q in (50, 99))
    return Foreseen(count, sum(served.on_time) / len(served.on_time), p50, p99, taken.cores)


def _rows(foreseen: Foreseen, measured: Foreseen, rival: str, beside: str) -> list[Row]:
    name = f"{foreseen.num_sessions} session{'s' if foreseen.num_sessions > 1 else ''}"
    numbers = {
        "windows on time": (foreseen.on_time, measured.on_time, 100, "%"),
        "window latency p50": (foreseen.latency_p50_s, measured.latency_p50_s, 1000, "ms"),
        "window latency p99": (foreseen.latency_p99_s, measured.latency_p99_s, 1000, "ms"),
        f"busy cores{beside}": (foreseen.cores, measured.cores, 1, "cores"),
    }
    return [
        _row(f"{name}: {what}", factor * ours, factor * theirs, unit, rival)
        for what, (ours, theirs, factor, unit) in numbers.items()
    ]


def _row(name: str, foreseen: float, measured: float, unit: str, rival: str) -> Row:
    return Row(name, foreseen, unit, rival, measured, foreseen / measured if measured else None, command_of(NAME))


def _calibrated(pipeline: Any, profile: Profile, num_sessions: int, measured_s: float) -> Profile:
    """The profile with what stages take in a run, and processes beside them."""
    _tell("idle")
    begin = pipeline.look()
    time.sleep(IDLE_S)
    idle = pipeline.look().since(begin)
    pipeline.serve(num_sessions, NUM_WARM_UP, measured_s)
    taken = pipeline.taken()
    num_windows = round(measured_s) + NUM_WARM_UP
    alone = _runs(pipeline.spec, profile, num_sessions, num_windows)
    factors = {
        name: taken.stages[name] / max(fmean(run.worked[name] for run in alone), 1e-9)
        for name in profile.stages
        if not pipeline.spec.stages[name].gpus  # where a device computes, the processor's time says nothing
    }
    _tell("in a run stages take " + ", ".join(f"{name} x {factor:.2f}" for name, factor in factors.items()))
    costs = {name: cost.times(factors.get(name, 1.0)) for name, cost in profile.stages.items()}
    profile = replace(profile, stages=costs)
    # The same run without overheads: what stages take is subtracted from what was measured.
    runs = _runs(pipeline.spec, profile, num_sessions, num_windows)
    actors, sources_s = {}, taken.decoders
    for process in processes_of(pipeline.spec):
        name = process.name
        worked_s = sum(taken.stages.get(stage, 0.0) for stage in process.stages.keys() & profile.stages.keys())
        beside_s = max(taken.actors[name] - idle.actors[name] - worked_s, 0.0)
        if process.stages.keys() & set(pipeline.spec.wiring.sources):  # what it takes depends on no chunk that comes
            sources_s, beside_s = sources_s + beside_s, 0.0
        arrivals = fmean(run.num_arrivals[name] * NS_PER_S / run.run_ns for run in runs)
        actors[process.group] = ActorCost(
            round(idle.actors[name] * NS_PER_S), round(beside_s * NS_PER_S / max(arrivals, 1e-9))
        )
    source_ns = round(sources_s * NS_PER_S / num_sessions)
    return replace(profile, overheads=Overheads(actors, source_ns, round(taken.beside * NS_PER_S)))


def _runs(spec: PipelineSpec, profile: Profile, num_sessions: int, num_windows: int) -> list[Foresight]:
    runs = [Foresight(spec, profile, num_sessions, num_windows, seed=seed) for seed in range(NUM_SEEDS)]
    for run in runs:
        run.run()
    return runs


@contextmanager
def _pipeline() -> Iterator[Any]:
    """One that sheds nothing, and says what it takes."""
    spec = load_spec(ROOT / "pipeline.yaml", [f"model={option('MODEL', NANO)}", "shedding.ladder=[]"])
    checkpoint = open_checkpoint(spec, _tell)
    spec = checkpoint.fit(spec)
    ray_environment.prepare(None)
    from deploy.control.cluster import connect

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-bench-")))
        cluster = connect(processes_of(spec), None, folder / "ray")
        stack.callback(cluster.close)
        pipeline = _observed()("plan", spec, checkpoint, folder, cluster)
        stack.callback(pipeline.coordinator.stop)
        pipeline.coordinator.start()
        yield pipeline


def _observed() -> type[Any]:
    serving: type[Any] = find_benchmarks(FOLDER)["sessions"].Pipeline

    class Observed(serving):  # type: ignore[misc]
        """A pipeline of which is known what each of its processes takes."""

        def __init__(self, name: str, spec: PipelineSpec, *others: Any) -> None:
            super().__init__(name, spec, *others)
            self.spec, self.checkpoint = spec, others[0].path
            self._looks: list[Taken] = []

        def taken(self) -> Taken:
            """Since the last run began."""
            return self._looks[-1].since(self._looks[-2])

        def look(self) -> Taken:
            """What was taken so far."""
            actors, stages = dict[str, float](), defaultdict[str, float](float)
            decoders = batches_s = 0.0
            for name, address in self.coordinator.actors.items():
                actor = psutil.Process(address.pid)
                actors[name] = _cpu_s([actor])
                decoders += _cpu_s(actor.children(recursive=True))
                metrics = _metrics(f"http://{address.node_ip}:{address.metrics_port}/metrics")
                batches_s += sum(value for name, labels, value in metrics if _is_of_batches(name, labels))
                for metric, labels, value in metrics:
                    if metric == "omni_stage_cpu_seconds_total":
                        stages[labels["stage"]] += value
            here = psutil.Process()
            beside = _cpu_s([here, *here.children(recursive=True)]) - sum(actors.values()) - decoders
            return Taken(time.monotonic(), actors, stages, decoders, beside, batches_s)

        def _cpu_s(self) -> float:
            self._looks.append(self.look())
            return sum(self._looks[-1].actors.values()) + self._looks[-1].decoders

    return Observed


def _in_virtual_time() -> type[Any]:
    """The real stages, where a plan has what they were measured to cost."""
    watched: type[Any] = find_benchmarks(FOLDER)["stages"].Watched

    class InVirtualTime(watched, Foresight):  # type: ignore[misc]
        def __init__(
            self, spec: PipelineSpec, profile: Profile, num_sessions: int, num_windows: int, checkpoint: Path
        ) -> None:
            self.prepare(checkpoint)
            Foresight.__init__(self, spec, profile, num_sessions, num_windows)

        def make_stage(self, name: str) -> Stage:
            stage: Stage = super().make_stage(name)
            if name in self._timed:
                stage.device = self.stage_thread  # type: ignore[attr-defined]
            return stage

    return InVirtualTime


def _cpu_s(processes: Iterable[psutil.Process]) -> float:
    used = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def _metrics(url: str) -> list[tuple[str, Mapping[str, str], float]]:
    text = urllib.request.urlopen(url, timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [(sample.name, sample.labels, sample.value) for sample in samples]


def _is_of_batches(name: str, labels: Mapping[str, str]) -> bool:
    return name == "omni_stage_seconds_sum" and labels["phase"] == "compute"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
