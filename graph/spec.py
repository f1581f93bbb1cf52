"""pipeline.yaml, read and checked once. Afterwards nobody checks again.

Rules:
- All problems are reported at once, each with line and column (or the `--set` it came from).
- Times are ns, sizes are bytes; the file's spelling ("150ms") ends here.
- A `PipelineSpec` says what runs: a stage with `replicas: 0` and its edges are not in it.
- Which stages there are, with which ports, is in `STAGES`; a port is typed by the kind of stream it carries.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)
from ruamel.yaml import YAML

from graph.credit import Limit
from graph.errors import GraphError, Problem, SpecError
from graph.units import format_bytes, format_duration, parse_bytes, parse_duration
from graph.window import Late
from graph.yaml_file import (
    Document,
    KeyPath,
    Secret,
    apply_override,
    check_document,
    in_file_order,
    mask_urls,
    read_yaml,
    shown,
    suggest,
)

VERSION: Final = 1
TINY: Final = "tiny"
MAX_CAMERAS: Final = 256

StreamKind: TypeAlias = Literal["frames", "sound", "image", "audio", "text", "codes", "speech", "playback", "events"]
WhenFull: TypeAlias = Literal["wait", "drop_oldest"]


# ---- The stages and their ports -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ports:
    """What a stage takes and gives. Inputs in `feedback` carry news from downstream and may close a circle."""

    inputs: Mapping[str, StreamKind] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, StreamKind] = dataclasses.field(default_factory=dict)
    feedback: frozenset[str] = frozenset()
    has_model: bool = False


_PLAYBACK: Final = frozenset({"playback"})
STAGES: Final[Mapping[str, Ports]] = {
    "camera": Ports(outputs={"frames": "frames", "events": "events"}),
    "microphone": Ports(outputs={"sound": "sound"}),
    "vision_encoder": Ports({"frames": "frames"}, {"image": "image"}, has_model=True),
    "audio_encoder": Ports({"sound": "sound"}, {"audio": "audio"}, has_model=True),
    "llm": Ports(
        {"image": "image", "audio": "audio", "playback": "playback"},
        {"text": "text", "events": "events"},
        _PLAYBACK,
        has_model=True,
    ),
    "tts": Ports({"text": "text", "playback": "playback"}, {"codes": "codes"}, _PLAYBACK, has_model=True),
    "vocoder": Ports({"codes": "codes", "playback": "playback"}, {"speech": "speech"}, _PLAYBACK, has_model=True),
    "speaker": Ports({"speech": "speech"}, {"playback": "playback", "events": "events"}),
    "events": Ports({"events": "events"}),
}

# With the first ones gone, the others would have nothing to do.
_OFF_TOGETHER: Final[tuple[frozenset[str], ...]] = (
    frozenset({"vision_encoder", "camera"}),
    frozenset({"audio_encoder", "microphone"}),
    frozenset({"tts", "vocoder", "speaker"}),
)
CAN_BE_OFF: Final = frozenset({"vision_encoder", "audio_encoder", "tts", "vocoder"})


@dataclass(frozen=True, slots=True, order=True)
class OutPort:
    """Where an edge begins."""

    stage: str
    name: str

    @property
    def kind(self) -> StreamKind:
        return STAGES[self.stage].outputs[self.name]

    def __str__(self) -> str:
        return f"{self.stage}.{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class InPort:
    """Where an edge ends."""

    stage: str
    name: str

    @property
    def kind(self) -> StreamKind:
        return STAGES[self.stage].inputs[self.name]

    @property
    def is_feedback(self) -> bool:
        return self.name in STAGES[self.stage].feedback

    def __str__(self) -> str:
        return f"{self.stage}.{self.name}"


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
    if value in ("embedded", "none"):
        return value
    secret = Secret(value) if isinstance(value, str) else value
    if not isinstance(secret, Secret) or "://" not in secret.reveal():
        raise ValueError(f"must be embedded, none or a URL, not {shown(value)}")
    return secret


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", value):
        raise ValueError(f"{value!r} is no name; a name has 1 to 32 of a-z 0-9 _ -")
    return value


def _listen_address(value: str) -> str:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", value)
    if not match or int(match[2]) > 65535:
        raise ValueError(f"must be host:port like 127.0.0.1:8600, not {value!r}")
    return value


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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WindowSpec(_Section):
    """length: T, the model's beat. lateness: a window is given up this long after its end."""

    length_ns: Annotated[int, _duration("10ms", "60s"), _as_duration] = Field(default=1_000_000_000, alias="length")
    lateness_ns: Annotated[int, _duration("0s", "60s"), _as_duration] = Field(default=150_000_000, alias="lateness")


