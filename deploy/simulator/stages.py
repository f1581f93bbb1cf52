"""The other stages of a simulated pipeline, and which one stands for which real one: what they cost and how much they
make, without a model. The speaker is the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final

import numpy as np

from deploy.simulator.costly import Costly, OutOfOrder
from deploy.simulator.speech import VirtualTts, VirtualVocoder
from deploy.simulator.world import Computer
from graph.chunk import Chunk
from graph.costs import StageCost
from graph.stage_type import StageType
from graph.window import Unit
from stages.audio_encoder import AudioEncoder
from stages.stage import Stage
from stages.tts import Tts
from stages.vision_encoder import VisionEncoder
from stages.vocoder import Vocoder

PICTURE_EMBEDS: Final = {"embeds": np.zeros((1, 1, 1), np.float32)}
SOUND_EMBEDS: Final = {"embeds": np.zeros((1, 1), np.float32)}


class VirtualVision(Costly):
    image = VisionEncoder.image

    def is_idle(self, unit: Unit) -> bool:
        return not unit.chunks

    def make(self, unit: Unit) -> list[Chunk]:
        pictures = unit.of(VisionEncoder.frames)
        if [(p.start_ns, p.view) for p in pictures] != sorted({(p.start_ns, p.view) for p in pictures}):
            raise OutOfOrder(f"{unit.session}: pictures of window {unit.index} are not in the order of time and view")
        return [self.image.like(picture, arrays=PICTURE_EMBEDS, attrs={}) for picture in pictures]

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        return len(made)


class VirtualAudio(Costly):
    audio = AudioEncoder.audio

    def make(self, unit: Unit) -> list[Chunk]:
        return [self.audio.over(unit, arrays=SOUND_EMBEDS)] if unit.of(AudioEncoder.sound) else []


@dataclass(slots=True)
class VirtualEvents(Stage):
    """Keeps what is told."""

    chunks: list[Chunk] = field(default_factory=list)

    def process(self, units: list[Unit]) -> list[Chunk]:
        self.chunks += [chunk for unit in units for chunks in unit.chunks.values() for chunk in chunks]
        return []


class StandIn(Costly):
    """For a stage of the user's own: it costs what its class says, and lets pass what comes in at a port of each kind
    that it makes."""

    def __init__(self, stage_type: StageType, cost: StageCost, device: Computer, rng: Random) -> None:
        super().__init__(cost, device, rng)
        makes = {port.kind.name: port for port in stage_type.outputs.values()}
        self._ways = [(port, makes[port.kind.name]) for port in stage_type.inputs.values() if port.kind.name in makes]

    def make(self, unit: Unit) -> list[Chunk]:
        return [output.like(chunk) for port, output in self._ways for chunk in unit.of(port)]


TWINS: Final[Mapping[type[Stage], type[Costly]]] = {
    VisionEncoder: VirtualVision,
    AudioEncoder: VirtualAudio,
    Tts: VirtualTts,
    Vocoder: VirtualVocoder,
}
"""What stands for a stage, where it needs no more than its costs."""
FREE: Final = StageCost(0, 0)
