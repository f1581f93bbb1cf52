"""Stages that a test writes, wired by a real bus in one process; and a clock that a test moves."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
from prometheus_client import CollectorRegistry

from deploy.actor.loop import ActorLoop
from deploy.actor.measure import StageMeter
from deploy.actor.runner import StageRunner
from deploy.actor.session_plan import SessionPlan
from graph.bus import Bus
from graph.chunk import NS_PER_S, Chunk, ChunkType, SessionId, end_of_stream, watermark
from graph.clock import Clock, SystemClock
from graph.credit import Grant, Limit
from graph.edge import Arrival, EdgeRule
from graph.gather import Gathering
from graph.kinds import Late
from graph.ledger import Account, merge
from graph.metrics import Metrics
from graph.tail import Ack, ack_chunk
from graph.window import Input, Unit
from stages.session import Session
from stages.stage import Stage, StageError
from tests.support.streams import KINDS, MIC, TEXT, input_of, outputs, stream_of
from tests.support.units import session

SEEN = "camera.frames->vision_encoder.frames"
SOUND = "microphone.sound->llm.sound"
SPOKEN = "llm.text->speaker.text"
PLAYED = "speaker.playback->llm.playback"
LEVELS = "speaker.playback->camera.playback"
NOTED = "speaker.events->events.events"
CHAIN = (SOUND, SPOKEN, PLAYED, NOTED)
PATIENCE_S = 90.0  # how many turns it takes depends on how busy the machine is


class Sink:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def send(self, chunk: Chunk) -> bool:
        self.chunks.append(chunk)
        return True

    def grants(self) -> Sequence[tuple[SessionId, int, Grant]]:
        return ()


class ManualClock:
    """It stands until a test moves it. Event time is the same for sessions of origin 0."""

    def __init__(self) -> None:
        self.now_ns = 0

    def advance(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS_PER_S)

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        raise AssertionError("nothing is decided by the time of day")

    def cpu_ns(self) -> int:
        return 0


class Ticker(Stage):
    """A source: one window of sound per call, and then its end."""

    def __init__(self, num_windows: int) -> None:
        self._num_windows = num_windows
        self._next: dict[SessionId, int] = {}

    def open_session(self, session: Session) -> None:
        self._next[session.id] = 0

    def close_session(self, session: SessionId) -> None:
        self._next.pop(session, None)

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        index = self._next[session]
        self._next[session] = min(index + 1, self._num_windows + 1)
        if index < self._num_windows:
            return [replace(heard(session, index), stream="sound"), watermark(session, "sound", (index + 1) * NS_PER_S)]
        return [end_of_stream(session, "sound", index * NS_PER_S)] if index == self._num_windows else []

    def finished(self, session: SessionId) -> bool:
        return self._next[session] > self._num_windows


class Shutter(Stage):
    """A source: a picture per call."""

    def __init__(self) -> None:
        self._num_taken = 0

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        self._num_taken += 1
        image = np.zeros((1, 1, 3), np.uint8)
        return [Chunk(session, "frames", self._num_taken * NS_PER_S, arrays={"image": image})]

    def finished(self, session: SessionId) -> bool:
        return False


class Echo(Stage):
    """Says what it hears, chunk by chunk; remembers its batches and interruptions. Has room for `room` sessions."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.open: list[SessionId] = []
        self.batches: list[list[tuple[str, int]]] = []
        self.units: list[Unit] = []
        self.interruptions: list[tuple[str, Ack]] = []

    def open_session(self, session: Session) -> None:
        if len(self.open) >= self.room:
            raise StageError("echo: no room")
        self.open.append(session.id)

    def close_session(self, session: SessionId) -> None:
        if session in self.open:
            self.open.remove(session)

    def process(self, units: list[Unit]) -> list[Chunk]:
        self.batches.append([(unit.session, unit.index) for unit in units])
        self.units += units
        return [_said(unit, chunk) for unit in units for chunk in unit.chunks.get(MIC, ())]

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        self.interruptions.append((session, ack))
        return []


