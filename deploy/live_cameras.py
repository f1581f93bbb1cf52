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
from functools import partial
from typing import Final

from deploy.capacity import CapacityError, admit
from deploy.sources import SourceError, check_sources, probe, probe_all
from graph.errors import GraphError, SpecError
from graph.sections import CameraSpec
from graph.spec import PipelineSpec, parse_spec
from stages.stage import StageError

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
        self._until_s: float | None = None  # when the sources end, on the monotonic clock
        self._closed = "the pipeline is starting"  # why nothing is answered; "" when it is

    # ---- who asks ----------------------------------------------------------------------------------------------------

    def add(self, name: str, wanted: Mapping[str, object]) -> Added:
        """Add a camera, described as in `cameras:`; returns once its session is open.

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
        return Added(name, camera.source.masked, tuple(warnings))

    def remove(self, name: str) -> None:
        """End a camera's session: what was seen and heard until now is gone through, and said. Raises Refused."""
        with self._lock:
            if name not in self._open:
                there = ", ".join(sorted(self._open)) or "none"
                raise Refused(404, f"camera {name}: there is none of this name; there are: {there}")
        self._ask(_Asked(name, None))

    def _described(self, name: str, wanted: Mapping[str, object]) -> CameraSpec:
        text = json.dumps({"version": 1, "cameras": {name: wanted}})
        try:
            cameras = parse_spec(text, "camera").cameras
            check_sources(replace(self._spec, cameras=cameras), paced=self._paced)
        except SpecError as error:
            raise Refused(422, "\n".join(f"camera {name}: {p.message}" for p in error.problems)) from None
        except SourceError as error:
            raise Refused(422, str(error)) from None
        return cameras[name]

    def _reserve(self, name: str) -> None:
        with self._lock:
            self._refuse_if_closed()
            if not self._paced:
                raise Refused(409, "with --speed max cameras can't come later: nothing there goes by the clock")
            if name in self._open | self._coming:
                raise Refused(409, f"camera {name}: there is one of this name")
            if self._keeps_files and name in self._used:
                raise Refused(409, f"camera {name}: --out holds what an earlier one of this name has left")
            try:
                admit(self._spec, len(self._open | self._coming) + 1)
            except CapacityError as error:
                raise Refused(503, str(error), self._retry_after_s()) from None
            self._coming.add(name)

    def _check_source(self, name: str, camera: CameraSpec, tell: Callable[[str], None]) -> None:
        """A broken file is refused; a live camera that does not answer is looked for, as in `up`."""
        why, is_live = probe_all({name: camera}, partial(probe, None))[name]
        if why and not is_live:
            raise Refused(422, f"camera {name}: {why}")
        if why:
            tell(f"camera {name}: {why}; it will be looked for")

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
        if self._closed:
            raise Refused(503, self._closed, None if self._closed == ENDING else math.ceil(STARTING_S))

    def _retry_after_s(self) -> int:
        """When there may be room: at the end of the sources, where that is known."""
        return math.ceil(RETRY_S if self._until_s is None else max(self._until_s - time.monotonic(), 1.0))

    # ---- who runs the pipeline ---------------------------------------------------------------------------------------

    def begin(self, until_s: float | None) -> None:
        """The pipeline runs. until_s: when the sources end, on the monotonic clock; None: nobody knows."""
        with self._lock:
            self._until_s, self._closed = until_s, ""

    def wait(self, timeout_s: float) -> None:
        """Until something is asked for, or the time is over."""
        if self._wake.wait(timeout_s):
            self._wake.clear()

    def answer(self, open_camera: Callable[[str, CameraSpec], None], end_camera: Callable[[str], None]) -> None:
        """Do what was asked for since."""
        while True:
            with self._lock:
                if not self._asked:
                    return
                asked = self._asked.popleft()
            if not asked.done.set_running_or_notify_cancel():
                continue
            try:
                if asked.camera is None:
                    end_camera(asked.name)
                else:
                    open_camera(asked.name, asked.camera)
                    self._opened(asked.name)
            except StageError as error:
                asked.done.set_exception(Refused(503, str(error), self._retry_after_s()))
            except BaseException as error:
                asked.done.set_exception(Refused(503, f"camera {asked.name}: {error}"))
                raise
            else:
                asked.done.set_result(None)

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
            left, self._asked = list(self._asked), deque()
        for asked in left:
            if asked.done.set_running_or_notify_cancel():
                asked.done.set_exception(Refused(503, ENDING))
