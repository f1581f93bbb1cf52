"""Actors that a test writes, behind the coordinator's real calls; and the clock by which it waits for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.actor.accounts import EdgeEnds
from deploy.actor.plan import ActorPlan, Address, Answer, Report
from deploy.actor.plan import Call as Posted
from deploy.actor.session_plan import Listener, SessionPlan, SessionSnapshot, StageSnapshot
from deploy.actor.suspects import Work, note_path, read_note
from deploy.control.calls import ActorDied
from deploy.control.coordinator import Coordinator
from graph.chunk import NS_PER_S, SessionId
from graph.spec import default_spec_path
from graph.tail import Ack
from stages.session import Session
from stages.stage import StageError
from tests.support.sessions import make_session
from tests.support.specs import load_spec

AHEAD_NS = 5 * NS_PER_S
HEARD = Listener(Ack(3), 1)
Call = tuple[str, str, Any]  # method, stage, what for


class Clock:
    """In seconds. It moves when a test moves it, or while somebody waits for an answer in vain."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def now_ns(self) -> int:
        return round(self.now_s * NS_PER_S)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class FakeActor:
    """An actor whose calls are written down; its machine's clock may be ahead.

    is_dead; is_up: False while it loads; is_stopped: it answers nothing, and does what it was asked when it goes on.
    """

    def __init__(self, node: str, calls: list[Call], stages: Sequence[str], clock: Clock) -> None:
        self.node, self.calls, self.stages, self.clock = node, calls, stages, clock
        self.sessions: set[SessionId] = set()
        self.ends: dict[str, EdgeEnds] = {}
        self.at_end = SessionSnapshot(0, 0)  # of each of its sessions
        self.is_dead = self.is_stopped = False
        self.is_up = True
        self.full_at = self.faulty_at = ""
        self.given_up: dict[SessionId, str] = {}
        self.given_up_aside: dict[SessionId, str] = {}
        self.given_up_before: dict[SessionId, str] = {}
        self.runs_with = "cpu" if "llm" in stages else ""
        self.ahead_ns = AHEAD_NS if node != "here" else 0
        self.num_batches = 0
        self.works: Any = None  # what it works on when it dies

    def perform(self, calls: Sequence[Posted]) -> list[Answer]:
        self.num_batches += 1
        return [self._answer(call.method, call.arguments) for call in calls]

    def _answer(self, method: str, arguments: tuple[Any, ...]) -> Answer:
        match method:
            case "address":
                return Answer(Address(self.node, "127.0.0.1", 1, 9))
            case "load":
                return Answer(self.runs_with)
            case "bind":
                return Answer(dict.fromkeys(arguments[0], "ipc://edge"))
            case "report" if self.faulty_at == "report":
                return Answer(error=KeyError("a fault"))
            case "report":
                seen = dict.fromkeys(self.sessions, self.at_end)
                return Answer(Report(dict.fromkeys(self.stages, self._snapshot(seen)), self.ends))
            case "listener":
                return Answer(HEARD)
            case "bury" | "reconnect":
                self.calls.append((method, self.stages[0], arguments))
            case "reroute" | "tell" | "end_input" | "close_session" | "end_session":
                self.calls.append((method, arguments[0], arguments[1:]))
                self.sessions -= {arguments[1]} if method == "close_session" else set()
                return Answer()
            case "resume_session":
                plans, origin_ns = arguments
                self.calls += [(method, stage, (plan, origin_ns)) for stage, plan in plans.items()]
                answers = [self._opened(stage, [plan]) for stage, plan in plans.items()]
                return next((answer for answer in answers if answer.error is not None), Answer())
            case "open_sessions" | "begin_sessions":
                self.calls.append((method, arguments[0], arguments[1:]))
                return self._opened(arguments[0], arguments[1] if method == "open_sessions" else [])
        return Answer()

    def _snapshot(self, seen: Mapping[SessionId, SessionSnapshot]) -> StageSnapshot:
        return StageSnapshot(
            0,
            0,
            seen,
            given_up=self.given_up,
            given_up_aside=self.given_up_aside,
            given_up_before=self.given_up_before,
        )

    def _opened(self, stage: str, plans: Sequence[SessionPlan]) -> Answer:
        if stage == self.full_at:
            return Answer(error=StageError("no room"))
        if stage == self.faulty_at:
            return Answer(error=KeyError("a fault"))
        self.sessions |= {plan.session.id for plan in plans}
        return Answer()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What is under way to an actor."""

    actor: FakeActor
    calls: Sequence[Posted]

    @property
    def is_through(self) -> bool:
        loads = not self.actor.is_up and any(call.method == "load" for call in self.calls)
        return self.actor.is_dead or not (self.actor.is_stopped or loads)


class FakeCluster:
    """Only the LLM is on another node. starts_at_once: whether those that take a dead one's place do."""

    node_id = "here"

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.calls: list[Call] = []
        self.peers: list[str] = []  # of those which took a dead one's place
        self.killed: list[FakeActor] = []
        self.starts_at_once = True
        self.actors: dict[str, FakeActor] = {}

    def place(self, processes: Iterable[Any], plans: Iterable[ActorPlan]) -> Mapping[str, FakeActor]:
        self.actors = {process.name: self._made(process) for process in processes}
        return self.actors

    def replace(self, process: Any, plan: ActorPlan) -> FakeActor:
        self.peers.append(plan.peer)
        self.actors[process.name] = self._made(process)
        self.actors[process.name].is_up = self.starts_at_once
        return self.actors[process.name]

    def _made(self, process: Any) -> FakeActor:
        node = "there" if "llm" in process.stages else "here"
        return FakeActor(node, self.calls, list(process.stages), self.clock)

    def perform(self, handle: FakeActor, calls: Sequence[Posted]) -> Batch:
        return Batch(handle, calls)

    def finished(self, references: Sequence[Batch], timeout_s: float) -> Sequence[Batch]:
        through = [batch for batch in references if batch.is_through]
        if not through:
            self.clock.advance(timeout_s)
        return through

    def answers(self, name: str, reference: Batch) -> Sequence[Answer]:
        if reference.actor.is_dead:
            raise ActorDied(f"{name} has died: killed")
        return reference.actor.perform(reference.calls)

    def clock_ns(self, handle: FakeActor, timeout_s: float) -> int:
        if handle.is_stopped or handle.is_dead:
            self.clock.advance(timeout_s)
            raise TimeoutError
        return self.clock.now_ns() + handle.ahead_ns

    def work_of(self, handle: FakeActor, directory: Path, peer: str) -> Work:
        return read_note(note_path(directory, peer))

    def stop(self, handles: Iterable[FakeActor], timeout_s: float) -> None:
        if any(actor.is_stopped for actor in handles):
            self.clock.advance(timeout_s)

    def kill(self, handle: FakeActor) -> None:
        self.killed.append(handle)
        handle.is_dead = True


def started(cluster: FakeCluster, folder: Path, *overrides: str, lines: list[str] | None = None) -> Coordinator:
    """A coordinator whose actors run. lines: gets the lines for the user."""
    spec = load_spec(default_spec_path(), overrides)
    lines = lines if lines is not None else []
    (folder / "bus").mkdir(exist_ok=True)
    subject = Coordinator(spec, folder, folder, cluster, lines.append, cluster.clock)
    subject.start()
    return subject


def sessions(*names: str, **fields: Any) -> list[Session]:
    return [make_session(name, **fields) for name in names]


def of(calls: Sequence[Call], method: str) -> list[Call]:
    return [call for call in calls if call[0] == method]


def replicas_at(coordinator: Coordinator, stage: str) -> dict[str, int]:
    """Where each session lives."""
    return {name: placement.replicas[stage] for name, placement in coordinator._table.placements.items()}
