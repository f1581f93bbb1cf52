"""Two stages without a model: one gives a sound in each window, the other counts them, and dies when it is told to."""

from __future__ import annotations

import os
import time

import numpy as np

from graph.chunk import Chunk
from graph.stage_type import In, Out
from graph.window import Unit
from stages.kinds import EVENTS, SOUND
from stages.rates import SOUND_RATE_HZ
from stages.session import Session
from stages.stage import Source, Stage, StageError


class Ticker(Source):
    """A window of silence after the other."""

    sound = Out(SOUND)

    def make(self, session: Session, start_ns: int, end_ns: int) -> list[Chunk]:
        samples = np.zeros(SOUND_RATE_HZ * (end_ns - start_ns) // 1_000_000_000, np.float32)
        return [self.sound.chunk(session.id, start_ns, end_ns - start_ns, arrays={"samples": samples})]


class Counter(Stage):
    """An event for each window. It takes no camera called `refused`, and `hanging` hangs it."""

    sound = In(SOUND)
    events = Out(EVENTS)
    ends_windows = True

    def open_session(self, session: Session) -> None:
        if session.camera == "refused":
            raise StageError(f"counter: no room for session {session.id!r}")
        if session.camera == "hanging":
            time.sleep(600)

    def process(self, units: list[Unit]) -> list[Chunk]:
        return [
            self.events.event(unit.session, unit.start_ns, "counted", window=unit.index, pid=os.getpid())
            for unit in units
        ]
