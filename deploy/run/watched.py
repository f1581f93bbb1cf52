"""What a run watches: its cameras as sessions, those of the beginning and those that come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.cameras.source_watch import SourceWatch
from deploy.cameras.sources import anchored
from deploy.control.calls import Reply
from deploy.gateway.status import Status
from graph.chunk import NS_PER_S, SessionId
from graph.secret import Secret
from graph.sections import CameraSpec
from graph.spec import PipelineSpec
from stages.session import ListenerAction, Media, Session, View
from stages.stage import SourceId

if TYPE_CHECKING:
    from deploy.control.coordinator import Coordinator

MAX_ENDED = 64  # sessions which `ps` goes on showing


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What all sessions of a run have in common, beside the description. duration_ns None: as long as they can.

    needs_pictures: the model is lost without.
    """

    duration_ns: int | None = None
    out: Path | None = None
    paced: bool = True
    listener: tuple[ListenerAction, ...] = ()
    needs_pictures: bool = False


class Watched:
    """The cameras of one run; opens and ends them as deploy/cameras/live_cameras.py asks for it."""

    def __init__(
        self,
        spec: PipelineSpec,
        options: SessionOptions,
        status: Status,
        watch: SourceWatch,
        tell: Callable[[str], None],
    ) -> None:
        self._spec, self._options = spec, options
        self._status, self._watch, self._tell = status, watch, tell
        self._coordinator: Coordinator | None = None
        self.begun_s = 0.0  # when the first sessions were open, on the monotonic clock

    def begin(self, coordinator: Coordinator, cameras: Mapping[str, CameraSpec]) -> None:
        """Open the sessions of the beginning. Raises StageError."""
        self._coordinator = coordinator
        coordinator.open_sessions([self._session(name, camera) for name, camera in cameras.items()])
        self.begun_s = time.monotonic()
        for session in coordinator.sessions:
            self._watch.opened(session)
        self._status.sources = {name: camera.shown_sources for name, camera in cameras.items()}

    @property
    def until_s(self) -> float | None:
        """When the sources end, on the monotonic clock, where `--for` says so."""
        duration_ns = self._options.duration_ns
        return None if duration_ns is None else self.begun_s + duration_ns / NS_PER_S

    def ended(self, sessions: Sequence[SessionId]) -> None:
        for session in sessions:
            self._watch.ended(session)

    # ---- as asked for ------------------------------------------------------------------------------------------------

    def open_camera(self, name: str, camera: CameraSpec) -> Reply[None]:
        session = self._session(name, camera)
        if self.until_s is not None:  # it ends with the others
            left_ns = round((self.until_s - time.monotonic()) * NS_PER_S)
            session = replace(session, duration_ns=max(left_ns, session.window_ns))

        def opened() -> None:
            running = set(self._running.sessions)
            ended = [other for other in self._status.sources if other not in running]
            kept = {other: shown for other, shown in self._status.sources.items() if other not in ended[:-MAX_ENDED]}
            self._status.sources = {**kept, name: camera.shown_sources}
            self._watch.opened(session.id)
            self._tell(f"camera {name}: added")

        return self._running.begin_to_open(session, opened)

    def end_camera(self, name: str) -> None:
        if (session := SessionId(name)) in self._running.sessions:
            self._running.end_session(session)
            self._tell(f"camera {name}: removed; what it saw and heard is gone through to the end")

    def open_view(self, name: str, view: str, source: Secret) -> Reply[None]:
        def opened() -> None:
            self._watch.view_opened(SourceId(SessionId(name), view))
            shown = {**self._status.sources.get(name, {}), view: source.masked}
            self._status.sources = {**self._status.sources, name: shown}
            self._tell(f"camera {name}/{view}: added")

        return self._running.add_view(SessionId(name), _view(view, source), opened)

    def end_view(self, name: str, view: str) -> None:
        if (session := SessionId(name)) in self._running.sessions:
            self._running.remove_view(session, view)
            shown = {other: source for other, source in self._status.sources.get(name, {}).items() if other != view}
            self._status.sources = {**self._status.sources, name: shown}
            self._tell(f"camera {name}/{view}: removed; its pictures end with the window")

    @property
    def _running(self) -> Coordinator:
        assert self._coordinator is not None, "nothing is asked for before the pipeline runs"
        return self._coordinator

    def _session(self, name: str, camera: CameraSpec) -> Session:
        options, spec = self._options, self._spec
        microphone = camera.has_sound and spec.has_sound
        needs_pictures = options.needs_pictures or not microphone
        return Session(
            id=SessionId(name),
            camera=name,
            media=Media(
                views=tuple(_view(view, source) for view, source in camera.sources.items()),
                heard=camera.heard,
                fps=camera.fps,
                max_pixels=camera.max_pixels,
            ),
            pictures=spec.has_pictures,
            speech=spec.has_speech,
            microphone=microphone,
            window_ns=spec.window.length_ns,
            lateness_ns=spec.window.lateness_ns,
            lead_ns=spec.tail.lead_ns,
            delay_ns=spec.tail.delay_ns,
            duration_ns=options.duration_ns,
            paced=options.paced,
            listener=options.listener,
            ladder=spec.shedding.steps(keeps_pictures=needs_pictures or not spec.has_pictures),
            out=None if options.out is None else options.out.absolute(),
        )


def _view(name: str, source: Secret) -> View:
    return View(name, anchored(source.reveal()), source.masked)
