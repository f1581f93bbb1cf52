"""What a stage is: plain compute on units of many sessions.

Rule: a stage has no clock, socket or metric of its own. The actor (actor/runner.py) measures, waits and sends; it
hands in units and times and sends on what comes back. What may hang, as a disk does, works in a thread of its own
(stages/disk.py), for which no stage waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from graph.chunk import NS_PER_MS, Chunk, SessionId
from graph.costs import StageCost
from graph.sections import StageOptions
from graph.stage_type import Out, Scope, outputs_of
from graph.tail import Ack
from graph.window import Unit
from stages.session import Session, View

T = TypeVar("T")
TICK_NS = 10 * NS_PER_MS
"""How often a stage looks at the clock that can't say when it will have something to do: a hundredth of a window."""


class StageError(Exception):
    """A stage can't do what it is asked to; says what, where and what instead."""


class BatchLost(StageError):
    """A stage has failed at a batch after the state of its sessions had moved: the units can't be tried again.

    Raised from what it failed of; the sessions can go on with their next units.
    """


@contextmanager
def moving(start_anew: Callable[[], None]) -> Iterator[None]:
    """While the state of a batch's sessions moves: what raises in it is a BatchLost.

    start_anew: brings the sessions into a state from which they can go on.
    """
    try:
        yield
    except BaseException as error:
        start_anew()
        raise BatchLost(str(error)) from error


class MissingDependency(StageError):
    """A stage needs something that is not installed here."""


class SourceId(NamedTuple):
    """A source of a session: its view's name is "" where there is only one."""

    session: SessionId
    view: str = ""

    def __str__(self) -> str:
        return f"{self.session}/{self.view}" if self.view else self.session


@dataclass(frozen=True, slots=True)
class SourceReport:
    """How a source does. problem: why it was lost the last time, or gave nothing; "" while all is well."""

    has_delivered: bool = False
    is_up: bool = False
    num_lost: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a stage is loaded. name: of the stage in the pipeline. checkpoint: the model's folder.

    shared: what the stages of one process have in common, one of each type.
    """

    name: str
    checkpoint: Path
    device: str = "cpu"
    shared: dict[type, object] = field(default_factory=dict)

    def common(self, kind: type[T], make: Callable[[], T]) -> T:
        """The process's one of a type, made when it is first asked for."""
        if kind not in self.shared:
            self.shared[kind] = make()
        one = self.shared[kind]
        assert isinstance(one, kind)
        return one


class Stage:
    """Base of all stages; ports are class attributes (`frames = In(FRAMES)`), `process` and the hooks a stage needs are
    overridden.

    Options:      what may be written of it in pipeline.yaml; `options` is what is.
    scope:        session (a state per session, which keeps to one replica) or pipeline (one replica has the state of
                  all sessions).
    cost:         what a batch takes, until it is measured.
    component:    the part of the checkpoint that it computes with. shares: see graph/stage_type.py.
    is_local, can_be_off, is_needed, ends_windows, sessions_per_replica: see graph/stage_type.py.
    paced_by_listener: in virtual time a unit waits until the listener's clock has come to its end.
    """

    Options: ClassVar[type[StageOptions]] = StageOptions
    scope: ClassVar[Scope] = "session"
    cost: ClassVar[StageCost | None] = None
    component: ClassVar[str] = ""
    shares: ClassVar[str] = ""
    sessions_per_replica: ClassVar[int | None] = None
    is_local: ClassVar[bool] = False
    can_be_off: ClassVar[bool] = True
    is_needed: ClassVar[bool] = False
    ends_windows: ClassVar[bool] = False
    paced_by_listener: ClassVar[bool] = False
    options: Any

    @classmethod
    def load(cls, options: Any, site: Site) -> Self:
        """A replica of the stage. Overridden where it takes more than options, such as weights.

        Raises StageError or ModelError; says what is wrong and what instead.
        """
        stage = cls()
        stage.options = options
        return stage

    @property
    def runs_with(self) -> str:
        """For the user: what it computes with here, as "cuda bfloat16, flash attention"; "" where nothing is chosen."""
        return ""

    def open_session(self, session: Session) -> None:
        """Make room for a session. Raises StageError when there is none; nothing is kept then."""

    def close_session(self, session: SessionId) -> None:
        """Free what the session holds. May be called twice."""

    def process(self, units: list[Unit]) -> list[Chunk]:
        """Work on one unit each of several sessions, as one batch; returns what leaves, in order per session.

        What it raises costs the session whose unit it was: each unit is tried again alone, for which every session must
        be as it was before. Raises BatchLost where that can't be.
        """
        return []

    def is_idle(self, unit: Unit) -> bool:
        """Nothing is to be computed for this unit: it waits for no peers, and takes no place in a batch."""
        return False

    def may_hold(self, unit: Unit) -> bool:
        """May this unit be held for others as long as its listener has something to hear? What it says then neither
        begins nor ends a turn."""
        return False

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        """For sources and sinks: what is due by event time `now_ns`, control chunks included."""
        return []

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        """For sources and sinks: in how many ns `advance` has something to do, if nothing comes in until then."""
        return TICK_NS

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        """The listener barged in: forget what was to be said. ack tells what was heard."""
        return []

    def cut_off(self, session: SessionId, now_ns: int) -> list[Chunk]:
        """For sinks: what was said and not heard will not be heard; its maker has died."""
        return []

    def downstream_replaced(self, session: SessionId) -> None:
        """The session's downstream replica was replaced and has no state: send again what it needs once."""

    def finished(self, session: SessionId) -> bool:
        """May the session end, now that its inputs have ended and all units are processed?"""
        return True

    def has_more_to_say(self, session: SessionId) -> bool:
        """Has it something left to say, now that its inputs have ended? Then it is given windows without content."""
        return False

    def end(self, session: SessionId, now_ns: int) -> None:
        """For sources: stop; the stream ends with the window of `now_ns`."""

    def add_view(self, session: Session, view: View, now_ns: int) -> None:
        """For sources: the camera has another view, one of `session.media.views`. Raises StageError where it can't."""

    def remove_view(self, session: SessionId, view: str, now_ns: int) -> None:
        """For sources: the camera has one view less; its stream ends with the window of `now_ns`."""

    def sources(self) -> Mapping[SourceId, SourceReport]:
        """For sources: how those do that are open, and those that were until lately."""
        return {}

    def drain(self, session: SessionId) -> list[Chunk]:
        """What a session still has to say when it ends."""
        return []

    def wakes(self) -> Mapping[int, SessionId]:
        """File descriptors that become readable when `advance` has something to do, and for which session."""
        return {}


