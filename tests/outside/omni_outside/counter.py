from __future__ import annotations

import time

from pydantic import Field

from stages.api import EVENTS, FRAMES, Chunk, Duration, In, Out, Stage, StageOptions, Unit


class CounterOptions(StageOptions):
    """work: how long a batch takes."""

    work_ns: Duration = Field(default=0, alias="work")


class Counter(Stage):
    """Counts the pictures of each window, beside the way of the windows."""

    frames = In(FRAMES, side=True)
    counts = Out(EVENTS)
    Options = CounterOptions

    def process(self, units: list[Unit]) -> list[Chunk]:
        time.sleep(self.options.work_ns / 1e9)
        return [
            self.counts.event(
                unit.session, unit.start_ns, "counted", window=unit.index, pictures=len(unit.of(self.frames))
            )
            for unit in units
        ]