class TailSpec(_Section):
    """lead: how far speech may run ahead of the listener. delay: window k's speech plays from its end + delay on."""

    lead_ns: Annotated[int, _duration("10ms", "60s"), _as_duration] = Field(default=1_000_000_000, alias="lead")
    delay_ns: Annotated[int, _duration("0s", "60s"), _as_duration] = Field(default=300_000_000, alias="delay")


class CameraSpec(_Section):
    """source may hold credentials: print `masked`, open `reveal()`. max_pixels: larger pictures are made smaller."""

    source: Annotated[Secret, PlainValidator(_camera_source), _as_text]
    fps: float = Field(default=1.0, gt=0, le=30)
    microphone: Annotated[Literal["embedded", "none"] | Secret, PlainValidator(_camera_microphone), _as_text] = (
        "embedded"
    )
    max_pixels: int = Field(default=3840 * 2160, ge=64 * 64, le=7680 * 4320)


class ReplicasSpec(_Section):
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


class StageSpec(_Section):
    """Where a stage runs and how much it takes at once; the same for all stages."""

    scale: Annotated[ReplicasSpec, BeforeValidator(_replicas), PlainSerializer(_shortest)] = Field(
        default=ReplicasSpec(), alias="replicas"
    )
    gpus: Annotated[float, AfterValidator(_whole_above_one)] = Field(default=0.0, ge=0, le=64)  # per replica
    cpus: float = Field(default=0.25, ge=0, le=1024)  # per replica
    resources: Mapping[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)  # Ray's, per replica
    process: Name | None = None  # light stages with the same name share one process
    threads: Count = 1  # of torch
    batch: Count = 16  # units per process()
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


class ContextSpec(_Section):
    """What is forgotten when a session's context is full.

    basic: the oldest units go once more than `high` tokens are cached, until `low` are left. context: the oldest units
    go, the model's own words stay. off: the session is closed to new units when its context is full.
    """

    mode: Literal["off", "basic", "context"] = "basic"
    high: int = Field(default=4000, ge=1, le=40960)  # the checkpoint's own defaults
    low: int = Field(default=3500, ge=0, le=40960)


class LlmSpec(StageSpec):
    """force_listen: the session listens for this many windows at first."""

    batch: Count = 8
    decoding: Literal["greedy", "sampling"] = "sampling"
    seed: Seed = 0
    system_prompt: str = Field(default="Streaming Omni Conversation.", max_length=20_000)
    kv_memory_bytes: Annotated[
        int, BeforeValidator(lambda value: parse_bytes(str(value))), PlainSerializer(format_bytes)
    ] = Field(default=512 << 20, alias="kv_memory")
    context: Annotated[ContextSpec, _or_empty] = ContextSpec()
    force_listen: int = Field(default=3, ge=0, le=3600)


class TtsSpec(StageSpec):
    batch: Count = 8
    decoding: Literal["greedy", "sampling"] = "sampling"
    seed: Seed = 0


class VocoderSpec(StageSpec):
    """steps: Euler steps of the flow; the released service runs 5, its library 10, its buffers hold 16."""

    batch: Count = 4
    steps: int = Field(default=5, ge=1, le=16)
    seed: Seed = 0


class SpeakerSpec(LightStageSpec):
    """sink: a virtual player with exact timing, or the machine's sound device."""

    sink: Literal["virtual", "device"] = "virtual"


