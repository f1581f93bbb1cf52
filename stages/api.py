"""What a stage of your own is written against. Everything here is stable: CHANGELOG.md names every change.

A stage is a class. Its ports are class attributes, its options a `StageOptions`, its work is `process`:

    class MotionGate(Stage):
        frames = In(FRAMES)
        moving = Out(FRAMES)

        def process(self, units: list[Unit]) -> list[Chunk]:
            return [self.moving.like(picture) for unit in units for picture in unit.of(self.frames)]

In pipeline.yaml it is named by its class, or by an entry point of the group `omni.stages`:

    stages:
      motion: {use: "my_site.motion:MotionGate"}
      vision_encoder: {inputs: {frames: motion.moving}}

What the machinery promises a stage:

- It is used by one thread. `open_session` comes before the first unit of a session, `close_session` after the last.
- A session's units come as windows 0, 1, 2 …, each once, whatever is late or lost; `process` is given one unit each of
  several sessions. What it returns leaves in its order; the watermark of the window goes behind it by itself.
- Times are ns of the session's event time, arrays are read-only.
- What it raises costs the session whose unit it was: an event, and after three in a row the session. A state that is
  kept per session must then be as it was before (or raise `BatchLost`).

What a stage promises: it returns soon (a window is late a second after its end), and it returns only chunks of its own
ports, for sessions of the units that it was given (of scope "pipeline": for any session that is open).
"""

from __future__ import annotations

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, Scalar, SessionId
from graph.costs import StageCost
from graph.credit import Limit
from graph.kinds import Array, Kind, Nothing, attrs_of
from graph.sections import Bytes, Duration, Seed, StageOptions
from graph.stage_type import Feedback, In, Out
from graph.window import Unit
from stages.kinds import (
    AUDIO,
    CODES,
    EVENTS,
    FRAMES,
    IMAGE,
    PLAYBACK,
    SOUND,
    SPEECH,
    TEXT,
    Embeds,
    Picture,
    Said,
)
from stages.rates import CODES_PER_S, SOUND_RATE_HZ, SPEECH_RATE_HZ
from stages.session import Session
from stages.stage import BatchLost, Site, Source, Stage, StageError

__all__ = [
    "AUDIO",
    "CODES",
    "CODES_PER_S",
    "EVENTS",
    "FRAMES",
    "IMAGE",
    "NS_PER_MS",
    "NS_PER_S",
    "PLAYBACK",
    "SOUND",
    "SOUND_RATE_HZ",
    "SPEECH",
    "SPEECH_RATE_HZ",
    "TEXT",
    "Array",
    "BatchLost",
    "Bytes",
    "Chunk",
    "Duration",
    "Embeds",
    "Feedback",
    "In",
    "Kind",
    "Limit",
    "Nothing",
    "Out",
    "Picture",
    "Said",
    "Scalar",
    "Seed",
    "Session",
    "SessionId",
    "Site",
    "Source",
    "Stage",
    "StageCost",
    "StageError",
    "StageOptions",
    "Unit",
    "attrs_of",
]
