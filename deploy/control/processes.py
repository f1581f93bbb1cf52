"""Actors as plain child processes of this one: the control plane of a pipeline on one machine, without Ray.

It carries the same batches of calls for the same coordinator as deploy/control/cluster.py does over Ray. Each actor is
a process (deploy/actor/hosted.py) at the other end of a socket of its own. It dies with us, whatever we die of.

What a stage asks for of a cluster (`gpus`, `cpus`, `resources`) is not reckoned: all of them run here, and see all
devices.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any

from deploy.actor.hosted import LOCAL
from deploy.actor.plan import ActorPlan, Answer, Call
from deploy.actor.suspects import Work, note_path, read_note
from deploy.control.calls import ActorDied, CallError
from deploy.control.placement import PlacementError, Process
from deploy.process.masked_output import environment_without_secrets

BURIED_S = 5.0  # the kernel takes a moment to free the memory of a killed process, and a device's


@dataclass(slots=True, eq=False)
class Question:
    """Something that an actor was asked. error: why it has failed. is_lost: there will be no answer."""

    actor: Child
    value: Any = None
    error: str = ""
    is_done: bool = False
    is_lost: bool = False


@dataclass(slots=True, eq=False)
class Child:
    """An actor's process, as its parent sees it. failure: what it said when it could not start."""

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection
    outbox: SimpleQueue[object] = field(default_factory=SimpleQueue)
    under_way: dict[int, Question] = field(default_factory=dict)
    num_questions: int = 0
    is_gone: bool = False
    failure: str = ""


class Processes:
    """See deploy/control/fleet.py: Cluster."""

    node_id = LOCAL.id

    def __init__(self) -> None:
        self._changed = Condition()  # for all that threads of ours write of the children
        self._children: list[Child] = []

    def place(self, processes: Iterable[Process], plans: Iterable[ActorPlan]) -> Mapping[str, Child]:
        """Start the actors; returns their handles by name, before they are up. Raises PlacementError."""
        return {process.name: self.replace(process, plan) for process, plan in zip(processes, plans, strict=True)}

    def replace(self, process: Process, plan: ActorPlan) -> Child:
        """Start one actor. Raises PlacementError when the machine gives no process."""
        ours, theirs = socket.socketpair()
        try:
            started = _started(plan, theirs)
        except OSError as error:
            ours.close()
            raise PlacementError(f"{process.name} can't be started: {error}") from error
        finally:
            theirs.close()
        child = Child(process.name, started, Connection(ours.detach()))
        self._children.append(child)
        child.outbox.put(plan)
        Thread(target=_write, args=(child,), name=f"to {child.name}", daemon=True).start()
        Thread(target=self._read, args=(child,), name=f"from {child.name}", daemon=True).start()
        return child

    # ---- calls -------------------------------------------------------------------------------------------------------

    def perform(self, handle: Child, calls: Sequence[Call]) -> Question:
        """See `deploy.control.calls.Transport`."""
        return self._ask(handle, "perform", list(calls))

    def finished(self, references: Sequence[Question], timeout_s: float) -> Sequence[Question]:
        """All that are there, once one is; none when the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: any(each.is_done for each in references), timeout_s)
            return [each for each in references if each.is_done]

    def answers(self, name: str, reference: Question) -> Sequence[Answer]:
        """Raises ActorDied where the actor is gone, CallError where its loop has failed."""
        if reference.is_lost:
            raise ActorDied(f"{name} has died: {_ending(reference.actor)}")
        if reference.error:
            raise CallError(f"{name}: {reference.error}")
        answers: Sequence[Answer] = reference.value
        return answers

    def clock_ns(self, handle: Child, timeout_s: float) -> int:
        """The monotonic clock of the actor's machine, which is ours."""
        return time.monotonic_ns()

    def work_of(self, handle: Child, directory: Path, peer: str) -> Work:
        """What an actor works on, or did when it died."""
        return read_note(note_path(directory, peer))

    # ---- ends --------------------------------------------------------------------------------------------------------

    def stop(self, handles: Iterable[Child], timeout_s: float) -> None:
        """Let actors close what they hold, all at once; who takes longer is left to `kill`."""
        questions = [self._ask(handle, "stop") for handle in handles]
        with self._changed:
            self._changed.wait_for(lambda: all(each.is_done for each in questions), timeout_s)

    def kill(self, handle: Child) -> None:
        """Whether it lives or not."""
        handle.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a device that hangs keeps it; `close` looks again
            handle.process.wait(BURIED_S)
            self._children = [child for child in self._children if child is not handle]

    def close(self) -> None:
        """Kill whoever is left."""
        for child in self._children:
            child.process.kill()
        for child in list(self._children):
            self.kill(child)

    def _ask(self, handle: Child, method: str, *arguments: object) -> Question:
        question = Question(handle)
        with self._changed:
            handle.num_questions += 1
            question.is_done = question.is_lost = handle.is_gone
            if not handle.is_gone:
                handle.under_way[handle.num_questions] = question
                handle.outbox.put((handle.num_questions, method, arguments))
        return question

    def _read(self, child: Child) -> None:
        """Take the actor's answers, until it is gone."""
        while True:
            try:
                number, value, error = child.connection.recv()
            except (EOFError, OSError):
                break
            with self._changed:
                if number == 0:
                    child.failure = error
                elif (question := child.under_way.pop(number, None)) is not None:
                    question.value, question.error, question.is_done = value, error, True
                self._changed.notify_all()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(BURIED_S)  # so that it is known how it has ended
        with self._changed:
            child.is_gone = True
            for question in child.under_way.values():
                question.is_done = question.is_lost = True
            child.under_way.clear()
            self._changed.notify_all()
        child.outbox.put(None)


def _write(child: Child) -> None:
    """Send what is asked, however long the actor takes to read it; nobody else waits."""
    while (message := child.outbox.get()) is not None:
        try:
            child.connection.send(message)
        except OSError:
            return


def _started(plan: ActorPlan, theirs: socket.socket) -> subprocess.Popen[bytes]:
    """The process, which holds the other end. What it says beside its log, as of a crash, is in its log, too."""
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(entry for entry in sys.path if Path(entry).is_absolute())
    with plan.log.open("ab") as log, environment_without_secrets():
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.actor.hosted", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
        )


def _ending(child: Child) -> str:
    """How its process has ended."""
    if child.failure:
        return child.failure
    code = child.process.poll()
    if code is None:
        return "its connection is closed"
    return f"killed by signal {-code}" if code < 0 else f"it ended with {code}"
