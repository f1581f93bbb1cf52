"""Calls to actors, side by side: each actor has a line of its own, and nobody waits for another one's answer.

Rule: an actor has at most one batch of calls under way. What is posted meanwhile goes out as the next batch, in order:
so order costs no waiting, and the calls of thirty sessions take as long as those of one. A line whose batch is not
answered in time has failed, as if its actor had died; who waited for its answers hears that, and nobody else does.

What must be done step by step is a generator that yields the replies it waits for (`Steps`); `Procedures` takes each as
far as it goes and never waits itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from deploy.actor.plan import REFUSALS, Answer, Call
from graph.errors import GraphError
from graph.wording import one_line

T = TypeVar("T")
NowS = Callable[[], float]

# Between two looks more time passes only where this process was stopped itself, most likely with all others.
LONGEST_LOOK_S = 1.0


class CoordinatorError(GraphError):
    """An actor did not start, or has died; says which and why."""


class CallError(CoordinatorError):
    """An actor has failed at a call, and lives."""


class ActorDied(CoordinatorError):
    """An actor is not there any more, or is as good as dead."""


class Overdue(CoordinatorError):
    """Actors have not answered in time; says which."""


class Reply(Generic[T]):
    """The answer to a call, once it is there. actor: whose it is."""

    __slots__ = ("_error", "_value", "actor", "is_done")

    def __init__(self, actor: str) -> None:
        self.actor = actor
        self.is_done = False
        self._value: T | None = None
        self._error: Exception | None = None

    def answer(self, value: T) -> None:
        self.is_done, self._value = True, value

    def fail(self, error: Exception) -> None:
        self.is_done, self._error = True, error

    @property
    def error(self) -> Exception | None:
        """What the call has raised, or why there will be no answer."""
        return self._error

    def result(self) -> T:
        """Raises what the call has raised, or ActorDied."""
        assert self.is_done, f"{self.actor} has not answered yet"
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def answered(actor: str, value: T) -> Reply[T]:
    """A reply that needs no call."""
    reply: Reply[T] = Reply(actor)
    reply.answer(value)
    return reply


def failed(error: Exception) -> Reply[Any]:
    """A reply where there is nobody to call."""
    reply: Reply[Any] = Reply("")
    reply.fail(error)
    return reply


class Transport(Protocol):
    """What carries batches to actors (deploy/control/cluster.py: Cluster)."""

    def perform(self, handle: Any, calls: Sequence[Call]) -> Any:
        """Begin a batch; returns a reference to its answers."""

    def finished(self, references: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those of them that are there; waits for the first at most so long."""

    def answers(self, name: str, reference: Any) -> Sequence[Answer]:
        """Raises ActorDied where the actor is gone, CallError where its loop has failed."""


@dataclass(frozen=True, slots=True)
class _Posted:
    call: Call
    reply: Reply[Any]


