"""What the machinery must know of a kind of stage: it stands on the stage's class and is read off it here. Pure.

Rule: nothing outside a stage's class says what the stage takes, makes or needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from graph.chunk import NS_PER_MS, NS_PER_S, Array, Chunk, Scalar, SessionId, end_of_stream, watermark
from graph.costs import StageCost
from graph.errors import GraphError
from graph.kinds import EVENT_FIELDS, WINDOW_EVENT, Kind, Late
from graph.sections import StageOptions
from graph.units import format_duration
from graph.window import Unit
from graph.wording import listed

Scope: TypeAlias = Literal["session", "pipeline"]
MIN_WINDOW_NS: Final = 10 * NS_PER_MS
MAX_WINDOW_NS: Final = 60 * NS_PER_S


class StageTypeError(GraphError):
    """A class can't be a stage; says why and what instead."""


class In:
    """An input of a stage, as an attribute of its class: `frames = In(FRAMES)`.

    side:        it holds nobody up and ends no window: what does not come in time is counted, and left out.
    many:        several stages may feed it; only for kinds without windows, such as events.
    optional:    the stage is of use without it.
    window_ns:   its units hold what came in this time before their end (a sliding window); None: in their window.
    lateness_ns: a unit waits for it this long after its end; None: as the pipeline says.
    late:        what happens to a chunk whose window has left; None: as its kind says.
    """

    is_feedback = False

    def __init__(
        self,
        kind: Kind[Any],
        *,
        side: bool = False,
        many: bool = False,
        optional: bool = False,
        window_ns: int | None = None,
        lateness_ns: int | None = None,
        late: Late | None = None,
    ) -> None:
        self.kind = kind
        self.side = side
        self.many = many
        self.optional = optional
        self.window_ns = window_ns
        self.lateness_ns = lateness_ns
        self.late = late
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name


class Feedback(In):
    """An input that carries news from downstream, such as what the listener has heard; it may close a circle."""

    is_feedback = True

    def __init__(self, kind: Kind[Any]) -> None:
        super().__init__(kind, optional=True)


class Out:
    """An output of a stage, as an attribute of its class: `moving = Out(FRAMES)`. Makes what leaves there.

    many: of a source, one stream for each of the camera's views, each with its own watermarks. Elsewhere what was made
    of all views leaves on one stream, each chunk with its `view`.
    """

    def __init__(self, kind: Kind[Any], *, many: bool = False) -> None:
        self.kind = kind
        self.many = many
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def chunk(
        self,
        session: SessionId,
        start_ns: int,
        duration_ns: int = 0,
        *,
        arrays: Mapping[str, Array] | None = None,
        attrs: Mapping[str, Scalar] | None = None,
        view: str = "",
    ) -> Chunk:
        """A chunk of data, which covers [start_ns, start_ns + duration_ns) of the session's event time.

        view: of which of the camera's views it is, for those that have several.
        """
        return Chunk(session, self.name, start_ns, duration_ns, arrays=arrays or {}, attrs=attrs or {}, view=view)

    def over(
        self, unit: Unit, *, arrays: Mapping[str, Array] | None = None, attrs: Mapping[str, Scalar] | None = None
    ) -> Chunk:
        """A chunk of data, which covers the unit's window."""
        return self.chunk(unit.session, unit.start_ns, unit.end_ns - unit.start_ns, arrays=arrays, attrs=attrs)

    def like(
        self, chunk: Chunk, *, arrays: Mapping[str, Array] | None = None, attrs: Mapping[str, Scalar] | None = None
    ) -> Chunk:
        """What came in, of the same time and view, with the same content or another one."""
        return Chunk(
            chunk.session,
            self.name,
            chunk.start_ns,
            chunk.duration_ns,
            arrays=chunk.arrays if arrays is None else arrays,
            attrs=chunk.attrs if attrs is None else attrs,
            view=chunk.view,
        )

    def event(self, session: SessionId, at_ns: int, kind: str, /, **attrs: Scalar) -> Chunk:
        """Something worth telling.

        at_ns: event time, such as that of the chunk which it is about. kind: its type, as the other events of its kind
        are called; any but "window", which are the rows of windows.jsonl. attrs: its fields, by any names but `type`,
        `session` and `time_s`, which each event has. Raises ValueError for those.
        """
        if kind == WINDOW_EVENT:
            raise ValueError(f"an event of type {kind!r} is a row of windows.jsonl: give yours another type")
        if taken := attrs.keys() & EVENT_FIELDS:
            raise ValueError(f"event {kind!r}: each event has {listed(taken)} already; give your field another name")
        return Chunk(session, self.name, at_ns, attrs={"type": kind, **attrs})

    def watermark(self, session: SessionId, at_ns: int, *, view: str = "") -> Chunk:
        """For sources. A promise: nothing before `at_ns` will leave here."""
        return watermark(session, self.name, at_ns, view=view)

    def end(self, session: SessionId, at_ns: int, *, view: str = "", removed: bool = False) -> Chunk:
        """For sources. Nothing will leave here any more; what has left ends at `at_ns` at the latest.

        removed: the view was taken away, so windows after it lack nothing.
        """
        return end_of_stream(session, self.name, at_ns, view=view, removed=removed)


