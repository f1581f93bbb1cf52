"""What an actor is to be, and where it then is. Plain values: no Ray, so that the command line may import them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
