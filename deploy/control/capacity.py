"""`pipeline plan`: how many replicas so many cameras need, and how many cameras a description can serve on time.

Rule: reckoned, not tried. The windows of a phase's sessions end together (control/coordinator.py keeps them in step)
and all of them speak, so a stage gets the windows of a phase at once and is through with them one batch after the
other; a window passes the stages one after the other, but for those that work side by side, as the encoders do.
Sessions are spread by their number, so the busiest replica may have those with most pictures. What makes a picture of
each picture is paid by the picture (a profile counts it so), the rest by the window, and `picture_ns` for each picture
of it beyond the first.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

from deploy.control.routing import num_phases
from graph.chunk import NS_PER_MS, NS_PER_S
from graph.costs import Profile, StageCost, read_profile
from graph.errors import GraphError
from graph.sections import ReplicasSpec
from graph.spec import PipelineSpec

MAX_LOAD: Final = 0.8
"""Of a replica, and of the cores: what is busier than this falls behind whenever something takes longer."""
RESERVE_NS: Final = 60 * NS_PER_MS
"""Of the deadline, one window after its end: for the hops, and for waiting for peers."""
MAX_CAMERAS: Final = 1_000_000


class CapacityError(GraphError):
    """So many cameras can't be served, whatever is given; says why."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Cameras, by how many pictures a window of theirs has: (pictures, cameras), those with most first."""

    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_pictures: Iterable[int]) -> Demand:
        """num_pictures: in a window, of each camera."""
        return cls(tuple(sorted(Counter(num_pictures).items(), reverse=True)))

    @classmethod
    def described(cls, spec: PipelineSpec) -> Demand:
        """The cameras that are described."""
        return cls.of(camera.num_pictures(spec.window.length_ns) for camera in spec.cameras.values())

    @classmethod
    def like(cls, spec: PipelineSpec, num_cameras: int) -> Demand:
        """So many cameras like those described, each of them as often; where none is, each with one picture."""
        described = cls.described(spec).groups or ((1, 1),)
        times, left = divmod(num_cameras, sum(count for _, count in described))
        groups = []
        for pictures, count in described:
            groups.append((pictures, times * count + min(left, count)))
            left -= min(left, count)
        return cls(tuple((pictures, count) for pictures, count in groups if count))

    @property
    def num_cameras(self) -> int:
        return sum(count for _, count in self.groups)

    @property
    def num_pictures(self) -> int:
        """In a window of all cameras."""
        return sum(pictures * count for pictures, count in self.groups)

    def __str__(self) -> str:
        cameras = "1 camera" if self.num_cameras == 1 else f"{self.num_cameras} cameras"
        is_plain = self.num_pictures == self.num_cameras
        return cameras if is_plain else f"{cameras} with {self.num_pictures} pictures in a window"

    def num_more(self, num_cameras: int) -> int:
        """Pictures beyond the first of each camera, of the `num_cameras` that have most."""
        more, left = 0, num_cameras
        for pictures, count in self.groups:
            more += (pictures - 1) * min(left, count)
            left -= min(left, count)
        return more


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

    demand: Demand
    stages: Mapping[str, StagePlan]
    latency_p99_ns: int
    cores: float
    num_cores: int
    window_ns: int

    @property
    def num_cameras(self) -> int:
        return self.demand.num_cameras

    @property
    def first(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name].load)

    @property
    def gpus(self) -> float:
        return sum(stage.gpus for stage in self.stages.values())

    @property
    def problems(self) -> list[str]:
        """Why this does not work; empty when it does."""
        problems = [
            f"{name} would be busy {100 * stage.load:.0f} % of the time, {100 * MAX_LOAD:.0f} % is the most"
            for name, stage in self.stages.items()
            if stage.load > MAX_LOAD
        ]
        if self.latency_p99_ns > self.window_ns - RESERVE_NS:
            takes_s, most_s = self.latency_p99_ns / NS_PER_S, (self.window_ns - RESERVE_NS) / NS_PER_S
            problems.append(f"a window would take {takes_s:.2f} s at p99, {most_s:.2f} s is the most")
        if self.cores > MAX_LOAD * self.num_cores:
            problems.append(f"{self.cores:.1f} cores would be busy, {MAX_LOAD * self.num_cores:.1f} is the most")
        return problems

    def applied_to(self, spec: PipelineSpec) -> PipelineSpec:
        """The pipeline with as many replicas as planned."""
        scales = {name: ReplicasSpec(min=stage.replicas) for name, stage in self.stages.items()}
        stages = {
            name: stage.model_copy(update={"scale": scales[name]} if name in scales else {})
            for name, stage in spec.stages.items()
        }
        return dataclasses.replace(spec, stages=stages)

    def as_dict(self) -> dict[str, object]:
        return {
            "cameras": self.num_cameras,
            "pictures": self.demand.num_pictures,
            "fits": not self.problems,
            "problems": self.problems,
            "latency_p99_s": round(self.latency_p99_ns / NS_PER_S, 4),
            "gpus": self.gpus,
            "sessions_per_gpu": round(self.num_cameras / self.gpus, 1) if self.gpus else None,
            "cores": round(self.cores, 2),
            "saturates_first": self.first,
            "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
        }