@dataclass(frozen=True, slots=True)
class StageType:
    """A kind of stage.

    use:          where its class is, "module:Class".
    options:      what may be written of it in pipeline.yaml.
    scope:        session: each session has a state of its own, and keeps to one replica. pipeline: one replica has the
                  state of all sessions.
    component:    the part of the checkpoint that it computes with; "" for none. With one it has a process of its own.
    cost:         what a batch takes, until it is measured.
    is_local:     it opens files, cameras or devices of the machine on which `pipeline up` runs.
    can_be_off:   `replicas: 0` is allowed. is_needed: it is of use though nothing takes what it makes.
    shares:       what it reads together with other stages, which then live in one process with it; "" for nothing.
    ends_windows: a window has come to its end when it has passed this stage, if no other such stage comes behind it.
    sessions_per_replica: where pipeline.yaml does not say how many replicas there are, one for so many cameras, though
                  not more than there are cores; None: one.
    """

    use: str
    about: str
    inputs: Mapping[str, In]
    outputs: Mapping[str, Out]
    options: type[StageOptions]
    scope: Scope = "session"
    component: str = ""
    cost: StageCost | None = None
    is_local: bool = False
    can_be_off: bool = True
    is_needed: bool = False
    ends_windows: bool = False
    shares: str = ""
    sessions_per_replica: int | None = None

    @property
    def makes_windows_only(self) -> bool:
        """Whether it is of no use where nothing takes what it makes."""
        return bool(self.outputs) and all(port.kind.is_windowed for port in self.outputs.values())

    @property
    def makes_pictures(self) -> bool:
        """Whether its work is a picture's, however many a window has, and not a window's."""
        return any(port.kind.is_picture for port in self.outputs.values())

    @property
    def has_model(self) -> bool:
        return bool(self.component)


class Catalog(Protocol):
    """Where stages are found (stages/catalog.py)."""

    @property
    def built_in(self) -> Mapping[str, StageType]:
        """Those that every pipeline has, by name, in the order in which a window passes them."""

    @property
    def installed(self) -> Mapping[str, str]:
        """Those that other packages bring: by name, where the class is."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Folders in which classes are looked for, beside the installed packages."""

    def find(self, use: str) -> StageType:
        """The stage of a class ("module:Class") or of a name. Raises StageTypeError: what is wrong with it."""

    def source_problem(self, source: str) -> str:
        """Why a camera's source can be read nowhere, secrets masked; "" where it depends on the machine, or can."""


def outputs_of(cls: type[Any]) -> list[Out]:
    """The outputs that a stage's class declares, in their order."""
    return [port for port in _attributes(cls).values() if isinstance(port, Out)]


def stage_type_of(cls: Any, use: str) -> StageType:
    """What a stage's class declares. use: where it is. Raises StageTypeError."""
    inputs = {name: port for name, port in _attributes(cls).items() if isinstance(port, In)}
    outputs = {port.name: port for port in outputs_of(cls)}
    _check(cls, use, inputs, outputs)
    return StageType(
        use=use,
        about=(cls.__doc__ or "").strip().partition("\n")[0],
        inputs=inputs,
        outputs=outputs,
        options=cls.Options,
        scope=cls.scope,
        component=cls.component,
        cost=cls.cost,
        is_local=cls.is_local,
        can_be_off=cls.can_be_off,
        is_needed=cls.is_needed,
        ends_windows=cls.ends_windows,
        shares=cls.shares,
        sessions_per_replica=cls.sessions_per_replica,
    )


def _attributes(cls: type[Any]) -> dict[str, Any]:
    return {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}


