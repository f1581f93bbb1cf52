"""What is counted of a stage: derived from what it takes and makes, so that no stage counts itself."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.clock import Clock
from graph.kinds import Kind
from graph.metrics import CameraMetrics, Metrics, PlaybackMetrics, TurnMetrics, WindowMetrics
from graph.stage_type import outputs_of
from stages.media.health import Totals
from stages.stage import Session, Stage

RECONNECT_REASONS = ("missing", "unreadable", "refused", "timeout", "closed", "crashed", "limit")


@runtime_checkable
class LlmReadings(Protocol):
    """What can be read off the LLM stage."""

    def kv_usage(self) -> float: ...
    def text_budget(self, session: SessionId) -> int: ...


@runtime_checkable
class CameraReadings(Protocol):
    """What can be read off the camera stage."""

    def totals(self, session: SessionId) -> Totals: ...
    def delivers(self, session: SessionId) -> Collection[str]: ...


@dataclass(slots=True)
class _Camera:
    """The bound metrics of one session at this stage; those which the stage does not feed are None."""

    camera: CameraMetrics | None
    turns: TurnMetrics | None
    playback: PlaybackMetrics | None
    windows: WindowMetrics | None
    heard_ns: int = 0
    num_spoken: int = 0
    totals: Totals = field(default_factory=Totals)


class StageMeter:
    """Counts for one stage replica."""

    def __init__(self, metrics: Metrics, name: str, stage: Stage, stages: tuple[str, ...], clock: Clock) -> None:
        """stages: the names of all stages of the pipeline, for the attribution of late windows."""
        self._metrics = metrics
        self._name = name
        self._clock = clock
        self._stage = metrics.stage(name)
        self._stages = stages
        kinds = [port.kind for port in outputs_of(type(stage))]
        tokens = [kind.name for kind in kinds if kind.tokens]
        self._tokens = metrics.tokens(tokens) if tokens else None
        self._speaks = any(kind.is_control for kind in kinds)
        self._readings = stage if isinstance(stage, LlmReadings) else None
        self._camera = stage if isinstance(stage, CameraReadings) else None
        self._llm = metrics.llm() if self._readings is not None else None
        self._sessions: dict[SessionId, _Camera] = {}

    def opened(self, session: Session, ended: Collection[str] | None) -> None:
        """ended: where its windows end, the streams in which one may lack something."""
        metrics, camera = self._metrics, session.camera
        metrics.hold_camera(camera)
        self._sessions[session.id] = _Camera(
            camera=metrics.camera(camera, RECONNECT_REASONS) if self._camera is not None else None,
            turns=metrics.turns(camera) if self._readings is not None else None,
            playback=metrics.playback(camera) if self._speaks else None,
            windows=metrics.windows(camera, tuple(ended), self._stages) if ended is not None else None,
        )

    def closed(self, session: Session) -> None:
        """What was counted for the session goes with it, so that no alert waits for a camera that has ended."""
        if self._sessions.pop(session.id, None) is not None:
            self._metrics.release_camera(session.camera)
        self._read_llm()

    def processed(self, num_units: int, queue_s: float, compute_s: float) -> None:
        """A batch left the stage."""
        self._stage.processed(num_units, queue_s, compute_s)
        self._read_llm()

    def _read_llm(self) -> None:
        if self._llm is not None and self._readings is not None:
            self._llm.kv_cache_usage(self._readings.kv_usage())

    def passed(self, num_units: int) -> None:
        """Units went through for which there was nothing to compute."""
        self._stage.passed(num_units)

    def failed(self, session: Session, error: Exception, where: str) -> None:
        """The stage has raised at a session's unit ("window 3"), or at another of its hooks ("open_session")."""
        logging.error("%s: session %s, %s: failed", self._name, session.id, where, exc_info=error)
        self._stage.failed()

    def carried(self, num_chunks: int) -> None:
        """Chunks came after their window had left, and are in the next unit."""
        self._stage.carried(num_chunks)

    def made(self, session: Session, chunk: Chunk, kind: Kind[Any]) -> None:
        """The stage made a data chunk."""
        bound = self._sessions[session.id]
        if bound.camera is not None and kind.is_raw:
            bound.camera.frame(self._clock.wall_ns() / NS_PER_S)
        elif kind.tokens and self._tokens is not None:
            bound.num_spoken += 1
            self._tokens.add(kind.name, len(chunk.arrays[kind.tokens]))
        elif kind.is_event:
            _count_event(bound, chunk)
        if bound.camera is not None and self._camera is not None:
            self._count_damage(bound, bound.camera, self._camera.totals(session.id))
            bound.camera.delivers(self._camera.delivers(session.id))

    def _count_damage(self, bound: _Camera, camera: CameraMetrics, totals: Totals) -> None:
        """With whatever the camera makes: its last event comes when all is counted."""
        camera.gaps(totals.num_gaps - bound.totals.num_gaps)
        camera.bad("video", totals.num_bad_video - bound.totals.num_bad_video)
        camera.bad("audio", totals.num_bad_audio - bound.totals.num_bad_audio)
        bound.totals = totals

    def unit_done(self, session: Session, end_ns: int) -> None:
        """The stage is through with one unit."""
        bound = self._sessions[session.id]
        if bound.turns is not None and self._readings is not None:
            spoke, bound.num_spoken = bound.num_spoken > 0, 0
            bound.turns.decided("speak" if spoke else "listen")
            bound.turns.text_budget(self._readings.text_budget(session.id))
            bound.turns.parked(session.paced and session.playback.parked(end_ns))

    def played(self, session: Session, heard_ns: int, received_ns: int) -> None:
        """The sink says how far the listener has heard."""
        bound = self._sessions[session.id]
        if bound.playback is not None:
            bound.playback.lead((received_ns - heard_ns) / NS_PER_S)
            bound.playback.heard((heard_ns - bound.heard_ns) / NS_PER_S)
            bound.heard_ns = heard_ns

    def window(self, session: Session, latency_s: float, late_stage: str, missing: tuple[str, ...]) -> None:
        """A window has come to its end at the sink."""
        windows = self._sessions[session.id].windows
        if windows is not None:
            windows.finished(latency_s, late_stage or None)
            for stream in missing:
                windows.missing(stream)

    def moved(self, session: Session, level: int) -> None:
        """The session has taken a step of the shedding ladder, or given one back."""
        windows = self._sessions[session.id].windows
        if windows is not None:
            windows.shedding(level)


def _count_event(bound: _Camera, event: Chunk) -> None:
    kind = event.attrs.get("type")
    if bound.camera is not None and kind == "camera_up":
        bound.camera.up(True)
    elif bound.camera is not None and kind in ("camera_lost", "camera_ended"):
        bound.camera.up(False)
        if kind == "camera_lost":
            bound.camera.reconnected(str(event.attrs.get("reason", "")))
    elif bound.playback is not None and kind == "underrun":
        bound.playback.underrun(float(event.attrs.get("seconds") or 0.0))
    elif bound.playback is not None and kind == "barge_in":
        bound.playback.interrupted()
