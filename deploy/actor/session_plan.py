"""What passes between who plans sessions and the stages that run them: how one takes part, and how it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graph.chunk import SessionId
from graph.tail import Ack
from graph.window import Late
from stages.stage import Session, SourceReport


@dataclass(frozen=True, slots=True)
class Listener:
    """What was last heard of a session's listener, and how far down the shedding ladder it is."""

    ack: Ack
    level: int


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """How one stage replica takes part in a session.

    streams:        what the join waits for, with what happens to late chunks; empty for a source.
    num_inputs:     input edges; a stage without windows ends with the last of them.
    peers:          per output edge the replica that this session goes to.
    incarnation:    tells it from other sessions of its name, on every edge.
    ends_windows:   its windows end here.
    makes:          the streams that leave here, but for the listener's news.
    goes_on:        where it takes the place of a replica that has died: what it is to know of the session.
    alone_for:      so many of its units go without others, since an actor died of one of several (actor/suspects.py).
    """

    session: Session
    streams: Mapping[str, Late] = field(default_factory=dict)
    num_inputs: int = 0
    peers: Mapping[str, int] = field(default_factory=dict)
    incarnation: int = 0
    ends_windows: bool = False
    makes: tuple[str, ...] = ()
    goes_on: Listener | None = None
    alone_for: int = 0


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """A session at one stage: windows that are through, and how many of them came late (known at the sink only)."""

    num_windows: int
    num_late: int


@dataclass(frozen=True, slots=True)
class StageSnapshot:
    """What a stage replica has done and has before it. given_up: the sessions that fail here, and why."""

    num_units: int
    num_ready: int
    sessions: Mapping[SessionId, SessionSnapshot]
    sources: Mapping[SessionId, SourceReport] = field(default_factory=dict)
    given_up: Mapping[SessionId, str] = field(default_factory=dict)