class ConsoleSpec(_Section):
    listen: Annotated[str, AfterValidator(_listen_address)] = "127.0.0.1:8600"

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0: any free one."""
        return int(self.listen.rpartition(":")[2])


class _Stages(_Section):
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


class _Credit(_Section):
    chunks: Count | None = None
    time_ns: Annotated[int, _duration("1ms", "1h")] | None = Field(default=None, alias="time")


class _Edge(_Section):
    source: Annotated[OutPort, PlainValidator(_out_port)] = Field(alias="from")
    target: Annotated[InPort, PlainValidator(_in_port)] = Field(alias="to")
    credit: Annotated[_Credit, _or_empty] = _Credit()
    when_full: WhenFull | None = None
    late: Late | None = None


class _File(_Section):
    """What may stand in the file."""

    version: int | None = None
    model: str = TINY
    window: Annotated[WindowSpec, _or_empty] = WindowSpec()
    tail: Annotated[TailSpec, _or_empty] = TailSpec()
    cameras: Annotated[Mapping[Name, CameraSpec], _or_empty] = Field(default_factory=dict)
    stages: Annotated[_Stages, _or_empty] = _Stages()
    edges: list[_Edge] | None = None
    console: Annotated[ConsoleSpec, _or_empty] = ConsoleSpec()


# ---- What runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EdgeSpec:
    """One edge. credit: what may be in flight per session. late: what happens to a chunk whose window has left."""

    source: OutPort
    target: InPort
    credit: Limit
    when_full: WhenFull
    late: Late

    @property
    def id(self) -> str:
        return f"{self.source}->{self.target}"

    @property
    def kind(self) -> StreamKind:
        return self.source.kind


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A checked pipeline. `stages` and `edges` hold what runs; `model` is "tiny" or an existing folder."""

    version: int
    model: str
    window: WindowSpec
    tail: TailSpec
    cameras: Mapping[str, CameraSpec]
    stages: Mapping[str, StageSpec]
    edges: tuple[EdgeSpec, ...]
    console: ConsoleSpec

    def without(self, stages: Collection[str]) -> PipelineSpec:
        """The same with these stages off, and with them those which then have nothing to do; GraphError if it can't."""
        if stuck := set(stages) - CAN_BE_OFF:
            raise GraphError(f"{_listed(stuck)} can't be switched off; these can: {_listed(CAN_BE_OFF)}")
        off = _off_with(stages) | (STAGES.keys() - self.stages.keys())
        if {"vision_encoder", "audio_encoder"} <= off:
            raise GraphError("nothing to see and nothing to hear: vision_encoder and audio_encoder are both off")
        return dataclasses.replace(
            self,
            stages={name: stage for name, stage in self.stages.items() if name not in off},
            edges=tuple(edge for edge in self.edges if not {edge.source.stage, edge.target.stage} & off),
        )


_EIGHT_SECONDS: Final = Limit(8, 8_000_000_000)
_EDGE_DEFAULTS: Final[Mapping[StreamKind, tuple[Limit, WhenFull, Late]]] = {
    "frames": (Limit(4), "drop_oldest", "drop"),  # a live picture is worth less than the next one
    "sound": (_EIGHT_SECONDS, "wait", "carry"),
    "image": (Limit(8), "wait", "drop"),
    "audio": (Limit(8), "wait", "carry"),
    "text": (_EIGHT_SECONDS, "wait", "carry"),
    "codes": (_EIGHT_SECONDS, "wait", "carry"),
    "speech": (_EIGHT_SECONDS, "wait", "carry"),
    "playback": (Limit(64), "wait", "carry"),
    "events": (Limit(256), "wait", "carry"),
}


def _full_graph() -> list[_Edge]:
    """Every output to every input of its kind."""
    return [
        _Edge.model_validate({"from": f"{source}.{out_port}", "to": f"{target}.{in_port}"})
        for source, ports in STAGES.items()
        for out_port, kind in ports.outputs.items()
        for target, others in STAGES.items()
        for in_port, accepted in others.inputs.items()
        if accepted == kind
    ]


def _edge_spec(edge: _Edge) -> EdgeSpec:
    limit, when_full, late = _EDGE_DEFAULTS[edge.source.kind]
    credit = Limit(edge.credit.chunks or limit.chunks, edge.credit.time_ns or limit.duration_ns)
    return EdgeSpec(edge.source, edge.target, credit, edge.when_full or when_full, edge.late or late)


def _build(file: _File) -> PipelineSpec:
    stages = file.stages.by_name()
    spec = PipelineSpec(
        version=VERSION,
        model=file.model if file.model == TINY else str(Path(file.model).expanduser()),
        window=file.window,
        tail=file.tail,
        cameras=dict(file.cameras),
        stages=stages,
        edges=tuple(map(_edge_spec, _full_graph() if file.edges is None else file.edges)),
        console=file.console,
    )
    return spec.without([name for name, stage in stages.items() if stage.replicas == 0])


def _off_with(stages: Collection[str]) -> set[str]:
    return {name for group in _OFF_TOGETHER for name in group if group & set(stages)}


# ---- Reading --------------------------------------------------------------------------------------------------------


