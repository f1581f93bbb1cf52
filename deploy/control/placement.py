"""Where the actors run: from the stages' descriptions to Ray's resources, checked before anything starts.

Ray lets an infeasible request wait for ever; so what a cluster has is compared with what is asked for first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graph.errors import GraphError
from graph.sections import StageOptions
from graph.spec import PipelineSpec

Resources = Mapping[str, float]


class PlacementError(GraphError):
    """The cluster can't hold the pipeline; says what is missing."""


@dataclass(frozen=True, slots=True)
class Process:
    """One actor process to place. `is_local`: it opens this machine's files, cameras and devices."""

    name: str
    replica: int
    stages: Mapping[str, StageOptions]
    is_local: bool
    resources: Resources = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What its replicas have in common: the stage's name, or that which its stages have given their process."""
        return group_of(*next(iter(self.stages.items())))


def group_of(name: str, stage: StageOptions) -> str:
    """Of which group of processes a stage is: one of its own, or one that it shares."""
    return stage.process or name


def processes_of(spec: PipelineSpec) -> list[Process]:
    """One process per replica of a stage, or of the stages with one name of `process`; in the order of the graph."""
    shared: dict[str, dict[str, StageOptions]] = {}
    alone: list[Process] = []
    for name, stage in spec.stages.items():
        if stage.process is not None:
            shared.setdefault(stage.process, {})[name] = stage
        else:
            is_local = spec.types[name].is_local
            alone += [
                Process(f"{name}.{replica}", replica, {name: stage}, is_local, _resources([stage]))
                for replica in range(stage.replicas)
            ]
    together = [
        Process(f"{process}.{replica}", replica, stages, _is_local(spec, stages), _resources(stages.values()))
        for process, stages in shared.items()
        for replica in range(max(stage.replicas for stage in stages.values()))
    ]
    return alone + together


def _is_local(spec: PipelineSpec, stages: Iterable[str]) -> bool:
    return any(spec.types[name].is_local for name in stages)


def replicas_of(processes: Iterable[Process]) -> dict[str, int]:
    """How many replicas of each stage these processes hold."""
    return dict(Counter(stage for process in processes for stage in process.stages))


def check_fits(processes: Iterable[Process], nodes: Iterable[Resources]) -> None:
    """Raises PlacementError when the processes can't all run on these nodes (each one's total resources) at once."""
    free = [dict(node) for node in nodes]
    problems = []
    for process in sorted(processes, key=lambda p: -sum(p.resources.values())):
        node = next((node for node in free if _fits(process.resources, node)), None)
        if node is None:
            problems.append(
                f"{process.name} asks for {_amounts(process.resources)}; {_missing(process.resources, free)}"
            )
            continue
        for resource, amount in process.resources.items():
            node[resource] -= amount
    if problems:
        raise PlacementError("the cluster can't hold the pipeline:\n  " + "\n  ".join(problems))


def num_cpus_for(processes: Iterable[Process], available: int) -> int:
    """CPUs a Ray of our own announces: what there is, or what the stages ask for, since they are mere shares there."""
    return max(available, math.ceil(sum(process.resources.get("CPU", 0.0) for process in processes)))


def _resources(stages: Iterable[StageOptions]) -> Resources:
    total: dict[str, float] = {}
    for stage in stages:
        required = {"CPU": stage.cpus, "GPU": stage.gpus, **stage.resources}
        for resource, amount in required.items():
            total[resource] = total.get(resource, 0.0) + amount
    return {resource: round(amount, 4) for resource, amount in total.items() if amount}


def _fits(required: Resources, node: Resources) -> bool:
    return all(node.get(resource, 0.0) + 1e-6 >= amount for resource, amount in required.items())


def _missing(required: Resources, free: list[dict[str, float]]) -> str:
    """What keeps a process from every node: a resource which none has enough of, or their combination."""
    short = [
        f"{resource}: no node has more than {max((node.get(resource, 0.0) for node in free), default=0.0):g} left"
        for resource, amount in required.items()
        if not any(node.get(resource, 0.0) + 1e-6 >= amount for node in free)
    ]
    return "; ".join(short) or "no node has all of it left"


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {resource}" for resource, amount in resources.items())
