"""The sections of a pipeline.yaml as the file spells them, with their defaults and limits.

Rules:
- Times are ns, sizes are bytes; the file's spelling ("150ms") ends here.
- A section sees only itself; what takes two sections to see is in graph/spec_check.py.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    create_model,
)

from graph.chunk import NS_PER_S
from graph.kinds import Late, WhenFull
from graph.ladder import OF_PICTURES, STEPS, Step
from graph.secret import Secret
from graph.units import format_bytes, format_duration, parse_bytes, parse_duration
from graph.wording import shown, suggest

VERSION: Final = 1
NANO: Final = "nano"
TINY: Final = "tiny"
BUILT_IN: Final = (NANO, TINY)
"""Models that need no folder and no download: one is shipped, the other made on first use."""
EMBEDDED: Final = "embedded"
NO_SOUND: Final = "none"
_A_MICROPHONE: Final = f"'{EMBEDDED}' or '{NO_SOUND}'"
HUB_ID: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][\w./-]{0,95}))?",
    re.ASCII,
)
"""`owner/name` or `owner/name@revision` on the Hugging Face hub."""

# ---- Values as the file spells them ---------------------------------------------------------------------------------


def _duration(at_least: str, at_most: str) -> BeforeValidator:
    def check(value: object) -> int:
        duration_ns = parse_duration(str(value))
        if not parse_duration(at_least) <= duration_ns <= parse_duration(at_most):
            raise ValueError(f"must be {at_least} to {at_most}, not {value}")
        return duration_ns

    return BeforeValidator(check)


def _camera_source(value: object) -> Secret:
    secret = Secret(value) if isinstance(value, str) else value
    if not isinstance(secret, Secret) or not secret.reveal().strip():
        given = "empty" if isinstance(secret, Secret) else shown(value)
        raise ValueError(f"must be a URL like rtsp://10.0.0.7/live or test://pattern, a file or a folder, not {given}")
    return secret


def _camera_microphone(value: object) -> str:
    if isinstance(value, Secret) or (isinstance(value, str) and "://" in value):
        raise ValueError("the sound of another source is not supported yet; write embedded or none")
    if not isinstance(value, str):
        raise ValueError(f"must be {_A_MICROPHONE}, not {shown(value)}")
    return value


def name_of(value: str) -> str:
    """A name as it may be written. Raises ValueError."""
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", value):
        raise ValueError(f"{value!r} is no name; a name has 1 to 32 of a-z 0-9 _ -")
    return value


def _view_name(value: str) -> str:
    if value in (EMBEDDED, NO_SOUND):
        raise ValueError(f"a view can't be called {value}: `microphone: {value}` means something else")
    return name_of(value)


def _listen_address(value: str) -> str:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", value)
    if not match or int(match[2]) > 65535:
        raise ValueError(f"must be host:port like 127.0.0.1:8600, not {value!r}")
    if not _is_loopback(match[1].strip("[]")):
        message = "is refused for now: there is no authentication yet; write a loopback address like"
        raise ValueError(f"{value} {message} 127.0.0.1:{match[2]}")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ladder(value: object) -> tuple[Step, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list of {', '.join(STEPS)}, or [], not {shown(value)}")
    for index, step in enumerate(value):
        if step not in STEPS:
            raise ValueError(f"there is no step {shown(step)}{suggest(str(step), STEPS)}")
        if step in value[:index]:
            raise ValueError(f"{step} is written twice")
    return tuple(value)


def _as_list(value: tuple[Step, ...] | None) -> list[Step] | None:
    return None if value is None else list(value)


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"must be a part of one GPU or a whole number of them, not {value}")
    return value


def _port(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^.\s]+\.[^.\s]+", value):
        raise ValueError(f"must be written stage.port, not {shown(value)}")
    return value


def _input(value: object) -> object:
    """`frames: camera.frames` is short for `frames: {from: camera.frames}`."""
    if isinstance(value, (str, list)):
        return {"from": value}
    if value is None:
        return {"from": []}
    if not isinstance(value, (dict, InputSpec)):
        raise ValueError(f"must be stage.port, a list of them, or {{from: stage.port, side: true}}, not {shown(value)}")
    return value


def _sources(value: object) -> tuple[str, ...]:
    return tuple(map(_port, value if isinstance(value, (list, tuple)) else [value]))


def class_path(value: object) -> str:
    """A stage's class as it may be written. Raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*|[a-z0-9_-]{1,32}", value):
        problem = f"must be module:Class or a stage's name, not {shown(value)}"
        raise ValueError(problem + (_meant(value) if isinstance(value, str) else ""))
    return value


def _meant(path: str) -> str:
    """Of a file's path, what to write instead."""
    file, _, name = path.rpartition(":")
    module = PurePosixPath(file or path).name.removesuffix(".py")
    if module.isidentifier() and ("/" in path or ".py" in path):
        return f"; did you mean '{module}:{name if file else 'Class'}'?"
    return ""


