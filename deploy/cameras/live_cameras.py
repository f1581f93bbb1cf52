"""Cameras that come and go while the pipeline runs: `pipeline camera add | remove`, and the gateway that they ask.

Rule: who asks waits in a thread of the gateway; sessions are opened and ended by the thread that runs the pipeline
alone, which answers between two looks at its actors. What can be refused is refused before anything is opened.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Final, Protocol

from deploy.cameras.checks import Checks, Refused, camera_of, check_only_source, check_spare, look_at
from deploy.cameras.sources import shown_sources
from deploy.control.calls import Reply, answered
from graph.secret import Secret, mask_urls
from graph.sections import CameraSpec
from graph.spec import PipelineSpec
from graph.spec_check import MAX_CAMERAS
from stages.media.reader import MediaError

ANSWER_S: Final = 60.0  # until the pipeline's thread must have begun; it looks four times a second
RETRY_S: Final = 30.0  # where nobody knows when there will be room
STARTING_S: Final = 10.0  # it then runs, most likely
ENDING: Final = "the pipeline is ending"


@dataclass(frozen=True, slots=True)
class Added:
    """A camera that is watched from now on. warnings: what was said of its source."""

    name: str
    source: str  # masked
    warnings: tuple[str, ...] = ()


class Cameras(Protocol):
    """What the pipeline's thread does of what is asked for (deploy/run/watched.py)."""

    def open_camera(self, name: str, camera: CameraSpec) -> Reply[None]: ...
    def end_camera(self, name: str) -> None: ...
    def open_view(self, name: str, view: str, source: Secret) -> Reply[None]: ...
    def end_view(self, name: str, view: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Change:
    """Something to be done by the pipeline's thread. camera: as it is to be then; None: remove it. view: only that."""

    name: str
    camera: CameraSpec | None
    view: str = ""
    done: Future[None] = field(default_factory=Future)

    def __str__(self) -> str:
        return f"camera {self.name}/{self.view}" if self.view else f"camera {self.name}"

    def begin(self, cameras: Cameras) -> Reply[None]:
        """Let it be done; what is removed has gone at once."""
        if self.camera is not None and self.view:
            return cameras.open_view(self.name, self.view, self.camera.views[self.view])
        if self.camera is not None:
            return cameras.open_camera(self.name, self.camera)
        if self.view:
            cameras.end_view(self.name, self.view)
        else:
            cameras.end_camera(self.name)
        return answered("", None)

    def refusal(self, error: Exception, retry_after_s: int | None) -> Refused:
        """What to say of what was begun and has failed."""
        if isinstance(error, MediaError):  # it has gone since it was looked at
            return Refused(422, f"{self}: {error}")
        return Refused(503, str(error), retry_after_s)


class LiveCameras:
    """Which cameras there are, and what is asked of them."""

    def __init__(self, spec: PipelineSpec, *, paced: bool, keeps_files: bool) -> None:
        """keeps_files: sessions leave files named after their camera, so that a name is used once."""
        self._paced, self._keeps_files = paced, keeps_files
        self._checks = Checks(spec, paced)
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._coming: dict[str, CameraSpec] = {}  # a view by the name of both, with its source only
        self._open = dict(spec.cameras)
        self._used = set(spec.cameras)
        self._pending: deque[_Change] = deque()
        self._opening: list[tuple[_Change, Reply[None]]] = []  # by the pipeline's thread, which alone touches it
        self._until_s: float | None = None  # when the sources end, on the monotonic clock
        self._is_over = threading.Event()
        self._closed = "the pipeline is starting"  # why nothing is answered; "" when it is

    # ---- who asks ----------------------------------------------------------------------------------------------------

    def add(self, name: str, config: Mapping[str, object]) -> Added:
        """Add a camera, described as in `cameras:`; returns once its session is open.

        A name like `porch/back` adds a view to a camera that is watched.
        Its source is taken as it is: who asks has resolved `${…}`, in an environment of his own, and may give with it
        a `masked_source`: how it was written, to be shown in its place.
        Raises Refused: 422 a wrong description or a source that can't be used, 409 a name that is taken, 503 no room.
        """
        camera_name, slash, view = name.partition("/")
        if slash:
            return self._add_view(camera_name, view, config)
        camera = self._checks.camera(name, config)
        warnings = self._open_checked(_Change(name, camera), name, camera)
        return Added(name, shown_sources(camera.shown_sources), warnings)

    def _add_view(self, name: str, view: str, config: Mapping[str, object]) -> Added:
        whole = mask_urls(f"{name}/{view}")
        check_only_source(whole, config)
        with self._lock:
            before = camera_of(self._open, name, whole)
        camera = self._checks.with_view(before, name, view, config)
        warnings = self._open_checked(_Change(name, camera, view), whole, camera.apart[view])
        return Added(whole, camera.views[view].masked, warnings)

    def _open_checked(self, change: _Change, name: str, coming: CameraSpec) -> tuple[str, ...]:
        """Look at what comes, and let it be opened; returns warnings. name: with its view, where only one comes."""
        self._reserve(name, coming)
        try:
            warnings = look_at({name: coming}, self._is_over.is_set)
            self._ask(change)
        finally:
            with self._lock:
                self._coming.pop(name, None)
        return warnings

    def remove(self, name: str) -> None:
        """End a camera's session: what was seen and heard until now is gone through, and said. Raises Refused.

        A name like `porch/back` takes a view from a camera, from the window's end on.
        """
        camera_name, slash, view = name.partition("/")
        whole = mask_urls(name) if slash else ""
        with self._lock:
            camera = camera_of(self._open, camera_name, whole)
        if slash:
            check_spare(whole, view, camera)
        self._ask(_Change(camera_name, None, view))

    def _reserve(self, name: str, coming: CameraSpec) -> None:
        is_camera = "/" not in name
        with self._lock:
            self._refuse_if_closed()
            if not self._paced:
                raise Refused(409, "with --speed max cameras can't come later: nothing there goes by the clock")
            if name in self._open or name in self._coming:
                raise Refused(409, f"camera {name}: there is one of this name")
            if is_camera and self._keeps_files and name in self._used:
                raise Refused(409, f"camera {name}: --out holds what an earlier one of this name has left")
            cameras = [*self._open.items(), *self._coming.items(), (name, coming)]
            if sum(len(camera.sources) for _, camera in cameras) > MAX_CAMERAS:
                raise Refused(503, f"one pipeline takes {MAX_CAMERAS} cameras", self._retry_after_s())
            self._checks.admit(cameras, self._retry_after_s())
            self._coming[name] = coming

    def _ask(self, change: _Change) -> None:
        with self._lock:
            self._refuse_if_closed()
            self._pending.append(change)
        self._wake.set()
        try:
            change.done.result(ANSWER_S)
        except FutureTimeout:
            if change.done.cancel():
                problem = f"{change}: the pipeline has not answered within {ANSWER_S:g} s"
                raise Refused(504, problem) from None
            change.done.result()  # it has begun, and its own calls have an end

    def _refuse_if_closed(self) -> None:
        if self._until_s is not None and time.monotonic() >= self._until_s:
            self._closed = ENDING
        if self._closed:
            raise Refused(503, self._closed, None if self._closed == ENDING else math.ceil(STARTING_S))

    def _retry_after_s(self) -> int | None:
        """When to look whether there is room; None where all has come to its end by then."""
        is_too_late = self._until_s is not None and time.monotonic() + RETRY_S >= self._until_s
        return None if is_too_late else math.ceil(RETRY_S)

    # ---- who runs the pipeline ---------------------------------------------------------------------------------------

    def begin(self, until_s: float | None) -> None:
        """The pipeline runs. until_s: when the sources end, on the monotonic clock; None: nobody knows."""
        with self._lock:
            self._until_s, self._closed = until_s, ""

    def wait(self, timeout_s: float) -> None:
        """Until something is asked for, or the time is over."""
        if self._wake.wait(timeout_s):
            self._wake.clear()

    def answer(self, cameras: Cameras) -> None:
        """Begin what was asked for since, and answer what is done by now."""
        with self._lock:
            pending, self._pending = list(self._pending), deque()
        for each in pending:
            if not each.done.set_running_or_notify_cancel():
                continue
            try:
                self._opening.append((each, each.begin(cameras)))
            except BaseException as error:  # a fault of ours, or the second Ctrl-C: nobody is left without an answer
                each.done.set_exception(Refused(503, f"{each}: {error}"))
                raise
        done = [(each, reply) for each, reply in self._opening if reply.is_done]
        self._opening = [(each, reply) for each, reply in self._opening if not reply.is_done]
        for each, reply in done:
            if reply.error is None:
                self._done(each)
                each.done.set_result(None)
            else:
                each.done.set_exception(each.refusal(reply.error, self._retry_after_s()))

    def _done(self, change: _Change) -> None:
        """Take it down. Of a camera that is removed it is over with `ended`."""
        name, camera = change.name, self._open.get(change.name)
        with self._lock:
            if change.camera is not None and not change.view:
                self._open[name] = change.camera
                if self._keeps_files:
                    self._used.add(name)
            elif camera is not None and change.view:
                views = {view: source for view, source in camera.views.items() if view != change.view}
                if change.camera is not None:
                    views[change.view] = change.camera.views[change.view]
                self._open[name] = camera.model_copy(update={"views": views})

    def ended(self, name: str) -> None:
        """A session has come to its end: there is room for another."""
        with self._lock:
            self._open.pop(name, None)

    def close(self) -> None:
        """From now on everything is refused."""
        with self._lock:
            self._closed = ENDING
            self._is_over.set()
            left, self._pending = list(self._pending), deque()
        opening, self._opening = self._opening, []
        for change, _ in opening:
            change.done.set_exception(Refused(503, ENDING))
        for change in left:
            if change.done.set_running_or_notify_cancel():
                change.done.set_exception(Refused(503, ENDING))
