"""A thread that waits for a disk, so that no loop does.

Rule: what is written while sessions run is written here. The loop that serves cameras, speech and acks hands it over
and goes on; what a disk is too slow for is dropped and counted by who had it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import IO, Any, Final, TypeVar

T = TypeVar("T")
MAX_WAITING_BYTES: Final = 32 * 1024 * 1024  # 10 minutes of speech, or 60 000 events
OPEN_S: Final = 2.0  # a disk that can't make a file within this is taken to be gone
CLOSE_S: Final = 2.0  # how long the last one waits for what is left

Job = Callable[[], None]


def is_removed(file: IO[Any]) -> bool:
    """Whether an open file has lost its last name: what is still written to it, nobody will ever read."""
    return os.fstat(file.fileno()).st_nlink == 0


class Disk:
    """Does jobs one after the other. A job handles its own OSErrors."""

    def __init__(self, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._jobs: deque[tuple[Job, int]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._is_working = False
        self._thread: threading.Thread | None = None

    def put(self, job: Job, num_bytes: int = 0, *, wait: bool = False) -> bool:
        """Have a job done later; False where too much waits already. wait: in virtual time, until there is room."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._has_room(num_bytes))
            elif not self._has_room(num_bytes):
                return False
            self._jobs.append((job, num_bytes))
            self._num_bytes += num_bytes
            self._start()
            self._changed.notify_all()
        return True

    def call(self, work: Callable[[], T], timeout_s: float = OPEN_S) -> T:
        """Do something after what waits, and return what it returns.

        Raises what it raises, and OSError where it has not been done in time.
        """
        answers: list[T | Exception] = []

        def job() -> None:
            try:
                answers.append(work())
            except Exception as error:
                answers.append(error)

        self.put(job)
        if not self.drain(timeout_s) or not answers:
            raise OSError(f"the disk does not answer within {timeout_s:g} s")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def drain(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything is done; False where it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._jobs or self._is_working), timeout_s)

    def _has_room(self, num_bytes: int) -> bool:
        return self._num_bytes + num_bytes <= self._max_waiting_bytes

    def _start(self) -> None:
        if self._thread is None:  # a daemon: a disk that hangs holds up no process that ends
            self._thread = threading.Thread(target=self._work, name="disk", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs)
                job, num_bytes = self._jobs.popleft()
                self._is_working = True
            job()
            with self._changed:
                self._num_bytes -= num_bytes