or_empty = BeforeValidator(lambda value: {} if value is None else value)  # `audio_encoder:` with nothing behind it
_as_duration = PlainSerializer(format_duration)
_as_text = PlainSerializer(str)
Count = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Bytes = Annotated[int, BeforeValidator(lambda value: parse_bytes(str(value))), PlainSerializer(format_bytes)]
Duration = Annotated[int, _duration("0s", "1h"), _as_duration]
Name = Annotated[str, AfterValidator(name_of)]
ViewName = Annotated[str, AfterValidator(_view_name)]
Source = Annotated[Secret, PlainValidator(_camera_source), _as_text]


# ---- The sections ---------------------------------------------------------------------------------------------------


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WindowSpec(Section):
    """length: T, the model's beat. lateness: a window is given up this long after its end. phases: groups of sessions
    whose windows end together, the groups one after the other within T; None: by how many sessions there are."""

    length_ns: Annotated[int, _duration("10ms", "60s"), _as_duration] = Field(default=1_000_000_000, alias="length")
    lateness_ns: Annotated[int, _duration("0s", "60s"), _as_duration] = Field(default=150_000_000, alias="lateness")
    phases: Annotated[int, Field(ge=1, le=64)] | None = None


class TailSpec(Section):
    """lead: how far speech may run ahead of the listener. delay: window k's speech plays from its end + delay on,
    a turn later where speech came later lately."""

    lead_ns: Annotated[int, _duration("10ms", "60s"), _as_duration] = Field(default=1_000_000_000, alias="lead")
    delay_ns: Annotated[int, _duration("0s", "60s"), _as_duration] = Field(default=300_000_000, alias="delay")


class CameraSpec(Section):
    """One source, or several views of one place, by their names: a unit holds the pictures of all.

    microphone: the sound in the source, or none; or the view whose sound it is (embedded: that of the first one).

    Sources may hold credentials: print `masked`, open `reveal()`.
    max_pixels: the decoder makes larger pictures smaller, before the bus. The default is twice the model's 448 x 448
    in each direction; nine slices want 9 x 448 x 448. The limits are within those of stages/media/wire.py.
    """

    source: Source | None = None
    views: Mapping[ViewName, Source] = Field(default_factory=dict)
    fps: float = Field(default=1.0, ge=0.01, le=30)
    microphone: Annotated[str, BeforeValidator(_camera_microphone)] = EMBEDDED
    max_pixels: int = Field(default=4 * 448 * 448, ge=64 * 64, le=1 << 24)

    @property
    def sources(self) -> Mapping[str, Secret]:
        """By view; that of a camera which has one source only is called ""."""
        return {**({} if self.source is None else {"": self.source}), **self.views}

    def num_pictures(self, window_ns: int) -> int:
        """How many pictures of all views a window has at most."""
        return max(len(self.sources), 1) * math.ceil(self.fps * window_ns / NS_PER_S)

    @property
    def has_sound(self) -> bool:
        return self.microphone != NO_SOUND

    @property
    def heard(self) -> str:
        """The view whose sound is heard, where one is."""
        return self.microphone if self.microphone in self.views else next(iter(self.sources), "")

    @property
    def apart(self) -> Mapping[str, CameraSpec]:
        """By view, a camera which has that one only."""
        return {
            view: CameraSpec(
                source=source,
                fps=self.fps,
                microphone=EMBEDDED if self.has_sound and view == self.heard else NO_SOUND,
                max_pixels=self.max_pixels,
            )
            for view, source in self.sources.items()
        }

    @property
    def shown_sources(self) -> Mapping[str, str]:
        """By view, where its pictures come from, without secrets."""
        return {view: source.masked for view, source in self.sources.items()}


class ReplicasSpec(Section):
    """min is what runs now. max None: the same."""

    min: int = Field(default=1, ge=0, le=1024)
    max: Count | None = None


def _replicas(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"min": value}
    if isinstance(value, (dict, ReplicasSpec)):
        return value
    raise ValueError(f"must be a whole number or {{min: 1, max: 4}}, not {shown(value)}")


def _shortest(scale: ReplicasSpec) -> object:
    return scale.min if scale.max is None else {"min": scale.min, "max": scale.max}


class InputSpec(Section):
    """Where an input comes from. None: as the stage's class has it.

    side: it holds nobody up. window: its units hold what came in this time before their end. lateness: a unit waits
    for it this long.
    """

    source: Annotated[tuple[str, ...], PlainValidator(_sources)] = Field(default=(), alias="from")
    side: bool | None = None
    window_ns: Annotated[int, _duration("10ms", "60s")] | None = Field(default=None, alias="window")
    lateness_ns: Annotated[int, _duration("0s", "60s")] | None = Field(default=None, alias="lateness")
    late: Late | None = None


