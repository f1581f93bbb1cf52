"""`pipeline up`: from a checked description to running sessions, and cleanly back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from deploy import ray_environment
from deploy.capacity import admit
from deploy.checkpoints import Checkpoint, open_checkpoint
from deploy.measure import PipelineMeter
from deploy.observe import GatewayServer, build_gateway
from deploy.state import Running, StateFolder
from deploy.status import Status
from graph.chunk import NS_PER_S, SessionId
from graph.errors import GraphError
from graph.ledger import Account
from graph.sections import CameraSpec
from graph.spec import PipelineSpec
from stages.media import Ended, Failed, MediaError, MediaReader, MediaRequest, check_source
from stages.media_wire import LIVE_KINDS
from stages.stage import ListenerAction, Session

if TYPE_CHECKING:
    from deploy.coordinator import Coordinator

POLL_S = 0.25
DRAIN_S = 8.0  # after the first Ctrl-C; the listener may still have a lead and a window to hear
PROBE_S = 12.0  # for all live cameras together; one that is dead takes it all
PROBE_LOOK_S = 0.2  # between two looks whether that is enough
MAX_LIVE_AT_ONCE = 64
MAX_FILES_AT_ONCE = 8  # a decoder takes a core 0.2 s to start, and a file that waits for one is not broken


class UpError(GraphError):
    """The pipeline can't start; says what, where and what instead."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line adds to the description. duration_ns None: as long as the sources can."""

    duration_ns: int | None = None
    out: Path | None = None
    paced: bool = True
    listener: tuple[ListenerAction, ...] = ()
    address: str | None = None
    state: StateFolder | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    interrupted: bool
    ledger: Mapping[str, Account]
    out: Path | None


class Interrupts:
    """SIGINT and SIGTERM. While sessions run the first asks for a graceful end (`count`, `event`); while the pipeline
    starts, and for the second, it raises KeyboardInterrupt. From then on they are ignored: nothing may cut off the
    clean-up.
    """

    def __init__(self) -> None:
        self.count = 0
        self.event = threading.Event()
        self.graceful = False

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.event.set()
        if self.count > 1 or not self.graceful:
            self.ignore()
            raise KeyboardInterrupt


def run_up(spec: PipelineSpec, options: UpOptions, tell: Callable[[str], None]) -> Outcome:
    """Run the pipeline until its sources end, or until it is interrupted. tell: one line for the user.

    Raises UpError, GraphError, StageError, ModelError or GatewayError with one clear message; whatever was started
    before has been stopped then.
    """
    state = options.state or StateFolder(Path.cwd())
    if (other := state.read()) is not None:
        raise UpError(
            f"a pipeline of this folder is running already (pid {other.pid}, {other.url}); `pipeline down` it"
        )
    with ExitStack() as stack:
        stack.enter_context(state.hold())
        stack.callback(state.forget)  # the last thing, so that who sees it gone may start another
        _check_output(options.out)
        checkpoint = open_checkpoint(spec, tell)
        spec = checkpoint.fit(spec)
        if options.paced:
            admit(spec, len(spec.cameras))
        checkpoint.check_tensors(spec)
        cameras = check_cameras(spec, options.duration_ns, tell)
        if not (options.address or os.environ.get("RAY_ADDRESS")):
            checkpoint.check_memory(spec)
        status = Status(model=spec.model, trained=checkpoint.trained)
        interrupts = stack.enter_context(Interrupts())
        state.create()
        gateway = GatewayServer(build_gateway(status), spec.console.host, spec.console.port)
        gateway.start()
        stack.callback(gateway.stop)
        state.write(Running(os.getpid(), time.time(), gateway.url))
        return _Run(spec, options, checkpoint, state, status, gateway.url, interrupts, tell).run(cameras)


