"""The stages and their ports: what can be wired to what, what can be switched off, and who lives where.

Rules:
- A port is typed by the kind of stream it carries; an edge joins an output and an input of one kind.
- A stage which would have nothing to do is off: a camera without a vision encoder, a vocoder without a TTS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from graph.kinds import Kind
from graph.streams import KINDS
from graph.wiring import Link, Wiring


@dataclass(frozen=True, slots=True)
class Ports:
    """What a stage takes and gives: the names of its ports, each with its kind.

    feedback:   inputs that carry news from downstream and may close a circle.
    has_model:  it computes with weights, in a process of its own.
    is_local:   it opens files, cameras or devices of the machine on which `pipeline up` runs.
    can_be_off: `replicas: 0` is allowed. is_needed: it is of use though nobody takes what it makes.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    feedback: frozenset[str] = frozenset()
    has_model: bool = False
    is_local: bool = False
    can_be_off: bool = False
    is_needed: bool = False


_PLAYBACK: Final = frozenset({"playback"})
STAGES: Final[Mapping[str, Ports]] = {
    "camera": Ports({"playback": "playback"}, {"frames": "frames", "events": "events"}, _PLAYBACK, is_local=True),
    "microphone": Ports(outputs={"sound": "sound"}, is_local=True),
    "vision_encoder": Ports({"frames": "frames"}, {"image": "image"}, has_model=True, can_be_off=True),
    "audio_encoder": Ports({"sound": "sound"}, {"audio": "audio"}, has_model=True, can_be_off=True),
    "llm": Ports(
        {"image": "image", "audio": "audio", "playback": "playback"},
        {"text": "text", "events": "events"},
        _PLAYBACK,
        has_model=True,
        is_needed=True,
    ),
    "tts": Ports(
        {"text": "text", "playback": "playback"}, {"codes": "codes"}, _PLAYBACK, has_model=True, can_be_off=True
    ),
    "vocoder": Ports(
        {"codes": "codes", "playback": "playback"}, {"speech": "speech"}, _PLAYBACK, has_model=True, can_be_off=True
    ),
    "speaker": Ports({"speech": "speech"}, {"playback": "playback", "events": "events"}, is_local=True),
    "events": Ports({"events": "events"}, is_local=True),
}


# ---- The ends of an edge --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class OutPort:
    """Where an edge begins."""

    stage: str
    name: str

    @property
    def kind(self) -> Kind:
        return KINDS[STAGES[self.stage].outputs[self.name]]

    def __str__(self) -> str:
        return f"{self.stage}.{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class InPort:
    """Where an edge ends."""

    stage: str
    name: str

    @property
    def kind(self) -> Kind:
        return KINDS[STAGES[self.stage].inputs[self.name]]

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


# ---- Switching off --------------------------------------------------------------------------------------------------

CAN_BE_OFF: Final = frozenset(name for name, ports in STAGES.items() if ports.can_be_off)
NO_SENSES: Final = "nothing to see and nothing to hear: vision_encoder and audio_encoder are both off"


def wiring_of(stages: Iterable[str], edges: Iterable[tuple[OutPort, InPort]]) -> Wiring:
    """What follows from these edges."""
    links = (
        Link(source.stage, target.stage, is_windowed=source.kind.is_windowed, is_feedback=target.is_feedback)
        for source, target in edges
    )
    return Wiring(stages, links)


_FULL: Final = wiring_of(STAGES, full_graph())


def off_with(stages: Iterable[str]) -> set[str]:
    """These stages, and those which then have nothing to do."""
    needed = needed_among(STAGES)
    return set(stages) | _FULL.idle(set(stages) - needed, needed)


def needed_among(stages: Iterable[str]) -> set[str]:
    """Those of the stages that are of use though nobody takes what they make."""
    return {name for name in stages if STAGES[name].is_needed}


def lacks_senses(off: set[str]) -> bool:
    """True where with these stages off nothing is left to see or to hear; `NO_SENSES` says so."""
    return off.issuperset(_FULL.sources)
