"""Options of the stages without a model, which share a process."""

from __future__ import annotations

from graph.sections import Name, StageOptions


class LightOptions(StageOptions):
    """Light stages with the same name of `process` share one."""

    process: Name | None = "io"
