"""The signals that end a run: Ctrl-C, SIGTERM (docker, systemd, `pipeline down`) and SIGHUP (the terminal is gone).

Rule: they all mean the same, an end in order, and they are for `up` alone: its children take none of them.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.02


class Interrupted(KeyboardInterrupt):
    """One of the signals came. number: the first one's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """While sessions run the first signal asks for a graceful end (`count`); while the pipeline starts, and for the
    second, Interrupted is raised. From then on they are ignored: nothing may cut off the clean-up.
    """

    def __init__(self) -> None:
        self.count = 0
        self.graceful = False
        self._first = 0

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
        if self._before[signal.SIGHUP] is signal.SIG_IGN:  # under nohup: the terminal may go
            del self._before[signal.SIGHUP]
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, also from who has taken them since."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_ctrl_c(self) -> bool:
        """Whether a person has interrupted it, which is told by the exit code; else it was stopped as it should be."""
        return self._first == signal.SIGINT

    def ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
            # Its callbacks swallow what is raised in them: once more, a moment later.
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()
            return
        self._first = self._first or number
        self.count += 1  # no Event: its lock may be held by the thread which the signal interrupts
        if self.count > 1 or not self.graceful:
            self.ignore()
            raise Interrupted(self._first)