class StageOptions(Section):
    """What may be written of a stage: where it runs, how much it takes at once, where its inputs come from. A stage's
    own options are added in a class derived from this one.

    use: the stage's class ("module:Class"), where it is not the one of its name.
    """

    use: Annotated[str, AfterValidator(class_path)] | None = None
    inputs: Mapping[str, Annotated[InputSpec, BeforeValidator(_input)]] = Field(default_factory=dict)
    scale: Annotated[ReplicasSpec, BeforeValidator(_replicas), PlainSerializer(_shortest)] = Field(
        default=ReplicasSpec(), alias="replicas"
    )
    gpus: Annotated[float, AfterValidator(_whole_above_one)] = Field(default=0.0, ge=0, le=64)  # per replica
    cpus: float = Field(default=0.25, ge=0, le=1024)  # per replica; places it on a cluster, and bounds nothing
    resources: Mapping[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)  # Ray's, per replica
    memory: Bytes | None = None  # more than its process has when it starts; stages of one process add up
    process: Name | None = None  # light stages with the same name share one process
    threads: Count = 1  # of torch
    # Units per process(). 24 sessions of nano on 2 cores: 96 % on time with 16 everywhere; 92 %, and a tenth more work,
    # with 8 for LLM and TTS and 4 for the vocoder.
    batch: Count = 16
    wait_ns: Annotated[int, _duration("0s", "1s"), _as_duration] = Field(default=5_000_000, alias="wait")
    hold_ns: Annotated[int, _duration("0s", "1s"), _as_duration] = Field(default=300_000_000, alias="hold")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def replicas(self) -> int:
        return self.scale.min

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_"):
                    raise
                known = list(type(self).model_fields)
                raise AttributeError(f"there is no option {name!r}{suggest(name, known, alone=False)}") from None

    @property
    def max_replicas(self) -> int:
        return self.scale.max or self.scale.min


class ConsoleSpec(Section):
    listen: Annotated[str, AfterValidator(_listen_address)] = "127.0.0.1:8600"

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0: any free one."""
        return int(self.listen.rpartition(":")[2])


class AdmissionSpec(Section):
    """profile: a file that `pipeline bench stages` wrote; cameras which it can't serve on time are refused. None: no
    camera is."""

    profile: Annotated[str, Field(min_length=1)] | None = None


class SheddingSpec(Section):
    """ladder: what a session gives up while its windows come late, in this order; [] nothing; None: all that it can do
    without. See graph/ladder.py."""

    ladder: Annotated[tuple[Step, ...] | None, PlainValidator(_ladder), PlainSerializer(_as_list)] = None

    def steps(self, *, keeps_pictures: bool = False) -> tuple[Step, ...]:
        """keeps_pictures: the model can't do without them, there is nothing else to perceive, or there are none."""
        if self.ladder is not None:
            return self.ladder
        return tuple(step for step in STEPS if not (keeps_pictures and step in OF_PICTURES))


class StagesSpec(Section):
    """All stages, also those which are off; `stages_section` makes one of the stages that there are."""

    def by_name(self) -> dict[str, StageOptions]:
        return {info.alias or name: getattr(self, name) for name, info in type(self).model_fields.items()}


@lru_cache(maxsize=64)
def file_section(stages: tuple[tuple[str, type[StageOptions]], ...]) -> type[FileSpec]:
    """The whole file, where there are these stages, by name with their options."""
    fields: dict[str, Any] = {
        f"stage_{index}": (Annotated[options, or_empty], Field(default=options(), alias=name))
        for index, (name, options) in enumerate(stages)
    }
    section = create_model("StagesSpec", __base__=StagesSpec, **fields)
    with_stages: dict[str, Any] = {"stages": (Annotated[section, or_empty], section())}
    return create_model("FileSpec", __base__=FileSpec, **with_stages)


class CreditSpec(Section):
    """None: as the edge's kind has it."""

    chunks: Count | None = None
    time_ns: Annotated[int, _duration("1ms", "1h")] | None = Field(default=None, alias="time")


class WrittenEdge(Section):
    """What is written of an edge; what is None its kind decides."""

    source: Annotated[str, PlainValidator(_port)] = Field(alias="from")
    target: Annotated[str, PlainValidator(_port)] = Field(alias="to")
    credit: Annotated[CreditSpec, or_empty] = CreditSpec()
    when_full: WhenFull | None = None
    late: Late | None = None


class FileSpec(Section):
    """The whole file."""

    version: int | None = None
    model: str = NANO
    window: Annotated[WindowSpec, or_empty] = WindowSpec()
    tail: Annotated[TailSpec, or_empty] = TailSpec()
    cameras: Annotated[Mapping[Name, CameraSpec], or_empty] = Field(default_factory=dict)
    stages: Annotated[StagesSpec, or_empty] = StagesSpec()
    edges: Annotated[list[WrittenEdge], BeforeValidator(lambda value: [] if value is None else value)] = Field(
        default_factory=list
    )
    admission: Annotated[AdmissionSpec, or_empty] = AdmissionSpec()
    shedding: Annotated[SheddingSpec, or_empty] = SheddingSpec()
    console: Annotated[ConsoleSpec, or_empty] = ConsoleSpec()
