"""What a stage's loop holds of a session that is open there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from deploy.actor.isolation import Faults
from deploy.actor.session_plan import Output, SessionPlan
from deploy.actor.sink import WindowEnd
from graph.chunk import Chunk
from graph.clock import Clock
from graph.edge import Arrival, Lane, Sender
from graph.epoch import EpochFence
from graph.gather import Waiting
from graph.ladder import Ladder
from graph.value import value
from graph.window import Unit, WindowJoin
from stages.session import Session

MAX_SENT = 8  # pieces of a session whose arrival is not known; they are only measured


@dataclass(slots=True)
class ReadyUnit:
    """A unit that is complete. waiting: as `Gathering` sees it."""

    unit: Unit
    waiting: Waiting


@value
class Sent:
    """A piece of speech that has left here, and has not come to its listener as far as is known. Session time.

    end_ns: of its window. started_ns: when work on it began. dry_ns: of its listener, where it was held.
    """

    end_ns: int
    started_ns: int
    dry_ns: int | None


@dataclass(slots=True)
class OpenSession:
    """A session, at this stage."""

    plan: SessionPlan
    join: WindowJoin | None
    lanes: dict[str, Sender]
    queues: tuple[Lane, ...]  # what waits at them; it goes along when the session moves to another replica
    clock: Clock
    ladder: Ladder | None
    faults: Faults
    sink: WindowEnd | None = None  # where its windows end
    begun: bool = False
    offset_ns: int = 0  # session time = monotonic + this, once it has begun
    fence: EpochFence = field(default_factory=EpochFence)
    ready: deque[ReadyUnit] = field(default_factory=deque)
    arrivals: dict[int, Arrival] = field(default_factory=dict)  # not settled, by the id() of their chunk
    seqs: dict[str, int] = field(default_factory=dict)
    first_seq: int = 0  # of each stream
    ends: dict[str, tuple[Output, Chunk]] = field(default_factory=dict)  # the last words of streams, as they were sent
    ended: set[str] = field(default_factory=set)  # the edges that have, of a stage without windows
    ending: bool = False  # the last words are said; they may still wait for credit
    num_units: int = 0
    num_processed: int = 0  # of them here
    levels_sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # to sources, by edge, and when
    # Windows after the inputs' end, in succession, in which nothing could be said; below 0 while there are some that
    # have ended when nobody was there to hear.
    num_quiet: int = 0
    speaks: bool = False  # its last unit had something to say
    sent: deque[Sent] = field(default_factory=lambda: deque(maxlen=MAX_SENT))
    session: Session = field(init=False)
    traced: frozenset[str] = field(init=False)  # the streams that bring a trace of each window
    windowed: tuple[tuple[str, Output], ...] = field(init=False)  # what leaves window by window
    control: tuple[Output, ...] = field(init=False)  # on which the listener's news leave
    events: str = field(init=False)  # at which port events leave; "" where none do

    def __post_init__(self) -> None:
        outputs = self.plan.outputs
        self.session = self.plan.session
        self.traced = frozenset(stream for stream, each in self.plan.inputs.items() if not each.is_original)
        self.windowed = tuple((name, each) for name, each in outputs.items() if each.kind.is_windowed)
        self.control = tuple(each for each in outputs.values() if each.kind.is_control)
        self.events = next((name for name, each in outputs.items() if each.kind.is_event), "")

    def stream_of(self, edge: str, chunk: Chunk) -> str:
        """What the join calls the stream of a chunk that came on an edge."""
        return self.plan.prefixes.get(edge, "") + chunk.stream if self.plan.prefixes else chunk.stream

    @property
    def goes_alone(self) -> bool:
        return self.num_processed < self.plan.alone_for

    def now_ns(self) -> int:
        return self.clock.monotonic_ns() + self.offset_ns

    def session_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self.offset_ns

    def monotonic_ns(self, event_ns: int) -> int:
        return event_ns - self.offset_ns

    def has_room(self) -> bool:
        """Does nothing wait for credit on an edge that waits?"""
        for lane in self.queues:  # noqa: SIM110 - asked at every step: a generator takes twice as long
            if lane.waits and lane.waiting:
                return False
        return True

    def begin(self, origin_ns: int) -> None:
        """origin_ns: when event time 0 is, monotonic."""
        self.offset_ns = -origin_ns
        self.begun = True
        self.ready = deque(self.ready_unit(each.unit, each.waiting.since_ns) for each in self.ready)

    def ready_unit(self, unit: Unit, since_ns: int, dry_ns: int | None = None, *, may_hold: bool = False) -> ReadyUnit:
        """since_ns: monotonic. dry_ns: of its listener, on the session's axis."""
        end_ns = unit.end_ns - self.offset_ns
        deadline_ns = end_ns + self.session.window_ns if self.session.paced else None
        dry_ns = None if dry_ns is None else dry_ns - self.offset_ns
        return ReadyUnit(unit, Waiting(self.session.id, since_ns, end_ns, deadline_ns, dry_ns, may_hold))
