"""The stages of the pipeline that is measured: the product's own, with drawn weights; a camera and a microphone that
make everything in memory; and who speaks when.

Rule: what share of the sessions speaks is imposed, since random weights have nothing to say: each session speaks for
`TURN` windows and then listens for so many that the share comes out, the sessions one after the other. It is told in
the session's source, and reaches the LLM as a channel of what it hears (weights.py).
"""

from __future__ import annotations

from random import Random
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np

from deploy.simulator.sources import VirtualCamera, VirtualMicrophone
from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.window import Unit
from stages.audio_encoder import VOICE_ROLE, AudioEncoder
from stages.camera import Camera
from stages.kinds import AUDIO
from stages.light import MediaOptions
from stages.llm import Llm
from stages.microphone import Microphone
from stages.session import Session
from stages.stage import Site
from stages.tts import Tts
from stages.vision_encoder import WIDE, VisionEncoder
from stages.vocoder import Vocoder

TURN: Final = 4  # windows that are spoken in one go
CONTEXT_TOKENS: Final = {"full": 3500, "tiny": 300}
"""With which sessions begin, as if they had run for a while; windows slide from 4000 down to 3500."""
PICTURE: Final = tuple(14 * patches for patches in WIDE)
"""Height and width of pictures: of the one size that the encoder is warmed up for, so that none is scaled."""
TALKER_MIB: Final = 256  # of a session: keys and values of the longest turn, in bfloat16
MOST_RESIDENT: Final = 64
HERE: Final = "tests.benchmarks.gpu.stages"
USES: Final = {
    "camera": f"{HERE}:MemoryCamera",
    "microphone": f"{HERE}:MemoryMicrophone",
    "vision_encoder": f"{HERE}:DrawnVision",
    "audio_encoder": f"{HERE}:DrawnAudio",
    "llm": f"{HERE}:DrawnLlm",
    "tts": f"{HERE}:DrawnTts",
    "vocoder": f"{HERE}:DrawnVocoder",
    "speaker": "stages.speaker:Speaker",
    "events": "stages.events:Events",
}


def room_for(name: str, num_sessions: int) -> dict[str, Any]:
    """What a stage is told so that it has room for so many sessions."""
    if name == "tts":
        return {"kv_memory": f"{num_sessions * TALKER_MIB + 64}MiB"}
    return {"resident": min(num_sessions, MOST_RESIDENT)} if name in ("audio_encoder", "vocoder") else {}


class Turns(NamedTuple):
    """When a session speaks: it is number `number` of `of`, of which `share` are to speak."""

    number: int
    of: int
    share: float

    @classmethod
    def of_source(cls, source: str) -> Turns:
        fields = parse_qs(urlsplit(source).query)
        return cls(int(fields["number"][0]), int(fields["of"][0]), float(fields["share"][0]))

    @property
    def source(self) -> str:
        return f"memory://camera?number={self.number}&of={self.of}&share={self.share}"

    def speaks(self, window: int) -> bool:
        period = max(round(TURN / self.share), TURN)
        return (window + self.number * period // self.of) % period < TURN


class MemoryCamera(VirtualCamera):
    """A picture of noise each second, at the window's beginning as a camera's is."""

    frames = Camera.frames
    Options = MediaOptions
    is_local = True

    @classmethod
    def load(cls, options: Any, site: Site) -> MemoryCamera:
        noise = np.random.default_rng(0).integers(0, 256, (8, *PICTURE, 3), np.uint8)
        return cls(Random(0), {}, lambda session, at_ns: noise[at_ns // NS_PER_S % len(noise)])


class MemoryMicrophone(VirtualMicrophone):
    """Noise."""

    sound = Microphone.sound
    Options = MediaOptions
    is_local = True

    @classmethod
    def load(cls, options: Any, site: Site) -> MemoryMicrophone:
        noise = (0.1 * np.random.default_rng(0).standard_normal(16 * 16_000)).astype(np.float32)

        def hear(session: SessionId, start_ns: int, end_ns: int) -> np.ndarray:
            first, last = (at_ns * 16_000 // NS_PER_S for at_ns in (start_ns, end_ns))
            return np.take(noise, range(first, last), mode="wrap")

        return cls(hear)


class _Drawn:
    """A stage with drawn weights; its checkpoint is the name of their size."""

    @classmethod
    def load(cls, options: Any, site: Site) -> Any:
        from tests.benchmarks.gpu.weights import drawn_checkpoint

        size = site.checkpoint.name
        with drawn_checkpoint(size, context_tokens=CONTEXT_TOKENS[size]):
            return super().load(options, site)  # type: ignore[misc]


class DrawnVision(_Drawn, VisionEncoder): ...


class DrawnLlm(_Drawn, Llm): ...


class DrawnTts(_Drawn, Tts): ...


class DrawnVocoder(_Drawn, Vocoder): ...


class DrawnAudio(_Drawn, AudioEncoder):
    """It tells the LLM whether to speak, in one channel of what it hears."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._turns: dict[SessionId, Turns] = {}

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        self._turns[session.id] = Turns.of_source(session.media.views[0].source)

    def process(self, units: list[Unit]) -> list[Chunk]:
        speaks = {unit.session: self._turns[unit.session].speaks(unit.index) for unit in units}
        return [_with_decision(chunk, speaks[chunk.session]) for chunk in super().process(units)]


def _with_decision(chunk: Chunk, speaks: bool) -> Chunk:
    """With the decision in it, where it is a window's."""
    from tests.benchmarks.gpu.weights import DECISION, OBEYED

    content = AUDIO.read(chunk)
    if content.role != VOICE_ROLE:
        value = np.float32(OBEYED if speaks else -OBEYED)
        embeds = chunk.arrays["embeds"]
        embeds[:, DECISION] = value if content.dtype is None else value.view(np.uint32) >> 16  # bfloat16's half of it
    return chunk
