"""Cameras that come and go while the pipeline runs: `pipeline camera add | remove`, and the gateway that they ask.

Rule: who asks waits in a thread of the gateway; sessions are opened and ended by the thread that runs the pipeline
alone, which answers between two looks at its actors. What can be refused is refused before anything is opened.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Final

from deploy.cameras.sources import Probed, SourceError, apart, check_sources, probe, probe_all
from deploy.control.calls import Reply
from deploy.control.capacity import CapacityError, admit
from graph.chunk import NS_PER_S
from graph.errors import GraphError, SpecError
from graph.secret import Secret, mask_urls
from graph.sections import CameraSpec
from graph.spec import PipelineSpec, parse_spec
from graph.spec_check import MAX_CAMERAS
from stages.catalog import CATALOG
from stages.media.reader import MediaError
from stages.media.wire import is_control

ANSWER_S: Final = 60.0  # until the pipeline's thread must have begun; it looks four times a second
RETRY_S: Final = 30.0  # where nobody knows when there will be room
STARTING_S: Final = 10.0  # it then runs, most likely
ENDING: Final = "the pipeline is ending"


class Refused(GraphError):
    """A camera that is not added, or not removed. status: HTTP's. retry_after_s: when to ask again; None: never."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(frozen=True, slots=True)
class Added:
    """A camera that is watched from now on. warnings: what was said of its source."""

    name: str
    source: str  # masked
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Asked:
    """Something to be done by the pipeline's thread. camera None: remove."""

    name: str
    camera: CameraSpec | None
    done: Future[None] = field(default_factory=Future)


