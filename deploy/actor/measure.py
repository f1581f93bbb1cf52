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
from stages.session import Session
from stages.stage import SourceId, Stage

RECONNECT_REASONS = ("missing", "unreadable", "refused", "timeout", "closed", "crashed", "limit")


@runtime_checkable
class LlmReadings(Protocol):
    """What can be read off the LLM stage."""

    def kv_usage(self) -> float: ...
    def text_budget(self, session: SessionId) -> int: ...


@runtime_checkable
class CameraReadings(Protocol):
    """What can be read off the camera stage."""

    def totals(self, source: SourceId) -> Totals: ...
    def delivers(self, source: SourceId) -> Collection[str]: ...


@dataclass(slots=True)
class _View:
    """The bound metrics of one view. label: as its camera is called in them."""

    label: str
    metrics: CameraMetrics
    totals: Totals = field(default_factory=Totals)


@dataclass(slots=True)
class _Camera:
    """The bound metrics of one session at this stage; those which the stage does not feed are None, or empty.

    views: by their names; one comes with the first thing that is made of it.
    """

    turns: TurnMetrics | None
    playback: PlaybackMetrics | None
    windows: WindowMetrics | None
    heard_ns: int = 0
    num_spoken: int = 0
    views: dict[str, _View] = field(default_factory=dict)


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
            turns=metrics.turns(camera) if self._readings is not None else None,
            playback=metrics.playback(camera) if self._speaks else None,
            windows=metrics.windows(camera, tuple(ended), self._stages) if ended is not None else None,
        )
        for view in session.media.views if self._camera is not None else ():
            self._view(session, view.name)

    def closed(self, session: Session) -> None:
        """What was counted for the session goes with it, so that no alert waits for a camera that has ended."""
        if (bound := self._sessions.pop(session.id, None)) is not None:
            for view in bound.views.values():
                self._metrics.release_camera(view.label)
            self._metrics.release_camera(session.camera)
        self._read_llm()

    def _view(self, session: Session, name: str) -> _View:
        """The metrics of a view. It is a camera of its own there, as `porch/back`, where a camera has several."""
        views = self._sessions[session.id].views
        if name not in views:
            label = f"{session.camera}/{name}" if name else session.camera
            self._metrics.hold_camera(label)
            views[name] = _View(label, self._metrics.camera(label, RECONNECT_REASONS))
        return views[name]

    def processed(self, num_units: int, queue_s: float, compute_s: float, cpu_s: float) -> None:
        """A batch left the stage."""
        self._stage.processed(num_units, queue_s, compute_s, cpu_s)
        self._read_llm()

    def _read_llm(self) -> None:
        if self._llm is not None and self._readings is not None:
            self._llm.kv_cache_usage(self._readings.kv_usage())

    def passed(self, num_units: int) -> None:
        """Units went through for which there was nothing to compute."""
        self._stage.passed(num_units)

    def failed(self, session: Session, error: BaseException, where: str) -> None:
        """The stage has raised at a session's unit ("window 3"), or at another of its hooks ("open_session")."""
        logging.error("%s: session %s, %s: failed", self._name, session.id, where, exc_info=error)
        self._stage.failed()

    def unsaid(self, session: Session) -> None:
        """A session has ended with something left to say."""
        self._stage.unsaid()

    def carried(self, num_chunks: int) -> None:
        """Chunks came after their window had left, and are in the next unit."""
        self._stage.carried(num_chunks)

    def made(self, session: Session, chunk: Chunk, kind: Kind[Any]) -> None:
        """The stage made a data chunk."""
        bound = self._sessions[session.id]
        if self._camera is not None and (kind.is_raw or kind.is_event):
            self._saw(self._camera, session, chunk, kind)
        elif kind.tokens and self._tokens is not None:
            bound.num_spoken += 1
            self._tokens.add(kind.name, len(chunk.arrays[kind.tokens]))
        elif kind.is_event:
            _count_event(bound, chunk)

    def _saw(self, camera: CameraReadings, session: Session, chunk: Chunk, kind: Kind[Any]) -> None:
        """A picture, or an event, of one of the camera's views."""
        name = chunk.view or str(chunk.attrs.get("view", ""))
        view = self._view(session, name)
        if kind.is_raw:
            view.metrics.frame(self._clock.wall_ns() / NS_PER_S)
        else:
            _count_state(view.metrics, chunk)
        source = SourceId(session.id, name)
        self._count_damage(view, camera.totals(source))
        view.metrics.delivers(camera.delivers(source))
        if kind.is_event and chunk.attrs.get("type") == "view_removed":
            self._metrics.release_camera(self._sessions[session.id].views.pop(name).label)

    @staticmethod
    def _count_damage(view: _View, totals: Totals) -> None:
        """With whatever the camera makes: its last event comes when all is counted."""
        view.metrics.gaps(totals.num_gaps - view.totals.num_gaps)
        view.metrics.bad("video", totals.num_bad_video - view.totals.num_bad_video)
        view.metrics.bad("audio", totals.num_bad_audio - view.totals.num_bad_audio)
        view.totals = totals

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


def _count_state(camera: CameraMetrics, event: Chunk) -> None:
    kind = event.attrs.get("type")
    if kind == "camera_up":
        camera.up(True)
    elif kind in ("camera_lost", "camera_ended", "view_removed"):
        camera.up(False)
        if kind == "camera_lost":
            camera.reconnected(str(event.attrs.get("reason", "")))


def _count_event(bound: _Camera, event: Chunk) -> None:
    kind = event.attrs.get("type")
    if bound.playback is not None and kind == "underrun":
        bound.playback.underrun(float(event.attrs.get("seconds") or 0.0))
    elif bound.playback is not None and kind == "barge_in":
        bound.playback.interrupted()