def can_be_off(types: Mapping[str, StageType]) -> set[str]:
    """Those of the stages that may be switched off."""
    return {name for name, each in types.items() if each.can_be_off}


def needed_among(types: Mapping[str, StageType]) -> set[str]:
    """Those of the stages that are of use though nothing takes what they make."""
    return {name for name, each in types.items() if each.is_needed}


def _check(cls: Any, use: str, inputs: Mapping[str, In], outputs: Mapping[str, Out]) -> None:
    if not inputs and not outputs:
        raise StageTypeError(f"{use} has no ports; write some in the class, like `frames = In(FRAMES)`")
    ports: list[In | Out] = [*inputs.values(), *outputs.values()]
    for port in ports:
        if not isinstance(port.kind, Kind):
            raise StageTypeError(f"{use}: {port.name} is of kind {port.kind!r}; give it a Kind, like FRAMES")
        if _is_taken(cls, port.name):
            raise StageTypeError(
                f"{use}: a port can't be called {port.name}: every stage has that; give it another name"
            )
    for port in inputs.values():
        _check_times(use, port)
    if many := [name for name, port in inputs.items() if port.many and port.kind.is_windowed]:
        raise StageTypeError(f"{use}: {listed(many)}: windows come from one source; many=True is for events")
    windows = {port.kind.is_windowed for port in inputs.values() if not port.is_feedback}
    if len(windows) > 1:
        raise StageTypeError(f"{use}: some inputs come in windows and some do not; make two stages of it")
    if True in windows and (many := [port.name for port in outputs.values() if port.many]):
        raise StageTypeError(f"{use}: {listed(many)}: many=True is for sources; here all views leave on one stream")
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, StageOptions)):
        raise StageTypeError(f"{use}: its Options are no StageOptions; write `class Options(StageOptions):`")
    if cls.scope not in get_args(Scope):
        raise StageTypeError(f"{use}: scope is {cls.scope!r}; it must be 'session' or 'pipeline'")
    for name, field in cls.Options.model_fields.items():
        if field.is_required():
            raise StageTypeError(f"{use}: Options.{name} has no default; give it one")
        if not _is_apart(name, field):
            raise StageTypeError(f"{use}: Options.{name} is an option of every stage; give yours another name")
    for name in cls.Options.model_fields:  # once all can be made
        if wrong := _wrong_default(cls.Options, name):
            raise StageTypeError(f"{use}: Options.{name}: its default {wrong}")


def _check_times(use: str, port: In) -> None:
    for what, value, least_ns, example in (
        ("window_ns", port.window_ns, MIN_WINDOW_NS, "2 * NS_PER_S"),
        ("lateness_ns", port.lateness_ns, 0, "300 * NS_PER_MS"),
    ):
        if value is not None and not (type(value) is int and least_ns <= value <= MAX_WINDOW_NS):
            least = format_duration(least_ns)
            problem = f"{use}: {port.name}: {what} is {value!r}; it is in whole nanoseconds, of {least} to 60s"
            raise StageTypeError(f"{problem}: write {what}={example}")
    if port.late is not None and port.late not in get_args(Late):
        raise StageTypeError(f"{use}: {port.name}: late is {port.late!r}; it must be 'drop' or 'carry'")


def _wrong_default(options: type[StageOptions], name: str) -> str:
    """What is wrong with an option's default: it must be written, and be read again, as any value in the file."""
    made = options()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            written = made.model_dump(include={name}, by_alias=True)
        options.model_validate(written)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should be", "it must be")
        return f"is {getattr(made, name)!r}: {reason.removeprefix('Value error, ')}"
    except Exception:  # of a value of another type
        kind = options.model_fields[name].annotation
        return f"is {getattr(made, name)!r}; it must be of type {getattr(kind, '__name__', kind)}"
    return ""


def _is_taken(cls: type[Any], name: str) -> bool:
    """Is it the name of something that is no port?"""
    others = [base for base in cls.__mro__ if not isinstance(vars(base).get(name), In | Out)]
    return any(name in vars(base) or name in vars(base).get("__annotations__", ()) for base in others)


def _is_apart(name: str, field: FieldInfo) -> bool:
    """Is it an option of the stage's own, or one of every stage with another default?"""
    for theirs, shared in StageOptions.model_fields.items():
        same = (name == theirs, (field.alias or name) == (shared.alias or theirs))
        if any(same) and not (all(same) and field.annotation == shared.annotation):
            return False
    return True