class Line:
    """One actor's calls, in order. limit_s: after how long without an answer it has failed. log: what it writes."""

    def __init__(self, name: str, handle: Any, transport: Transport, limit_s: float, log: Path) -> None:
        self.name, self.handle, self.limit_s, self._log = name, handle, limit_s, log
        self.error: CoordinatorError | None = None
        self.reference: Any = None  # of the batch under way
        self._transport = transport
        self._age_s = 0.0  # of that batch, of the time in which somebody looked
        self._under_way: list[_Posted] = []
        self._waiting: list[_Posted] = []

    def post(self, method: str, *arguments: object) -> Reply[Any]:
        """Call a method, after all that was posted before."""
        if self.error is not None:
            return failed(self.error)
        posted = _Posted(Call(method, arguments), Reply(self.name))
        self._waiting.append(posted)
        return posted.reply

    def send(self) -> None:
        """Let the next batch go, if none is under way."""
        if self.reference is None and self._waiting and self.error is None:
            self._under_way, self._waiting = self._waiting, []
            self._age_s = 0.0
            self.reference = self._transport.perform(self.handle, [posted.call for posted in self._under_way])

    def take(self) -> None:
        """The batch under way is through."""
        reference, self.reference = self.reference, None
        try:
            answers = self._transport.answers(self.name, reference)
        except CoordinatorError as error:
            self.fail(type(error)(self._with_log(str(error))))
            return
        batch, self._under_way = self._under_way, []
        for posted, answer in zip(batch, answers, strict=True):
            if answer.error is None:
                posted.reply.answer(answer.value)
            elif isinstance(answer.error, REFUSALS):
                posted.reply.fail(answer.error)
            else:  # a fault of ours; its log has the traceback
                posted.reply.fail(CallError(f"{self.name}: {one_line(str(answer.error))}; see {self._log}"))

    def _with_log(self, why: str) -> str:
        """With where to read more, but where its process has left no word there."""
        try:
            is_silent = self._log.stat().st_size == 0
        except OSError:  # it may be on another machine
            is_silent = False
        return f"{why}; its log is empty" if is_silent else f"{why}; see {self._log}"

    @property
    def silent_s(self) -> float:
        """For how long the batch under way has not been answered; 0 where there is none."""
        return self._age_s if self.reference is not None else 0.0

    def grow_older(self, seconds: float) -> None:
        """So long somebody has looked for an answer in vain."""
        if self.reference is not None:
            self._age_s += seconds
            if self._age_s > self.limit_s:
                self.fail(ActorDied(f"{self.name} has not answered for {self.limit_s:g} s"))

    def fail(self, error: CoordinatorError) -> None:
        """Nothing more will come from there."""
        if self.error is None:
            self.error = error
        posted, self._under_way, self._waiting, self.reference = [*self._under_way, *self._waiting], [], [], None
        for each in posted:
            each.reply.fail(self.error)


class Lines:
    """The lines of all actors."""

    def __init__(self, transport: Transport, logs: Path, now_s: NowS = time.monotonic) -> None:
        self._transport = transport
        self._logs = logs
        self._now_s = now_s
        self._looked_s = now_s()
        self._lines: list[Line] = []

    def open(self, name: str, handle: Any, limit_s: float) -> Line:
        line = Line(name, handle, self._transport, limit_s, self._logs / f"{name}.log")
        self._lines.append(line)
        return line

    def look(self, timeout_s: float) -> None:
        """Send what waits, and take the answers that are there; waits for the first at most so long."""
        self._lines = [line for line in self._lines if line.error is None]
        for line in self._lines:
            line.send()
        under_way = [line for line in self._lines if line.reference is not None]
        if under_way:
            there = set(self._transport.finished([line.reference for line in under_way], timeout_s))
            for line in under_way:
                if line.reference in there:
                    line.take()
        now_s = self._now_s()
        looked_s = min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        for line in under_way:
            line.grow_older(looked_s)


Steps = Generator[Sequence[Reply[Any]], None, T]
"""Something that is done step by step: yields the replies which it needs before it goes on."""


@dataclass(slots=True, eq=False)
class _Running:
    steps: Steps[None]
    awaited: Sequence[Reply[Any]]
    limit_s: float
    until_s: float


class Procedures:
    """What is under way, each as far as the answers go."""

    def __init__(self, now_s: NowS = time.monotonic) -> None:
        self._now_s = now_s
        self._running: list[_Running] = []

    def begin(self, steps: Steps[None], limit_s: float = float("inf")) -> None:
        """Take the first step. limit_s: within which it is to be through; else it is thrown Overdue, and ends."""
        running = _Running(steps, (), limit_s, self._now_s() + limit_s)
        self._running.append(running)
        self._advance(running)

    @property
    def are_running(self) -> bool:
        return bool(self._running)

    @property
    def awaited(self) -> set[str]:
        """The actors whose answers are waited for."""
        return {reply.actor for running in self._running for reply in running.awaited if not reply.is_done}

    def step(self) -> None:
        """Go on with all that can."""
        for running in list(self._running):
            self._advance(running)

    def _advance(self, running: _Running) -> None:
        try:
            while all(reply.is_done for reply in running.awaited):
                running.awaited = next(running.steps)
            if self._now_s() >= running.until_s:
                silent = sorted({reply.actor for reply in running.awaited if not reply.is_done})
                running.until_s = float("inf")
                overdue = Overdue(f"{', '.join(silent)} has not answered for {running.limit_s:g} s")
                running.awaited = running.steps.throw(overdue)
        except StopIteration:
            self._running.remove(running)
        except BaseException:
            self._running.remove(running)
            raise