def reckon(spec: PipelineSpec, profile: Profile, demand: Demand, replicas: Mapping[str, int] | None = None) -> Plan:
    """What these cameras cost. replicas: by stage, where they are others than described.

    Raises ProfileError when a stage was not measured.
    """
    stages: dict[str, StagePlan] = {}
    cores = 0.0
    num_cameras = demand.num_cameras
    counts = {name: (replicas or {}).get(name, stage.replicas) for name, stage in spec.stages.items()}
    counts = {name: count for name, count in counts.items() if spec.types[name].has_model}
    most_phases = num_phases(ceil(num_cameras / min(counts.values(), default=1)), spec)
    for name, count in counts.items():
        stage = spec.stages[name]
        sessions, cost = ceil(num_cameras / count), _cost(spec, name, profile)
        phases = min(most_phases, sessions)
        at_once = ceil(sessions / phases)
        phase_ns = cost.window_ns(at_once, stage.batch, demand.num_more(at_once))
        first_ns = phases * cost.window_ns(at_once, stage.batch)
        load = (first_ns + demand.num_more(sessions) * cost.picture_ns) / spec.window.length_ns
        stages[name] = StagePlan(count, sessions, load, round(phase_ns * (1 + cost.spread)), count * stage.gpus)
        if not stage.gpus:
            all_ns = first_ns * num_cameras / sessions + demand.num_more(num_cameras) * cost.picture_ns
            cores += all_ns / spec.window.length_ns
    way_ns = spec.wiring.longest({name: stage.p99_ns for name, stage in stages.items()})
    return Plan(demand, stages, way_ns, cores, profile.num_cores, spec.window.length_ns)


def _cost(spec: PipelineSpec, stage: str, profile: Profile) -> StageCost:
    """Of a session that has lasted long. What makes pictures was measured by the picture."""
    cost = profile.of(stage)
    tokens = 0.0 if profile.speaking is None else profile.speaking.tokens
    cost = dataclasses.replace(
        cost,
        fixed_ns=cost.fixed_ns + round(tokens * cost.token_ns),
        each_ns=cost.each_ns + cost.most_age * cost.age_ns,
    )
    if not spec.has_pictures:
        return dataclasses.replace(cost, picture_ns=0)
    return dataclasses.replace(cost, picture_ns=cost.each_ns) if spec.types[stage].makes_pictures else cost


def plan_for(spec: PipelineSpec, profile: Profile, num_cameras: int) -> Plan:
    """The fewest replicas, stage by stage, with which so many cameras like those described are served on time.

    Raises CapacityError when no number of replicas is enough.
    """
    if not 1 <= num_cameras <= MAX_CAMERAS:
        raise CapacityError(f"--cameras must be 1 to {MAX_CAMERAS}, not {num_cameras}")
    replicas = {name: 1 for name, stage in spec.stages.items() if spec.types[name].has_model}
    demand = Demand.like(spec, num_cameras)
    plan = reckon(spec, profile, demand, replicas)
    while plan.problems:
        grow = _next_to_grow(plan)
        if grow is None:
            raise CapacityError(f"{demand} can't be served on time: {'; '.join(plan.problems)}")
        # As many as take one session less from the busiest, so that no step is in vain.
        replicas[grow] = ceil(num_cameras / (plan.stages[grow].sessions - 1))
        plan = reckon(spec, profile, demand, replicas)
    return plan


def _next_to_grow(plan: Plan) -> str | None:
    """The stage at which one more replica helps most; None where none helps (more cores are another matter)."""
    divisible = {name: stage for name, stage in plan.stages.items() if stage.sessions > 1}
    overloaded = {name: stage for name, stage in divisible.items() if stage.load > MAX_LOAD}
    is_late = plan.latency_p99_ns > plan.window_ns - RESERVE_NS
    among = overloaded or (divisible if is_late else {})
    return max(among, key=lambda name: among[name].p99_ns, default=None)


def most_cameras(spec: PipelineSpec, profile: Profile) -> int:
    """How many cameras like those described it serves on time, with its replicas as they are; 0: none."""
    return _most(lambda count: not reckon(spec, profile, Demand.like(spec, count)).problems)


def _most(fits: Callable[[int], bool]) -> int:
    low, high = 0, 1
    while high <= MAX_CAMERAS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody: no such file, then
        return Path(path)


def admit(spec: PipelineSpec, demand: Demand) -> None:
    """Raises CapacityError when `admission.profile` says that these can't be served on time, or ProfileError."""
    if spec.admission.profile is None:
        return
    profile = read_profile(_expanded(spec.admission.profile))
    plan = reckon(spec, profile, demand)
    if plan.problems:
        most = _most(lambda count: not reckon(spec, profile, Demand(((1, count),))).problems)
        those = f"{most} can" if demand.num_pictures == demand.num_cameras else f"{most} with one picture each can"
        raise CapacityError(
            f"{demand} can't be served on time, {those} "
            f"(admission.profile: {spec.admission.profile}): {'; '.join(plan.problems)}; "
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
    print(f"\n{plan.demand}: a window takes {plan.latency_p99_ns / NS_PER_S:.2f} s at p99; {_needs(plan)}")
    print(f"{plan.first} saturates first")


def _needs(plan: Plan) -> str:
    if not plan.gpus:
        return f"{plan.cores:.1f} of {plan.num_cores} cores are busy"
    return f"{plan.gpus:g} GPUs, {plan.num_cameras / plan.gpus:.1f} sessions each, and {plan.cores:.1f} cores"