def default_spec_path() -> Path:
    """./pipeline.yaml where there is one, else the one that is shipped."""
    root = Path(__file__).resolve().parent.parent
    shipped = root / "pipeline.yaml"  # in a checkout; in a wheel it lies in deploy/
    candidates = (Path("pipeline.yaml"), shipped, root / "deploy" / "default_pipeline.yaml")
    return next((path for path in candidates if path.is_file()), shipped)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read and check a pipeline.yaml; overrides are `--set` strings like "stages.llm.gpus=1". Raises SpecError."""
    try:
        with path.open("rb") as file:
            text = file.read((1 << 20) + 1).decode("utf-8-sig")
    except OSError as error:
        raise SpecError([Problem(str(path), f"can't be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise SpecError([Problem(str(path), f"not UTF-8 text: byte {error.start + 1}")]) from None
    return parse_spec(text, str(path), overrides)


def parse_spec(
    text: str, name: str, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> PipelineSpec:
    """Check a pipeline description. Raises SpecError with all problems, each as `name:line:column: message`."""
    document = read_yaml(text, name, environment)
    if not isinstance(document.tree, dict):
        document.problems.append((document.place(()), _NOT_A_MAPPING if document.tree is not None else _EMPTY))
        raise SpecError(in_file_order(document.problems))
    for assignment in overrides:
        apply_override(document, assignment, environment)
    file = _check(document)
    if document.problems:
        raise SpecError(in_file_order(document.problems))
    return _build(file)


_EMPTY: Final = "the file is empty; the least is `version: 1` and one camera"
_NOT_A_MAPPING: Final = "must be a mapping: version: 1, cameras: …"


def _check(document: Document) -> _File:
    """The file's values, with every problem noted in the document."""
    file, wrong = check_document(document, _File)
    findings = [(path, message) for path, message in _findings(file) if not _clouded(path, wrong)]
    document.problems += [(document.place(path), mask_urls(message)) for path, message in findings]
    return file


def _clouded(path: KeyPath, wrong: Iterable[KeyPath]) -> bool:
    """True where a neighbour is wrong, so that what was found may only follow from its absence."""
    neighbours = path if len(path) == 1 else path[:-1]
    return any(place[: len(neighbours)] == neighbours for place in wrong)


# ---- What the sections can't see on their own -----------------------------------------------------------------------

_Finding: TypeAlias = tuple[KeyPath, str]


def _findings(file: _File) -> Iterator[_Finding]:
    yield from _version_findings(file)
    yield from _model_findings(file.model)
    if file.tail.lead_ns < file.tail.delay_ns:
        message = (
            f"{format_duration(file.tail.lead_ns)} is less than tail.delay ({format_duration(file.tail.delay_ns)})"
        )
        yield ("tail", "lead"), f"tail.lead: {message}; speech would stop before it is heard"
    if not file.cameras:
        yield ("cameras",), 'not one camera; write `cameras: {test: {source: "test://pattern"}}`'
    if len(file.cameras) > MAX_CAMERAS:
        yield ("cameras",), f"{len(file.cameras)} cameras; one pipeline takes {MAX_CAMERAS}"
    for name, stage in file.stages.by_name().items():
        yield from _stage_findings(name, stage)
    yield from _together_findings(file.stages)
    yield from _edge_findings(file)


def _version_findings(file: _File) -> Iterator[_Finding]:
    if file.version is None:
        yield ("version",), f"version is missing; write `version: {VERSION}`"
    elif file.version != VERSION:
        yield ("version",), f"version: this build reads version {VERSION}, not {file.version}"


def _model_findings(model: str) -> Iterator[_Finding]:
    if model == TINY or _is_folder(model):
        return
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        reason = "no such folder, and hub ids can't be fetched yet; download the checkpoint and give its folder"
    else:
        reason = f"no such folder; write {TINY} or a folder with a MiniCPM-o 4.5 checkpoint"
    yield ("model",), f"model {shown(model)}: {reason}"


