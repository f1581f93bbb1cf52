"""The two ends of an edge: an output of one stage, an input of another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graph.kinds import Kind


@dataclass(frozen=True, slots=True, order=True)
class OutPort:
    """Where an edge begins."""

    stage: str
    name: str
    kind: Kind[Any] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.stage}.{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class InPort:
    """Where an edge ends. is_side: it holds nobody up and ends no window."""

    stage: str
    name: str
    kind: Kind[Any] = field(compare=False, repr=False)
    is_feedback: bool = field(default=False, compare=False)
    is_side: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.stage}.{self.name}"
