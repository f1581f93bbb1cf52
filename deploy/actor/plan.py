"""What an actor is to be, and where it then is. Plain values: no Ray, so that the command line may import them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.actor.accounts import EdgeEnds
from deploy.actor.session_plan import StageSnapshot
from graph.credit import Limit
from graph.edges import EdgeSpec
from graph.errors import GraphError
from graph.kinds import WhenFull
from graph.sections import StageOptions
from model_shards.errors import ModelError
from stages.stage import StageError

REFUSALS: Final = (GraphError, StageError, ModelError)
"""What a call may raise that is no fault of ours."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage, in plain values: its class may be one that only the actor can import.

    use: "module:Class". options: as they may be written in pipeline.yaml.
    """

    use: str
    options: Mapping[str, Any]


def stage_plan(use: str, options: StageOptions) -> StagePlan:
    return StagePlan(use, options.model_dump(by_alias=True, exclude={"inputs"}))


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """An edge, and the stages at its ends."""

    id: str
    source: str
    target: str
    credit: Limit
    when_full: WhenFull

    @staticmethod
    def of(edge: EdgeSpec) -> EdgePlan:
        return EdgePlan(edge.id, edge.source.stage, edge.target.stage, edge.credit, edge.when_full)


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """What an actor process is to be. `name` is unique: "llm.0", or "io.0" for light stages that share a process.

    peer: its name on the bus, which no other actor has had: one that takes the place of a dead one has the same name.
    modules: where the classes of the user's own stages may lie, beside the installed packages.
    """

    name: str
    peer: str
    replica: int
    stages: Mapping[str, StagePlan]
    edges: tuple[EdgePlan, ...]
    all_stages: tuple[str, ...]
    checkpoint: Path
    directory: Path
    log: Path
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Address:
    """Where an actor runs."""

    node_id: str
    node_ip: str
    pid: int
    metrics_port: int


@dataclass(frozen=True, slots=True)
class Call:
    """Something that an actor is to do, in its loop's thread."""

    method: str
    arguments: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call has returned, or raised."""

    value: object = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What an actor is doing, and its ends of its edges: by stage, by edge."""

    stages: Mapping[str, StageSnapshot]
    ends: Mapping[str, EdgeEnds]
