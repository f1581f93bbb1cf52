"""The sections of a pipeline.yaml as the file spells them, with their defaults and limits.

Rules:
- Times are ns, sizes are bytes; the file's spelling ("150ms") ends here.
- A section sees only itself; what takes two sections to see is in graph/spec_check.py.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)

from graph.kinds import WhenFull
from graph.ladder import OF_PICTURES, STEPS, Step
from graph.ports import STAGES, InPort, OutPort
from graph.secret import Secret
from graph.units import format_bytes, format_duration, parse_bytes, parse_duration
from graph.window import Late
from graph.wording import shown, suggest

VERSION: Final = 1
NANO: Final = "nano"
TINY: Final = "tiny"
BUILT_IN: Final = (NANO, TINY)
"""Models that need no folder and no download: one is shipped, the other made on first use."""
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
        raise ValueError("must be a URL like rtsp://10.0.0.7/live or test://pattern")
    return secret


def _camera_microphone(value: object) -> object:
    if isinstance(value, Secret) or (isinstance(value, str) and "://" in value):
        raise ValueError("the sound of another source is not supported yet; write embedded or none")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", value):
        raise ValueError(f"{value!r} is no name; a name has 1 to 32 of a-z 0-9 _ -")
    return value


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


def _port(known: Mapping[str, Collection[str]], what: str, value: object) -> tuple[str, str]:
    """`stage.port` taken apart; ValueError says which there are."""
    stage, dot, name = str(value).partition(".")
    if not dot:
        raise ValueError(f"must be written stage.{what}, not {shown(value)}")
    if stage not in known:
        raise ValueError(f"there is no stage {stage!r}{suggest(stage, known)}")
    if name not in known[stage]:
        has = f"it has: {', '.join(sorted(known[stage]))}" if known[stage] else "it has none"
        raise ValueError(f"stage {stage!r} has no {what} {name!r}; {has}{suggest(name, known[stage], alone=False)}")
    return stage, name


def _out_port(value: object) -> OutPort:
    return OutPort(*_port({stage: ports.outputs for stage, ports in STAGES.items()}, "output", value))


def _in_port(value: object) -> InPort:
    return InPort(*_port({stage: ports.inputs for stage, ports in STAGES.items()}, "input", value))


_or_empty = BeforeValidator(lambda value: {} if value is None else value)  # `audio_encoder:` with nothing behind it
_as_duration = PlainSerializer(format_duration)
_as_text = PlainSerializer(str)
Count = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Name = Annotated[str, AfterValidator(_name)]


# ---- The sections ---------------------------------------------------------------------------------------------------


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WindowSpec(Section):
    """length: T, the model's beat. lateness: a window is given up this long after its end. phases: groups of sessions
    whose windows end together, the groups one after the other within T."""

    length_ns: Annotated[int, _duration("10ms", "60s"), _as_duration] = Field(default=1_000_000_000, alias="length")
    lateness_ns: Annotated[int, _duration("0s", "60s"), _as_duration] = Field(default=150_000_000, alias="lateness")
    # 8 sessions of tiny on 2 cores: p99 608 ms with 1 phase, 280 with 2, 361 with 4; the work is the same.
    phases: Annotated[int, Field(ge=1, le=64)] = 2


class TailSpec(Section):
    """lead: how far speech may run ahead of the listener. delay: window k's speech plays from its end + delay on."""

    lead_ns: Annotated[int, _duration("10ms", "60s"), _as_duration] = Field(default=1_000_000_000, alias="lead")
    delay_ns: Annotated[int, _duration("0s", "60s"), _as_duration] = Field(default=300_000_000, alias="delay")


class CameraSpec(Section):
    """source may hold credentials: print `masked`, open `reveal()`. microphone: the sound in source, or none.

    max_pixels: the decoder makes larger pictures smaller, before the bus. The default is twice the model's 448 x 448
    in each direction; nine slices want 9 x 448 x 448. The limits are within those of stages/media_wire.py.
    """

    source: Annotated[Secret, PlainValidator(_camera_source), _as_text]
    fps: float = Field(default=1.0, ge=0.01, le=30)
    microphone: Annotated[Literal["embedded", "none"], BeforeValidator(_camera_microphone)] = "embedded"
    max_pixels: int = Field(default=4 * 448 * 448, ge=64 * 64, le=1 << 24)


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


class StageSpec(Section):
    """Where a stage runs and how much it takes at once; the same for all stages."""

    scale: Annotated[ReplicasSpec, BeforeValidator(_replicas), PlainSerializer(_shortest)] = Field(
        default=ReplicasSpec(), alias="replicas"
    )
    gpus: Annotated[float, AfterValidator(_whole_above_one)] = Field(default=0.0, ge=0, le=64)  # per replica
    cpus: float = Field(default=0.25, ge=0, le=1024)  # per replica
    resources: Mapping[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)  # Ray's, per replica
    process: Name | None = None  # light stages with the same name share one process
    threads: Count = 1  # of torch
    # Units per process(). 24 sessions of nano on 2 cores: 96 % on time with 16 everywhere; 92 %, and a tenth more work,
    # with 8 for LLM and TTS and 4 for the vocoder.
    batch: Count = 16
    wait_ns: Annotated[int, _duration("0s", "1s"), _as_duration] = Field(default=5_000_000, alias="wait")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def replicas(self) -> int:
        return self.scale.min

    @property
    def max_replicas(self) -> int:
        return self.scale.max or self.scale.min