@dataclass(slots=True)
class _Making:
    """How far a source has come with a session. end_ns: where it ends, once that is known.

    removed: views that end with the next window.
    """

    session: Session
    made_ns: int = 0
    end_ns: int | None = None
    is_over: bool = False
    removed: tuple[str, ...] = ()

    @property
    def is_past(self) -> bool:
        return self.end_ns is not None and self.made_ns >= self.end_ns


class Source(Stage):
    """Base of a stage to which nothing comes: `make` is asked for each window, at its end.

    A subclass that overrides `open_session` or `close_session` calls these.
    """

    is_local = True

    def __init__(self) -> None:
        self._making: dict[SessionId, _Making] = {}

    def make(self, session: Session, start_ns: int, end_ns: int) -> list[Chunk] | None:
        """What there was from `start_ns` to `end_ns` of event time, at most; None: it had ended before."""
        raise NotImplementedError

    def open_session(self, session: Session) -> None:
        self._making[session.id] = _Making(session, session.begin_index * session.window_ns, session.duration_ns)

    def close_session(self, session: SessionId) -> None:
        self._making.pop(session, None)

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        state = self._making[session]
        end_ns = state.made_ns + state.session.window_ns
        if state.is_over or (state.session.paced and not state.is_past and now_ns < end_ns):
            return []
        gone, state.removed = state.removed, ()
        ports = [port for port in outputs_of(type(self)) if port.many]
        ended = [port.end(session, state.made_ns, view=view, removed=True) for view in gone for port in ports]
        made = None if state.is_past else self.make(state.session, state.made_ns, end_ns)
        if made is not None:
            state.made_ns = end_ns
        state.is_over = made is None or state.is_past
        streams = self._streams(state)
        watermarks = [port.watermark(session, end_ns, view=view) for port, view in streams] if made is not None else []
        ends = [port.end(session, state.made_ns, view=view) for port, view in streams] if state.is_over else []
        return [*ended, *(made or []), *watermarks, *ends]

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        state = self._making[session]
        if state.is_past or not state.session.paced:
            return 0
        return max(state.made_ns + state.session.window_ns - now_ns, 0)

    def add_view(self, session: Session, view: View, now_ns: int) -> None:
        self._making[session.id].session = session

    def remove_view(self, session: SessionId, view: str, now_ns: int) -> None:
        state = self._making[session]
        state.session, state.removed = state.session.without_view(view), (*state.removed, view)

    def _streams(self, state: _Making) -> list[tuple[Out, str]]:
        """What leaves window by window: by port, and of one with many by view."""
        views = [view.name for view in state.session.media.views]
        ports = [port for port in outputs_of(type(self)) if port.kind.is_windowed]
        return [(port, view) for port in ports for view in (views if port.many else [""])]

    def end(self, session: SessionId, now_ns: int) -> None:
        self._making[session].end_ns = now_ns

    def finished(self, session: SessionId) -> bool:
        return self._making[session].is_over


def session_seed(seed: int, session: SessionId) -> int:
    """A seed of a session's own: what it draws depends on `seed` and its name, not on who else is there."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{session}".encode()).digest()[:7], "little")
