"""The stages and their ports: what can be wired to what, and what can be switched off.

Rules:
- A port is typed by the kind of stream it carries; an edge joins an output and an input of one kind.
- A stage which would have nothing to do is off: a camera without a vision encoder, a vocoder without a TTS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

from graph.credit import Limit
from graph.window import Late

StreamKind: TypeAlias = Literal["frames", "sound", "image", "audio", "text", "codes", "speech", "playback", "events"]
WhenFull: TypeAlias = Literal["wait", "drop_oldest"]


@dataclass(frozen=True, slots=True)
class Ports:
    """What a stage takes and gives. Inputs in `feedback` carry news from downstream and may close a circle."""

    inputs: Mapping[str, StreamKind] = field(default_factory=dict)
    outputs: Mapping[str, StreamKind] = field(default_factory=dict)
    feedback: frozenset[str] = frozenset()
    has_model: bool = False


_PLAYBACK: Final = frozenset({"playback"})
STAGES: Final[Mapping[str, Ports]] = {
    "camera": Ports({"playback": "playback"}, {"frames": "frames", "events": "events"}, _PLAYBACK),
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


# ---- The ends of an edge --------------------------------------------------------------------------------------------


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


def full_graph() -> list[tuple[OutPort, InPort]]:
    """Every output to every input of its kind."""
    outputs = [OutPort(stage, name) for stage, ports in STAGES.items() for name in ports.outputs]
    inputs = [InPort(stage, name) for stage, ports in STAGES.items() for name in ports.inputs]
    return [(source, target) for source in outputs for target in inputs if source.kind == target.kind]


class EdgeDefaults(NamedTuple):
    """What an edge of some kind does where the file doesn't say."""

    credit: Limit
    when_full: WhenFull
    late: Late


_EIGHT_SECONDS: Final = Limit(8, 8_000_000_000)
EDGE_DEFAULTS: Final[Mapping[StreamKind, EdgeDefaults]] = {
    # A live picture is worth less than the next one.
    "frames": EdgeDefaults(Limit(4), "drop_oldest", "drop"),
    "sound": EdgeDefaults(_EIGHT_SECONDS, "wait", "carry"),
    "image": EdgeDefaults(Limit(8), "wait", "drop"),
    "audio": EdgeDefaults(Limit(8), "wait", "carry"),
    "text": EdgeDefaults(_EIGHT_SECONDS, "wait", "carry"),
    "codes": EdgeDefaults(_EIGHT_SECONDS, "wait", "carry"),
    "speech": EdgeDefaults(_EIGHT_SECONDS, "wait", "carry"),
    "playback": EdgeDefaults(Limit(64), "wait", "carry"),
    # Whoever speaks or sees waits for no teller: it takes what comes at once, and if it can't, the oldest is counted.
    "events": EdgeDefaults(Limit(256), "drop_oldest", "carry"),
}


# ---- Switching off --------------------------------------------------------------------------------------------------

CAN_BE_OFF: Final = frozenset({"vision_encoder", "audio_encoder", "tts", "vocoder"})

# With one of them gone, the others would have nothing to do.
_OFF_TOGETHER: Final[tuple[frozenset[str], ...]] = (
    frozenset({"vision_encoder", "camera"}),
    frozenset({"audio_encoder", "microphone"}),
    frozenset({"tts", "vocoder", "speaker"}),
)
_SENSES: Final = frozenset({"vision_encoder", "audio_encoder"})
NO_SENSES: Final = "nothing to see and nothing to hear: vision_encoder and audio_encoder are both off"


def off_with(stages: Iterable[str]) -> set[str]:
    """These stages, as far as they can be off, and those which then have nothing to do."""
    off = set(stages)
    return {name for group in _OFF_TOGETHER for name in group if group & off}


def lacks_senses(off: set[str]) -> bool:
    """True where with these stages off nothing is left to see or to hear; `NO_SENSES` says so."""
    return off >= _SENSES
