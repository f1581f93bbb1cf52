"""An actor in a plain process, a child of whoever places it (deploy/control/processes.py).

Rule: what goes between the two goes through one socket that nobody else has: the plan first, then numbered questions
there and numbered answers back. Where that socket closes, the parent is gone, and so is the actor at once.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

from deploy.actor.actor import Actor, Node
from deploy.actor.plan import ActorPlan
from graph.wording import one_line

LOCAL = Node("here", "127.0.0.1")


class Host:
    """Answers the parent: each question in a thread of its own, for a batch may take long."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = Lock()  # for writing

    def run(self) -> None:
        """Until the parent is gone, or kills us."""
        try:
            plan: ActorPlan = self._connection.recv()
            actor = Actor(plan, LOCAL)
        except EOFError:
            return
        except BaseException as error:  # whatever keeps it from starting is for the parent to tell
            self._send(0, None, f"{type(error).__name__}: {one_line(str(error))}")
            return
        while True:
            try:
                number, method, arguments = self._connection.recv()
            except (EOFError, OSError):
                return
            Thread(target=self._answer, args=(actor, number, method, arguments), daemon=True).start()

    def _answer(self, actor: Actor, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._send(number, getattr(actor, method)(*arguments), "")
        except BaseException as error:
            self._send(number, None, str(error))

    def _send(self, number: int, value: object, error: str) -> None:
        with self._lock:
            try:
                self._connection.send((number, value, error))
            except OSError:  # the parent is gone
                os._exit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us in order
    Host(Connection(int(sys.argv[1]))).run()
    os._exit(0)  # the loop's thread may be in a batch that nobody waits for any more


if __name__ == "__main__":
    main()
