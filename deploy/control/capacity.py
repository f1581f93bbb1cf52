"""`pipeline plan`: how many replicas so many cameras need, and how many cameras a description can serve on time.

Rule: reckoned, not tried. The windows of a phase's sessions end together (control/coordinator.py keeps them in step)
and all of them speak, so a stage gets the windows of a phase at once and is through with them one batch after the
other; a window passes the stages one after the other, but for those that work side by side, as the encoders do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

from graph.chunk import NS_PER_MS, NS_PER_S
from graph.costs import Profile, read_profile
from graph.errors import GraphError
from graph.spec import PipelineSpec

MAX_LOAD: Final = 0.8
"""Of a replica, and of the cores: what is busier than this falls behind whenever something takes longer."""
RESERVE_NS: Final = 60 * NS_PER_MS
"""Of the deadline, one window after its end: for the hops, and for waiting for peers."""
MAX_CAMERAS: Final = 1_000_000


class CapacityError(GraphError):
    """So many cameras can't be served, whatever is given; says why."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """replicas: how many. sessions: of the replica that has most. load: its share of the time. p99_ns: from the first
    unit's arrival to the last one's leaving. gpus: of all replicas."""

    replicas: int
    sessions: int
    load: float
    p99_ns: int
    gpus: float


@dataclass(frozen=True, slots=True)
class Plan:
    """latency_p99_ns: from a window's end until its speech has left the vocoder. cores: busy, of stages without a GPU.
    first: the stage with the highest load, which is the first to saturate."""

    num_cameras: int
    stages: Mapping[str, StagePlan]
    latency_p99_ns: int
    cores: float
    num_cores: int
    window_ns: int

    @property
    def first(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name].load)

    @property
    def gpus(self) -> float:
        return sum(stage.gpus for stage in self.stages.values())

    @property
    def problems(self) -> list[str]:
        """Why this does not work; empty when it does."""
        found = [
            f"{name} would be busy {100 * stage.load:.0f} % of the time, {100 * MAX_LOAD:.0f} % is the most"
            for name, stage in self.stages.items()
            if stage.load > MAX_LOAD
        ]
        if self.latency_p99_ns > self.window_ns - RESERVE_NS:
            takes_s, most_s = self.latency_p99_ns / NS_PER_S, (self.window_ns - RESERVE_NS) / NS_PER_S
            found.append(f"a window would take {takes_s:.2f} s at p99, {most_s:.2f} s is the most")
        if self.cores > MAX_LOAD * self.num_cores:
            found.append(f"{self.cores:.1f} cores would be busy, {MAX_LOAD * self.num_cores:.1f} is the most")
        return found

    def as_dict(self) -> dict[str, object]:
        return {
            "cameras": self.num_cameras,
            "fits": not self.problems,
            "problems": self.problems,
            "latency_p99_s": round(self.latency_p99_ns / NS_PER_S, 4),
            "gpus": self.gpus,
            "sessions_per_gpu": round(self.num_cameras / self.gpus, 1) if self.gpus else None,
            "cores": round(self.cores, 2),
            "saturates_first": self.first,
            "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
        }


def reckon(spec: PipelineSpec, profile: Profile, num_cameras: int, replicas: Mapping[str, int] | None = None) -> Plan:
    """What so many cameras cost. replicas: by stage, where they are others than described.

    Raises ProfileError when a stage was not measured.
    """
    stages: dict[str, StagePlan] = {}
    cores = 0.0
    for name, stage in spec.stages.items():
        if not spec.types[name].has_model:
            continue
        count = (replicas or {}).get(name, stage.replicas)
        sessions, cost = ceil(num_cameras / count), profile.of(name)
        phases = min(spec.window.phases, sessions)
        phase_ns = cost.window_ns(ceil(sessions / phases), stage.batch)
        load = phases * phase_ns / spec.window.length_ns
        stages[name] = StagePlan(count, sessions, load, round(phase_ns * (1 + cost.spread)), count * stage.gpus)
        if not stage.gpus:
            cores += load * num_cameras / sessions
    way_ns = spec.wiring.longest({name: stage.p99_ns for name, stage in stages.items()})
    return Plan(num_cameras, stages, way_ns, cores, profile.num_cores, spec.window.length_ns)


def plan_for(spec: PipelineSpec, profile: Profile, num_cameras: int) -> Plan:
    """The fewest replicas, stage by stage, with which so many cameras are served on time.

    Raises CapacityError when no number of replicas is enough.
    """
    if not 1 <= num_cameras <= MAX_CAMERAS:
        raise CapacityError(f"--cameras must be 1 to {MAX_CAMERAS}, not {num_cameras}")
    replicas = {name: 1 for name, stage in spec.stages.items() if spec.types[name].has_model}
    plan = reckon(spec, profile, num_cameras, replicas)
    while plan.problems:
        grow = _next_to_grow(plan)
        if grow is None:
            raise CapacityError(f"{num_cameras} cameras can't be served on time: {'; '.join(plan.problems)}")
        # As many as take one session less from the busiest, so that no step is in vain.
        replicas[grow] = ceil(num_cameras / (plan.stages[grow].sessions - 1))
        plan = reckon(spec, profile, num_cameras, replicas)
    return plan


def _next_to_grow(plan: Plan) -> str | None:
    """The stage at which one more replica helps most; None where none helps (more cores are another matter)."""
    divisible = {name: stage for name, stage in plan.stages.items() if stage.sessions > 1}
    overloaded = {name: stage for name, stage in divisible.items() if stage.load > MAX_LOAD}
    is_late = plan.latency_p99_ns > plan.window_ns - RESERVE_NS
    among = overloaded or (divisible if is_late else {})
    return max(among, key=lambda name: among[name].p99_ns, default=None)


def most_cameras(spec: PipelineSpec, profile: Profile) -> int:
    """How many cameras the description serves on time, with its replicas as they are; 0: none."""
    low, high = 0, 1
    while high <= MAX_CAMERAS and not reckon(spec, profile, high).problems:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reckon(spec, profile, middle).problems else (middle, high)
    return low


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody: no such file, then
        return Path(path)


def admit(spec: PipelineSpec, num_cameras: int) -> None:
    """Raises CapacityError when `admission.profile` says that so many can't be served on time, or ProfileError."""
    if spec.admission.profile is None:
        return
    profile = read_profile(_expanded(spec.admission.profile))
    asked = reckon(spec, profile, num_cameras)
    if asked.problems:
        raise CapacityError(
            f"{num_cameras} cameras can't be served on time, {most_cameras(spec, profile)} can "
            f"(admission.profile: {spec.admission.profile}): {'; '.join(asked.problems)}; "
            "`pipeline plan` says how many replicas they need"
        )


def print_plan(plan: Plan, as_json: bool) -> None:
    """For a script, or for a person."""
    if as_json:
        print(json.dumps(plan.as_dict(), indent=2))
        return
    rows = [["stage", "replicas", "sessions each", "busy", "p99"]]
    rows += [
        [name, str(s.replicas), str(s.sessions), f"{100 * s.load:.0f} %", f"{s.p99_ns / NS_PER_MS:.0f} ms"]
        for name, s in plan.stages.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{plan.num_cameras} cameras: a window takes {plan.latency_p99_ns / NS_PER_S:.2f} s at p99; {_needs(plan)}")
    print(f"{plan.first} saturates first")


def _needs(plan: Plan) -> str:
    if not plan.gpus:
        return f"{plan.cores:.1f} of {plan.num_cores} cores are busy"
    return f"{plan.gpus:g} GPUs, {plan.num_cameras / plan.gpus:.1f} sessions each, and {plan.cores:.1f} cores"