def _is_folder(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name too long; ~nobody
        return False


def _stage_findings(name: str, stage: StageSpec) -> Iterator[_Finding]:
    path: KeyPath = ("stages", name)
    if stage.replicas == 0 and name not in CAN_BE_OFF:
        yield (*path, "replicas"), f"stages.{name}.replicas: can't be 0; can be switched off: {_listed(CAN_BE_OFF)}"
    if stage.max_replicas < stage.replicas:
        yield (*path, "replicas"), f"stages.{name}.replicas: max {stage.max_replicas} is less than min {stage.replicas}"
    if stage.process and STAGES[name].has_model:
        light = _listed(other for other, ports in STAGES.items() if not ports.has_model)
        yield (*path, "process"), f"stages.{name}.process: only stages without a model share a process: {light}"
    elif stage.process and stage.max_replicas > 1:
        where, message = (*path, "replicas"), f"must be 1 in a shared process ({stage.process!r})"
        yield where, f"stages.{name}.replicas: {message}; for more write `process: null`"
    if isinstance(stage, LlmSpec) and stage.context.low >= stage.context.high:
        message = f"{stage.context.low} is not less than high ({stage.context.high})"
        yield (*path, "context", "low"), f"stages.{name}.context.low: {message}"


def _together_findings(stages: _Stages) -> Iterator[_Finding]:
    off = _off_with([name for name, stage in stages.by_name().items() if stage.replicas == 0])
    if {"vision_encoder", "audio_encoder"} <= off:
        yield ("stages",), "nothing to see and nothing to hear: vision_encoder and audio_encoder are both off"
    camera, microphone = stages.camera.process, stages.microphone.process
    if not {"camera", "microphone"} & off and (camera != microphone or camera is None):
        message = f"they read one decoder and share a named process, not {shown(camera)} and {shown(microphone)}"
        yield ("stages", "microphone", "process"), f"stages.camera.process, stages.microphone.process: {message}"


def _edge_findings(file: _File) -> Iterator[_Finding]:
    edges = file.edges or []
    first: dict[tuple[OutPort, InPort], int] = {}
    for index, edge in enumerate(edges):
        source, target = edge.source, edge.target
        if source.kind != target.kind:
            message = f"carries {source.kind}, but {target} takes {target.kind}"
            yield ("edges", index, "to"), f"edge {source}->{target}: {source} {message}"
        if first.setdefault((source, target), index) != index:
            yield ("edges", index), f"edge {source}->{target} is written twice"
    if circle := _circle(edges):
        index = next(index for index, edge in enumerate(edges) if (edge.source.stage, edge.target.stage) == circle[-2:])
        yield ("edges", index), f"edges go round in a circle: {' -> '.join(circle)}"
    if file.edges is not None:
        yield from _unfed_findings(file, edges)


def _circle(edges: Iterable[_Edge]) -> tuple[str, ...]:
    """Some stages which feed each other, the first one again at the end; empty if there is no circle."""
    targets: dict[str, list[str]] = {}
    for edge in edges:
        if not edge.target.is_feedback:
            targets.setdefault(edge.source.stage, []).append(edge.target.stage)
    done: set[str] = set()

    def visit(way: tuple[str, ...]) -> tuple[str, ...]:
        for stage in targets.get(way[-1], ()):
            if stage in way:
                return (*way[way.index(stage) :], stage)
            if stage not in done and (circle := visit((*way, stage))):
                return circle
        done.add(way[-1])
        return ()

    return next((circle for stage in targets if (circle := visit((stage,)))), ())


def _unfed_findings(file: _File, edges: Iterable[_Edge]) -> Iterator[_Finding]:
    """Inputs of running stages which nothing feeds, although a running stage could."""
    off = _off_with([name for name, stage in file.stages.by_name().items() if stage.replicas == 0])
    fed = {edge.target for edge in edges}
    for edge in _full_graph():
        if edge.target not in fed and not off & {edge.source.stage, edge.target.stage}:
            fed.add(edge.target)
            yield ("edges",), f"input {edge.target} has no source; add {{from: {edge.source}, to: {edge.target}}}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# ---- Writing --------------------------------------------------------------------------------------------------------


def render(spec: PipelineSpec) -> str:
    """The whole description as YAML, defaults filled in, secrets masked; `parse_spec` reads it back."""
    stages: dict[str, object] = {name: _dump(stage) for name, stage in spec.stages.items()}
    stages |= {name: {"replicas": 0} for name in sorted(CAN_BE_OFF - spec.stages.keys())}
    tree = {
        "version": spec.version,
        "model": spec.model,
        "window": _dump(spec.window),
        "tail": _dump(spec.tail),
        "cameras": {name: _dump(camera) for name, camera in spec.cameras.items()},
        "stages": stages,
        "edges": [_edge_as_written(edge) for edge in spec.edges],
        "console": _dump(spec.console),
    }
    yaml = YAML()
    yaml.width = 4096
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _dump(section: _Section) -> dict[str, object]:
    return section.model_dump(by_alias=True)


def _edge_as_written(edge: EdgeSpec) -> dict[str, object]:
    credit: dict[str, object] = {"chunks": edge.credit.chunks}
    if edge.credit.duration_ns is not None:
        credit["time"] = format_duration(edge.credit.duration_ns)
    ports = {"from": str(edge.source), "to": str(edge.target)}
    return {**ports, "credit": credit, "when_full": edge.when_full, "late": edge.late}
