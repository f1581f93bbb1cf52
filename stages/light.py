"""Options of the stages without a model, which share processes."""

from __future__ import annotations

from typing import Final

from graph.sections import Name, StageOptions


class LightOptions(StageOptions):
    """What is heard and written: stages with the same name of `process` share one."""

    process: Name | None = "io"


SESSIONS_PER_REPLICA: Final = 64
"""Of one process with cameras. A camera costs it 1.1 ms of a second (tests/benchmarks/RESULTS.md); but where it dies,
all of them reconnect."""


class MediaOptions(StageOptions):
    """Sources that decoders serve. They leave the others alone: a camera that hangs holds up no speech."""

    process: Name | None = "media"
