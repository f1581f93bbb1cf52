"""Processes that are to end, ended by a thread of its own: who gives one up never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from stages.media.wire import GOODBYE_SIGNAL

LOOK_S: Final = 0.02
RARE_LOOK_S: Final = 1.0  # at one that not even SIGKILL ends: it hangs in the kernel, on a device or a dead disk
STUBBORN_S: Final = 5.0


class Process(Protocol):
    """A process which we have started, as `subprocess.Popen` has it."""

    @property
    def stdin(self) -> Any: ...

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class _Ending:
    process: Process
    since_s: float
    goodbye_s: float
    killed: bool = False

    def is_over(self, now_s: float) -> bool:
        """Whether it has ended; after its time for a goodbye it is killed."""
        if self.process.poll() is not None:
            if self.process.stdin is not None:
                self.process.stdin.close()  # not before: that would cut its goodbye short
            return True
        if not self.killed and now_s >= self.since_s + self.goodbye_s:
            self.process.kill()
            self.killed = True
        return False


class Reaper:
    """One thread for any number of processes, which starts with the first; it holds nobody up, not even at exit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._endings: list[_Ending] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def end(self, process: Process, goodbye_s: float) -> None:
        """Ask a process to end, and kill it when it has not after goodbye_s; 0: at once. Waits for nothing."""
        if goodbye_s > 0:
            process.send_signal(GOODBYE_SIGNAL)
        ending = _Ending(process, self._clock(), goodbye_s)
        if ending.is_over(self._clock()):
            return
        with self._changed:
            self._endings.append(ending)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self, timeout_s: float) -> bool:
        """Wait until all have ended; False when some have not within timeout_s."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._endings, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._endings))
                now_s = self._clock()
                self._endings = [ending for ending in self._endings if not ending.is_over(now_s)]
                self._changed.notify_all()
                fresh = any(now_s - ending.since_s < STUBBORN_S for ending in self._endings)
                if self._endings:
                    self._changed.wait(LOOK_S if fresh else RARE_LOOK_S)


REAPER: Final = Reaper()
"""Of this process."""
