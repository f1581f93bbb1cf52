"""What can go wrong on the graph's floor, for callers that act on it.

A late chunk, a dead camera, a full edge are not errors but events: they are counted, not raised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class GraphError(Exception):
    """Base of all errors raised by graph/; the message says what, where and what instead."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing which the author of a pipeline.yaml has to change."""

    where: str  # "pipeline.yaml:14:7" or "--set stages.llm.gpu=1"
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class SpecError(GraphError):
    """A pipeline description that can't run; prints every problem on a line of its own, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)  # the tuple is the only argument, so that the error survives pickling

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))