class _Run:
    """One run, from the cluster to the last ledger."""

    def __init__(
        self,
        spec: PipelineSpec,
        options: UpOptions,
        checkpoint: Checkpoint,
        state: StateFolder,
        status: Status,
        url: str,
        interrupts: Interrupts,
        tell: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._options = options
        self._checkpoint = checkpoint
        self._state = state
        self._status = status
        self._url = url
        self._interrupts = interrupts
        self._tell = tell

    def run(self, cameras: Mapping[str, CameraSpec]) -> Outcome:
        # Ray is imported here: what can be refused without it has been refused by now, and its environment is set.
        address = self._options.address or os.environ.get("RAY_ADDRESS")
        ray_environment.prepare(address)
        from deploy.cluster import connect
        from deploy.coordinator import Coordinator
        from deploy.placement import processes_of, replicas_of

        with ExitStack() as stack:
            cluster = connect(processes_of(self._spec), address, self._state.path / "ray")
            stack.callback(cluster.close)
            coordinator = Coordinator(self._spec, self._checkpoint.path.absolute(), self._state.path)
            stack.callback(coordinator.stop)
            coordinator.start(cluster, lambda name: self._tell(f"  {name} ready"))
            self._status.processes, self._status.addresses = coordinator.processes, coordinator.actors
            coordinator.open_sessions([self._session(name, camera) for name, camera in cameras.items()])
            meter = PipelineMeter(self._spec.model, self._status.trained, replicas_of(coordinator.processes))
            stack.callback(meter.stop)
            self._status.own_port = meter.port
            self._status.sources = {name: camera.source.masked for name, camera in cameras.items()}
            self._status.problem = ""
            self._tell(f"running: {len(cameras)} session(s); status {self._url}/api/v1/ps, metrics {self._url}/metrics")
            stack.callback(self._interrupts.ignore)
            interrupted = self._wait(coordinator, meter)
            ledger = coordinator.ledger()
            self._status.problem = "stopping"
            self._tell("stopping")
        self._write_ledger(ledger)
        return Outcome(interrupted, ledger, self._options.out)

    def _wait(self, coordinator: Coordinator, meter: PipelineMeter) -> bool:
        """Until every session has ended; True when that was asked for."""
        deadline_s = float("inf")
        asked = False
        self._interrupts.graceful = True
        while coordinator.sessions:
            if self._interrupts.count and not asked:
                asked = True
                self._tell("ending: the listener hears what was said; Ctrl-C again ends at once")
                deadline_s = time.monotonic() + DRAIN_S
                for session in coordinator.sessions:
                    coordinator.end_session(session)
            if time.monotonic() > deadline_s:
                for session in coordinator.sessions:
                    coordinator.close_session(session)
            self._status.snapshots = coordinator.poll()
            self._status.ledger = coordinator.ledger()
            meter.sessions(len(coordinator.sessions))
            if coordinator.sessions:
                self._interrupts.event.wait(POLL_S)
                if asked:
                    time.sleep(POLL_S)  # the event stays set
        return asked

    def _session(self, name: str, camera: CameraSpec) -> Session:
        options, spec = self._options, self._spec
        pictures = "camera" in spec.stages
        microphone = camera.microphone == "embedded" and "microphone" in spec.stages
        needs_pictures = self._checkpoint.config.generation.needs_pictures or not microphone
        return Session(
            id=SessionId(name),
            camera=name,
            source=_anchored(camera.source.reveal()),
            fps=camera.fps,
            max_pixels=camera.max_pixels,
            pictures=pictures,
            speech="speaker" in spec.stages,
            microphone=microphone,
            window_ns=spec.window.length_ns,
            lateness_ns=spec.window.lateness_ns,
            lead_ns=spec.tail.lead_ns,
            delay_ns=spec.tail.delay_ns,
            duration_ns=options.duration_ns,
            paced=options.paced,
            listener=options.listener,
            ladder=spec.shedding.steps(keeps_pictures=needs_pictures or not pictures),
            out=None if options.out is None else options.out.absolute(),
        )

    def _write_ledger(self, ledger: Mapping[str, Account]) -> None:
        if self._options.out is not None:
            rows = {edge: account.as_dict() for edge, account in ledger.items()}
            (self._options.out / "ledger.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def check_cameras(spec: PipelineSpec, duration_ns: int | None, tell: Callable[[str], None]) -> Mapping[str, CameraSpec]:
    """Open every source once, before anything is started. A broken file is an error; a live camera that does not
    answer is told, and looked for again while the pipeline runs, unless it is the only one.

    Raises UpError with all that is wrong.
    """
    failures = probe_all(spec.cameras, partial(probe, duration_ns))
    broken = {name: why for name, (why, live) in failures.items() if why and not live}
    absent = {name: why for name, (why, live) in failures.items() if why and live}
    if broken or (absent and len(absent) == len(spec.cameras)):
        raise UpError("\n".join(f"camera {name}: {why}" for name, why in (broken | absent).items()))
    for name, why in absent.items():
        tell(f"camera {name}: {why}; it will be looked for while the others run")
    return spec.cameras


def check_sources(spec: PipelineSpec, *, paced: bool) -> None:
    """Raises UpError when a source is not read here, or not at this pace, whatever the world is like."""
    problems = []
    for name, camera in spec.cameras.items():
        try:
            kind = check_source(camera.source.reveal())
        except MediaError as error:
            if error.kind == "blocked":
                problems.append(f"camera {name}: {error}")
            continue
        if kind in LIVE_KINDS and not paced:
            # In virtual time no window expires: one lost picture would hold up the session for ever.
            problems.append(
                f"camera {name}: --speed max reads files and test patterns; {camera.source.masked} sets its own pace"
            )
    if problems:
        raise UpError("\n".join(problems))


Probed = tuple[str, bool]
"""Why a source can't be read, or ""; whether it is a live one."""


def probe(duration_ns: int | None, camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
    """Open a source once, as for a run of this duration, unless that is over before it answers."""
    try:
        request = MediaRequest(
            source=camera.source.reveal(),
            fps=camera.fps,
            max_pixels=camera.max_pixels,
            want_video=True,
            want_audio=camera.microphone == "embedded",
            piece_ns=NS_PER_S,
            duration_ns=duration_ns,
        )
        with MediaReader(request) as reader:
            while not is_over():
                item = reader.read(PROBE_LOOK_S)
                if isinstance(item, Failed):
                    return item.message, reader.is_live
                if isinstance(item, Ended):
                    return "holds neither picture nor sound", False
                if item is not None:
                    return "", reader.is_live
            return f"gave nothing within {PROBE_S:g} s", reader.is_live
    except MediaError as error:
        return str(error), False


def probe_all(
    cameras: Mapping[str, CameraSpec], ask: Callable[[CameraSpec, Callable[[], bool]], Probed]
) -> dict[str, Probed]:
    """What `ask` says of every camera. All live ones are asked at once, for `PROBE_S` in all.

    An interrupt does not wait for those which have not answered.
    """
    live = [name for name, camera in cameras.items() if _is_live(camera)]
    files = [name for name in cameras if name not in live]
    interrupted = threading.Event()
    deadline_s = time.monotonic() + PROBE_S

    def is_over() -> bool:
        return interrupted.is_set() or time.monotonic() >= deadline_s

    pool = ThreadPoolExecutor(min(len(live), MAX_LIVE_AT_ONCE) + MAX_FILES_AT_ONCE)
    try:
        asked = {name: pool.submit(ask, cameras[name], is_over) for name in live}
        asked |= {name: pool.submit(ask, cameras[name], interrupted.is_set) for name in files}
        return {name: asked[name].result() for name in cameras}
    finally:
        interrupted.set()
        pool.shutdown(cancel_futures=True)


def _is_live(camera: CameraSpec) -> bool:
    try:
        return check_source(camera.source.reveal()) in LIVE_KINDS
    except MediaError:
        return False


def _anchored(source: str) -> str:
    """The source as an actor finds it, which may run in another folder."""
    return str(Path(source).absolute()) if check_source(source) in ("file", "images", "webcam") else source


def parse_cameras(texts: Sequence[str]) -> dict[str, str]:
    """`--camera name=source` options. Raises UpError."""
    cameras: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or not name or not source:
            raise UpError(f"--camera {text}: expected name=source, like door=clip.mp4 or yard=rtsp://10.0.0.7/live")
        if name in cameras:
            raise UpError(f"--camera {name}: given twice")
        cameras[name] = source
    return cameras


def _check_output(out: Path | None) -> None:
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "ledger.json").touch()  # it is written last, but that it can be is seen first
        (out / "ledger.json").unlink()
    except OSError as error:
        raise UpError(f"--out {out}: can't be written to: {error.strerror}") from error
