from __future__ import annotations

import numpy as np

from stages.api import EVENTS, FRAMES, NS_PER_MS, Chunk, In, Out, SessionId, Stage, StageCost, StageOptions, Unit


class MotionOptions(StageOptions):
    """threshold: how much a picture must differ from the one before it, on average, as a part of white."""

    threshold: float = 0.02


class MotionGate(Stage):
    """Lets a picture through when something has moved."""

    frames = In(FRAMES)
    moving = Out(FRAMES)
    alarms = Out(EVENTS)
    Options = MotionOptions
    cost = StageCost(0, 2 * NS_PER_MS)

    def __init__(self) -> None:
        self._before: dict[SessionId, dict[str, np.ndarray]] = {}

    def close_session(self, session: SessionId) -> None:
        self._before.pop(session, None)

    def process(self, units: list[Unit]) -> list[Chunk]:
        return [chunk for unit in units for picture in unit.of(self.frames) for chunk in self._judge(picture)]

    def _judge(self, picture: Chunk) -> list[Chunk]:
        image = picture.arrays["image"].astype(np.float32) / 255
        views = self._before.setdefault(picture.session, {})
        before, views[picture.view] = views.get(picture.view), image
        moved = 1.0 if before is None or before.shape != image.shape else float(np.abs(image - before).mean())
        if moved <= self.options.threshold:
            return []
        alarm = self.alarms.event(picture.session, picture.start_ns, "motion", moved=moved)
        return [self.moving.like(picture), alarm]
