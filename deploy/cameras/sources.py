"""What is asked of the cameras before anything is started for them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from graph.chunk import NS_PER_S
from graph.errors import GraphError
from graph.secret import Secret, mask_urls
from graph.sections import CameraSpec
from graph.spec import PipelineSpec
from graph.wording import NOT_UTF_8, is_text
from stages.media.reader import (
    Ended,
    Failed,
    MediaError,
    MediaItem,
    MediaReader,
    MediaRequest,
    Progress,
    Warned,
    check_source,
)
from stages.media.wire import FOREVER_NS, LIVE_KINDS

PROBE_S = 12.0  # for all live cameras together; one that is dead takes it all
SLOW_S = 5.0  # then it is said which cameras have not answered yet
PROBE_AGAIN_S = 1.0  # between two tries where `up` waits for cameras
PROBE_DECODE_S = 5.0  # for the first picture or sound of a file; a large one on a busy machine takes longer
PROBE_LOOK_S = 0.2  # between two looks whether that is enough
MAX_LIVE_AT_ONCE = 64
MAX_FILES_AT_ONCE = 8  # each decodes ahead until its pipe is full, and a file that waits for a core is not broken


class SourceError(GraphError):
    """A source that can't be used; says which, why, and what instead."""


def check_cameras(
    spec: PipelineSpec, duration_ns: int | None, tell: Callable[[str], None], wait_s: float | None = None
) -> Mapping[str, CameraSpec]:
    """Open every source once, before anything is started. What can never be read is an error. A live camera that does
    not answer is no more of one than later, while the pipeline runs: it is told, and looked for again then.

    wait_s: wait so long for all live cameras together, their decoders' start included (0: look once), and take it for
    an error where one has not answered by then.
    Raises SourceError with all that is wrong.
    """
    there = apart(spec.cameras)
    cameras, deadline_s = there, time.monotonic() + (wait_s or 0.0)
    within_s = min(wait_s or PROBE_S, PROBE_S)
    absent: dict[str, str] = {}
    while cameras:
        is_first = cameras is there

        def say(silent: Sequence[str], is_first: bool = is_first) -> None:
            if is_first:
                tell(f"  opening {', '.join(silent)} (for {SLOW_S:g} s)")

        probed = probe_all(cameras, partial(probe, duration_ns, within_s=within_s), within_s, say)
        is_over = time.monotonic() >= deadline_s
        broken = {name: why for name, (why, live) in probed.items() if why and not live}
        # Who is cut off now has said before what is the matter.
        absent = {name: (is_over and absent.get(name)) or why for name, (why, live) in probed.items() if why and live}
        if broken:
            raise SourceError("\n".join(f"camera {name}: {why}" for name, why in (broken | absent).items()))
        if not absent or is_over:
            break
        for name in absent if cameras is there else ():  # the first time
            tell(f"camera {name}: {absent[name]}; waiting for it")
        cameras = {name: there[name] for name in absent}
        time.sleep(min(PROBE_AGAIN_S, max(deadline_s - time.monotonic(), 0.0)))
        within_s = min(deadline_s - time.monotonic(), PROBE_S)
        if within_s <= 0:
            break
    if absent and wait_s is not None:
        waited = f" (waited for {wait_s:g} s)" if wait_s else ""
        raise SourceError("\n".join(f"camera {name}: {why}{waited}" for name, why in absent.items()))
    for name, why in absent.items():
        tell(f"camera {name}: {why}; it is looked for again while the pipeline runs")
    return spec.cameras


def apart(cameras: Mapping[str, CameraSpec]) -> dict[str, CameraSpec]:
    """Each view as a camera of its own: that of `porch` which is called `back` is `porch/back`."""
    return {
        f"{name}/{view}" if view else name: alone
        for name, camera in cameras.items()
        for view, alone in camera.apart.items()
    }


def shown_sources(sources: Mapping[str, str]) -> str:
    """A camera's sources in a line. sources: by view, masked."""
    return ", ".join(f"{view}={source}" if view else source for view, source in sources.items())


def _only_source(camera: CameraSpec) -> Secret:
    (source,) = camera.sources.values()
    return source


def check_sources(spec: PipelineSpec, *, paced: bool) -> None:
    """Raises SourceError when a source is not read here, or not at this pace, whatever the world is like."""
    problems = []
    for name, camera in apart(spec.cameras).items():
        source = _only_source(camera)
        try:
            kind = check_source(source.reveal())
        except MediaError as error:
            if error.kind == "blocked":
                problems.append(f"camera {name}: {error}")
            continue
        if kind in LIVE_KINDS and not paced:
            # In virtual time no window expires: one lost picture would hold up the session for ever.
            problems.append(
                f"camera {name}: --speed max reads files and test patterns; {source.masked} sets its own pace"
            )
    if problems:
        raise SourceError("\n".join(problems))


Probed = tuple[str, bool]
"""Why a source can't be read, or ""; whether it is a live one."""


