"""How many cameras two cores see: pictures through decoders and feeds to the vision encoder's join, without a model.

Each camera is 640x360 H.264 at 15 fps, over RTSP from a server of ours on this machine, or a file, watched at 1 fps.
One process has all feeds, the camera stage and a join per session; its sessions' windows begin spread over a second. A
window is on time when it leaves the join with its picture, and before it is given up (150 ms behind its end).

The rival of processor time is a plain PyAV loop that decodes everything of one such camera and converts a picture per
second. Of ours counts what feeds, stage, joins and decoders take, measured after all have opened; the server's part is
neither's, but runs on the same cores. Then p99 from a picture's sampling instant to the join beside one camera that
gives noise, one that hangs in a read, one that is cut off each second; the rival is the same without that camera, in
turns.

Options, OMNI_BENCH_…: CAMERAS, how many with a keyframe each how many seconds (default: 128:1,64:4); SECONDS, how long
each is measured (20); SETTLE, so long after the last was opened (8: keyframes are relied on from the fourth on);
BESIDE, the cameras beside a bad one (32); TURNS, how often those are measured, with and without it (3).
"""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from deploy.evaluate.bench import ROOT, BenchError, Row, command_of, less_is_better, option
from deploy.evaluate.films import FilmSpec, make_film
from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, ChunkType
from graph.window import Input, Joined, WindowJoin
from stages.camera import Camera
from stages.kinds import FRAMES
from stages.media.feed import Feed
from stages.media.feed_opening import in_thread
from stages.media.feeds import Feeds
from stages.media.fork import FORK_SERVER
from stages.session import Session
from stages.stage import SourceId
from tests.support.sessions import make_session

NAME: Final = "cameras"
RIVAL: Final = "a plain PyAV loop that decodes everything"
OPEN_S: Final = 0.03  # between two cameras
TURN_S: Final = 0.05  # between two looks at all cameras; those that give something are looked at when they do
MAX_RIVAL_S: Final = 10
OPENING_S: Final = 60  # at most until all cameras are open: so much longer than measured is a film
LAST_S: Final = 2.0  # the window that has begun before, and until the last one is given up
NEVER_NS: Final = 10 * NS_PER_S  # when a window has left that this process was too busy to give up
INSTANT_NS: Final = 800 * NS_PER_MS  # of a window of 1 s
PICTURES: Final = Camera.frames.name
FAULTS: Final = {"noise": "gives noise", "hang": "hangs in a read", "cut": "is cut off each second"}


def run() -> list[Row]:
    """Per number of cameras: windows on time, processor time, delay; then what bad cameras cost the others."""
    seconds = int(option("SECONDS", "20"))
    plans = [plan.split(":") for plan in option("CAMERAS", "128:1,64:4").split(",")]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as folder:
        for count, keyframe_s in plans:
            long_s = int(seconds + _settle_s()) + OPENING_S
            film = make_film(Path(folder) / f"{keyframe_s}.mp4", FilmSpec(long_s, float(keyframe_s)))
            with serving(film) as url:
                for kind, source in (("RTSP", f"{url}/good"), ("files", str(film))):
                    name = f"{count} cameras, {kind}, a keyframe each {keyframe_s} s"
                    rival_ms = measure_rival(source, min(seconds, MAX_RIVAL_S))
                    rows += _rows(name, watch([source] * int(count), seconds), rival_ms)
        film = make_film(Path(folder) / "film.mp4", FilmSpec(int(seconds + _settle_s()) + OPENING_S, 1.0))
        with serving(film) as url:
            for path, what in FAULTS.items():
                rows.append(_beside(url, path, what, seconds))
    return rows


def _rows(name: str, seen: Seen, rival_ms: float) -> list[Row]:
    command = command_of(NAME)
    return [
        Row(f"{name}: windows on time", 100 * seen.num_on_time / len(seen.delays_ns), "%", "", None, None, command),
        less_is_better(f"{name}: CPU per camera and second", seen.cpu_ms, "ms", RIVAL, rival_ms, command),
        Row(f"{name}: sampling instant to join, p99", _percentile(seen.delays_ns), "ms", "", None, None, command),
    ]


def _beside(url: str, path: str, what: str, seconds: int) -> Row:
    good, turns = [f"{url}/good"] * int(option("BESIDE", "32")), int(option("TURNS", "3"))
    runs = [(watch([*good, f"{url}/{path}"], seconds, len(good)), watch(good, seconds)) for _ in range(turns)]
    ours, rival = (_percentile([ns for seen in side for ns in seen.delays_ns]) for side in zip(*runs, strict=True))
    name = f"{len(good)} cameras beside one that {what}: sampling instant to join, p99"
    return less_is_better(name, ours, "ms", "the same without it", rival, command_of(NAME))


def _settle_s() -> float:
    return float(option("SETTLE", "8"))


def _percentile(delays_ns: Sequence[int]) -> float:
    """The 99th, in ms."""
    return float(np.percentile(delays_ns, 99)) / NS_PER_MS


# --- ours ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """delays_ns: of all windows, from the sampling instant until they left. cpu_ms: per camera and second."""

    num_on_time: int
    delays_ns: Sequence[int]
    cpu_ms: float


