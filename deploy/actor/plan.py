"""What an actor is to be, and where it then is. Plain values: no Ray, so that the command line may import them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.actor.accounts import EdgeEnds
from deploy.actor.session_plan import StageSnapshot
from graph.sections import StageSpec
from graph.spec import EdgeSpec


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """What an actor process is to be. `name` is unique: "llm.0", or "io.0" for light stages that share a process.

    peer: its name on the bus, which no other actor has had: one that takes the place of a dead one has the same name.
    """

    name: str
    peer: str
    replica: int
    stages: Mapping[str, StageSpec]
    edges: tuple[EdgeSpec, ...]
    all_stages: tuple[str, ...]
    checkpoint: Path
    directory: Path
    log: Path


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