class PacedEcho(Echo):
    """Goes on with the listener only."""

    paced_by_listener = True


class HeldEcho(PacedEcho):
    """All that it says goes on with what was said."""

    def may_hold(self, unit: Unit) -> bool:
        return True


class Ear(Stage):
    """The sink: hears everything, at once."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._sessions: dict[SessionId, Session] = {}
        self._begun: set[SessionId] = set()

    def open_session(self, session: Session) -> None:
        self._sessions[session.id] = session

    def process(self, units: list[Unit]) -> list[Chunk]:
        self.units += units
        return [ack_chunk(u.session, Ack(u.end_ns + NS_PER_S, through_ns=u.end_ns)) for u in units]

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        if session in self._begun:
            return []
        self._begun.add(session)
        return [ack_chunk(session, Ack(NS_PER_S))]

    def drain(self, session: SessionId) -> list[Chunk]:
        return [Chunk(session, "events", 0, attrs={"type": "goodbye"})]


class Notes(Stage):
    """Takes each chunk as it comes."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def process(self, units: list[Unit]) -> list[Chunk]:
        self.chunks += [chunk for unit in units for chunks in unit.chunks.values() for chunk in chunks]
        return []

    def events(self, kind: str) -> list[dict[str, object]]:
        return [dict(chunk.attrs) for chunk in self.chunks if chunk.attrs["type"] == kind]


