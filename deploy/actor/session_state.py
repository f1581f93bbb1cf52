"""What a stage's loop holds of a session that is open there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.actor.isolation import Faults
from deploy.actor.session_plan import SessionPlan
from deploy.actor.sink import WindowEnd
from graph.clock import Clock
from graph.edge import Arrival, Sender
from graph.epoch import EpochFence
from graph.gather import Waiting
from graph.ladder import Ladder
from graph.window import Unit, WindowJoin
from stages.stage import Session


@dataclass(slots=True)
class ReadyUnit:
    """A unit that is complete, with the chunks' arrivals, whose credit goes back when it has been processed."""

    unit: Unit
    since_ns: int  # monotonic


@dataclass(slots=True)
class OpenSession:
    """A session, at this stage."""

    plan: SessionPlan
    join: WindowJoin | None
    lanes: dict[str, Sender]
    edges: Mapping[str, list[str]]  # outgoing, by the port they leave from
    clock: Clock
    ladder: Ladder | None
    faults: Faults
    sink: WindowEnd | None  # where its windows end
    begun: bool = False
    offset_ns: int = 0  # session time = monotonic + this, once it has begun
    traced: frozenset[str] = frozenset()  # the streams that bring a trace of each window
    fence: EpochFence = field(default_factory=EpochFence)
    ready: deque[ReadyUnit] = field(default_factory=deque)
    arrivals: dict[int, Arrival] = field(default_factory=dict)  # not settled, by the id() of their chunk
    seqs: dict[str, int] = field(default_factory=dict)
    first_seq: int = 0  # of each stream
    ended: set[str] = field(default_factory=set)  # the edges that have, of a stage without windows
    ending: bool = False  # the last words are said; they may still wait for credit
    num_units: int = 0
    num_processed: int = 0  # of them here
    told_level: int = 0  # to the camera, and when
    told_ns: int = 0
    num_quiet: int = 0  # windows after the inputs' end, in succession, in which nothing could be said
    look_ns: int | None = None  # when this is to be looked at if nothing comes, monotonic
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.session = self.plan.session

    @property
    def goes_alone(self) -> bool:
        return self.num_processed < self.plan.alone_for

    def now_ns(self) -> int:
        return self.session_ns(self.clock.monotonic_ns())

    def session_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self.offset_ns

    def monotonic_ns(self, event_ns: int) -> int:
        return event_ns - self.offset_ns

    def waiting(self) -> Waiting:
        """The unit that is next, for `Gathering`."""
        ready = self.ready[0]
        end_ns = self.monotonic_ns(ready.unit.end_ns)
        deadline_ns = end_ns + self.session.window_ns if self.session.paced else None
        return Waiting(self.session.id, ready.since_ns, end_ns, deadline_ns)