class LightStageSpec(StageSpec):
    """A stage without a model."""

    process: Name | None = "io"


class VisionEncoderSpec(StageSpec):
    max_slices: int = Field(default=1, ge=1, le=9)


class ContextSpec(Section):
    """What is forgotten when a session's context is full. None: as the checkpoint says.

    basic: the oldest units go once more than `high` tokens are cached, until `low` are left. context: the oldest units
    go, the model's own words stay. (The official default is to forget nothing, and to stop when the context is full.)
    """

    mode: Literal["basic", "context"] = "basic"
    high: Annotated[int, Field(ge=1, le=40960)] | None = None
    low: Annotated[int, Field(ge=0, le=40960)] | None = None


class LlmSpec(StageSpec):
    """decoding None: as the checkpoint says. force_listen: the session listens for this many windows at first."""

    decoding: Literal["greedy", "sampling"] | None = None
    seed: Seed = 0
    system_prompt: str = Field(default="Streaming Omni Conversation.", max_length=20_000)
    kv_memory_bytes: Annotated[
        int, BeforeValidator(lambda value: parse_bytes(str(value))), PlainSerializer(format_bytes)
    ] = Field(default=512 << 20, alias="kv_memory")
    context: Annotated[ContextSpec, _or_empty] = ContextSpec()
    force_listen: int = Field(default=3, ge=0, le=3600)


class TtsSpec(StageSpec):
    """decoding None: as the checkpoint says."""

    decoding: Literal["greedy", "sampling"] | None = None
    seed: Seed = 0


class VocoderSpec(StageSpec):
    """steps: Euler steps of the flow; the released service runs 5, its library 10, its buffers hold 16."""

    steps: int = Field(default=5, ge=1, le=16)
    seed: Seed = 0


class SpeakerSpec(LightStageSpec):
    """sink: a virtual player with exact timing, or the machine's sound device."""

    sink: Literal["virtual", "device"] = "virtual"


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
    """All stages, also those which are off."""

    camera: Annotated[LightStageSpec, _or_empty] = LightStageSpec()
    microphone: Annotated[LightStageSpec, _or_empty] = LightStageSpec()
    vision_encoder: Annotated[VisionEncoderSpec, _or_empty] = VisionEncoderSpec()
    audio_encoder: Annotated[StageSpec, _or_empty] = StageSpec()
    llm: Annotated[LlmSpec, _or_empty] = LlmSpec()
    tts: Annotated[TtsSpec, _or_empty] = TtsSpec()
    vocoder: Annotated[VocoderSpec, _or_empty] = VocoderSpec()
    speaker: Annotated[SpeakerSpec, _or_empty] = SpeakerSpec()
    events: Annotated[LightStageSpec, _or_empty] = LightStageSpec()

    def by_name(self) -> dict[str, StageSpec]:
        return {name: getattr(self, name) for name in STAGES}


class CreditSpec(Section):
    """None: as the edge's kind has it."""

    chunks: Count | None = None
    time_ns: Annotated[int, _duration("1ms", "1h")] | None = Field(default=None, alias="time")


class WrittenEdge(Section):
    """An edge as written; what is None its kind decides."""

    source: Annotated[OutPort, PlainValidator(_out_port)] = Field(alias="from")
    target: Annotated[InPort, PlainValidator(_in_port)] = Field(alias="to")
    credit: Annotated[CreditSpec, _or_empty] = CreditSpec()
    when_full: WhenFull | None = None
    late: Late | None = None

    @staticmethod
    def between(source: OutPort, target: InPort) -> WrittenEdge:
        """The edge which says nothing else."""
        return WrittenEdge.model_validate({"from": str(source), "to": str(target)})


class FileSpec(Section):
    """The whole file."""

    version: int | None = None
    model: str = NANO
    window: Annotated[WindowSpec, _or_empty] = WindowSpec()
    tail: Annotated[TailSpec, _or_empty] = TailSpec()
    cameras: Annotated[Mapping[Name, CameraSpec], _or_empty] = Field(default_factory=dict)
    stages: Annotated[StagesSpec, _or_empty] = StagesSpec()
    edges: list[WrittenEdge] | None = None
    admission: Annotated[AdmissionSpec, _or_empty] = AdmissionSpec()
    shedding: Annotated[SheddingSpec, _or_empty] = SheddingSpec()
    console: Annotated[ConsoleSpec, _or_empty] = ConsoleSpec()
