"""What passes between who plans sessions and the stages that run them: how one takes part, and how it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graph.chunk import SessionId
from graph.kinds import Kind
from graph.tail import Ack
from graph.value import value
from graph.window import Input
from stages.session import Session
from stages.stage import SourceId, SourceReport


@dataclass(frozen=True, slots=True)
class Listener:
    """What was last heard of a session's listener, and how far down the shedding ladder it is."""

    ack: Ack
    level: int


def view_stream(stream: str, view: str) -> str:
    """The name under which a view's own stream travels, of a port that makes one per view."""
    return f"{stream}/{view}" if view else stream


@dataclass(frozen=True, slots=True)
class Output:
    """What leaves at a port: the stream's name on the bus, its kind, and the edges that it goes out on.

    is_many: one stream leaves per view of the camera.
    """

    stream: str
    kind: Kind[Any]
    edges: tuple[str, ...] = ()
    is_many: bool = False

    def stream_of(self, view: str) -> str:
        """The stream on which a view's chunks leave."""
        return view_stream(self.stream, view) if self.is_many else self.stream


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """How one stage replica takes part in a session.

    inputs:         by stream what the join takes; empty for a source, and for a stage without windows.
    prefixes:       by edge, what `inputs` puts before the names of streams that come on several edges.
    ports:          by edge the port at which it comes in.
    num_inputs:     input edges; a stage without windows ends with the last of them.
    outputs:        what may leave, by the port's name.
    peers:          per output edge the replica that this session goes to.
    to_sources:     edges to stages where windows begin, which ask nothing of the listener but the shed level.
    incarnation:    tells it from other sessions of its name, on every edge.
    ends_windows:   its windows end here. upstream: the streams that windows have passed before, other than sources'.
    is_aside:       no window ends behind it, as on a side branch: it reports itself what fails here.
    resume_from:    where it takes the place of a replica that has died: what is known of the listener.
    num_late:       of the windows that had come to their end there, as far as was reported.
    removed_views:  that were taken away from it, which nobody behind may have heard of since.
    held:           edges at whose other end it is not open now; nothing is sent there before it is (`reroute`).
    alone_for:      so many of its units go without others, since an actor died of one of several (actor/suspects.py).
    given_up:       why the stage is not asked any more, from the beginning; "" where it is.
    """

    session: Session
    inputs: Mapping[str, Input] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, str] = field(default_factory=dict)
    num_inputs: int = 0
    outputs: Mapping[str, Output] = field(default_factory=dict)
    peers: Mapping[str, int] = field(default_factory=dict)
    to_sources: frozenset[str] = frozenset()
    incarnation: int = 0
    ends_windows: bool = False
    upstream: tuple[str, ...] = ()
    is_aside: bool = False
    resume_from: Listener | None = None
    num_late: int = 0
    removed_views: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    alone_for: int = 0
    given_up: str = ""


@value
class SessionSnapshot:
    """A session at one stage: windows that are through, and how many of them came late (known at the sink only)."""

    num_windows: int
    num_late: int


@value
class StageSnapshot:
    """What a stage replica has done and has before it.

    given_up: the sessions that fail here, and why. given_up_aside: those that go on all the same, since no window ends
    behind this stage. given_up_before: those that have ended here since. Sessions on a side branch stay when they end.
    runs_with: what it computes with, for the user.
    """

    num_units: int
    num_ready: int
    sessions: Mapping[SessionId, SessionSnapshot]
    sources: Mapping[SourceId, SourceReport] = field(default_factory=dict)
    given_up: Mapping[SessionId, str] = field(default_factory=dict)
    given_up_aside: Mapping[SessionId, str] = field(default_factory=dict)
    given_up_before: Mapping[SessionId, str] = field(default_factory=dict)
    runs_with: str = ""