class House:
    """Runners by name, on one bus. edges: by their ids, `a.port->b.port`; a stage takes part in what it stands in."""

    def __init__(
        self,
        stages: Mapping[str, Stage],
        edges: Sequence[str] = CHAIN,
        *,
        limit: Limit = Limit(8),  # noqa: B008 - a frozen value
        when_full: str = "wait",
        max_units: int = 8,
        wait_ns: int = 0,
        hold_ns: int = 0,
        late: Late = "drop",
        ends_windows: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.directory = Path(tempfile.mkdtemp(prefix="bus-", dir="/tmp"))
        self.bus = Bus("house", self.directory)
        self.edges = [edge for edge in edges if _ends(edge)[0] in stages or _ends(edge)[1] in stages]
        self.receivers, self.senders = {}, {}
        for edge in self.edges:
            rule = EdgeRule(edge, limit, when_full)  # type: ignore[arg-type]
            self.receivers[edge], endpoint = self.bus.bind(rule)
            if _ends(edge)[1] not in stages:  # a test takes what comes there, of whichever session
                self.receivers[edge].open_session(SessionId("door"))
            self.senders[edge] = self.bus.connect(rule, endpoint)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.late, self.ends_windows = late, ends_windows
        self.runners = {
            name: self._runner(name, stage, tuple(stages), Gathering(max_units, wait_ns, hold_ns))
            for name, stage in stages.items()
        }
        self.loop = ActorLoop(list(self.runners.values()))

    def _runner(self, name: str, stage: Stage, stages: tuple[str, ...], gathering: Gathering) -> StageRunner:
        return StageRunner(
            name,
            stage,
            {edge: receiver for edge, receiver in self.receivers.items() if _ends(edge)[1] == name},
            {edge: [sender] for edge, sender in self.senders.items() if _ends(edge)[0] == name},
            StageMeter(self.metrics, name, stage, stages, SystemClock()),
            gathering,
            self.clock,
        )

    def __enter__(self) -> "House":
        return self

    def __exit__(self, *_: object) -> None:
        self.bus.close()
        self.directory.rmdir()

    def open(self, name: str, origin_ns: int = 0, **fields: object) -> Session:
        """A session at every stage here, those that send last."""
        opened = session(name, **fields)
        for stage in reversed(list(self.runners)):
            self.runners[stage].open_session(self.plan(stage, opened))
        for runner in self.runners.values():
            runner.begin_session(opened.id, origin_ns)
        return opened

    def plan(self, stage: str, opened: Session, **fields: object) -> SessionPlan:
        """How a stage here takes part in a session."""
        inputs = [edge for edge in self.edges if _ends(edge)[1] == stage and _port(edge) != "playback"]
        peers = {edge: 0 for edge in self.edges if _ends(edge)[0] == stage}
        ends = not [edge for edge in peers if _port(edge) not in ("playback", "events")]
        plan = SessionPlan(
            opened,
            {s: i for s, i in (self._input(edge, opened.camera) for edge in inputs) if i.kind.is_windowed},
            ports={edge: _port(edge) for edge in inputs},
            num_inputs=len(inputs),
            outputs=outputs(opened.camera, peers),
            peers=peers,
            to_sources=frozenset(edge for edge in peers if _ends(edge)[1] in ("camera", "microphone")),
            ends_windows=ends if self.ends_windows is None else stage == self.ends_windows,
        )
        return replace(plan, **fields)

    def _input(self, edge: str, camera: str) -> tuple[str, Input]:
        stream = stream_of(KINDS[_port(edge)], camera)
        return stream, input_of(stream, self.late, edge, _ends(edge)[0])

    def take(self, chunk: Chunk, edge: str = SOUND) -> None:
        """A chunk comes in on an edge, as from the bus."""
        if not chunk.is_control:
            self.senders[edge]._ledger.accept()
        self.runners[_ends(edge)[1]].take(Arrival(chunk, edge, b"house"))

    def window(self, name: str, index: int, epoch: int = 0) -> None:
        """A whole window of sound comes in."""
        self.take(heard(SessionId(name), index, epoch))
        self.take(watermark(SessionId(name), MIC, (index + 1) * NS_PER_S))

    def arrivals(self, num_chunks: int) -> list[Chunk]:
        """So many chunks that came where no stage of this house takes them, however long they were under way."""
        came: list[Chunk] = []
        deadline_s = monotonic() + PATIENCE_S
        while len(came) < num_chunks:
            assert monotonic() < deadline_s, f"came: {came}"
            came += [arrival.chunk for arrival in self.bus.wait(0.05)]
        return came

    def turn(self) -> None:
        """As the actor's loop does."""
        due_ns = self.loop.due_in_ns()
        arrivals = self.bus.wait(0.05 if due_ns is None else min(due_ns / NS_PER_S, 0.05), self.loop.files())
        self.loop.turn(arrivals, self.bus.woken)

    def settle(self) -> None:
        """Turn until nothing is under way on any edge."""
        self.turn()
        deadline_s = monotonic() + PATIENCE_S
        while any(self.account(edge).in_flight for edge in self.edges):
            assert monotonic() < deadline_s, f"under way: {[(edge, self.account(edge)) for edge in self.edges]}"
            self.turn()

    def run(self) -> None:
        """Turn until every session has ended everywhere."""
        deadline_s = monotonic() + PATIENCE_S
        while any(runner.snapshot().sessions for runner in self.runners.values()):
            snapshots = [runner.snapshot() for runner in self.runners.values()]
            assert monotonic() < deadline_s, f"still open: {snapshots}"
            self.turn()

    def account(self, edge: str) -> Account:
        return merge([self.receivers[edge].account(), self.senders[edge].account()])


def heard(session: SessionId, index: int, epoch: int = 0) -> Chunk:
    """A window of sound, which is numbered by its window."""
    samples = np.full(4, index, np.float32)
    return Chunk(session, MIC, index * NS_PER_S, NS_PER_S, index, epoch, arrays={"samples": samples})


def _said(unit: Unit, chunk: Chunk) -> Chunk:
    arrays = {"token_ids": chunk.arrays["samples"].astype(np.int64)}
    return Chunk(unit.session, TEXT, unit.start_ns, unit.end_ns - unit.start_ns, arrays=arrays)


def barge_in(session: SessionId, at_ns: int, epoch: int) -> Chunk:
    return Chunk(session, "playback", at_ns, epoch=epoch, type=ChunkType.BARGE_IN)


def _ends(edge: str) -> tuple[str, str]:
    source, _, target = edge.partition("->")
    return source.partition(".")[0], target.partition(".")[0]


def _port(edge: str) -> str:
    return edge.rpartition(".")[2]
