"""How a pipeline will do with so many sessions: a short run of what ships in virtual time, where everything costs what
was measured.

Rule: stages, and what processes do beside them, share the cores of the machine; stages with a GPU share that. What
idle processes, cameras and all else take is taken off the cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from deploy.actor.plan import ActorPlan
from deploy.actor.runner import StageRunner
from deploy.control.placement import Process, processes_of
from deploy.simulator.actors import VirtualActor
from deploy.simulator.cores import Cores, Thread
from deploy.simulator.costly import Costly
from deploy.simulator.scenarios import SCENARIOS
from deploy.simulator.simulate import Simulation
from deploy.simulator.speech import VirtualLlm, VirtualTts
from graph.chunk import NS_PER_S
from graph.costs import ActorCost, Overheads, Profile
from graph.spec import PipelineSpec
from stages.stage import Stage

NUM_WINDOWS: Final = 40
NUM_WARM_UP: Final = 5  # windows of each session that do not count
MAX_SESSIONS: Final = 256  # more take minutes
LEAST_CORES: Final = 0.01
GRADES: Final = (0.99, 0.9)
"""Shares of the windows that are on time, for which `served` looks."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """on_time: share of the windows. latencies: from a window's end. cores: that are busy with it."""

    num_sessions: int
    on_time: float
    latency_p50_s: float
    latency_p99_s: float
    cores: float

    def as_dict(self) -> dict[str, float]:
        return {
            "sessions": self.num_sessions,
            "on_time": round(self.on_time, 4),
            "latency_p50_s": round(self.latency_p50_s, 4),
            "latency_p99_s": round(self.latency_p99_s, 4),
            "cores": round(self.cores, 2),
        }


class Foresight(Simulation):
    """A run of so many sessions on what a profile was measured on."""

    def __init__(
        self,
        spec: PipelineSpec,
        profile: Profile,
        num_sessions: int,
        num_windows: int = NUM_WINDOWS,
        *,
        seed: int = 0,
        rivals: float = 0.0,
    ) -> None:
        """rivals: threads of others on the cores."""
        self._profile, self._rivals = profile, rivals
        self._overheads = profile.overheads or Overheads()
        self._cores: Cores | None = None
        self._gpus: list[Cores] = []
        self._taken = 0.0  # of GPUs, by the actors that were placed
        self.threads: dict[str, Thread] = {}  # by peer
        self.num_arrivals: dict[str, int] = {}  # chunks, by peer
        self._computing: dict[str, list[Costly]] = defaultdict(list)  # replicas, by stage
        self.stage_thread: Thread | None = None  # of the actor that is built
        self.num_sessions = num_sessions
        scenario = replace(SCENARIOS["steady"], num_sessions=num_sessions, num_windows=num_windows)
        super().__init__(spec, scenario.priced(profile, spec), seed)

    @property
    def background(self) -> float:
        """Cores that are taken by what goes on all the time."""
        processes = processes_of(self.spec)
        idle_ns = sum(self._cost_of(process.group).idle_ns for process in processes)
        beside_ns = self.num_sessions * self._overheads.source_ns + self._overheads.other_ns
        return (idle_ns + beside_ns) / NS_PER_S

    @property
    def run_ns(self) -> int:
        """How long the sessions last."""
        return self.end_ns - self._begin_ns

    def _cost_of(self, group: str) -> ActorCost:
        return self._overheads.actors.get(group, ActorCost())

    def _make_actor(self, process: Process, plan: ActorPlan, load_ns: int) -> VirtualActor:
        if self._cores is None:
            num_cores = max(self._profile.num_cores - self.background, LEAST_CORES)
            self._cores = Cores(self.world, num_cores, self._rivals)
        actor = super()._make_actor(process, plan, load_ns)
        self.threads[plan.peer] = self._cores.thread()
        self.num_arrivals[plan.peer] = 0
        actor.receives = partial(self._receives, plan.peer, self._cost_of(process.group).chunk_ns)
        return actor

    def _receives(self, peer: str, chunk_ns: int, num_chunks: int) -> None:
        self.num_arrivals[peer] += num_chunks
        if cost_ns := num_chunks * chunk_ns:
            self.threads[peer].work(cost_ns)

    def _build(self, actor: VirtualActor) -> list[StageRunner]:
        gpus = sum(self.spec.stages[name].gpus for name in actor.plan.stages)
        self.stage_thread = self._gpu(gpus).thread() if gpus else self.threads[actor.plan.peer]
        return super()._build(actor)

    def _gpu(self, share: float) -> Cores:
        """The one where there is room, in the order of the actors."""
        if not self._gpus or self._taken + share > 1 + 1e-6:
            self._gpus.append(Cores(self.world, 1))
            self._taken = 0.0
        self._taken += share
        return self._gpus[-1]

    def make_stage(self, name: str) -> Stage:
        stage = super().make_stage(name)
        if isinstance(stage, Costly):
            self._computing[name].append(stage)
            assert self.stage_thread is not None
            stage.device = self.stage_thread
        if isinstance(stage, VirtualLlm | VirtualTts):
            stage.speaking = self._profile.speaking
        return stage

    @property
    def stretch(self) -> float:
        """How much longer what actors do takes than it would if nobody else were on the cores."""
        threads = self.threads.values()
        return sum(thread.took_ns for thread in threads) / max(sum(thread.busy_ns for thread in threads), 1)

    @property
    def worked(self) -> Mapping[str, float]:
        """Seconds that stages computed in each second, by stage."""
        return {name: sum(each.worked_ns for each in stages) / self.run_ns for name, stages in self._computing.items()}

    def seen(self) -> Iterator[tuple[float, bool]]:
        """Of each window that counts, its latency (s), and whether it was on time; once it was run."""
        for _, window in self.windows():
            if int(window["index"] or 0) >= NUM_WARM_UP:
                yield float(window["latency_s"] or 0), bool(window["on_time"])

    @property
    def busy(self) -> float:
        """Cores, on average."""
        return sum(thread.busy_ns for thread in self.threads.values()) / self.run_ns + self.background