class LiveCameras:
    """Which cameras there are, and what is asked of them."""

    def __init__(self, spec: PipelineSpec, *, paced: bool, keeps_files: bool) -> None:
        """keeps_files: sessions leave files named after their camera, so that a name is used once."""
        self._spec, self._paced, self._keeps_files = spec, paced, keeps_files
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._coming: set[str] = set()
        self._open = set(spec.cameras)
        self._used = set(spec.cameras)
        self._asked: deque[_Asked] = deque()
        self._opening: list[tuple[_Asked, Reply[None]]] = []  # by the pipeline's thread, which alone touches it
        self._until_s: float | None = None  # when the sources end, on the monotonic clock
        self._is_over = threading.Event()
        self._closed = "the pipeline is starting"  # why nothing is answered; "" when it is

    # ---- who asks ----------------------------------------------------------------------------------------------------

    def add(self, name: str, wanted: Mapping[str, object]) -> Added:
        """Add a camera, described as in `cameras:`; returns once its session is open.

        Its source is taken as it is: who asks has resolved `${…}`, in an environment of his own, and may give with it
        a `masked_source`: how it was written, to be shown in its place.
        Raises Refused: 422 a wrong description or a source that can't be used, 409 a name that is taken, 503 no room.
        """
        camera = self._described(name, wanted)
        self._reserve(name)
        try:
            warnings: list[str] = []
            self._check_source(name, camera, warnings.append)
            self._ask(_Asked(name, camera))
        finally:
            with self._lock:
                self._coming.discard(name)
        return Added(name, camera.shown_source, tuple(warnings))

    def remove(self, name: str) -> None:
        """End a camera's session: what was seen and heard until now is gone through, and said. Raises Refused."""
        with self._lock:
            if name not in self._open:
                there = ", ".join(sorted(self._open)) or "none"
                raise Refused(404, f"camera {name}: there is none of this name; there are: {there}")
        self._ask(_Asked(name, None))

    def _described(self, name: str, wanted: Mapping[str, object]) -> CameraSpec:
        template = wanted.get("masked_source")
        described = {key: value for key, value in wanted.items() if key != "masked_source"}
        text = json.dumps({"version": 1, "cameras": {name: described}}, ensure_ascii=False)
        if "${" in text:
            raise Refused(422, f"camera {mask_urls(name)}: ${{…}} is resolved by who asks, not here")
        try:
            cameras = parse_spec(text, "camera", CATALOG, environment={}).cameras
            check_sources(replace(self._spec, cameras=cameras), paced=self._paced)
        except SpecError as error:
            told = [f"camera {mask_urls(name)}: {mask_urls(problem.message)}" for problem in error.problems]
            raise Refused(422, "\n".join(told)) from None
        except SourceError as error:
            raise Refused(422, str(error)) from None
        self._check_fps(name, cameras[name])
        source = cameras[name].source
        if source is None or not isinstance(template, str) or any(map(is_control, template)):
            return cameras[name]
        return cameras[name].model_copy(update={"source": Secret(template, source.reveal())})

    def _check_fps(self, name: str, camera: CameraSpec) -> None:
        """An edge's credit is for all sessions, and was made for the cameras of the beginning."""
        fps, num_views = camera.fps, len(camera.sources)
        num_pictures = num_views * math.ceil(fps * self._spec.window.length_ns / NS_PER_S)
        for edge in self._spec.edges:
            if edge.kind.is_picture and edge.credit.chunks < num_pictures:
                views = f" from {num_views} views" if num_views > 1 else ""
                told = f"a window has {num_pictures} pictures at fps {fps:g}{views}, {edge.id} has credit for "
                told += f"{edge.credit.chunks}; start the pipeline with such a camera, or with more credit"
                raise Refused(422, f"camera {name}: {told}")

    def _reserve(self, name: str) -> None:
        with self._lock:
            self._refuse_if_closed()
            if not self._paced:
                raise Refused(409, "with --speed max cameras can't come later: nothing there goes by the clock")
            if name in self._open | self._coming:
                raise Refused(409, f"camera {name}: there is one of this name")
            if self._keeps_files and name in self._used:
                raise Refused(409, f"camera {name}: --out holds what an earlier one of this name has left")
            if len(self._open | self._coming) >= MAX_CAMERAS:
                raise Refused(503, f"one pipeline takes {MAX_CAMERAS} cameras", self._retry_after_s())
            try:
                admit(self._spec, len(self._open | self._coming) + 1)
            except CapacityError as error:
                raise Refused(503, str(error), self._retry_after_s()) from None
            self._coming.add(name)

    def _check_source(self, name: str, camera: CameraSpec, tell: Callable[[str], None]) -> None:
        """A broken file is refused; a live camera that does not answer is looked for, as in `up`."""

        def ask(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
            return probe(None, camera, lambda: is_over() or self._is_over.is_set())

        probed = probe_all(apart({name: camera}), ask)
        if broken := [f"camera {source}: {why}" for source, (why, is_live) in probed.items() if why and not is_live]:
            raise Refused(422, "\n".join(broken))
        for source, (why, _) in probed.items():
            if why:
                tell(f"camera {source}: {why}; it is looked for again")

    def _ask(self, asked: _Asked) -> None:
        with self._lock:
            self._refuse_if_closed()
            self._asked.append(asked)
        self._wake.set()
        try:
            asked.done.result(ANSWER_S)
        except FutureTimeout:
            if asked.done.cancel():
                told = f"camera {asked.name}: the pipeline has not answered within {ANSWER_S:g} s"
                raise Refused(504, told) from None
            asked.done.result()  # it has begun, and its own calls have an end

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

    def answer(self, open_camera: Callable[[str, CameraSpec], Reply[None]], end_camera: Callable[[str], None]) -> None:
        """Begin what was asked for since, and answer what is done by now."""
        with self._lock:
            asked, self._asked = list(self._asked), deque()
        for each in asked:
            if not each.done.set_running_or_notify_cancel():
                continue
            try:
                if each.camera is None:
                    end_camera(each.name)
                    each.done.set_result(None)
                else:
                    self._opening.append((each, open_camera(each.name, each.camera)))
            except BaseException as error:  # a fault of ours, or the second Ctrl-C: nobody is left without an answer
                each.done.set_exception(Refused(503, f"camera {each.name}: {error}"))
                raise
        done = [(each, reply) for each, reply in self._opening if reply.is_done]
        self._opening = [(each, reply) for each, reply in self._opening if not reply.is_done]
        for each, reply in done:
            self._answer(each, reply)

    def _answer(self, asked: _Asked, reply: Reply[None]) -> None:
        if reply.error is None:
            self._opened(asked.name)
            asked.done.set_result(None)
        elif isinstance(reply.error, MediaError):  # it has gone since it was looked at
            asked.done.set_exception(Refused(422, f"camera {asked.name}: {reply.error}"))
        else:
            asked.done.set_exception(Refused(503, str(reply.error), self._retry_after_s()))

    def _opened(self, name: str) -> None:
        with self._lock:
            self._open.add(name)
            if self._keeps_files:
                self._used.add(name)

    def ended(self, name: str) -> None:
        """A session has come to its end: there is room for another."""
        with self._lock:
            self._open.discard(name)

    def close(self) -> None:
        """From now on everything is refused."""
        with self._lock:
            self._closed = ENDING
            self._is_over.set()
            left, self._asked = list(self._asked), deque()
        opening, self._opening = self._opening, []
        for asked, _ in opening:
            asked.done.set_exception(Refused(503, ENDING))
        for asked in left:
            if asked.done.set_running_or_notify_cancel():
                asked.done.set_exception(Refused(503, ENDING))
