"""The session table: where each session lives, what that makes for every replica, and when its time begins. Pure.

Rule: a session is counted at a replica as long as its placement says that it lives there, and nowhere else; of what it
does not pass it has no replica.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from deploy.control.placement import Process
from deploy.control.routing import num_phases, phase_ns, stages_of
from graph.chunk import NS_PER_MS, SessionId
from graph.spec import PipelineSpec
from stages.session import Session
from stages.stage import StageError

# From the opening of sessions to their event time 0 their decoders start, each on a core. A fork and the first picture
# take 0.05 s on a quiet machine; this one has just loaded its models, and a picture that comes later is missed.
HEAD_START_NS = 300 * NS_PER_MS
DECODER_START_NS = 200 * NS_PER_MS
FIRST_WINDOW_NS = 450 * NS_PER_MS  # at least so long before its end a session opens; lateness comes on top


@dataclass(slots=True, eq=False)
class Placement:
    """Where a session lives: per stage that it passes the replica.

    incarnation: no other session of this run has it.
    origin_ns: its event time 0 on our monotonic clock, once it has one. phase: of its windows, counted from the first
    session's.
    opened: stages that were asked to open it. is_open: all have.
    absent: stages at which it is open nowhere, since its replica has died. in_hand: those for which somebody is looking
    for another one.
    num_windows, num_late: that have come to their end, and late, as was reported last. removed_views: their names.
    since: only reports that were asked for later know all of it. is_ending: its sources were asked to stop.
    is_given_up: a stage has failed at it too often. given_up: by stage on a side branch that its data kill, the reason:
    the session goes on without it.
    """

    session: Session
    replicas: dict[str, int]
    incarnation: int
    opened: list[str] = field(default_factory=list)
    origin_ns: int = 0
    phase: int | None = None
    is_open: bool = False
    absent: set[str] = field(default_factory=set)
    in_hand: set[str] = field(default_factory=set)
    num_windows: int = 0
    num_late: int = 0
    removed_views: set[str] = field(default_factory=set)
    since: int = 0
    is_ending: bool = False
    is_given_up: bool = False
    given_up: dict[str, str] = field(default_factory=dict)


class SessionTable:
    """The sessions that are open, or about to be."""

    def __init__(self, spec: PipelineSpec, now_ns: Callable[[], int], num_cores: int) -> None:
        """num_cores: of the machine where decoders start."""
        self._spec = spec
        self._num_cores = num_cores
        self._now_ns = now_ns
        self.placements: dict[SessionId, Placement] = {}
        self._first_origin_ns: int | None = None
        self._num_entered = 0

    def enter(self, sessions: Sequence[Session], living: Callable[[str], Collection[int]]) -> None:
        """Give each session its replicas. living: of a stage, the replicas that are there.

        Raises StageError when no replica of a stage is there.
        """
        for session in sessions:
            passed = stages_of(session, self._spec)
            replicas: dict[str, int] = {}
            together: dict[str, int] = {}  # stages that share a process have a session at the same replica of it
            for name, stage in self._spec.stages.items():
                if name in passed and stage.process is None:
                    replicas[name] = self._next_replica(name, living(name))
                elif name in passed and stage.process is not None:
                    if stage.process not in together:
                        together[stage.process] = self._next_replica(name, living(name))
                    replicas[name] = together[stage.process]
            self._num_entered += 1
            self.placements[session.id] = Placement(session, replicas, self._num_entered)

    def load_of(self, stage: str) -> list[int]:
        """Sessions per replica of a stage."""
        counts = [0] * max(self._spec.stages[stage].replicas, 1)
        for placement in self.placements.values():
            if stage in placement.replicas:
                counts[placement.replicas[stage]] += 1
        return counts

    def at(self, process: Process) -> list[Placement]:
        """Those that are open and live in a process."""
        return [
            placement
            for placement in self.placements.values()
            if placement.is_open and any(placement.replicas.get(stage) == process.replica for stage in process.stages)
        ]

    def absent_at(self, stages: Collection[str]) -> list[Placement]:
        """Those for which nobody looks for a replica of these stages, which share a process, yet."""
        return [p for p in self.placements.values() if not p.absent.isdisjoint(stages) and p.in_hand.isdisjoint(stages)]

    def holds(self, placement: Placement) -> bool:
        """Is it still in the table?"""
        return self.placements.get(placement.session.id) is placement

    def next_origins_ns(self, sessions: Sequence[Session]) -> Mapping[SessionId, int]:
        """When each session's event time begins: soon, and in step with the windows of its phase, so that the units of
        sessions of one phase are ready together and share their forwards. The phases take turns within a window.

        For one that comes while others run, which somebody waits for, its first window may have begun already.
        """
        window = self._spec.window
        soon_ns = self._now_ns() + HEAD_START_NS + DECODER_START_NS * len(sessions) // self._num_cores
        if self._first_origin_ns is None:
            self._first_origin_ns = soon_ns
        elif all(session.paced for session in sessions):
            soon_ns = min(soon_ns, self._now_ns() + FIRST_WINDOW_NS - window.length_ns)
        for session in sessions:
            placement = self.placements[session.id]
            # In virtual time there are no bursts, and the larger the batch the better.
            placement.phase = self._next_phase(soon_ns) if session.paced else 0
            placement.origin_ns = self._origin_ns(placement.phase, soon_ns)
        return {session.id: self.placements[session.id].origin_ns for session in sessions}

    def _next_phase(self, soon_ns: int) -> int:
        """The one with the fewest sessions; of several the one whose window begins first."""
        counts = Counter(placement.phase for placement in self.placements.values())
        phases = range(num_phases(self._num_at_busiest(), self._spec))
        return min(phases, key=lambda phase: (counts[phase], self._origin_ns(phase, soon_ns)))

    def _num_at_busiest(self) -> int:
        """Sessions at the replica with a model that has most."""
        spec = self._spec
        replicas = [each.replicas for name, each in spec.stages.items() if spec.types[name].has_model]
        return -(-len(self.placements) // max(min(replicas, default=1), 1))

    def _origin_ns(self, phase: int, soon_ns: int) -> int:
        """The first beginning of a window of a phase from then on."""
        window = self._spec.window
        return soon_ns + ((self._first_origin_ns or 0) + phase_ns(phase, self._spec) - soon_ns) % window.length_ns

    def _next_replica(self, stage: str, living: Collection[int]) -> int:
        if not living:
            raise StageError(f"{stage} has died and is being started again; try again in a moment")
        loads = self.load_of(stage)
        return min(living, key=lambda replica: (loads[replica], replica))
