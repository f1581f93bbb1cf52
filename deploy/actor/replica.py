"""One replica of one stage: what the parts of its loop share (runner.py puts them together)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from deploy.actor.outbox import Outbox, OutMeter
from deploy.actor.session_state import OpenSession
from deploy.actor.sink import WindowMeter
from graph.chunk import SessionId
from graph.clock import Clock
from graph.edge import Receiver, Sender
from graph.schedule import Schedule
from graph.window import Unit
from stages.session import Session
from stages.stage import Stage

WorkingOn = Callable[[str, Sequence[Unit]], AbstractContextManager[object]]


class Meter(WindowMeter, OutMeter, Protocol):
    """What is counted of a stage (deploy/actor/measure.py: StageMeter)."""

    def opened(self, session: Session, ended: Collection[str] | None) -> None: ...
    def closed(self, session: Session) -> None: ...
    def processed(self, num_units: int, queue_s: float, compute_s: float, cpu_s: float) -> None: ...
    def passed(self, num_units: int) -> None: ...
    def carried(self, num_chunks: int) -> None: ...
    def unit_done(self, session: Session, end_ns: int) -> None: ...
    def failed(self, session: Session, error: BaseException, where: str) -> None: ...
    def unsaid(self, session: Session) -> None: ...


@dataclass
class Replica:
    """One replica of one stage, and the sessions that are open there."""

    name: str
    stage: Stage
    receivers: Mapping[str, Receiver]  # by edge
    senders: Mapping[str, list[Sender]]  # by edge, one per replica of the other end
    meter: Meter
    clock: Clock
    working_on: WorkingOn  # entered for each batch with the stage's name
    out: Outbox = field(init=False)
    schedule: Schedule = field(default_factory=Schedule)
    open: dict[SessionId, OpenSession] = field(default_factory=dict)
    ready: dict[SessionId, OpenSession] = field(default_factory=dict)  # those which have a unit that is complete
    num_units: int = 0

    def __post_init__(self) -> None:
        self.out = Outbox(self.name, self.meter)

    @property
    def num_ready(self) -> int:
        """Units that wait to be processed."""
        return sum(len(state.ready) for state in self.ready.values())