@dataclass(slots=True)
class Watched:
    """One camera: when its event time 0 is, and of each window when it left the join, and whether with a picture."""

    session: Session
    feed: Feed
    origin_ns: int
    join: WindowJoin
    left: dict[int, tuple[int, bool]] = field(default_factory=dict)

    def now_ns(self) -> int:
        return time.monotonic_ns() - self.origin_ns

    def take(self, chunk: Chunk) -> None:
        if chunk.stream != PICTURES:
            return
        if chunk.type is ChunkType.WATERMARK:
            self._leave(self.join.advance(PICTURES, chunk.start_ns))
        elif not chunk.is_control:
            self._leave(self.join.add(chunk))

    def expire(self, now_ns: int) -> None:
        self._leave(self.join.expire(now_ns))

    def _leave(self, joined: Joined) -> None:
        now_ns = self.now_ns()
        self.left.update((unit.index, (now_ns, not unit.missing)) for unit in joined.units)


def watch(sources: Sequence[str], seconds: int, num_counted: int | None = None) -> Seen:
    """Open all, wait until they have settled, then measure. num_counted: the others are there, and not counted."""
    with watching(sources) as house:
        house.run_until(time.monotonic() + len(sources) * OPEN_S + _settle_s())
        first = [watched.now_ns() // NS_PER_S + 1 for watched in house.cameras]
        before_ns = house.cpu_ns()
        house.run_until(time.monotonic() + seconds + LAST_S)
        cpu_ns = (house.cpu_ns() - before_ns) / (seconds + LAST_S)
    windows = [
        (left_ns - index * NS_PER_S - INSTANT_NS, has_picture)
        for watched, begin in list(zip(house.cameras, first, strict=True))[:num_counted]
        for index in range(begin, begin + seconds)
        for left_ns, has_picture in [watched.left.get(index, (index * NS_PER_S + NEVER_NS, False))]
    ]
    delays_ns = [delay_ns for delay_ns, _ in windows]
    return Seen(sum(has_picture for _, has_picture in windows), delays_ns, cpu_ns / NS_PER_MS / len(sources))


class House:
    """A process with cameras."""

    def __init__(self) -> None:
        self.cameras: list[Watched] = []
        self._feeds = Feeds(opener=in_thread)
        self._stage = Camera(self._feeds)

    def open(self, number: int, source: str, origin_ns: int) -> None:
        session = make_session(f"camera-{number}", source, microphone=False)
        taken = {PICTURES: Input(PICTURES, FRAMES)}
        join = WindowJoin(session.id, taken, window_ns=session.window_ns, lateness_ns=session.lateness_ns)
        self._stage.open_session(session)
        self.cameras.append(Watched(session, self._feeds.open(session, *session.media.views), origin_ns, join))

    def run_until(self, end_s: float) -> None:
        """Read what comes, and let windows leave."""
        while (begin_s := time.monotonic()) < end_s:
            poll, by_descriptor = select.poll(), {}
            for watched in self.cameras:
                self._look(watched)
                for descriptor in watched.feed.wakes():
                    by_descriptor[descriptor] = watched
                    poll.register(descriptor, select.POLLIN)
            while (left_s := begin_s + TURN_S - time.monotonic()) > 0:
                for descriptor, _ in poll.poll(1000 * left_s):
                    self._look(by_descriptor[descriptor])
                    if descriptor not in by_descriptor[descriptor].feed.wakes():
                        poll.unregister(descriptor)

    def _look(self, watched: Watched) -> None:
        now_ns = watched.now_ns()
        for chunk in self._stage.advance(watched.session.id, now_ns):
            watched.take(chunk)
        watched.expire(now_ns)

    def close(self) -> None:
        for watched in self.cameras:
            self._stage.close_session(watched.session.id)
            self._feeds.close(SourceId(watched.session.id))

    def cpu_ns(self) -> int:
        """What this process and its decoders have taken; of those that have ended, nothing is known."""
        decoders = [] if FORK_SERVER.pid is None else psutil.Process(FORK_SERVER.pid).children()
        return time.process_time_ns() + sum(_cpu_ns(process.pid) for process in decoders)


@contextmanager
def watching(sources: Sequence[str]) -> Iterator[House]:
    house, now_ns = House(), time.monotonic_ns()
    try:
        for number, source in enumerate(sources):
            house.open(number, source, now_ns + round((number * OPEN_S + number / len(sources)) * NS_PER_S))
            house.run_until(time.monotonic() + OPEN_S)
        yield house
    finally:
        house.close()


def _cpu_ns(pid: int) -> int:
    try:
        return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    except OSError:
        return 0


# --- the cameras, and the rival -----------------------------------------------------------------------------------


@contextmanager
def serving(film: Path) -> Iterator[str]:
    """The address of cameras which play this film."""
    command = [sys.executable, "-m", "deploy.evaluate.rtsp_cameras", str(film)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise BenchError("the cameras did not start")
        try:
            yield f"rtsp://127.0.0.1:{port}"
        finally:
            process.terminate()


PLAIN: Final = """
import sys, time
import av
from tests.support.sessions import make_session

source, seconds = sys.argv[1], int(sys.argv[2])
with av.open(source, options={"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}) as container:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    begin_s = time.process_time()
    for index, frame in enumerate(container.decode(stream)):
        if index % 15 == 12:
            frame.to_ndarray(format="rgb24")
        if index == 15 * seconds:
            break
    print(1000 * (time.process_time() - begin_s) / seconds)
"""


def measure_rival(source: str, seconds: int) -> float:
    """Processor time per second of one camera, ms."""
    command = [sys.executable, "-c", PLAIN, source, str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