def summed(runs: Sequence[Foresight]) -> Foreseen:
    """What was seen in runs of the same number of sessions, which are over."""
    windows = [window for run in runs for window in run.seen()]
    latencies, on_time = [latency_s for latency_s, _ in windows], [on_time for _, on_time in windows]
    p50, p99 = np.percentile(latencies, [50, 99]) if windows else (0.0, 0.0)
    cores = sum(run.busy for run in runs) / len(runs)
    return Foreseen(runs[0].num_sessions, sum(on_time) / max(len(on_time), 1), float(p50), float(p99), cores)


def foresee(
    spec: PipelineSpec,
    profile: Profile,
    num_sessions: int,
    num_windows: int = NUM_WINDOWS,
    *,
    rivals: float = 0.0,
    num_seeds: int = 1,
) -> Foreseen:
    """Run so many sessions in virtual time. Raises ProfileError where a stage was not measured."""
    runs = [Foresight(spec, profile, num_sessions, num_windows, seed=seed, rivals=rivals) for seed in range(num_seeds)]
    for run in runs:
        run.run()
        if run.world.error is not None:  # of ours; what comes late under too much load is what is asked
            raise run.world.error
    return summed(runs)


def served(spec: PipelineSpec, profile: Profile, most: int = MAX_SESSIONS) -> list[Foreseen]:
    """What was tried, by the number of sessions, until the most are known that are served at each of GRADES.

    The most at a grade: the last one in the list that has it, before the first that hasn't.
    """
    tried: dict[int, Foreseen] = {}

    def on_time(count: int) -> float:
        if count not in tried:
            tried[count] = foresee(spec, profile, count)
        return tried[count].on_time

    for grade in GRADES:
        low, high = 0, 1
        while high <= most and on_time(high) >= grade:
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if on_time(middle) >= grade else (low, middle)
    return [tried[count] for count in sorted(tried)]


def most_served(tried: Iterable[Foreseen], grade: float) -> int:
    """The largest number of sessions up to which all that were tried have the grade; 0: none."""
    most = 0
    for foreseen in tried:
        if foreseen.on_time < grade:
            break
        most = foreseen.num_sessions
    return most


def lines(foreseen: list[Foreseen]) -> list[str]:
    """For a person."""
    if not foreseen:
        return []
    rows = [["sessions", "on time", "p50", "p99", "cores"]]
    rows += [
        [
            str(each.num_sessions),
            f"{100 * each.on_time:.1f} %",
            f"{1000 * each.latency_p50_s:.0f} ms",
            f"{1000 * each.latency_p99_s:.0f} ms",
            f"{each.cores:.2f}",
        ]
        for each in foreseen
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    printed = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(foreseen) > 1:
        grades = " and ".join(f"{most_served(foreseen, grade)} with {100 * grade:g} %" for grade in GRADES)
        printed.append(f"foreseen to be served: {grades} of their windows on time")
    return printed