def probe(
    duration_ns: int | None, camera: CameraSpec, is_over: Callable[[], bool], within_s: float | None = None
) -> Probed:
    """Open a source once, as for a run of this duration, unless that is over before it answers: after within_s."""
    if is_over():
        return _no_answer(within_s), _is_live(camera)
    source = _only_source(camera)
    try:
        request = MediaRequest(
            source=source.reveal(),
            fps=camera.fps,
            max_pixels=camera.max_pixels,
            want_video=True,
            want_audio=camera.has_sound,
            piece_ns=NS_PER_S,
            duration_ns=duration_ns,
            masked=source.masked,
        )
        with MediaReader(request) as reader:
            return _look(reader, is_over) or (_no_answer(within_s), reader.is_live)
    except MediaError as error:
        return str(error), error.kind != "blocked" and _is_live(camera)


def _no_answer(within_s: float | None) -> str:
    return f"gave nothing within {round(PROBE_S if within_s is None else within_s, 1):g} s"


def _look(reader: MediaReader, is_over: Callable[[], bool]) -> Probed | None:
    """Why nothing comes of a source, or ""; None where it is over before. Of a file something must come; a live one is
    left at that it opens."""
    opened: Progress | None = None
    patience_s = math.inf
    while not is_over():
        item = reader.read(PROBE_LOOK_S)
        if isinstance(item, Failed):
            return item.message, reader.is_live
        if isinstance(item, Ended) and opened is None:
            return "holds neither picture nor sound", False
        if isinstance(item, Progress) and opened is None and not reader.is_live:
            opened, patience_s = item, time.monotonic() + PROBE_DECODE_S
        elif _gives(item, opened) or time.monotonic() >= patience_s:
            return "", reader.is_live
    return ("", reader.is_live) if opened else None


def _gives(item: MediaItem | None, opened: Progress | None) -> bool:
    """Whether a source that has opened so gives something, or has come to its end without a fault."""
    if isinstance(item, Progress) and opened is not None:  # FOREVER_NS: a track has ended
        return opened.video_ns < item.video_ns < FOREVER_NS or opened.audio_ns < item.audio_ns < FOREVER_NS
    return item is not None and not isinstance(item, Warned)


def probe_all(
    cameras: Mapping[str, CameraSpec],
    ask: Callable[[CameraSpec, Callable[[], bool]], Probed],
    within_s: float | None = None,
    say: Callable[[Sequence[str]], None] = lambda silent: None,
) -> dict[str, Probed]:
    """What `ask` says of every camera. All live ones are asked at once, for within_s (None: `PROBE_S`) in all.
    say: which have not answered after `SLOW_S`.

    An interrupt does not wait for those which have not answered.
    """
    live = [name for name, camera in cameras.items() if _is_live(camera)]
    files = [name for name in cameras if name not in live]
    interrupted = threading.Event()
    deadline_s = time.monotonic() + (PROBE_S if within_s is None else within_s)

    def is_over() -> bool:
        return interrupted.is_set() or time.monotonic() >= deadline_s

    pool = ThreadPoolExecutor(min(len(live), MAX_LIVE_AT_ONCE) + MAX_FILES_AT_ONCE)
    try:
        probes = {name: pool.submit(ask, cameras[name], is_over) for name in live}
        probes |= {name: pool.submit(ask, cameras[name], interrupted.is_set) for name in files}
        wait(probes.values(), timeout=SLOW_S)
        if silent := [name for name, future in probes.items() if not future.done()]:
            say(silent)
        return {name: probes[name].result() for name in cameras}
    finally:
        interrupted.set()
        pool.shutdown(cancel_futures=True)


def _is_live(camera: CameraSpec) -> bool:
    source = _only_source(camera).reveal()
    try:
        return check_source(source) in LIVE_KINDS
    except MediaError as error:  # a webcam that is not plugged in is no file that is not there
        return error.kind == "missing" and source.startswith("/dev/video")


def anchored(source: str) -> str:
    """The source as an actor finds it, which may run in another folder."""
    try:
        is_path = check_source(source) in ("file", "images", "webcam")
    except MediaError:  # it is looked for again
        is_path = False
    return str(Path(source).absolute()) if is_path else source


def parse_cameras(texts: Sequence[str], option: str = "--camera ") -> dict[str, str]:
    """`name=source` as the command line gives it; option: what it is called there. Raises SourceError."""
    cameras: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or not name or not source:
            problem = f"{option}{mask_urls(text)}: expected name=source"
            raise SourceError(f"{problem}, like door=clip.mp4 or yard=rtsp://10.0.0.7/live")
        if not is_text(text):
            what = f"{NOT_UTF_8}: rename the file, or make a link to it with another name (ln -s)"
            raise SourceError(f"{option}{mask_urls(text)}: {what}")
        if name in cameras:
            raise SourceError(f"{option}{mask_urls(name)}: given twice")
        cameras[name] = source
    return cameras
